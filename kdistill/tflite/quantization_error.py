"""Which layers a quantized file loses most in: its tensors against those of the same model in float32. No TensorFlow.

Both files run operator by operator, with every tensor kept, in a process of their own
(`python -m kdistill.tflite.quantization_error`); tensors of the same name are compared.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np

from kdistill.errors import InputError
from kdistill.tflite import flatbuffer
from kdistill.tflite.interpreter import REFUSED, File, quantized, quiet, run_apart

IMAGES = 32  # each holds all tensors of both files in memory; more images change the order of the layers little
SECONDS = 1800


def compare(path: str | Path, reference: str | Path, images: np.ndarray) -> list[dict]:
    """The operators of a quantized file, those that cost most first.

    `reference` is the float32 file of the same model, `images` `[n, h, w, c]` are raw pixels, of which up to 32 are
    taken, evenly spaced. Dicts: operator, tensor (the name of its output), sqnr (signal to quantization noise, dB, inf
    if there is none) and cost: the share of the signal's power that this operator adds as noise to what its inputs
    bring. Raises `InputError` if a file does not run, or if they have no tensor in common.
    """
    places = np.linspace(0, len(images) - 1, min(len(images), IMAGES)).round().astype(int)
    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder:
        given = Path(folder, "images.npy")
        np.save(given, images[places])
        found = json.loads(run_apart("quantization_error", Path(path), SECONDS, str(reference), str(given)))
    for each in found:
        each["sqnr"] = math.inf if each["sqnr"] is None else each["sqnr"]
    return found


def sentence(layers: list[dict], count: int = 3) -> str:
    """The first layers in words."""
    return ", ".join(
        f"{each['operator']} '{short(each['tensor'])}' ({each['sqnr']:.0f} dB signal to noise)"
        for each in layers[:count]
    )


def short(tensor: str) -> str:
    """The end of a tensor's name that tells the layer: `conv1/Relu` of `net_1/conv1_1/Relu;net_1/norm1_1/add`."""
    parts = tensor.partition(";")[0].split("/")
    return "/".join(parts[-2:])


def _measured(path: Path, reference: Path, images: np.ndarray) -> list[dict]:
    given, plain = (_Kept(each) for each in (path, reference))
    inside = flatbuffer.read(path)
    graph = inside.subgraphs[0]
    names = {i: tensor.name.decode(errors="replace") for i, tensor in enumerate(graph.tensors)}
    there = {name: i for i, name in plain.names.items()}
    made = [i for i in names if i in given.made and given.kinds[i] in ("float32", "int8", "uint8", "int16")]
    common = [i for i in made if there.get(names[i]) in plain.made and plain.kinds[there[names[i]]] == "float32"]
    if 2 * len(common) < len(made):
        raise InputError(
            f"'{path}' and '{reference}' have only {len(common)} of {len(made)} tensors in common: they are not of the "
            "same model, or the reference is no float32 file."
        )
    signal, noise = dict.fromkeys(common, 0.0), dict.fromkeys(common, 0.0)
    for image in images:
        given.run(image[None])
        plain.run(image[None])
        for i in common:
            expected, found = plain.values(there[names[i]]), given.values(i)
            if expected.shape != found.shape:
                raise InputError(f"'{path}' and '{reference}' differ in '{names[i]}': not of the same model.")
            signal[i] += float(np.sum(expected**2))
            noise[i] += float(np.sum((expected - found) ** 2))
    ratio = {i: noise[i] / signal[i] if signal[i] else 0.0 for i in common}
    known, rows = {}, []  # tensor -> the noise that it carries; of one without a counterpart, its inputs'
    for operator, name in flatbuffer.steps(inside, graph):
        before = max((known.get(i, 0.0) for i in operator.inputs), default=0.0)
        for i in operator.outputs:
            known[i] = ratio.get(i, before)
            if i in ratio and name not in ("QUANTIZE", "DEQUANTIZE"):
                sqnr = -10 * math.log10(ratio[i]) if ratio[i] else None
                cost = max(ratio[i] - before, 0.0)
                rows.append({"operator": name, "tensor": names[i], "sqnr": sqnr, "cost": cost})
    return sorted(rows, key=lambda row: -row["cost"])


class _Kept:
    """A file that is run without delegates and keeps every tensor."""

    def __init__(self, path: Path):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self.file = File(path, tried=True)
        with quiet():
            self._interpreter = Interpreter(
                str(path),
                experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
                experimental_preserve_all_tensors=True,
            )
        details = self._interpreter.get_input_details()[0]
        shape = [self.file.batch or 1, *details["shape"][1:]]
        self._input = details["index"]
        self._interpreter.resize_tensor_input(self._input, shape)
        self._interpreter.allocate_tensors()
        tensors = self._interpreter.get_tensor_details()
        self.names = {each["index"]: each["name"] for each in tensors}
        self.kinds = {each["index"]: np.dtype(each["dtype"]).name for each in tensors}
        self._scales = {each["index"]: each["quantization"] for each in tensors}
        self.made = {i for op in self._interpreter._get_ops_details() for i in op["outputs"]}

    def run(self, image: np.ndarray) -> None:
        channels = self.file.input["shape"][-1]
        if channels == 3 and image.shape[-1] == 1:
            image = np.repeat(image, 3, axis=-1)
        image = np.repeat(image, self.file.batch or 1, axis=0)
        self._interpreter.set_tensor(self._input, quantized(image, self.file.input))
        self._interpreter.invoke()

    def values(self, index: int) -> np.ndarray:
        scale, zero_point = self._scales[index]
        numbers = np.atleast_1d(self._interpreter.get_tensor(index))[:1]
        return (numbers.astype(np.float64) - zero_point) * scale if scale else numbers.astype(np.float64)


def _main(path: str, reference: str, images: str) -> None:
    try:
        print(json.dumps(_measured(Path(path), Path(reference), np.load(images))))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(REFUSED)


if __name__ == "__main__":
    _main(*sys.argv[1:])
