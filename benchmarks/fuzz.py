"""Damaged files, folders and command lines: an answer or one message each time, never a traceback, a crash or a hang.

    python benchmarks/fuzz.py                          # 50 of each kind
    python benchmarks/fuzz.py --inputs 1000 --seed 0   # 1,000 over all kinds
    python benchmarks/fuzz.py --count 200 --kind keras --seed 1

Each file is a good one with random bytes overwritten, cut off, repeated or inserted; those of a `.keras` archive also
inside the archive, with corrected checksums, and the recipes as a `.py` file or as a run's `recipe.json`. A quarter of
the folders of pictures has a PNG that claims any size; half of the IDX files are gzipped; half of the tars are damaged
inside of their gzip. Reports and caches have
values of other types and sizes, damaged bytes, and links to a file outside, which must not change. Command lines are
random words, options and numbers. An input may take 60 seconds and the process 2 GB.
The commands run in a process of their own, one after the other, so that a crash is seen as one. The exit status is 0
if all went well, else 1.
"""

import argparse
import contextlib
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

LIGHT = ("report", "cache", "words")  # need neither TensorFlow nor a model
KINDS = ("tflite", "keras", "idx", "recipe", "npz", *LIGHT, "images", "tar")
PICTURES = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp"}
SECONDS = 900  # for one file, until it counts as a hang
SLOW_SECONDS, MOST_KILOBYTES = 60, 2_000_000  # beyond these, an input is wrong
REPORT = {
    "recipe": {"name": "a", "variant": "default", "seed": 0, "data": {"teacher_labels": "all"}},
    "command": "kdistill run a",
    "machine": "a machine",
    "versions": {"python": "3.11"},
    "commit": None,
    "data": {"source": "a file", "fingerprint": "0", "class_names": ["a", "b"], "train": 8, "validation": 2, "test": 4},
    "training": {"student": {"seconds": 1.0, "steps": 2, "history": {"accuracy": [0.5, 0.75], "val_hard": [1.0, 0.5]}}},
    "verdict": {"word": "UNDECIDED", "headline": "UNDECIDED", "sentence": "UNDECIDED: a", "seeds": 2}
    | {"student": [0.5, 0.75], "control": [0.5, 0.5], "difference": 0.125, "low": -1.0, "high": 1.0, "level": 0.95},
    "models": [
        {"name": "teacher", "accuracy": 1.0, "parameters": 9, "kl": 0.0, "ece": 0.1},
        {"name": "student", "accuracy": 0.75, "parameters": 3, "kl": 0.5, "ece": 0.1},
        {"name": "npu", "accuracy": 0.75, "bytes": 2000, "deflated": 900, "microseconds": 3.5},
    ],
    "diagnostics": {
        "student": {
            "confusion": [[2, 0], [1, 1]],
            "per_class": [1.0, 0.5],
            "reliability": {"confidence": [None, 0.9], "accuracy": [None, 0.75], "count": [0, 4]},
        }
    },
    "differences": {"images": 4, "count": 1, "student_right": 0, "teacher_right": 1}
    | {
        "pictures": [
            {"file": "differences/0.png", "index": 0, "label": 1, "student": 0, "teacher": 1}
            | {"student_confidence": 0.75, "teacher_confidence": 0.5}
        ]
    },
    "files": [{"path": "npu/student.tflite", "profile": "npu", "bytes": 2000, "float_layers": []}],
}
STRANGE = (
    None,
    True,
    -1,
    0,
    0.5,
    10**400,
    1e308,
    "",
    "../../victim",
    "/etc/passwd",
    "\x1b[31m",
    [],
    [None],
    {},
    "0" * 9999,
)
COMMANDS = ("run", "sweep", "evaluate", "benchmark", "inspect", "export", "compress", "report", "list", "cache", "plan")
WORDS = (
    *("mnist", "nothing", "", "-", "--", "build", "verify", "prune", "--json", "--resume", "--force", "--set"),
    *("--seeds", "seeds=3", "training.epochs=0", "training.epochs=99999999999", "x=1", "--grid", "temperature=1,1.0"),
    *("--out", "out", "--key", "--days", "--threads", "--data", "image_folder", "--data-dir", "nowhere", "--profile"),
    *("npu", "--variant", "smoke", "-1", "1e999", "nan", "\udcff", "a\x00b", "~nosuch", "--cache", "--teacher"),
    *("none.keras", "--shift"),
)


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
    from kdistill.data import cifar, mnist
    from kdistill.networks import architectures
    from kdistill.recipe import Network

    random = np.random.default_rng(0)
    (folder / "idx").mkdir()
    for part, count in (("train", 80), ("t10k", 40)):
        mnist.write_idx(folder / "idx" / f"{part}-images-idx3-ubyte", random.integers(0, 256, (count, 28, 28)))
        mnist.write_idx(folder / "idx" / f"{part}-labels-idx1-ubyte", np.arange(count) % 10)
    arrays = {"x_train": random.integers(0, 256, (80, 28, 28, 1)).astype(np.uint8), "y_train": np.arange(80) % 10}
    arrays |= {"x_test": arrays["x_train"][:40], "y_test": arrays["y_train"][:40]}
    np.savez_compressed(folder / "images.npz", **arrays)
    keras.utils.set_random_seed(0)
    model = architectures.build(Network("small_cnn"), (28, 28, 1), 10)
    model.save(folder / "student.keras")
    images = random.integers(0, 256, (40, 28, 28, 1)).astype(np.uint8)
    export(model, folder / "student.tflite", "npu", images, class_names=[str(i) for i in range(10)])
    keras.utils.set_random_seed(0)
    architectures.build(Network("small_cnn"), (16, 16, 3), 2).save(folder / "pictures.keras")
    architectures.build(Network("small_cnn"), (32, 32, 3), 10).save(folder / "cifar.keras")
    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as tar:
        for name in (*(f"data_batch_{place}.bin" for place in range(1, 6)), "test_batch.bin"):
            records = random.integers(0, 256, (20, cifar.RECORD)).astype(np.uint8)
            records[:, 0] = np.arange(20) % 10
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size, member.pax_headers = records.nbytes, {"comment": "a" * 200}
            tar.addfile(member, io.BytesIO(records.tobytes()))
    from kdistill.recipes.mnist import recipe

    from kdistill.recipe.checks import check_recipe
    from kdistill.recipe.values import as_dict

    whole = json.dumps({**as_dict(check_recipe(recipe("smoke"))), "data_fingerprint": "0"}, indent=1)
    (folder / "recipe.json").write_text(whole)
    text = Path(sys.modules["kdistill.recipes.mnist"].__file__).read_text()
    (folder / "recipe.py").write_text(text)


