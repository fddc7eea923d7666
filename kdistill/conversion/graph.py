"""The graph that is shipped: what is done to the pixels before the model, and the softmax behind it."""

import keras
import numpy as np
from keras import layers

from kdistill.errors import InputError
from kdistill.networks.heads import image_shape
from kdistill.networks.keras_internals import leaf_layers
from kdistill.recipe import Profile

GRAY = (0.299, 0.587, 0.114)  # red, green and blue in gray, of ITU-R Rec. 601


def normalized(model: keras.Model, profile: Profile) -> keras.Model:
    """The model with the profile's `(pixel - mean) / std` before it: raw pixels go in."""
    if not profile.mean and not profile.std:
        return model
    shape = image_shape(model)
    channels = shape[-1]
    mean, std = (np.asarray(values, float) for values in (profile.mean or (0.0,), profile.std or (1.0,)))
    for name, values in (("mean", mean), ("std", std)):
        if values.shape not in ((1,), (channels,)):
            raise InputError(
                f"The profile '{profile.name}': {name} expects 1 or {channels} numbers, one for each channel of "
                f"'{model.name}', received {len(values)}."
            )
    image = keras.Input(shape, name="image")
    scale = np.broadcast_to(1 / std, channels)
    offset = np.broadcast_to(-mean / std, channels)
    scaled = layers.Rescaling(scale.tolist(), offset.tolist(), name="normalize")(image)
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
            ". Only a model of gray images (1 channel) can be given color."
        )
    if takes == channels and wants == gives:
        return model
    image = keras.Input((height, width, takes), name="image")
    x = image
    if takes != channels:
        gray = layers.Conv2D(1, 1, use_bias=False, trainable=False, name="grey")
        x = gray(x)
        gray.set_weights([np.asarray(GRAY, np.float32).reshape(1, 1, 3, 1)])
    outputs = model(x)
    if wants != gives:
        softmax = layers.Softmax(name="softmax")
        if isinstance(outputs, dict):
            others = {name: each for name, each in outputs.items() if name != gives}
            outputs = {wants: softmax(outputs[gives]), **others}
        else:
            outputs = softmax(outputs)
    return keras.Model(image, outputs, name=model.name)


def layer_names(model: keras.Model) -> set[str]:
    """The names of the layers that hold no other layers."""
    return {layer.name for layer in leaf_layers(model)}


def layer_of(tensor: str, names: set[str]) -> str | None:
    """The layer that a tensor's name speaks of, such as `conv1` for `net_1/conv1_1/convolution`."""
    for part in tensor.replace(";", "/").split("/"):
        head, _, tail = part.rpartition("_")
        if tail.isdigit() and head in names:  # the number that tracing the layer once more has given it
            return head
        if part in names:
            return part
    return None
