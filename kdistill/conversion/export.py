"""Keras model -> `.tflite` file for one profile, described in it and beside it, and what stayed float."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from ai_edge_litert.schema_py_generated import ModelT

from kdistill import provenance
from kdistill.conversion import convert, float32, graph
from kdistill.data.lazy_images import EncodedImages
from kdistill.errors import InputError
from kdistill.networks import heads, saving
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.recipe.profile import checked_profile
from kdistill.recipe.values import as_dict
from kdistill.tflite import flatbuffer, metadata, microcontroller
from kdistill.tflite.interpreter import File

NAME = "student.tflite"
CALIBRATION_IMAGES = 500  # more change nothing
ABOUT = ("name", "description", "version", "author", "license", "recipe", "data")  # what a caller can say of a file


def export(
    student: keras.Model | str | Path,
    path: str | Path,
    profile: str | Profile = "phone_cpu",
    calibration: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
) -> dict:
    """Writes `student` (a model or a `.keras` file) as a `.tflite` file for a profile; returns what it is.

    `path` ends in `.tflite`, or is a folder, for `student.tflite` in it. `calibration`: training images
    `[n, h, w, c]`, raw pixels 0..255, needed by int8 profiles and not used by others; up to 500 are taken, evenly
    spaced. With `class_names`, `labels.txt` and `model.json` are written beside the file; both are in the file, too
    (see `kdistill.metadata`). `about` tells more of it: name, description, version, author, license (texts), recipe,
    data (anything JSON takes). Each file is written whole or not at all, and a `.tflite` only after it has been loaded
    and has run in a process of its own.

    The dict: path, profile, bytes, sha256, weights_sha256 (of the Keras model), min_runtime, input, output, outputs,
    operators, float_layers (what stayed float in a quantized file: operator, layer, reason), precision (of the student,
    before it was rebuilt in float32), arena (with `c_array`). How well the file agrees with the model is measured by
    `kdistill.verify.check`.
    Raises `InputError` for a model, profile or images that cannot be used, naming the operator and layer at fault.
    """
    path = Path(path)
    path = path if path.suffix == ".tflite" else path / NAME
    return place(build(student, profile, calibration, class_names, about), path)


@dataclass(frozen=True)
class Built:
    """A converted model, not written anywhere yet: its bytes without metadata, and what is known of it."""

    content: bytes
    profile: Profile
    values: str  # logits or probabilities
    class_names: tuple[str, ...] | None
    float_layers: list[dict]
    precision: str | None
    weights_sha256: str
    about: dict


def build(
    student: keras.Model | str | Path,
    profile: str | Profile,
    calibration: np.ndarray | None,
    class_names: Sequence[str] | None,
    about: dict | None = None,
) -> Built:
    """Converts a model; the parameters are those of `export`."""
    profile, about = checked_profile(load_profile(profile)), dict(about or {})
    if about.keys() - set(ABOUT):
        raise InputError(f"about expects {', '.join(ABOUT)}; received {', '.join(sorted(about.keys() - set(ABOUT)))}.")
    model = saving.load_model(student) if isinstance(student, (str, Path)) else student
    precision = getattr(model, "compute_dtype", None)
    plain = float32.ready(model)
    gives, classes = heads.output_of(plain)
    _check_names(class_names, classes)
    if profile.quantization == "int8":
        calibration = _calibration(calibration, convert.image_shape(plain))
    about["name"] = about.get("name") or plain.name
    model = graph.deployed(graph.normalized(plain, profile), profile, gives)
    if calibration is not None and convert.image_shape(model)[-1] != calibration.shape[-1]:
        calibration = np.repeat(calibration, convert.image_shape(model)[-1], axis=-1)
    content = convert.convert(model, profile, calibration)
    inside = flatbuffer.parsed(content)
    if profile.operators == "micro":
        microcontroller.check_operators(inside, profile.name)
    names = None if class_names is None else tuple(str(name) for name in class_names)
    kept, values = _float_layers(inside, profile, model), profile.output or gives
    return Built(content, profile, values, names, kept, precision, _weights_sha256(plain), about)


def converted_elsewhere(
    content: bytes, model: keras.Model, profile: Profile, class_names: Sequence[str], about: dict | None = None
) -> Built:
    """What `build` returns, of a file that was converted of this model in another way, as quantized students are."""
    kept, names = _float_layers(flatbuffer.parsed(content), profile, model), tuple(str(name) for name in class_names)
    about = {"name": model.name, **(about or {})}
    return Built(content, profile, heads.output_of(model)[0], names, kept, None, _weights_sha256(model), about)


def place(built: Built, path: Path, metrics: dict | None = None) -> dict:
    """Writes what was built as `path` and what belongs beside it; `metrics` are told in the file. See `export`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as folder:
        part = Path(folder, path.name)
        part.write_bytes(built.content)
        file = File(part)
        document = _document(built, file, metrics)
        content = metadata.write(built.content, document, built.class_names)
        part.write_bytes(content)
        file = File(part)
        texts, found = {}, _found(built, file, content, path)
        if built.profile.c_array:
            bare, name = metadata.bare(content), re.sub(r"\W", "_", path.stem)
            texts[f"{name}.h"], texts[f"{name}.cc"] = microcontroller.source(bare, found, built.class_names, name)
            found["arena"] = microcontroller.arena(flatbuffer.parsed(bare))
        if built.class_names is not None:
            texts[metadata.LABELS] = "".join(f"{name}\n" for name in built.class_names)
            beside = {
                "file": path.name,
                "sha256": found["sha256"],
                "bytes": found["bytes"],
                **document,
                "output": document["outputs"][0],
                "class_names": list(built.class_names),
                "operators": sorted(set(found["operators"])),
            }
            texts[metadata.DOCUMENT] = json.dumps(beside, indent=1) + "\n"
        for name, text in texts.items():
            Path(folder, name).write_text(text, encoding="utf-8")
        for name in (*texts, path.name):  # the .tflite last: who sees it sees the rest
            os.replace(Path(folder, name), path.with_name(name))
    return found


