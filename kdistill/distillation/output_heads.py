"""One output of a student: what it means, how it is compared with labels and with the teacher, what is logged of it.

Losses and metrics see rows. An output `[batch, ..., n]` with positions, such as the pixels of a segmentation or the
tokens of a text, is `[batch * positions, n]` for them; `[batch, n]` has one row for each example.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import keras
import tensorflow as tf

from kdistill.data.few_labels import MISSING
from kdistill.distillation import losses
from kdistill.distillation.batch import ClassWeights
from kdistill.distillation.hard_loss import HardLoss
from kdistill.distillation.step_loss import are_classes, is_labeled, is_right
from kdistill.errors import InputError, unknown
from kdistill.networks.heads import CLASSES, LABELS, NUMBERS, check_meaning
from kdistill.networks.keras_internals import graph_of, mask_of, operation_behind
from kdistill.networks.outputs import end_of_call
from kdistill.networks.signatures import subject_of
from kdistill.teachers.first_look import FirstLook

# The losses of labels and of the teacher by default, and the metrics that are logged of each step.
HARD = {
    CLASSES: losses.hard_cross_entropy,
    LABELS: losses.binary_cross_entropy,
    NUMBERS: losses.masked_squared_error,
}
KD = {CLASSES: losses.kl_logits, LABELS: losses.bernoulli_kl, NUMBERS: losses.squared_error}
RATES = {CLASSES: ("accuracy", "agreement"), LABELS: ("accuracy", "agreement"), NUMBERS: ("mae", "teacher_mae")}
ENDS = {"softmax": CLASSES, "sigmoid": LABELS}  # activations that tell what an output means
UNCHANGED = (keras.layers.Reshape, keras.layers.Flatten, keras.layers.Identity, keras.layers.Dropout)
OF_OUTPUTS = ("hard", "kd")  # the parts of the loss that every output has


@dataclass
class OutputHead:
    """One output of a student.

    `name`: of the output; empty for the only one. `meaning`: `classes`, `labels` or `numbers`; `stated` is the one that
    the user states. `hard_loss`: the loss of `compile`; None is the default of the meaning. `weight`: a factor, see
    `Supervised.compile`.
    """

    name: str
    meaning: str
    first_look: FirstLook
    hard_loss: HardLoss | None = None
    weight: float | None = None
    stated: str | None = None
    has_positions: bool = field(default=False, init=False)

    def named(self, part: str) -> str:
        """The name in the logs of a part of the loss or a metric of this output."""
        return f"{self.name}_{part}" if self.name else part

    def named_part(self, part: str) -> str:
        """The name in the logs of a part of the loss, of this output or of a term."""
        return self.named(part) if part in OF_OUTPUTS else part

    @property
    def rates(self) -> tuple[str, str]:
        """The names of the metrics that are logged, without the output's: of labels, and of the teacher."""
        return RATES[self.meaning]

    @property
    def is_mean(self) -> bool:
        """Whether the loss on labels is a mean over the labeled rows, each with its weight."""
        return self.hard_loss is None or self.hard_loss.reduction == "mean"

    # -- rows ---------------------------------------------------------------------------------------------------------

    def scores(self, inputs, outputs) -> tf.Tensor:
        """The rows `[rows, n]` of the student's outputs: logits of classes or labels, or numbers."""
        scores = self.first_look.scores(
            outputs, inputs, self.meaning, self.hard_loss and self.hard_loss.takes(self.meaning)
        )
        if self.hard_loss is not None:
            self.hard_loss.check_outputs(outputs, self.first_look, self.meaning)
        return as_rows(scores)

    def label_rows(self, labels, outputs) -> tf.Tensor:
        """The labels of each row: classes `[rows]`, or distributions, labels or numbers `[rows, n]`."""
        rank, width = outputs.shape.rank, outputs.shape[-1] if outputs.shape.rank > 1 else 1
        if self.meaning == CLASSES:
            if rank <= 2:
                return labels
            if labels.shape.rank == rank - 1 or (labels.shape.rank == rank and labels.shape[-1] == 1):
                return tf.reshape(labels, [-1])
            if labels.shape.rank == rank and labels.shape[-1] == width:
                return tf.reshape(labels, [-1, width])
            expected = f"classes {_shape(outputs, last=False)}, or distributions {_shape(outputs)}"
        else:
            same = labels.shape.is_compatible_with(outputs.shape)
            if same or (width == 1 and labels.shape.rank == rank - 1):
                return tf.reshape(labels, [-1, width])
            kind = "0 or 1 for each label" if self.meaning == LABELS else "numbers"
            expected = f"{kind}, {_shape(outputs)}"
        raise InputError(
            f"{self.first_look.subject} has the shape {_shape(outputs)}, so its labels are {expected}; received "
            f"{_shape(labels)}."
        )

    def row_weights(self, weights, labels, outputs) -> tuple[tf.Tensor, tf.Tensor | None]:
        """The weight of each row, float32 `[rows]`; and which rows count at all, bool `[rows]`, None for all.

        A position counts nowhere where a mask hides it or its own weight is 0. Weights are for examples, `[batch]`, or
        for positions, `[batch, ...]`.
        """
        examples = tf.shape(labels)[:1]
        if outputs.shape.rank <= 2:
            return tf.ones(examples) if weights is None else tf.reshape(tf.cast(weights, tf.float32), examples), None
        positions = tf.shape(outputs)[1:-1]
        count, counts = tf.reduce_prod(positions), None
        if weights is None:
            rows = tf.ones([examples[0] * count])
        elif weights.shape.rank == 1 or (weights.shape.rank == 2 and weights.shape[-1] == 1 != outputs.shape[1]):
            rows = tf.repeat(tf.reshape(tf.cast(weights, tf.float32), [-1]), count)
        elif weights.shape.rank == outputs.shape.rank - 1 or (
            weights.shape.rank == outputs.shape.rank and weights.shape[-1] == 1
        ):
            rows = tf.reshape(tf.cast(weights, tf.float32), [-1])
            counts = rows != 0
        else:
            raise InputError(
                f"sample_weight expects one number for each example, [batch], or for each position, "
                f"{_shape(outputs, last=False)}; received {_shape(weights)}."
            )
        mask = mask_of(outputs)
        if mask is not None:
            seen = tf.reshape(tf.broadcast_to(mask, tf.shape(outputs)[:-1]), [-1])
            counts = seen if counts is None else counts & seen
        if counts is not None:
            rows = tf.where(counts, rows, tf.zeros_like(rows))
        return rows, counts

    def without_hidden(self, label_rows, counts) -> tf.Tensor:
        """The labels of the rows, those that do not count as missing ones."""
        if counts is None:
            return label_rows
        if label_rows.shape.rank == 2:
            label_rows = tf.cast(label_rows, tf.float32) if self.meaning == NUMBERS else label_rows
            counts = counts[:, None]
        if not (label_rows.dtype.is_floating or label_rows.dtype.is_integer) or label_rows.dtype.is_unsigned:
            label_rows = tf.cast(label_rows, tf.int32)
        return tf.where(counts, label_rows, tf.cast(MISSING[self.meaning], label_rows.dtype))

    def present(self, label_rows) -> tf.Tensor:
        """Which of the labels or numbers `[rows, n]` are there: not below 0, not NaN."""
        if self.meaning == LABELS:
            return tf.cast(label_rows, tf.float32) >= 0
        return ~tf.math.is_nan(tf.cast(label_rows, tf.float32))

    def labeled(self, label_rows) -> tf.Tensor:
        """1 for a row with a label, else 0, `[rows]`."""
        if self.meaning != CLASSES:
            return tf.cast(tf.reduce_any(self.present(label_rows), axis=-1), tf.float32)
        if are_classes(label_rows) or not self.has_positions:
            return is_labeled(label_rows)
        return tf.cast(tf.reduce_all(tf.cast(label_rows, tf.float32) >= 0, axis=-1), tf.float32)

    def missing(self, inputs, outputs) -> tf.Tensor:
        """Labels `[batch, ...]` of this output for data without any."""
        examples = tf.shape(tf.nest.flatten(inputs)[0])[:1]
        if self.meaning == CLASSES and outputs.shape.rank <= 2:
            return -tf.ones(examples, tf.int32)
        if self.meaning == CLASSES:
            return -tf.ones(tf.shape(outputs)[:-1], tf.int32)
        return tf.fill(tf.shape(outputs), tf.constant(MISSING[self.meaning], tf.float32))

    # -- losses and metrics, one number for each row -----------------------------------------------------------------

    def hard(self, labels, label_rows, labeled, outputs, scores) -> tf.Tensor:
        """The loss on labels, `[rows]`, 0 for a row without a label."""
        if self.hard_loss is None:
            per_row = HARD[self.meaning](label_rows, scores)
            return per_row if not self.has_positions else tf.where(labeled > 0, per_row, tf.zeros_like(per_row))
        if self.meaning == CLASSES:
            return self.hard_loss(labels, outputs, labeled)
        return self.hard_loss.of_entries(labels, outputs, labeled, self.present(label_rows))

    def hits(self, label_rows, scores) -> dict[str, tf.Tensor]:
        """What is logged of the labels: `accuracy`, from 0 to 1, or `mae`, `[rows]`."""
        if self.meaning == CLASSES:
            return {"accuracy": is_right(label_rows, scores)}
        present, labels = self.present(label_rows), tf.cast(label_rows, tf.float32)
        if self.meaning == LABELS:
            values = tf.cast((labels > 0.5) == (scores > 0), tf.float32)
        else:
            values = tf.abs(labels - tf.cast(scores, tf.float32))
        values = tf.where(present, values, tf.zeros_like(values))
        count = tf.reduce_sum(tf.cast(present, tf.float32), axis=-1)
        return {RATES[self.meaning][0]: tf.math.divide_no_nan(tf.reduce_sum(values, axis=-1), count)}

    def teacher_hits(self, scores, teacher) -> dict[str, tf.Tensor]:
        """What is logged of the teacher: `agreement`, from 0 to 1, or `teacher_mae`, `[rows]`."""
        if self.meaning == CLASSES:
            return {"agreement": tf.cast(tf.argmax(scores, axis=-1) == tf.argmax(teacher, axis=-1), tf.float32)}
        if self.meaning == LABELS:
            values = tf.cast((scores > 0) == (teacher > 0), tf.float32)
        else:
            values = tf.abs(tf.cast(scores, tf.float32) - tf.cast(teacher, tf.float32))
        return {RATES[self.meaning][1]: tf.reduce_mean(values, axis=-1)}

    def class_weights(self, table: ClassWeights, label_rows) -> tf.Tensor:
        """The weight of each row by its class. Raises `InputError` for outputs that have no classes."""
        if self.meaning == CLASSES or (self.meaning == LABELS and label_rows.shape[-1] == 1):
            return table.of_labels(label_rows)
        raise InputError(
            f"class_weight expects exclusive classes or one label; {self.first_look.subject} gives {self.meaning}. "
            "Pass sample_weight."
        )


