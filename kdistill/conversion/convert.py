"""From a Keras model to the bytes of a `.tflite` file. Checks, metadata and writing are in `export`."""

import dataclasses
import warnings
from collections.abc import Mapping

import keras
import numpy as np
import tensorflow as tf

from kdistill.conversion import worker
from kdistill.conversion.refusals import crashed, refused
from kdistill.conversion.tflite_converter import USUAL, Job, Refusal, Tuning, calibration_file
from kdistill.conversion.tflite_converter import convert as convert_here
from kdistill.errors import InputError
from kdistill.files import temporary_folder
from kdistill.networks.heads import Head
from kdistill.networks.signatures import (
    heads_of,
    image_shape,
    in_structure,
    inputs_of,
    outputs_by_name,
    takes_images,
)
from kdistill.recipe import Profile
from kdistill.tflite.float_kernels import with_float_kernels
from kdistill.tflite.interpreter import first_line, quiet


def convert(
    model: keras.Model,
    profile: Profile,
    calibration=None,
    heads: Mapping[str, Head] | None = None,
    tuning: Tuning = USUAL,
) -> bytes:
    """The bytes of a `.tflite` file, with builtin operators only. Equal models give equal bytes.

    Args:
        model: A float32 model, such as `float32.prepare(student).model`.
        profile: The profile; its quantization, types and batch size are used here.
        calibration: For int8: raw pixels `[n, height, width, channels]`, or arrays by the names of the inputs.
        heads: What its outputs mean, see `heads_of`. Default: what the model tells.
        tuning: How int8 is made.

    Returns:
        The bytes. The signature is `serving_default`. A single image is called `image`, a single other input `input`,
        several have their own names. A single output has the name of its head, such as `logits`; several have theirs.

    Raises:
        InputError: The converter refuses the model, or crashes on it (it quantizes activations in a process of its
            own). The message names the operator and its layer where possible, and the way out.
    """
    heads = heads_of(model, strict=False) if heads is None else heads
    if takes_images(model):
        raw = profile.input_type == "uint8" and profile.quantization != "int8"  # int8 files quantize the input instead
        spec = tf.TensorSpec([profile.batch, *image_shape(model)], tf.uint8 if raw else tf.float32, name="image")
        names = ("image",)

        def serve(image):
            return _named(model(tf.cast(image, tf.float32) if raw else image, training=False), model, heads)
    else:
        spec = {
            name: tf.TensorSpec([profile.batch, *one.shape], one.dtype, name=name)
            for name, one in inputs_of(model).items()
        }
        names = tuple(spec)

        def serve(inputs):
            return _named(model(in_structure(model, inputs), training=False), model, heads)

    with temporary_folder() as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")  # from TensorFlow, about its own interpreter, which calibrates
        types = profile.quantization, profile.input_type, profile.output_type
        job = Job(folder, *types, profile.batch or 1, names, tuning)
        if profile.quantization == "int8":
            worker.start()  # while the model is traced here
        try:
            archive = keras.export.ExportArchive()
            archive.track(model)
            archive.add_endpoint("serving_default", serve, input_signature=[spec])
            archive.write_out(folder, verbose=False)
        except OSError:  # such as a full disk: not the fault of the model
            raise
        except Exception as error:  # a user's layer may raise anything
            raise refused(model, profile, Refusal([], first_line(error)[:300])) from error
        if profile.quantization == "int8":
            for place, name in enumerate(names):
                part = calibration[name] if isinstance(calibration, Mapping) else calibration
                np.save(calibration_file(folder, place), part)
        content = from_saved_model(job, model, profile)
    if profile.quantization == "dynamic" and tuning.float_tensors:
        reference = convert(model, dataclasses.replace(profile, quantization="none"), heads=heads)
        content = with_float_kernels(content, reference, tuning.float_tensors)
    return _int4(content) if profile.quantization == "int4" else content


def _named(outputs, model: keras.Model, heads: Mapping[str, Head]) -> dict:
    """The outputs of a file by name."""
    by_name = outputs_by_name(model, outputs)
    if len(by_name) > 1:
        return by_name
    return {next(iter(heads.values())).name: next(iter(by_name.values()))}


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
