"""The graph that is shipped: what is done to the pixels before the model, and the softmax behind it."""

import keras
import numpy as np
from keras import layers

from kdistill.errors import InputError
from kdistill.measure import are_probabilities
from kdistill.recipe import Profile

GREY = (0.299, 0.587, 0.114)  # red, green and blue in grey, of ITU-R Rec. 601
MAIN = ("logits", "probabilities")  # of several outputs, the one that classifies


def image_shape(model: keras.Model) -> tuple[int, int, int]:
    """(height, width, channels) of the images that a model takes."""
    if not model.built:
        raise InputError(f"The model '{model.name}' is not built. Call it once on a batch of images before export.")
    try:
        shape = model.input_shape
    except AttributeError:  # a subclassed model; what it was built with is what it takes
        shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise InputError(
            f"The input shape of the subclassed model '{model.name}' is not known. "
            "Call model.build((None, height, width, channels)) before export."
        )
    if isinstance(shape, dict) or not all(size is None or isinstance(size, int) for size in shape):
        raise InputError(f"The model '{model.name}' has several inputs: {shape}. Export takes models with one image.")
    if len(shape) != 4 or None in shape[1:]:
        raise InputError(
            f"The model '{model.name}' takes {tuple(shape)}; export expects images [batch, height, width, channels] "
            "of a fixed size. Build it with keras.Input((height, width, channels))."
        )
    return tuple(shape[1:])


def main_output(outputs, model: str = "the model"):
    """The output that classifies: the only one, or of a dict the one named `logits` or `probabilities`."""
    if not isinstance(outputs, dict):
        return outputs
    found = [name for name in MAIN if name in outputs]
    if len(found) != 1:
        raise InputError(
            f"The model '{model}' has the outputs {', '.join(sorted(outputs))}. Of several, exactly one has to be "
            "named 'logits' or 'probabilities'. Build it with keras.Model(image, {'logits': ..., ...})."
        )
    return outputs[found[0]]


def normalised(model: keras.Model, profile: Profile) -> keras.Model:
    """The model with the profile's `(pixel - mean) / deviation` before it: raw pixels go in."""
    if not profile.mean and not profile.deviation:
        return model
    shape = image_shape(model)
    channels = shape[-1]
    mean, deviation = (np.asarray(values, float) for values in (profile.mean or (0.0,), profile.deviation or (1.0,)))
    for name, values in (("mean", mean), ("deviation", deviation)):
        if values.shape not in ((1,), (channels,)):
            raise InputError(
                f"The profile '{profile.name}': {name} expects 1 or {channels} numbers, one for each channel of "
                f"'{model.name}', received {len(values)}."
            )
    image = keras.Input(shape, name="image")
    scale = np.broadcast_to(1 / deviation, channels)
    offset = np.broadcast_to(-mean / deviation, channels)
    scaled = layers.Rescaling(scale.tolist(), offset.tolist(), name="normalise")(image)
    return keras.Model(image, model(scaled), name=model.name)


def deployed(model: keras.Model, profile: Profile, gives: str) -> keras.Model:
    """The model with the profile's number of channels and its softmax. `gives`: what the model gives now.

    Raises `InputError` for channels or an output that cannot be had from it.
    """
    wants, (height, width, channels) = profile.output or gives, image_shape(model)
    takes = profile.channels or channels
    if wants == "logits" and gives == "probabilities":
        raise InputError(
            f"The profile '{profile.name}' wants logits, but the model '{model.name}' ends in a softmax. "
            "Leave its last activation out, or ask for probabilities."
        )
    if (takes, channels) not in ((channels, channels), (3, 1)):
        raise InputError(
            f"The profile '{profile.name}' wants images of {takes} channels; the model '{model.name}' takes {channels}"
            ". Only a model of grey images (1 channel) can be given colour."
        )
    if takes == channels and wants == gives:
        return model
    image = keras.Input((height, width, takes), name="image")
    x = image
    if takes != channels:
        grey = layers.Conv2D(1, 1, use_bias=False, trainable=False, name="grey")
        x = grey(x)
        grey.set_weights([np.asarray(GREY, np.float32).reshape(1, 1, 3, 1)])
    outputs = model(x)
    if wants != gives:
        softmax = layers.Softmax(name="softmax")
        if isinstance(outputs, dict):
            others = {name: each for name, each in outputs.items() if name != gives}
            outputs = {wants: softmax(outputs[gives]), **others}
        else:
            outputs = softmax(outputs)
    return keras.Model(image, outputs, name=model.name)


def kind_of(outputs: np.ndarray) -> str:
    """`logits` or `probabilities`, judged by the numbers."""
    return "probabilities" if are_probabilities(outputs) else "logits"
