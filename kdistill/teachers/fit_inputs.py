"""The first look at the inputs of `fit`: a warning if the student or a teacher gets them in the wrong range.

Arrays are looked at before anything trains, a `tf.data.Dataset` when it gives its first batch: it is not iterated a
second time, which would change the order of what it shuffles. Generators and a `PyDataset` are not looked at.
"""

import contextlib
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf

from kdistill.networks.signatures import main_output
from kdistill.teachers.adapted import Adapted, inference_outputs
from kdistill.teachers.gain import little_above_chance
from kdistill.teachers.input_range import RAW, find, look_into, other_scales

EXAMPLES = 128  # of the data
FEWEST = 8  # examples that tell anything
Look = Callable[[np.ndarray, np.ndarray | None], None]  # inputs and classes, or None


def look_once(model, given: dict) -> None:
    """Lets the first `fit` of a `Supervised` look at its data, the arguments `given`; on several replicas it does not.

    `model.check_inputs = False` turns this off. A Distiller's `look_at_teacher` gets the examples, too.
    """
    if getattr(model, "check_inputs", True) and model.distribute_strategy.num_replicas_in_sync == 1:
        teacher = getattr(model, "look_at_teacher", None)
        given["x"] = looked_at(given.get("x"), given.get("y"), model.student, teacher)
    model.check_inputs = False


def looked_at(x, y, student: keras.Model, teacher: Look | None = None):
    """The data `x` of `fit`. Warns of its first examples, for a data set when these are read.

    `teacher`: called with the same examples, see `warn_of_teacher`.
    """

    def look(inputs: np.ndarray, labels: np.ndarray | None) -> None:
        warn_of_student(student, inputs, labels)
        if teacher is not None:
            teacher(inputs, labels)

    if isinstance(x, tf.data.Dataset):
        return _watched(x, look)
    if isinstance(x, np.ndarray) or tf.is_tensor(x):
        look(*first_examples(x, y.get("labels") if isinstance(y, dict) else y))
    return x


def first_examples(x, y=None) -> tuple[np.ndarray, np.ndarray | None]:
    """Up to 128 inputs of arrays, evenly spaced, as arrays may be sorted by class; and their labels, or None."""
    places = np.linspace(0, len(x) - 1, min(len(x), EXAMPLES)).round().astype(int)
    inputs, labels = (
        np.asarray(tf.gather(array, places) if tf.is_tensor(array) else array[places])
        if isinstance(array, np.ndarray) or tf.is_tensor(array) or hasattr(array, "select")
        else None
        for array in (x, y)
    )
    return inputs, labels if labels is None or len(labels) == len(places) else None


def _watched(dataset: tf.data.Dataset, look: Look) -> tf.data.Dataset:
    looks = []

    def first_batch(*tensors):
        if not looks:  # once, not in every epoch
            looks.append(True)
            look(*(tensor.numpy() for tensor in tensors), *([None] if len(tensors) == 1 else []))
        return 0

    def pass_on(position, data):
        inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
        labels = targets.get("labels") if isinstance(targets, dict) else targets
        if not isinstance(inputs, tf.Tensor):  # several inputs, or rows of different lengths
            return data
        tensors = [tensor[:EXAMPLES] for tensor in (inputs, labels) if isinstance(tensor, tf.Tensor)]
        seen = tf.cond(position == 0, lambda: tf.py_function(first_batch, tensors, tf.int32), lambda: 0)
        with tf.control_dependencies([seen]):
            return tf.nest.map_structure(tf.identity, data, expand_composites=True)

    return dataset.enumerate().map(pass_on)


def warn_of_student(student: keras.Model, inputs: np.ndarray, labels: np.ndarray | None) -> None:
    """Warns if the student gets inputs in the wrong range; one that already classifies them gets the right ones."""
    if not _are_images(inputs):
        return
    text = None
    with contextlib.suppress(Exception):  # of a user's layers: training shows it
        finding = look_into(student, inputs, f"the student '{student.name}'") if student.built else None
        if finding and (finding.measured or not _classifies(student, inputs, _classes(labels))):
            scaling = f"keras.layers.Rescaling({finding.scale.factor})"
            effect = (
                f"At usual learning rates such a network overflows or predicts one class only. Put {scaling} before it"
                if finding.scale in RAW
                else f"Pass {finding.scale.words}, or remove its own scaling"
            )
            text = f"{finding.sentence} {effect}."
    _warn(text)


def warn_of_teacher(teacher, inputs: np.ndarray, labels: np.ndarray | None) -> None:
    """Warns for each teacher (as for a `Distiller`) that gets inputs in another range than in its own training."""
    if not _are_images(inputs):
        return
    for item in teacher if isinstance(teacher, (list, tuple)) else [teacher]:
        text = None
        with contextlib.suppress(Exception):
            text = _teacher_text(item, inputs, _classes(labels))
        _warn(text)


def _teacher_text(teacher, inputs: np.ndarray, labels: np.ndarray | None) -> str | None:
    if isinstance(teacher, Adapted):
        inputs, teacher = np.asarray(teacher.prepare(tf.constant(inputs))), teacher.teacher
    name = getattr(teacher, "name", None) or getattr(teacher, "__name__", type(teacher).__name__)
    if labels is not None:
        inputs, labels = inputs[labels >= 0], labels[labels >= 0]
    model = teacher if isinstance(teacher, keras.Model) else None
    finding = find(inputs, f"the teacher '{name}'", model, lambda x: _scores(teacher, x), labels)
    if finding is None:
        return None
    return f"{finding.sentence} Put kdistill.Adapted(teacher, {finding.scale.arguments}) in its place."


def _scores(model, inputs: np.ndarray) -> np.ndarray:
    outputs = inference_outputs(model, tf.constant(inputs, tf.float32))
    return np.asarray(main_output(outputs, getattr(model, "name", "teacher")))


def _classifies(student: keras.Model, inputs: np.ndarray, labels: np.ndarray | None) -> bool:
    if labels is None:
        return False
    scores, known = _scores(student, inputs), labels >= 0
    accuracy = float((scores.argmax(axis=-1) == labels)[known].mean())
    return accuracy > little_above_chance(scores.shape[-1])


def _classes(labels: np.ndarray | None) -> np.ndarray | None:
    """The labels as classes `[n]`; None if they are something else, or none of them is known."""
    if labels is None:
        return None
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.ndim == 2 and np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all():
        labels = labels.argmax(axis=1)
    whole = labels.ndim == 1 and labels.dtype.kind in "uif" and (labels == np.round(labels)).all()
    return labels.astype(int) if whole and (labels >= 0).any() else None


def _are_images(inputs: np.ndarray) -> bool:
    """Whether these are images, or rows of their pixels; other features have ranges of their own."""
    if (
        len(inputs) < FEWEST
        or inputs.dtype.kind not in "uif"
        or not np.isfinite(inputs).all()
        or not other_scales(inputs)
    ):
        return False
    rows_of_pixels = inputs.ndim == 2 and inputs.shape[1] >= 64 and inputs.max() <= 255
    return inputs.ndim >= 3 or rows_of_pixels


def _warn(text: str | None) -> None:
    if text:
        warnings.warn(text, UserWarning, stacklevel=5)
