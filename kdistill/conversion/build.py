"""A converted model and its file: bytes, labels, metadata, and a list of what stayed float. Checks are in `verify`."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from ai_edge_litert.schema_py_generated import ModelT

from kdistill import provenance
from kdistill.conversion import convert, graph
from kdistill.conversion.float32 import Prepared
from kdistill.conversion.tflite_converter import USUAL, Tuning
from kdistill.data.lazy_images import EncodedImages
from kdistill.errors import CheckFailed, FileRefused, InputError
from kdistill.evaluation.examples import gather
from kdistill.files import PART
from kdistill.networks.heads import LABELS, Head
from kdistill.networks.signatures import image_shape
from kdistill.recipe import Profile
from kdistill.recipe.values import as_dict
from kdistill.tflite import compact, flatbuffer, metadata, microcontroller
from kdistill.tflite.interpreter import File

NAME = "student.tflite"
CALIBRATION_IMAGES = USUAL.images
KEPT_FLOAT = "kept in float by repair: in int8 it loses too much"
GIVE = "Give 100 to 500 of them."
SCALED = (
    "Give raw pixels. If the model was trained on scaled ones, add its mean and std, such as mean=0, std=255, which "
    "become part of the file; or mean=0, std=1 for a file that takes scaled pixels."
)
ABOUT = ("name", "description", "version", "author", "license", "recipe", "data")  # the keys of `about`


@dataclass(frozen=True)
class Built:
    """A converted model that is not written yet: its bytes without metadata, and what its metadata needs."""

    content: bytes
    profile: Profile
    heads: dict[str, Head]  # of the file's outputs
    takes_images: bool
    inputs: tuple[str, ...]  # in the order of the model
    class_names: tuple[str, ...] | None
    float_layers: list[dict]
    precision: str | None
    weights_sha256: str
    about: dict


def build(
    student: Prepared,
    profile: Profile,
    calibration=None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
    tuning: Tuning = USUAL,
) -> Built:
    """Converts a student for a profile; for the other arguments see `export`. `tuning`: how int8 is made."""
    about = _checked_about(about)
    _check_class_names(class_names, student)
    graph.check_suits(student.model, profile, student.heads)
    if profile.quantization == "int8":
        calibration = calibration_of(student, profile, calibration, tuning.images)
    model = graph.with_normalization(student.model, profile)
    model = graph.with_channels_and_softmax(model, profile, student.heads)
    if student.takes_images and calibration is not None and image_shape(model)[-1] != calibration.shape[-1]:
        calibration = np.repeat(calibration, image_shape(model)[-1], axis=-1)
    content = convert.convert(model, profile, calibration, graph.heads_in_file(student.heads, profile), tuning)
    if profile.operators == "micro":
        microcontroller.check_operators(flatbuffer.parse(content), profile.name)
    return _built(content, student, model, profile, class_names, about, tuning)


def build_converted(
    content: bytes, student: Prepared, profile: Profile, class_names: Sequence[str] | None, about: dict | None = None
) -> Built:
    """Like `build`, for a file that was converted in another way, as after quantization-aware training.

    `content`: the bytes of the file, which was converted from the student. `profile`: describes the file.
    """
    return _built(content, student, student.model, profile, class_names, _checked_about(about))


def _built(
    content: bytes, student: Prepared, model: keras.Model, profile: Profile, class_names, about: dict, tuning=USUAL
) -> Built:
    return Built(
        compact.with_short_names(content) if profile.compact else content,
        profile,
        graph.heads_in_file(student.heads, profile),
        student.takes_images,
        tuple(student.inputs),
        None if class_names is None else tuple(str(name) for name in class_names),
        _float_layers(flatbuffer.parse(content), profile, model, tuning.float_tensors),
        student.precision,
        student.weights_sha256,
        {**about, "name": about.get("name") or student.model.name},
    )


def write(built: Built, path: Path, measure: Callable[[Path], dict | None] | None = None) -> dict:
    """Writes a converted model to `path`, with labels and `model.json` beside it; see `export`.

    `measure` receives the path of the file before it is put in place, and returns metrics for its metadata. What it
    raises leaves everything as it was.
    """
    folder = path.parent
    while not folder.exists():  # a refused file leaves no folder behind
        folder = folder.parent
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{PART}{path.stem}-") as part_folder:
        part = Path(part_folder, path.name)
        part.write_bytes(built.content)
        try:
            file = File(part)
        except InputError as error:
            reason = str(error).replace(f"'{part}'", "it")
            raise FileRefused(f"The file for '{built.profile.name}' cannot be used: {reason}") from None
        document = _document(built, file, measure(part) if measure else None)
        content = metadata.write(built.content, document, built.class_names, deflated=built.profile.compact)
        if metadata.bare(content) != metadata.bare(built.content):
            raise CheckFailed(
                f"The file for '{built.profile.name}' changed when its metadata were written into it. This is a bug of "
                "kdistill: please report it."
            )
        part.write_bytes(content)
        # The model in it has passed its trial: metadata stand behind it.
        report, texts = _report(built, File(part, trusted=True), content, path), {}
        if built.profile.c_array:
            bare, name = metadata.bare(content), re.sub(r"\W", "_", path.stem)
            texts[f"{name}.h"], texts[f"{name}.cc"] = microcontroller.source(bare, report, built.class_names, name)
            report["arena"] = microcontroller.arena(flatbuffer.parse(bare))
        if built.class_names is not None:
            texts[metadata.LABELS] = "".join(f"{name}\n" for name in built.class_names)
            texts[metadata.DOCUMENT] = json.dumps(_document_beside(built, document, report), indent=1) + "\n"
        for name, text in texts.items():
            Path(part_folder, name).write_text(text, encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        for name in (*texts, path.name):  # the .tflite last: where it is, the others are too
            os.replace(Path(part_folder, name), path.with_name(name))
    return report


def remove(path: Path) -> None:
    """Deletes a file that `write` has written, with what is beside it, and its folder if nothing else is in it."""
    name = re.sub(r"\W", "_", path.stem)
    for other in (path.name, f"{name}.h", f"{name}.cc", metadata.LABELS, metadata.DOCUMENT):
        path.with_name(other).unlink(missing_ok=True)
    if path.parent.is_dir() and not any(path.parent.iterdir()):
        path.parent.rmdir()


def _report(built: Built, file: File, content: bytes, path: Path) -> dict:
    return {
        "path": str(path),
        "profile": built.profile.name,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "weights_sha256": built.weights_sha256,
        "min_runtime": flatbuffer.min_runtime(flatbuffer.parse(content)),
        "input": file.input,
        **({} if built.takes_images else {"inputs": file.inputs}),
        "output": file.output,
        "outputs": file.outputs,
        "operators": file.operators(),
        "float_layers": built.float_layers,
        "precision": built.precision,
    }


def _float_layers(content: ModelT, profile: Profile, model: keras.Model, kept: Sequence[str]) -> list[dict]:
    """What stayed float. `kept`: the tensors that were kept in float on purpose."""
    names = graph.layer_names(model)
    return [
        {
            "operator": row["operator"],
            "layer": graph.layer_of(row["tensor"], names),
            "reason": KEPT_FLOAT if row["tensor"] in kept else row["reason"],
        }
        for row in flatbuffer.stayed_float(content, profile.quantization)
    ]


def calibration_of(student: Prepared, profile: Profile, calibration, limit: int = CALIBRATION_IMAGES):
    """Up to `limit` calibration examples, evenly spaced, checked: images, or arrays by the names of the inputs."""
    if student.takes_images:
        return calibration_images(calibration, student.image_shape, graph.keeps_range(profile), limit)
    if calibration is None:
        raise InputError(
            f"calibration expects training examples of '{student.model.name}', for int8; received none. {GIVE}"
        )
    inputs = inputs_by_name(calibration, student, "calibration", limit)
    for name, array in inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise InputError(f"calibration has numbers that are NaN or infinite in the input '{name}'.")
    if len(array) > 1 and not any((array != array[0]).any() for array in inputs.values()):
        raise InputError(f"calibration is the same example {len(array)} times. {GIVE}")
    return inputs


def inputs_by_name(examples, student: Prepared, what: str = "examples", limit: int | None = CALIBRATION_IMAGES):
    """The inputs of examples of any kind by name, as a student that takes no image gets them, up to `limit`."""
    text = student.text
    if isinstance(examples, Mapping) and set(examples) == set(student.inputs):
        text = None  # what the layer for strings gives
    inputs = gather(examples, None if text else student.inputs, what, with_labels=False).inputs
    if text is not None:
        ((_, strings),) = inputs.items()
        inputs = {next(iter(student.inputs)): text.numbers(strings)}
    if limit is None:
        return inputs
    return {name: evenly_spaced(array, limit) for name, array in inputs.items()}


def evenly_spaced(images, limit: int = CALIBRATION_IMAGES) -> np.ndarray:
    """Up to `limit` of these images, in their order."""
    places = np.linspace(0, len(images) - 1, min(len(images), limit))
    return images[places.round().astype(int)]


def calibration_images(
    images, shape: tuple[int, int, int], any_range: bool = False, limit: int = CALIBRATION_IMAGES
) -> np.ndarray:
    """Up to `limit` of these images, evenly spaced, checked: raw pixels, or with `any_range` any finite numbers."""

    def check(holds: bool, received: str, advice: str = GIVE) -> None:
        if not holds:
            raise InputError(
                f"calibration expects training images [n, {', '.join(map(str, shape))}], raw pixels from 0 to 255, "
                f"uint8 or float, for int8; received {received}. {advice}"
            )

    check(images is not None, "none")
    check(isinstance(images, (np.ndarray, EncodedImages)), type(images).__name__)
    if images.ndim == 3 and shape[-1] == 1:
        images = images[..., None]
    check(images.ndim == 4 and images.shape[1:] == shape, f"an array {images.shape}")
    check(len(images) > 0, "no image")
    check(images.dtype == np.uint8 or np.issubdtype(images.dtype, np.floating), str(images.dtype))
    images = evenly_spaced(images, limit)
    check(bool(np.isfinite(images).all()), "pixels that are NaN or infinite")
    low, high = float(images.min()), float(images.max())
    check(bool((images != images[0]).any()), f"the same image {len(images)} time(s)")
    if not any_range:
        is_scaled = low < 0 or high <= 1
        scaled = ", which are scaled already" if is_scaled else ""
        check(low >= 0 and 1 < high <= 255, f"pixels from {low:g} to {high:g}{scaled}", SCALED if is_scaled else GIVE)
    return images


def _checked_about(about: dict | None) -> dict:
    about = dict(about or {})
    if about.keys() - set(ABOUT):
        raise InputError(f"about expects {', '.join(ABOUT)}; received {', '.join(sorted(about.keys() - set(ABOUT)))}.")
    return about


def _check_class_names(names: Sequence[str] | None, student: Prepared) -> None:
    """Class names that a user gives. Those of a data set were checked when it was read."""
    if names is None:
        return
    if len(student.heads) > 1:
        raise InputError(
            f"class_names names the classes of one output; the model '{student.model.name}' has "
            f"{', '.join(student.heads)}. Leave it out."
        )
    classes = student.head.classes
    if isinstance(names, str) or len(names) != classes or any(not str(n).strip() or "\n" in str(n) for n in names):
        raise InputError(f"class_names expects {classes} names of one line each; received {names!r}.")


def _document(built: Built, file: File, metrics: dict | None) -> dict:
    """The `model.json` inside the file: how to use the file, and its origin."""
    about, heads = built.about, built.heads
    outputs = [
        {
            **output,
            **_meaning(heads, output, file),
            "dequantized": "(number - zero_point) * scale" if output["scale"] else "the number itself",
            "position": position,
        }
        for position, output in enumerate(file.outputs)
    ]
    if len(heads) > 1:
        outputs.sort(key=lambda output: list(heads).index(output["name"]) if output["name"] in heads else len(heads))
    else:
        outputs.sort(key=lambda output: output["name"] != file.output["name"])  # the one with the labels first
    kind = _kind_of_model(built)
    gray = " It reduces the three channels of its input to gray." if built.profile.channels == 3 else ""
    return {
        "name": about["name"],
        "description": about.get("description")
        or f"{kind} for the profile {built.profile.name}, exported by kdistill." + gray,
        "version": str(about.get("version") or "1"),
        "author": about.get("author"),
        "license": about.get("license"),
        "profile": as_dict(built.profile),
        "min_runtime": flatbuffer.min_runtime(flatbuffer.parse(built.content)),
        "signature": "serving_default",
        **_inputs(built, file),
        "outputs": outputs,
        "float_layers": built.float_layers,
        "provenance": {
            "weights_sha256": built.weights_sha256,
            **({} if built.profile.compact else {"recipe": about.get("recipe")}),
            "data": about.get("data"),
            "metrics": metrics,
        },
        "versions": provenance.versions(),
    }


def _inputs(built: Built, file: File) -> dict:
    """`input`, an image, or the inputs of a model of anything else as `inputs`."""
    if not built.takes_images:
        numbers = "number / scale + zero_point"
        rows = [{**one, "quantized": numbers if one["scale"] else "the number itself"} for one in file.inputs]
        order = {"input_order": list(built.inputs)} if len(rows) > 1 else {}
        return {"inputs": [{**row, "values": metadata.OWN_RANGE} for row in rows], **order}
    quantized = file.input["scale"] is not None
    image = {
        **file.input,
        "values": metadata.OWN_RANGE if graph.keeps_range(built.profile) else metadata.RAW_PIXELS,
        "mean": [0.0],
        "std": [1.0],
        "quantized": "pixel / scale + zero_point" if quantized else "the pixel itself",
    }
    return {"input": image}


def _meaning(heads: dict[str, Head], output: dict, file: File) -> dict:
    """What an output of a file contains, in words, and unless it is one row of exclusive classes as `head` too."""
    head = next(iter(heads.values())) if len(heads) == 1 and output == file.output else heads.get(output["name"])
    if head is None:
        return {"values": "a further output of the model"}
    if head.exclusive and not head.positions and len(heads) == 1:
        return {"values": head.kind}
    return {"values": describe(head), "head": {"meaning": head.meaning, "kind": head.kind}}


def describe(head: Head) -> str:
    """What an output contains, in words."""
    if head.kind == "unclear":
        return "numbers from 0 to 1 that do not sum to 1"
    where = " for each position" if head.positions else ""
    if head.exclusive:
        return f"{head.kind} of exclusive classes{where}"
    if head.meaning == LABELS:
        end = ", each from a sigmoid" if head.kind == "probabilities" else ""
        return f"{head.kind} of labels that do not exclude each other{end}{where}"
    return f"{'one number' if head.shape in ((), (1,)) else 'numbers'} for each example"


def _kind_of_model(built: Built) -> str:
    if not built.takes_images:
        return "A model"
    classifies = len(built.heads) == 1 and all(head.exclusive and not head.positions for head in built.heads.values())
    return "An image classifier" if classifies else "A model of images"


def _document_beside(built: Built, document: dict, report: dict) -> dict:
    """The `model.json` beside the file. It also states what cannot be inside: the hash of the file."""
    return {
        "file": Path(report["path"]).name,
        "sha256": report["sha256"],
        "bytes": report["bytes"],
        **document,
        "output": document["outputs"][0],
        "class_names": list(built.class_names),
        "operators": sorted(set(report["operators"])),
    }
