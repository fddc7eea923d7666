"""Keras model -> the bytes of a `.tflite` file. What is around it (checks, names, writing) is in `export`."""

import tempfile
import warnings

import keras
import numpy as np
import tensorflow as tf

from kdistill.conversion.graph import layer_names, layer_of
from kdistill.errors import InputError
from kdistill.networks.heads import image_shape, output_of
from kdistill.recipe import Profile
from kdistill.tflite.interpreter import quiet


def convert(model: keras.Model, profile: Profile, calibration: np.ndarray | None = None) -> bytes:
    """The bytes of a `.tflite` file with builtin operators only; the same bytes each time.

    `model` is one that `ready` returned. `calibration`: raw pixels `[n, h, w, c]`, for int8. The one signature is
    `serving_default`: `image` -> `logits` or `probabilities`, and the model's further outputs under their names.
    """
    name, _ = output_of(model)
    raw = profile.input_type == "uint8" and profile.quantization != "int8"  # int8 files quantize the input instead
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
