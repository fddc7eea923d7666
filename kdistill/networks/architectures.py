"""The networks that recipes name. Raw pixels (0..255) in, logits out; each network scales the pixels itself."""

import inspect
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
from keras import layers

from kdistill.errors import InputError, unknown
from kdistill.networks.applications import APPLICATIONS, application
from kdistill.recipe import Network
from kdistill.recipe.loading import function_of_file


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


def small_cnn(shape, classes: int, widths=(8, 16, 24), reduce: int = 1) -> keras.Model:
    """A 5x5 convolution of stride 2, then 3x3 ones with pooling, each normalized: 7,170 parameters on MNIST."""
    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.AveragePooling2D(reduce, name="reduce")(x) if reduce > 1 else x
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
    """Dense layers with a LeakyReLU after every one, the last too: the networks of the numpy tutorial (mnist_linear).

    As there, kernels start normal with a standard deviation of 1 / (inputs * outputs), biases with 1 / outputs. Without
    `units` there is one layer. `scale=1` leaves the pixels at 0 to 255.
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


CIFAR_MEAN = (125.3, 123.0, 113.9)  # the mean pixel of CIFAR-10's training images: red, green, blue


def cifar_quick(shape, classes: int, filters=(32, 32, 64)) -> keras.Model:
    """Caffe's CIFAR-10 "quick" network, of He's study (2017): 5x5 convolutions, overlapping pools, one hidden layer.

    With Caffe's initial weights; the pixels are centered, not scaled. Unlike in Caffe, biases learn at the common rate
    (Caffe: twice that), and pools ignore what is beyond the edge. 145,578 parameters for ten classes.
    """
    return _cifar_caffe(shape, classes, filters, "cifar_quick")


def cifar_mini(shape, classes: int, filters=(32, None, 64)) -> keras.Model:
    """`cifar_quick` without the second of its three convolutions, with all pools. 119,946 parameters.

    The small network of He's study (2017), which does not state what happens to the pool after that convolution.
    """
    return _cifar_caffe(shape, classes, filters, "cifar_mini")


def _cifar_caffe(shape, classes: int, filters, name: str) -> keras.Model:
    def gaussian(std: float):
        return keras.initializers.RandomNormal(stddev=std)

    image = keras.Input(shape, name="image")
    x = _centered(image)
    for index, width in enumerate(filters, 1):
        kernel = gaussian(1e-4 if index == 1 else 1e-2)
        if width:
            x = layers.Conv2D(width, 5, padding="same", kernel_initializer=kernel, name=f"conv{index}")(x)
        if index == 1:
            x = layers.MaxPooling2D(3, strides=2, padding="same", name="pool1")(x)
        if width:
            x = layers.ReLU(name=f"relu{index}")(x)
        if index > 1:
            x = layers.AveragePooling2D(3, strides=2, padding="same", name=f"pool{index}")(x)
    x = layers.Flatten(name="flat")(x)
    x = layers.Dense(64, kernel_initializer=gaussian(0.1), name="fc1")(x)
    logits = layers.Dense(classes, kernel_initializer=gaussian(0.1), name="logits")(x)
    return keras.Model(image, logits, name=name)


def cifar_full(shape, classes: int, filters=(32, 32, 64)) -> keras.Model:
    """Caffe's CIFAR-10 "full" network, of He's study (2017; 80 to 81 %). 89,578 parameters for ten classes.

    Three 5x5 convolutions with overlapping pools and, twice, `NormalizeWithinChannel`; one dense layer. Its weight
    decay is part of the network (L2), because that of the dense layer is 250 times that of the convolutions: train it
    with a `weight_decay` of 0. Unlike in Caffe, biases learn at the common rate and do not decay.
    """
    return _cifar_full(shape, classes, filters, "cifar_full")


def cifar_full_mini(shape, classes: int, filters=(32, None, 64)) -> keras.Model:
    """`cifar_full` without the second of its three convolutions, with all else. 63,946 parameters; see `cifar_mini`."""
    return _cifar_full(shape, classes, filters, "cifar_full_mini")


def _cifar_full(shape, classes: int, filters, name: str) -> keras.Model:
    def kernel(std: float, decay: float) -> dict:
        # The gradient of L2 is twice its factor times the weight.
        l2 = keras.regularizers.L2(decay / 2)
        return {"kernel_initializer": keras.initializers.RandomNormal(stddev=std), "kernel_regularizer": l2}

    image = keras.Input(shape, name="image")
    x = _centered(image)
    for index, width in enumerate(filters, 1):
        if width:
            start = kernel(1e-4 if index == 1 else 1e-2, 0.004)
            x = layers.Conv2D(width, 5, padding="same", name=f"conv{index}", **start)(x)
        if index == 1:
            x = layers.MaxPooling2D(3, strides=2, padding="same", name="pool1")(x)
        if width:
            x = layers.ReLU(name=f"relu{index}")(x)
        if index > 1:
            x = layers.AveragePooling2D(3, strides=2, padding="same", name=f"pool{index}")(x)
        if index < len(filters):
            x = NormalizeWithinChannel(name=f"norm{index}")(x)
    logits = layers.Dense(classes, name="logits", **kernel(1e-2, 1.0))(layers.Flatten(name="flat")(x))
    return keras.Model(image, logits, name=name)


@keras.saving.register_keras_serializable(package="kdistill")
class NormalizeWithinChannel(layers.Layer):
    """Caffe's local response normalization within the channel: x / (1 + alpha * mean of x^2 over 3x3) ^ beta.

    Input and output `[batch, height, width, channels]`. Beyond the edge are zeros, which count in the mean.
    """

    def __init__(self, alpha: float = 5e-5, beta: float = 0.75, **kwargs):
        super().__init__(**kwargs)
        self.alpha, self.beta = alpha, beta

    def call(self, inputs):
        padded = keras.ops.pad(keras.ops.square(inputs), [[0, 0], [1, 1], [1, 1], [0, 0]])
        mean = keras.ops.average_pool(padded, 3, strides=1, padding="valid")
        return inputs * keras.ops.power(1 + self.alpha * mean, -self.beta)

    def get_config(self):
        return {**super().get_config(), "alpha": self.alpha, "beta": self.beta}


def _centered(image):
    """The pixels less CIFAR's mean pixel, not scaled, as in Caffe."""
    mean = [-value for value in CIFAR_MEAN] if image.shape[-1] == 3 else -sum(CIFAR_MEAN) / 3
    return layers.Rescaling(1.0, offset=mean, name="center")(image)


