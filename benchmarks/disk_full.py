"""Runs `kdistill` on disks that are too small: each time one message that names the folder, then the same bits.

    python benchmarks/disk_full.py                # 20 sizes, over the run folder, the teacher cache and TMPDIR
    python benchmarks/disk_full.py --sizes 3 --place TMPDIR

First the run goes through once, with each of the three folders on a tmpfs that is large enough, and their peaks are
measured. Then, for sizes spread evenly from nothing to the peak of a folder, that folder is a tmpfs of this size. The
run has to end with exit status 2 and one message that names the folder (or with 0, if it fits: TMPDIR holds much only
for a moment). Then the tmpfs gets space, the run is continued, and its end is compared with the first one, bit by bit.

Mounting needs Linux and root (`unshare -rm` for others). Exit status 0: all as it should be.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import kill_nine

PLACES = {"out": "", "cache": "-cache", "TMPDIR": "-tmp"}  # the endings of folders, as in kill_nine
WORDS = ("run", "mnist", "--variant", "smoke", "--cache", "CACHE", "--set", "cache.views=1", "--set", "seeds=1")
WORDS += ("--set", "train_limit=320", "--set", "training.epochs=1", "--set", "teacher_training.epochs=1")
WORDS += ("--set", "exports=reference")
PAGE, LARGE = 4096, 1 << 30


@contextlib.contextmanager
def tmpfs(path: Path, size: int) -> Iterator[None]:
    """A file system in memory with `size` bytes, at a new folder."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def run(out: Path) -> tuple[int, str]:
    """The exit status and the output of the run, or of its continuation, in this process."""
    from typer.testing import CliRunner

    from kdistill.cli.commands import app

    words = [f"{out}-cache" if word == "CACHE" else word for word in WORDS]
    more = ["--resume"] if (out / "recipe.json").exists() else []
    os.environ["TMPDIR"], tempfile.tempdir = f"{out}-tmp", None
    ended = CliRunner().invoke(app, [*words, "--out", str(out), *more])
    if ended.exception is not None and not isinstance(ended.exception, SystemExit):
        return -1, f"{ended.output}\n{type(ended.exception).__name__}: {ended.exception}"
    return ended.exit_code, ended.output


def peaks(out: Path) -> dict[str, int]:
    """Runs once with enough space everywhere; the most bytes that each place has held."""
    most, ended = dict.fromkeys(PLACES, 0), threading.Event()

    def watch() -> None:
        while not ended.is_set():
            for place, end in PLACES.items():
                with contextlib.suppress(OSError):
                    most[place] = max(most[place], shutil.disk_usage(f"{out}{end}").used)
            time.sleep(0.01)

    with contextlib.ExitStack() as mounts:
        for end in PLACES.values():
            mounts.enter_context(tmpfs(Path(f"{out}{end}"), LARGE))
        thread = threading.Thread(target=watch)
        thread.start()
        status, output = run(out)
        ended.set()
        thread.join()
        if status:
            raise SystemExit(f"The run with enough space ended with {status}:\n{output}")
        for end in PLACES.values():  # what is compared stays
            shutil.copytree(f"{out}{end}", f"{out}{end}.copy")
    for end in PLACES.values():
        Path(f"{out}{end}").rmdir()
        Path(f"{out}{end}.copy").rename(f"{out}{end}")
    return most


def fill(place: str, size: int, out: Path, straight: Path) -> tuple[str, list[str]]:
    """Runs with a tmpfs of `size` bytes at `place`, then with enough space; the message, and what is wrong."""
    full = Path(f"{out}{PLACES[place]}")
    for end in PLACES.values():
        if end != PLACES[place] and end:
            Path(f"{out}{end}").mkdir()
    with tmpfs(full, size):
        status, output = run(out)
        message = next((line for line in output.splitlines() if line.startswith(("Error: ", "Failed: "))), "")
        wrong = []
        if status not in (0, 2) or "Traceback" in output:
            wrong.append(f"exit status {status}: {output[-2000:]}")
        elif status and str(full) not in message:
            wrong.append(f"a message that does not name {full}: {message}")
        left = len(list(Path(f"{out}-tmp").iterdir()))
        wrong += [f"{left} files left in TMPDIR"] if left else []
        subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(full)], check=True)
        again, output = (status, output) if status == 0 else run(out)
        if again:
            wrong.append(f"the continuation ended with {again}: {output[-2000:]}")
        else:
            wrong += kill_nine.differences(straight, out)
    for end in PLACES.values():
        shutil.rmtree(f"{out}{end}", ignore_errors=True)
    return message.replace(str(full), "FOLDER") or "it fits", wrong


def main() -> int:
    """Measures, fills, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=20, help="of all places together")
    parser.add_argument("--place", action="append", choices=PLACES)
    options = parser.parse_args()
    places, failed = options.place or list(PLACES), 0
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory(prefix="kdistill-full-") as base:
        straight = Path(base, "straight")
        most = peaks(straight)
        print(", ".join(f"{place}: {most[place]:,} bytes" for place in PLACES), flush=True)
        print("| place | bytes | what the run said | continued |\n|---|---:|---|---|", flush=True)
        for number in range(options.sizes):
            place, turn = places[number % len(places)], number // len(places)
            turns = len(range(number % len(places), options.sizes, len(places)))
            size = max(1, round(most[place] * (turn + 0.5) / turns / PAGE)) * PAGE
            message, wrong = fill(place, size, Path(base, f"full-{number}"), straight)
            print(f"| {place} | {size:,} | {message} | {'; '.join(wrong) or 'equal bit by bit'} |", flush=True)
            failed += bool(wrong)
    print(f"{options.sizes} sizes, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
