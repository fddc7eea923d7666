"""A named data set, or the user's own files -> `Splits`. Numpy only: TensorFlow is imported for TFDS alone.

Validation picks, test reports, nothing is dropped. Which source was used is said, and is part of every report.
"""

import contextlib
import hashlib
import os
import struct
import sys
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdistill import idx, labelled
from kdistill.errors import InputError, unknown
from kdistill.recipe import Data

SAMPLE = Path(__file__).parent / "samples" / "mnist-10k.npz"
SAMPLE_SHA256 = "71647cbb85b9fc1c76954885a8c108e56ac2ca18f916fd5d540ace112ba02ecf"
DIGITS = tuple("0123456789")
PARTS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
# What zipfile, zlib and numpy raise for damaged archives: found by changing random bytes of one.
DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    NotImplementedError,
    RuntimeError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class Examples:
    """Images, uint8 `[n, height, width, channels]`, and their classes, int32 `[n]`."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Splits:
    """Training, validation and test examples; where they come from, in words; a fingerprint of every byte of them."""

    train: Examples
    validation: Examples
    test: Examples
    class_names: tuple[str, ...]
    source: str
    fingerprint: str
    known: np.ndarray | None = None  # bool [training images]: those whose label students see; None: all (see labelled)


def load(
    data: Data,
    data_dir: str | Path | None = None,
    download: bool = False,
    say: Callable[[str], None] = print,
) -> Splits:
    """The splits of a data set.

    With `data_dir`: its files. Without: a copy that TensorFlow Datasets has prepared; with `download` TFDS fetches
    it; else the sample that ships with kdistill. Raises `InputError` that names the file and what is wrong with it.
    """
    if data.name not in SOURCES:
        raise unknown("data set", data.name, SOURCES)
    if data_dir and download:
        raise InputError("--data-dir and --download exclude each other: the files are there. Leave one out.")
    parts, class_names, source = SOURCES[data.name](Path(data_dir) if data_dir else None, download, say)
    examples = {name: _checked(*parts[name], len(class_names), f"{source}, {name}") for name in ("train", "test")}
    if examples["train"].images.shape[1:] != examples["test"].images.shape[1:]:
        shapes = [examples[name].images.shape[1:] for name in ("train", "test")]
        raise InputError(f"{source}: the training images are {shapes[0]}, the test images {shapes[1]}.")
    limit = data.train_limit
    train, validation, known = _held_out(examples["train"], data)
    train, validation, test = (
        each if limit is None else Examples(each.images[:limit], each.labels[:limit])
        for each in (train, validation, examples["test"])
    )
    for name, each in (("training", train), ("validation", validation), ("test", test)):
        if len(each) == 0:
            raise InputError(f"{source}: no {name} images are left. It holds too few, or data.validation is too small.")
    seen = () if known is None else (Examples(train.images[:0], np.where(known, train.labels, -1)),)
    fingerprint = _fingerprint(train, validation, test, *seen)
    return Splits(train, validation, test, class_names, source, fingerprint, known)


def _checked(images: np.ndarray, labels: np.ndarray, classes: int, where: str) -> Examples:
    """The arrays as `Examples`, if they are images with a label of a known class each."""
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
    return Examples(images.astype(np.uint8), labels.astype(np.int32))


def _held_out(examples: Examples, data: Data) -> tuple[Examples, Examples, np.ndarray | None]:
    """Training, validation, and which training labels students see: the same share of every class, whatever the seed.

    With `data.labelled` the limit on images comes first, as a mask cut off later would lose its labels.
    """
    if data.labelled is not None:
        examples = Examples(examples.images[: data.train_limit], examples.labels[: data.train_limit])
        held, known = labelled.choose(examples.labels, data)
        train, validation = (Examples(examples.images[mask], examples.labels[mask]) for mask in (~held, held))
        return train, validation, known[~held]
    share, chosen = data.validation, np.zeros(len(examples), bool)
    random = np.random.Generator(np.random.Philox(key=[0, 0]))
    for label in np.unique(examples.labels):
        members = np.flatnonzero(examples.labels == label)
        chosen[random.permutation(members)[: round(share * len(members))]] = True
    return *(Examples(examples.images[mask], examples.labels[mask]) for mask in (~chosen, chosen)), None


def _fingerprint(*parts: Examples) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for array in (part.images, part.labels):
            digest.update(repr((array.shape, array.dtype.str)).encode())
            digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()[:16]


# -- MNIST ----------------------------------------------------------------------------------------------------------


def _mnist(data_dir: Path | None, download: bool, say: Callable[[str], None]):
    if data_dir is not None:
        parts, source = _mnist_files(data_dir)
    elif download or _tfds_copy("mnist"):
        parts, source = _from_tfds("mnist", say)
    else:
        parts, source = _sample(), "the sample of MNIST that ships with kdistill (10,000 training, 2,000 test images)"
    for name, (images, _) in parts.items():
        if images.shape[1:] not in ((28, 28), (28, 28, 1)):
            raise InputError(f"{source}, {name}: MNIST images are 28x28, received shape {images.shape}.")
    return parts, DIGITS, source


def _mnist_files(folder: Path):
    """The IDX files where a folder has any of them, or else its .npz: the source says which."""
    if folder.suffix == ".npz" or (not any(folder.glob("*ubyte*")) and any(folder.glob("*.npz"))):
        archive = _archive(folder)
        return _npz(archive), f"the file {archive}"
    if not folder.is_dir():
        raise InputError(f"--data-dir: no folder or .npz file at '{folder}'.")
    found, missing = {}, []
    for stem in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        kind = "idx3-ubyte" if stem.endswith("images") else "idx1-ubyte"
        names = [f"{stem}{dash}{kind}{end}" for dash in "-." for end in ("", ".gz")]
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            missing.append(f"{stem}-{kind}[.gz]")
        else:
            found[stem] = path
    if missing:
        raise InputError(
            f"--data-dir: '{folder}' lacks {', '.join(missing)} (the IDX files of MNIST), or an .npz file."
        )
    parts = {
        name: (idx.read(found[f"{stem}-images"], 3), idx.read(found[f"{stem}-labels"], 1))
        for name, stem in (("train", "train"), ("test", "t10k"))
    }
    return parts, f"the IDX files in {folder}"


def _archive(path: Path) -> Path:
    """The .npz file at this path, or the only one in this folder."""
    archives = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(archives) > 1:
        names = ", ".join(each.name for each in archives)
        raise InputError(f"--data-dir: '{path}' holds {len(archives)} .npz files ({names}). Give the path of one.")
    if not archives or archives[0].suffix != ".npz" or not archives[0].is_file():
        raise InputError(f"--data-dir: no .npz file at '{path}'.")
    return archives[0]


def _npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one array, as an .npy file does")
            arrays = {key: archive[key] for keys in PARTS.values() for key in keys if key in archive.files}
            files = archive.files
    except DAMAGED as error:
        raise InputError(f"'{path}' is no readable .npz file of plain arrays: {error}") from None
    missing = [key for keys in PARTS.values() for key in keys if key not in arrays]
    if missing:
        raise InputError(f"'{path}' lacks {', '.join(missing)}; it holds {', '.join(files) or 'nothing'}.")
    return {name: (arrays[x], arrays[y]) for name, (x, y) in PARTS.items()}


def _sample() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if not SAMPLE.is_file():
        raise InputError(f"The sample '{SAMPLE}' is missing. Install kdistill again, or give --data-dir.")
    if hashlib.sha256(SAMPLE.read_bytes()).hexdigest() != SAMPLE_SHA256:
        raise InputError(f"The sample '{SAMPLE}' is damaged: its checksum is wrong. Install kdistill again.")
    return _npz(SAMPLE)


# -- TensorFlow Datasets --------------------------------------------------------------------------------------------


def _tfds_root() -> Path:
    """Where TensorFlow Datasets keeps its data. Named to TFDS too, which reads the variable only when imported."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


