"""The numbers of a file against those of its model: for one row of exclusive classes, and for every other head."""

from collections.abc import Mapping

import numpy as np

from kdistill.errors import InputError
from kdistill.evaluation import chance
from kdistill.evaluation.head_metrics import agreement_of, decisions, per_example, probabilities_of, targets
from kdistill.evaluation.metrics import log_softmax
from kdistill.networks.heads import LABELS, NUMBERS, Head
from kdistill.recipe import Profile

NEAR = 0.05  # of their range: numbers agree if they differ by no more
EMPTY = ("accuracy", "model_accuracy", "drop", "lost", "gained", "p_drop", "per_class")


def compare_classes(
    outputs: np.ndarray, model_logits: np.ndarray, same: np.ndarray, labels: np.ndarray | None, profile: Profile
) -> dict:
    """The metrics of `check` for rows `[n, classes]`; `same`: for which examples file and model agree."""
    images, same = len(outputs), int(same.sum())
    metrics = dict.fromkeys(EMPTY)
    labeled = None if labels is None else labels >= 0
    if labeled is not None and labeled.any():
        labels = labels[labeled]
        if labels.max() >= outputs.shape[1]:
            raise InputError(
                f"The labels go up to {labels.max()}, but the model has {outputs.shape[1]} classes. Labels start at 0."
            )
        correct, model_correct = (rows.argmax(axis=1)[labeled] == labels for rows in (outputs, model_logits))
        lost, gained = int((model_correct & ~correct).sum()), int((correct & ~model_correct).sum())
        metrics |= {
            "accuracy": float(correct.mean()),
            "model_accuracy": float(model_correct.mean()),
            "drop": float(model_correct.mean()) - float(correct.mean()),
            "lost": lost,
            "gained": gained,
            "p_drop": chance.drop_p_value(lost, gained, len(labels), profile.max_drop),
            "per_class": _per_class(labels, correct, model_correct),
        }
    return metrics | {
        "agreement": same / images,
        "same": same,
        "max_difference": float(np.max(abs(outputs - model_logits))),
        "images": images,
        "max_drop": profile.max_drop,
        "min_agreement": profile.min_agreement,
        "p_agreement": chance.agreement_p_value(same, images, profile.min_agreement),
        "note": None,
        "resolution": chance.resolution(images, profile.max_drop, profile.min_agreement),
    }


def compare_heads(
    outputs: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    heads: Mapping[str, Head],
    labels: Mapping[str, np.ndarray],
    profile: Profile,
) -> dict:
    """The metrics of `check` for outputs of any heads by name, with those of each output in `heads`.

    Without positions, one output of exclusive classes is compared as by `compare_classes`. Of several outputs, the
    lowest agreement and the largest drop are those of the file.
    """
    rows = {
        name: _compare(name, outputs[name], expected[name], heads[name], labels.get(name), profile) for name in heads
    }
    first = next(iter(rows.values()))
    if len(rows) == 1 and "same" in first:
        return first
    drops = [row for row in rows.values() if row["drop"] is not None]
    worst = max(drops, key=lambda row: row["drop"]) if drops else dict.fromkeys(EMPTY)
    least = min(rows.values(), key=lambda row: row["agreement"])
    one = len(rows) == 1
    return dict.fromkeys(EMPTY) | {
        "accuracy": first.get("accuracy") if one else None,
        "model_accuracy": first.get("model_accuracy") if one else None,
        "drop": worst["drop"],
        "p_drop": worst["p_drop"],
        "agreement": least["agreement"],
        "same": None,
        "max_difference": max(row["max_difference"] for row in rows.values()),
        "images": len(next(iter(outputs.values()))),
        "max_drop": profile.max_drop,
        "min_agreement": profile.min_agreement,
        "p_agreement": least["p_agreement"],
        "note": None,
        "resolution": "The tests compare the means over the examples, whose positions are not independent.",
        "heads": rows,
    }


def _compare(name: str, outputs, expected, head: Head, labels, profile: Profile) -> dict:
    if head.exclusive and not head.positions:
        labels = None if labels is None else targets(head, outputs, labels, name)[0]
        same = outputs.argmax(axis=1) == expected.argmax(axis=1)
        return compare_classes(outputs, expected, same, labels, profile)
    examples = len(outputs)
    if head.exclusive:
        same = (decisions(head, outputs) == decisions(head, expected)).reshape(examples, -1).mean(axis=1)
    else:
        near = _near(outputs, expected, head).all(axis=-1) if head.shape else _near(outputs, expected, head)
        same = near.reshape(examples, -1).mean(axis=1)  # over positions, if there are any
    row = {
        "metric": "r2" if head.meaning == NUMBERS else "accuracy",
        **dict.fromkeys(("accuracy", "model_accuracy", "drop", "p_drop")),
        "agreement": float(same.mean()),
        "p_agreement": mean_p_value(1 - same, 1 - profile.min_agreement),
        "max_difference": float(np.max(abs(outputs - expected))),
    }
    if not head.exclusive:
        row["correlation" if head.meaning == NUMBERS else "same_side"] = agreement_of(head, outputs, expected)
    return row if labels is None else row | _loss(name, outputs, expected, head, labels, profile)


