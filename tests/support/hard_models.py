"""Models that lose too much in int8, each for another reason, and data. Nothing here is trained."""

import keras
import numpy as np
from keras import layers
from support.small_models import corners

from kdistill.data.splits import Examples

LENGTH, FEATURES = 12, 12


def fitted(features: keras.KerasTensor, image: keras.KerasTensor, name: str, examples: Examples) -> keras.Model:
    """A dense layer behind features, fitted by least squares to the corners."""
    dense = layers.Dense(4, name="last")
    model = keras.Model(image, dense(features), name=name)
    values = np.asarray(keras.Model(image, features)(examples.images.astype("float32")), np.float64)
    inputs = np.column_stack([values, np.ones(len(values))])
    targets, gram = 8 * np.eye(4)[examples.labels] - 2, inputs.T @ inputs
    ridge = 0.003 * np.trace(gram) / len(gram) * np.eye(len(gram))
    solution = np.linalg.solve(gram + ridge, inputs.T @ targets)
    dense.set_weights([solution[:-1], solution[-1]])
    return model


def wide_channels(activation: str = "relu", span: float = 5.0, name: str = "wide") -> keras.Model:
    """Channels whose widths differ by 10^span, which int8 with one scale for all of them cannot hold."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 1))
    x = layers.Rescaling(1 / 255)(image)
    first = layers.Conv2D(8, 3, strides=2, activation=activation, name="first")
    x = first(x)
    x = layers.DepthwiseConv2D(3, padding="same", activation=activation, name="depthwise")(x)
    second = layers.Conv2D(8, 1, activation=activation, name="second")
    x = layers.Flatten()(second(x))
    width = 10.0 ** np.linspace(-span / 2, span / 2, 8)
    kernel, bias = first.get_weights()
    first.set_weights([kernel * width, bias * width])
    kernel, bias = second.get_weights()
    second.set_weights([kernel / width[:, None], bias])
    return fitted(x, image, name, corners(300, seed=1))


def outliers(name: str = "outliers") -> keras.Model:
    """A power of the activations: a rare bright image makes the range of all others tiny."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 1))
    x = layers.Conv2D(8, 3, strides=3, activation="relu", name="first")(layers.Rescaling(1 / 50)(image))
    x = layers.Multiply(name="square")([x, x])
    x = layers.Multiply(name="fourth")([x, x])
    return fitted(layers.Flatten()(x), image, name, dim(300, seed=1))


def dim(count: int, seed: int = 0, bright: int = 0) -> Examples:
    """Corners in a fifth of the brightness, but for the first images."""
    examples = corners(count, seed)
    images = examples.images // 5
    images[:bright] = 255
    return Examples(images, examples.labels)


def shifted(name: str = "shifted") -> keras.Model:
    """A swish channel with an offset of 3,000, which nothing reads: no way of repair but float holds the others."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 1))
    x = layers.Rescaling(1 / 255)(image)
    first = layers.Conv2D(8, 3, strides=2, activation="swish", name="first")
    x = first(x)
    second = layers.Conv2D(8, 1, activation="hard_swish", name="second")
    x = layers.Flatten()(second(x))
    kernel, bias = first.get_weights()
    first.set_weights([kernel, bias + 3000 * (np.arange(8) == 0)])
    kernel, bias = second.get_weights()
    second.set_weights([kernel * (np.arange(8) > 0)[:, None], bias])
    return fitted(x, image, name, corners(300, seed=1))


def recurrent(layer: keras.layers.Layer, name: str = "recurrent") -> keras.Model:
    """A recurrent layer over the rows of an image."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 1))
    x = layers.Reshape((LENGTH, FEATURES))(layers.Rescaling(1 / 255)(image))
    return fitted(layer(x), image, name, corners(300, seed=1))
