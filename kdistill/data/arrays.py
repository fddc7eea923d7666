"""Inputs and labels of any kind, in an `.npz`: tables, sequences, tokens, images with a label for every pixel.

What the labels mean is stated (`data.head`), because arrays do not tell. `check` takes arrays from any source.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdistill.data.lazy_images import EncodedImages
from kdistill.data.mnist import find_archive, read_arrays
from kdistill.errors import InputError
from kdistill.recipe import Data
from kdistill.recipe.values import CLASSES, LABELS, NUMBERS

MOST_CLASSES = 100_000
PARTS = ("train", "test")
IMAGES_ONLY = ("shift", "flip", "mixup", "cutmix")  # settings of `Data` that change images; and crop_area
Arrays = np.ndarray | dict[str, np.ndarray]  # of one input or output, or of several by name


@dataclass(frozen=True)
class Output:
    """What a network gives for an example: `meaning` (`classes`, `labels` or `numbers`) and `shape`, `(..., n)`."""

    meaning: str
    shape: tuple[int, ...]


def npz_arrays(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """The arrays of an `.npz`: `x_train`, `y_train`, `x_test`, `y_test`; of several inputs `x_train_NAME` and so on."""
    if data_dir is None:
        raise InputError("The data set 'npz' expects --data-dir FILE.npz with x_train, y_train, x_test, y_test.")
    path = find_archive(data_dir)
    stems = {(kind, part): f"{kind}_{part}" for part in PARTS for kind in "xy"}
    read, names = read_arrays(path, lambda key: any(_names([key], stem) for stem in stems.values()))
    arrays = {}
    for place, stem in stems.items():
        arrays[place] = {name: read[key] for name, key in _names(list(read), stem).items()}
        if not arrays[place]:
            raise InputError(
                f"'{path}' lacks {stem}; it holds {', '.join(names) or 'nothing'}. Save the arrays under these names; "
                f"several inputs or outputs as {stem}_NAME."
            )
    single = {place: found[""] if list(found) == [""] else found for place, found in arrays.items()}
    parts = {part: (single["x", part], single["y", part]) for part in PARTS}
    return parts, data.head, (), f"the file {path}"


def _names(keys: list[str], stem: str) -> dict[str, str]:
    """The keys of the inputs or outputs of a part by their names, an empty one for the only array."""
    if stem in keys:
        return {"": stem}
    return {key[len(stem) + 1 :]: key for key in sorted(keys) if key.startswith(f"{stem}_") and key != f"{stem}_"}


def check_inputs(inputs, where: str) -> Arrays:
    """Inputs as the batches take them: uint8 as they are, other whole numbers int32, others float32.

    Raises `InputError` for texts, numbers that are not finite, and different numbers of examples.
    """
    by_name = inputs if isinstance(inputs, Mapping) else {"": inputs}
    checked = {name: _as_input(np.asarray(array), _called(where, "input", name)) for name, array in by_name.items()}
    counts = {len(array) for array in checked.values()}
    if len(counts) != 1 or 0 in counts:
        raise InputError(f"{where}: the inputs hold {_counts(checked)} examples; expected the same number, 1 or more.")
    return checked[""] if list(checked) == [""] else checked


def _as_input(array: np.ndarray, what: str) -> np.ndarray:
    if array.ndim < 2 or 0 in array.shape:
        raise InputError(
            f"{what} is {array.dtype} {array.shape}; expected [n, ...] with a size for every axis, as [n, features]."
        )
    if array.dtype.kind not in "biuf":
        raise InputError(
            f"{what} is {array.dtype}; expected numbers. Encode texts before, as your TextVectorization layer does."
        )
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{what} holds {np.count_nonzero(~np.isfinite(array))} numbers that are NaN or infinite.")
        return array
    if array.dtype.kind in "iu" and (array.min() < -(2**31) or array.max() >= 2**31):
        raise InputError(f"{what} holds whole numbers from {array.min()} to {array.max()}; expected int32.")
    return array.astype(np.int32)


def check_labels(labels, head, count: int, where: str) -> Arrays:
    """Labels in the type of their meaning: classes int32, others float32. Raises `InputError` for what cannot be.

    Args:
        labels: an array `[n, ...]`, or arrays by the names of the outputs.
        head: `classes`, `labels` or `numbers`, for several outputs a dict by their names.
        count: the number of examples.
    """
    if isinstance(labels, Mapping) != isinstance(head, Mapping):
        expected = f"one for each output, {', '.join(labels)}" if isinstance(labels, Mapping) else "one meaning"
        raise InputError(f"{where}: data.head expects {expected}; received {head!r}.")
    if not isinstance(labels, Mapping):
        return _as_labels(np.asarray(labels), head, count, _called(where, "label array", ""))
    if set(labels) != set(head):
        raise InputError(
            f"{where}: the labels are of the outputs {', '.join(labels)}, data.head states {', '.join(head)}. Give "
            "both the same names."
        )
    return {
        name: _as_labels(np.asarray(labels[name]), head[name], count, _called(where, "label array", name))
        for name in head
    }


def _as_labels(labels: np.ndarray, meaning: str, count: int, what: str) -> np.ndarray:
    if labels.dtype.kind not in "biuf" or not labels.ndim or len(labels) != count or 0 in labels.shape:
        raise InputError(
            f"{what} is {labels.dtype} {labels.shape}; expected numbers for each of {count:,} examples, [n, ...]."
        )
    labels = labels.astype(np.uint8) if labels.dtype == bool else labels
    missing = np.isnan(labels)
    if meaning != NUMBERS and labels.dtype.kind == "i":
        missing = labels < 0
    values = labels[~missing]
    if not values.size:
        raise InputError(f"{what} holds missing labels only.")
    received = f"{labels.dtype} from {values.min():g} to {values.max():g}"
    if meaning == NUMBERS:
        labels = labels.astype(np.float32)
        if np.isinf(labels).any():
            raise InputError(f"{what} holds infinite numbers; expected finite ones, NaN where a label is missing.")
        return labels[:, None] if labels.ndim == 1 else labels
    whole = labels.dtype.kind != "f" or (values == np.round(values)).all()
    if meaning == LABELS:
        if values.max() > 1 or values[values >= 0].size == 0:
            raise InputError(f"{what} expects 0 or 1 for each label, -1 where one is missing; received {received}.")
        labels = np.where(labels >= 0, labels, -1).astype(np.float32)
        return labels[:, None] if labels.ndim == 1 else labels
    if not whole or values.max() >= MOST_CLASSES or values.max() < 0:
        raise InputError(
            f"{what} expects classes, whole numbers from 0 to {MOST_CLASSES - 1:,} (-1 where one is missing); received "
            f"{received}."
        )
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    return np.where(labels >= 0, labels, -1).astype(np.int32)


def images_and_classes(images, labels, classes: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[n, height, width, channels]` and the class of each, int32 `[n]`. Raises `InputError` if not."""
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    _check_pixels(images, where)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),):
        raise InputError(f"{where}: {len(images)} images, but labels of shape {labels.shape}; expected one per image.")
    if labels.dtype.kind not in "ui" or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"{where}: expected labels 0..{classes - 1}, received {labels.dtype} from {labels.min()} to {labels.max()}."
        )
    return images.astype(np.uint8), labels.astype(np.int32)


