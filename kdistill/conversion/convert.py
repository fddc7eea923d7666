"""From a Keras model to the bytes of a `.tflite` file. Checks, metadata and writing are in `export`."""

import tempfile
import warnings

import keras
import numpy as np
import tensorflow as tf

from kdistill.conversion.graph import layer_names, layer_of
from kdistill.errors import InputError
from kdistill.networks.heads import head_of, image_shape
from kdistill.recipe import Profile
from kdistill.tflite.interpreter import quiet


def convert(model: keras.Model, profile: Profile, calibration: np.ndarray | None = None) -> bytes:
    """The bytes of a `.tflite` file, with builtin operators only. Equal models give equal bytes.

    Args:
        model: A float32 model, such as `float32.prepare(student).model`.
        profile: The profile; its quantization, types and batch size are used here.
        calibration: Raw pixels `[n, height, width, channels]`, for int8.

    Returns:
        The bytes. The signature is `serving_default`: `image` -> `logits` or `probabilities`, and further outputs of
        the model under their names.

    Raises:
        InputError: The converter refuses the model. The message names the operator and its layer where possible.
    """
    output = head_of(model).kind
    raw = profile.input_type == "uint8" and profile.quantization != "int8"  # int8 files quantize the input instead
    image = tf.TensorSpec([profile.batch, *image_shape(model)], tf.uint8 if raw else tf.float32, name="image")

    def serve(image):
        outputs = model(tf.cast(image, tf.float32) if raw else image, training=False)
        return outputs if isinstance(outputs, dict) else {output: outputs}

    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # from TensorFlow, about its own interpreter, which calibrates
        try:
            archive = keras.export.ExportArchive()
            archive.track(model)
            archive.add_endpoint("serving_default", serve, input_signature=[image])
            archive.write_out(folder, verbose=False)
            content = _converter(folder, profile, calibration).convert()
        except OSError:  # such as a full disk: not the fault of the model
            raise
        except Exception as error:  # the converter has no public error class; a user's layer may raise anything
            raise InputError(_reason(model, profile, error)) from error
    return _int4(content) if profile.quantization == "int4" else content


def _int4(content: bytes) -> bytes:
    """A float32 file with its weights in int4, a scale per channel. Needs the optional package `litert-quantizer`."""
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
        result = quantizer.Quantizer(content, recipe.dynamic_wi4_afp32()).quantize(
            enable_progress_bar=False, enable_progress_report=False
        )
    return bytes(result.quantized_model)


def _converter(folder: str, profile: Profile, calibration: np.ndarray | None) -> tf.lite.TFLiteConverter:
    converter = tf.lite.TFLiteConverter.from_saved_model(folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if profile.quantization not in ("none", "int4"):  # int4 starts from the float32 file
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if profile.quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif profile.quantization == "dynamic":
        # Dense layers with a scale per channel need runtimes from 2.17 on, per tensor from 2.4 on. There is no public
        # setting for this; `test_the_converter_has_its_private_setting` fails first when TensorFlow renames it.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    elif profile.quantization == "int8":
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.representative_dataset = lambda: _batches(calibration, profile.batch or 1)
        converter.inference_input_type = tf.as_dtype(profile.input_type)
        converter.inference_output_type = tf.as_dtype(profile.output_type)
    return converter


def _batches(images: np.ndarray, size: int):
    """The images in batches of this size. The last batch is filled with the first images."""
    for start in range(0, len(images), size):
        places = np.arange(start, start + size) % len(images)
        yield {"image": images[places].astype(np.float32)}


def _reason(model: keras.Model, profile: Profile, error: Exception) -> str:
    """The operators that LiteRT lacks, with their layers, where the converter states them; else its own message."""
    names, operators = layer_names(model), {}
    for part in getattr(error, "errors", ()):
        if part.operator.name:
            calls = part.location.call
            layer = layer_of(calls[0].name.partition("@")[0] if calls else "", names)
            operators[f"'{part.operator.name.removeprefix('tf.')}'" + (f" of layer '{layer}'" if layer else "")] = None
    if operators:
        return (
            f"The model '{model.name}' cannot be exported for '{profile.name}': LiteRT has no builtin operator for "
            f"{', '.join(operators)}. Replace that layer or function."
        )
    text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    return f"The model '{model.name}' cannot be converted for '{profile.name}': {text}"
