"""Networks of keras.applications: raw pixels (0..255) in, logits out.

Resizing and preprocessing are layers of the network, so all networks, and their `.tflite` files, take the same pixels.
"""

from dataclasses import dataclass
from pathlib import Path

import keras
from keras import layers

from kdistill.errors import InputError
from kdistill.files import user_folder
from kdistill.networks.copying import clone

IMAGENET_CLASSES = 1000
# The mean pixel for weights that come from Caffe, in Caffe's order: blue, green, red.
CAFFE_MEAN = (103.939, 116.779, 123.68)


@dataclass(frozen=True)
class Application:
    """A function of keras.applications, its preprocessing, and the names under which Keras keeps its weights."""

    function: str
    preprocessing: str  # caffe (BGR minus the mean), tf (-1..1), none (the network has its own)
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
    """The network `name` of keras.applications for images of `shape` = (height, width, channels), 3 channels.

    Args:
        weights: None (random), "imagenet" (Keras's own, from its cache or the network), or the path of a file with
            weights of keras.applications for these classes. With "imagenet" and a number of classes other than 1,000,
            the head is new: global average pooling, then one dense layer.
        size: height and width in pixels to which the network resizes the images. None: 224.
        momentum: of batch normalization, which is synchronized over replicas. None: the network's own (0.99 or 0.999,
            which needs thousands of steps to follow).
        download: lets Keras download "imagenet" weights that are not in its cache.
        options: further arguments of the function in keras.applications, such as `alpha` or `dropout_rate`.

    Raises:
        InputError: for gray images, and for weights that are not on the disk.
    """
    architecture, size = APPLICATIONS[name], size or APPLICATIONS[name].size
    if shape[-1] != 3:
        raise InputError(f"The network '{name}' expects color images (3 channels), received {shape}.")
    imagenet = uses_imagenet({"weights": weights})
    headless = imagenet and classes != IMAGENET_CLASSES
    if imagenet:
        _check_available(name, architecture.no_top if headless else architecture.top, download, options)
    elif weights is not None and not Path(weights).is_file():
        raise InputError(f"The network '{name}': no file of weights at '{weights}'.")
    image = keras.Input(shape, name="image")
    x = image if shape[:2] == (size, size) else layers.Resizing(size, size, name="resize")(image)
    if architecture.preprocessing == "tf":
        x = layers.Rescaling(1 / 127.5, offset=-1.0, name="scale")(x)
    elif architecture.preprocessing == "caffe":
        # The pixels stay in the order red, green, blue: the first kernel is reversed below, instead of every image.
        x = layers.Rescaling(1.0, offset=[-mean for mean in reversed(CAFFE_MEAN)], name="center")(x)
    head = {"include_top": False, "pooling": "avg"} if headless else {"classes": classes, "classifier_activation": None}
    function = getattr(keras.applications, architecture.function)
    model = function(weights=weights, input_tensor=x, input_shape=(size, size, 3), name=name, **head, **options)
    if weights is not None and architecture.preprocessing == "caffe":
        first = next(layer for layer in model.layers if isinstance(layer, layers.Conv2D))
        kernel, *bias = first.get_weights()
        first.set_weights([kernel[:, :, ::-1], *bias])
    outputs = layers.Dense(classes, name="logits")(model.outputs[0]) if headless else model.outputs[0]
    model = keras.Model(model.inputs[0], outputs, name=name)  # one image, where keras.applications has a list of one
    return _synchronized(model, momentum)


def uses_imagenet(options: dict) -> bool:
    """Whether a network with these options takes the ImageNet weights of Keras, which may need a download."""
    return options.get("weights") == "imagenet"


def is_pretrained(options: dict, classes: int) -> bool:
    """Whether all weights of a network with these options are trained ones, those of the head too."""
    return options.get("weights") is not None and (not uses_imagenet(options) or classes == IMAGENET_CLASSES)


def _check_available(name: str, file: str, download: bool, options: dict) -> None:
    """Raises `InputError` if weights are not in Keras's cache and a download is not allowed."""
    cache = user_folder("KERAS_HOME", "~/.keras", "The folder of Keras") / "models"
    if not download and (options or not (cache / file).is_file()):  # options change the name of the file
        raise InputError(
            f"The weights 'imagenet' of '{name}' are not in {cache}. Allow the download with --download, or give "
            "a file: the option weights=FILE (of keras.applications), or the network's file=MODEL.keras."
        )


def _synchronized(model: keras.Model, momentum: float | None) -> keras.Model:
    """A copy of the model with batch normalization over the global batch, as in `small_cnn`."""

    def synchronize(layer, config):
        if isinstance(layer, layers.BatchNormalization):
            config["synchronized"] = True
            config["momentum"] = momentum or layer.momentum

    return clone(model, synchronize)
