"""The first look at the outputs of a teacher or a student inside of a step: are they logits or probabilities?

The answer must not depend on the batch, so it is given once, while the first step is traced. It follows from the
operation that gives the outputs, and where that does not tell, from numbers: of the step itself where it runs eagerly,
else of a pass over noise. A data set is not touched: its iterator may give every batch only once.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.networks.heads import CLASSES, LABELS, NUMBERS, exclusive_kind, kind_of
from kdistill.networks.outputs import as_logits, check_shape, end_of, end_of_call, kept_end

NOISE_ROWS, NOISE_SIZE = 8, 32  # examples of noise, and the size of any other dimension that is open
STATE_IT = (
    "For exclusive classes state which they are: outputs='logits', or outputs='probabilities' to normalize them. For a "
    "student of independent labels or of numbers state head='labels' or head='numbers'."
)


class FirstLook:
    """What the outputs of one model or function are, once a first step has shown it.

    Args:
        call: inputs -> outputs, in inference mode.
        subject: names the output, such as "The output 'scores' of the teacher 'net'".
        stated: `logits` or `probabilities`, where the user states it. None: `look` decides.

    Attributes:
        kind: `logits`, `probabilities` or `numbers`; None before the first step, and where the numbers of each batch
            decide.
    """

    def __init__(self, call: Callable, subject: str, stated: str | None = None):
        self.call, self.subject, self.stated, self.kind = call, subject, stated, None

    def scores(self, outputs, inputs, meaning: str = CLASSES, otherwise: str | None = None) -> tf.Tensor:
        """What losses compare, in the shape of the outputs of a step for these inputs.

        Logits `[batch, ..., classes]` of exclusive classes or of independent labels, or the numbers themselves; see
        `look`.
        """
        if self.kind is None:
            self.kind = look(outputs, self.call, inputs, self.subject, self.stated, otherwise, meaning)
        return as_logits(outputs, self.kind, meaning)


def look(
    outputs,
    call: Callable,
    inputs,
    subject: str,
    stated: str | None = None,
    otherwise: str | None = None,
    meaning: str = CLASSES,
) -> str | None:
    """What outputs are, `logits` or `probabilities`, or `numbers` if that is their meaning, for `as_logits`.

    Args:
        outputs: of a step, eager or in a graph. A graph has no numbers: then `call` runs once, on noise, unless the
            operation that gives the outputs tells that they are logits.
        inputs: of this step.
        call, subject, stated: as for `FirstLook`.
        otherwise: the kind of numbers that are unclear. None: they are refused.
        meaning: `classes`, `labels` or `numbers`.

    Returns None if `call` does not run on noise and the graph does not tell: then the numbers of each batch decide.
    Raises `InputError` for what is not exclusive classes, and for a statement that cannot be true.
    """
    check_shape(outputs, subject, meaning)
    if meaning == NUMBERS:
        return NUMBERS
    if stated == "logits":
        return stated
    end = end_of(outputs) if tf.is_symbolic_tensor(outputs) else None
    if end == "scores" and stated is None:
        return "logits"
    numbers = _numbers_on_noise(call, inputs) if end else _numbers(outputs)
    if numbers is None and (stated or end == "unknown"):
        return stated
    numbers = np.empty((0, 2), np.float32) if numbers is None else numbers
    if stated and (numbers < 0).any():
        raise InputError(f"{subject} gives numbers down to {numbers.min():.3g}, which are no {stated}.")

    def operation() -> str:
        return end or kept_end(outputs) or end_of_call(call, inputs)

    if meaning == LABELS:
        return stated or _kind_of_labels(numbers, operation(), otherwise)
    kind = stated or kind_of(numbers, operation)
    if kind == "unclear" and not end:  # in training mode, dropout may change what a softmax gives
        kind = kind_of(_numbers(call(inputs)), operation)
    if kind == "unclear" and otherwise is not None:
        return otherwise
    return exclusive_kind(kind, subject, STATE_IT)


def _kind_of_labels(numbers: np.ndarray, operation: str, otherwise: str | None) -> str:
    """What the numbers of independent labels are: probabilities are from 0 to 1, each of a sigmoid of its own."""
    if operation in ("sigmoid", "softmax"):
        return "probabilities"
    finite = numbers[np.isfinite(numbers)]
    if operation == "scores" or (finite < 0).any() or (finite > 1).any() or not finite.any():
        return "logits"
    return otherwise or "probabilities"


def _numbers(outputs) -> np.ndarray:
    """The rows `[rows, n]` of outputs `[batch, ..., n]`."""
    numbers = np.asarray(tf.cast(outputs, tf.float32))
    return numbers.reshape(-1, numbers.shape[-1])


def _numbers_on_noise(call: Callable, inputs) -> np.ndarray | None:
    """The outputs for inputs of noise, while a graph is traced; None where that fails."""

    def noise(tensor):
        shape = [size or (NOISE_SIZE if place else NOISE_ROWS) for place, size in enumerate(tensor.shape)]
        if tensor.dtype.is_floating:
            return tf.cast(np.random.default_rng(0).normal(size=shape), tensor.dtype)
        return tf.zeros(shape, tensor.dtype)  # always a valid index

    try:
        with tf.init_scope():
            return _numbers(call(tf.nest.map_structure(noise, inputs)))
    except InputError:
        raise
    except Exception:  # a user's function may raise anything, such as for images that it does not know
        return None
