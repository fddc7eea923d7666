"""Keras model -> the bytes of a `.tflite` file. What is around it (checks, names, writing) is in `export`."""

import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill import files
from kdistill.deploy import image_shape, kind_of, main_output
from kdistill.errors import CheckFailed, InputError
from kdistill.litert import quiet
from kdistill.recipe import Profile
from kdistill.supervised import Supervised


def load_model(path: str | Path) -> keras.Model:
    """The model in a `.keras` file, loaded in safe mode: no code from the file is run."""
    files.checked(path, (".keras",))
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises many kinds for a file that is damaged, unsafe or from another program
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"'{path}' cannot be loaded: it is damaged, no .keras file, or needs code that is not imported ({reason})."
        ) from error


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
    policies = [layer.dtype_policy for layer in model._flatten_layers(include_self=True)]
    if all((p.compute_dtype or "float32", p.variable_dtype or "float32") == ("float32",) * 2 for p in policies):
        return model
    return _in_float32(model)


def output_of(model: keras.Model) -> tuple[str, int]:
    """`logits` or `probabilities`, whichever the model gives, and the number of classes; tried on noise.

    A model with several outputs gives a dict, in which one is named so; its name is believed.
    """
    outputs = _run(model, _noise(model))
    main = main_output(outputs, model.name)
    if not isinstance(main, np.ndarray) or main.ndim != 2:
        shape = getattr(main, "shape", type(main).__name__)
        raise InputError(
            f"The model '{model.name}' gives {shape}; export expects one output [batch, classes], or a dict with one "
            "such, named 'logits' or 'probabilities'. Wrap it: keras.Model(model.input, <the output to export>)."
        )
    if isinstance(outputs, dict):
        return next(name for name in outputs if outputs[name] is main), main.shape[1]
    return kind_of(main), main.shape[1]


def convert(model: keras.Model, profile: Profile, calibration: np.ndarray | None = None) -> bytes:
    """The bytes of a `.tflite` file with builtin operators only; the same bytes each time.

    `model` is one that `ready` returned. `calibration`: raw pixels `[n, h, w, c]`, for int8. The one signature is
    `serving_default`: `image` -> `logits` or `probabilities`, and the model's further outputs under their names.
    """
    name, _ = output_of(model)
    raw = profile.input_type == "uint8" and profile.quantization != "int8"  # int8 files quantise the input instead
    image = tf.TensorSpec([profile.batch, *image_shape(model)], tf.uint8 if raw else tf.float32, name="image")

    def serve(image):
        outputs = model(tf.cast(image, tf.float32) if raw else image, training=False)
        return outputs if isinstance(outputs, dict) else {name: outputs}

    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # TensorFlow's about its own interpreter, with which it calibrates
        try:
            archive = keras.export.ExportArchive()
            archive.track(model)
            archive.add_endpoint("serving_default", serve, input_signature=[image])
            archive.write_out(folder, verbose=False)
            content = _converter(folder, profile, calibration).convert()
        except OSError:  # the disk is full, say: not the model's fault
            raise
        except Exception as error:  # the converter has no public kind of error; a user's layer may raise any
            raise InputError(_reason(model, profile, error)) from error
    return int4(content) if profile.quantization == "int4" else content


