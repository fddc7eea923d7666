"""A data set that a student learns in seconds, and students that are compressed in seconds."""

import keras
import numpy as np
from keras import layers as L

from kdistill.data.splits import Examples
from kdistill.recipe import Stage

CLASSES = 4


def examples(count=96, seed=0):
    """Noisy copies of one pattern for each class."""
    patterns = np.random.default_rng(9).uniform(0, 255, (CLASSES, 10, 10, 4))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count).astype("int32")
    images = patterns[labels] + generator.normal(0, 30, (count, 10, 10, 4))
    return Examples(np.clip(images, 0, 255).astype("uint8"), labels)


def network(activation=None):
    return keras.Sequential(
        [
            *[keras.Input((10, 10, 4)), L.Rescaling(1 / 127.5, -1.0, name="scale")],
            *[L.Conv2D(8, 3, use_bias=False, name="first"), L.BatchNormalization(momentum=0.8), L.ReLU()],
            *[L.DepthwiseConv2D(3, activation="relu6", name="depth"), L.Conv2D(8, 3, name="plain"), L.ReLU()],
            *[L.GlobalAveragePooling2D(), L.Dropout(0.1), L.Dense(CLASSES, activation=activation, name="top")],
        ],
        name="student",
    )


def flat(activation=None):
    """A student that is compressed in a second."""
    layers = [L.Rescaling(1 / 255), L.Flatten(), L.Dense(8, activation="relu", name="plain")]
    return keras.Sequential([keras.Input((10, 10, 4)), *layers, L.Dense(CLASSES, activation=activation, name="top")])


def kernel(result, name):
    return np.asarray(result.model.get_layer(name).kernel)


def row(result, name):
    return next(row for row in result.layers if row["layer"] == name)


QUIET = {"say": lambda text: None}


def stage(scheme, **options):
    """One epoch in batches of 24, unless `options` say otherwise."""
    return Stage(scheme, **{"epochs": 1, "batch_size": 24, "learning_rate": 1e-4, **options})
