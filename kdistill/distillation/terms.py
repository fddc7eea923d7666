"""The loss of a term as one function, for the Distiller and for whatever else trains; schedules in steps."""

import dataclasses
import inspect
from collections.abc import Callable

import keras
import tensorflow as tf

from kdistill.distillation import feature_losses, losses
from kdistill.errors import InputError
from kdistill.recipe import Schedule, Term
from kdistill.recipe.objective import FEATURE_LOSSES, LOGIT_LOSSES

LOSSES: dict[str, Callable] = {
    name: next(getattr(module, name) for module in (losses, losses, feature_losses) if hasattr(module, name))
    for name in (*LOGIT_LOSSES, *FEATURE_LOSSES)
}
# Of two numbers, a z-score and a correlation over classes say only which is larger: there is no gradient.
MORE_THAN_TWO_CLASSES = ("standardized_kl", "dist")


def term_loss(
    term: Term, student: tf.Tensor, teacher: tf.Tensor, labels=None, options: dict | None = None
) -> tf.Tensor:
    """What the term's loss is, without its weight, `[batch]` in float32.

    `student` and `teacher` are logits, or, for a loss of features, what their taps give (the student's through the
    projector). `options` stand in place of the term's own. Raises `InputError` for shapes that the loss cannot compare.
    """
    loss = LOSSES[term.loss] if isinstance(term.loss, str) else term.loss
    if term.loss in MORE_THAN_TWO_CLASSES and student.shape[-1] == 2:
        raise InputError(f"{term.loss} learns nothing from 2 classes. Take kl_logits, dkd or mse_logits.")
    given = dict(term.options if options is None else options)
    if "labels" in _parameters(loss):
        given["labels"] = labels
    result = tf.convert_to_tensor(loss(student, teacher, **given))
    if result.shape.rank != 1:
        raise InputError(f"A loss gives one number for each example, [batch]; received the shape {result.shape}.")
    return tf.cast(result, tf.float32)


def _parameters(loss: Callable) -> set[str]:
    try:
        return set(inspect.signature(loss).parameters)
    except (TypeError, ValueError):  # a built-in
        return set()


def in_steps(value, steps: int):
    """A recipe's schedule as a Keras one for a training of so many steps; anything else as it is."""
    if not isinstance(value, Schedule):
        return value
    return OverSteps(value.start, value.end, value.begin * steps, value.finish * steps, value.shape)


def term_in_steps(term: Term, steps: int) -> Term:
    """The term with its schedules in steps."""
    options = {name: in_steps(each, steps) for name, each in term.options.items()}
    return dataclasses.replace(term, weight=in_steps(term.weight, steps), options=options)


@keras.saving.register_keras_serializable(package="kdistill")
class OverSteps(keras.optimizers.schedules.LearningRateSchedule):
    """From `start` to `end` between two steps: linear, cosine (slow at both ends), or a step at `begin`."""

    def __init__(self, start: float, end: float, begin: float, finish: float, shape: str = "linear"):
        super().__init__()
        self.start, self.end, self.begin, self.finish, self.shape = start, end, begin, finish, shape

    def __call__(self, step):
        step = tf.cast(step, tf.float32)
        if self.shape == "step":
            return tf.where(step < self.begin, self.start, self.end)
        done = tf.clip_by_value((step - self.begin) / (self.finish - self.begin), 0.0, 1.0)
        if self.shape == "cosine":
            done = (1.0 - tf.cos(3.141592653589793 * done)) / 2.0
        return self.start + (self.end - self.start) * done

    def get_config(self):
        return {name: getattr(self, name) for name in ("start", "end", "begin", "finish", "shape")}
