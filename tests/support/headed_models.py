"""Small students and teachers of every head, with data that fits: `CASES[name](seed)`."""

from dataclasses import dataclass

import keras
import numpy as np
from keras import layers

EXAMPLES, BATCH = 48, 16


@dataclass
class Case:
    """A model without its activation, its data, and the loss by which plain Keras trains it."""

    model: keras.Model
    inputs: object
    labels: object
    meaning: object  # of the output, or a dict
    loss: object  # of Keras, the mean over the rows
    has_mask: bool = False


def _images(seed, width, stride=1):
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(width)
    image = keras.Input((6, 6, 1))
    x = layers.Conv2D(width, 3, strides=stride, padding="same", activation="tanh")(image)
    return image, x, rng.normal(size=(EXAMPLES, 6, 6, 1)).astype("float32"), rng


def segmentation(seed=0, width=3):
    image, x, inputs, rng = _images(seed, width)
    model = keras.Model(image, layers.Conv2D(4, 1)(x), name=f"segments{width}")
    return Case(model, inputs, rng.integers(0, 4, (EXAMPLES, 6, 6)), "classes", sparse)


def tagging(seed=0, width=3):
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(width)
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(20, width, mask_zero=True)(tokens)
    model = keras.Model(tokens, layers.Dense(5)(layers.SimpleRNN(width, return_sequences=True)(x)), name=f"tags{width}")
    inputs = rng.integers(1, 20, (EXAMPLES, 7))
    inputs[np.arange(7) >= rng.integers(2, 8, EXAMPLES)[:, None]] = 0
    return Case(model, inputs, rng.integers(0, 5, (EXAMPLES, 7)), "classes", sparse, has_mask=True)


def binary(seed=0, width=3):
    image, x, inputs, rng = _images(seed, width)
    model = keras.Model(image, layers.Dense(1)(layers.Flatten()(x)), name=f"binary{width}")
    return Case(model, inputs, rng.integers(0, 2, (EXAMPLES, 1)).astype("float32"), "labels", summed_binary)


def multilabel(seed=0, width=3):
    image, x, inputs, rng = _images(seed, width)
    model = keras.Model(image, layers.Dense(5)(layers.Flatten()(x)), name=f"labels{width}")
    return Case(model, inputs, rng.integers(0, 2, (EXAMPLES, 5)).astype("float32"), "labels", summed_binary)


def regression(seed=0, width=3):
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(width)
    row = keras.Input((6,))
    model = keras.Model(row, layers.Dense(2)(layers.Dense(width, "tanh")(row)), name=f"numbers{width}")
    inputs = rng.normal(size=(EXAMPLES, 6)).astype("float32")
    return Case(model, inputs, rng.normal(size=(EXAMPLES, 2)).astype("float32"), "numbers", squared)


def depth(seed=0, width=3):
    image, x, inputs, rng = _images(seed, width)
    model = keras.Model(image, layers.Conv2D(1, 1)(x), name=f"depth{width}")
    return Case(model, inputs, rng.normal(size=(EXAMPLES, 6, 6, 1)).astype("float32"), "numbers", squared)


def two_inputs(seed=0, width=3):
    rng = np.random.default_rng(seed)
    keras.utils.set_random_seed(width)
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b")
    x = layers.Dense(width, "tanh")(layers.Concatenate()([a, b]))
    model = keras.Model({"a": a, "b": b}, layers.Dense(3)(x), name=f"pairs{width}")
    inputs = {name: rng.normal(size=(EXAMPLES, n)).astype("float32") for name, n in (("a", 4), ("b", 3))}
    return Case(model, inputs, rng.integers(0, 3, EXAMPLES), "classes", sparse)


def two_heads(seed=0, width=3):
    image, x, inputs, rng = _images(seed, width)
    flat = layers.Flatten()(x)
    outputs = {"kind": layers.Dense(4)(flat), "place": layers.Dense(2)(flat)}
    model = keras.Model(image, outputs, name=f"heads{width}")
    labels = {"kind": rng.integers(0, 4, EXAMPLES), "place": rng.normal(size=(EXAMPLES, 2)).astype("float32")}
    return Case(model, inputs, labels, {"kind": "classes", "place": "numbers"}, {"kind": sparse, "place": squared})


def sparse(labels, outputs):
    return keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits=True)


def summed_binary(labels, outputs):
    mean = keras.losses.binary_crossentropy(labels, outputs, from_logits=True)
    return mean * outputs.shape[-1]


def squared(labels, outputs):
    return keras.losses.mean_squared_error(labels, outputs)


CASES = {f.__name__: f for f in (segmentation, tagging, binary, multilabel, regression, depth, two_inputs, two_heads)}
