"""The time until something happens: `import kdistill` and `kdistill --help`, against Python and Keras.

    python benchmarks/startup.py [--repeats 7]

Every measurement is a new process, by turns; wall time and CPU time of the process, in seconds.
"""

import os
import subprocess
import sys
import time

import numpy as np
from common import arguments, save

SIDES = {
    "python alone": [sys.executable, "-c", "pass"],
    "import kdistill": [sys.executable, "-c", "import kdistill"],
    "kdistill --help": [sys.executable, "-m", "kdistill.cli", "--help"],
    "kdistill list": [sys.executable, "-m", "kdistill.cli", "list"],
    "import kdistill; kdistill.Distiller": [sys.executable, "-c", "import kdistill; kdistill.Distiller"],
    "import keras": [sys.executable, "-c", "import keras"],
}


def main() -> None:
    """Measures, prints, writes `startup.json` and `startup.svg`."""
    options = arguments(__doc__).parse_args()
    timings = {name: {"wall": [], "cpu": []} for name in SIDES}
    for turn in range(options.repeats + 1):
        for name, command in SIDES.items():
            before, start = os.times(), time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"})
            wall, after = time.perf_counter() - start, os.times()
            if turn:  # the first round fills the disk cache
                timings[name]["wall"].append(wall)
                cpu = after.children_user + after.children_system - before.children_user - before.children_system
                timings[name]["cpu"].append(cpu)
    medians = {name: float(np.median(each["wall"])) for name, each in timings.items()}
    save("startup", {"seconds": timings}, options.out, medians, "Time to start, median of processes", "s")


if __name__ == "__main__":
    main()