def _tfds_copy(name: str) -> Path | None:
    """The newest prepared copy of a data set. Only folders are looked at, as importing TFDS takes seconds.

    TFDS writes into a folder with "incomplete" in its name and renames it, so a download that failed is no copy.
    """
    found = [path.parent for path in (_tfds_root() / name).glob("*/dataset_info.json")]
    return max((path for path in found if "incomplete" not in path.name), default=None)


def _from_tfds(name: str, say: Callable[[str], None]):
    """The prepared copy of a data set; where there is none it is downloaded."""
    import tensorflow_datasets as tfds

    copy = _tfds_copy(name)
    if copy is None:
        builder = tfds.builder(name, data_dir=_tfds_root())
        say(f"Downloading {name} with TensorFlow Datasets to {builder.data_path} (it gives up after some minutes)")
        try:
            with contextlib.redirect_stdout(sys.stderr):  # TFDS prints; standard output may be for a machine
                builder.download_and_prepare()
        except Exception as error:  # network, disk, checksum: many kinds
            raise InputError(
                f"TensorFlow Datasets cannot download '{name}': {error}. Leave out --download, or give --data-dir."
            ) from error
        copy = Path(builder.data_path)
    try:
        builder = tfds.builder_from_directory(copy)
        examples = {part: tfds.as_numpy(builder.as_dataset(split=part, batch_size=-1)) for part in ("train", "test")}
    except Exception as error:  # damaged records, a description that cannot be parsed: many kinds
        raise InputError(
            f"TensorFlow Datasets cannot read its copy of '{name}' in {copy}: {error}. Remove that folder."
        ) from error
    parts = {part: (each["image"], each["label"]) for part, each in examples.items()}
    return parts, f"TensorFlow Datasets, {name} {builder.version} in {copy}"


def _own_npz(data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Any images: an .npz with x_train, y_train, x_test, y_test; classes are 0 to the largest label."""
    if data_dir is None:
        raise InputError("The data set 'npz' expects --data-dir FILE.npz with x_train, y_train, x_test, y_test.")
    archive = _archive(data_dir)
    parts = _npz(archive)
    labels = parts["train"][1]
    if labels.size == 0 or labels.dtype.kind not in "ui":
        raise InputError(f"'{archive}': y_train expects whole numbers, received {labels.dtype} {labels.shape}.")
    # A class without a training image cannot be learnt, so a label this large is a mistake, not a data set.
    if labels.max() >= labels.size:
        raise InputError(f"'{archive}': y_train has the label {labels.max()}, but only {labels.size} labels.")
    return parts, tuple(str(i) for i in range(int(labels.max()) + 1)), f"the file {archive}"


# A data set is a function: (data_dir or None, download, say) -> ({"train": (images, labels), "test": ...}, class names,
# source in words). `load` checks what it gives.
SOURCES = {"mnist": _mnist, "npz": _own_npz}
