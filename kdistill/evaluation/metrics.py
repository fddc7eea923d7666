"""The metrics of a classifier, from its logits and the labels. NumPy alone."""

import numpy as np

from kdistill.errors import CheckFailed, InputError
from kdistill.networks.heads import logits_of_probabilities

BINS = 15  # of the calibration error


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities `[n, classes]`, float64, of logits of any size."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """The share of rows whose label is among the k largest logits; of equal logits the lower class ranks first."""
    label_logits = logits[np.arange(len(labels)), labels][:, None]
    lower_class = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > label_logits) | ((logits == label_logits) & lower_class)).sum(axis=1)
    return float(np.mean(rank < k))


def confidence_bins(confidence: np.ndarray) -> tuple[np.ndarray, int]:
    """The bin of each confidence, and the number of bins: 15 of equal width; an edge belongs to the lower bin."""
    return np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1), BINS


def calibration_error(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error of Guo et al. 2017 (arXiv 1706.04599), as a share of 1.

    The mean of |accuracy - confidence in the predicted class| over the bins, weighted by their number of rows.
    """
    confidence = np.exp(log_probabilities.max(axis=1))
    correct = log_probabilities.argmax(axis=1) == labels
    bins, number = confidence_bins(confidence)
    gaps = np.bincount(bins, weights=correct - confidence, minlength=number)
    return float(abs(gaps).sum() / len(labels))


def measure(
    logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None = None, probabilities: bool = False
) -> dict[str, float]:
    """accuracy, top5 and ece of logits on labels; with `teacher_logits` also agreement and kl.

    Args:
        logits: `[n, classes]`.
        labels: integers `[n]`.
        teacher_logits: `[n, classes]`.
        probabilities: True if the rows of `logits` are probabilities already.

    Returns shares of 1, and kl: the mean KL(teacher || model) at temperature 1, in nats. top5 is 1 for up to 5
    classes; agreement is the share of rows for which model and teacher predict the same class.

    Raises `InputError` for shapes and labels that do not fit, `CheckFailed` for outputs that are not finite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise InputError(
            f"Expected logits [n, classes] with 2 classes or more, and labels [n]; received {logits.shape} and "
            f"{labels.shape}."
        )
    classes = logits.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"Expected labels that are whole numbers from 0 to {classes - 1}, the model's classes; received "
            f"{labels.dtype} from {labels.min()} to {labels.max()}. Evaluate on the data set of the model's training."
        )
    check_finite(logits, "The model's outputs are", "images")
    logs = log_softmax(logits_of_probabilities(logits) if probabilities else logits)
    metrics = {
        "accuracy": float(np.mean(logits.argmax(axis=1) == labels)),
        "top5": top_k(logits, labels, 5),
        "ece": calibration_error(logs, labels),
    }
    if teacher_logits is None:
        return metrics
    teacher_logits = np.asarray(teacher_logits)
    if teacher_logits.shape != logits.shape:
        raise InputError(f"Expected teacher_logits of the shape {logits.shape}, received {teacher_logits.shape}.")
    check_finite(teacher_logits, "The teacher's outputs are", "images")
    teacher_logs = log_softmax(teacher_logits)
    metrics["agreement"] = agreement(logits, teacher_logits)
    metrics["kl"] = float(np.mean((np.exp(teacher_logs) * (teacher_logs - logs)).sum(axis=1)))
    return metrics


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """The share of rows for which both logits `[n, classes]` predict the same class."""
    return float(np.mean(first.argmax(axis=1) == second.argmax(axis=1)))


def check_finite(outputs: np.ndarray, subject: str, examples: str = "examples") -> None:
    """Raises `CheckFailed` for outputs `[n, ...]` with NaN or infinite numbers. `subject` ends in "is" or "are"."""
    rows = outputs.reshape(len(outputs), -1)
    broken = int((~np.isfinite(rows)).any(axis=1).sum())
    if broken:
        raise CheckFailed(f"{subject} not finite (NaN or infinite) for {broken:,} of {len(rows):,} {examples}.")
