"""Runs `.tflite` files with the LiteRT interpreter: no TensorFlow, no Keras.

LiteRT checks the structure of a file, but a damaged file can pass, and then stop the process that runs it (a division
by zero in C++) or keep it busy. So a file first runs in a process of its own, `python -m kdistill.tflite.interpreter`.

LiteRT's private and experimental names stand here alone: in `operator_details`, `signatures` and `open_interpreter`.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from kdistill.errors import InputError
from kdistill.files import existing_file, sha256, temporary_folder

REFUSED = 2  # the exit status of such a process for an InputError; the message is on its standard error
BYTES_AT_ONCE = 1 << 30  # of the images that such a process loads at a time
WHOLE = ("int32", "int64", "bool")  # inputs that are no pixels, such as tokens: taken as they are
OTHERS = ("outputs", "labels", "label_logits")  # how an export calls an output that is not of exclusive classes
TRIAL_SECONDS = 120  # a file that does not run two images in this time counts as damaged
PASSED: set[str] = set()  # the SHA-256 of the files that have passed their trial: they are not tried again


class File:
    """A `.tflite` model: mostly a classifier of images, raw pixels 0..255 in, logits or probabilities out.

    `inputs` and `outputs` are dicts: name, shape (None for a size that is open), type, scale and zero_point (None for
    float). `input` is the first. Of several outputs, `output` is the one named `logits` or `probabilities`, else the
    first, and then `several` is true. `probabilities` tells whether the output is one of a softmax, `sigmoid` whether
    it is one of a sigmoid, and `exclusive` whether its numbers belong to exclusive classes, one row for an example, as
    far as the file tells. `batch` is the fixed batch size, or None.

    `trusted` skips the trial run, for a file that has passed it. Raises `InputError` for a file that is absent or
    damaged, and for inputs and outputs of types that no model has.
    """

    def __init__(self, path: str | Path, threads: int = 1, trusted: bool = False):
        self.path, self.threads = Path(path), threads
        self.bytes = check_header(self.path)
        if not trusted and (digest := sha256(self.path)) not in PASSED:
            run_isolated("interpreter", self.path, TRIAL_SECONDS)
            PASSED.add(digest)
        self._interpreter = open_interpreter(self.path, threads)
        inputs, outputs = self._interpreter.get_input_details(), self._interpreter.get_output_details()
        if not inputs or not outputs:
            raise InputError(
                f"'{path}' has {len(inputs)} inputs and {len(outputs)} outputs; expected 1 or more of both."
            )
        names = signature_names(self._interpreter)
        self.inputs = [tensor_details(one, names) for one in inputs]
        self.outputs = [tensor_details(output, names) for output in outputs]
        self._in, self._out = ([end["index"] for end in ends] for ends in (inputs, outputs))
        main = [place for place, end in enumerate(self.outputs) if end["name"] in ("logits", "probabilities")]
        self.several = len(outputs) > 1 and len(main) != 1
        self.input, self.output = self.inputs[0], self.outputs[main[0] if len(main) == 1 else 0]
        for end in (*self.inputs, *self.outputs):
            whole = WHOLE if end in self.inputs else ()
            if end["type"] not in ("float32", "int8", "uint8", "int16", *whole):
                raise InputError(f"'{path}': '{end['name']}' is {end['type']}; expected float32, int8, uint8 or int16.")
            # A uint8 input without a scale takes the pixels as they are.
            plain = ("float32", "uint8", *WHOLE) if end in self.inputs else ("float32",)
            if end["type"] not in plain and not end["scale"]:
                raise InputError(f"'{path}': '{end['name']}' is {end['type']} without a scale. Export the file again.")
        self.batch = self.input["shape"][0] if self.input["shape"] else None
        last = _last_operator(self.operators()) if len(outputs) == 1 else None
        self.probabilities = self.output["name"] == "probabilities" or last == "SOFTMAX"
        self.sigmoid = last == "LOGISTIC"
        one_row = len(self.output["shape"]) == 2 and self.output["shape"][1] != 1
        self.exclusive = not self.sigmoid and self.output["name"] not in OTHERS and one_row and not self.several

    def predict(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """The main output, float32 `[n, ...]`, for images `[n, height, width, channels]`, raw pixels 0..255.

        Images are quantized, and outputs dequantized, with the scales and zero points of the file. Gray images are
        repeated for a file that expects three channels.
        """
        self._check_single()
        expected = self.input["shape"][1:]
        images = _in_color(images, expected)
        fits = images.ndim == len(expected) + 1
        if not fits or any(a not in (b, None) for a, b in zip(expected, images.shape[1:], strict=True)):
            raise InputError(f"'{self.path}' expects images [n, {_text(expected)}], received [{_text(images.shape)}].")
        if not len(images):
            return np.zeros((0, *(size or 0 for size in self.output["shape"][1:])), np.float32)
        return self.run({self.input["name"]: images}, batch_size)[self.output["name"]]

    def run(self, inputs: Mapping[str, np.ndarray], batch_size: int = 256) -> dict[str, np.ndarray]:
        """Every output by name, float32 `[n, ...]`, for examples by the names of the inputs, arrays `[n, ...]`."""
        names = [one["name"] for one in self.inputs]
        if set(inputs) != set(names):
            raise InputError(f"'{self.path}' takes {', '.join(names)}; received {', '.join(inputs)}.")
        inputs = {one["name"]: _in_color(inputs[one["name"]], one["shape"][1:]) for one in self.inputs}
        for one in self.inputs:
            shape = np.shape(inputs[one["name"]])[1:]
            if len(shape) != len(one["shape"]) - 1 or any(
                size not in (None, received) for size, received in zip(one["shape"][1:], shape, strict=True)
            ):
                raise InputError(
                    f"'{self.path}' expects [n, {_text(one['shape'][1:])}] for '{one['name']}', received "
                    f"[n, {_text(shape)}]."
                )
        count, batch = len(inputs[names[0]]), self.batch or batch_size
        parts = [self._run([inputs[name][start : start + batch] for name in names]) for start in range(0, count, batch)]
        return {
            output["name"]: np.concatenate([part[place] for part in parts]) for place, output in enumerate(self.outputs)
        }

    def latency(self, threads: int = 1, warmup: int = 20, runs: int = 200, repeats: int = 3) -> dict[str, float]:
        """Median and 90th percentile of the time for one batch (one image if the batch size is open).

        Returns `median_us` and `p90_us`, microseconds on the CPU of this machine. Of `repeats` series of `runs` calls,
        after `warmup` calls, the fastest counts: everything that disturbs a measurement makes it slower.
        """
        interpreter = self.interpreter_on_noise(threads)
        for _ in range(warmup):
            interpreter.invoke()
        series = []
        for _ in range(repeats):
            times = call_times(interpreter, runs)
            series.append((float(np.median(times)), float(np.percentile(times, 90))))
        median, p90 = min(series)
        return {"median_us": median, "p90_us": p90}

    def interpreter_on_noise(self, threads: int = 1):
        """A new interpreter whose input is one batch of noise: one image if the batch size is open."""
        with quiet():
            interpreter = open_interpreter(self.path, threads)
            noise = [noise_for(one, self.batch or 1) for one in self.inputs]
            for index, array in zip(self._in, noise, strict=True):
                interpreter.resize_tensor_input(index, array.shape)
            interpreter.allocate_tensors()
        for index, array, one in zip(self._in, noise, self.inputs, strict=True):
            interpreter.set_tensor(index, quantize(array, one))
        return interpreter

    def operators(self) -> list[str]:
        """The names of the operators, such as `CONV_2D`, in the order in which they run."""
        # A delegate would replace the operators that it computes.
        interpreter = open_interpreter(self.path, 1, delegates=False)
        return [operator["op_name"] for operator in operator_details(interpreter)]

    def _check_single(self) -> None:
        for ends, what in ((self.inputs, "inputs"), (self.outputs if self.several else [], "outputs")):
            if len(ends) > 1:
                names = ", ".join(end["name"] for end in ends)
                expected = "one image" if what == "inputs" else "exactly one named 'logits' or 'probabilities'"
                raise InputError(f"'{self.path}' has {len(ends)} {what}, {names}; expected {expected}.")

    def _run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        count = len(arrays[0])
        if self.batch and count < self.batch:
            missing = self.batch - count
            arrays = [np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)]) for array in arrays]
        interpreter, examples = self._interpreter, "images" if len(np.shape(arrays[0])) == 4 else "examples"
        try:
            shapes = [tuple(details["shape"]) for details in interpreter.get_input_details()]
            if shapes != [array.shape for array in arrays]:
                with quiet():
                    for index, array in zip(self._in, arrays, strict=True):
                        interpreter.resize_tensor_input(index, array.shape)
                    interpreter.allocate_tensors()
            for index, array, one in zip(self._in, arrays, self.inputs, strict=True):
                interpreter.set_tensor(index, quantize(array, one))
            interpreter.invoke()
            outputs = [interpreter.get_tensor(index) for index in self._out]
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"'{self.path}' does not run on {len(arrays[0])} {examples}: {first_line(error)}. Export it again."
            ) from None
        return [
            self._numbers(*pair, len(arrays[0]), examples)[:count] for pair in zip(outputs, self.outputs, strict=True)
        ]

    def _numbers(self, numbers: np.ndarray, output: dict, count: int, examples: str) -> np.ndarray:
        if not numbers.ndim or len(numbers) != count:
            row = examples.removesuffix("s")
            raise InputError(f"'{self.path}' gave {numbers.shape} for {count} {examples}; expected a row per {row}.")
        if output["scale"]:
            numbers = (numbers.astype(np.float32) - output["zero_point"]) * np.float32(output["scale"])
        return numbers.astype(np.float32)


def open_interpreter(
    file: Path | bytes, threads: int | None = None, *, delegates: bool = True, keep_tensors: bool = False
):
    """A LiteRT interpreter of a file, from its path or its bytes. The tensors are allocated.

    Without `delegates`, the file's own operators run. With `keep_tensors`, every intermediate tensor can be read after
    a run. Raises `InputError` for a file that LiteRT cannot open.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    source = {"model_content": file} if isinstance(file, bytes) else {"model_path": str(file)}
    kind = OpResolverType.AUTO if delegates else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    try:
        with quiet():
            interpreter = Interpreter(
                **source,
                num_threads=threads,
                experimental_op_resolver_type=kind,
                experimental_preserve_all_tensors=keep_tensors,
            )
            interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:  # UnicodeDecodeError is a ValueError
        name = "The model" if isinstance(file, bytes) else f"'{file}'"
        raise InputError(f"{name} cannot be opened: it is damaged or no .tflite ({first_line(error)}).") from None
    return interpreter


