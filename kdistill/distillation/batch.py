"""The data of a training step: labels, weights and targets as every kind of data set gives them, and their counts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from kdistill.distillation.step_loss import is_labeled
from kdistill.errors import InputError


class Batch(NamedTuple):
    """The data of a step and its counts: `count` and `labeled` on this replica, `share` over all of them."""

    inputs: object
    labels: tf.Tensor  # without labels: -1, "unlabeled"
    weights: tf.Tensor  # [batch], ones without sample weights
    targets: object  # what the student learns from besides labels: the teacher's outputs; no gradient flows into them
    count: tf.Tensor  # the examples, without padding
    labeled: tf.Tensor  # the examples with a label
    share: tf.Tensor  # labeled examples of all examples, over all replicas
    has_labels: bool = True  # whether the data contains labels at all


def as_tensors(data):
    """The data of a step with tensors in place of arrays, which `train_on_batch` passes on where it runs eagerly."""
    return tf.nest.map_structure(lambda part: tf.constant(part) if isinstance(part, np.ndarray) else part, data)


def split_targets(targets) -> tuple:
    """Labels, and the teacher's logits or None, of targets that may be `{"labels": ..., "teacher_logits": ...}`."""
    if isinstance(targets, (list, tuple)):
        if len(targets) != 1:
            raise InputError(f"The student has one output; expected one array of labels, received {len(targets)}.")
        return targets[0], None
    if not isinstance(targets, dict):
        return targets, None
    if targets.keys() != {"labels", "teacher_logits"}:
        raise InputError(
            f"A dict of targets expects the keys 'labels' and 'teacher_logits', received {', '.join(targets)}."
        )
    return targets["labels"], targets["teacher_logits"]


def example_weights(weights, labels) -> tf.Tensor:
    examples = tf.shape(labels)[:1]
    return tf.ones(examples) if weights is None else tf.reshape(tf.cast(weights, tf.float32), examples)


def is_real(labels, weights) -> tf.Tensor:
    """1 for every example, 0 for padding, which has neither a label nor a weight, `[batch]`."""
    return tf.maximum(is_labeled(labels), tf.cast(weights != 0, tf.float32))


@dataclass(frozen=True)
class ClassWeights:
    """`class_weight` of `fit` as a table: `weights[i]` is that of the class `lowest + i`; classes outside have 1."""

    lowest: int
    weights: tuple[float, ...]

    @classmethod
    def of(cls, class_weight: Mapping[int, float] | None) -> "ClassWeights | None":
        """The table of Keras's dict {class: weight}. Raises `InputError` for anything else."""
        if class_weight is None:
            return None
        right = isinstance(class_weight, Mapping) and class_weight
        for label, weight in class_weight.items() if right else ():
            right = right and isinstance(label, Integral) and isinstance(weight, Real) and 0 <= weight < math.inf
        if not right:
            raise InputError(
                f"class_weight expects a dict from classes to weights, such as {{0: 1.0, 1: 2.5}}, received "
                f"{class_weight!r}."
            )
        lowest, highest = min(class_weight), max(class_weight)
        table = (float(class_weight.get(label, 1.0)) for label in range(lowest, highest + 1))
        return cls(int(lowest), tuple(table))

    def of_labels(self, labels: tf.Tensor) -> tf.Tensor:
        """The weight of each example, float32 `[batch]`; of a distribution that of its largest entry, as in Keras."""
        if labels.shape.rank == 2 and labels.shape[-1] != 1:
            classes = tf.argmax(labels, axis=-1, output_type=tf.int32)
        else:
            classes = tf.reshape(labels, [-1])
            classes = tf.cast(tf.round(classes) if classes.dtype.is_floating else classes, tf.int32)
        index = classes - self.lowest
        inside = (index >= 0) & (index < len(self.weights))
        weights = tf.gather(tf.constant(self.weights, tf.float32), tf.where(inside, index, tf.zeros_like(index)))
        return tf.where(inside, weights, tf.ones_like(weights))