def _found(built: Built, file: File, content: bytes, path: Path) -> dict:
    return {
        "path": str(path),
        "profile": built.profile.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "weights_sha256": built.weights_sha256,
        "min_runtime": flatbuffer.min_runtime(flatbuffer.parsed(content)),
        "input": file.input,
        "output": file.output,
        "outputs": file.outputs,
        "operators": file.operators(),
        "float_layers": built.float_layers,
        "precision": built.precision,
    }


def _weights_sha256(model: keras.Model) -> str:
    """A hash of all weights, in their order, with their shapes."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(repr((weight.shape, weight.dtype.str)).encode())
        digest.update(np.ascontiguousarray(weight))
    return digest.hexdigest()


def _float_layers(inside: ModelT, profile: Profile, model: keras.Model) -> list[dict]:
    names, kept = graph.layer_names(model), flatbuffer.stayed_float(inside, profile.quantization)
    return [
        {"operator": each["operator"], "layer": graph.layer_of(each["tensor"], names), "reason": each["reason"]}
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
    check(isinstance(images, (np.ndarray, EncodedImages)), type(images).__name__)
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


def _document(built: Built, file: File, metrics: dict | None) -> dict:
    """What a program that runs the file has to know, and where it comes from: the `model.json` inside it."""
    about, quantized = built.about, file.input["scale"] is not None
    outputs = [
        {
            **each,
            "values": built.values if each == file.output else "a further output of the model",
            "dequantized": "(number - zero_point) * scale" if each["scale"] else "the number itself",
            "position": position,
        }
        for position, each in enumerate(file.outputs)
    ]
    outputs.sort(key=lambda each: each["name"] != file.output["name"])  # the one with the labels first
    gray = " Gray is computed of the three channels inside." if built.profile.channels == 3 else ""
    return {
        "name": about["name"],
        "description": about.get("description")
        or f"An image classifier for the profile {built.profile.name}, made by kdistill." + gray,
        "version": str(about.get("version") or "1"),
        "author": about.get("author"),
        "license": about.get("license"),
        "profile": as_dict(built.profile),
        "min_runtime": flatbuffer.min_runtime(flatbuffer.parsed(built.content)),
        "signature": "serving_default",
        "input": {
            **file.input,
            "values": "raw pixels 0..255",
            "mean": [0.0],
            "deviation": [1.0],
            "quantized": "pixel / scale + zero_point" if quantized else "the pixel itself",
        },
        "outputs": outputs,
        "float_layers": built.float_layers,
        "provenance": {
            "weights_sha256": built.weights_sha256,
            "recipe": about.get("recipe"),
            "data": about.get("data"),
            "metrics": metrics,
        },
        "versions": provenance.versions(),
    }