def int4(content: bytes) -> bytes:
    """A float32 file with int4 weights per channel, by `litert-quantizer`, an optional package."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from litert_quantizer import quantizer, recipe
    except ImportError as error:
        raise InputError(
            f'int4 needs the package litert-quantizer ({error}). Install it: pip install "kdistill[int4]"'
        ) from None
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = quantizer.Quantizer(content, recipe.dynamic_wi4_afp32()).quantize(
            enable_progress_bar=False, enable_progress_report=False
        )
    return bytes(made.quantized_model)


def _converter(folder: str, profile: Profile, calibration: np.ndarray | None) -> tf.lite.TFLiteConverter:
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if profile.quantization not in ("none", "int4"):  # int4 is made of the float32 file
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if profile.quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif profile.quantization == "dynamic":
        # Scales per channel of dense layers are read by runtimes from 2.17 on only; per tensor from 2.4 on.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    elif profile.quantization == "int8":
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = lambda: _batches(calibration, profile.batch or 1)
        converter.inference_input_type = tf.as_dtype(profile.input_type)
        converter.inference_output_type = tf.as_dtype(profile.output_type)
    return converter


def _batches(images: np.ndarray, size: int):
    """The images in batches; the last one is filled up from the first images."""
    for start in range(0, len(images), size):
        places = np.arange(start, start + size) % len(images)
        yield {"image": images[places].astype(np.float32)}


def _reason(model: keras.Model, profile: Profile, error: Exception) -> str:
    """Which operator of which layer, where the converter tells it."""
    names, found = layer_names(model), {}
    for part in getattr(error, "errors", ()):
        if part.operator.name:
            calls = part.location.call
            layer = layer_of(calls[0].name.partition("@")[0] if calls else "", names)
            found[f"'{part.operator.name.removeprefix('tf.')}'" + (f" of layer '{layer}'" if layer else "")] = None
    if found:
        return (
            f"The model '{model.name}' cannot be exported for '{profile.name}': LiteRT has no builtin operator for "
            f"{', '.join(found)}, and phones have only those. Use another layer or function there."
        )
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return f"The model '{model.name}' cannot be converted for '{profile.name}': {text}"


def layer_names(model: keras.Model) -> set[str]:
    """The names of the layers that hold no other layers."""
    layers = model._flatten_layers(include_self=False)
    return {layer.name for layer in layers if not any(layer._flatten_layers(include_self=False))}


def layer_of(tensor: str, names: set[str]) -> str | None:
    """The layer that a tensor's name speaks of, such as `conv1` for `net_1/conv1_1/convolution`."""
    for part in tensor.replace(";", "/").split("/"):
        head, _, tail = part.rpartition("_")
        if tail.isdigit() and head in names:  # the number that tracing the layer once more has given it
            return head
        if part in names:
            return part
    return None


def _is_float32(model: keras.Model) -> bool:
    policies = [layer.dtype_policy for layer in model._flatten_layers(include_self=True)]
    return {kind for p in policies for kind in (p.compute_dtype, p.variable_dtype)} <= {"float32", None}


def _in_float32(model: keras.Model) -> keras.Model:
    own = {type(layer).__name__: type(layer) for layer in model._flatten_layers(include_self=True)}
    own = {name: kind for name, kind in own.items() if not kind.__module__.startswith("keras.")}
    policy = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("float32")  # of the layers that a subclassed model makes for itself
        with keras.saving.custom_object_scope(own):
            rebuilt = type(model).from_config(_float32_config(model.get_config()))
        rebuilt(_noise(model))  # builds a subclassed model
        rebuilt.set_weights([np.asarray(weight, np.float32) for weight in model.get_weights()])
        if not _is_float32(rebuilt):
            raise InputError("some of its layers fix another type.")
    except Exception as error:  # whatever a user's own layers may raise
        raise InputError(
            f"The model '{model.name}' computes in {model.compute_dtype} and cannot be rebuilt in float32: {error} "
            "Give its layers get_config(), or build it under the policy 'float32' and load the weights into it."
        ) from error
    finally:
        keras.config.set_dtype_policy(policy)
    images = _noise(model)
    before, after = (main_output(_run(each, images), model.name) for each in (model, rebuilt))
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


def _noise(model: keras.Model) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, *image_shape(model))).astype(np.float32)


def _run(model: keras.Model, images: np.ndarray):
    try:
        outputs = model(images, training=False)
    except Exception as error:  # whatever a user's own layers may raise
        raise InputError(f"The model '{model.name}' does not run on images {images.shape}: {error}") from error
    if isinstance(outputs, dict):
        return {name: np.asarray(each, np.float32) for name, each in outputs.items()}
    return np.asarray(outputs, np.float32) if tf.is_tensor(outputs) else outputs
