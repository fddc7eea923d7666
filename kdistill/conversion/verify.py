"""Compares an exported file with its model, in a process of its own, and keeps the file only if it is good enough."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdistill.conversion import graph
from kdistill.conversion.build import NAME, Built, build, write
from kdistill.conversion.float32 import Prepared
from kdistill.data.splits import Examples
from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.evaluate import predict
from kdistill.evaluation.metrics import agreement, log_softmax
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.tflite import metadata, quantization_error
from kdistill.tflite.interpreter import File, predict_isolated

SECONDS = 3600  # for all test images
METRICS = ("accuracy", "model_accuracy", "agreement", "max_difference", "images")  # of a check, written into the file


def check(
    path: str | Path,
    model_logits: np.ndarray,
    examples: Examples,
    profile: str | Profile,
    *,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    seconds: float = SECONDS,
) -> dict:
    """Compares a `.tflite` with its model on labeled images; the file runs in a process of its own, without TensorFlow.

    Args:
        path: The file.
        model_logits: `[n, classes]`, of the Keras model on the same images.
        examples: The images and labels.
        profile: The name of a profile, the path of a `.py` file with one, or a `Profile`, for its limits.
        max_drop: The accuracy that the file may lose, a share of 1. Default: the profile's.
        min_agreement: The share of images on which file and model must predict the same class. Default: the profile's.
        seconds: The time limit for all images.

    Returns:
        A dict: accuracy, model_accuracy, drop, agreement, max_difference (of logits, or of probabilities if the file
        gives those), images, max_drop, min_agreement and per_class (dicts of class, images, accuracy and
        model_accuracy, for the classes that occur).

    Raises:
        CheckFailed: The file does not run, crashes, takes too long, gives NaN or infinite numbers, or exceeds a limit.
        InputError: The profile, or the number of logits, is wrong.
    """
    profile = with_limits(load_profile(profile), max_drop, min_agreement)
    return check_against(path, model_logits, examples, profile, seconds)


def with_limits(profile: Profile, max_drop: float | None = None, min_agreement: float | None = None) -> Profile:
    """The profile with these limits instead of its own; None keeps its own."""
    limits = {"max_drop": max_drop, "min_agreement": min_agreement}
    return dataclasses.replace(profile, **{name: limit for name, limit in limits.items() if limit is not None})


def check_against(
    path: str | Path, model_logits: np.ndarray, examples: Examples, profile: Profile, seconds: float = SECONDS
) -> dict:
    """`check` with the limits of a checked profile."""
    model_logits = np.asarray(model_logits)
    if len(model_logits) != len(examples) or not len(examples):
        raise InputError(
            f"model_logits expects a row for each of {len(examples)} test images (1 or more), received "
            f"{len(model_logits)} rows."
        )
    try:
        outputs = predict_isolated(path, examples.images, seconds)
    except InputError as error:
        raise CheckFailed(f"The file for '{profile.name}' cannot be used: {error}") from None
    if outputs.shape != model_logits.shape:
        raise CheckFailed(f"The file for '{profile.name}' gives {outputs.shape}, its model {model_logits.shape}.")
    if not np.isfinite(outputs).all():
        raise CheckFailed(f"The file for '{profile.name}' gives numbers that are NaN or infinite.")
    if File(path, trusted=True).probabilities:
        model_logits = np.exp(log_softmax(model_logits))
    correct, model_correct = (rows.argmax(axis=1) == examples.labels for rows in (outputs, model_logits))
    accuracy, model_accuracy = float(np.mean(correct)), float(np.mean(model_correct))
    metrics = {
        "accuracy": accuracy,
        "model_accuracy": model_accuracy,
        "drop": model_accuracy - accuracy,
        "agreement": agreement(outputs, model_logits),
        "max_difference": float(np.max(abs(outputs - model_logits))),
        "images": len(examples),
        "max_drop": profile.max_drop,
        "min_agreement": profile.min_agreement,
        "per_class": _per_class(examples.labels, correct, model_correct),
    }
    _check_limits(metrics, profile.name)
    return metrics


def export_checked(
    student: Prepared,
    folder: Path,
    profile: Profile,
    calibration: np.ndarray | None,
    examples: Examples,
    model_logits: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
) -> dict:
    """Exports to `folder`/student.tflite, but only if the file passes `check`.

    Args:
        student: The student; prepare it once for all profiles.
        folder: A folder, which is created. If the check fails, it stays as it was.
        profile: A checked profile, such as `load_profile` returns.
        calibration: Training images, see `export`.
        examples: Test images with labels.
        model_logits: Of the student on the test images; by default the float32 model computes them.
        class_names, about: See `export`.

    Returns:
        The dict of `export`, with the dict of `check` as `check`. Its metrics are also in the file.

    Raises:
        CheckFailed: The file is not good enough. For int8 the message names the layers that cost most.
        InputError: As for `export`.
    """
    if model_logits is None:
        model_logits = predict(graph.with_normalization(student.model, profile), examples.images)
    built = build(student, profile, calibration, class_names, about)
    return write_checked(built, folder, student, model_logits, examples)


def write_checked(built: Built, folder: Path, student: Prepared, model_logits: np.ndarray, examples: Examples) -> dict:
    """Writes what was built of a student into `folder` if it passes `check`; see `export_checked`."""
    profile = built.profile
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".part-{folder.name}-") as part:
        path = Path(part, NAME)
        write(built, path)
        content = path.read_bytes()
        try:
            metrics = check_against(path, model_logits, examples, profile)
        except CheckFailed as error:
            quantized = profile.quantization in ("int8", "dynamic")
            raise CheckFailed(f"{error}{_costly_layers(student, built, path, examples) if quantized else ''}") from None
        report = write(built, path, {name: metrics[name] for name in METRICS})
        if metadata.bare(path.read_bytes()) != metadata.bare(content):
            raise CheckFailed(
                f"The file for '{profile.name}' changed when its metrics were written into it. This is a bug of "
                "kdistill: please report it."
            )
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(part).iterdir()):
            os.replace(file, folder / file.name)
    return {**report, "path": str(folder / NAME), "check": metrics}


def _costly_layers(student: Prepared, built: Built, path: Path, examples: Examples) -> str:
    """A sentence with the layers whose quantization costs most; empty if the file does not even run."""
    plain = dataclasses.replace(
        built.profile,
        quantization="none",
        input_type="float32",
        output_type="float32",
        operators="builtin",
        c_array=False,
    )
    reference = path.with_name("reference.tflite")
    try:
        reference.write_bytes(build(student, plain).content)
        rows = quantization_error.compare(path, reference, examples.images)
    except InputError:
        return ""
    finally:
        reference.unlink(missing_ok=True)
    return f" Most of the loss comes from: {quantization_error.sentence(rows)}."


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


def _check_limits(metrics: dict, name: str) -> None:
    exceeded = []
    if metrics["drop"] > metrics["max_drop"] + 1e-9:
        exceeded.append(
            f"accuracy fell from {metrics['model_accuracy']:.2%} to {metrics['accuracy']:.2%} "
            f"(limit: {100 * metrics['max_drop']:g} points)"
        )
    if metrics["agreement"] < metrics["min_agreement"] - 1e-9:
        exceeded.append(
            f"it agrees with its model on {metrics['agreement']:.2%} (limit: {metrics['min_agreement']:.2%})"
        )
    if exceeded:
        raise CheckFailed(
            f"The file for '{name}' is not good enough on {metrics['images']:,} test images: {'; '.join(exceeded)}. "
            "Use a profile with less quantization or with wider limits, or better calibration images."
        )
