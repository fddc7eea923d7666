"""Stops commands of `kdistill` at random moments, resumes them, and compares with uninterrupted ones, bit by bit.

    python benchmarks/kill_nine.py --kills 30                    # SIGKILL, over all cases
    python benchmarks/kill_nine.py --kills 10 --signal TERM      # SIGTERM: also exit status, message, temporary files
    python benchmarks/kill_nine.py --kills 10 --checkpoint-seconds 0.2 -- mnist --variant smoke   # a run of your own

Cases (`--case`, all by default) of the smallest sizes: `mnist`, `few_labels`, a `sweep`, a `compression`, a run from a
`cache`. The kills are dealt out to the cases by turns.

First the command goes through once, and the time is taken at which it comes to each stage, epoch and export. Then the
same command is started again and killed, at one random moment in each part of that time: when it has come to the same
stage, epoch or export, and as many seconds later, or when it comes to the next one, if that is sooner (the machine may
be less busy now). After each kill it goes on with `--resume`. A short run comes to the end of every epoch before a
checkpoint inside of it is due: `--checkpoint-seconds` makes them due sooner, in both; nothing else is changed.

At the end are compared: the weights of all models, reports without times, the TensorBoard steps, the bytes of exported
files, and the parts of the teacher cache. Exit status 0: all equal. 1: something differs.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = (
    "import sys; from kdistill import cli; from kdistill.training import checkpoint; "
    "checkpoint.CHECKPOINT_SECONDS = float(sys.argv.pop(1)); cli.main()"
)
TINY = ("train_limit=640", "exports=reference", "training.batch_size=32", "teacher_training.batch_size=32")
TINY += ("training.epochs=2", "teacher_training.epochs=2")
CASES = {
    "mnist": ("run", "mnist", "--variant", "smoke", "--set", "seeds=2"),
    "few_labels": ("run", "mnist", "--variant", "few_labels", "--set", "labeled=100", "--set", "train_limit=1000"),
    "sweep": ("sweep", "mnist", "--variant", "smoke", "--grid", "temperature=1,4", "--grid", "distillation_weight=0.9"),
    "compression": ("run", "mnist", "--variant", "pqat", "--set", "compress.0.epochs=1", "--set", "seeds=1"),
    "cache": ("run", "mnist", "--variant", "smoke", "--set", "cache.views=1", "--cache", "CACHE"),
}
TIMES = {"seconds", "microseconds", "command", "folder", "cost", "per_second"}  # of a report: may differ
CHECKED = {"KILL": signal.SIGKILL, "TERM": signal.SIGTERM}


def words_of(case: str) -> list[str]:
    """The command of a case, with its smallest sizes."""
    command, tiny = list(CASES[case]), dict(setting.split("=") for setting in TINY)
    keys = {word.split("=")[0] for word in command if "=" in word}
    return command + [word for key, value in tiny.items() if key not in keys for word in ("--set", f"{key}={value}")]


def resumed(log: Path) -> tuple[str, bool]:
    """Where a run has gone on, by what it has said, and whether that is inside of an epoch."""
    text = log.read_text(errors="replace")
    said = re.search(r"Resuming at step ([\d,]+) of ([\d,]+)\n(?:.*\n)*?Epoch \d+(?:/| of )(\d+)", text)
    if not said:  # before the first checkpoint of a stage, after the last one, or killed before it has said it
        return "-", False
    step, steps, epochs = (int(number.replace(",", "")) for number in said.groups())
    inside = bool(step % (steps // epochs))
    return f"step {step} of {steps}{', inside an epoch' if inside else ''}", inside


def events(log: Path) -> list[str]:
    """What a command has come to, by what it has said: stages, epochs, exports, the report."""
    reached, stage = [], "start"
    for line in log.read_text(errors="replace").splitlines():
        epoch = re.match(r"(?:Epoch |.*?, epoch )(\d+)(?:/| of )(\d+)", line)
        if line.startswith(("Training ", "Compressing ")):
            stage = line.split()[1].rstrip(":")
            reached.append(f"{stage}: begins")
        elif epoch:
            reached.append(f"{stage}: epoch {epoch[1]}/{epoch[2]}")
        elif line.startswith(("Exporting ", "Report: ")):
            reached.append(line if line.startswith("E") else "report written")
        elif " folder: " in line and line.startswith("Data: "):
            reached.append("data read")
    return list(dict.fromkeys(reached))


def wait_for(wanted: set[str], process: subprocess.Popen, log: Path, end: float) -> set[str]:
    """Waits for one of these events, for the end of the process or for a time; returns those that have come."""
    while not (reached := wanted & set(events(log))) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    return reached


def begin(words: list[str], out: Path, log: Path, seconds: float) -> subprocess.Popen:
    """Starts the command, or goes on with it; `seconds` from one checkpoint to the next."""
    more = ["--resume"] if (out / "recipe.json").exists() else []
    cache, temporary = Path(f"{out}-cache"), Path(f"{out}-tmp")  # neither gets from the other what it has stored
    temporary.mkdir(exist_ok=True)
    words = [str(cache) if word == "CACHE" else word for word in words]
    command = [sys.executable, "-c", RUN, str(seconds), *words, "--out", str(out), *more]
    own = {**os.environ, "KDISTILL_CACHE": str(cache), "TMPDIR": str(temporary)}
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=own)


def stopped_wrongly(status: int, out: Path, log: Path) -> list[str]:
    """What SIGTERM has left, and what the command has not said."""
    wrong = [] if status == 143 else [f"SIGTERM: exit status {status}"]
    if f"--resume --out {out}" not in log.read_text(errors="replace"):
        wrong.append("SIGTERM: no message on how to go on")
    left = sorted(path.name for path in Path(f"{out}-tmp").iterdir())
    return wrong + ([f"SIGTERM: the temporary folder holds {', '.join(left)}"] if left else [])


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same in two folders, in words; nothing if all is."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np

    different = []
    for pattern in ("*.keras", "*.tflite"):
        names = [
            {str(p.relative_to(f)) for p in f.rglob(pattern) if "checkpoints" not in p.parts} for f in (first, second)
        ]
        different += [f"only in one folder: {name}" for name in sorted(names[0] ^ names[1])]
        for name in sorted(names[0] & names[1]):
            if pattern == "*.tflite":
                different += (
                    [] if (first / name).read_bytes() == (second / name).read_bytes() else [f"{name}: other bytes"]
                )
                continue
            models = [keras.models.load_model(folder / name, compile=False) for folder in (first, second)]
            for x, y in zip(*(model.weights for model in models), strict=True):
                if not np.array_equal(x.numpy(), y.numpy()):
                    different.append(f"{name}: {x.path} differs by up to {np.abs(x.numpy() - y.numpy()).max():.3g}")
    for name in ("report.json", "sweep.json"):
        if (first / name).exists():
            pair = [without_times(json.loads((folder / name).read_text())) for folder in (first, second)]
            keys = [key for key in pair[0].keys() | pair[1].keys() if pair[0].get(key) != pair[1].get(key)]
            different += [f"{name}: {key}: {pair[0].get(key)} and {pair[1].get(key)}" for key in sorted(keys)]
    if tensorboard(first / "logs") != tensorboard(second / "logs"):
        different.append("TensorBoard: other tags or steps")
    parts = [{str(p.relative_to(f"{f}-cache")) for p in Path(f"{f}-cache").rglob("*.npy")} for f in (first, second)]
    return different + [f"teacher cache: only in one: {name}" for name in sorted(parts[0] ^ parts[1])]  # with checksums


def without_times(value):
    """A report without what may differ: times, and what names the folder."""
    if isinstance(value, dict):
        return {key: without_times(inner) for key, inner in value.items() if key not in TIMES}
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def tensorboard(logs: Path) -> dict:
    """(folder, tag) -> its steps, in the order of the files."""
    import tensorflow as tf
    from tensorboard.compat.proto.event_pb2 import Event

    steps: dict = {}
    for path in sorted(logs.rglob("events*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = Event.FromString(record)
            for value in event.summary.value:
                steps.setdefault((str(path.parent.relative_to(logs)), value.tag), []).append(event.step)
    return steps


def stop_and_compare(
    words: list[str], kills: int, number: int, draw: random.Random, seconds: float
) -> list[str] | None:
    """Runs a command through, and again with `kills` stops; what differs, or None if the command failed."""
    with tempfile.TemporaryDirectory() as place:
        straight, killed, log = Path(place, "straight"), Path(place, "killed"), Path(place, "log")
        process, start, timed = begin(words, straight, log, seconds), time.monotonic(), {}
        while process.poll() is None:
            for event in events(log):
                timed.setdefault(event, time.monotonic() - start)
            time.sleep(0.01)
        if process.returncode:
            print(log.read_text())
            return None
        first, end = timed["data read"], timed["report written"]
        print(f"The uninterrupted command: {end:.1f} s, of which {first:.1f} s start-up", flush=True)
        print("| kill | at s | what it was doing | the next one resumed at |\n|---:|---:|---|---|", flush=True)
        row, inside, wrong = "", 0, []
        for kill in range(kills):
            moment = first + (kill + draw.random()) * (end - first) / kills
            event = max((e for e in timed if timed[e] <= moment), key=timed.get)
            process = begin(words, killed, log, seconds)
            reached = wait_for({e for e in timed if timed[e] >= timed[event]}, process, log, time.monotonic() + 3600)
            later = {e for e in timed if timed[e] > max(timed[e] for e in reached)} if reached else set()
            start = time.monotonic()
            wait_for(later, process, log, start + moment - timed[event])
            waited = time.monotonic() - start
            complete = "report written" in events(log)
            process.send_signal(number)
            ended = process.wait()
            if number == signal.SIGTERM and ended == 0 and not complete:
                wrong.append(f"SIGTERM at {moment:.1f} s had no effect")
            if number == signal.SIGTERM and ended:
                wrong += stopped_wrongly(ended, killed, log)
            stopped = ended in (-signal.SIGKILL, 143)
            after = f"{max(reached, key=timed.get, default=event)}, {waited:.2f} s later"
            if row:
                step, within = resumed(log)
                print(f"{row} {step} |", flush=True)
                inside += within
            row = f"| {kill + 1} | {moment:.1f} | {after if stopped else f'ended with {ended}'} |"
            if ended and not stopped:
                print(log.read_text())
                return None
        process = begin(words, killed, log, seconds)
        if process.wait():
            print(log.read_text())
            return None
        step, within = resumed(log)
        print(f"{row} {step} |\nResumed inside an epoch: {inside + within} times", flush=True)
        wrong += differences(straight, killed)
    print("\n".join(wrong) or "Equal bit by bit: models, reports, TensorBoard steps, exported files, cache", flush=True)
    return wrong


def main() -> int:
    """Runs, stops, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10, help="of all cases together")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated; default: all")
    parser.add_argument("--signal", choices=CHECKED, default="KILL")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--checkpoint-seconds", type=float, default=0.2, help="inside of an epoch; kdistill's own: 20")
    parser.add_argument("words", nargs="*", help="after --: what follows `kdistill run`, instead of the cases")
    options = parser.parse_args()
    draw, names = random.Random(options.seed), options.case or list(CASES)
    commands = {"run": ["run", *options.words]} if options.words else {name: words_of(name) for name in names}
    failed, done = [], 0
    for place, (name, words) in enumerate(commands.items()):
        kills = options.kills // len(commands) + (place < options.kills % len(commands))
        if not kills:
            continue
        print(f"\n{name}: kdistill {' '.join(words)}", flush=True)
        wrong = stop_and_compare(words, kills, CHECKED[options.signal], draw, options.checkpoint_seconds)
        failed += [name] if wrong or wrong is None else []
        done += kills
    print(f"\n{done} x SIG{options.signal}: {'wrong: ' + ', '.join(failed) if failed else 'all equal bit by bit'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
