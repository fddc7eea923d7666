"""A quantization-aware trained tf_keras network -> its int8 `.tflite`, which must run and be worth the training."""

import warnings
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill.compression.finetune import Batches
from kdistill.conversion.convert import convert, from_saved_model
from kdistill.conversion.tflite_converter import Job
from kdistill.distillation.step_loss import is_labeled, is_right
from kdistill.errors import FileRefused, InputError
from kdistill.evaluation import chance
from kdistill.evaluation.evaluate import predict
from kdistill.files import temporary_folder
from kdistill.recipe import Profile
from kdistill.tflite.interpreter import TRIAL_SECONDS, predict_isolated, quiet, run_isolated

# What a quantized file may lose: against its float32 model, and by quantization-aware training against int8 after
# training.
QUANTIZED = Profile("compressed", quantization="int8", max_drop=0.005, min_agreement=0.98)
INT8 = Profile("int8", quantization="int8")
CALIBRATION_IMAGES = 500
EXAMPLES, BYTES = 2000, 1 << 29  # on which files are compared, at most
SECONDS = 3600  # for these


def convert_quantized(network, output: str) -> bytes:
    """The bytes of the file: `image` float32 in, `output` float32 out, int8 in between, builtin operators only.

    It needs no calibration images: the ranges are those of the training. Raises `InputError` for a network that the
    converter refuses, or crashes on, in a process of its own.
    """
    spec = tf.TensorSpec([None, *network.input_shape[1:]], tf.float32, name="image")
    serve = tf.function(lambda image: {output: network(image, training=False)}, input_signature=[spec])
    module = tf.Module()
    module.network_variables = network.variables  # not the network: tf_keras would trace every layer once more
    with temporary_folder() as folder, warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        tf.saved_model.save(module, folder, signatures={"serving_default": serve.get_concrete_function()})
        return from_saved_model(Job(folder, "trained"), network, Profile("quantization-aware training", "int8"))


def check_runs(content: bytes) -> None:
    """Runs a file on one and on two images of noise, in a process of its own. Raises `InputError` if that fails."""
    with temporary_folder() as folder:
        run_isolated("interpreter", _written(content, folder), TRIAL_SECONDS)


def first_images(batches: Batches, count: int) -> np.ndarray:
    """The first images of the first epoch."""
    images, received = [], 0
    for batch, _ in batches.of_epoch(0):
        images.append(batch.numpy())
        received += len(images[-1])
        if received >= count:
            break
    return np.concatenate(images)[:count]


def compare_with_int8(
    content: bytes, before: keras.Model, batches: Batches, say: Callable[[str], None]
) -> tuple[FileRefused | None, str]:
    """Whether quantization-aware training has made a file worse than int8 after training would have.

    Both files are compared on labeled examples: of validation, or else of training. int8 after training is only made if
    the file is less accurate than the model before.

    Args:
        content: the file.
        before: the model before quantization-aware training.
        batches: the examples.
        say: receives a line with the accuracy.

    Returns:
        The refusal, if the file loses more than `QUANTIZED` and chance allow; and a note, or "".

    Raises:
        InputError: the file does not run.
    """
    kind = "training" if batches.validation is None else "validation"
    images, labels = _labeled_examples(batches)
    if images is None:
        return None, "No example has a label: the file was not compared with int8 after training."
    right, right_before = (_right(labels, outputs) for outputs in (_outputs(content, images), predict(before, images)))
    accuracy, accuracy_before = float(np.mean(right)), float(np.mean(right_before))
    say(f"{accuracy:.2%} of {len(images):,} {kind} images right in int8, {accuracy_before:.2%} before in float32")
    if accuracy >= accuracy_before:
        return None, ""
    try:
        after_training = convert(before, INT8, first_images(batches, CALIBRATION_IMAGES))
        right_int8 = _right(labels, _outputs(after_training, images))
    except InputError as error:
        return None, f"The file was not compared with int8 after training: {error}"
    lost, gained = int(np.sum(right_int8 & ~right)), int(np.sum(right & ~right_int8))
    drop, limit = (lost - gained) / len(images), QUANTIZED.max_drop
    if drop <= limit + 1e-9:
        return None, ""
    p_value = chance.drop_p_value(lost, gained, len(images), limit)
    figures = (
        f"Quantization-aware training gives a file with {accuracy:.2%} of {len(images):,} {kind} images right, int8 "
        f"after training one with {np.mean(right_int8):.2%} ({accuracy_before:.2%} in float32; limit: {100 * limit:g} "
        f"points, p = {p_value:.2g})."
    )
    if p_value > chance.LEVEL:
        return None, f"{figures} Chance allows this difference."
    check = {"accuracy": accuracy, "int8_accuracy": float(np.mean(right_int8)), "model_accuracy": accuracy_before}
    check |= {"drop": drop, "lost": lost, "gained": gained, "p_drop": p_value, "images": len(images), "max_drop": limit}
    advice = (
        "Use the scheme 'int8', or train with a lower learning_rate, with more epochs or examples, or with a teacher."
    )
    return FileRefused(figures, advice, check, len(content)), ""


def _written(content: bytes, folder: str) -> Path:
    path = Path(folder, "student.tflite")
    path.write_bytes(content)
    return path


def _outputs(content: bytes, images: np.ndarray) -> np.ndarray:
    with temporary_folder() as folder:
        return predict_isolated(_written(content, folder), images, SECONDS)


def _labeled_examples(batches: Batches) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Images and labels of the first examples that have a label; None where there are none."""
    all_images, all_labels, count, size = [], [], 0, 0
    for images, labels in batches.of_epoch(0) if batches.validation is None else batches.validation:
        labeled = is_labeled(labels).numpy() > 0
        all_images.append(images.numpy()[labeled])
        all_labels.append(labels.numpy()[labeled])
        count, size = count + int(labeled.sum()), size + all_images[-1].nbytes
        if count >= EXAMPLES or size >= BYTES:
            break
    if not count:
        return None, None
    return np.concatenate(all_images)[:EXAMPLES], np.concatenate(all_labels)[:EXAMPLES]


def _right(labels: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    return is_right(tf.constant(labels), outputs).numpy() > 0
