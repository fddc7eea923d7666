"""The loss on labels that is passed to `compile`: called as Keras calls it, but with one value for each example.

A step needs the values one by one: some examples have no label, padding counts nowhere, and the mean is over the
global batch. So Keras casts and computes, and the reduction follows here.
"""

import inspect
import re

import keras
import tensorflow as tf

from kdistill.distillation.step_loss import are_classes, is_labeled
from kdistill.errors import InputError
from kdistill.networks.heads import CLASSES, LABELS, NUMBERS, meaning_of_loss
from kdistill.networks.keras_internals import logits_before_softmax, with_last_axis
from kdistill.teachers.first_look import FirstLook

# Keras's reductions. It trains on the sum of a loss without a reduction.
REDUCTIONS = {
    "sum_over_batch_size": "mean",
    "mean": "mean",
    "mean_with_sample_weight": "weighted mean",
    "sum": "sum",
    "none": "sum",
    None: "sum",
}
# Keras's losses that have one value for each number or label, of which they take the mean.
OF_ENTRIES = ("mean_squared_error", "mean_absolute_error", "mean_absolute_percentage_error", "log_cosh", "poisson")
OF_ENTRIES += ("mean_squared_logarithmic_error", "huber", "binary_crossentropy", "binary_focal_crossentropy")
WORDS = {CLASSES: "exclusive classes", LABELS: "independent labels", NUMBERS: "numbers"}
NAMES_BY_LABELS = ("crossentropy", "ce")  # Keras picks the function for these names by the shape of the labels


