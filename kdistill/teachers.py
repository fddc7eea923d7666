"""The teachers of a recipe: several blended into one model, and a look at whether a teacher knows anything."""

from collections.abc import Sequence

import keras
import numpy as np

from kdistill.evaluate import predict
from kdistill.teacher import frozen

LOOKED_AT = 500  # images for the look at a teacher
MARGIN = 0.1  # of accuracy: what another range of pixels must gain to be told


@keras.saving.register_keras_serializable(package="kdistill")
class Blend(keras.layers.Layer):
    """Images -> the log of the weighted mean of several models' probabilities, without a gradient."""

    def __init__(self, models: Sequence[keras.Model], shares: Sequence[float] | None = None, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.models, self.shares = list(models), None if shares is None else list(shares)
        self.built = True

    def call(self, images):
        return frozen(list(self.models), self.shares)(images)

    def get_config(self):
        models = [keras.saving.serialize_keras_object(model) for model in self.models]
        return {"name": self.name, "models": models, "shares": self.shares}

    @classmethod
    def from_config(cls, config):
        models = [keras.saving.deserialize_keras_object(model) for model in config.pop("models")]
        return cls(models, **config)


def blended(models: Sequence[keras.Model], shares: Sequence[float] | None = None) -> keras.Model:
    """One model of several (Geras et al. 2016, arXiv 1511.06433): see `teacher.frozen`."""
    image = keras.Input(models[0].input_shape[1:], name="image")
    return keras.Model(image, Blend(models, shares, name="blend")(image), name="blend")


def warning(teacher: keras.Model, images: np.ndarray, labels: np.ndarray, classes: int) -> str | None:
    """What looks wrong with a teacher on these images (raw pixels), or None.

    Less than twice the accuracy of chance is told; and a range of pixels (0..1, -1..1) with which the teacher is right
    for 10 points more of the images: its inputs are not normalised as they were when it was trained.
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
            f"{others[best]:.1%} of them with {best}: its inputs look unnormalised. Put that in front of it, such as "
            "keras.layers.Rescaling, or kdistill.Adapted(teacher, scale=...)."
        )
    if raw < 2 / classes:
        return (
            f"The teacher '{teacher.name}' is right on {raw:.1%} of {len(labels)} validation images; chance is "
            f"{1 / classes:.1%}. It teaches noise: check its classes' order, its normalisation and its training."
        )
    return None