def _check_pixels(images: np.ndarray, where: str) -> None:
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise InputError(f"{where}: expected images [n, height, width(, channels)], received shape {images.shape}.")
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            raise InputError(f"{where}: {np.count_nonzero(~np.isfinite(images))} pixels are NaN or infinite.")
        low, high = float(images.min()), float(images.max())
        if low < 0 or high > 255 or (images != np.round(images)).any():
            back = {0: "images * 255", -1: "(images + 1) * 127.5"}.get(0 if low >= 0 else -1 if low >= -1 else None)
            fix = f"They look scaled: save np.round({back}).astype('uint8')" if back and high <= 1 else "Give uint8"
            raise InputError(
                f"{where}: expected whole pixel values 0..255, received numbers from {low:g} to {high:g}. {fix}; "
                "kdistill's models scale their input themselves."
            )
    elif images.dtype.kind not in "ui" or images.min() < 0 or images.max() > 255:
        received = (
            f"{images.dtype} from {images.min()} to {images.max()}" if images.dtype.kind in "ui" else images.dtype
        )
        raise InputError(f"{where}: expected pixels 0..255 (uint8), received {received}.")


def check_augmentation(data: Data, inputs: Arrays, outputs: dict[str, Output]) -> None:
    """Raises `InputError` for settings that change images, where inputs are none or labels would have to change too."""
    given = [name for name in IMAGES_ONLY if getattr(data, name)] + ["crop_area"] * (data.crop_area < 1)
    if not given:
        return
    mixed = [name for name in given if name in ("mixup", "cutmix")]
    if not are_images(inputs):
        reason = "change images, and these inputs are none (uint8 [n, height, width, 1 or 3])"
    elif any(output.meaning == CLASSES and len(output.shape) > 1 for output in outputs.values()):
        reason = "change images, and labels of positions would have to change with them"
    elif mixed and not is_one_class(outputs):
        given, reason = mixed, "mix one class of each image, and these labels are none"
    else:
        return
    raise InputError(f"data.{', data.'.join(given)} {reason}. Turn {'it' if len(given) == 1 else 'them'} off.")


