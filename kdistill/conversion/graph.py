"""The graph that ships: the layers for pixels before the model, the softmax after it, and the names of its layers."""

import dataclasses

import keras
import numpy as np
from keras import layers

from kdistill.errors import InputError
from kdistill.networks.heads import MAIN_OUTPUTS, exclusive_kind
from kdistill.networks.keras_internals import leaf_layers
from kdistill.networks.signatures import image_shape, input_shape, subject_of
from kdistill.recipe import Profile
from kdistill.teachers.input_range import normalization

GRAY = (0.299, 0.587, 0.114)  # the weights of red, green and blue, of ITU-R Rec. 601


def with_channel(model: keras.Model) -> keras.Model:
    """The model, or one for images `[batch, height, width, 1]` around a model that takes `(height, width)`."""
    shape = input_shape(model)
    if len(shape) == 3:
        return model
    image = keras.Input((*shape, 1), name="image")
    return keras.Model(image, model(layers.Reshape(shape, name="without_channel")(image)), name=model.name)


def with_range(profile: Profile, mean=None, std=None) -> Profile:
    """The profile with this mean and std, each a number or one for each channel; its own if both are None."""
    stated = normalization(mean, std)
    return profile if stated is None else dataclasses.replace(profile, mean=stated[0], std=stated[1])


def keeps_range(profile: Profile) -> bool:
    """Whether the profile states mean 0 and std 1: then the file takes the numbers on which the model was trained."""
    stated = bool(profile.mean or profile.std)
    return stated and all(mean == 0 for mean in profile.mean) and all(std == 1 for std in profile.std)


def with_normalization(model: keras.Model, profile: Profile) -> keras.Model:
    """The model with the profile's `(pixel - mean) / std` before it, so that it takes raw pixels."""
    if keeps_range(profile) or not (profile.mean or profile.std):
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


def with_channels_and_softmax(model: keras.Model, profile: Profile, kind: str) -> keras.Model:
    """The model with the profile's number of input channels, and with a softmax if the profile wants probabilities.

    `kind`: of the model's output, as in `Head`. The sigmoids of independent labels are probabilities already. Raises
    `InputError` where the model cannot give what the profile wants.
    """
    expected_kind, (height, width, channels) = profile.output or kind, image_shape(model)
    expected_channels = profile.channels or channels
    if expected_kind == "logits" and kind in ("probabilities", "labels"):
        raise InputError(
            f"The profile '{profile.name}' wants logits, but the model '{model.name}' ends in a "
            f"{'softmax' if kind == 'probabilities' else 'sigmoid'}. Remove its last activation, or use a profile with "
            "output 'probabilities'."
        )
    if kind == "labels":
        expected_kind = kind
    elif expected_kind != kind and kind not in MAIN_OUTPUTS:
        exclusive_kind(
            kind,
            f"{subject_of(model, 'model')}, for the profile '{profile.name}' that wants {expected_kind},",
            "Or name an output of exclusive classes: keras.Model(image, {'logits': ...}) or {'probabilities': ...}.",
        )
    if (expected_channels, channels) not in ((channels, channels), (3, 1)):
        raise InputError(
            f"The profile '{profile.name}' wants images of {expected_channels} channels; the model '{model.name}' "
            f"takes {channels}. Only models of gray images (1 channel) can take color images instead."
        )
    if expected_channels == channels and expected_kind == kind:
        return model
    image = keras.Input((height, width, expected_channels), name="image")
    x = image
    if expected_channels != channels:
        gray = layers.Conv2D(1, 1, use_bias=False, trainable=False, name="grey")  # the name is in exported files
        x = gray(x)
        gray.set_weights([np.asarray(GRAY, np.float32).reshape(1, 1, 3, 1)])
    outputs = model(x)
    if expected_kind != kind:
        softmax = layers.Softmax(name="softmax")
        if isinstance(outputs, dict):
            others = {name: output for name, output in outputs.items() if name != kind}
            outputs = {expected_kind: softmax(outputs[kind]), **others}
        else:
            outputs = softmax(outputs)
    return keras.Model(image, outputs, name=model.name)


def layer_names(model: keras.Model) -> set[str]:
    """The names of the layers that contain no other layers."""
    return {layer.name for layer in leaf_layers(model)}


def layer_of(tensor: str, names: set[str]) -> str | None:
    """The layer in a tensor's name: `conv1` for `net_1/conv1_1/convolution`. `names`: of the layers of the model."""
    for part in tensor.replace(";", "/").split("/"):
        head, _, tail = part.rpartition("_")
        if tail.isdigit() and head in names:  # TensorFlow adds a number where a layer is traced again
            return head
        if part in names:
            return part
    return None
