"""A term: its loss by name, its limits and projector, and a recipe's schedules as Keras schedules over steps."""

import dataclasses
import inspect
import math
from collections.abc import Callable

import keras
import tensorflow as tf

from kdistill.distillation import feature_losses, losses
from kdistill.errors import InputError
from kdistill.recipe import Schedule, Term
from kdistill.recipe.objective import FEATURE_LOSSES, LOGIT_LOSSES

LOSSES: dict[str, Callable] = {
    **{name: getattr(losses, name) for name in LOGIT_LOSSES},
    **{name: getattr(feature_losses, name) for name in FEATURE_LOSSES},
}
# Of two numbers, a z-score and a correlation over classes keep only which is larger: there is no gradient.
MORE_THAN_TWO_CLASSES = ("standardized_kl", "dist")


def term_loss(
    term: Term, student: tf.Tensor, teacher: tf.Tensor, labels=None, options: dict | None = None
) -> tf.Tensor:
    """The loss of a term without its weight, float32 `[batch]`.

    Args:
        term: the term; its `loss` is a name of `LOSSES` or a function.
        student, teacher: logits `[batch, classes]`, or features `[batch, ...]` (the student's after the projector).
        labels: passed to a loss that has a parameter `labels`.
        options: replace the options of the term.

    Raises:
        InputError: the loss cannot compare these shapes, or does not return `[batch]`.
    """
    loss = LOSSES[term.loss] if isinstance(term.loss, str) else term.loss
    if term.loss in MORE_THAN_TWO_CLASSES and student.shape[-1] == 2:
        raise InputError(f"{term.loss} learns nothing from 2 classes. Use kl_logits, dkd or mse_logits.")
    arguments = dict(term.options if options is None else options)
    if "labels" in _parameters(loss):
        arguments["labels"] = labels
    result = tf.convert_to_tensor(loss(student, teacher, **arguments))
    if result.shape.rank != 1:
        raise InputError(f"A loss returns one number for each example, [batch]; received the shape {result.shape}.")
    return tf.cast(result, tf.float32)


def _parameters(loss: Callable) -> set[str]:
    try:
        return set(inspect.signature(loss).parameters)
    except (TypeError, ValueError):  # a built-in
        return set()


def in_steps(value, steps: int):
    """A recipe's `Schedule` as a Keras schedule over a training of `steps` steps; any other value unchanged."""
    if not isinstance(value, Schedule):
        return value
    return OverSteps(value.start, value.end, value.begin * steps, value.finish * steps, value.shape)


def term_in_steps(term: Term, steps: int) -> Term:
    """The term with its schedules over steps."""
    options = {name: in_steps(value, steps) for name, value in term.options.items()}
    return dataclasses.replace(term, weight=in_steps(term.weight, steps), options=options)


@keras.saving.register_keras_serializable(package="kdistill")
class OverSteps(keras.optimizers.schedules.LearningRateSchedule):
    """From `start` to `end` between the steps `begin` and `finish`: linear, cosine (slow at both ends), or a step."""

    def __init__(self, start: float, end: float, begin: float, finish: float, shape: str = "linear"):
        super().__init__()
        self.start, self.end, self.begin, self.finish, self.shape = start, end, begin, finish, shape

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        if self.shape == "step":
            return tf.where(step < self.begin, self.start, self.end)
        progress = tf.clip_by_value((step - self.begin) / (self.finish - self.begin), 0.0, 1.0)
        if self.shape == "cosine":
            progress = (1.0 - tf.cos(math.pi * progress)) / 2.0
        return self.start + (self.end - self.start) * progress

    def get_config(self):
        return {name: getattr(self, name) for name in ("start", "end", "begin", "finish", "shape")}


def limits(term: Term | None, option: str) -> tuple[float, float, str]:
    """The lowest and highest number of a setting, and both in words."""
    largest = 3.4e38  # float32's, and above it infinity
    if option == "distillation_weight":
        return 0.0, 1.0, "a number from 0 to 1"
    if option == "temperature":
        return math.ulp(0.0), largest, "a number above 0"
    if option == "weight" or isinstance(term.loss, str):
        return 0.0, largest, "a number, 0 or more,"
    return -largest, largest, "a finite number"


def projector_layer(name: str, kind: str, student: tuple, teacher: tuple, policy) -> keras.layers.Layer:
    """The layer that projects the student's channels to the teacher's; shapes are `(batch, ..., channels)`."""
    path = f"distill.terms.{name}.projector"
    if kind == "conv1x1" and (len(student), len(teacher)) != (4, 4):
        raise InputError(
            f"{path}: conv1x1 needs features [batch, height, width, channels] of both models, received {student} and "
            f"{teacher}. Use dense, or other taps."
        )
    if teacher[-1] is None or student[-1] is None:
        raise InputError(f"{path}: the number of channels of {student} or {teacher} is undefined. Pass a Keras layer.")
    if kind == "conv1x1":
        return keras.layers.Conv2D(teacher[-1], 1, dtype=policy, name=f"{name}_projector")
    return keras.layers.Dense(teacher[-1], dtype=policy, name=f"{name}_projector")