def resnet(shape, classes: int, depth: int = 56, width: int = 16) -> keras.Model:
    """The residual networks for CIFAR of He et al. (2015, arXiv 1512.03385), of depth 6n + 2: 8, 14, 20, 56, 110.

    Where the size halves, the shortcut is a 1x1 convolution; batch normalization is synchronized over replicas.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth expects 6n + 2 (8, 14, 20, ...), received {depth}")

    def conv(x, filters: int, size: int, stride: int, name: str):
        x = layers.Conv2D(
            filters,
            size,
            strides=stride,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            name=f"{name}_conv",
        )(x)
        return layers.BatchNormalization(momentum=0.9, synchronized=True, name=f"{name}_norm")(x)

    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 63.75, offset=-2.0, name="scale")(image)
    x = layers.ReLU(name="stem_relu")(conv(x, width, 3, 1, "stem"))
    for stage in range(3):
        filters = width * 2**stage
        for block in range(blocks):
            name, stride = f"stage{stage + 1}_block{block + 1}", 2 if stage and not block else 1
            y = layers.ReLU(name=f"{name}_relu1")(conv(x, filters, 3, stride, f"{name}_1"))
            y = conv(y, filters, 3, 1, f"{name}_2")
            shortcut = conv(x, filters, 1, stride, f"{name}_short") if stride > 1 else x
            x = layers.ReLU(name=f"{name}_relu2")(layers.Add(name=f"{name}_add")([shortcut, y]))
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name=f"resnet{depth}")


def cifar_vgg(shape, classes: int, widths=(64, 128, 256), stride: int = 1) -> keras.Model:
    """Blocks of two 3x3 convolutions on whitened patches: a good network for CIFAR-10 in few epochs on CPUs.

    After Jordan's airbench (2024, arXiv 2404.00498): the first layer whitens patches of 2x2 pixels, and is not trained;
    each block pools after its first convolution; the maximum over all places, an eighth of it, goes to the last layer.
    1,163,050 parameters for ten classes, 288 of them not trained. Color images of at least 9 pixels.
    For larger photographs a `stride` of 2 leaves a quarter of the patches.
    """
    if shape[-1] != 3:
        raise ValueError(f"expected color images, received {shape[-1]} channels")
    image = keras.Input(shape, name="image")
    # Whole numbers below 256: exact in bfloat16.
    x = layers.Rescaling(1.0, offset=-120.0, name="center")(image)
    whitening = keras.initializers.Constant(_whitening().tolist())
    fixed = {"strides": stride, "use_bias": False, "kernel_initializer": whitening, "trainable": False}
    x = layers.Conv2D(24, 2, name="whiten", **fixed)(x)
    x = layers.ReLU(name="whiten_relu")(x)
    for block, width in enumerate(widths, 1):
        for index in (1, 2):
            name = f"block{block}_{index}"
            x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"{name}_conv")(x)
            if index == 1:
                x = layers.MaxPooling2D(name=f"block{block}_pool")(x)
            x = layers.BatchNormalization(momentum=0.9, synchronized=True, name=f"{name}_norm")(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
    x = layers.Rescaling(1 / 8, name="eighth")(layers.GlobalMaxPooling2D(name="max")(x))
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name="cifar_vgg")


def _whitening() -> np.ndarray:
    """Filters `[2, 2, 3, 24]` whose outputs have a standard deviation of about 1 on CIFAR-10, and little correlation.

    The principal components of its patches are, almost exactly, those of the four pixels (mean, horizontal, vertical,
    diagonal difference) times those of the colors (brightness, red less blue, green less red and blue).
    """
    pixels = np.array([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    colors = np.array([[1, 1, 1], [1, 0, -1], [-1, 2, -1]]) / np.sqrt([[3], [2], [6]])
    # The smallest are between 0.6 and 2.5, which is noise of the coding; 2 is enough for them.
    deviations = np.array([[206, 58, 26], [37, 3.5, 2], [40, 4.3, 2.4], [14, 2, 2]])
    filters = np.einsum("ip,jc,ij->pcij", pixels, colors, 1 / deviations).reshape(2, 2, 3, 12)
    return np.concatenate([filters, -filters], axis=-1).astype(np.float32)


def lstm_rows(shape, classes: int, units: int = 64) -> keras.Model:
    """A recurrent network that reads an image row by row: the other kind of teacher in Geras et al. 2016."""
    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.Reshape((shape[0], shape[1] * shape[2]), name="rows")(x)
    x = layers.LSTM(units, name="lstm")(x)
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name="lstm_rows")


def unet(shape, classes: int, widths=(16, 32, 64)) -> keras.Model:
    """A U-Net (Ronneberger et al. 2015, arXiv 1505.04597) with one convolution for each width: classes of pixels.

    The sides of an image have to be multiples of 2 to the power of `len(widths) - 1`.
    """

    def conv(x, width: int, name: str):
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, name=name)(x)
        x = layers.BatchNormalization(momentum=0.9, synchronized=True, name=f"{name}_norm")(x)
        return layers.ReLU(name=f"{name}_relu")(x)

    image = keras.Input(shape, name="image")
    x, skips = layers.Rescaling(1 / 255, name="scale")(image), []
    for index, width in enumerate(widths, 1):
        if skips:
            x = layers.MaxPooling2D(name=f"down{index}")(x)
        x = conv(x, width, f"conv{index}")
        skips.append(x)
    for index, width in reversed(list(enumerate(widths[:-1], 1))):
        x = layers.UpSampling2D(name=f"up{index}")(x)
        x = conv(layers.Concatenate(name=f"join{index}")([x, skips[index - 1]]), width, f"deconv{index}")
    return keras.Model(image, layers.Conv2D(classes, 1, name="logits")(x), name="unet")


def gru(shape, classes: int, units: int = 64, dropout: float = 0.3) -> keras.Model:
    """A recurrent network that reads a sequence `[time, features]` of numbers near 0 to 1 in both directions."""
    sequence = keras.Input(shape, name="sequence")
    x = layers.Bidirectional(layers.GRU(units), name="gru")(sequence)
    x = layers.Dropout(dropout, name="drop")(x)
    return keras.Model(sequence, layers.Dense(classes, name="logits")(x), name="gru")


def conv1d(shape, classes: int, widths=(16, 24, 32)) -> keras.Model:
    """Convolutions along the time of a sequence `[time, features]`, each normalized; all but the first of stride 2."""
    x = sequence = keras.Input(shape, name="sequence")
    for index, width in enumerate(widths, 1):
        stride = 1 if index == 1 else 2
        x = layers.Conv1D(width, 3, strides=stride, padding="same", use_bias=False, name=f"conv{index}")(x)
        x = layers.BatchNormalization(momentum=0.9, synchronized=True, name=f"norm{index}")(x)
        x = layers.ReLU(name=f"relu{index}")(x)
    x = layers.Flatten(name="flat")(x)
    return keras.Model(sequence, layers.Dense(classes, name="logits")(x), name="conv1d")


def ds_cnn(shape, classes: int, width: int = 8, depth: int = 3, reduce: int = 1) -> keras.Model:
    """Depthwise-separable convolutions, as in DS-CNN (Zhang et al. 2017, arXiv 1711.07128).

    Every second block has stride 2 and twice the filters while the image has more than 7 pixels. `reduce`: the image is
    averaged over squares of this size first.
    """
    image = keras.Input(shape, name="image")
    x = layers.Rescaling(1 / 255, name="scale")(image)
    x = layers.AveragePooling2D(reduce, name="reduce")(x) if reduce > 1 else x
    x = _normalized(layers.Conv2D(width, 3, 2, "same", use_bias=False, name="stem")(x), "stem")
    for index in range(1, depth + 1):
        stride = 2 if index % 2 == 0 and min(x.shape[1:3]) > 7 else 1
        width *= stride
        x = layers.DepthwiseConv2D(3, stride, "same", use_bias=False, name=f"depthwise{index}")(x)
        x = _normalized(x, f"depthwise{index}")
        x = _normalized(layers.Conv2D(width, 1, use_bias=False, name=f"point{index}")(x), f"point{index}")
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return keras.Model(image, layers.Dense(classes, name="logits")(x), name="ds_cnn")


def _normalized(x, name: str):
    norm = layers.BatchNormalization(momentum=0.9, synchronized=True, name=f"{name}_norm")
    return layers.ReLU(name=f"{name}_relu")(norm(x))


def dense(shape, classes: int, width: int = 16, depth: int = 2) -> keras.Model:
    """`depth` dense layers of `width` units with ReLU, for a row of numbers in any range, which it normalizes."""
    x = row = keras.Input(shape, name="row")
    x = layers.BatchNormalization(momentum=0.9, synchronized=True, name="norm")(layers.Flatten(name="flat")(x))
    for index in range(1, depth + 1):
        x = layers.Dense(width, activation="relu", name=f"fc{index}")(x)
    return keras.Model(row, layers.Dense(classes, name="logits")(x), name="dense")


NETWORKS: dict[str, Callable[..., keras.Model]] = {
    "lenet": lenet,
    "small_cnn": small_cnn,
    "lstm_rows": lstm_rows,
    "mlp": mlp,
    "cifar_quick": cifar_quick,
    "cifar_mini": cifar_mini,
    "cifar_full": cifar_full,
    "cifar_full_mini": cifar_full_mini,
    "cifar_vgg": cifar_vgg,
    "resnet": resnet,
    "unet": unet,
    "gru": gru,
    "conv1d": conv1d,
    "ds_cnn": ds_cnn,
    "dense": dense,
}


def build(network: Network, shape, classes, download: bool = False) -> keras.Model:
    """The network that a recipe names, for inputs of this shape: of images (height, width, channels).

    Its weights are random, except where an option of a network of `applications` names trained ones. A name such as
    `my_networks.py:tagger` is a function of a Python file: (shape, classes, **options) -> keras.Model.

    Args:
        shape: of an example; of several inputs a dict by name.
        classes: the number of logits (or numbers); of several outputs a dict by name.
        download: lets Keras download trained weights.

    Raises:
        InputError: for an unknown name, for a file that cannot be run, and for options that do not fit.
    """
    if ".py:" in network.name:
        return _of_file(network, shape, classes)
    if network.name not in {**NETWORKS, **APPLICATIONS}:
        raise unknown("network", network.name, {**NETWORKS, **APPLICATIONS})
    if keras.config.image_data_format() != "channels_last":
        raise InputError(
            "Keras is set to images with their channels first (image_data_format in ~/.keras/keras.json). kdistill's "
            "images are [batch, height, width, channels]: call keras.config.set_image_data_format('channels_last')."
        )
    try:
        if network.name in APPLICATIONS:
            return application(network.name, shape, classes, download=download, **network.options)
        return NETWORKS[network.name](shape, classes, **network.options)
    except InputError:
        raise
    except (TypeError, ValueError) as error:
        raise InputError(f"The network '{network.name}' cannot be built for images of {shape}: {error}") from None


def _of_file(network: Network, shape, classes) -> keras.Model:
    """The network of FILE.py:FUNCTION. A function whose parameters are the options gets no shape and no classes."""
    file, _, name = network.name.rpartition(":")
    function = function_of_file(Path(file), name)
    given = () if {*inspect.signature(function).parameters} == {*network.options} else (shape, classes)
    try:
        model = function(*given, **network.options)
    except Exception as error:  # whatever a user's own function may raise
        raise InputError(f"{name}({shape}, {classes}) of '{file}' failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, keras.Model):
        raise InputError(f"{name}() of '{file}' must return a keras.Model, returned {model!r}.")
    return model
