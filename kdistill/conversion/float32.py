"""A student as it can be converted: checked, and rebuilt in float32 if it computes in another precision."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion.graph import with_channel
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.networks import copying
from kdistill.networks.heads import Head
from kdistill.networks.keras_internals import layers_of
from kdistill.networks.precision import check_not_quantized, dtype_policy
from kdistill.networks.saving import load_model
from kdistill.networks.signatures import head_of, image_shape, main_output, noise_images, numpy_outputs


@dataclass(frozen=True)
class Prepared:
    """A student that is ready for every profile. `prepare` makes it once; the conversion then hands it on."""

    model: keras.Model  # float32, one image in, finite weights
    precision: str | None  # in which the student itself computes
    image_shape: tuple[int, int, int]  # height, width, channels
    head: Head  # what its output means, and the number of classes
    weights_sha256: str  # of `model`


def prepare(student: keras.Model | str | Path) -> Prepared:
    """Checks a student (a model, a `Supervised` trainer of one, or a `.keras` file) and gives it in float32.

    A model trained in mixed precision is rebuilt in float32 with the same weights: its own conversion would need
    operators that phones do not have. Raises `InputError` for a model that cannot be exported, and `CheckFailed` if the
    rebuilt model computes something else.
    """
    model = load_model(student) if isinstance(student, (str, Path)) else student
    if isinstance(model, Supervised):
        model = model.student
    if not isinstance(model, keras.Model):
        raise InputError(f"export expects a keras.Model or the path of a .keras file, received {model!r}.")
    shape = image_shape(model)
    check_not_quantized(model, allowed=("int4",))  # the converter takes no other mode
    _check_finite(model)
    plain = with_channel(model if _is_float32(model) else _in_float32(model))
    precision = getattr(model, "compute_dtype", None)
    return Prepared(plain, precision, shape, head_of(plain), _weights_sha256(plain))


def _check_finite(model: keras.Model) -> None:
    for weight in model.weights:
        values = keras.ops.convert_to_numpy(weight)
        if np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
            raise InputError(
                f"The weights '{weight.path}' are not finite (NaN or infinite): the training diverged. Train again, "
                "for example with a smaller learning rate."
            )


def _precision(model: keras.Model) -> str:
    """The other precisions in which a model computes, in words."""
    return ", ".join(sorted({layer.compute_dtype for layer in [model, *layers_of(model)]} - {"float32", None}))


def _is_float32(model: keras.layers.Layer) -> bool:
    policies = [layer.dtype_policy for layer in [model, *layers_of(model)]]
    return {dtype for p in policies for dtype in (p.compute_dtype, p.variable_dtype)} <= {"float32", None}


def _in_float32(model: keras.Model) -> keras.Model:
    try:
        # The global policy is for the layers that a subclassed model creates itself.
        with dtype_policy("float32"), copying.own_classes(model):
            rebuilt = type(model).from_config(_float32_config(model.get_config()))
            copying.build(rebuilt, model)
            copying.copy_weights(model, rebuilt, compare=False)  # which `_check_same` does, with another tolerance
        if not _is_float32(rebuilt):
            fixed = ", ".join(f"'{layer.name}'" for layer in layers_of(rebuilt) if not _is_float32(layer))
            raise InputError(f"the dtype of its layers {fixed} is fixed.")
    except Exception as error:  # a user's own layers may raise anything
        raise InputError(
            f"The model '{model.name}' computes in {_precision(model)} and cannot be rebuilt in float32: "
            f"{copying.cause_of(model, error)} Or build it under the policy 'float32' and load the weights into it."
        ) from error
    _check_same(model, rebuilt)
    return rebuilt


def _check_same(model: keras.Model, rebuilt: keras.Model) -> None:
    images = noise_images(model)
    before, after = (main_output(numpy_outputs(which, images), model.name) for which in (model, rebuilt))
    difference, spread = np.max(abs(before - after)), max(1.0, np.max(abs(after)))
    if not difference <= 0.1 * spread:  # bfloat16 has 2 to 3 digits
        raise CheckFailed(
            f"The model '{model.name}', rebuilt in float32, differs by {difference:.3g} from itself in "
            f"{_precision(model)} (its outputs go up to {spread:.3g}): "
            f"{copying.difference(model, rebuilt, images, tolerance=0.1)} Or train it in float32."
        )


def _float32_config(value, key: str = ""):
    """A model's config with every dtype policy replaced by float32."""
    if isinstance(value, dict):
        if value.get("class_name") in ("DTypePolicy", "DTypePolicyMap"):
            return "float32"
        return {name: _float32_config(item, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_float32_config(item, key) for item in value)
    if key == "dtype" and value in ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"):
        return "float32"
    return value


def _weights_sha256(model: keras.Model) -> str:
    """A hash of all weights, in their order, with their shapes."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(repr((weight.shape, weight.dtype.str)).encode())
        digest.update(np.ascontiguousarray(weight))
    return digest.hexdigest()
