"""The time of the stages of `kdistill run mnist`, of this version and of another one.

    python benchmarks/stages.py --data-dir FOLDER [--before OTHER_PYTHON] [--repeats 3] [--set cache.views=4]

Every run is a new process. With `--before`, the Python of an environment with another version, the two versions take
turns. A stage lasts from the line that announces it to the next. Results are medians of wall time and of the CPU time
of the process and its children, and the test accuracy of all three models, which must not change.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from common import arguments, save

STAGES = ("start and data", "teacher", "control", "student", "measuring", "exports", "report")


def cpu_seconds(process: int) -> float:
    """CPU time of a process and of its children that have ended."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(int(value) for value in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def one_run(python: str, options: list[str]) -> dict:
    """Seconds by stage, wall and CPU, and the accuracies."""
    with tempfile.TemporaryDirectory() as folder:
        out, environment = f"{folder}/run", {**os.environ, "PYTHONUNBUFFERED": "1", "KDISTILL_CACHE": f"{folder}/cache"}
        command = [python, "-m", "kdistill.cli", "run", "mnist", "--out", out, *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
        )
        marks, last = [("start and data", time.perf_counter(), 0.0)], None
        lines = []
        for line in process.stdout:
            now = (time.perf_counter(), cpu_seconds(process.pid))
            lines.append(line)
            for name in ("teacher", "control", "student"):
                if line.startswith(f"Training {name}"):
                    marks.append((name, *now))
            if "val_loss" in line:
                last = now
            if line.startswith("Exporting") and marks[-1][0] != "exports":
                marks += [("measuring", *last), ("exports", *now)]
            if line.startswith("Report:"):
                marks.append(("report", *now))
        if process.wait():
            raise SystemExit("".join(lines))
        marks.append(("end", time.perf_counter(), marks[-1][2]))
        report = json.loads(Path(out, "report.json").read_text())
    run = {"wall": dict.fromkeys(STAGES, 0.0), "cpu": dict.fromkeys(STAGES, 0.0)}
    for (name, wall, cpu), (_, later, more) in pairwise(marks):
        run["wall"][name] += later - wall
        run["cpu"][name] += more - cpu
    run["accuracy"] = {row["name"]: row["accuracy"] for row in report["models"]}
    return run


def main() -> None:
    """Measures, prints, writes `stages.json` and `stages.svg`."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--data-dir")
    parser.add_argument("--before", help="the python of an environment that holds another version of kdistill")
    parser.add_argument("--set", nargs="*", default=[], help="key=value for this version alone, such as cache.views=4")
    args = parser.parse_args()
    common = ["--data-dir", args.data_dir] if args.data_dir else []
    mine = [*common, "--variant", "lenet", *(word for setting in args.set for word in ("--set", setting))]
    sides = {"before": (args.before, common)} if args.before else {}
    sides["now"] = (sys.executable, mine)
    runs = {name: [] for name in sides}
    for _ in range(args.repeats):
        for name, (python, options) in sides.items():
            runs[name].append(one_run(python, options))
            wall, cpu = (sum(runs[name][-1][clock].values()) for clock in ("wall", "cpu"))
            print(f"  {name}: {wall:.0f} s, CPU {cpu:.0f} s, {runs[name][-1]['accuracy']}", flush=True)
    medians = {
        name: {
            clock: {stage: float(np.median([run[clock][stage] for run in each])) for stage in STAGES}
            for clock in ("wall", "cpu")
        }
        for name, each in runs.items()
    }
    bars = {f"{stage}, {name}": medians[name]["wall"][stage] for stage in STAGES for name in sides}
    title = "kdistill run mnist by stage, median seconds"
    save("stages", {"runs": runs, "medians": medians, "set": args.set}, args.out, bars, title, "s")


if __name__ == "__main__":
    main()