def _near(outputs, expected, head: Head) -> np.ndarray:
    """Which numbers differ by no more than 5 % of their range: of a label's probability 1, of numbers that of a column.

    Probabilities may be on the same side of 0.5 and have nothing to do with each other.
    """
    if head.meaning == LABELS:
        return abs(probabilities_of(head, outputs) - probabilities_of(head, expected)) <= NEAR
    columns = expected.reshape(-1, head.shape[-1] if head.shape else 1)
    return abs(outputs - expected) <= NEAR * np.maximum(np.ptp(columns, axis=0), 1e-30).reshape(head.shape[-1:])


def _loss(name: str, outputs, expected, head: Head, labels, profile: Profile) -> dict:
    """What the file loses on labels: of the accuracy, or of the share of variance that numbers explain (R^2)."""
    scores, before = (per_example(head, part, labels, name) for part in (outputs, expected))
    labeled = ~np.isnan(scores)
    if not labeled.any():
        return {}
    scores, before, scale = scores[labeled], before[labeled], -1.0
    if head.meaning == NUMBERS:
        values, counted = targets(head, outputs, labels, name)
        variance = float(np.var(values[counted]))
        if not variance:
            return {}
        scores, before, scale = scores / variance, before / variance, 1.0
    losses = scale * (scores - before)
    row = {"drop": float(losses.mean()), "p_drop": mean_p_value(losses, profile.max_drop)}
    names = ("r2", "model_r2") if head.meaning == NUMBERS else ("accuracy", "model_accuracy")
    values = [1 - part.mean() if head.meaning == NUMBERS else part.mean() for part in (scores, before)]
    return row | dict(zip(names, map(float, values), strict=True))


def mean_p_value(values: np.ndarray, limit: float) -> float:
    """P(a mean at least as large as that of these values), if the true mean were exactly `limit`: a one-sided t-test.

    1 for a single value, which shows no spread.
    """
    from scipy.stats import t  # here, because scipy takes a second to import

    count, distance = len(values), float(np.mean(values)) - limit
    if count < 2 or distance <= 0:
        return 1.0
    error = float(np.std(values, ddof=1)) / count**0.5
    return float(t.sf(distance / error, count - 1)) if error else 0.0


def exceeded(metrics: dict) -> tuple[list[str], list[str]]:
    """The limits that are exceeded, in words: those beyond chance, and the others."""
    significant, others = [], []
    for name, row in (metrics.get("heads") or {"": metrics}).items():
        for text, p_value in _exceeded(row | {key: metrics[key] for key in ("max_drop", "min_agreement")}):
            text = f"'{name}': {text}" if name and len(metrics["heads"]) > 1 else text
            (significant if p_value <= chance.LEVEL else others).append(text)
    return significant, others


def _exceeded(row: dict):
    drop, agreement = row["drop"], row["agreement"]
    if drop is not None and drop > row["max_drop"] + 1e-9:
        if row.get("metric") == "r2":
            fell = f"R^2 fell from {row['model_r2']:.4f} to {row['r2']:.4f}"
        else:
            fell = f"accuracy fell from {row['model_accuracy']:.2%} to {row['accuracy']:.2%}"
        counts = f"{row['lost']:,} images lost, {row['gained']:,} gained; " if row.get("lost") is not None else ""
        yield f"{fell} ({counts}limit: {100 * row['max_drop']:g} points, p = {row['p_drop']:.2g})", row["p_drop"]
    if agreement < row["min_agreement"] - 1e-9:
        yield (
            f"it agrees with its model on {agreement:.2%} (limit: {row['min_agreement']:.2%}, "
            f"p = {row['p_agreement']:.2g})",
            row["p_agreement"],
        )


def as_in_file(outputs: Mapping[str, np.ndarray], heads: Mapping[str, Head], in_file: Mapping[str, Head]) -> dict:
    """The outputs of a model as its file gives them: a profile may add a softmax or a sigmoid to a single one."""
    if list(heads.values()) == list(in_file.values()):
        return dict(zip(in_file, outputs.values(), strict=True))
    ((_, head),), ((name, _),) = heads.items(), in_file.items()
    numbers = next(iter(outputs.values()))
    if head.meaning == LABELS:
        return {name: np.exp(-np.logaddexp(0.0, -numbers.astype(np.float64)))}
    rows = np.exp(log_softmax(numbers.reshape(-1, numbers.shape[-1])))
    return {name: rows.reshape(numbers.shape)}


def check_model_outputs(outputs: Mapping[str, np.ndarray]) -> None:
    """Raises `InputError` for a model whose outputs are not finite, so that no file can be compared with it."""
    for name, numbers in outputs.items():
        broken = int((~np.isfinite(numbers.reshape(len(numbers), -1))).any(axis=1).sum())
        if broken:
            raise InputError(
                f"The output '{name}' of the Keras model is NaN or infinite for {broken:,} of {len(numbers):,} "
                "examples, so that no file can be compared with it. Look for log, sqrt or a division in it that "
                "receives 0 or less."
            )


def _per_class(labels: np.ndarray, correct: np.ndarray, model_correct: np.ndarray) -> list[dict]:
    return [
        {
            "class": int(label),
            "images": int((labels == label).sum()),
            "accuracy": float(correct[labels == label].mean()),
            "model_accuracy": float(model_correct[labels == label].mean()),
        }
        for label in np.unique(labels)
    ]
