"""A student and a teacher with layers to tap, data for them, and a Distiller of the two."""

import keras
import numpy as np

from kdistill.distillation.distiller import Distiller

RNG = np.random.default_rng(5)
X = RNG.normal(size=(24, 8, 8, 2)).astype("float32")
Y = RNG.integers(0, 4, 24).astype("int32")
TAPS = {"student_tap": "conv", "teacher_tap": "block/conv"}


def student(seed=1, filters=5, ending=None, dtype=None):
    keras.utils.set_random_seed(seed)
    image = keras.Input((8, 8, 2))
    x = keras.layers.Conv2D(filters, 3, padding="same", activation="tanh", name="conv", dtype=dtype)(image)
    x = keras.layers.GlobalAveragePooling2D(name="pool", dtype=dtype)(x)
    return keras.Model(image, keras.layers.Dense(4, ending, name="logits", dtype=dtype)(x), name="small")


def teacher(seed=2, filters=5, ending=None):
    """A nested model: `block/conv` is inside of it."""
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Conv2D(filters, 3, padding="same", activation="tanh", name="conv")]
    layers += [keras.layers.BatchNormalization(name="norm"), keras.layers.Dropout(0.5)]
    block = keras.Sequential([keras.Input((8, 8, 2)), *layers], name="block")
    tail = [keras.layers.GlobalAveragePooling2D(name="pool"), keras.layers.Dense(4, ending, name="last")]
    return keras.Sequential([keras.Input((8, 8, 2)), block, *tail], name="large")


def compiled(*models, rate=0.1, **options):
    made = Distiller(*models, **options)
    made.compile(keras.optimizers.SGD(rate))
    return made
