"""What a user passes to `Distiller`, `compile` and `fit`, checked before anything trains.

The checks of the models themselves (teacher, student, order, shared layers) are in `pairing`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real

import keras
import numpy as np
import tensorflow as tf

from kdistill.distillation.batch import by_output
from kdistill.errors import InputError, unknown

LOGGED = ("accuracy", "mae")
LAYER_ARGUMENTS = ("name", "dtype", "trainable", "autocast", "activity_regularizer")  # of every keras.Model
# Arguments of keras.distillation.Distiller and of the Distiller in the examples of keras.io, and what replaces them.
OF_OTHER_DISTILLERS = {
    "distillation_losses": "Leave it out: the KL with T^2 is the default. For other losses pass terms={...}",
    "distillation_loss_weights": "Pass terms={name: kdistill.Term(loss, weight)}",
    "student_loss_weight": "Pass distillation_weight=1 - student_loss_weight",
    "alpha": "Pass distillation_weight=1 - alpha to the constructor",
    "temperature": "Pass temperature=... to the constructor",
    "student_loss_fn": "Pass it to compile as loss=...",
    "distillation_loss_fn": "Leave it out: the KL with T^2 is the default. For other losses pass terms={'kd': ...}",
}
IN_DATA = re.compile(r"label value of (-?\d+) which is outside the valid range of \[0, (\d+)\)")
ASSERTED = re.compile(r"The loss \S+ returns one number for the whole batch, but .*?\[batch\]\.", re.DOTALL)


def check_names(method: str, names: Iterable[str], available: Iterable[str]) -> None:
    """Raises `InputError` for an argument that `method` does not have; it names what other distillers' become."""
    for name in names:
        if name in OF_OTHER_DISTILLERS:
            raise InputError(
                f"{method} has no argument '{name}', which is one of another distiller. {OF_OTHER_DISTILLERS[name]}. "
                "The order is Distiller(student, teacher)."
            )
        if name not in available:
            raise unknown(f"argument of {method}", name, available)


def only(argument: str, value, output_names: Iterable[str] = ()):
    """The one value of an argument of `compile` that Keras also takes as a list or dict with one entry per output.

    Raises `InputError` for more than one entry, and for the name of an output that the student does not have.
    """
    if not isinstance(value, (list, tuple, dict)):
        return value
    if len(value) != 1:
        raise InputError(
            f"{argument} expects one entry, because the student has one output; received {len(value)}: {value!r}."
        )
    if isinstance(value, dict):
        name = next(iter(value))
        if output_names and name not in output_names:
            raise unknown("output", name, output_names, f"Fix {argument}, or pass the value without a dict.")
        return value[name]
    return value[0]


def for_outputs(argument: str, value, outputs: Sequence[str], output_names: Iterable[str]) -> dict:
    """The value of an argument of `compile` for each output (an empty name for the only one), None where it has none.

    Several outputs take a dict by name or a list in their order, and one loss for all of them.
    """
    if tuple(outputs) == ("",):
        return {"": only(argument, value, output_names)}
    if argument == "loss" and not isinstance(value, (list, tuple, dict)):
        return dict.fromkeys(outputs, value)
    return by_output(value, outputs, argument)


def loss_weight(value) -> float | None:
    """`loss_weights` as one factor of the loss on labels; None without it."""
    if value is None:
        return None
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= value < np.inf:
        return float(value)
    raise InputError(f"loss_weights expects a number, 0 or more, received {value!r}.")


def own_metrics(metrics, output_names: Iterable[str], own: Iterable[str], outputs: Sequence[str] = ("",)):
    """The `metrics` of `compile`, without those that are logged in any case.

    Args:
        output_names: of the student, as Keras has them; `outputs`: those with a head, an empty name for the only one.
        own: what is logged.

    Raises `InputError` for a metric with a name that is logged already; `accuracy` and `mae` may be replaced.
    """
    if isinstance(metrics, dict) and tuple(outputs) == ("",):
        metrics = only("metrics", metrics, output_names)
    if isinstance(metrics, (str, keras.metrics.Metric)) or callable(metrics):
        metrics = [metrics]
    for metric in keras.tree.flatten(metrics):
        name = metric if isinstance(metric, str) else getattr(metric, "name", getattr(metric, "__name__", None))
        if name in own and name not in LOGGED:
            raise InputError(
                f"metrics has a metric named '{name}', which is logged already. Give the metric another name=."
            )
    if isinstance(metrics, dict):
        return {name: _without_logged(values) for name, values in metrics.items()}
    return _without_logged(metrics) or None


