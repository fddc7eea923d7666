"""Runs `.tflite` files with the LiteRT interpreter: no TensorFlow, no Keras.

The interpreter checks a file's structure, but a damaged file that passes can still stop the process that runs it (a
division by zero in its C++ code) or keep it busy for ever. So a file is first tried in a process of its own: that is
what `python -m kdistill.tflite.interpreter FILE` does.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kdistill import files
from kdistill.errors import InputError

REFUSED = 2  # the exit status of that process for an InputError, its message on standard error
APART_BYTES = 1 << 30  # of the images that such a process gets at once
TRIAL_SECONDS = 120  # a file that does not run a single image in this time is damaged


class File:
    """A `.tflite` classifier of images: raw pixels 0..255 in, logits or probabilities out.

    `input` and `output` are dicts: name, shape (None where any size goes), type, scale and zero_point (None for
    float). A file with several `outputs` has one named `logits` or `probabilities`: that is `output`. `probabilities`
    tells whether it ends in a softmax. Raises `InputError` for a file that is absent, damaged, or no classifier;
    `tried` skips the trial run, for a file that has had it.
    """

    def __init__(self, path: str | Path, threads: int = 1, tried: bool = False):
        self.path, self.threads = Path(path), threads
        self.bytes = checked_head(self.path)
        if not tried:
            _try(self.path)
        self._interpreter = self._open(threads)
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if len(inputs) != 1 or not outputs:
            raise InputError(f"'{path}' has {len(inputs)} inputs and {len(outputs)} outputs; expected one image.")
        names = self._names()
        self.input = details(inputs[0], names)
        self.outputs = [details(each, names) for each in outputs]
        main = self._main()
        self._in, self._out, self.output = inputs[0]["index"], outputs[main]["index"], self.outputs[main]
        for end in (self.input, self.output):
            if end["type"] not in ("float32", "int8", "uint8", "int16"):
                raise InputError(f"'{path}': '{end['name']}' is {end['type']}; expected float32, int8, uint8 or int16.")
            # A uint8 input without a scale takes the pixels as they are.
            if end["type"] not in ("float32", "uint8" if end is self.input else "") and not end["scale"]:
                raise InputError(f"'{path}': '{end['name']}' is {end['type']} without a scale; export the file again.")
        if len(self.output["shape"]) != 2:
            raise InputError(f"'{path}' gives {self.output['shape']}; expected [batch, classes], a classifier's.")
        self.batch = self.input["shape"][0]  # None: any
        softmax = len(outputs) == 1 and _ends_in_softmax(self.operators())
        self.probabilities = self.output["name"] == "probabilities" or softmax

    def predict(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """float32 `[n, classes]` of images `[n, h, w, c]`, uint8 or float, raw pixels 0..255.

        Images are quantized, and outputs dequantized, with the file's own scale and zero point. Gray images are
        repeated for a file that takes three channels.
        """
        expected = self.input["shape"][1:]
        if images.ndim == 4 and images.shape[-1] == 1 and expected[-1:] == [3]:
            images = np.repeat(images, 3, axis=-1)
        fits = images.ndim == len(expected) + 1
        if not fits or any(a not in (b, None) for a, b in zip(expected, images.shape[1:], strict=True)):
            raise InputError(f"'{self.path}' expects images [n, {_text(expected)}], received [{_text(images.shape)}].")
        batch = self.batch or batch_size
        found = [self._run(images[start : start + batch]) for start in range(0, len(images), batch)]
        return np.concatenate(found) if found else np.zeros((0, self.output["shape"][1] or 0), np.float32)

    def latency(self, threads: int = 1, warmup: int = 20, runs: int = 200, repeats: int = 3) -> dict[str, float]:
        """`median_us` and `p90_us` of a call of the interpreter with one batch (1 image if any batch goes).

        Microseconds on this machine's CPU, after `warmup` calls; of `repeats` series of `runs` calls the fastest,
        because everything that disturbs a measurement makes it slower.
        """
        interpreter = self.filled(threads)
        for _ in range(warmup):
            interpreter.invoke()
        series = []
        for _ in range(repeats):
            times = call_times(interpreter, runs)
            series.append((float(np.median(times)), float(np.percentile(times, 90))))
        median, p90 = min(series)
        return {"median_us": median, "p90_us": p90}

    def filled(self, threads: int = 1):
        """An interpreter of its own whose input is one batch of noise: 1 image where any batch goes."""
        with quiet():
            interpreter = self._open(threads)
            shape = [self.batch or 1, *(size or 224 for size in self.input["shape"][1:])]
            interpreter.resize_tensor_input(self._in, shape)
            interpreter.allocate_tensors()
        pixels = np.random.default_rng(0).integers(0, 256, shape)
        interpreter.set_tensor(self._in, quantized(pixels, self.input))
        return interpreter

    def operators(self) -> list[str]:
        """The names of the file's operators, in the order in which they run."""
        # Without delegates: a delegate replaces the operators that it takes over.
        details = self._open(1, plain=True)._get_ops_details()
        return [op["op_name"] for op in details]

    def _names(self) -> dict[int, str]:
        """Tensor -> its name in the signature."""
        signatures = self._interpreter._get_full_signature_list()
        first = next(iter(signatures.values()), {"inputs": {}, "outputs": {}})
        return {index: name for ends in ("inputs", "outputs") for name, index in first[ends].items()}

    def _main(self) -> int:
        if len(self.outputs) == 1:
            return 0
        names = [each["name"] for each in self.outputs]
        found = [i for i, name in enumerate(names) if name in ("logits", "probabilities")]
        if len(found) != 1:
            raise InputError(
                f"'{self.path}' has {len(names)} outputs, {', '.join(names)}; expected exactly one named 'logits' or "
                "'probabilities' among them."
            )
        return found[0]

    def _open(self, threads: int, plain: bool = False):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        kind = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if plain else OpResolverType.AUTO
        try:
            with quiet():
                interpreter = Interpreter(
                    model_path=str(self.path), num_threads=threads, experimental_op_resolver_type=kind
                )
                interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:  # UnicodeDecodeError is a ValueError
            raise InputError(
                f"'{self.path}' cannot be opened: it is damaged or no .tflite file ({_first_line(error)})."
            ) from None
        return interpreter

    def _run(self, images: np.ndarray) -> np.ndarray:
        count = len(images)
        if self.batch and count < self.batch:
            images = np.concatenate([images, np.zeros((self.batch - count, *images.shape[1:]), images.dtype)])
        interpreter = self._interpreter
        try:
            if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
                with quiet():
                    interpreter.resize_tensor_input(self._in, images.shape)
                    interpreter.allocate_tensors()
            interpreter.set_tensor(self._in, quantized(images, self.input))
            interpreter.invoke()
            outputs = interpreter.get_tensor(self._out)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"'{self.path}' does not run on {len(images)} images: {_first_line(error)}. Export it again."
            ) from None
        if outputs.ndim != 2 or len(outputs) != len(images):
            raise InputError(f"'{self.path}' gave {outputs.shape} for {len(images)} images; expected one row for each.")
        if self.output["scale"]:
            outputs = (outputs.astype(np.float32) - self.output["zero_point"]) * np.float32(self.output["scale"])
        return outputs[:count].astype(np.float32)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps what C++ code writes to standard error off the screen; Python's exceptions pass."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def predict_apart(path: str | Path, images: np.ndarray, seconds: float) -> np.ndarray:
    """`File(path).predict(images)` in a process of its own, which has no TensorFlow.

    Raises `InputError` if that process reports an error, crashes, or is not done after `seconds`.
    """
    found, ends = [], time.monotonic() + seconds
    at_once = max(1, APART_BYTES // max(1, int(np.prod(images.shape[1:]))))
    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder:
        given, made = Path(folder, "images.npy"), Path(folder, "outputs.npy")
        for start in range(0, max(1, len(images)), at_once):  # so that encoded images need not fit into memory
            np.save(given, images[start : start + at_once])
            _apart(Path(path), max(0.1, ends - time.monotonic()), str(given), str(made))
            found.append(np.load(made))
    return np.concatenate(found)


def checked_head(path: Path) -> int:
    """The size of a file that begins as a .tflite does."""
    with open(files.existing_file(path, (".tflite",)), "rb") as file:
        head = file.read(8)
    if head[4:] != b"TFL3":
        raise InputError(f"'{path}' is no .tflite file: bytes 4 to 7 are {head[4:]!r}, expected b'TFL3'.")
    return path.stat().st_size


def details(end: dict, names: dict[int, str]) -> dict:
    scale, zero_point = end["quantization"]
    return {
        "name": names.get(end["index"], end["name"]),
        "shape": [None if size == -1 else int(size) for size in end["shape_signature"]],
        "type": np.dtype(end["dtype"]).name,
        "scale": float(scale) or None,
        "zero_point": int(zero_point) if scale else None,
    }


def call_times(interpreter, runs: int) -> np.ndarray:
    """Microseconds of each of so many calls, `[runs]`."""
    times = np.empty(runs)
    for i in range(runs):
        start = time.perf_counter_ns()
        interpreter.invoke()
        times[i] = (time.perf_counter_ns() - start) / 1000
    return times


def quantized(images: np.ndarray, end: dict) -> np.ndarray:
    """Pixels as the numbers that an input takes."""
    kind = np.dtype(end["type"])
    if kind == np.float32:
        return images.astype(np.float32)
    steps = np.rint(images.astype(np.float32) / np.float32(end["scale"] or 1)) + (end["zero_point"] or 0)
    limits = np.iinfo(kind)
    return np.clip(steps, limits.min, limits.max).astype(kind)


def _ends_in_softmax(operators: list[str]) -> bool:
    ends = [name for name in operators if name not in ("QUANTIZE", "DEQUANTIZE", "DELEGATE")]
    return bool(ends) and ends[-1] == "SOFTMAX"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _text(shape) -> str:
    return ", ".join("any" if size is None else str(size) for size in shape)


def _try(path: Path) -> None:
    _apart(path, TRIAL_SECONDS)


def _apart(path: Path, seconds: float, *arguments: str) -> None:
    run_apart("interpreter", path, seconds, *arguments)


def run_apart(module: str, path: Path, seconds: float, *arguments: str) -> str:
    """Runs `python -m kdistill.MODULE path arguments...`; returns what it printed. Errors as in `predict_apart`."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # -P: a folder "kdistill" or a file "numpy.py" where the user happens to be is not what is meant.
    command = [sys.executable, "-P", "-m", f"kdistill.tflite.{module}", str(path), *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"'{path}' did not finish within {seconds:.0f} s in a process of its own: it is damaged, or too slow."
        ) from None
    if done.returncode < 0:
        raise InputError(
            f"'{path}' stopped the process that runs it (signal {-done.returncode}): the file is damaged, memory ran "
            "out, or something else ended the process. Try again, or export the file again."
        )
    message = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    if done.returncode == REFUSED:
        raise InputError(message)
    if done.returncode:
        raise InputError(f"'{path}' cannot be used: it is damaged, or too large for this machine ({message}).")
    return done.stdout


def _main(path: str, images: str | None = None, outputs: str | None = None) -> None:
    """The process of its own: one and two images of noise, or the images of one `.npy` file into another."""
    try:
        file = File(path, tried=True)
        if images:
            np.save(outputs, file.predict(np.load(images, mmap_mode="r")))
            return
        shape = [size or 224 for size in file.input["shape"][1:]]
        noise = np.random.default_rng(0).integers(0, 256, [2, *shape], np.uint8)
        file.predict(noise[:1])
        file.predict(noise)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
