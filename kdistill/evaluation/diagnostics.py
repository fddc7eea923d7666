"""What explains a model's accuracy: calibration, confusion, entropy of its soft labels, dead units. Plain dicts.

Everything but `dead_units`, which runs a Keras model, works on arrays.
"""

from typing import TYPE_CHECKING

import numpy as np

from kdistill.evaluation.metrics import calibration_error, confidence_bins, log_softmax

if TYPE_CHECKING:
    import keras


DEAD_UNIT_IMAGES = 2000  # test images on which a unit has to be active at least once
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0  # bounds of the fit: without any mistake the best temperature is 0


def diagnose(
    logits: np.ndarray, labels: np.ndarray, teacher_logits: np.ndarray | None = None, temperature: float = 1.0
) -> dict:
    """Reliability, confusion, per-class accuracy and entropy of logits `[n, classes]` on labels `[n]`; JSON-ready.

    - reliability: see `reliability`.
    - confusion: counts, rows the true class, columns the predicted class.
    - per_class: accuracy by true class, None for a class without an image.
    - entropy: the mean entropy of the softmax at temperature 1, in nats.
    - entropy_at: `{"temperature", "entropy"}`, if `temperature` is not 1: the entropy of the soft labels.
    - agreement_per_class, with `teacher_logits`: by true class, the share of images for which model and teacher
      predict the same class.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    classes = logits.shape[1]
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    diagnostics = {
        "reliability": reliability(logits, labels),
        "confusion": confusion.tolist(),
        "per_class": _means(predicted == labels, labels, classes),
        "entropy": entropy(logits),
    }
    if temperature != 1:
        diagnostics["entropy_at"] = {"temperature": temperature, "entropy": entropy(logits, temperature)}
    if teacher_logits is not None:
        same = predicted == np.asarray(teacher_logits).argmax(axis=1)
        diagnostics["agreement_per_class"] = _means(same, labels, classes)
    return diagnostics


def _means(values: np.ndarray, groups: np.ndarray, number: int) -> list[float | None]:
    """The mean of the values by group `0` to `number - 1`, None where a group is empty."""
    counts = np.bincount(groups, minlength=number)
    sums = np.bincount(groups, weights=values, minlength=number)
    return [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]


def reliability(logits: np.ndarray, labels: np.ndarray) -> dict[str, list]:
    """The reliability diagram: `confidence`, `accuracy` and `count` by bin, for 15 bins of equal width by confidence.

    Means over the images of a bin, None where it is empty. A confidence on an edge belongs to the lower bin, as in ECE.
    """
    logs = log_softmax(logits)
    confidence, correct = np.exp(logs.max(axis=1)), logs.argmax(axis=1) == labels
    bins, number = confidence_bins(confidence)
    return {
        "confidence": _means(confidence, bins, number),
        "accuracy": _means(correct, bins, number),
        "count": np.bincount(bins, minlength=number).tolist(),
    }


def entropy(logits: np.ndarray, temperature: float = 1.0) -> float:
    """The mean entropy of `softmax(logits / temperature)` in nats: 0 for one-hot, ln(classes) for uniform outputs."""
    logs = log_softmax(np.asarray(logits, np.float64) / temperature)
    return float(np.mean(-(np.exp(logs) * logs).sum(axis=1)))


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """The mean of `-log softmax(logits / temperature)[label]`, in nats."""
    logs = log_softmax(np.asarray(logits, np.float64) / temperature)
    return float(-np.mean(logs[np.arange(len(labels)), labels]))


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature with the least negative log-likelihood, between 0.05 and 20 (Guo et al. 2017, arXiv 1706.04599).

    It does not change the predicted classes. The likelihood is convex in 1/T, so its derivative has one root.
    """
    from scipy.optimize import brentq  # here, because scipy takes a second to import

    logits = np.asarray(logits, np.float64)
    label_logits = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:  # of the negative log-likelihood over 1/T
        probabilities = np.exp(log_softmax(logits * inverse))
        return float(np.mean((probabilities * logits).sum(axis=1) - label_logits))

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    if slope(low) >= 0:
        return MAX_TEMPERATURE
    if slope(high) <= 0:
        return MIN_TEMPERATURE
    return 1 / brentq(slope, low, high, xtol=1e-15)


def temperature_scaling(validation: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray]) -> dict:
    """Calibration before and after temperature scaling; both arguments are (logits, labels).

    The temperature is fitted on `validation`; nll, ece and reliability are those of `test`. `at_bound` is True if no
    temperature between the bounds is best.
    """
    temperature = fit_temperature(*validation)
    logits, labels = test
    scaling = {"temperature": temperature, "at_bound": temperature in (MIN_TEMPERATURE, MAX_TEMPERATURE)}
    for name, divisor in (("before", 1.0), ("after", temperature)):
        scaled = np.asarray(logits, np.float64) / divisor
        scaling[name] = {
            "nll": negative_log_likelihood(scaled, labels),
            "ece": calibration_error(log_softmax(scaled), labels),
            "reliability": reliability(scaled, labels),
        }
    return scaling