def outputs_of(labels: list, head) -> dict[str, Output]:
    """What a network has to give for labels like these, by the names of the outputs (empty for the only one).

    `labels`: those of all parts of a data set, as `check_labels` returns them. Their largest class counts.
    """
    by_name = head if isinstance(head, Mapping) else {"": head}

    def output(name: str, meaning: str) -> Output:
        arrays = [part[name] if name else part for part in labels]
        if meaning != CLASSES:
            return Output(meaning, arrays[0].shape[1:])
        classes = max(2, *(int(array.max()) + 1 for array in arrays))
        return Output(meaning, (*arrays[0].shape[1:], classes))

    return {name: output(name, meaning) for name, meaning in by_name.items()}


def is_one_class(outputs: Mapping[str, Output]) -> bool:
    """Whether every example has exactly one class."""
    return [*outputs] == [""] and outputs[""].meaning == CLASSES and len(outputs[""].shape) == 1


def shapes_of(values: Arrays):
    """The shape of an example: a tuple, or tuples by name."""
    if isinstance(values, Mapping):
        return {name: tuple(array.shape[1:]) for name, array in values.items()}
    return tuple(values.shape[1:])


def map_arrays(function: Callable, values):
    """`function` of an array, or of each of several by name."""
    return (
        {name: function(array) for name, array in values.items()} if isinstance(values, Mapping) else function(values)
    )


def are_images(inputs) -> bool:
    """Whether inputs are images, one for each example: uint8 `[n, height, width, 1 or 3]`, or encoded ones."""
    if isinstance(inputs, EncodedImages):
        return True
    is_array = isinstance(inputs, np.ndarray) and inputs.dtype == np.uint8
    return is_array and inputs.ndim == 4 and inputs.shape[-1] in (1, 3)


def fingerprint_of(*values) -> str:
    """A hash of arrays, of arrays by name, and of encoded images: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for value in values:
        for name in sorted(value) if isinstance(value, Mapping) else [None]:
            array = value if name is None else value[name]
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(array.fingerprint() if isinstance(array, EncodedImages) else np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


def first_of(values):
    """The array, or the first of several."""
    return next(iter(values.values())) if isinstance(values, Mapping) else values


def _called(where: str, kind: str, name: str) -> str:
    return f"{where}: the {kind}{f' {name!r}' if name else ''}"


def _counts(arrays: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{len(array)}{f' ({name})' if name else ''}" for name, array in arrays.items())
