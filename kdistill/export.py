"""Keras model -> `.tflite` file for one profile, with labels and a description beside it, and what stayed float."""

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from ai_edge_litert.schema_py_generated import ModelT

from kdistill import convert, flatbuffer, provenance, report
from kdistill.errors import InputError
from kdistill.litert import File
from kdistill.loading import load_profile
from kdistill.recipe import Profile, as_dict

NAME = "student.tflite"
CALIBRATION_IMAGES = 500  # more change nothing


def export(
    student: keras.Model | str | Path,
    path: str | Path,
    profile: str | Profile = "phone_cpu",
    calibration: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
) -> dict:
    """Writes `student` (a model or a `.keras` file) as a `.tflite` file for a profile; returns what it is.

    `path` ends in `.tflite`, or is a folder, for `student.tflite` in it. `calibration`: training images
    `[n, h, w, c]`, raw pixels 0..255, needed by int8 profiles and not used by others; up to 500 are taken, evenly
    spaced. With `class_names`, `labels.txt` and `model.json` are written beside the file. Each file is written whole or
    not at all, and a `.tflite` only after it has been loaded and has run in a process of its own.

    The dict: path, profile, bytes, sha256, min_runtime, input, output, operators, float_layers (what stayed float in a
    quantised file: operator, layer, reason), precision (of the student, before it was rebuilt in float32). How well the
    file agrees with the model is measured by `kdistill.verify.check`.
    Raises `InputError` for a model, profile or images that cannot be used, naming the operator and layer at fault.
    """
    profile = checked_profile(load_profile(profile))
    model = convert.load_model(student) if isinstance(student, (str, Path)) else student
    precision = getattr(model, "compute_dtype", None)
    model = convert.ready(model)
    values, classes = convert.output_of(model)
    if profile.quantization == "int8":
        calibration = _calibration(calibration, convert.image_shape(model))
    _check_names(class_names, classes)
    path = Path(path)
    path = path if path.suffix == ".tflite" else path / NAME
    content = convert.convert(model, profile, calibration)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
        part = Path(folder, path.name)
        part.write_bytes(content)
        file, inside = File(part), flatbuffer.read(part)
        found = {
            "path": str(path),
            "profile": profile.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
            "min_runtime": flatbuffer.min_runtime(inside),
            "input": file.input,
            "output": file.output,
            "operators": file.operators(),
            "float_layers": _float_layers(inside, profile, model),
            "precision": precision,
        }
        os.replace(part, path)
    if class_names is not None:
        report.write(path.with_name("labels.txt"), "".join(f"{name}\n" for name in class_names))
        description = json.dumps(_description(found, path.name, profile, values, class_names), indent=1)
        report.write(path.with_name("model.json"), description + "\n")
    return found


def checked_profile(profile: Profile) -> Profile:
    """The profile, if every value is in its range and has an effect."""

    def check(holds: bool, key: str, expected: str) -> None:
        if not holds:
            raise InputError(
                f"The profile '{profile.name}': {key} expects {expected}, received {getattr(profile, key)!r}."
            )

    kinds = ("none", "float16", "dynamic", "int8")
    check(profile.quantization in kinds, "quantization", f"one of {', '.join(kinds)}")
    for key in ("input_type", "output_type"):
        types = ("float32", "int8", "uint8") if profile.quantization == "int8" else ("float32",)
        check(getattr(profile, key) in types, key, f"{' or '.join(types)} with quantization '{profile.quantization}'")
    batch = profile.batch
    check(batch is None or (isinstance(batch, int) and batch >= 1), "batch", "None (any) or a number from 1")
    for key in ("max_drop", "min_agreement"):
        check(0 <= getattr(profile, key) <= 1, key, "a share from 0 to 1")
    return profile


def _float_layers(inside: ModelT, profile: Profile, model: keras.Model) -> list[dict]:
    names, kept = convert.layer_names(model), flatbuffer.stayed_float(inside, profile.quantization)
    return [
        {"operator": each["operator"], "layer": convert.layer_of(each["tensor"], names), "reason": each["reason"]}
        for each in kept
    ]


def _calibration(images, shape: tuple[int, int, int]) -> np.ndarray:
    """Up to 500 of these images, evenly spaced, in their order."""

    def check(holds: bool, received: str) -> None:
        if not holds:
            raise InputError(
                f"calibration expects training images [n, {', '.join(map(str, shape))}], raw pixels from 0 to 255, "
                f"uint8 or float, for int8; received {received}. Give 100 to 500 of them."
            )

    check(images is not None, "none")
    check(isinstance(images, np.ndarray), type(images).__name__)
    check(images.ndim == 4 and images.shape[1:] == shape, f"an array {images.shape}")
    check(len(images) > 0, "no image")
    check(images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating), str(images.dtype))
    places = np.linspace(0, len(images) - 1, min(len(images), CALIBRATION_IMAGES))
    images = images[places.round().astype(int)]
    check(bool(np.isfinite(images).all()), "pixels that are NaN or infinite")
    low, high = float(images.min()), float(images.max())
    check(low >= 0 and high <= 255, f"pixels from {low:g} to {high:g}")
    check(bool((images != images[0]).any()), f"{len(images)} time(s) one and the same image")
    check(high > 1, f"pixels from {low:g} to {high:g}, scaled already (the model does that itself)")
    return images


def _check_names(names: Sequence[str] | None, classes: int) -> None:
    if names is None:
        return
    if isinstance(names, str) or len(names) != classes or any(not str(n).strip() or "\n" in str(n) for n in names):
        raise InputError(f"class_names expects {classes} names, each one line; received {names!r}.")


def _description(found: dict, name: str, profile: Profile, values: str, class_names: Sequence[str]) -> dict:
    """What a program that runs the file has to know: the content of `model.json`."""
    return {
        "file": name,
        "sha256": found["sha256"],
        "bytes": found["bytes"],
        "profile": as_dict(profile),
        "min_runtime": found["min_runtime"],
        "signature": "serving_default",
        "input": {**found["input"], "values": "raw pixels 0..255", "quantised": "pixel / scale + zero_point"},
        "output": {**found["output"], "values": values, "dequantised": "(number - zero_point) * scale"},
        "class_names": [str(each) for each in class_names],
        "operators": sorted(set(found["operators"])),
        "float_layers": found["float_layers"],
        "versions": provenance.versions(),
    }
