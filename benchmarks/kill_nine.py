"""Kills a run of `kdistill` with SIGKILL at random moments and compares its end with an uninterrupted run, bit by bit.

    python benchmarks/kill_nine.py --kills 10 --seed 0 --checkpoint-seconds 0.2 -- mnist --variant smoke

First the run goes through once, and the time is taken at which it comes to each stage, epoch and export. Then the same
run is started again and killed, at one random moment in each tenth of that time: when it has come to the same stage,
epoch or export, and as many seconds later, or when it comes to the next one, if that is sooner (the machine may be less
busy now). After each kill it goes on with `--resume`. A short run comes to the end of every epoch before a checkpoint
inside of it is due: `--checkpoint-seconds` makes them due sooner, in both runs; nothing else is changed.

At the end are compared: the weights of teacher, control and student, every metric of the last epoch, the TensorBoard
steps, and the bytes of the exported files. Exit status 0: all equal. 1: something differs.
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

STAGES = ("teacher", "control", "student")
RUN = (
    "import sys; from kdistill import cli; from kdistill.training import checkpoint; "
    "checkpoint.CHECKPOINT_SECONDS = float(sys.argv.pop(1)); cli.main()"
)


def resumed(log: Path) -> tuple[str, bool]:
    """Where a run has gone on, by what it has said, and whether that is inside of an epoch."""
    text = log.read_text(errors="replace")
    found = re.search(r"Resuming at step (\d+) of (\d+)\n(?:.*\n)*?Epoch \d+/(\d+)", text)
    if not found:  # before the first checkpoint of a stage, after the last one, or killed before it has said it
        return "-", False
    step, steps, epochs = map(int, found.groups())
    inside = bool(step % (steps // epochs))
    return f"step {step} of {steps}{', inside an epoch' if inside else ''}", inside


def events(log: Path) -> list[str]:
    """What a run has come to, by what it has said: stages, epochs, exports, the report."""
    found, stage = [], "start"
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("Training "):
            stage = line.split()[1].rstrip(":")
            found.append(f"{stage}: begins")
        elif line.startswith("Epoch "):
            found.append(f"{stage}: epoch {line.split()[1]}")
        elif line.startswith(("Exporting ", "Report: ")):
            found.append(line if line.startswith("E") else "report written")
        elif "Run folder: " in line:
            found.append("data read")
    return list(dict.fromkeys(found))


def wait_for(wanted: set[str], process: subprocess.Popen, log: Path, end: float) -> set[str]:
    """Waits for one of these events, for the end of the process or for a time; returns those that have come."""
    while not (found := wanted & set(events(log))) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    return found


def begin(words: list[str], out: Path, log: Path, seconds: float) -> subprocess.Popen:
    """Starts the run, or goes on with it; `seconds` from one checkpoint to the next."""
    more = ["--resume"] if (out / "recipe.json").exists() else []
    command = [sys.executable, "-c", RUN, str(seconds), "run", *words, "--out", str(out), *more]
    own = {**os.environ, "KDISTILL_CACHE": f"{out}-cache"}  # neither run gets from the other what it has stored
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=own)


def differences(first: Path, second: Path) -> list[str]:
    """What is not the same in two run folders, in words; nothing if all is."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np

    found = []
    for stage in STAGES:
        a, b = (keras.models.load_model(folder / f"{stage}.keras") for folder in (first, second))
        for x, y in zip(a.weights, b.weights, strict=True):
            if not np.array_equal(x.numpy(), y.numpy()):
                found.append(f"{stage}: {x.path} differs by up to {np.abs(x.numpy() - y.numpy()).max():.3g}")
    reports = [json.loads((folder / "report.json").read_text()) for folder in (first, second)]
    for stage in STAGES:
        fits = [{k: v for k, v in report["training"][stage].items() if k != "seconds"} for report in reports]
        if fits[0] != fits[1]:
            found.append(f"{stage}: metrics {fits[0]} and {fits[1]}")
    steps = [tensorboard(folder / "logs") for folder in (first, second)]
    if steps[0] != steps[1]:
        found.append("TensorBoard: other tags or steps")
    for path in sorted(first.glob("*/student.tflite")):
        if path.read_bytes() != (second / path.relative_to(first)).read_bytes():
            found.append(f"{path.relative_to(first)}: other bytes")
    return found


def tensorboard(logs: Path) -> dict:
    """(folder, tag) -> its steps, in the order of the files."""
    import tensorflow as tf
    from tensorboard.compat.proto.event_pb2 import Event

    found: dict = {}
    for path in sorted(logs.rglob("events*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = Event.FromString(record)
            for value in event.summary.value:
                found.setdefault((str(path.parent.relative_to(logs)), value.tag), []).append(event.step)
    return found


def main() -> int:
    """Runs, kills, compares, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--checkpoint-seconds", type=float, default=20.0, help="inside of an epoch; kdistill's own: 20")
    parser.add_argument("words", nargs="+", help="after --: what follows `kdistill run`")
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        straight, killed, log = Path(place, "straight"), Path(place, "killed"), Path(place, "log")
        process, start, timed = begin(options.words, straight, log, options.checkpoint_seconds), time.monotonic(), {}
        while process.poll() is None:
            for event in events(log):
                timed.setdefault(event, time.monotonic() - start)
            time.sleep(0.01)
        if process.returncode:
            print(log.read_text())
            return 2
        first, end = timed["data read"], timed["report written"]
        print(f"The uninterrupted run: {end:.1f} s, of which {first:.1f} s start-up", flush=True)
        print("| kill | at s | what it was doing | the next one resumed at |\n|---:|---:|---|---|", flush=True)
        row, inside = "", 0
        for number in range(options.kills):
            moment = first + (number + draw.random()) * (end - first) / options.kills
            event = max((e for e in timed if timed[e] <= moment), key=timed.get)
            process = begin(options.words, killed, log, options.checkpoint_seconds)
            reached = wait_for({e for e in timed if timed[e] >= timed[event]}, process, log, time.monotonic() + 3600)
            later = {e for e in timed if timed[e] > max(timed[e] for e in reached)} if reached else set()
            start = time.monotonic()
            wait_for(later, process, log, start + moment - timed[event])
            waited = time.monotonic() - start
            process.send_signal(signal.SIGKILL)
            ended = process.wait()
            after = f"{max(reached, key=timed.get, default=event)}, {waited:.2f} s later"
            if row:
                place, within = resumed(log)
                print(f"{row} {place} |", flush=True)
                inside += within
            row = f"| {number + 1} | {moment:.1f} | {after if ended < 0 else f'ended with {ended}'} |"
            if ended > 0:
                print(log.read_text())
                return 1
        process = begin(options.words, killed, log, options.checkpoint_seconds)
        if process.wait():
            print(log.read_text())
            return 1
        place, within = resumed(log)
        print(f"{row} {place} |\nResumed inside an epoch: {inside + within} times", flush=True)
        found = differences(straight, killed)
    print("\n".join(found) or "Equal bit by bit: weights, metrics, TensorBoard steps, exported files")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