def _without_logged(metrics):
    """Metrics without the names of `LOGGED`: these have the values that Keras would give."""
    if isinstance(metrics, (list, tuple)):
        return [_without_logged(metric) for metric in metrics if metric not in LOGGED]
    return [] if metrics in LOGGED else metrics


def check_labels(targets, classes: int | None, argument: str = "y") -> None:
    """Raises `InputError` for labels in memory that are neither classes nor distributions of this number of classes.

    Args:
        targets: what `fit` receives: labels, `{"labels": ..., ...}`, or None.
        classes: the student's classes; None if its graph does not state them.
    """
    if isinstance(targets, Mapping):
        targets = targets.get("labels")
    if isinstance(targets, (list, tuple)) and len(targets) == 1:
        targets = targets[0]
    if targets is None or isinstance(targets, (list, tuple, tf.RaggedTensor, tf.SparseTensor)):
        return
    labels = np.asarray(targets)
    if labels.dtype.kind in "OSU":
        raise InputError(
            f"{argument} expects numbers, received {labels.dtype} such as {labels.ravel()[:1].tolist()}. "
            "Number the classes from 0: np.unique(y, return_inverse=True)[1]."
        )
    if labels.ndim == 2 and labels.shape[1] != 1:
        if classes is not None and labels.shape[1] != classes:
            raise other_width(labels.shape[1], classes, argument)
    elif labels.ndim in (1, 2) and labels.size and labels.dtype.kind in "iuf":
        if labels.dtype.kind == "f" and not (labels == np.floor(labels)).all():
            wrong = labels[labels != np.floor(labels)].ravel()[0]
            raise InputError(f"{argument} expects classes, which are whole numbers from 0; received {wrong:g}.")
        if classes is not None and labels.max() >= classes:
            raise _out_of_range(f"{labels.min():g} to {labels.max():g}", classes, argument)


def other_width(received: int, classes: int, argument: str = "labels") -> InputError:
    """The error for distributions that have another number of classes than the student."""
    return InputError(
        f"{argument} expects distributions [batch, {classes}], one number for each class of the student; received "
        f"[batch, {received}]. Give the student {received} outputs, or pass classes [batch] or one-hot labels of "
        f"{classes} classes."
    )


def _out_of_range(received: str, classes: int, argument: str) -> InputError:
    return InputError(
        f"{argument} has the classes {received}, but the student has {classes} outputs: expected 0 to {classes - 1} "
        "(below 0: no label). Number the classes from 0, or give the student one output for each class."
    )


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turns what TensorFlow raises in the middle of a step for labels that do not fit into one `InputError`."""
    try:
        yield
    except tf.errors.InvalidArgumentError as error:
        text = str(error)
        outside, asserted = IN_DATA.search(text), ASSERTED.search(text)
        if outside:
            raise _out_of_range(outside[1], int(outside[2]), "The data") from error
        if asserted:
            raise InputError(asserted[0]) from error
        raise


def set_directions(callbacks, names: Mapping[str, str]) -> None:
    """Sets `mode` of callbacks that monitor one of `names` ("max" or "min") and leave the mode to Keras.

    Keras infers a direction only for metrics that were passed to `compile`.
    """
    callbacks = getattr(callbacks, "callbacks", callbacks) or ()
    for callback in callbacks if isinstance(callbacks, (list, tuple)) else (callbacks,):
        monitor = getattr(callback, "monitor", None)
        if getattr(callback, "mode", None) == "auto" and isinstance(monitor, str):
            callback.mode = names.get(monitor.removeprefix("val_"), "auto")
