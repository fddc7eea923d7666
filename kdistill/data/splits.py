"""A named data set, or the user's own files -> `Splits`. Numpy only: TensorFlow is imported for TFDS alone.

Validation picks, test reports, nothing is dropped. Which source was used is said, and is part of every report.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdistill.data import few_labels, image_folder
from kdistill.data.cifar import cifar10
from kdistill.data.lazy_images import EncodedImages, subset
from kdistill.data.mnist import mnist, own_npz
from kdistill.errors import InputError, unknown
from kdistill.recipe import Data

# A data set is a function: (data, data_dir or None, download, say) -> ({"train": (images, labels), "test": ...}, class
# names, source in words). `load` checks what it gives.
SOURCES = {
    "mnist": mnist,
    "npz": own_npz,
    "cifar10": cifar10,
    "imagenet": image_folder.imagenet,
    "image_folder": image_folder.image_folder,
}
ENCODED = ("imagenet", "image_folder")


@dataclass(frozen=True)
class Examples:
    """Images, uint8 `[n, height, width, channels]`, and their classes, int32 `[n]`, of `classes` in all.

    The images are an array, or `EncodedImages`, which are decoded when they are asked for.
    """

    images: np.ndarray | EncodedImages
    labels: np.ndarray
    classes: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, which) -> "Examples":
        """The examples at these places (a slice, a mask, or numbers); no image is decoded."""
        return dataclasses.replace(self, images=subset(self.images, which), labels=self.labels[which])


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples; where they come from, in words; a fingerprint of every byte of them."""

    train: Examples
    validation: Examples
    test: Examples
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    labeled_mask: np.ndarray | None = (
        None  # bool [training images]: those whose label students see; None: all (see labeled)
    )


def load_splits(
    data: Data,
    data_dir: str | Path | None = None,
    download: bool = False,
    say: Callable[[str], None] = print,
) -> Splits:
    """The splits of a data set.

    With `data_dir`: its files. Without: a copy that TensorFlow Datasets has prepared; with `download` TFDS fetches
    it; else, for MNIST, the sample that ships with kdistill. Images in files of their own stay there (see `encoded`).
    Raises `InputError` that names the file and what is wrong with it.
    """
    if data.name not in SOURCES:
        raise unknown("data set", data.name, SOURCES)
    if (data.image_size is not None) != (data.name in ENCODED):
        wanted = "a number of pixels, such as 224" if data.name in ENCODED else "none: its images have one size"
        raise InputError(f"With the data set '{data.name}' data.image_size expects {wanted}.")
    if data_dir and download:
        raise InputError("--data-dir and --download exclude each other: the files are there. Leave one out.")
    parts, class_names, source = SOURCES[data.name](data, Path(data_dir) if data_dir else None, download, say)
    examples = {name: _checked(*parts[name], len(class_names), f"{source}, {name}") for name in ("train", "test")}
    if examples["train"].images.shape[1:] != examples["test"].images.shape[1:]:
        shapes = [examples[name].images.shape[1:] for name in ("train", "test")]
        raise InputError(f"{source}: the training images are {shapes[0]}, the test images {shapes[1]}.")
    limit = data.train_limit
    if limit is None or data.labeled is not None:  # what is left out later has no label that would be missed
        examples["train"] = _whole(examples["train"].select(slice(limit)), say)
    train, validation, labeled_mask = _held_out(examples["train"], data)
    train, validation, test = (
        each if limit is None else each.select(slice(limit)) for each in (train, validation, examples["test"])
    )
    train, validation, test = (_whole(each, say) for each in (train, validation, test))
    for name, each in (("training", train), ("validation", validation), ("test", test)):
        if len(each) == 0:
            raise InputError(f"{source}: no {name} images are left. It holds too few, or data.validation is too small.")
    if isinstance(train.images, EncodedImages) and train.images.damage.found:
        say(f"Left out: {train.images.damage.text()}")
    seen = () if labeled_mask is None else (Examples(train.images[:0], np.where(labeled_mask, train.labels, -1)),)
    fingerprint = _fingerprint(train, validation, test, *seen)
    return Splits(train, validation, test, class_names, source, fingerprint, labeled_mask)


def _checked(images: np.ndarray, labels: np.ndarray, classes: int, where: str) -> Examples:
    """The arrays as `Examples`, if they are images with a label of a known class each."""
    if isinstance(images, EncodedImages):  # sorted by class as they are; the first so many are to be of all classes
        mixed = np.random.Generator(np.random.Philox(key=[3, 0])).permutation(len(labels))
        return Examples(images.select(mixed), labels[mixed].astype(np.int32), classes)
    images, labels = np.asarray(images), np.asarray(labels)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
        raise InputError(f"{where}: expected images [n, height, width(, channels)], received shape {images.shape}.")
    if images.dtype.kind == "f":
        if not np.isfinite(images).all():
            raise InputError(f"{where}: {np.count_nonzero(~np.isfinite(images))} pixels are NaN or infinite.")
        if images.min() < 0 or images.max() > 255 or (images != np.round(images)).any():
            raise InputError(
                f"{where}: expected whole pixel values 0..255, received numbers from {images.min():g} to "
                f"{images.max():g}. Give uint8; kdistill's models scale their input themselves."
            )
    elif images.dtype.kind not in "ui" or images.min() < 0 or images.max() > 255:
        received = (
            f"{images.dtype} from {images.min()} to {images.max()}" if images.dtype.kind in "ui" else images.dtype
        )
        raise InputError(f"{where}: expected pixels 0..255 (uint8), received {received}.")
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),):
        raise InputError(f"{where}: {len(images)} images, but labels of shape {labels.shape}; expected one for each.")
    if labels.dtype.kind not in "ui" or labels.min() < 0 or labels.max() >= classes:
        raise InputError(
            f"{where}: expected labels 0..{classes - 1}, received {labels.dtype} from {labels.min()} to {labels.max()}."
        )
    return Examples(images.astype(np.uint8), labels.astype(np.int32), classes)


def _whole(examples: Examples, say: Callable[[str], None]) -> Examples:
    """The examples whose image can be decoded. Raises `InputError` if more cannot than are borne."""
    if not isinstance(examples.images, EncodedImages):
        return examples
    good = examples.images.whole(say)
    examples.images.damage.check()
    return dataclasses.replace(examples, images=examples.images.select(good).trusted(), labels=examples.labels[good])


def _held_out(examples: Examples, data: Data) -> tuple[Examples, Examples, np.ndarray | None]:
    """Training, validation, and which training labels students see: the same share by class for every seed."""
    if data.labeled is not None:
        held, labeled_mask = few_labels.choose_labeled(examples.labels, data)
        return examples.select(~held), examples.select(held), labeled_mask[~held]
    share, chosen = data.validation, np.zeros(len(examples), bool)
    random = np.random.Generator(np.random.Philox(key=[0, 0]))
    for label in np.unique(examples.labels):
        members = np.flatnonzero(examples.labels == label)
        chosen[random.permutation(members)[: round(share * len(members))]] = True
    return examples.select(~chosen), examples.select(chosen), None


def _fingerprint(*parts: Examples) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for array in (part.images, part.labels):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(array.fingerprint() if isinstance(array, EncodedImages) else np.ascontiguousarray(array))
    return digest.hexdigest()[:16]