def teacher_advantage(teacher: np.ndarray, control: np.ndarray, student: np.ndarray) -> dict:
    """What the teacher knows and the control does not, and how much of it the student has.

    Args:
        teacher: whether the teacher classifies each of n examples correctly, bool `[n]`.
        control, student: the same for the models of each seed, bool `[seeds, n]`.

    Returns:
        Numbers of examples, means over the seeds: `ahead` (the teacher is right, the control wrong), `learned` (of
        these the student is right), `behind` (the control is right, the teacher wrong), `lost` (of these the student
        is wrong); and all of it as `sentence`.
    """
    ahead, behind = teacher & ~control, control & ~teacher
    values = {"ahead": ahead, "learned": ahead & student, "behind": behind, "lost": behind & ~student}
    counts = {name: float(value.sum(axis=1).mean()) for name, value in values.items()}
    said = {name: f"{count:,.1f}".removesuffix(".0") for name, count in counts.items()}
    each = " (means over the seeds)" if len(control) > 1 else ""
    sentence = (
        f"Of {len(teacher):,} test examples the teacher classifies {said['ahead']} correctly that the control does "
        f"not, and the student {said['learned']} of these. The control classifies {said['behind']} correctly that the "
        f"teacher does not; of these the student gets {said['lost']} wrong{each}."
    )
    return {**counts, "sentence": sentence}


def dead_units(model: "keras.Model", images: np.ndarray, batch_size: int = 256) -> dict:
    """Units behind a ReLU that are not active for any of the images: they compute nothing and learn nothing.

    A unit is a channel of a convolution (active anywhere) or a unit of a dense layer. Leaky units are never dead.
    Returns `{"layers": {name: {"units", "dead"}}, "share", "images", "skipped"}`. `share` is None if there is no ReLU.
    `skipped` names the layers inside nested or subclassed models, whose outputs are not available.
    """
    import keras

    from kdistill.networks.keras_internals import layers_of

    inputs = getattr(model, "inputs", None) or []  # a subclassed model has none
    relu_layers = [layer for layer in model.layers if _is_relu(layer)] if len(inputs) == 1 else []
    ids = {id(layer) for layer in relu_layers}
    skipped = [layer.name for layer in layers_of(model) if _is_relu(layer) and id(layer) not in ids]
    active = [np.zeros(layer.output.shape[-1], bool) for layer in relu_layers]
    if relu_layers:
        activations = keras.Model(inputs[0], {str(place): layer.output for place, layer in enumerate(relu_layers)})
        for start in range(0, len(images), batch_size):
            outputs = activations(images[start : start + batch_size].astype(np.float32), training=False)
            for place, flags in enumerate(active):  # of a list with one output, Keras returns the output
                values = keras.ops.convert_to_numpy(outputs[str(place)])
                flags |= (values > 0).reshape(-1, values.shape[-1]).any(axis=0)
    layers = {
        layer.name: {"units": len(flags), "dead": int((~flags).sum())}
        for layer, flags in zip(relu_layers, active, strict=True)
    }
    units = sum(counts["units"] for counts in layers.values())
    dead = sum(counts["dead"] for counts in layers.values())
    return {"layers": layers, "share": dead / units if units else None, "images": len(images), "skipped": skipped}


def _is_relu(layer) -> bool:
    import keras

    if isinstance(layer, keras.layers.ReLU):
        return not layer.negative_slope
    return getattr(layer, "activation", None) in (keras.activations.relu, keras.activations.relu6)


def diagnose_models(
    models: dict, splits, temperature: float, logits: dict, validation_logits: np.ndarray
) -> dict[str, dict]:
    """The diagnostics of a run's models, by name.

    `logits` are those of every model on the test images; `validation_logits` are the teacher's on the validation
    images, on which its temperature scaling is fitted. The teacher's entropy is also that at `temperature`.
    """
    test, validation = splits.test, splits.validation
    diagnostics = {}
    for name, model in models.items():
        is_teacher = name == "teacher"
        teacher_logits = None if is_teacher else logits.get("teacher")
        diagnostics[name] = diagnose(logits[name], test.labels, teacher_logits, temperature if is_teacher else 1.0)
        diagnostics[name]["dead_units"] = dead_units(model, test.images[:DEAD_UNIT_IMAGES])
        if is_teacher:
            diagnostics[name]["scaling"] = temperature_scaling(
                (validation_logits, validation.labels), (logits[name], test.labels)
            )
    return diagnostics