def operator_details(interpreter) -> list[dict]:
    """The operators that an interpreter runs: dicts with op_name, inputs and outputs (indices of tensors).

    LiteRT's public methods list tensors, but not operators.
    """
    return interpreter._get_ops_details()


def signatures(interpreter) -> dict[str, dict]:
    """Name of a signature -> its inputs and outputs, dicts of name -> index of a tensor.

    The public `get_signature_list` has the names without the indices.
    """
    return interpreter._get_full_signature_list()


def signature_names(interpreter) -> dict[int, str]:
    """Index of a tensor -> its name in the first signature of the file."""
    first = next(iter(signatures(interpreter).values()), {"inputs": {}, "outputs": {}})
    return {index: name for ends in ("inputs", "outputs") for name, index in first[ends].items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discards what C++ code writes to standard error. Python's exceptions pass."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


def predict_isolated(path: str | Path, images, seconds: float):
    """`File(path).predict(images)` in a process of its own, without TensorFlow; for a dict, `File(path).run(images)`.

    Raises `InputError` if that process reports an error, crashes, or does not finish within `seconds`.
    """
    if isinstance(images, Mapping):
        with temporary_folder() as folder:
            inputs_file, outputs_file = Path(folder, "inputs.npz"), Path(folder, "outputs.npz")
            np.savez(inputs_file, **{f"_{name}": array for name, array in images.items()})
            run_isolated("interpreter", Path(path), seconds, str(inputs_file), str(outputs_file))
            with np.load(outputs_file) as outputs:
                return {name[1:]: outputs[name] for name in outputs.files}
    outputs, deadline = [], time.monotonic() + seconds
    at_once = max(1, BYTES_AT_ONCE // max(1, int(np.prod(images.shape[1:]))))
    with temporary_folder() as folder:
        images_file, outputs_file = Path(folder, "images.npy"), Path(folder, "outputs.npy")
        for start in range(0, max(1, len(images)), at_once):  # images that are decoded here need not fit into memory
            np.save(images_file, images[start : start + at_once])
            remaining = max(0.1, deadline - time.monotonic())
            run_isolated("interpreter", Path(path), remaining, str(images_file), str(outputs_file))
            outputs.append(np.load(outputs_file))
    return np.concatenate(outputs)


def check_header(path: Path) -> int:
    """The size of a `.tflite` file in bytes. Raises `InputError` if its first bytes are of another format."""
    with open(existing_file(path, (".tflite",)), "rb") as file:
        header = file.read(8)
    if header[4:] != b"TFL3":
        raise InputError(f"'{path}' is no .tflite file: bytes 4 to 7 are {header[4:]!r}, expected b'TFL3'.")
    return path.stat().st_size


def tensor_details(details: dict, names: dict[int, str]) -> dict:
    """name, shape, type, scale and zero_point of an input or output, from LiteRT's own details of it."""
    scale, zero_point = details["quantization"]
    return {
        "name": names.get(details["index"], details["name"]),
        "shape": [None if size == -1 else int(size) for size in details["shape_signature"]],
        "type": np.dtype(details["dtype"]).name,
        "scale": float(scale) or None,
        "zero_point": int(zero_point) if scale else None,
    }


def call_times(interpreter, runs: int) -> np.ndarray:
    """The time of every call in microseconds, `[runs]`."""
    times = np.empty(runs)
    for i in range(runs):
        start = time.perf_counter_ns()
        interpreter.invoke()
        times[i] = (time.perf_counter_ns() - start) / 1000
    return times


def quantize(images: np.ndarray, end: dict) -> np.ndarray:
    """Pixels as the numbers of an input (`end`, see `File.input`)."""
    kind = np.dtype(end["type"])
    if kind == np.float32 or end["type"] in WHOLE:
        return images.astype(kind)
    steps = np.rint(images.astype(np.float32) / np.float32(end["scale"] or 1)) + (end["zero_point"] or 0)
    limits = np.iinfo(kind)
    return np.clip(steps, limits.min, limits.max).astype(kind)


def noise_for(end: dict, batch: int) -> np.ndarray:
    """A batch of noise for an input: pixels, or of what is no image zeros and ones, which every vocabulary has."""
    shape = [batch, *(size or 224 for size in end["shape"][1:])]
    highest = 256 if len(shape) == 4 and end["type"] not in WHOLE else 2
    return np.random.default_rng(0).integers(0, highest, shape)


def _in_color(images: np.ndarray, expected: list) -> np.ndarray:
    """Gray images in three channels, for a file that expects them."""
    is_gray = images.ndim == 4 and images.shape[-1] == 1 and expected[-1:] == [3]
    return np.repeat(images, 3, axis=-1) if is_gray else images


def _last_operator(operators: list[str]) -> str | None:
    """The last operator that computes the numbers of the output."""
    ends = [name for name in operators if name not in ("QUANTIZE", "DEQUANTIZE", "DELEGATE", "RESHAPE")]
    return ends[-1] if ends else None


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _text(shape) -> str:
    return ", ".join("any" if size is None else str(size) for size in shape)


def module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """The command `python -m kdistill.MODULE arguments...`, and its environment."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # -P: Python must not import a folder "kdistill" or a file "numpy.py" from the user's current folder.
    return [sys.executable, "-P", "-m", f"kdistill.{module}", *arguments], environment


def run_isolated(module: str, path: Path, seconds: float, *arguments: str) -> str:
    """Runs `python -m kdistill.tflite.MODULE path arguments...` and returns its standard output.

    Raises `InputError` if that process reports an error, crashes, or does not finish within `seconds`.
    """
    command, environment = module_command(f"tflite.{module}", str(path), *arguments)
    try:
        process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"'{path}' did not finish within {seconds:.0f} s: it is damaged, or too slow for this machine."
        ) from None
    if process.returncode < 0:
        raise InputError(
            f"'{path}' stopped the process that runs it (signal {-process.returncode}): the file is damaged, memory "
            "ran out, or someone ended the process. Try again, or export the file again."
        )
    message = (process.stderr.strip().splitlines() or [f"exit status {process.returncode}"])[-1]
    if process.returncode == REFUSED:
        raise InputError(message)
    if process.returncode:
        raise InputError(f"'{path}' cannot be used: it is damaged, or too large for this machine ({message}).")
    return process.stdout


def _main(path: str, images: str | None = None, outputs: str | None = None) -> None:
    """The process of its own: a trial on one and on two images of noise, or the outputs of a `.npy` file of images."""
    try:
        file = File(path, trusted=True)
        if images and images.endswith(".npz"):
            with np.load(images) as inputs:
                numbers = file.run({name[1:]: inputs[name] for name in inputs.files})
            np.savez(outputs, **{f"_{name}": array for name, array in numbers.items()})
            return
        if images:
            np.save(outputs, file.predict(np.load(images, mmap_mode="r")))
            return
        noise = {one["name"]: noise_for(one, 2) for one in file.inputs}
        file.run({name: array[:1] for name, array in noise.items()})
        file.run(noise)
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