def as_rows(values: tf.Tensor) -> tf.Tensor:
    """`[batch, ..., n]` as `[rows, n]`; `[batch]` as `[batch, 1]`."""
    if values.shape.rank == 2:
        return values
    return tf.reshape(values, [-1, values.shape[-1] if values.shape.rank > 2 else 1])


def _shape(tensor, last: bool = True) -> str:
    """The shape in a message, such as [batch, 28, 28, 3], with or without its last axis."""
    sizes = ["batch", *("..." if size is None else str(size) for size in tensor.shape[1:])]
    return f"[{', '.join(sizes if last else sizes[:-1])}]"


# -- which outputs a student has, and what they mean ------------------------------------------------------------------


def heads_of(student: keras.Model, head, outputs: str | None) -> dict[str, OutputHead]:
    """The outputs of a student by name, before a loss is known. `head`, `outputs`: as for `Supervised`."""
    names = output_names(student, head)

    def head_of(name: str) -> OutputHead:
        stated = head.get(name) if isinstance(head, Mapping) else head
        subject = f"The output {name!r} of the student {student.name!r}" if name else subject_of(student, "student")
        look = FirstLook(lambda x: outputs_by_name(student(x, training=False), names)[name], subject, outputs)
        return OutputHead(name, stated or CLASSES, look, stated=stated)

    return {name: head_of(name) for name in names}


