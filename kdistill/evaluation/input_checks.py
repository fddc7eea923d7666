"""Warnings about a model's inputs before a long training: a wrong normalization, and pixels that are not scaled."""

from typing import TYPE_CHECKING

import numpy as np

from kdistill.evaluation.evaluate import predict

if TYPE_CHECKING:
    import keras


TEACHER_IMAGES = 500  # validation images on which a teacher is checked
MIN_GAIN = 0.1  # of accuracy, for another range of pixels to be suggested
UNSCALED = 30.0  # inputs that are never negative and reach this are not scaled pixels


def teacher_warning(teacher: "keras.Model", images: np.ndarray, labels: np.ndarray, classes: int) -> str | None:
    """What looks wrong with a teacher on these images (raw pixels), or None.

    A teacher whose accuracy is 10 points higher with pixels in 0..1 or -1..1 lacks the normalization of its training.
    A teacher below twice the accuracy of chance teaches noise.
    """
    images, labels = images[:TEACHER_IMAGES].astype(np.float32), labels[:TEACHER_IMAGES]

    def accuracy(pixels) -> float:
        return float((predict(teacher, pixels).argmax(axis=1) == labels).mean())

    raw = accuracy(images)
    others = {"pixels / 255": accuracy(images / 255), "pixels / 127.5 - 1": accuracy(images / 127.5 - 1)}
    best = max(others, key=others.get)
    if others[best] > max(raw + MIN_GAIN, 2 / classes):
        return (
            f"The accuracy of the teacher '{teacher.name}' is {raw:.1%} on {len(labels)} validation images, but "
            f"{others[best]:.1%} with {best}: its inputs look unnormalized. Put this normalization in front of it, "
            "with keras.layers.Rescaling or kdistill.Adapted(teacher, scale=...)."
        )
    if raw < 2 / classes:
        return (
            f"The accuracy of the teacher '{teacher.name}' is {raw:.1%} on {len(labels)} validation images; chance is "
            f"{1 / classes:.1%}. It teaches noise. Check the order of its classes, its normalization and its training."
        )
    return None


def unscaled_warning(model: "keras.Model", images: np.ndarray) -> str | None:
    """A warning if the first layer with weights receives raw pixels, or None.

    Inputs of 0 to 255 make the usual learning rates too large by the square of 255. A first layer that normalizes
    (BatchNormalization) is fine.
    """
    import keras

    inputs = getattr(model, "inputs", None) or []
    # Operations of the graph, such as x / 255, are layers too, so the first layer with weights comes after them.
    first = next((layer for layer in model.layers if layer.weights), None) if len(inputs) == 1 else None
    if first is None or isinstance(first, (keras.Model, keras.layers.BatchNormalization, keras.layers.Normalization)):
        return None
    values = keras.ops.convert_to_numpy(keras.Model(inputs[0], first.input)(images.astype(np.float32)))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high < UNSCALED:
        return None
    return (
        f"The layer '{first.name}' of '{model.name}' receives inputs from {low:g} to {high:g}: they look unscaled. At "
        "usual learning rates such a network overflows or predicts one class only. Put Rescaling(1 / 255) before it."
    )
