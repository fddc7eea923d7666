"""A model as it can be converted: checked, and rebuilt in float32 where it computes in another precision."""

import keras
import numpy as np

from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.networks.heads import image_shape, main_output, noise_images, outputs_on
from kdistill.networks.keras_internals import layers_of
from kdistill.networks.precision import dtype_policy


def ready(model: keras.Model) -> keras.Model:
    """The model as it can be converted: one image in, one row of numbers out, finite weights, float32.

    A model trained in mixed precision is rebuilt in float32 with the same weights; its own conversion would need
    operators that phones do not have. Raises `InputError`, or `CheckFailed` if the rebuilt model computes otherwise.
    """
    if isinstance(model, Supervised):
        model = model.student
    if not isinstance(model, keras.Model):
        raise InputError(f"export expects a keras.Model or the path of a .keras file, received {model!r}.")
    image_shape(model)
    for weight in model.weights:
        values = keras.ops.convert_to_numpy(weight)
        if np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
            raise InputError(
                f"The weights '{weight.path}' are not finite (NaN or infinite). The training diverged: train again."
            )
    policies = [layer.dtype_policy for layer in [model, *layers_of(model)]]
    if all((p.compute_dtype or "float32", p.variable_dtype or "float32") == ("float32",) * 2 for p in policies):
        return model
    return _in_float32(model)


def _is_float32(model: keras.Model) -> bool:
    policies = [layer.dtype_policy for layer in [model, *layers_of(model)]]
    return {kind for p in policies for kind in (p.compute_dtype, p.variable_dtype)} <= {"float32", None}


def _in_float32(model: keras.Model) -> keras.Model:
    own = {type(layer).__name__: type(layer) for layer in [model, *layers_of(model)]}
    own = {name: kind for name, kind in own.items() if not kind.__module__.startswith("keras.")}
    try:
        # A subclassed model creates its own layers, which take the global policy.
        with dtype_policy("float32"), keras.saving.custom_object_scope(own):
            rebuilt = type(model).from_config(_float32_config(model.get_config()))
            rebuilt(noise_images(model))  # builds a subclassed model
        rebuilt.set_weights([np.asarray(weight, np.float32) for weight in model.get_weights()])
        if not _is_float32(rebuilt):
            raise InputError("some of its layers fix another type.")
    except Exception as error:  # whatever a user's own layers may raise
        raise InputError(
            f"The model '{model.name}' computes in {model.compute_dtype} and cannot be rebuilt in float32: {error} "
            "Give its layers get_config(), or build it under the policy 'float32' and load the weights into it."
        ) from error
    images = noise_images(model)
    before, after = (main_output(outputs_on(each, images), model.name) for each in (model, rebuilt))
    difference, spread = np.max(abs(before - after)), max(1.0, np.max(abs(after)))
    if not difference <= 0.1 * spread:  # bfloat16 keeps 2 to 3 digits
        raise CheckFailed(
            f"The model '{model.name}', rebuilt in float32, differs by {difference:.3g} from itself in "
            f"{model.compute_dtype} (its outputs go up to {spread:.3g}). Train it in float32."
        )
    return rebuilt


def _float32_config(value, key: str = ""):
    """A model's config with every dtype policy replaced by float32."""
    if isinstance(value, dict):
        if value.get("class_name") in ("DTypePolicy", "DTypePolicyMap"):
            return "float32"
        return {name: _float32_config(each, name) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_float32_config(each, key) for each in value)
    if key == "dtype" and value in ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"):
        return "float32"
    return value
