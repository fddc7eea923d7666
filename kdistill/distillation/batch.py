"""The data of a training step: labels, weights and targets as every kind of data set gives them, and their counts.

Counts are over all replicas, because the loss is divided by the global batch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from kdistill.errors import InputError, unknown


class Given(NamedTuple):
    """The data of a step as it comes, by the name of the student's output (empty for the only one)."""

    inputs: object
    labels: dict  # each `[batch, ...]`, or None: no labels
    weights: dict  # each `[batch, ...]`, or None
    targets: dict  # what the student learns from besides labels: the teacher's outputs; no gradient flows into them


class Batch(NamedTuple):
    """The rows of one output and their counts: `count` and `labeled` on this replica, `share` over all of them.

    A row is an example, or a position of one.
    """

    inputs: object
    labels: tf.Tensor  # of the rows; without labels: missing ones
    weights: tf.Tensor  # [rows], ones without sample weights
    targets: object  # the teacher's outputs, its taps, or None
    is_labeled: tf.Tensor  # [rows], 1 for a row with a label
    is_real: tf.Tensor  # [rows], 0 for padding, which has neither a label nor a weight
    count: tf.Tensor  # the rows, without padding
    labeled: tf.Tensor  # the rows with a label
    share: tf.Tensor  # labeled rows of all rows, over all replicas
    given: tf.Tensor  # the labels as they came
    has_labels: bool = True  # whether the data contains labels at all


def as_tensors(data):
    """The data of a step with tensors in place of arrays, which `train_on_batch` passes on where it runs eagerly."""
    return tf.nest.map_structure(lambda part: tf.constant(part) if isinstance(part, np.ndarray) else part, data)


def split_targets(targets, outputs: Sequence[str] = ("",)) -> tuple[dict, object]:
    """Labels by the name of the output, each or None, and the teacher's logits or None.

    `targets` may be `{"labels": ..., "teacher_logits": ...}`. With several `outputs` the labels are a dict by name, or
    a list in their order. Raises `InputError` for other names, and another number.
    """
    teacher_logits = None
    if isinstance(targets, dict) and "teacher_logits" in targets:
        if targets.keys() != {"labels", "teacher_logits"}:
            raise _other_keys(targets)
        targets, teacher_logits = targets["labels"], targets["teacher_logits"]
    elif isinstance(targets, dict) and tuple(outputs) == ("",):
        raise _other_keys(targets)
    return by_output(targets, outputs, "labels"), teacher_logits


def _other_keys(targets: dict) -> InputError:
    return InputError(
        f"A dict of targets expects the keys 'labels' and 'teacher_logits', received {', '.join(targets)}."
    )


def by_output(values, outputs: Sequence[str], subject: str) -> dict:
    """Values of a step by the name of the student's output; a name that is missing has None.

    `subject` names the values in the message of the `InputError` for other names, and another number.
    """
    if tuple(outputs) == ("",):
        if isinstance(values, (list, tuple)):
            if len(values) != 1:
                raise InputError(
                    f"The student has one output; expected one array of {subject}, received {len(values)}."
                )
            values = values[0]
        return {"": values}
    if values is None:
        return dict.fromkeys(outputs)
    names = ", ".join(outputs)
    if isinstance(values, dict):
        for name in values:
            if name not in outputs:
                raise unknown("output", name, outputs, f"Fix the {subject}, a dict by the names of the outputs.")
        return {name: values.get(name) for name in outputs}
    if isinstance(values, (list, tuple)) and len(values) == len(outputs):
        return dict(zip(outputs, values, strict=True))
    received = f"{len(values)}" if isinstance(values, (list, tuple)) else "one"
    raise InputError(
        f"The student has the outputs {names}; expected {subject} for each, a dict by name or a list in this order; "
        f"received {received}."
    )


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


def several_workers(strategy: tf.distribute.Strategy | None = None) -> bool:
    """Whether several processes train together, in a strategy or the current one."""
    return isinstance(strategy or tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)


def replica_count() -> int:
    """The number of replicas of the current strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    """The sum of a value of each replica, on every one of them; called inside of a step."""
    if replica_count() == 1:
        return value
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def check_distributed(steps_per_execution: int, jit_compile, metrics) -> None:
    """Raises `InputError` for settings of `compile` that do not work on several replicas."""
    if steps_per_execution != 1 or jit_compile is True:
        raise InputError(
            "On several replicas TensorFlow crashes with steps_per_execution above 1 or jit_compile=True. "
            f"Leave out steps_per_execution={steps_per_execution}, jit_compile={jit_compile}."
        )
    if metrics:
        raise InputError(
            "On several replicas a Distiller logs its own metrics only (loss, hard, kd, accuracy, agreement). "
            "Leave metrics= and weighted_metrics= out of compile()."
        )


def unless_overflow(gradients: list, optimizer) -> list:
    """The gradients, or NaN on every replica if they overflowed on any.

    LossScaleOptimizer checks the gradients of one replica only, under MirroredStrategy those of the first. It would
    add an overflow on another replica to all weights.
    """
    if replica_count() == 1 or not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return gradients
    finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients if g is not None])
    overflows = sum_over_replicas(1.0 - tf.cast(finite, tf.float32))
    factor = tf.where(overflows > 0, float("nan"), 1.0)
    return [None if g is None else g * tf.cast(factor, g.dtype) for g in gradients]
