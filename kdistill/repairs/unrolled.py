"""Recurrent layers without their loop, which TFLite's quantizer cannot quantize."""

import dataclasses

from kdistill.conversion.float32 import Prepared, prepare
from kdistill.conversion.refusals import recurrent_layers
from kdistill.errors import InputError
from kdistill.networks import copying
from kdistill.networks.precision import dtype_policy


def unrolled(student: Prepared) -> Prepared:
    """The student whose recurrent layers compute their time steps one by one, with the same weights.

    Raises `InputError` for a model that cannot be rebuilt, or computes something else then.
    """
    model = student.model
    names = ", ".join(f"'{name}'" for name in recurrent_layers(model))
    try:
        with dtype_policy("float32"), copying.own_classes(model):
            rebuilt = type(model).from_config(_unrolled_config(model.get_config()))
            copying.build(rebuilt, model)
    except Exception as error:  # a user's own layers may raise anything
        raise InputError(
            f"The model '{model.name}' cannot be rebuilt with unroll=True in {names}: {copying.cause_of(model, error)}"
        ) from error
    copying.copy_weights(model, rebuilt)
    left = recurrent_layers(rebuilt)
    if left:
        raise InputError(f"The layers {', '.join(map(repr, left))} of '{model.name}' have no unroll=True.")
    again = prepare(rebuilt, student.meanings)
    return dataclasses.replace(again, heads=student.heads, precision=student.precision, text=student.text)


def _unrolled_config(value):
    """A model's config with every `unroll` on."""
    if isinstance(value, dict):
        return {name: True if name == "unroll" else _unrolled_config(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_unrolled_config(item) for item in value)
    return value
