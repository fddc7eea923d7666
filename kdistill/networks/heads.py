"""What the output of a model means, in numbers: logits or probabilities of exclusive classes, labels, numbers.

`outputs` looks at tensors and how a graph computes them, `signatures` at whole models. These functions need NumPy only,
so that a `.tflite` is evaluated without TensorFlow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kdistill.errors import InputError
from kdistill.recipe.values import CLASSES, LABELS, MEANINGS, NUMBERS

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
ASK = (
    "State it: head='classes' (exclusive, logits or a softmax), head='labels' (independent, or a binary problem) or "
    "head='numbers' (regression)."
)


@dataclass(frozen=True)
class Head:
    """What an output means.

    Args:
        meaning: `classes` (exclusive), `labels` (independent) or `numbers`.
        kind: what its numbers are: `logits` or `probabilities` of classes or labels, `numbers`, or `unclear`, from 0 to
            1 without a sum of 1, which a file takes as numbers.
        shape: of the output, without the batch: `(..., n)`, with positions before the last axis.
    """

    meaning: str
    kind: str
    shape: tuple[int | None, ...]

    @property
    def exclusive(self) -> bool:
        """Whether the numbers are logits or probabilities of exclusive classes."""
        return self.meaning == CLASSES

    @property
    def classes(self) -> int:
        """How many classes, labels or numbers there are, for an example or a position."""
        return self.shape[-1]

    @property
    def positions(self) -> tuple[int | None, ...]:
        """The sizes between the batch and the last axis, such as height and width; empty for one answer per example."""
        return self.shape[:-1]

    @property
    def name(self) -> str:
        """The name of the output in a file with one output."""
        if self.meaning == LABELS:
            return "labels" if self.kind == "probabilities" else "label_logits"
        return self.kind if self.exclusive else "outputs"


# The losses of Keras that tell what an output means, by their names without underscores, in lower case.
_LOSSES = {
    CLASSES: "categoricalcrossentropy sparsecategoricalcrossentropy categoricalfocalcrossentropy categoricalhinge "
    "sparsecategoricalfocalcrossentropy kldivergence",
    LABELS: "binarycrossentropy binaryfocalcrossentropy bce",
    NUMBERS: "meansquarederror mse meanabsoluteerror mae meanabsolutepercentageerror mape meansquaredlogarithmicerror "
    "msle huber logcosh poisson cosinesimilarity",
}
_MEANING_OF_LOSS = {name: meaning for meaning, names in _LOSSES.items() for name in names.split()}


def meaning_of_loss(loss) -> str | None:
    """What an output means that is trained with this loss of Keras: a name, function or object, or its config.

    None where the loss does not tell, such as one of the user's own.
    """
    if isinstance(loss, dict):  # as in a `.keras` file
        loss = loss["config"] if loss.get("class_name") == "function" else loss.get("class_name")
    if loss is not None and not isinstance(loss, str):
        loss = getattr(loss, "__name__", type(loss).__name__)
    return _MEANING_OF_LOSS.get(loss.rpartition(">")[2].replace("_", "").lower()) if loss else None


def check_meaning(meaning: str) -> str:
    """The meaning, if it is one; else raises `InputError`."""
    if meaning not in MEANINGS:
        raise InputError(
            f"head expects 'classes' (exclusive), 'labels' (independent) or 'numbers', received {meaning!r}. With "
            "several outputs, give a dict: head={'name of the output': 'classes', ...}."
        )
    return meaning


def find_head(
    numbers: np.ndarray,
    end: Callable[[], str],
    subject: str,
    *,
    head: str | None = None,
    loss: str | None = None,
    strict: bool = True,
) -> Head:
    """What an output means.

    Args:
        numbers: the output for some examples, `[n, ..., columns]`.
        end: as for `kind_of`.
        subject: names the output for messages.
        head: the meaning that the user states.
        loss: the meaning that the loss of `compile` has, see `meaning_of_loss`. A softmax is one of exclusive classes
            with every loss.
        strict: whether to raise `InputError` where loss, activation and numbers disagree or do not tell. Without it,
            what they do not tell is numbers, and a file gives the numbers as they are.

    Raises `InputError` for outputs that cannot have the meaning that is stated.
    """
    shape = numbers.shape[1:]
    if not shape:
        if head in (CLASSES, LABELS):
            raise InputError(f"{subject} is [batch]; {head} expect [batch, ..., n]. Leave out the last Reshape.")
        return Head(NUMBERS, "numbers", shape)
    rows = numbers.reshape(-1, shape[-1])
    kind = kind_of(rows, end)

    def contradicts(reason: str) -> InputError:
        stated = f"head='{head}'" if head else f"the loss of its compile, which is one of {loss},"
        return InputError(f"{subject} {reason}, which contradicts {stated}. {ASK}")

    meaning = head or loss
    if meaning is None or (kind == "probabilities" and not head) or (not strict and not head and kind == "labels"):
        meaning = CLASSES if kind in MAIN_OUTPUTS else LABELS if kind == "labels" else None
        if meaning is None and strict:
            ways = "one number that no activation bounds" if kind == "numbers" else "numbers from 0 to 1 without a sum"
            raise InputError(f"{subject} gives {ways}, and no loss of a compile tells what it means. {ASK}")
        return Head(meaning or NUMBERS, "probabilities" if kind == "labels" else kind, shape)
    if meaning == NUMBERS:
        if not head and kind == "labels":
            raise contradicts("ends in a sigmoid")
        return Head(NUMBERS, "numbers", shape)
    if meaning == CLASSES:
        if kind not in MAIN_OUTPUTS:
            if not strict and not head:
                return Head(NUMBERS, kind, shape)
            sigmoid = "ends in a sigmoid" if kind == "labels" else "gives numbers without a sum of 1"
            raise contradicts("has one column" if shape[-1] == 1 else sigmoid)
        return Head(CLASSES, kind, shape)
    if kind == "probabilities":
        raise contradicts("gives rows with a sum of 1, as of a softmax")
    bounded = rows.size and rows.min() >= 0 and rows.max() <= 1 and rows.any()
    if kind == "numbers" and bounded and end() != "scores":
        return Head(LABELS, "probabilities", shape)
    return Head(LABELS, "probabilities" if kind in ("labels", "unclear") else "logits", shape)


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


def exclusive_kind(kind: str | Head, subject: str, advice: str = "") -> str:
    """The kind, if it is `logits` or `probabilities` of exclusive classes; raises `InputError` for every other one.

    Args:
        kind: as `kind_of` returns it, or the head.
        subject: names the output, such as "The output 'scores' of the teacher 'net'".
        advice: a sentence on how to state the kind, for numbers that are unclear.
    """
    if isinstance(kind, Head):
        if kind.exclusive and kind.positions:
            raise InputError(f"{subject} is {['batch', *kind.shape]}".replace("'", "") + f". {SUPPORTED}")
        kind = kind.kind if kind.exclusive or kind.kind == "unclear" else kind.meaning
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
