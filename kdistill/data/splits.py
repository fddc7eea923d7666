"""A named data set, or the user's own files -> `Splits`. NumPy only; TensorFlow is imported to read a copy of TFDS.

Validation images pick the best epoch, test images measure, and no test image is dropped. Every report states the
source of the data.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdistill.class_names import check_class_names
from kdistill.data import composed_digits, few_labels, image_folder
from kdistill.data.arrays import (
    Output,
    are_images,
    check_augmentation,
    check_inputs,
    check_labels,
    fingerprint_of,
    first_of,
    images_and_classes,
    is_one_class,
    map_arrays,
    npz_arrays,
    outputs_of,
    shapes_of,
)
from kdistill.data.cifar import cifar10
from kdistill.data.lazy_images import EncodedImages, subset
from kdistill.data.mnist import mnist, npz
from kdistill.errors import InputError, unknown
from kdistill.recipe import Data

# A data set is a function: (data, data_dir or None, download, say) -> ({"train": (images, labels), "test": ...}, class
# names, source in words). `load` checks what it returns.
SOURCES = {
    "mnist": mnist,
    "npz": npz,
    "cifar10": cifar10,
    "imagenet": image_folder.imagenet,
    "image_folder": image_folder.image_folder,
}
# As above, but of any inputs and labels: (...) -> (parts, what the labels mean, class names or (), source).
OTHER_SOURCES = {
    "npz": npz_arrays,  # where data.head states what its labels mean
    "digits_segment": composed_digits.segment,
    "digits_multilabel": composed_digits.multilabel,
    "digits_rows": composed_digits.rows,
}
ENCODED = ("imagenet", "image_folder")
# Images whose pixels are compared between training and test: of arrays, and of images that have to be decoded.
COMPARED, COMPARED_ENCODED = 2000, 64
# Test images in files that are looked up among the training images, and files that may be read for it.
LOOKED_UP, MOST_READ = 1000, 10_000


@dataclass(frozen=True)
class Examples:
    """Inputs, such as images, and their labels.

    Args:
        inputs: Images, uint8 `[n, height, width, channels]`, pixels 0..255: an array, or `EncodedImages`, which are
            decoded on access. Or arrays `[n, ...]` of anything else; of several inputs a dict by name.
        labels: The numbers of the classes, int32 `[n]`; or other labels, `[n, ...]`, of several outputs a dict by name.
        classes: The number of classes; needed for mixup and cutmix only.
    """

    inputs: np.ndarray | EncodedImages | dict[str, np.ndarray]
    labels: np.ndarray | dict[str, np.ndarray]
    classes: int | None = None

    @property
    def images(self):
        """The inputs, where they are images."""
        return self.inputs

    def __len__(self) -> int:
        return len(first_of(self.labels))

    def select(self, which) -> "Examples":
        """The examples at these positions (a slice, a mask, or numbers); no image is decoded."""
        inputs = map_arrays(lambda array: subset(array, which), self.inputs)
        return dataclasses.replace(self, inputs=inputs, labels=map_arrays(lambda array: array[which], self.labels))


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples.

    Args:
        source: Where the examples come from, in words.
        fingerprint: A hash of all examples.
        labeled_mask: bool `[training images]`, the images whose label students see; None: all (see `few_labels`).
        warnings: What looks wrong with the data; they have been printed, and are in the report of a run.
        head: What the labels mean, as for `Supervised`; None: they are classes of images.
        outputs: What a network gives for an example, by the names of the outputs (empty for the only one).
    """

    train: Examples
    validation: Examples
    test: Examples
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    labeled_mask: np.ndarray | None = None
    warnings: tuple[str, ...] = ()
    head: str | dict[str, str] | None = None
    outputs: dict[str, Output] | None = None

    @property
    def classifies(self) -> bool:
        """Whether every example has exactly one class."""
        return self.outputs is None or is_one_class(self.outputs)

    @property
    def has_images(self) -> bool:
        """Whether the inputs are images, one for each example."""
        return are_images(self.train.inputs)

    @property
    def input_shape(self):
        """The shape of an example: of images `(height, width, channels)`; of several inputs a dict by name."""
        return shapes_of(self.train.inputs)

    @property
    def sizes(self) -> int | dict[str, int]:
        """How many classes, labels or numbers a network gives, for an example or position; by output where several."""
        if self.outputs is None:
            return len(self.class_names)
        sizes = {name: output.shape[-1] for name, output in self.outputs.items()}
        return sizes.get("", sizes)


