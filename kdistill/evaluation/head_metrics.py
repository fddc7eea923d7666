"""The metrics of any head: classes at positions, independent labels, numbers. NumPy alone.

One row of exclusive classes for an example is measured by `metrics.measure`. Labels below 0 (of numbers and labels also
NaN) are missing: they do not count. Weights, if any, weigh each label in every metric.
"""

import dataclasses

import numpy as np

from kdistill.data.few_labels import without
from kdistill.errors import InputError
from kdistill.evaluation.metrics import check_finite, measure
from kdistill.networks.heads import CLASSES, LABELS, Head, logits_of_probabilities

HALF = 0.5  # of a probability: the side on which a label is on
MAIN_METRIC = {"classes": "accuracy", "labels": "accuracy", "numbers": "mse"}  # which a verdict compares
LOWER_IS_BETTER = ("mse", "mae")


def measure_head(
    head: Head, outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None, name: str = "output"
) -> dict[str, float]:
    """The metrics of outputs `[n, ..., columns]` on labels, by the meaning of the head.

    Args:
        head: what the outputs mean.
        outputs: logits, probabilities or numbers, as the head says.
        labels: classes as integers `[n, ...]` or `[n, ..., 1]`, one-hot or distributions `[n, ..., classes]`;
            independent labels 0 or 1 (probabilities count by their side of 0.5), numbers: in the shape of the outputs,
            of one column also without the last axis.
        weights: not below 0, `[n]`, `[n, ...]`, or in the shape of the labels.
        name: of the output, for messages.

    Returns:
        classes: `accuracy`, the share of positions whose class is right, and `mean_iou`, the mean over the classes that
        labels or outputs contain of intersection over union. labels: `accuracy`, the share of labels on whose side of
        0.5 the output is; `auc`, the mean over labels of the area under the ROC curve, None if no label has both
        values; `f1` of all labels together (micro). numbers: `mse` and `mae`. Shares of 1.

    Raises `InputError` for labels that do not fit or are all missing, `CheckFailed` for outputs that are not finite.
    """
    outputs = np.asarray(outputs)
    check_finite(outputs, f"The output '{name}' is")
    labels, counted = targets(head, outputs, labels, name)
    weights = _weights(weights, counted, name) * counted
    if not weights.any():
        raise InputError(
            f"Every label of the output '{name}' is missing, or has the weight 0: nothing can be measured."
        )
    if head.meaning == CLASSES:
        return _classes(outputs, labels, weights)
    if head.meaning == LABELS:
        return _labels(probabilities_of(head, outputs), labels, weights)
    errors = np.where(counted, np.asarray(outputs, np.float64) - labels, 0.0)
    return {"mse": _mean(errors**2, weights), "mae": _mean(abs(errors), weights)}


def measure_output(
    head: Head, outputs: np.ndarray, labels, weights=None, teacher=None, name: str = "output"
) -> dict[str, float]:
    """The metrics of any head: of one row of classes those of `metrics.measure`, else those of `measure_head`.

    `teacher`: the teacher's output, in the shape of `outputs`; then agreement with it too. The other arguments and the
    errors are those of `measure_head`.
    """
    if head.exclusive and not head.positions and weights is None:
        labels, counted = targets(head, outputs, labels, name)
        if not counted.any():
            raise InputError(f"Every label of the output '{name}' is missing (below 0): nothing can be measured.")
        teacher = teacher if teacher is None or np.shape(teacher) != outputs.shape else np.asarray(teacher)[counted]
        logits = logits_of_probabilities(outputs) if head.kind == "probabilities" else outputs
        return measure(logits[counted], labels[counted], teacher)
    metrics = measure_head(head, outputs, labels, weights, name)
    if teacher is None:
        return metrics
    teacher = np.asarray(teacher)
    if teacher.shape != outputs.shape:
        raise InputError(
            f"Expected teacher_logits of the shape {outputs.shape} for '{name}', received {teacher.shape}."
        )
    check_finite(teacher, f"The teacher's output '{name}' is")
    return {**metrics, "agreement": agreement_of(head, outputs, teacher, kind_of_labels(head, teacher))}


