"""The layers that a quantized file loses most in: its tensors against those of the same model in float32.

Both files run operator by operator in a process of their own, without TensorFlow
(`python -m kdistill.tflite.quantization_error FILE REFERENCE IMAGES`). Tensors of the same name are compared.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from kdistill.errors import InputError
from kdistill.files import temporary_folder
from kdistill.tflite import flatbuffer
from kdistill.tflite.interpreter import REFUSED, File, open_interpreter, operator_details, quantize, run_isolated

IMAGES = 32  # more change the order of the layers little
SECONDS = 1800


def compare(path: str | Path, reference: str | Path, images: np.ndarray) -> list[dict]:
    """The operators of a quantized file, those that cost most first.

    Args:
        path: The quantized file.
        reference: The float32 file of the same model.
        images: Raw pixels `[n, height, width, channels]`; up to 32 of them are used, evenly spaced.

    Returns:
        Dicts of operator, tensor (the name of its output), sqnr (signal to quantization noise in dB, infinite without
        noise) and cost: the noise that this operator adds to that of its inputs, as a share of the signal's power.

    Raises:
        InputError: A file does not run, or the files have too few tensors in common.
    """
    places = np.linspace(0, len(images) - 1, min(len(images), IMAGES)).round().astype(int)
    with temporary_folder() as folder:
        images_file = Path(folder, "images.npy")
        np.save(images_file, images[places])
        output = run_isolated("quantization_error", Path(path), SECONDS, str(reference), str(images_file))
    rows = json.loads(output)
    for row in rows:
        row["sqnr"] = math.inf if row["sqnr"] is None else row["sqnr"]
    return rows


def sentence(rows: list[dict], count: int = 3) -> str:
    """The first rows of `compare` in words."""
    return ", ".join(
        f"{row['operator']} '{short_name(row['tensor'])}' ({row['sqnr']:.0f} dB signal to noise)"
        for row in rows[:count]
    )


def short_name(tensor: str) -> str:
    """The part of a tensor's name that tells the layer: `conv1/Relu` of `net_1/conv1_1/Relu;net_1/norm1_1/add`."""
    parts = tensor.partition(";")[0].split("/")
    return "/".join(parts[-2:])


def _compare(path: Path, reference: Path, images: np.ndarray) -> list[dict]:
    quantized, plain = _Traced(path), _Traced(reference)
    model = flatbuffer.read(path)
    graph = model.subgraphs[0]
    names = {i: flatbuffer.tensor_name(tensor) for i, tensor in enumerate(graph.tensors)}
    twin = _twins(quantized, plain, names)
    signal, noise = dict.fromkeys(twin, 0.0), dict.fromkeys(twin, 0.0)
    for image in images:
        quantized.run(image[None])
        plain.run(image[None])
        for i, j in twin.items():
            expected, actual = plain.values(j), quantized.values(i)
            if expected.shape != actual.shape:
                raise InputError(
                    f"'{path}' and '{reference}' are not files of the same model: '{names[i]}' is {actual.shape} in "
                    f"one and {expected.shape} in the other."
                )
            signal[i] += float(np.sum(expected**2))
            noise[i] += float(np.sum((expected - actual) ** 2))
    ratio = {i: noise[i] / signal[i] if signal[i] else 0.0 for i in twin}
    carried, rows = {}, []  # tensor -> the noise that it carries; a tensor without a twin carries that of its inputs
    for operator, name in flatbuffer.named_operators(model, graph):
        before = max((carried.get(i, 0.0) for i in operator.inputs), default=0.0)
        for i in operator.outputs:
            carried[i] = ratio.get(i, before)
            if i in ratio and name not in ("QUANTIZE", "DEQUANTIZE"):
                sqnr = -10 * math.log10(ratio[i]) if ratio[i] else None
                cost = max(ratio[i] - before, 0.0)
                rows.append({"operator": name, "tensor": names[i], "sqnr": sqnr, "cost": cost})
    return sorted(rows, key=lambda row: -row["cost"])


class _Traced:
    """A file that runs without delegates and keeps every tensor."""

    def __init__(self, path: Path):
        self.file = File(path, trusted=True)
        self._interpreter = open_interpreter(path, delegates=False, keep_tensors=True)
        details = self._interpreter.get_input_details()[0]
        self._input = details["index"]
        self._interpreter.resize_tensor_input(self._input, [self.file.batch or 1, *details["shape"][1:]])
        self._interpreter.allocate_tensors()
        tensors = self._interpreter.get_tensor_details()
        self.names = {tensor["index"]: tensor["name"] for tensor in tensors}
        self.types = {tensor["index"]: np.dtype(tensor["dtype"]).name for tensor in tensors}
        self._scales = {tensor["index"]: tensor["quantization"] for tensor in tensors}
        self.computed = {i for operator in operator_details(self._interpreter) for i in operator["outputs"]}

    def run(self, image: np.ndarray) -> None:
        channels = self.file.input["shape"][-1]
        if channels == 3 and image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        image = np.repeat(image, self.file.batch or 1, axis=0)
        self._interpreter.set_tensor(self._input, quantize(image, self.file.input))
        self._interpreter.invoke()

    def values(self, index: int) -> np.ndarray:
        """The dequantized numbers of a tensor, of the first image."""
        scale, zero_point = self._scales[index]
        numbers = np.atleast_1d(self._interpreter.get_tensor(index))[:1]
        return (numbers.astype(np.float64) - zero_point) * scale if scale else numbers.astype(np.float64)


def _twins(quantized: _Traced, plain: _Traced, names: dict[int, str]) -> dict[int, int]:
    """Index of a computed tensor of the quantized file -> the tensor of the same name in the float32 file."""
    in_plain = {name: i for i, name in plain.names.items()}
    computed = [
        i for i in names if i in quantized.computed and quantized.types[i] in ("float32", "int8", "uint8", "int16")
    ]
    twin = {i: in_plain.get(names[i]) for i in computed}
    twin = {i: j for i, j in twin.items() if j in plain.computed and plain.types[j] == "float32"}
    if 2 * len(twin) < len(computed):
        raise InputError(
            f"'{quantized.file.path}' and '{plain.file.path}' have only {len(twin)} of {len(computed)} tensors in "
            "common. Either they are not files of the same model, or the reference is no float32 file."
        )
    return twin


def _main(path: str, reference: str, images: str) -> None:
    try:
        print(json.dumps(_compare(Path(path), Path(reference), np.load(images))))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