def changed_value(value, random: np.random.Generator):
    """A JSON value, one part of which is deleted or replaced by something strange."""
    value = json.loads(json.dumps(value))
    owner = value
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        key = keys[int(random.integers(len(keys)))]
        inner = owner[key]
        if isinstance(inner, (dict, list)) and inner and random.random() < 0.8:
            owner = inner
            continue
        if random.random() < 0.2:
            del owner[key]
        else:
            owner[key] = STRANGE[int(random.integers(len(STRANGE)))]
        return value


def light_words(kind: str, place: Path, random: np.random.Generator) -> list[str]:
    """A damaged report, cache or command line, with a file `victim` beside it that must not change."""
    victim = place / "victim"
    victim.write_text("precious")
    if kind == "words":
        count = int(random.integers(7))
        chosen = [COMMANDS[int(random.integers(len(COMMANDS)))], *(str(w) for w in random.choice(WORDS, count))]
        return chosen if chosen[0] not in ("run", "sweep", "plan") else [*chosen, "--set", "training.epochs=0"]
    folder = place / "runs" / ("a" * 16 if kind == "cache" else "run")
    (folder / "differences").mkdir(parents=True)
    name = "about.json" if kind == "cache" else "report.json"
    about = {
        "rows": 4,
        "part_rows": 2,
        "classes": 3,
        "top_k": None,
        "teacher_name": "a",
        "source": "b",
        "split": "train",
    }
    whole = about if kind == "cache" else REPORT
    text = json.dumps(changed_value(whole, random))
    (folder / name).write_bytes(damaged(text.encode(), random) if random.random() < 0.3 else text.encode())
    (folder / "differences/0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + random.bytes(9))
    links = (
        name,
        "report.html",
        ".part-report.html",
        "differences/0.png",
        f"view-0000-part-0000-{'0' * 16}.npy",
        ".lock",
    )
    if random.random() < 0.4:
        link = folder / links[int(random.integers(len(links)))]
        link.unlink(missing_ok=True)
        os.mkfifo(link) if random.random() < 0.3 else link.symlink_to(victim)
    if kind == "report":
        return ["report", str(folder), *(["--json"] if random.random() < 0.5 else [])]
    commands = (["list"], ["verify"], ["verify", "--key", "a"], ["prune", "--days", "0"], ["prune", "--key", ""])
    return ["cache", *commands[int(random.integers(len(commands)))], "--cache", str(place / "runs")]


def pictures(place: Path, i: int, random: np.random.Generator) -> None:
    """A folder with two classes of pictures in all formats, one of which is damaged, or claims to be large."""
    from PIL import Image

    names = list(PICTURES)
    for name in ("a", "b"):
        folder = place / "pictures" / name
        folder.mkdir(parents=True)
        for j, kind in enumerate(2 * names):
            pixels = random.integers(0, 256, (20, 24, 3)).astype(np.uint8)
            content = io.BytesIO()
            Image.fromarray(pixels).save(content, kind)
            content = content.getvalue()
            if name == "a" and j == i % len(names):
                content = damaged(content, random)
            if name == "a" and kind == "PNG" and i % 4 == 3:
                width, height = (int(2 ** random.uniform(0, 31)) for _ in range(2))
                header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
                content = content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]
            (folder / f"{j}.{PICTURES[kind]}").write_bytes(content)