def targets(head: Head, outputs: np.ndarray, labels, name: str = "output") -> tuple[np.ndarray, np.ndarray]:
    """Labels in the shape that the outputs `[n, ..., columns]` need, and which of them are not missing (bool).

    Classes as integers `[n, ...]`, others as float64 in the outputs' shape.
    """
    labels = np.asarray(labels)
    shape, one_each = outputs.shape, outputs.shape[:-1]

    def refuse(expected: str) -> InputError:
        received = f"{labels.dtype} {labels.shape}"
        if labels.size and labels.dtype.kind in "biuf":
            received += f" from {np.nanmin(labels):g} to {np.nanmax(labels):g}"
        return InputError(f"The output '{name}' {shape} expects {expected}; received {received}.")

    if labels.dtype.kind not in "biuf":
        raise refuse("labels that are numbers")
    if head.meaning == CLASSES:
        if labels.shape == (*one_each, 1):
            labels = labels[..., 0]
        elif labels.shape == shape:
            missing = (labels < 0).any(axis=-1)
            labels = np.where(missing, -1, labels.argmax(axis=-1))
        whole = labels.dtype.kind != "f" or not (labels[~np.isnan(labels)] % 1).any()
        if labels.shape != one_each or not whole or (labels.size and labels.max() >= shape[-1]):
            raise refuse(f"classes, whole numbers {one_each} below {shape[-1]} (or one-hot {shape})")
        labels = np.where(labels >= 0, labels, -1).astype(np.int64)  # NaN too
        return labels, labels >= 0
    if labels.shape == one_each and shape[-1:] == (1,):
        labels = labels[..., None]
    if labels.shape != shape:
        raise refuse(f"labels of its shape{f' or {one_each}' if shape[-1:] == (1,) else ''}")
    labels = labels.astype(np.float64)
    counted = ~np.isnan(labels)
    if head.meaning == LABELS:
        counted &= labels >= 0
        if (labels[counted] > 1).any():
            raise refuse("labels that are 0 or 1 (below 0: missing)")
    return np.where(counted, labels, 0.0), counted


