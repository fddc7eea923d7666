"""The graph that ships: the layers for pixels before the model, the softmax after it, and the names of its layers."""

import dataclasses
from collections.abc import Mapping

import keras
import numpy as np
from keras import layers

from kdistill.errors import InputError
from kdistill.networks.heads import MAIN_OUTPUTS, NUMBERS, Head, exclusive_kind
from kdistill.networks.keras_internals import leaf_layers
from kdistill.networks.signatures import (
    image_shape,
    in_structure,
    input_shape,
    inputs_of,
    outputs_by_name,
    subject_of,
    takes_images,
)
from kdistill.recipe import Profile
from kdistill.teachers.input_range import normalization

GRAY = (0.299, 0.587, 0.114)  # the weights of red, green and blue, of ITU-R Rec. 601


def with_channel(model: keras.Model) -> keras.Model:
    """The model, or one for images `[batch, height, width, 1]` around a model that takes `(height, width)`."""
    shape = input_shape(model)
    if len(shape) == 3:
        return model
    image = keras.Input((*shape, 1), name="image")
    outputs = _named(model, model(layers.Reshape(shape, name="without_channel")(image)))
    return keras.Model(image, outputs, name=model.name)


def _named(model: keras.Model, outputs):
    """Outputs of a model that is called: those of a list get its names, which a model around it would lose."""
    return outputs_by_name(model, outputs) if isinstance(outputs, (list, tuple)) else outputs


def check_suits(model: keras.Model, profile: Profile, heads: Mapping[str, Head]) -> None:
    """Raises `InputError` where a profile cannot hold the inputs or outputs of a model."""
    inputs = inputs_of(model)
    taken = ", ".join(f"'{one.name}' {['batch', *one.shape]}".replace("'batch'", "batch") for one in inputs.values())
    pixels = profile.input_type == "uint8" and profile.quantization != "int8"
    if not takes_images(model) and (profile.channels or profile.mean or profile.std or pixels):
        raise InputError(
            f"The profile '{profile.name}' is for one image [batch, height, width, channels]; the model "
            f"'{model.name}' takes {taken}. Use reference, phone_cpu, phone_gpu or npu, which take any inputs."
        )
    if profile.operators == "micro" and len(inputs) + len(heads) > 2:
        raise InputError(
            f"The profile '{profile.name}' is for one input and one output; the model '{model.name}' takes {taken} and "
            f"gives {', '.join(heads)}. Use npu, which takes any number of both."
        )
    if profile.output and len(heads) > 1:
        raise InputError(
            f"The profile '{profile.name}' is for one output of {profile.output}; the model '{model.name}' gives "
            f"{', '.join(heads)}. Export one of them, keras.Model(model.input, <that output>), or use phone_cpu."
        )
    for name, head in heads.items():
        if profile.output and profile.channels and head.positions:
            raise InputError(
                f"The profile '{profile.name}' is for one row of {profile.output} for an image; the output '{name}' of "
                f"the model '{model.name}' is {['batch', *head.shape]}. Use phone_cpu or phone_gpu.".replace(
                    "'batch'", "batch"
                )
            )


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
    check_suits(model, profile, {})
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
    return keras.Model(image, _named(model, model(scaled)), name=model.name)


def with_channels_and_softmax(model: keras.Model, profile: Profile, heads: Mapping[str, Head]) -> keras.Model:
    """The model with the profile's number of input channels, and with a softmax if the profile wants probabilities.

    `heads`: what its outputs mean. Logits of independent labels get a sigmoid, never a softmax. Raises `InputError`
    where the model cannot give what the profile wants.
    """
    check_suits(model, profile, heads)
    if not takes_images(model) and not profile.output:
        return model
    head = next(iter(heads.values()))
    kind = head.kind
    expected_kind = profile.output or kind
    channels = image_shape(model)[-1] if takes_images(model) else None
    expected_channels = profile.channels or channels
    if expected_kind == "logits" and kind == "probabilities":
        raise InputError(
            f"The profile '{profile.name}' wants logits, but the model '{model.name}' ends in a "
            f"{'softmax' if head.exclusive else 'sigmoid'}. Remove its last activation, or use a profile with "
            "output 'probabilities'."
        )
    if expected_kind != kind and head.meaning == NUMBERS:
        exclusive_kind(
            head,
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
    inputs = list(inputs_of(model).values())
    if channels is None:
        x = image = (
            keras.Input(inputs[0].shape, dtype=inputs[0].dtype, name="input")
            if len(inputs) == 1
            else {one.name: keras.Input(one.shape, dtype=one.dtype, name=one.name) for one in inputs}
        )
    else:
        x = image = keras.Input((*image_shape(model)[:2], expected_channels), name="image")
    if expected_channels != channels:
        gray = layers.Conv2D(1, 1, use_bias=False, trainable=False, name="grey")  # the name is in exported files
        x = gray(x)
        gray.set_weights([np.asarray(GRAY, np.float32).reshape(1, 1, 3, 1)])
    outputs = _named(model, model(in_structure(model, x) if isinstance(x, dict) else x))
    if expected_kind != kind:
        softmax = layers.Softmax(name="softmax") if head.exclusive else layers.Activation("sigmoid")
        if isinstance(outputs, dict) and kind in outputs and head.exclusive:
            others = {name: output for name, output in outputs.items() if name != kind}
            outputs = {expected_kind: softmax(outputs[kind]), **others}
        else:
            outputs = softmax(next(iter(outputs.values())) if isinstance(outputs, dict) else outputs)
    return keras.Model(image, outputs, name=model.name)


def heads_in_file(heads: Mapping[str, Head], profile: Profile) -> dict[str, Head]:
    """What the outputs mean after `with_channels_and_softmax`: one output may be of another kind than the model's."""
    if not profile.output or len(heads) > 1:
        return dict(heads)
    ((name, head),) = heads.items()
    name = profile.output if name in MAIN_OUTPUTS else name
    return {name: dataclasses.replace(head, kind=profile.output)}


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