def load(
    data: Data,
    data_dir: str | Path | None = None,
    download: bool = False,
    say: Callable[[str], None] = print,
) -> Splits:
    """Loads the splits of a data set.

    Args:
        data: The name of the data set, and how it is split.
        data_dir: Its files. Default: the copy that TensorFlow Datasets has prepared, or the sample of MNIST that ships
            with kdistill.
        download: Fetch the data set with TensorFlow Datasets.
        say: Receives progress messages.

    Returns:
        The splits. Images in files of their own stay there (see `lazy_images`).

    Raises:
        InputError: A file is missing or damaged, or its content is no data set; the message names the file.
    """
    _check_settings(data, data_dir, download)
    if data.head is not None or data.name not in SOURCES:
        return _load_others(data, data_dir, download, say)
    parts, class_names, source = SOURCES[data.name](data, Path(data_dir) if data_dir else None, download, say)
    check_class_names(class_names, source)
    train, test = (_as_examples(*parts[name], len(class_names), f"{source}, {name}") for name in ("train", "test"))
    if train.images.shape[1:] != test.images.shape[1:]:
        shapes = train.images.shape[1:], test.images.shape[1:]
        raise InputError(f"{source}: the training images are {shapes[0]}, the test images {shapes[1]}.")
    warnings = _label_warnings(train.labels, class_names)
    limit = data.train_limit
    if limit is not None and limit > len(train):
        say(f"data.train_limit={limit:,} leaves out nothing: there are {len(train):,} training images.")
    if limit is None or data.labeled is not None:  # otherwise only the images within the limit are decoded, below
        train = _decodable(train.select(slice(limit)), say)
    train, validation, labeled_mask = _split_off_validation(train, data)
    train, validation, test = (
        _decodable(part if limit is None else part.select(slice(limit)), say) for part in (train, validation, test)
    )
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        if len(part) == 0:
            raise InputError(
                f"{source}: no {name} images remain. Give more images, or change data.validation (now "
                f"{data.validation:g})."
            )
    if isinstance(train.images, EncodedImages) and train.images.damage.reasons:
        say(f"Skipped: {train.images.damage.summary()}")
    warnings += _split_warnings(train, validation, test, class_names, limited=limit is not None)
    for warning in warnings:
        say(f"Warning: {warning}")
    labels_of_students = (
        () if labeled_mask is None else (Examples(train.images[:0], np.where(labeled_mask, train.labels, -1)),)
    )
    parts = (train, validation, test, *labels_of_students)
    fingerprint = fingerprint_of(*(value for part in parts for value in (part.inputs, part.labels)))
    return Splits(train, validation, test, class_names, source, fingerprint, labeled_mask, tuple(warnings))


def _load_others(data: Data, data_dir: str | Path | None, download: bool, say: Callable[[str], None]) -> Splits:
    """`load` for inputs and labels of any kind."""
    source = OTHER_SOURCES[data.name]
    parts, head, class_names, where = source(data, Path(data_dir) if data_dir else None, download, say)
    examples = {}
    for name in ("train", "test"):
        inputs, labels = parts[name]
        inputs = check_inputs(inputs, f"{where}, {name}")
        labels = check_labels(labels, head, len(first_of(inputs)), f"{where}, {name}")
        examples[name] = Examples(inputs, labels)
    train, test = examples.values()
    outputs = outputs_of([train.labels, test.labels], head)
    shapes = {name: (shapes_of(part.inputs), shapes_of(part.labels)) for name, part in examples.items()}
    if shapes["train"] != shapes["test"]:
        raise InputError(
            f"{where}: inputs and labels of an example are {shapes['train']} for training, {shapes['test']} for test. "
            "Give both the same names and sizes."
        )
    if class_names:
        check_class_names(class_names, where)
    check_augmentation(data, train.inputs, outputs)
    splits = Splits(train, train, test, tuple(class_names), where, "", head=head, outputs=outputs)
    if splits.classifies:
        classes = outputs[""].shape[-1]
        names = tuple(class_names) or tuple(map(str, range(classes)))
        train, test = (dataclasses.replace(part, classes=classes) for part in (train, test))
        splits = dataclasses.replace(splits, class_names=names)
    train, validation, labeled_mask = _split_off_validation(train, data, splits.classifies)
    train, validation, test = (part.select(slice(data.train_limit)) for part in (train, validation, test))
    for name, part in (("training", train), ("validation", validation), ("test", test)):
        if len(part) == 0:
            raise InputError(f"{where}: no {name} examples remain. Give more, or change data.validation.")
    contents = [value for part in (train, validation, test) for value in (part.inputs, part.labels)]
    fingerprint = fingerprint_of(*contents, *(() if labeled_mask is None else [labeled_mask]))
    return dataclasses.replace(
        splits, train=train, validation=validation, test=test, fingerprint=fingerprint, labeled_mask=labeled_mask
    )