def without_hidden(labels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The labels `[n, ...]`, those at positions that a mask (bool `[n, positions]`) hides as missing ones."""
    labels = np.asarray(labels)
    if labels.dtype.kind == "f":
        return without(labels, ~mask, np.nan)
    return without(labels.astype(np.int64), ~mask, -1)


def probabilities_of(head: Head, outputs: np.ndarray) -> np.ndarray:
    """The probabilities of independent labels, float64."""
    outputs = np.asarray(outputs, np.float64)
    if head.kind == "probabilities":
        return outputs
    return np.exp(-np.logaddexp(0.0, -outputs))  # a sigmoid that does not overflow


def agreement_of(head: Head, first: np.ndarray, second: np.ndarray, kind: str | None = None) -> float | None:
    """How far two outputs of a head agree: the same class, the same side of 0.5, or Pearson's correlation.

    `kind`: of the second, where it may be another. The correlation is the mean over columns; None where no column
    varies in both.
    """
    if head.meaning != "numbers":
        other = dataclasses.replace(head, kind=kind or head.kind)
        return float(np.mean(decisions(head, first) == decisions(other, second)))
    first, second = (_columns(part) for part in (first, second))
    deviations = [part - part.mean(axis=0) for part in (first, second)]
    scales = np.sqrt((deviations[0] ** 2).sum(axis=0) * (deviations[1] ** 2).sum(axis=0))
    varies = scales > 0
    if not varies.any():
        return None
    return float(np.mean(((deviations[0] * deviations[1]).sum(axis=0))[varies] / scales[varies]))


def decisions(head: Head, outputs: np.ndarray) -> np.ndarray:
    """The predicted class `[n, ...]`, or for each label whether it is on."""
    if head.meaning == CLASSES:
        return np.asarray(outputs).argmax(axis=-1)
    return np.asarray(outputs) > (HALF if head.kind == "probabilities" else 0.0)


def kind_of_labels(head: Head, outputs: np.ndarray) -> str:
    """Whether outputs of another model for this head are logits or probabilities."""
    if head.meaning != LABELS:
        return head.kind
    return "probabilities" if outputs.min() >= 0 and outputs.max() <= 1 else "logits"


def per_example(head: Head, outputs: np.ndarray, labels, name: str = "output") -> np.ndarray:
    """The main metric of each example, `[n]`: the share of right positions or labels, or the mean squared error.

    NaN for an example whose labels are all missing.
    """
    outputs = np.asarray(outputs)
    labels, counted = targets(head, outputs, labels, name)
    if head.meaning == CLASSES:
        scores = decisions(head, outputs) == labels
    elif head.meaning == LABELS:
        scores = decisions(head, outputs) == (labels > HALF)
    else:
        scores = (np.asarray(outputs, np.float64) - labels) ** 2
    axes = tuple(range(1, counted.ndim))
    totals, counts = (scores * counted).sum(axis=axes), counted.sum(axis=axes)
    return np.where(counts > 0, totals / np.maximum(counts, 1), np.nan)


def _columns(outputs: np.ndarray) -> np.ndarray:
    outputs = np.asarray(outputs, np.float64)
    return outputs.reshape(-1, outputs.shape[-1] if outputs.ndim > 1 else 1)


def _weights(weights, counted: np.ndarray, name: str) -> np.ndarray:
    """Weights in the shape of the labels: `[n]` and `[n, ...]` count for all positions and columns behind them."""
    if weights is None:
        return np.ones(counted.shape)
    weights = np.asarray(weights, np.float64)
    fits = weights.shape == counted.shape[: weights.ndim] or weights.shape == (*counted.shape, 1)
    if not fits or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(
            f"The weights of the output '{name}' expect numbers from 0, in the shape of its labels {counted.shape} or "
            f"of its first axes; received {weights.shape}."
        )
    weights = weights[..., 0] if weights.ndim > counted.ndim else weights
    return np.broadcast_to(weights.reshape(weights.shape + (1,) * (counted.ndim - weights.ndim)), counted.shape)


def _mean(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum())


def _classes(outputs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    classes, predicted = outputs.shape[-1], outputs.argmax(axis=-1)
    counted = weights > 0
    pairs = labels[counted] * classes + predicted[counted]
    confusion = np.bincount(pairs, weights[counted], classes**2).reshape(classes, classes)
    union = confusion.sum(axis=0) + confusion.sum(axis=1) - np.diag(confusion)
    occurs = union > 0
    return {
        "accuracy": float(np.trace(confusion) / confusion.sum()),
        "mean_iou": float(np.mean(np.diag(confusion)[occurs] / union[occurs])),
    }


def _labels(probabilities: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> dict[str, float | None]:
    on, predicted = labels > HALF, probabilities > HALF
    hits, all_on = float((weights * (on & predicted)).sum()), float((weights * on).sum() + (weights * predicted).sum())
    columns = labels.shape[-1]
    areas = [
        roc_auc(*(part.reshape(-1, columns)[:, column] for part in (probabilities, on, weights)))
        for column in range(columns)
    ]
    areas = [area for area in areas if area is not None]
    return {
        "accuracy": _mean(on == predicted, weights),
        "auc": float(np.mean(areas)) if areas else None,
        "f1": 2 * hits / all_on if all_on else 0.0,
    }


def roc_auc(scores: np.ndarray, on: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """The area under the ROC curve: how probably a label that is on has the larger score; equal scores count half.

    None unless labels that are on and labels that are off have weight. All arrays are `[n]`.
    """
    weights = np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    _, place = np.unique(np.asarray(scores), return_inverse=True)
    positive, negative = (np.bincount(place, weights * side) for side in (on, ~on))
    if not positive.sum() or not negative.sum():
        return None
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))
