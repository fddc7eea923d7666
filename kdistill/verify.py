"""Whether an exported file is as good as its model: run where it can do no harm, and put in place only if it is."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from kdistill import convert
from kdistill.data import Examples
from kdistill.errors import CheckFailed, InputError
from kdistill.evaluate import predict
from kdistill.export import NAME, checked_profile, export
from kdistill.litert import File, predict_apart
from kdistill.loading import load_profile
from kdistill.measure import agreement, log_softmax
from kdistill.recipe import Profile

SECONDS = 3600  # for all test images


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
    """Runs a `.tflite` on labelled images in a process of its own, without TensorFlow, and compares it with its model.

    `model_logits` `[n, classes]` are the Keras model's on the same images. The limits are the profile's unless given,
    shares of 1. Returns accuracy, model_accuracy, drop, agreement, max_difference (of logits, or of probabilities where
    the file gives those), images, max_drop and min_agreement. Raises `CheckFailed` if the file does not run, crashes,
    takes longer than `seconds`, gives numbers that are not finite, or is beyond a limit.
    """
    profile = checked_profile(load_profile(profile))
    max_drop = profile.max_drop if max_drop is None else max_drop
    min_agreement = profile.min_agreement if min_agreement is None else min_agreement
    model_logits = np.asarray(model_logits)
    if len(model_logits) != len(examples) or not len(examples):
        raise InputError(f"Expected model_logits for {len(examples)} test images (1 or more), got {len(model_logits)}.")
    try:
        outputs = predict_apart(path, examples.images, seconds)
    except InputError as error:
        raise CheckFailed(f"The file for '{profile.name}' is not good: {error}") from None
    if outputs.shape != model_logits.shape:
        raise CheckFailed(f"The file for '{profile.name}' gives {outputs.shape}, its model {model_logits.shape}.")
    if not np.isfinite(outputs).all():
        raise CheckFailed(f"The file for '{profile.name}' gives numbers that are not finite (NaN or infinite).")
    if File(path, tried=True).probabilities:
        model_logits = np.exp(log_softmax(model_logits))
    accuracy = float(np.mean(outputs.argmax(axis=1) == examples.labels))
    model_accuracy = float(np.mean(model_logits.argmax(axis=1) == examples.labels))
    found = {
        "accuracy": accuracy,
        "model_accuracy": model_accuracy,
        "drop": model_accuracy - accuracy,
        "agreement": agreement(outputs, model_logits),
        "max_difference": float(np.max(abs(outputs - model_logits))),
        "images": len(examples),
        "max_drop": max_drop,
        "min_agreement": min_agreement,
    }
    _hold(found, profile.name)
    return found


def export_checked(
    student: keras.Model | str | Path,
    folder: str | Path,
    profile: str | Profile,
    calibration: np.ndarray,
    examples: Examples,
    model_logits: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
) -> dict:
    """Exports to `folder`/student.tflite (see `export`), but puts the files there only if they pass `check`.

    `calibration` are training images, `examples` the test images. `model_logits` default to those of the student, in
    float32. Returns what `export` returns, with what `check` returns as `check`. On failure `folder` stays as it was.
    """
    folder = Path(folder)
    model = convert.ready(convert.load_model(student) if isinstance(student, (str, Path)) else student)
    logits = predict(model, examples.images) if model_logits is None else model_logits
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".part-{folder.name}-") as made:
        found = export(student, made, profile, calibration, class_names)
        limits = {"max_drop": max_drop, "min_agreement": min_agreement}
        checked = check(found["path"], logits, examples, profile, **limits)
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(made).iterdir()):
            os.replace(file, folder / file.name)
    return {**found, "path": str(folder / NAME), "check": checked}


def _hold(found: dict, name: str) -> None:
    broken = []
    if found["drop"] > found["max_drop"] + 1e-9:
        broken.append(
            f"accuracy fell from {found['model_accuracy']:.2%} to {found['accuracy']:.2%} "
            f"(limit: {100 * found['max_drop']:g} points)"
        )
    if found["agreement"] < found["min_agreement"] - 1e-9:
        broken.append(f"it agrees with its model on {found['agreement']:.2%} (limit: {found['min_agreement']:.2%})")
    if broken:
        raise CheckFailed(
            f"The file for '{name}' is not good enough on {found['images']:,} test images: {'; '.join(broken)}. Give a "
            "profile with less quantisation or with more generous limits, or better calibration images."
        )