def words_of(kind: str, i: int, good: Path, place: Path, random: np.random.Generator) -> list[str]:
    """Writes the damaged file and gives the command that meets it."""
    data = ["--data-dir", str(good / "idx")]
    if kind in LIGHT:
        return light_words(kind, place, random)
    if kind == "npz":
        path = place / "images.npz"
        change = damaged_archive if i % 2 else damaged
        path.write_bytes(change((good / path.name).read_bytes(), random))
        return ["evaluate", str(good / "student.tflite"), "--data", "npz", "--data-dir", str(path), "--json"]
    if kind == "tflite":
        path = place / "student.tflite"
        path.write_bytes(damaged((good / path.name).read_bytes(), random))
        return ["inspect", str(path), "--json"] if i % 2 else ["evaluate", str(path), *data, "--json"]
    if kind == "keras":
        path = place / "student.keras"
        change = damaged_archive if i % 2 else damaged
        path.write_bytes(change((good / path.name).read_bytes(), random))
        return ["evaluate", str(path), *data, "--json"]
    if kind == "images":
        pictures(place, i, random)
        words = ["--data", "image_folder", "--data-dir", str(place / "pictures"), "--image-size", "16", "--json"]
        return ["evaluate", str(good / "pictures.keras"), *words]
    if kind == "tar":
        content, path = (good / "cifar.tar.gz").read_bytes(), place / "cifar.tar.gz"
        inside = gzip.compress(damaged(gzip.decompress(content), random), 1)
        path.write_bytes(inside if i % 2 else damaged(content, random))
        return ["evaluate", str(good / "cifar.keras"), "--data", "cifar10", "--data-dir", str(path), "--json"]
    if kind == "idx":
        names = sorted(path.name for path in (good / "idx").iterdir())
        for j, name in enumerate(names):
            content = (good / "idx" / name).read_bytes()
            if i % 8 >= 4:
                name, content = f"{name}.gz", gzip.compress(content)
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


def _peak_kilobytes() -> int:
    """The most memory that this process has had, in kB. Not `ru_maxrss`, which begins with that of the parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0])


def work(kind: str, first: int, count: int, seed: int, good: Path) -> None:
    """The process of its own: prints a line of JSON for each file."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    from typer.testing import CliRunner

    from kdistill.cli.commands import app

    runner = CliRunner()
    for i in range(first, count):
        random = np.random.default_rng([seed, KINDS.index(kind), i])
        with tempfile.TemporaryDirectory(prefix="kdistill-fuzz-") as place:
            words, started = words_of(kind, i, good, Path(place), random), time.monotonic()
            with contextlib.chdir(place):
                ended = runner.invoke(app, words)
            victim = Path(place, "victim")
            changed = victim.exists() and victim.read_text() != "precious"
        bad = "the file outside was changed" if changed else None
        seconds, kilobytes = time.monotonic() - started, _peak_kilobytes()
        if seconds > SLOW_SECONDS or kilobytes > MOST_KILOBYTES:
            bad = f"{seconds:.0f} s, {kilobytes / 1e6:.2f} GB"
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            bad = f"{type(ended.exception).__name__}: {ended.exception}"
        elif "Traceback" in ended.output:
            bad = "a traceback"
        elif ended.exit_code and not any(
            word in ended.output for word in ("Error: ", "Failed: ", "Usage: ", "─ Error")
        ):
            bad = f"exit status {ended.exit_code} without a message"
        said = (ended.stderr.strip().splitlines() or [""])[-1]
        print(json.dumps({"i": i, "status": ended.exit_code, "bad": bad, "words": words, "said": said}), flush=True)


def run(kinds: list[str], count: int, seed: int, say=print, verbose: bool = False) -> list[dict]:
    """Runs all; returns what went wrong."""
    wrong = []
    with tempfile.TemporaryDirectory(prefix="kdistill-fuzz-") as folder:
        good = Path(folder)
        if set(kinds) - set(LIGHT):
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
    parser.add_argument("--inputs", type=int, help="of all kinds together, instead of --count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="what each command said")
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, first, count, seed, good = options.worker
        work(kind, int(first), int(count), int(seed), Path(good))
        return
    kinds = options.kind or list(KINDS)
    count = options.count if options.inputs is None else -(-options.inputs // len(kinds))
    wrong = run(kinds, count, options.seed, verbose=options.verbose)
    for each in wrong:
        print(json.dumps(each))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
