"""Damaged files at the command line: a clear error or an answer each time, never a traceback, a crash or a hang.

    python benchmarks/fuzz.py                          # 200 files: 50 each of .tflite, .keras, IDX and recipe files
    python benchmarks/fuzz.py --count 200 --kind keras --seed 1

Each file is a good one with random bytes overwritten, cut off, repeated or inserted; those of a `.keras` archive also
inside the archive, with corrected checksums, and the recipes as a `.py` file or as a run's `recipe.json`.
The commands run in a process of their own, one after the other, so that a crash is seen as one. The exit status is 0
if all went well, else 1.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

KINDS = ("tflite", "keras", "idx", "recipe")
SECONDS = 900  # for one file, until it counts as a hang


def damaged(content: bytes, random: np.random.Generator) -> bytes:
    """The content, changed in one of five ways."""
    place, changed = int(random.integers(len(content))), bytearray(content)
    length = int(random.integers(1, 17))
    how = int(random.integers(5))
    if how == 0:
        return bytes(changed[:place])
    if how == 1:
        for each in random.integers(len(content), size=length):
            changed[each] = random.integers(256)
    elif how == 2:
        changed[place : place + length] = random.bytes(length)
    elif how == 3:
        changed[place:place] = changed[place : place + length]
    else:
        changed[place : place + length] = bytes(length) if random.integers(2) else b"\xff" * length
    return bytes(changed)


def damaged_archive(content: bytes, random: np.random.Generator) -> bytes:
    """A zip archive, one of whose members is damaged, its checksum right."""
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(changed, "w") as new:
        names = old.namelist()
        chosen = names[int(random.integers(len(names)))]
        for name in names:
            new.writestr(name, damaged(old.read(name), random) if name == chosen else old.read(name))
    return changed.getvalue()


def good_files(folder: Path) -> None:
    """A small data set, a trained-looking student and its files."""
    import keras

    from kdistill.conversion.export import export
    from kdistill.data import mnist
    from kdistill.networks import architectures
    from kdistill.recipe import Network

    random = np.random.default_rng(0)
    (folder / "idx").mkdir()
    for part, count in (("train", 80), ("t10k", 40)):
        mnist.write_idx(folder / "idx" / f"{part}-images-idx3-ubyte", random.integers(0, 256, (count, 28, 28)))
        mnist.write_idx(folder / "idx" / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    keras.utils.set_random_seed(0)
    model = architectures.build(Network("small_cnn"), (28, 28, 1), 10)
    model.save(folder / "student.keras")
    images = random.integers(0, 256, (40, 28, 28, 1)).astype(np.uint8)
    export(model, folder / "student.tflite", "npu", images, class_names=[str(i) for i in range(10)])
    from kdistill.recipes.mnist import recipe

    from kdistill.recipe.checks import check_recipe
    from kdistill.recipe.values import as_dict

    whole = json.dumps({**as_dict(check_recipe(recipe("smoke"))), "data_fingerprint": "0"}, indent=1)
    (folder / "recipe.json").write_text(whole)
    text = Path(sys.modules["kdistill.recipes.mnist"].__file__).read_text()
    (folder / "recipe.py").write_text(text)


def words_of(kind: str, i: int, good: Path, place: Path, random: np.random.Generator) -> list[str]:
    """Writes the damaged file and gives the command that meets it."""
    data = ["--data-dir", str(good / "idx")]
    if kind == "tflite":
        path = place / "student.tflite"
        path.write_bytes(damaged((good / path.name).read_bytes(), random))
        return ["inspect", str(path), "--json"] if i % 2 else ["evaluate", str(path), *data, "--json"]
    if kind == "keras":
        path = place / "student.keras"
        change = damaged_archive if i % 2 else damaged
        path.write_bytes(change((good / path.name).read_bytes(), random))
        return ["evaluate", str(path), *data, "--json"]
    if kind == "idx":
        names = sorted(path.name for path in (good / "idx").iterdir())
        for j, name in enumerate(names):
            content = (good / "idx" / name).read_bytes()
            (place / name).write_bytes(damaged(content, random) if j == i % len(names) else content)
        return ["evaluate", str(good / "student.tflite"), "--data-dir", str(place), "--json"]
    if i % 2:
        (place / "run").mkdir()
        (place / "run" / "recipe.json").write_bytes(damaged((good / "recipe.json").read_bytes(), random))
        # A run that goes on would train; this one was started with other data, so it ends with that.
        return ["run", "mnist", "--variant", "smoke", "--resume", "--out", str(place / "run"), *data]
    path = place / "recipe.py"
    path.write_bytes(damaged((good / "recipe.py").read_bytes(), random))
    return ["run", str(path), "--variant", "smoke", "--resume", "--out", str(place / "none"), *data]


def work(kind: str, first: int, count: int, seed: int, good: Path) -> None:
    """The process of its own: prints a line of JSON for each file."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from typer.testing import CliRunner

    from kdistill.cli.commands import app

    runner = CliRunner()
    for i in range(first, count):
        random = np.random.default_rng([seed, KINDS.index(kind), i])
        with tempfile.TemporaryDirectory(prefix="kdistill-fuzz-") as place:
            words = words_of(kind, i, good, Path(place), random)
            with contextlib.chdir(place):
                ended = runner.invoke(app, words)
        bad = None
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            bad = f"{type(ended.exception).__name__}: {ended.exception}"
        elif "Traceback" in ended.output:
            bad = "a traceback"
        elif ended.exit_code and not any(word in ended.output for word in ("Error: ", "Failed: ")):
            bad = f"exit status {ended.exit_code} without a message"
        said = (ended.stderr.strip().splitlines() or [""])[-1]
        print(json.dumps({"i": i, "status": ended.exit_code, "bad": bad, "words": words, "said": said}), flush=True)


def run(kinds: list[str], count: int, seed: int, say=print, verbose: bool = False) -> list[dict]:
    """Runs all; returns what went wrong."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="kdistill-fuzz-") as folder:
        good = Path(folder)
        good_files(good)
        for kind in kinds:
            done, statuses = 0, Counter()
            while done < count:
                command = [sys.executable, __file__, "--worker", kind, str(done), str(count), str(seed), folder]
                with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
                    try:
                        output, _ = process.communicate(timeout=SECONDS * (count - done))
                    except subprocess.TimeoutExpired:
                        process.kill()
                        output, _ = process.communicate()
                rows = [json.loads(line) for line in output.splitlines() if line.startswith('{"i"')]
                for row in rows if verbose else ():
                    say(f"  {kind} {row['i']}: {row['status']} {row['said'][:200]}")
                wrong += [{**row, "kind": kind} for row in rows if row["bad"]]
                statuses.update(row["status"] for row in rows)
                done = rows[-1]["i"] + 1 if rows else done
                if done < count:  # the process died on the next one
                    wrong.append({"kind": kind, "i": done, "bad": f"the process ended with {process.returncode}"})
                    done += 1
            answers = f"{statuses[0]} answered, {statuses[1]} failed a check, {statuses[2]} refused"
            say(f"{kind}: {count} files, {answers}, {sum(each['kind'] == kind for each in wrong)} wrong")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=KINDS, action="append")
    parser.add_argument("--count", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="what each command said")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, first, count, seed, good = options.worker
        work(kind, int(first), int(count), int(seed), Path(good))
        return
    wrong = run(options.kind or list(KINDS), options.count, options.seed, verbose=options.verbose)
    for each in wrong:
        print(json.dumps(each))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
