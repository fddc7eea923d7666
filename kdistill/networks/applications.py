"""Networks of keras.applications: raw pixels (0..255) in, logits out, each with its own input size and preprocessing.

All of that is inside the network, so that models with different habits take the same pixels, and a `.tflite` too.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import keras
from keras import layers

from kdistill.errors import InputError

IMAGENET_CLASSES = 1000
# The mean pixel of the weights that came from Caffe, in their own order: blue, green, red.
CAFFE_MEAN = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class Application:
    """A function of keras.applications, its preprocessing, and the names under which Keras keeps its weights."""

    function: str
    preprocessing: str  # caffe (BGR less the mean), tf (-1..1), none (it has its own inside)
    top: str
    no_top: str
    size: int = 224


_RESNET = "resnet50_weights_tf_dim_ordering_tf_kernels{}.h5"
_VGG = "vgg16_weights_tf_dim_ordering_tf_kernels{}.h5"
_V2 = "mobilenet_v2_weights_tf_dim_ordering_tf_kernels_1.0_224{}.h5"
APPLICATIONS = {
    "vgg16": Application("VGG16", "caffe", _VGG.format(""), _VGG.format("_notop")),
    "resnet50": Application("ResNet50", "caffe", _RESNET.format(""), _RESNET.format("_notop")),
    "mobilenet_v2": Application("MobileNetV2", "tf", _V2.format(""), _V2.format("_no_top")),
    "mobilenet_v3_small": Application(
        "MobileNetV3Small",
        "none",
        "weights_mobilenet_v3_small_224_1.0_float.h5",
        "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5",
    ),
    "mobilenet_v3_large": Application(
        "MobileNetV3Large",
        "none",
        "weights_mobilenet_v3_large_224_1.0_float.h5",
        "weights_mobilenet_v3_large_224_1.0_float_no_top_v2.h5",
    ),
    "efficientnet_b0": Application("EfficientNetB0", "none", "efficientnetb0.h5", "efficientnetb0_notop.h5"),
}


def application(
    name: str,
    shape: tuple[int, int, int],
    classes: int,
    *,
    weights: str | None = None,
    size: int | None = None,
    momentum: float | None = None,
    download: bool = False,
    **options,
) -> keras.Model:
    """The network `name` for images of `shape`, resized inside to `size` (its own: 224) where that differs.

    Args:
        weights: None (new ones), "imagenet" (those of Keras: from its cache, or fetched if `download`), or a file with
            weights of keras.applications for these classes. With "imagenet" and other than 1,000 classes the head is
            new: mean over the places, then one dense layer.
        momentum: of the batch normalization, which is synchronized over replicas; None: the network's own (0.99 or
            0.999, which takes thousands of steps to follow).
        options: further arguments of the function, such as `alpha` or `dropout_rate`.
    """
    known, size = APPLICATIONS[name], size or APPLICATIONS[name].size
    if shape[-1] != 3:
        raise InputError(f"The network '{name}' expects color images (3 channels), received {shape}.")
    fetch = fetched({"weights": weights})
    headless = fetch and classes != IMAGENET_CLASSES
    if fetch:
        _check_at_hand(name, known.no_top if headless else known.top, download, options)
    elif weights is not None and not Path(weights).is_file():
        raise InputError(f"The network '{name}': no file of weights at '{weights}'.")
    image = keras.Input(shape, name="image")
    x = image if shape[:2] == (size, size) else layers.Resizing(size, size, name="resize")(image)
    if known.preprocessing == "tf":
        x = layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(x)
    elif known.preprocessing == "caffe":
        # Red first, as the pixels are: loaded weights get their first kernel turned round instead of every image.
        x = layers.Rescaling(1.0, offset=[-mean for mean in reversed(CAFFE_MEAN)], name="center")(x)
    head = {"include_top": False, "pooling": "avg"} if headless else {"classes": classes, "classifier_activation": None}
    function = getattr(keras.applications, known.function)
    model = function(weights=weights, input_tensor=x, input_shape=(size, size, 3), name=name, **head, **options)
    if weights is not None and known.preprocessing == "caffe":
        first = next(layer for layer in model.layers if isinstance(layer, layers.Conv2D))
        kernel, *bias = first.get_weights()
        first.set_weights([kernel[:, :, ::-1], *bias])
    outputs = layers.Dense(classes, name="logits")(model.outputs[0]) if headless else model.outputs[0]
    model = keras.Model(model.inputs[0], outputs, name=name)  # one image, where keras.applications has a list of one
    return _synchronized(model, momentum)


def fetched(options: dict) -> bool:
    """Whether a network with these options takes weights that Keras fetches."""
    return options.get("weights") == "imagenet"


def trained(options: dict, classes: int) -> bool:
    """Whether a network with these options comes with all its weights trained, the head too."""
    return options.get("weights") is not None and (not fetched(options) or classes == IMAGENET_CLASSES)


def _check_at_hand(name: str, file: str, download: bool, options: dict) -> None:
    """Weights are fetched on request only: here is looked where Keras keeps what it has fetched."""
    cache = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras").expanduser() / "models"
    if not download and (options or not (cache / file).is_file()):  # options change the name of the file
        raise InputError(
            f"The weights 'imagenet' of '{name}' are not in {cache}. Allow the download with --download, or give a "
            "file: the option weights=FILE (of keras.applications), or the network's file=MODEL.keras."
        )


def _synchronized(model: keras.Model, momentum: float | None) -> keras.Model:
    """The same model with batch normalization over the global batch, as `small_cnn` has it."""

    def again(layer):
        config = layer.get_config()
        if isinstance(layer, layers.BatchNormalization):
            config["synchronized"] = True
            config["momentum"] = momentum or layer.momentum
        return type(layer).from_config(config)

    made = keras.models.clone_model(model, clone_function=again)
    made.set_weights(model.get_weights())
    return made