class HardLoss:
    """A loss of `compile` as a function of labels and outputs that returns `[batch]`.

    Args:
        loss: a `keras.losses.Loss`, a function of (labels, outputs), or the name of one.

    `reduction` is what the values become: their `mean`, their `weighted mean` (divided by the sum of the sample
    weights), or their `sum`. `meaning` is that of the outputs that it takes, `classes`, `labels` or `numbers`; None for
    a loss that is not Keras's.

    Raises:
        InputError: something that is no loss.
    """

    def __init__(self, loss):
        self.loss = _as_loss(loss)
        self.reduction = REDUCTIONS[self.loss.reduction]
        self._function_name, self._takes = _of_outputs(self.loss)
        by_labels = self._function_name == _crossentropy.__name__
        self.meaning = CLASSES if by_labels else meaning_of_loss(self._function_name)
        # The same loss without a reduction. Not copy.copy: it would save and load the loss as a Keras file.
        self._unreduced = object.__new__(type(self.loss))
        self._unreduced.__dict__.update(self.loss.__dict__, reduction="none")

    def takes(self, meaning: str) -> str | None:
        """The outputs that the loss expects by its `from_logits`, `logits` or `probabilities`; None if it says none."""
        return self._takes if self.meaning in (None, meaning) else None

    def __call__(self, labels: tf.Tensor, outputs: tf.Tensor, labeled: tf.Tensor | None = None) -> tf.Tensor:
        """The loss of each row, float32 `[rows]`, 0 for one without a label. A row is an example, or a position of one.

        Of a loss with more than one value for a row it is their mean, or their sum if the loss is a sum. One value for
        an example counts for each of its positions, and one number for the whole batch for every row.

        Args:
            labels: classes, below 0 for none, or distributions.
            outputs: `[batch, ..., classes]`.
            labeled: 1 for a row with a label, else 0. None: as the labels of examples say.

        Raises:
            InputError: the loss returns other shapes.
        """
        labeled = is_labeled(labels) if labeled is None else labeled
        if are_classes(labels) or labels.dtype.is_integer:  # a Keras loss accepts no class below 0
            labels = tf.maximum(labels, tf.zeros_like(labels))
        return self._of_rows(self._unreduced(labels, outputs), labels, outputs, labeled)

    def of_entries(self, labels: tf.Tensor, outputs: tf.Tensor, labeled: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
        """The loss of each row of labels or numbers, float32 `[rows]`: over those of its entries that are `present`.

        Args:
            labels, outputs: `[batch, ..., n]`; with one number for each example also `[batch]`.
            labeled: 1 for a row with any entry, else 0.
            present: `[rows, n]`.

        A loss that compares whole rows, such as one that is not Keras's, counts those of which every entry is present.
        """
        labels, shape = tf.cast(tf.reshape(labels, tf.shape(outputs)), tf.float32), tf.shape(present)
        labels = tf.where(tf.reshape(present, tf.shape(outputs)), labels, tf.zeros_like(labels))
        if self._function_name not in OF_ENTRIES:
            labeled = tf.cast(tf.reduce_all(present, axis=-1), tf.float32)
            return self._of_rows(self._unreduced(labels, outputs), labels, outputs, labeled)
        values = self._unreduced(labels[..., None], with_last_axis(outputs))
        values = tf.where(present, tf.cast(tf.reshape(values, shape), tf.float32), tf.zeros(shape))
        if self.reduction == "sum":  # Keras sums the means of the rows
            return tf.reduce_sum(values, axis=-1) / tf.cast(shape[-1], tf.float32)
        count = tf.reduce_sum(tf.cast(present, tf.float32), axis=-1)
        return tf.math.divide_no_nan(tf.reduce_sum(values, axis=-1), count)

    def _of_rows(self, values, labels, outputs, labeled: tf.Tensor) -> tf.Tensor:
        values = tf.cast(values, tf.float32)
        positions = outputs.shape.rank > 2
        if values.shape.rank == 0:
            values = self._of_the_batch(values, labeled)
        elif positions and values.shape.rank == outputs.shape.rank - 1:
            values = tf.reshape(values, [-1])
        elif positions and values.shape.rank == 1:
            values = tf.repeat(values, tf.reduce_prod(tf.shape(outputs)[1:-1]))
        elif positions or not values.shape[:1].is_compatible_with(labeled.shape):
            raise InputError(
                f"The loss '{self.loss.name}' returns the shape {tuple(values.shape)} for labels {tuple(labels.shape)} "
                f"and outputs {tuple(outputs.shape)}; expected one value for each example, [batch]."
            )
        elif values.shape.rank > 1:
            reduce = tf.reduce_sum if self.reduction == "sum" else tf.reduce_mean
            values = reduce(values, axis=list(range(1, values.shape.rank)))
        return tf.where(labeled > 0, values, tf.zeros_like(labeled))

    def check_outputs(self, outputs: tf.Tensor, first_look: FirstLook, meaning: str) -> None:
        """Raises `InputError` if the loss takes other outputs than the student gives.

        `first_look` knows what the numbers are, `meaning` is what they mean: `classes`, `labels` or `numbers`.
        """
        kind, subject, name = first_look.kind, first_look.subject, self._function_name
        # Probabilities may learn by a loss of numbers or labels, and logits that are stated as such by any.
        of_others = self.meaning != CLASSES if meaning == CLASSES else self.meaning == NUMBERS
        allowed = of_others and meaning != NUMBERS and (kind != "logits" or first_look.stated is not None)
        if self.meaning not in (None, meaning) and not allowed:
            raise InputError(
                f"{subject} is of {WORDS[meaning]}, but the loss {name} is one of {WORDS[self.meaning]}. Leave the "
                "loss out, pass one that fits, or state what the output means: "
                f"Distiller(..., head='{self.meaning}')."
            )
        # A loss in the outputs' own precision gets the logits that Keras keeps with them, whatever it states.
        kept = logits_before_softmax(outputs) is not None and outputs.dtype == self.loss.dtype
        if meaning != NUMBERS and None not in (kind, self._takes) and kind != self._takes and not kept:
            raise InputError(
                f"{subject} gives {kind}, but the loss {name} takes {self._takes} "
                f"(from_logits={self._takes == 'logits'}). Set from_logits={kind == 'logits'} in the loss, such as "
                f"keras.losses.SparseCategoricalCrossentropy(from_logits={kind == 'logits'}), or give no loss."
            )

    def _of_the_batch(self, value: tf.Tensor, labeled: tf.Tensor) -> tf.Tensor:
        if self.loss.reduction in ("sum", "mean_with_sample_weight"):
            raise InputError(
                f"The loss '{self.loss.name}' returns one number for the whole batch, so its reduction "
                f"{self.loss.reduction!r} would do nothing. Return one value for each example, [batch]."
            )
        self.reduction = "mean"  # of equal values; a sum would count the number once for every example
        tf.debugging.assert_greater(
            tf.reduce_min(labeled),
            0.0,
            f"The loss {self.loss.name} returns one number for the whole batch, but examples of it have no label "
            "(a class below 0), which must not count. Return one value for each example, [batch].",
        )
        return tf.fill(tf.shape(labeled), value)


class _OfFunction(keras.losses.Loss):
    """A function of (labels, outputs) with Keras's casts and its default reduction, the mean over the batch."""

    def __init__(self, function):
        name = getattr(function, "__name__", type(function).__name__)
        super().__init__(name=re.sub(r"\W", "", name).strip("_"))  # a name of operations: "<lambda>" would not do
        self._function = function

    def call(self, y_true, y_pred):
        return self._function(y_true, y_pred)


def _of_outputs(loss: keras.losses.Loss) -> tuple[str, str | None]:
    """The name of Keras's function behind a loss, or its own; and the outputs that it takes, if it states them."""
    function = getattr(loss, "fn", getattr(loss, "_function", loss))
    states = getattr(loss, "from_logits", None)
    if states is None and callable(function) and not isinstance(function, keras.losses.Loss):
        parameter = inspect.signature(function).parameters.get("from_logits")
        states = parameter.default if parameter else None
    name = getattr(getattr(function, "func", function), "__name__", loss.name)  # .func: of functools.partial
    return name, {True: "logits", False: "probabilities"}.get(states)


def _as_loss(loss) -> keras.losses.Loss:
    if isinstance(loss, str) and loss.lower() in NAMES_BY_LABELS:
        return _OfFunction(_crossentropy)
    try:
        loss = keras.losses.get(loss)
    except (ValueError, TypeError) as error:
        raise InputError(f"loss expects a Keras loss, its name or a function, received {loss!r}: {error}") from error
    return loss if isinstance(loss, keras.losses.Loss) else _OfFunction(loss)


def _crossentropy(labels, outputs, from_logits=False):
    if are_classes(labels):
        return keras.losses.sparse_categorical_crossentropy(labels, outputs, from_logits)
    return keras.losses.categorical_crossentropy(labels, outputs, from_logits)
