"""Whether student and teacher fit together: order, number of classes, inputs, and that no layer belongs to both."""

import functools
import inspect
import warnings
from collections.abc import Iterator

import keras
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.networks.keras_internals import layers_of
from kdistill.networks.signatures import class_count
from kdistill.recipe import Term
from kdistill.recipe.objective import teacher_taps
from kdistill.teachers.adapted import Adapted

PREDICTS = ("predict", "predict_on_batch", "predict_step")  # methods of keras.Model that do not run inside of a step
LARGER = 1.5  # a student that has this many times its teacher's weights is probably the teacher
MOST_LAYERS = 5  # names of shared layers in a message


def check_pair(student: keras.Model, teacher) -> None:
    """Raises `InputError` for a teacher, or a list of them, that cannot teach this student; nothing is run."""
    for item in teacher if isinstance(teacher, (list, tuple)) else [teacher]:
        model = item.teacher if isinstance(item, Adapted) else item
        _check_method(model)
        if model is student:
            raise InputError("teacher and student are the same model. Give the student a network of its own.")
        if isinstance(model, keras.Model):
            expected, received = class_count(student), class_count(model)
            if expected is not None and received is not None and expected != received:
                raise other_classes(expected, received)
            _check_inputs(student, model, item)
    check_shared_layers(student, teacher)


def other_classes(student: int, teacher: int) -> InputError:
    """The error for models with different numbers of classes."""
    return InputError(
        f"The student has {student} classes, the teacher {teacher}. Give both models one output for each class, "
        "in the same order."
    )


def stored_features(stored, terms: dict[str, Term]) -> tuple[object, dict[str, tf.Tensor]]:
    """The logits among a teacher's outputs that come with the data, and by their taps the features that terms use.

    `stored` is logits, or a dict of `logits` and taps. Raises `InputError` if features are missing.
    """
    taps = [tap for tap in teacher_taps(terms) if tap != "logits"]
    outputs = stored if isinstance(stored, dict) else {"logits": stored}
    missing = [tap for tap in ("logits", *taps) if tap not in outputs]
    if missing:
        tapping = [name for name, term in terms.items() if term.teacher_tap in missing]
        subject = f"The terms {', '.join(tapping)} need" if tapping else "A Distiller needs"
        raise InputError(
            f"{subject} {', '.join(missing)} of the teacher, which the stored teacher_logits do not contain. Give "
            "them as well, {'logits': ..., '<teacher_tap>': ...}, or fit on labels alone, so that the teacher runs, or "
            "remove these terms."
        )
    return outputs["logits"], {tap: tf.cast(outputs[tap], tf.float32) for tap in taps}


