"""The students and teachers that the recipes name. Raw pixels (0..255) in, logits out; the scaling is inside."""

import os
from collections.abc import Callable
from pathlib import Path

import keras
from keras import layers

from kdistill import convert
from kdistill.errors import InputError, unknown
from kdistill.recipe import Network


def lenet(shape, classes: int, filters=(20, 50), units: int = 500, dropout: float = 0.5) -> keras.Model:
    """Caffe's LeNet, the network of He's study (2017): two 5x5 convolutions with pooling, one hidden layer."""
    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    for index, width in enumerate(filters, 1):
        x = layers.Conv2D(width, 5, activation="relu", name=f"conv{index}")(x)
        x = layers.MaxPooling2D(name=f"pool{index}")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(units, activation="relu", name="fc1")(x)
    x = layers.Dropout(dropout, name="drop")(x)
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name="lenet")


def small_cnn(shape, classes: int, widths=(8, 16, 24)) -> keras.Model:
    """A 5x5 convolution of stride 2, then 3x3 ones with pooling, each normalised: 7,170 parameters on MNIST."""
    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    for index, width in enumerate(widths, 1):
        kernel, stride = (5, 2) if index == 1 else (3, 1)
        x = layers.Conv2D(width, kernel, strides=stride, padding="same", use_bias=False, name=f"conv{index}")(x)
        x = layers.BatchNormalization(momentum=0.9, synchronized=True, name=f"norm{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(x)
        if index > 1:
            x = layers.MaxPooling2D(name=f"pool{index}")(x)
    x = layers.Flatten(name="flat")(x)
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name="small_cnn")


def mlp(shape, classes: int, units=(16, 16), slope: float = 0.1, scale: float = 1 / 255) -> keras.Model:
    """Dense layers, each behind it a LeakyReLU, the last one too: the networks of the numpy tutorial (mnist_linear).

    Its weights start as they do there, normal with deviation 1 / (inputs * outputs), biases with 1 / outputs. Without
    `units` it is one layer. `scale=1` leaves the pixels at 0 to 255.
    """
    image = keras.Input(shape, name="image")
    x = layers.Flatten(name="flat")(layers.Rescaling(scale, name="scale")(image))
    for index, width in enumerate((*units, classes), 1):
        start = {
            "kernel_initializer": keras.initializers.RandomNormal(stddev=1 / (x.shape[-1] * width)),
            "bias_initializer": keras.initializers.RandomNormal(stddev=1 / width),
        }
        x = layers.Dense(width, name=f"fc{index}", **start)(x)
        x = layers.LeakyReLU(slope, name=f"leaky{index}")(x)
    return keras.Model(image, x, name="mlp")


NETWORKS: dict[str, Callable[..., keras.Model]] = {"lenet": lenet, "small_cnn": small_cnn, "mlp": mlp}


def build(network: Network, shape: tuple[int, int, int], classes: int) -> keras.Model:
    """The network that a recipe names, with new weights, for images of `shape` = (height, width, channels)."""
    if network.name not in NETWORKS:
        raise unknown("network", network.name, NETWORKS)
    try:
        return NETWORKS[network.name](shape, classes, **network.options)
    except (TypeError, ValueError) as error:
        raise InputError(f"The network '{network.name}' cannot be built for images of {shape}: {error}") from None


def load(path: str | Path, shape: tuple[int, int, int], classes: int) -> keras.Model:
    """A trained model from a `.keras` file, in safe mode, checked to fit images (height, width, channels)."""
    model = convert.load_model(path)
    if convert.image_shape(model) != tuple(shape):
        raise InputError(f"The model '{path}' expects images of {convert.image_shape(model)}, the data holds {shape}.")
    found = convert.output_of(model)[1]
    if found != classes:
        raise InputError(f"The model '{path}' has {found} classes, the data has {classes}.")
    return model


def save(model: keras.Model, path: Path) -> None:
    """Writes a `.keras` file whole or not at all."""
    part = path.with_name(f".part-{path.name}")
    model.save(part)
    os.replace(part, path)