def _check_settings(data: Data, data_dir: str | Path | None, download: bool) -> None:
    if data.name not in {**SOURCES, **OTHER_SOURCES}:
        raise unknown("data set", data.name, {**SOURCES, **OTHER_SOURCES})
    if data.head is not None and data.name != "npz":
        raise InputError(
            f"data.head={data.head!r} states what the labels of data.name=npz mean; those of '{data.name}' are known. "
            "Leave it out (--set data.head=none)."
        )
    if (data.image_size is not None) != (data.name in ENCODED):
        expected = "a number of pixels, such as 224" if data.name in ENCODED else "none: its images have one size"
        raise InputError(f"With the data set '{data.name}' data.image_size expects {expected}.")
    if data_dir and download:
        raise InputError("--data-dir and --download exclude each other. Give one of them.")


def _as_examples(images: np.ndarray, labels: np.ndarray, classes: int, where: str) -> Examples:
    """The arrays as `Examples`. Raises `InputError` unless they are images, with one label per image, of a class."""
    if isinstance(images, EncodedImages):  # sorted by class; shuffled, so that the first n images are of all classes
        shuffled = np.random.Generator(np.random.Philox(key=[3, 0])).permutation(len(labels))
        return Examples(images.select(shuffled), labels[shuffled].astype(np.int32), classes)
    return Examples(*images_and_classes(images, labels, classes, where), classes)


def _label_warnings(labels: np.ndarray, class_names: tuple[str, ...]) -> list[str]:
    """Whether the labels `[n]` of all training images, before they are split, leave out a class."""
    missing = np.setdiff1d(np.arange(len(class_names)), labels)
    if not len(missing):
        return []
    first = int(labels.min())
    if len(missing) == first:
        advice = f"Number the classes from 0 (labels - {first}), or add images."
    else:
        advice = "Number the classes from 0 without gaps, or add images."
    return [
        f"The labels of the training images are from {first} to {labels.max()}. "
        f"{_images_of(missing, class_names)} no image, but the networks get an output for it. {advice}"
    ]


def _split_warnings(
    train: Examples, validation: Examples, test: Examples, class_names: tuple[str, ...], limited: bool
) -> list[str]:
    """What looks wrong with the splits: classes without an image, test images in another range or from training."""
    present = np.unique(np.concatenate([part.labels for part in (train, validation, test)]))
    consequences = {
        "training": (train, "The students cannot learn it"),
        "validation": (validation, "Validation accuracy does not count it"),
        "test": (test, "Test accuracy does not count it"),
    }
    warnings = []
    for name, (part, consequence) in consequences.items():
        missing = np.setdiff1d(present, part.labels)
        if len(missing) and not (limited and part is not train):  # a limit is meant to take a part
            warnings.append(
                f"{_images_of(missing, class_names)} no {name} image. {consequence}. Add images, or change "
                "data.validation."
            )
    warnings += filter(None, [_range_warning(train.images, test.images)])
    duplicates = _duplicates(test.images, train.images, validation.images)
    if duplicates:
        warnings.append(
            f"{duplicates:,} of {len(test):,} test images are training images, byte for byte: test accuracy is too "
            "high. Remove them from one of the two."
        )
    return warnings


def _images_of(classes: np.ndarray, class_names: tuple[str, ...]) -> str:
    """The beginning of a sentence, for classes that have no images."""
    names = _some([f"'{class_names[label]}'" for label in classes])
    return f"The class {names} has" if len(classes) == 1 else f"The classes {names} have"


def _some(values) -> str:
    more = f" and {len(values) - 5} more" if len(values) > 5 else ""
    return ", ".join(map(str, values[:5])) + more


