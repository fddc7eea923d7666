"""One output of a student in one step: its rows, the parts of its loss, and what is logged of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import tensorflow as tf

from kdistill.distillation.batch import Batch, ClassWeights, Given, sum_over_replicas
from kdistill.distillation.output_heads import OutputHead, as_rows
from kdistill.distillation.step_loss import are_classes
from kdistill.errors import InputError
from kdistill.networks.heads import CLASSES


class HeadStep(NamedTuple):
    """An output in a step. Losses are one float32 number for each row."""

    head: OutputHead
    batch: Batch
    outputs: tf.Tensor  # as the student gives them
    scores: tf.Tensor  # [rows, n]
    total: tf.Tensor  # [rows]
    parts: dict[str, tf.Tensor]  # each [rows]

    @property
    def named_parts(self) -> dict[str, tf.Tensor]:
        """The parts by their names in the logs."""
        return {self.head.named_part(name): part for name, part in self.parts.items()}


def rows_of(head: OutputHead, given: Given, outputs, class_weights: ClassWeights | None = None) -> Batch:
    """The rows of an output, once its shape is known. Raises `InputError` for labels or weights of other shapes."""
    labels, weights = given.labels[head.name], given.weights[head.name]
    has_labels = labels is not None
    if class_weights is not None and (weights is not None or not has_labels):
        raise InputError(
            f"class_weight expects labels without sample weights, received {'' if has_labels else 'no '}labels"
            f"{' with sample_weight' if weights is not None else ''}. Leave out one of them."
        )
    head.has_positions = outputs.shape.rank > 2
    if not has_labels:
        labels = head.missing(given.inputs, outputs)
    rows = head.label_rows(labels, outputs)
    if class_weights is not None:
        weights, counts = head.class_weights(class_weights, rows), None
    else:
        weights, counts = head.row_weights(weights, labels, outputs)
        rows = head.without_hidden(rows, counts)
    labeled = head.labeled(rows)
    real = tf.maximum(labeled, tf.cast(weights != 0, tf.float32))
    counted, with_label = tf.reduce_sum(real), tf.reduce_sum(labeled)
    share = tf.math.divide_no_nan(sum_over_replicas(with_label), sum_over_replicas(counted))
    targets = given.targets.get(head.name)
    return Batch(given.inputs, rows, weights, targets, labeled, real, counted, with_label, share, labels, has_labels)


def loss_of(steps: Sequence[HeadStep]) -> tf.Tensor:
    """This replica's part of the loss: the sum over the outputs of their means over the global batch."""
    return sum_of(
        tf.reduce_sum(step.total * step.batch.weights) / sum_over_replicas(step.batch.count) for step in steps
    )


def are_finite(steps: Sequence[HeadStep], names: Sequence[str]) -> tf.Tensor:
    """Whether the loss and each part of these names is finite on all replicas, bool `[1 + names]`."""
    parts = {name: part for step in steps for name, part in step.named_parts.items()}
    total = sum_of(tf.reduce_sum(step.total * step.batch.weights) for step in steps)
    sums = tf.stack([total, *(tf.reduce_sum(parts[name]) for name in names)])
    return tf.math.is_finite(sum_over_replicas(sums))


def log_sums(steps: Sequence[HeadStep], hits: Callable, penalty) -> dict[str, tuple[tf.Tensor, tf.Tensor]]:
    """What is logged: of each name the sum over rows, and their number.

    `hits` gives for a step the numbers of its rows that have a rate: of the labels first, then of the teacher.
    """
    sums, losses = {}, []
    for step in steps:
        head, batch = step.head, step.batch
        safe = tf.maximum(batch.count, 1.0)
        losses.append(tf.reduce_sum(step.total * batch.weights) / safe)
        for name, part in step.parts.items():
            value, rows = tf.reduce_sum(part * batch.weights) / safe, batch.count
            if name == "hard" and head.is_mean:
                # Scaled by the share over all replicas; this replica logs the mean over its own labels.
                value, rows = value * batch.share * safe / tf.maximum(batch.labeled, 1.0), batch.labeled
            sums[head.named_part(name)] = value * rows, rows
        for position, (name, values) in enumerate(hits(step).items()):
            mask = batch.is_real if position else batch.is_labeled
            sums[head.named(name)] = tf.reduce_sum(values * mask), tf.reduce_sum(mask)
    rows = steps[0].batch.count
    return {"loss": ((sum_of(losses) + penalty) * rows, rows), **sums}


def compiled_values(steps: Sequence[HeadStep]) -> tuple:
    """Labels, outputs and weights for the metrics of `compile`: the rows with all their labels."""
    labels, outputs, weights = {}, {}, {}
    for step in steps:
        head, batch = step.head, step.batch
        values = batch.labels, as_rows(step.outputs) if head.has_positions else step.outputs, batch.weights
        if head.meaning != CLASSES or are_classes(batch.labels) or head.has_positions:
            kept = batch.is_labeled > 0
            if head.meaning != CLASSES:
                kept = tf.reduce_all(head.present(batch.labels), axis=-1)
            values = (tf.boolean_mask(value, kept) for value in values)
        labels[head.name], outputs[head.name], weights[head.name] = values
    return (labels[""], outputs[""], weights[""]) if "" in labels else (labels, outputs, weights)


def sum_of(values) -> tf.Tensor:
    """The sum of tensors; of one the tensor itself, bit by bit."""
    first, *others = values
    return tf.add_n([first, *others]) if others else first
