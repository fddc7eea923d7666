"""What the output of a model means, in numbers: logits or probabilities of exclusive classes, labels, numbers.

`outputs` looks at tensors and how a graph computes them, `signatures` at whole models. These functions need NumPy only,
so that a `.tflite` is evaluated without TensorFlow.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kdistill.errors import InputError

# What an output means: exclusive classes, labels that do not exclude each other, or numbers.
MEANINGS = CLASSES, LABELS, NUMBERS = "classes", "labels", "numbers"
MAIN_OUTPUTS = ("logits", "probabilities")  # of several outputs, the one of these names classifies
SMALLEST_PROBABILITY = 1e-7  # int8 files round small probabilities to exactly 0
TINIEST = 1e-30  # of a probability in a loss: large enough that the gradient 1 / p stays finite in float32
ROUNDING = 1e-3  # of the sum of a row of probabilities
BFLOAT16_ROUNDING = 1e-2
STEPS = (1 / 256, 1 / 32768)  # between quantized probabilities: LiteRT's scales for int8 and int16
LARGEST_ROUNDING = 0.1
SUPPORTED = (
    "kdistill supports exclusive classes: one output [batch, classes] of logits, or of probabilities after a softmax, "
    "with 2 classes or more."
)


class Head(NamedTuple):
    """What a model gives for an image: the kind of its numbers, and how many.

    `kind`: `logits` or `probabilities` of exclusive classes; else a name that `kind_of` returns.
    """

    kind: str
    classes: int

    @property
    def exclusive(self) -> bool:
        """Whether the numbers are logits or probabilities of exclusive classes."""
        return self.kind in MAIN_OUTPUTS

    @property
    def name(self) -> str:
        """The name of the output in a file. What is neither logits nor a distribution is called `outputs`."""
        return self.kind if self.exclusive else "outputs"


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether every row of `[n, classes]` is a distribution, as after a softmax. Logits practically never are."""
    outputs = np.asarray(outputs)
    if not len(outputs) or not (outputs >= 0).all():
        return False
    return bool((abs(outputs.sum(axis=1, dtype=np.float64) - 1) < _rounding(outputs)).all())


def _rounding(outputs: np.ndarray) -> float:
    """How far the sum of a row of probabilities may be from 1, in the precision in which they were computed."""
    numbers = np.ascontiguousarray(outputs, np.float32)
    for step in STEPS:
        if (numbers / step == np.round(numbers / step)).all():  # each number is rounded by up to half a step
            return max(BFLOAT16_ROUNDING, min(LARGEST_ROUNDING, outputs.shape[1] * step / 2))
    is_bfloat16 = not (numbers.view(np.uint32) & 0xFFFF).any()  # also after a cast to float32
    return BFLOAT16_ROUNDING if is_bfloat16 else ROUNDING


def kind_of(outputs: np.ndarray, end: Callable[[], str]) -> str:
    """What the numbers `[n, columns]` are.

    `logits` or `probabilities` of exclusive classes; `labels`, the sigmoids of independent labels; `numbers`, one for
    each example; or `unclear`, from 0 to 1 without a sum of 1.

    `end`: returns what `end_of` says of the operation that gives them. It is called only where it matters: numbers from
    0 to 1 are from a softmax, from sigmoids, or logits that happen to be small.
    """
    single = outputs.shape[1] == 1
    finite = outputs[np.isfinite(outputs).all(axis=1)]
    if len(finite) and ((finite < 0).any() or (finite > 1 + _rounding(finite)).any()):
        return "numbers" if single else "logits"
    operation = end()
    if operation == "sigmoid":
        return "labels"
    if single:
        return "numbers"
    if are_probabilities(finite) or (operation == "softmax" and not len(finite)):
        return "probabilities"
    # Zeros alone are a layer of logits that starts at zero: sigmoids and parts of a softmax are never all zero.
    return "logits" if operation == "scores" or not finite.any() else "unclear"


def logits_of_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Logits `[n, classes]` whose softmax gives these probabilities."""
    return np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))


def check_stated(kind: str | None) -> None:
    """Raises `InputError` for a value of an argument `outputs=` that is neither a kind of outputs nor None."""
    if kind not in (None, *MAIN_OUTPUTS):
        raise InputError(f"outputs expects 'logits', 'probabilities' or None, received {kind!r}.")


def exclusive_kind(kind: str, subject: str, advice: str = "") -> str:
    """The kind, if it is `logits` or `probabilities`; raises `InputError` for every other one.

    Args:
        subject: names the output, such as "The output 'scores' of the teacher 'net'".
        advice: a sentence on how to state the kind, for numbers that are unclear.
    """
    if kind in MAIN_OUTPUTS:
        return kind
    if kind == "labels":
        reason = (
            "ends in a sigmoid: each number is the probability of a label of its own, and such labels do not exclude "
            "each other"
        )
        advice = (
            "If every example has exactly one label, end the model in logits or a softmax (a binary problem: in two "
            "outputs, one for each class)."
        )
    elif kind == "numbers":
        reason = "gives one number for each example"
        advice = "For a binary problem give the model two outputs, one for each class."
    else:
        reason = "gives numbers from 0 to 1 that do not sum to 1, like sigmoids, or like some classes of a softmax"
    raise InputError(f"{subject} {reason}. {SUPPORTED} {advice}".rstrip())
