"""Warnings about inputs: a teacher without its normalization, raw pixels in front of the first layer with weights."""

import keras
import numpy as np
from keras import layers

from kdistill.evaluation.input_checks import teacher_warning, unscaled_warning
from kdistill.networks import architectures
from kdistill.recipe import Network


def test_a_bad_teacher_gives_a_warning():
    """Classes by brightness: a teacher for pixels from 0 to 1 predicts one class for all raw pixels."""
    levels = np.arange(200) % 4
    images = np.broadcast_to((32 + 64 * levels)[:, None, None, None], (200, 2, 2, 1)).astype(np.uint8)

    def brightness(scale):
        image = keras.Input((2, 2, 1))
        x = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(scale)(image))
        dense = keras.layers.Dense(4)
        model = keras.Model(image, dense(x), name="teacher")
        center = (32 + 64 * np.arange(4)) / 255
        dense.set_weights([2 * center[None], -(center**2)])
        return model

    assert teacher_warning(brightness(1 / 255), images, levels, 4) is None
    warning = teacher_warning(brightness(1.0), images, levels, 4)
    assert "is 25.0% on 200 images, but 100.0% with pixels / 255" in warning
    warning = teacher_warning(brightness(1 / 255), images, (levels + 1) % 4, 4)
    assert "is 0.0% on 200 images; chance is 25.0%" in warning


def test_unscaled_inputs_give_a_warning():
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1)).astype(np.uint8)

    def warning(scale: float) -> str | None:
        return unscaled_warning(architectures.build(Network("mlp", {"scale": scale}), (28, 28, 1), 10), images)

    assert warning(1 / 255) is None
    assert "The layer 'fc1' of 'mlp' receives inputs from 0 to 255: they look unscaled" in warning(1.0)
    assert unscaled_warning(architectures.build(Network("lenet"), (28, 28, 1), 10), images) is None
    image = keras.Input((28, 28, 1))
    centered = keras.Model(image, layers.Conv2D(2, 3)(image - 120.0))  # mean-subtracted, as some networks have it
    normalized = keras.Model(image, layers.Conv2D(2, 3)(layers.BatchNormalization()(image)))
    raw = keras.Model(image, layers.Conv2D(2, 3, name="first")(image))
    assert unscaled_warning(centered, images) is None and unscaled_warning(normalized, images) is None
    assert "'first'" in unscaled_warning(raw, images)
