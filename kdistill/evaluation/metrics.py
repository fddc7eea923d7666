"""Numbers that say what a model is worth, from its logits and the labels. NumPy alone."""

import numpy as np

from kdistill.errors import CheckFailed, InputError
from kdistill.networks.heads import logits_of_probabilities

BINS = 15  # of the calibration error


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities `[n, classes]`, float64, of logits of any size."""
    shifted = np.asarray(logits, np.float64) - np.max(logits, axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def top_k(logits: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of rows whose label is among the k largest logits; of equal logits the lower class counts as larger."""
    own = logits[np.arange(len(labels)), labels][:, None]
    before = np.arange(logits.shape[1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    return float(np.mean(rank < k))


def calibration_error(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The expected calibration error of Guo et al. 2017 (arXiv 1706.04599), as a share of 1.

    15 bins of equal width by the confidence in the predicted class; the mean of |accuracy - confidence| over the bins,
    weighted by how many rows are in each. A confidence on an edge is in the lower bin.
    """
    confidence = np.exp(log_probabilities.max(axis=1))
    right = log_probabilities.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    gaps = np.bincount(bins, weights=right - confidence, minlength=BINS)
    return float(abs(gaps).sum() / len(labels))


def measure(
    logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None = None, probabilities: bool = False
) -> dict[str, float]:
    """accuracy, top5 and ece of logits `[n, classes]` on labels `[n]`; with teacher_logits also agreement and kl.

    `probabilities`: the rows of `logits` are distributions already. top5 is 1 where there are fewer than 6 classes,
    agreement is the share of rows in which model and teacher name the same class, kl the mean KL(teacher || model) at
    temperature 1, in nats.
    Raises `InputError` for shapes and labels that do not fit, `CheckFailed` for numbers that are not finite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise InputError(f"Expected logits [n, classes] and labels [n], received {logits.shape} and {labels.shape}.")
    classes = logits.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"Labels are whole numbers from 0 to {classes - 1}, the model's classes; received {labels.dtype} from "
            f"{labels.min()} to {labels.max()}. Evaluate on the data set that the model was trained for."
        )
    _check_finite(logits, "The model's outputs")
    logs = log_softmax(logits_of_probabilities(logits) if probabilities else logits)
    found = {
        "accuracy": float(np.mean(logits.argmax(axis=1) == labels)),
        "top5": top_k(logits, labels, 5),
        "ece": calibration_error(logs, labels),
    }
    if teacher_logits is None:
        return found
    teacher_logits = np.asarray(teacher_logits)
    if teacher_logits.shape != logits.shape:
        raise InputError(f"teacher_logits expects the shape {logits.shape}, received {teacher_logits.shape}.")
    _check_finite(teacher_logits, "The teacher's outputs")
    teacher_logs = log_softmax(teacher_logits)
    found["agreement"] = agreement(logits, teacher_logits)
    found["kl"] = float(np.mean((np.exp(teacher_logs) * (teacher_logs - logs)).sum(axis=1)))
    return found


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Share of rows in which both name the same class."""
    return float(np.mean(first.argmax(axis=1) == second.argmax(axis=1)))


def _check_finite(outputs: np.ndarray, what: str) -> None:
    broken = int((~np.isfinite(outputs)).any(axis=1).sum())
    if broken:
        raise CheckFailed(f"{what} are not finite (NaN or infinite) for {broken:,} of {len(outputs):,} images.")
