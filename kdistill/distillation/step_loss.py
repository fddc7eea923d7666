"""The loss of a training step: labels, KL, terms and their weights, for `Distiller` and for fine-tuning in compression.

Everything here is `[batch]`, one float32 value for each example. Whoever trains takes the mean.
"""

from collections.abc import Callable, Mapping

import tensorflow as tf

from kdistill.distillation import losses
from kdistill.distillation.terms import term_loss
from kdistill.errors import InputError
from kdistill.recipe import Term


def step_loss(
    hard: tf.Tensor,
    student_logits: tf.Tensor,
    teacher_logits: tf.Tensor,
    labels: tf.Tensor,
    settings: Mapping[str, tf.Tensor],
    terms: Mapping[str, Term],
    features: Mapping[str, tuple[tf.Tensor, tf.Tensor]] | None = None,
    kd: Callable = losses.kl_logits,
) -> tuple[tf.Tensor, dict[str, tf.Tensor]]:
    """The loss of each example, `(1 - w) * hard + w * kd + sum of weight * term`, and its unweighted parts by name.

    Args:
        hard: the loss on labels, `[batch]`.
        student_logits, teacher_logits: `[batch, classes]`.
        labels: classes `[batch]` or distributions `[batch, classes]`, for the terms that use labels.
        settings: the numbers of this step, named as in `Distiller.settings`: `distillation_weight`, `temperature` (for
            the KL), `<term>.weight`, and each `<term>.<option>` that replaces the number in the term.
        terms: the terms by name. A term `kd` replaces the KL.
        features: the pair (student, teacher) for each term that compares layers. Outputs with positions have more rows
            than these have examples: the loss of an example counts for each of its positions.
        kd: the loss between student and teacher, with a temperature unless it is `losses.squared_error`.

    Raises:
        InputError: a term received shapes that its loss cannot compare.
    """
    parts = {"hard": hard}
    if "kd" not in terms:
        softened = () if kd is losses.squared_error else (settings["temperature"],)
        parts["kd"] = kd(student_logits, teacher_logits, *softened)
    for name, term in terms.items():
        student, teacher = (features or {}).get(name, (student_logits, teacher_logits))
        options = {option: settings.get(f"{name}.{option}", value) for option, value in term.options.items()}
        try:
            parts[name] = _for_rows(term_loss(term, student, teacher, labels, options), hard, name in (features or {}))
        except InputError as error:
            raise InputError(f"The term '{name}': {error} Fix distill.terms.{name}.") from error
    weight = settings["distillation_weight"]
    total = (1.0 - weight) * hard + weight * parts["kd"]
    for name in terms:
        if name != "kd":
            total += settings[f"{name}.weight"] * parts[name]
    return total, parts


def _for_rows(loss: tf.Tensor, hard: tf.Tensor, is_of_examples: bool) -> tf.Tensor:
    if not is_of_examples or (loss.shape.is_compatible_with(hard.shape) and None not in (*loss.shape, *hard.shape)):
        return loss
    positions = tf.shape(hard)[0] // tf.maximum(tf.shape(loss)[0], 1)
    return tf.repeat(loss, positions)


def are_classes(labels: tf.Tensor) -> bool:
    """Whether labels are classes, `[batch]` or `[batch, 1]`, and not distributions `[batch, classes]`."""
    return len(labels.shape) == 1 or labels.shape[-1] == 1


def is_labeled(labels: tf.Tensor) -> tf.Tensor:
    """1 for an example with a label, 0 for one whose class is below 0 ("unlabeled"), `[batch]`."""
    if not are_classes(labels):
        return tf.ones(tf.shape(labels)[:1])
    return tf.reshape(tf.cast(tf.cast(labels, tf.float32) >= 0, tf.float32), [-1])


def is_right(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    """1 where the predicted class is the label's, else 0, `[batch]`."""
    classes = tf.reshape(labels, [-1]) if are_classes(labels) else tf.argmax(labels, axis=-1)
    return tf.cast(tf.cast(classes, tf.int64) == tf.argmax(logits, axis=-1), tf.float32)
