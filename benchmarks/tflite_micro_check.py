"""Runs a file of the profile `microcontroller` with TensorFlow Lite Micro itself, in an environment of its own.

    python -m venv tflm && tflm/bin/pip install tflite-micro
    tflm/bin/python benchmarks/tflite_micro_check.py files/microcontroller/student.tflite [numbers.npy]

`numbers.npy`: int8 [n, height, width, channels], quantized already; zeros without it. Prints the outputs as
JSON, then the recording allocator's report on the arena, to compare with `kArenaSize` in `student.h`. Without
tflite-micro it prints so and checks nothing (exit status 0).
"""

import json
import sys

import numpy as np


def main(path: str, numbers: str | None = None) -> int:
    try:
        from tflite_micro.python.tflite_micro import runtime
    except ImportError as error:
        print(f"skipped: tflite-micro is not installed here ({error})")
        return 0
    recording = runtime.InterpreterConfig.kAllocationRecording
    interpreter = runtime.Interpreter.from_file(path, intrepreter_config=recording)
    end = interpreter.get_input_details(0)
    inputs = np.load(numbers) if numbers else np.zeros(end["shape"], end["dtype"])
    rows = []
    for image in inputs:
        interpreter.set_input(image[None], 0)
        interpreter.invoke()
        rows.append(interpreter.get_output(0)[0].tolist())
    print(json.dumps(rows), flush=True)
    interpreter.print_allocations()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
