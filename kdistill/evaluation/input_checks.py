"""What looks wrong with a model's inputs: warnings before anything long is trained."""

from typing import TYPE_CHECKING

import keras
import numpy as np

from kdistill.evaluation.evaluate import predict

if TYPE_CHECKING:
    import keras


LOOKED_AT = 500  # images for the look at a teacher
MARGIN = 0.1  # of accuracy: what another range of pixels must gain to be told


def teacher_warning(teacher: keras.Model, images: np.ndarray, labels: np.ndarray, classes: int) -> str | None:
    """What looks wrong with a teacher on these images (raw pixels), or None.

    Less than twice the accuracy of chance is told; and a range of pixels (0..1, -1..1) with which the teacher is right
    for 10 points more of the images: its inputs are not normalized as they were when it was trained.
    """
    images, labels = images[:LOOKED_AT].astype(np.float32), labels[:LOOKED_AT]

    def accuracy(pixels) -> float:
        return float((predict(teacher, pixels).argmax(axis=1) == labels).mean())

    raw = accuracy(images)
    others = {"pixels / 255": accuracy(images / 255), "pixels / 127.5 - 1": accuracy(images / 127.5 - 1)}
    best = max(others, key=others.get)
    if others[best] > max(raw + MARGIN, 2 / classes):
        return (
            f"The teacher '{teacher.name}' is right on {raw:.1%} of {len(labels)} validation images, but on "
            f"{others[best]:.1%} of them with {best}: its inputs look unnormalized. Put that in front of it, such as "
            "keras.layers.Rescaling, or kdistill.Adapted(teacher, scale=...)."
        )
    if raw < 2 / classes:
        return (
            f"The teacher '{teacher.name}' is right on {raw:.1%} of {len(labels)} validation images; chance is "
            f"{1 / classes:.1%}. It teaches noise: check its classes' order, its normalization and its training."
        )
    return None


UNSCALED = 30.0  # inputs that are nowhere negative and reach this are no scaled pixels


def unscaled_warning(model: "keras.Model", images: np.ndarray) -> str | None:
    """A warning if the first layer with weights sees raw pixels, or None.

    With inputs of 0 to 255 the usual learning rates are too large by the square of that: the tutorial's student
    overflows and stays at 9.8 % of MNIST. A layer that normalizes (BatchNormalization) counts as scaling.
    """
    import keras

    inputs = getattr(model, "inputs", None) or []
    # Keras' own operations in a graph (x / 255) are layers too, so that the first one with weights is what it seems.
    first = next((layer for layer in model.layers if layer.weights), None) if len(inputs) == 1 else None
    if first is None or isinstance(first, (keras.Model, keras.layers.BatchNormalization, keras.layers.Normalization)):
        return None
    values = keras.ops.convert_to_numpy(keras.Model(inputs[0], first.input)(images.astype(np.float32)))
    low, high = float(values.min()), float(values.max())
    if low < 0 or high < UNSCALED:
        return None
    return (
        f"The layer '{first.name}' of '{model.name}' sees inputs from {low:g} to {high:g}: they look unscaled. At "
        "usual learning rates such a network overflows or collapses to one class. Put Rescaling(1 / 255) before "
        "it."
    )