def output_names(student: keras.Model, head=None) -> tuple[str, ...]:
    """The names of a student's outputs; one empty name for a single output.

    Those of its graph, for a subclassed model those of the dict `head`. Raises `InputError` for a dict `head` with
    other names.
    """
    graph = graph_of(student)
    outputs = None if graph is None else graph.output
    if isinstance(outputs, Mapping):
        names = tuple(outputs)
    elif isinstance(outputs, (list, tuple)) and len(outputs) > 1:
        names = tuple(student.output_names)
    elif graph is None and isinstance(head, Mapping):
        names = tuple(head)
    else:
        names = ("",)
    if isinstance(head, Mapping):
        for name in head:
            if name not in names:
                raise unknown("output", name, [name for name in names if name], "Fix head.")
    return names


def check_head(head) -> None:
    """Raises `InputError` for an argument `head=` that is no meaning, dict of meanings, or None."""
    for meaning in head.values() if isinstance(head, Mapping) else [head]:
        if meaning is not None:
            check_meaning(meaning)


def outputs_by_name(outputs, names: tuple[str, ...]) -> dict[str, tf.Tensor]:
    """The tensors of a student by the names of its outputs. Raises `InputError` if it gives others."""
    if names == ("",):
        return {"": outputs[0] if isinstance(outputs, (list, tuple)) and len(outputs) == 1 else outputs}
    if isinstance(outputs, Mapping) and set(names) <= set(outputs):
        return {name: outputs[name] for name in names}
    if isinstance(outputs, (list, tuple)) and len(outputs) == len(names):
        return dict(zip(names, outputs, strict=True))
    received = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
    raise InputError(f"Expected the outputs {', '.join(names)}, received {received}. Fix head, or the model.")


