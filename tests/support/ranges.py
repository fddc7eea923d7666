"""Images in three ranges, and models that were trained on one of them, made in a second, without training."""

import keras
import numpy as np
from keras import layers

from kdistill.networks.keras_internals import layers_of

PIXELS = np.random.default_rng(0).integers(0, 256, (80, 10, 10, 3)).astype(np.uint8)
RANGES = {"raw": PIXELS.astype("float32"), "unit": PIXELS / 255.0, "signed": PIXELS / 127.5 - 1}


def fitted(model: keras.Model, own: np.ndarray) -> keras.Model:
    """The model with the statistics of these images in all its batch normalizations, from the inside out."""
    for _ in range(2):
        for norm in [layer for layer in layers_of(model) if isinstance(layer, layers.BatchNormalization)]:
            norm.momentum = 0.0
        model(own, training=True)
    return model


def convolution(*before, bias: bool = False, relu: bool = False) -> keras.Model:
    keras.utils.set_random_seed(1)
    middle = [
        layers.Conv2D(8, 3, use_bias=bias),
        *([layers.ReLU()] if relu else []),
        layers.BatchNormalization(name="norm"),
    ]
    end = [layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(3, name="last")]
    return keras.Sequential([keras.Input((10, 10, 3)), *before, *middle, *end], name="net")


def brightness(classes: int, own: str):
    """Images of one brightness for each class, raw, and a model that tells them apart in the range `own`."""
    labels = np.arange(120) % classes
    levels = (np.arange(classes) + 0.5) / classes * 255
    images = np.broadcast_to(levels[labels][:, None, None, None], (120, 4, 4, 1)).astype(np.uint8)
    centers = {"raw": levels, "unit": levels / 255, "signed": levels / 127.5 - 1}[own]
    image = keras.Input((4, 4, 1))
    model = keras.Model(image, layers.Dense(classes, name="last")(layers.GlobalAveragePooling2D()(image)), name="net")
    model.layers[-1].set_weights([2 * centers[None], -(centers**2)])
    return model, images, labels