def teacher_failed(error: Exception) -> InputError:
    """The error for a teacher that raises while the training step is traced."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    return InputError(
        f"The teacher failed in the training step: {': '.join([type(error).__name__, *lines[-1:]])}. It receives the "
        "student's inputs as tensors of TensorFlow. A function must consist of their operations: model(x, "
        "training=False), not model.predict(x), and no NumPy. The outputs of other code can be stored before: "
        'fit(x, {"labels": y, "teacher_logits": outputs}).'
    )


def warn_if_swapped(student: keras.Model, teacher) -> None:
    """Warns if the student is clearly larger than every teacher: other distillers take (teacher, student)."""
    teachers = [model for model in _models_in(teacher) if isinstance(model, keras.Model) and model.built]
    if not (teachers and student.built):
        return
    teacher_size, size = max(model.count_params() for model in teachers), student.count_params()
    if 0 < LARGER * teacher_size < size:  # one that runs in a process of its own has no weights here
        warnings.warn(
            f"The student '{student.name}' has {size:,} weights, its teacher {teacher_size:,}. Distiller "
            "takes (student, teacher), keras.distillation.Distiller takes (teacher, student): in the wrong order the "
            "large model is trained. Swap them if the student is the teacher.",
            UserWarning,
            stacklevel=3,
        )


def check_shared_layers(student: keras.layers.Layer, teacher) -> None:
    """Raises `InputError` if training `student` (or a Distiller) would change a layer that its teacher uses.

    A layer with `trainable=False` may belong to both: training does not change it.
    """
    shared = {id(weight) for model in _models_in(teacher) for weight in model.weights}
    owners = {}
    for layer in [student, *layers_of(student)]:  # from the outside in: the last owner of a weight is the nearest
        owners |= {id(weight): layer for weight in layer.weights if id(weight) in shared}
    names = list(dict.fromkeys(layer.name for layer in owners.values() if layer.trainable))
    if names:
        more = f" and {len(names) - MOST_LAYERS} more" if len(names) > MOST_LAYERS else ""
        layers = ", ".join(f"'{name}'" for name in names[:MOST_LAYERS])
        raise InputError(
            f"Student and teacher share the layer{'s' * (len(names) > 1)} {layers}{more}: training the student would "
            "change the teacher. Build the student on a copy, keras.models.clone_model(teacher) with "
            "set_weights(teacher.get_weights()), or freeze the layer: layer.trainable = False."
        )


def _check_method(teacher) -> None:
    owner = getattr(teacher, "__self__", None)
    if isinstance(owner, keras.Model) and teacher.__name__ in PREDICTS:
        raise InputError(
            f"The teacher is the method '{owner.name}.{teacher.__name__}', which returns NumPy arrays and cannot run "
            "inside of a training step. Pass the model itself, or lambda x: model(x, training=False)."
        )


def _check_inputs(student: keras.Model, model: keras.Model, teacher) -> None:
    """Compares the inputs' shapes, where both models state one: the teacher receives the student's inputs."""
    received, expected = _input_shape(student), _input_shape(model)
    if received is None or expected is None:
        return
    if isinstance(teacher, Adapted) and len(received) == 3:
        received = (*(teacher.size or received[:2]), teacher.channels or received[2])
    if len(received) == len(expected) + 1 and received[-1] == 1:  # Keras adds and removes a last axis of 1
        expected = (*expected, 1)
    if len(expected) == len(received) + 1 and expected[-1] == 1:
        received = (*received, 1)
    if len(expected) == len(received) and all(
        None in pair or pair[0] == pair[1] for pair in zip(expected, received, strict=True)
    ):
        return
    channels_fit = expected[-1] == received[-1] or {expected[-1], received[-1]} == {1, 3}
    if len(expected) == len(received) == 3 and channels_fit:
        size = f", size={expected[:2]}" * (expected[:2] != received[:2] and None not in expected[:2])
        channels = f", channels={expected[2]}" * (expected[2] != received[2])
        advice = f"Wrap the teacher: kdistill.Adapted(teacher{size}{channels})."
    else:
        advice = "Pass a function that changes them: lambda x: teacher(keras.ops.reshape(x, ...), training=False)."
    raise InputError(
        f"The teacher '{model.name}' takes inputs of the shape {expected}, but receives the student's, {received}. "
        f"{advice}"
    )


def _input_shape(model: keras.Model) -> tuple | None:
    """The shape of a model's one input without the batch; None for several inputs, and where it is not stated."""
    shape = getattr(model, "input_shape", None) if model.built else None
    single = isinstance(shape, tuple) and shape and not isinstance(shape[0], tuple)
    return tuple(shape[1:]) if single else None


def _models_in(teacher, depth: int = 3) -> Iterator[keras.layers.Layer]:
    """The Keras models and layers of a teacher: in lists and `Adapted`, and those that a function or object uses."""
    if isinstance(teacher, keras.layers.Layer):
        yield teacher
        return
    if isinstance(teacher, (list, tuple)):
        parts = teacher
    elif isinstance(teacher, dict):
        parts = teacher.values()
    elif inspect.isfunction(teacher):
        try:
            used = inspect.getclosurevars(teacher)
        except ValueError:  # a variable of the enclosing function that has no value yet
            return
        parts = [*used.nonlocals.values(), *used.globals.values()]
    elif inspect.ismodule(teacher) or inspect.isclass(teacher) or not callable(teacher):
        return
    elif isinstance(teacher, functools.partial):
        parts = [teacher.func, *teacher.args, *teacher.keywords.values()]
    else:  # a bound method, or an object with __call__
        parts = [getattr(teacher, "__self__", None), *getattr(teacher, "__dict__", {}).values()]
    for part in parts if depth else ():
        yield from _models_in(part, depth - 1)
