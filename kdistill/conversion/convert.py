"""From a Keras model to the bytes of a `.tflite` file. Checks, metadata and writing are in `export`."""

import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill.conversion import worker
from kdistill.conversion.refusals import crashed, refused
from kdistill.conversion.tflite_converter import CALIBRATION, Job, Refusal
from kdistill.conversion.tflite_converter import convert as convert_here
from kdistill.errors import InputError
from kdistill.networks.signatures import head_of, image_shape
from kdistill.recipe import Profile
from kdistill.tflite.interpreter import first_line, quiet


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
        InputError: The converter refuses the model, or crashes on it (it quantizes activations in a process of its
            own). The message names the operator and its layer where possible, and the way out.
    """
    output = head_of(model).name
    raw = profile.input_type == "uint8" and profile.quantization != "int8"  # int8 files quantize the input instead
    image = tf.TensorSpec([profile.batch, *image_shape(model)], tf.uint8 if raw else tf.float32, name="image")

    def serve(image):
        outputs = model(tf.cast(image, tf.float32) if raw else image, training=False)
        return outputs if isinstance(outputs, dict) else {output: outputs}

    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # from TensorFlow, about its own interpreter, which calibrates
        job = Job(folder, profile.quantization, profile.input_type, profile.output_type, profile.batch or 1)
        if profile.quantization == "int8":
            worker.start()  # while the model is traced here
        try:
            archive = keras.export.ExportArchive()
            archive.track(model)
            archive.add_endpoint("serving_default", serve, input_signature=[image])
            archive.write_out(folder, verbose=False)
        except OSError:  # such as a full disk: not the fault of the model
            raise
        except Exception as error:  # a user's layer may raise anything
            raise refused(model, profile, Refusal([], first_line(error)[:300])) from error
        if profile.quantization == "int8":
            np.save(Path(folder, CALIBRATION), calibration)
        content = from_saved_model(job, model, profile)
    return _int4(content) if profile.quantization == "int4" else content


def from_saved_model(job: Job, model, profile: Profile) -> bytes:
    """The bytes for a SavedModel. Only int8 can crash (see `docs/export.md`), and is converted in another process.

    `model` and `profile` are those that a refusal names. Raises `InputError`.
    """
    try:
        return worker.convert(job) if profile.quantization == "int8" else convert_here(job)
    except Refusal as refusal:
        raise refused(model, profile, refusal) from refusal
    except worker.Crash as crash:
        raise crashed(model, profile, job, crash) from None


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
