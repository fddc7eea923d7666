"""Whether an exported file is as good as its model: run where it can do no harm, and put in place only if it is."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion import float32, graph
from kdistill.conversion.export import NAME, Built, build, place
from kdistill.data.splits import Examples
from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.evaluate import predict
from kdistill.evaluation.metrics import agreement, log_softmax
from kdistill.networks import saving
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.recipe.profile import checked_profile
from kdistill.tflite import metadata, quantization_error
from kdistill.tflite.interpreter import File, predict_apart

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
    """Runs a `.tflite` on labeled images in a process of its own, without TensorFlow, and compares it with its model.

    `model_logits` `[n, classes]` are the Keras model's on the same images. The limits are the profile's unless given,
    shares of 1. Returns accuracy, model_accuracy, drop, agreement, max_difference (of logits, or of probabilities where
    the file gives those), images, max_drop, min_agreement and per_class (dicts with class, images, accuracy and
    model_accuracy, of the classes that occur). Raises `CheckFailed` if the file does not run, crashes,
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
    right, model_right = (each.argmax(axis=1) == examples.labels for each in (outputs, model_logits))
    accuracy, model_accuracy = float(np.mean(right)), float(np.mean(model_right))
    found = {
        "accuracy": accuracy,
        "model_accuracy": model_accuracy,
        "drop": model_accuracy - accuracy,
        "agreement": agreement(outputs, model_logits),
        "max_difference": float(np.max(abs(outputs - model_logits))),
        "images": len(examples),
        "max_drop": max_drop,
        "min_agreement": min_agreement,
        "per_class": _per_class(examples.labels, right, model_right),
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
    about: dict | None = None,
) -> dict:
    """Exports to `folder`/student.tflite (see `export`), but puts the files there only if they pass `check`.

    `calibration` are training images, `examples` the test images. `model_logits` default to those of the student, in
    float32. Returns what `export` returns, with what `check` returns as `check`; its figures are told in the file. On
    failure `folder` stays as it was; where an int8 file is not good enough, the error names the layers that cost most.
    """
    folder, profile = Path(folder), checked_profile(load_profile(profile))
    model = float32.ready(saving.load_model(student) if isinstance(student, (str, Path)) else student)
    if model_logits is None:
        model_logits = predict(graph.normalized(model, profile), examples.images)
    built = build(student, profile, calibration, class_names, about)
    return place_checked(built, folder, model, model_logits, examples, max_drop, min_agreement)


def place_checked(
    built: Built,
    folder: Path,
    model: keras.Model,
    model_logits: np.ndarray,
    examples: Examples,
    max_drop: float | None = None,
    min_agreement: float | None = None,
) -> dict:
    """Puts what was built of `model` into `folder` if it passes `check`; see `export_checked`."""
    profile = built.profile
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".part-{folder.name}-") as made:
        path = Path(made, NAME)
        place(built, path)
        tried = path.read_bytes()
        try:
            checked = check(path, model_logits, examples, profile, max_drop=max_drop, min_agreement=min_agreement)
        except CheckFailed as error:
            blamed = _blamed(model, built, path, examples) if profile.quantization in ("int8", "dynamic") else ""
            raise CheckFailed(f"{error}{blamed}") from None
        figures = ("accuracy", "model_accuracy", "agreement", "max_difference", "images")
        found = place(built, path, {name: checked[name] for name in figures})
        if metadata.bare(path.read_bytes()) != metadata.bare(tried):
            raise CheckFailed(
                f"The file for '{profile.name}' is another one with its figures in it: a bug of kdistill."
            )
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(made).iterdir()):
            os.replace(file, folder / file.name)
    return {**found, "path": str(folder / NAME), "check": checked}


def _blamed(model: keras.Model, built: Built, path: Path, examples: Examples) -> str:
    """A sentence that names the layers whose quantization costs most, or nothing if the file does not even run."""
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
        reference.write_bytes(build(model, plain, None, None).content)
        layers = quantization_error.compare(path, reference, examples.images)
    except InputError:
        return ""
    finally:
        reference.unlink(missing_ok=True)
    return f" Most of the loss comes from: {quantization_error.sentence(layers)}."


def _per_class(labels: np.ndarray, right: np.ndarray, model_right: np.ndarray) -> list[dict]:
    return [
        {
            "class": int(label),
            "images": int((labels == label).sum()),
            "accuracy": float(right[labels == label].mean()),
            "model_accuracy": float(model_right[labels == label].mean()),
        }
        for label in np.unique(labels)
    ]


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
            "profile with less quantization or with more generous limits, or better calibration images."
        )
