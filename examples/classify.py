"""Runs a kdistill `.tflite` with nothing but LiteRT and NumPy: names, meanings, types and scales are in the file.

pip install ai-edge-litert numpy
python classify.py student.tflite image.npy      # uint8 [height, width, channels], raw pixels 0..255
python classify.py student.tflite inputs.npz     # several inputs, or one that is no image, by name, without a batch
"""

import json
import sys
import zipfile

import numpy as np
from ai_edge_litert.interpreter import Interpreter


class Model:
    """A model of single examples. `labels`: the names of the classes, or None; `meanings`: those of the outputs."""

    def __init__(self, path: str):
        with zipfile.ZipFile(path) as archive:  # the metadata's archive is appended to the model
            names = archive.namelist()
            self.labels = archive.read("labels.txt").decode().splitlines() if "labels.txt" in names else None
            rows = json.loads(archive.read("model.json"))["outputs"]
        # An output of one row of exclusive classes has no `head`.
        self.meanings = {row["name"]: row.get("head", {}).get("meaning", "classes") for row in rows}
        self.kinds = {row["name"]: row.get("head", {}).get("kind", row["name"]) for row in rows}
        self.runner = Interpreter(path).get_signature_runner("serving_default")
        self.inputs, self.outputs = self.runner.get_input_details(), self.runner.get_output_details()

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, float32, of the inputs of one example by name."""
        numbers = self.runner(**{name: _quantized(inputs[name], end)[None] for name, end in self.inputs.items()})
        return {name: _dequantized(numbers[name][0], end) for name, end in self.outputs.items()}


def _quantized(values: np.ndarray, end: dict) -> np.ndarray:
    scale, zero_point = end["quantization"]
    if scale:  # quantized: the value is (number - zero_point) * scale
        limits = np.iinfo(end["dtype"])
        values = np.clip(np.rint(values / np.float32(scale)) + zero_point, limits.min, limits.max)
    return np.asarray(values).astype(end["dtype"])


def _dequantized(numbers: np.ndarray, end: dict) -> np.ndarray:
    scale, zero_point = end["quantization"]
    numbers = numbers.astype(np.float32)
    return (numbers - zero_point) * np.float32(scale) if scale else numbers


def lines(name: str, values: np.ndarray, model: Model):
    """What an output says, as text."""
    meaning, labels = model.meanings[name], model.labels or [str(place) for place in range(values.shape[-1])]
    if meaning == "classes" and values.ndim == 1:
        for index in np.argsort(-values)[:3]:
            yield f"{labels[index]}\t{values[index]:.4f}"
    elif meaning == "classes":  # at positions
        classes, counts = np.unique(values.argmax(axis=-1), return_counts=True)
        for index, count in zip(classes, counts, strict=True):
            yield f"{labels[index]}\t{count} positions"
    elif meaning == "labels" and values.ndim == 1:
        if model.kinds[name] == "logits":
            values = 1 / (1 + np.exp(-values))
        for label, probability in zip(labels, values, strict=True):
            yield f"{label}\t{probability:.4f}\t{'yes' if probability > 0.5 else 'no'}"
    else:
        yield np.array2string(values, precision=4, threshold=20)


if __name__ == "__main__":
    model, content = Model(sys.argv[1]), np.load(sys.argv[2])
    if isinstance(content, np.ndarray):
        content = dict.fromkeys(model.inputs, content)
    for name, values in model(content).items():
        if name in model.meanings:
            if len(model.outputs) > 1:
                print(f"{name} ({model.meanings[name]})")
            print("\n".join(lines(name, values, model)))