def _range_warning(train, test) -> str | None:
    """Whether the training images look scaled, or the test images are brighter, darker or scaled otherwise."""
    pixels = [images[_evenly_spaced(images)].astype(np.float32) for images in (train, test)]
    low, high = zip(*((int(part.min()), int(part.max())) for part in pixels), strict=True)
    if high[0] <= 1:
        return (
            f"The training pixels are from {low[0]} to {high[0]}: they look scaled, or cast to whole numbers after "
            "that. kdistill's models expect 0..255 and scale them themselves. Multiply the images by 255 before they "
            "are saved as uint8."
        )
    brightness = [part.mean(axis=(1, 2, 3)) for part in pixels]
    difference = abs(brightness[0].mean() - brightness[1].mean())
    # Chance moves the mean brightness of a few test images by one standard deviation of an image at most.
    if max(high) < 2 * min(high) and difference < max(32, 4 * brightness[0].std()):
        return None
    return (
        f"The training pixels are from {low[0]} to {high[0]} (mean {brightness[0].mean():.0f}), the test pixels from "
        f"{low[1]} to {high[1]} (mean {brightness[1].mean():.0f}): their range differs, and test accuracy suffers. "
        "Prepare both in the same way."
    )


def _evenly_spaced(images) -> np.ndarray:
    count = min(len(images), COMPARED_ENCODED if isinstance(images, EncodedImages) else COMPARED)
    return np.linspace(0, len(images) - 1, count).round().astype(int)


def _duplicates(test, *others) -> int:
    """The number of test images that are among the others, byte for byte.

    Of arrays all are compared. Of files, `LOOKED_UP` test images are, with the files of the same size; none are where
    that means to read more than `MOST_READ` files, as with uncompressed images.
    """
    encoded = isinstance(test, EncodedImages)
    if encoded:
        test = test.select(np.linspace(0, len(test) - 1, min(len(test), LOOKED_UP)).round().astype(int))
    keys = _keys(test)
    candidates = [np.flatnonzero(np.isin(_keys(images), keys)) for images in others]
    if encoded and len(test) + sum(map(len, candidates)) > MOST_READ:
        return 0
    digests = {_digest(images, place) for images, places in zip(others, candidates, strict=True) for place in places}
    if not digests:
        return 0
    return sum(_digest(test, place) in digests for place in range(len(test)))


def _keys(images) -> np.ndarray:
    """A number for every image, uint64 `[n]`; equal images have equal ones, and others seldom."""
    if isinstance(images, EncodedImages):
        columns = images.store.headers[images.indexes].astype(np.uint64)
    else:
        pixels = images.reshape(len(images), -1)
        places = np.linspace(0, pixels.shape[1] - 1, 256).round().astype(int)
        columns = np.ascontiguousarray(pixels[:, places]).view(np.uint64)
    factors = np.random.Generator(np.random.Philox(key=[4, 0])).integers(0, 2**64, columns.shape[1], np.uint64)
    return (columns * factors).sum(axis=1, dtype=np.uint64)


def _digest(images, place: int) -> bytes:
    content = images.store.read(images.indexes[place]) if isinstance(images, EncodedImages) else images[place].tobytes()
    return hashlib.blake2b(content, digest_size=16).digest()


def _decodable(examples: Examples, say: Callable[[str], None]) -> Examples:
    """The examples whose image can be decoded. Raises `InputError` if more are damaged than the limit allows."""
    if not isinstance(examples.images, EncodedImages):
        return examples
    mask = examples.images.decodable(say)
    examples.images.damage.check()
    return dataclasses.replace(
        examples, inputs=examples.images.select(mask).mark_verified(), labels=examples.labels[mask]
    )


def _split_off_validation(
    examples: Examples, data: Data, by_class: bool = True
) -> tuple[Examples, Examples, np.ndarray | None]:
    """Training, validation, and the mask of training labels that students see.

    The share of every class is the same (`by_class`), and the choice does not depend on a run's seed.
    """
    classes = examples.labels if by_class else np.zeros(len(examples), np.int32)
    if data.labeled is not None:
        validation_mask, labeled_mask = few_labels.choose_labeled(classes, data)
        return examples.select(~validation_mask), examples.select(validation_mask), labeled_mask[~validation_mask]
    validation_mask = few_labels.choose_validation(classes, data.validation)
    return examples.select(~validation_mask), examples.select(validation_mask), None
