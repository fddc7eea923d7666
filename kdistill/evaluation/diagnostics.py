"""What stands behind a model's accuracy: calibration, confusion, entropy of its soft labels, dead units. Plain dicts.

NumPy alone, but for `dead_units`, which runs a Keras model.
"""

from typing import TYPE_CHECKING

import numpy as np

from kdistill.evaluation.metrics import BINS, calibration_error, log_softmax

if TYPE_CHECKING:
    import keras


LOOKED_AT = 2000  # images on which a unit has to be active at least once
COLDEST, HOTTEST = 0.05, 20.0  # bounds of a fitted temperature: with no mistake to learn from it would run to 0


def diagnose(
    logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None = None, temperature: float = 1.0
) -> dict:
    """Reliability, confusion, per-class accuracy and entropy of logits `[n, classes]` on labels `[n]`; JSON-ready.

    reliability: see `reliability`. confusion: counts, rows the true class, columns the named one. per_class: accuracy
    by true class, None for a class without an image. entropy: the mean entropy of the softmax at temperature 1, in
    nats; with `temperature` other than 1 also entropy_at, `{"temperature", "entropy"}`: what the student is shown.
    With `teacher_logits` also agreement_per_class: by true class, the share on which model and teacher name the same.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    classes = logits.shape[1]
    named = logits.argmax(axis=1)
    confusion = np.bincount(labels * classes + named, minlength=classes**2).reshape(classes, classes)
    found = {
        "reliability": reliability(logits, labels),
        "confusion": confusion.tolist(),
        "per_class": _by_class(named == labels, labels, classes),
        "entropy": entropy(logits),
    }
    if temperature != 1:
        found["entropy_at"] = {"temperature": temperature, "entropy": entropy(logits, temperature)}
    if teacher_logits is not None:
        same = named == np.asarray(teacher_logits).argmax(axis=1)
        found["agreement_per_class"] = _by_class(same, labels, classes)
    return found


def _by_class(hits: np.ndarray, labels: np.ndarray, classes: int) -> list[float | None]:
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=hits, minlength=classes)
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def reliability(logits: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """The reliability diagram: `confidence`, `accuracy` and `count` of each of 15 bins of equal width by confidence.

    Means of the images in the bin, None where it is empty; a confidence on an edge is in the lower bin (as in ECE).
    """
    logs = log_softmax(logits)
    confidence, right = np.exp(logs.max(axis=1)), logs.argmax(axis=1) == labels
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)

    def means(values: np.ndarray) -> list[float | None]:
        sums = np.bincount(bins, weights=values, minlength=BINS)
        return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]

    return {"confidence": means(confidence), "accuracy": means(right), "count": counts.tolist()}


def entropy(logits: np.ndarray, temperature: float = 1.0) -> float:
    """The mean entropy of `softmax(logits / temperature)` in nats: 0 is one class alone, ln(classes) is no idea."""
    logs = log_softmax(np.asarray(logits, np.float64) / temperature)
    return float(np.mean(-(np.exp(logs) * logs).sum(axis=1)))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """The mean of `-log softmax(logits / temperature)[label]`, in nats."""
    logs = log_softmax(np.asarray(logits, np.float64) / temperature)
    return float(-np.mean(logs[np.arange(len(labels)), labels]))


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature at which the negative log-likelihood is smallest (Guo et al. 2017, arXiv 1706.04599).

    The likelihood is convex in 1/T: its derivative is bisected between the bounds 0.05 and 20. It changes no class.
    """
    logits = np.asarray(logits, np.float64)
    own = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:  # of the negative log-likelihood over 1/T
        probabilities = np.exp(log_softmax(logits * inverse))
        return float(np.mean((probabilities * logits).sum(axis=1) - own))

    low, high = 1 / HOTTEST, 1 / COLDEST
    if slope(low) >= 0:
        return HOTTEST
    if slope(high) <= 0:
        return COLDEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def scaling(fit_on: tuple[np.ndarray, np.ndarray], measure_on: tuple[np.ndarray, np.ndarray]) -> dict:
    """Calibration before and after temperature scaling; both arguments are (logits, labels).

    The temperature is fitted on the first (validation), nll, ece and reliability are of the second (test).
    """
    temperature = fitted_temperature(*fit_on)
    logits, labels = measure_on
    found = {"temperature": temperature, "at_bound": temperature in (COLDEST, HOTTEST)}
    for name, t in (("before", 1.0), ("after", temperature)):
        scaled = np.asarray(logits, np.float64) / t
        found[name] = {
            "nll": negative_log_likelihood(scaled, labels),
            "ece": calibration_error(log_softmax(scaled), labels),
            "reliability": reliability(scaled, labels),
        }
    return found


def dead_units(model: "keras.Model", images: np.ndarray, batch_size: int = 256) -> dict:
    """Units behind a ReLU that are not active for any of the images: they compute nothing, and learn nothing.

    A unit is a channel of a convolution (active anywhere) or a unit of a dense layer. Leaky units are never dead.
    Returns `{"layers": {name: {"units", "dead"}}, "share", "images", "left_out"}`; `share` is None where there is no
    ReLU, `left_out` names layers inside of nested or subclassed models, which have no outputs to look at.
    """
    import keras

    inputs = getattr(model, "inputs", None) or []  # a subclassed model has none
    seen = [layer for layer in model.layers if _is_relu(layer)] if len(inputs) == 1 else []
    within = {id(layer) for layer in seen}
    left_out = [layer.name for layer in model._flatten_layers() if _is_relu(layer) and id(layer) not in within]
    active = [np.zeros(layer.output.shape[-1], bool) for layer in seen]
    if seen:
        outputs = keras.Model(inputs[0], [layer.output for layer in seen])
        for start in range(0, len(images), batch_size):
            found = outputs(images[start : start + batch_size].astype(np.float32), training=False)
            for flags, values in zip(active, found, strict=True):
                values = keras.ops.convert_to_numpy(values)
                flags |= (values > 0).reshape(-1, values.shape[-1]).any(axis=0)
    layers = {
        layer.name: {"units": len(flags), "dead": int((~flags).sum())}
        for layer, flags in zip(seen, active, strict=True)
    }
    units = sum(each["units"] for each in layers.values())
    dead = sum(each["dead"] for each in layers.values())
    return {
        "layers": layers,
        "share": dead / units if units else None,
        "images": len(images),
        "left_out": left_out,
    }


def _is_relu(layer) -> bool:
    import keras

    if isinstance(layer, keras.layers.ReLU):
        return not layer.negative_slope
    return getattr(layer, "activation", None) in (keras.activations.relu, keras.activations.relu6)


def of_run(models: dict, splits, temperature: float, logits: dict, validation_logits: np.ndarray) -> dict[str, dict]:
    """The diagnostics of a run's models on its test images: their `logits` by name; on validation the teacher's only.

    The teacher's also hold the entropy at the recipe's temperature and `scaling`, fitted on validation.
    """
    test, validation = splits.test, splits.validation
    found = {}
    for name, model in models.items():
        is_teacher = name == "teacher"
        known = None if is_teacher else logits.get("teacher")
        found[name] = diagnose(logits[name], test.labels, known, temperature if is_teacher else 1.0)
        found[name]["dead_units"] = dead_units(model, test.images[:LOOKED_AT])
        if is_teacher:
            found[name]["scaling"] = scaling((validation_logits, validation.labels), (logits[name], test.labels))
    return found