def meaning_of(student: keras.Model, name: str, stated: str | None, loss: HardLoss | None, is_exclusive: bool) -> str:
    """What an output of a student means.

    In this order: what is `stated`, what the user says of its numbers (`is_exclusive`), its last activation, the loss
    of `compile`; else exclusive classes. Raises `InputError` for one number for each example of which nothing tells
    what it is, and for a sigmoid with a loss of numbers, which may be either.
    """
    if stated is not None:
        return stated
    if is_exclusive:
        return CLASSES
    tensor = _symbolic(student, name)
    end = None if tensor is None else activation_behind(tensor) or _traced_end(student, name)
    if end == "sigmoid" and loss is not None and loss.meaning == NUMBERS:
        raise InputError(
            f"The output {f'{name!r} ' if name else ''}of the student '{student.name}' ends in a sigmoid, and the loss "
            "of compile is one of numbers. State what it means: head='labels' (independent labels) or head='numbers' "
            "(numbers from 0 to 1)."
        )
    if end in ENDS:
        return ENDS[end]
    if loss is not None and loss.meaning is not None:
        return loss.meaning
    if tensor is not None and (len(tensor.shape) == 1 or tensor.shape[-1] == 1):
        raise InputError(
            f"The output {f'{name!r} ' if name else ''}of the student '{student.name}' is one number for each example, "
            f"{tuple(tensor.shape)}. State what it means: head='labels' (the logit of a binary problem) or "
            "head='numbers', or pass a Keras loss to compile."
        )
    return CLASSES


def _symbolic(student: keras.Model, name: str):
    graph = graph_of(student)
    if graph is None:
        return None
    return outputs_by_name(graph.output, (name,) if not name else output_names(student))[name]


def _traced_end(student: keras.Model, name: str) -> str:
    """How TensorFlow's graph computes an output, where Keras's does not tell, such as behind a `Lambda`."""
    names = output_names(student)
    return end_of_call(lambda inputs: outputs_by_name(student(inputs, training=False), names)[name], student.input)


def activation_behind(tensor) -> str | None:
    """The activation that gives a symbolic tensor of a Keras graph, such as `softmax`; None where that is unknown."""
    for _ in range(12):  # operations behind the output
        operation = operation_behind(tensor)
        inner = operation.layer if isinstance(operation, keras.layers.TimeDistributed) else operation
        activation = getattr(inner, "activation", None)
        if activation is not None:
            return getattr(activation, "__name__", None)
        if type(inner).__name__ in ("Softmax", "Sigmoid"):  # layers and operations of keras.ops
            return type(inner).__name__.lower()
        graph = graph_of(operation) if isinstance(operation, keras.Model) else None
        if graph is not None and not isinstance(graph.output, (Mapping, list, tuple)):
            tensor = graph.output
        elif isinstance(inner, UNCHANGED):
            tensor = operation.input
        else:
            return None
    return None
