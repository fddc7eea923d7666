"""Runs a kdistill `.tflite` with nothing but LiteRT and NumPy: labels, type and scale are read from the file itself.

pip install ai-edge-litert numpy
python classify.py student.tflite image.npy      # uint8 [height, width, channels], raw pixels 0..255
"""

import sys
import zipfile

import numpy as np
from ai_edge_litert.interpreter import Interpreter


class Classifier:
    """A classifier of single images."""

    def __init__(self, path: str):
        with zipfile.ZipFile(path) as archive:  # the metadata's archive is appended to the model
            self.labels = archive.read("labels.txt").decode().splitlines()
        self.runner = Interpreter(path).get_signature_runner("serving_default")
        (self.image,) = self.runner.get_input_details().values()
        outputs = self.runner.get_output_details()
        self.name = next(name for name in ("probabilities", "logits") if name in outputs)
        self.output = outputs[self.name]

    def scores(self, pixels: np.ndarray) -> np.ndarray:
        """Logits or probabilities, one for each label, of raw pixels 0..255 `[height, width, channels]`."""
        kind = self.image["dtype"]
        scale, zero_point = self.image["quantization"]
        if scale:  # quantized: the pixel is (number - zero_point) * scale
            limits = np.iinfo(kind)
            pixels = np.clip(np.rint(pixels / np.float32(scale)) + zero_point, limits.min, limits.max)
        numbers = self.runner(image=pixels[None].astype(kind))[self.name][0].astype(np.float32)
        scale, zero_point = self.output["quantization"]
        return (numbers - zero_point) * np.float32(scale) if scale else numbers


if __name__ == "__main__":
    classifier = Classifier(sys.argv[1])
    scores = classifier.scores(np.load(sys.argv[2]))
    for index in np.argsort(-scores)[:3]:
        print(f"{classifier.labels[index]}\t{scores[index]:.4f}")
