"""MNIST: the original IDX files, an `.npz`, or the sample that ships with kdistill; and any images in an `.npz`."""

import hashlib
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdistill import archives
from kdistill.data import tfds
from kdistill.errors import InputError
from kdistill.recipe import Data

SAMPLE = Path(__file__).parent / "samples" / "mnist-10k.npz"
SAMPLE_SHA256 = "71647cbb85b9fc1c76954885a8c108e56ac2ca18f916fd5d540ace112ba02ecf"
DIGITS = tuple("0123456789")
PARTS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
MOST_IDX_BYTES = 300_000 * 28 * 28  # five times MNIST; EMNIST has 280,000 images


def mnist(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Handwritten digits of 28x28, ten classes (LeCun et al. 1998)."""
    if data_dir is not None:
        parts, source = _read_files(data_dir)
    elif download or tfds.newest_copy("mnist"):
        parts, source = tfds.load_arrays("mnist", say)
    else:
        parts, source = (
            _read_sample(),
            "the sample of MNIST that ships with kdistill (10,000 training, 2,000 test images)",
        )
    for name, (images, _) in parts.items():
        if images.shape[1:] not in ((28, 28), (28, 28, 1)):
            raise InputError(f"{source}, {name}: MNIST images are 28x28, received shape {images.shape}.")
    return parts, DIGITS, source


def _read_files(folder: Path):
    """The IDX files of a folder if it has any, else its .npz; and the source, which states which of them."""
    if folder.suffix == ".npz" or (not any(folder.glob("*ubyte*")) and any(folder.glob("*.npz"))):
        archive = find_archive(folder)
        return _read_npz(archive), f"the file {archive}"
    if not folder.is_dir():
        raise InputError(f"--data-dir: no folder or .npz file at '{folder}'.")
    paths, missing = {}, []
    for stem in ("train-images", "train-labels", "t10k-images", "t10k-labels"):
        kind = "idx3-ubyte" if stem.endswith("images") else "idx1-ubyte"
        names = [f"{stem}{dash}{kind}{end}" for dash in "-." for end in ("", ".gz")]
        path = next((folder / name for name in names if (folder / name).is_file()), None)
        if path is None:
            missing.append(f"{stem}-{kind}[.gz]")
        else:
            paths[stem] = path
    if missing:
        raise InputError(
            f"--data-dir: '{folder}' lacks {', '.join(missing)} (IDX files of MNIST). Add them, or give an .npz file."
        )
    parts = {
        name: (read_idx(paths[f"{stem}-images"], 3), read_idx(paths[f"{stem}-labels"], 1))
        for name, stem in (("train", "train"), ("test", "t10k"))
    }
    return parts, f"the IDX files in {folder}"


def find_archive(path: Path) -> Path:
    """The .npz file at this path, or the only one in this folder."""
    archives = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if len(archives) > 1:
        names = ", ".join(archive.name for archive in archives)
        raise InputError(f"--data-dir: '{path}' holds {len(archives)} .npz files ({names}). Give the path of one.")
    if not archives or archives[0].suffix != ".npz" or not archives[0].is_file():
        raise InputError(f"--data-dir: no .npz file at '{path}'.")
    return archives[0]


def read_arrays(path: Path, is_wanted: Callable[[str], bool]) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of an .npz whose names are wanted, and the names of all. Raises `InputError` for a damaged file."""
    try:
        with archives.Arrays(path) as archive:
            return {key: archive.read(key) for key in archive.shapes if is_wanted(key)}, list(archive.shapes)
    except archives.ERRORS as error:
        raise InputError(
            f"'{path}' is no readable .npz file of plain arrays: {error}. Get or write it again."
        ) from None


def _read_npz(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    wanted = {key for keys in PARTS.values() for key in keys}
    arrays, names = read_arrays(path, wanted.__contains__)
    missing = [key for keys in PARTS.values() for key in keys if key not in arrays]
    if missing:
        raise InputError(
            f"'{path}' lacks {', '.join(missing)}; it holds {', '.join(names) or 'nothing'}. "
            "Save the arrays under these names."
        )
    return {name: (arrays[x], arrays[y]) for name, (x, y) in PARTS.items()}


def _read_sample() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    if not SAMPLE.is_file():
        raise InputError(f"The sample '{SAMPLE}' is missing. Install kdistill again, or give --data-dir.")
    if hashlib.sha256(SAMPLE.read_bytes()).hexdigest() != SAMPLE_SHA256:
        raise InputError(f"The sample '{SAMPLE}' is damaged: its checksum is wrong. Install kdistill again.")
    return _read_npz(SAMPLE)


def npz(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Any images: an .npz with x_train, y_train, x_test, y_test; the classes are 0 to the largest label."""
    if data_dir is None:
        raise InputError("The data set 'npz' expects --data-dir FILE.npz with x_train, y_train, x_test, y_test.")
    archive = find_archive(data_dir)
    parts = _read_npz(archive)
    images, labels = parts["train"]
    if images.ndim not in (3, 4) or labels.ndim > 2:
        raise InputError(
            f"'{archive}': expected images [n, height, width(, channels)] and a class for each, [n]; received x_train "
            f"{images.shape} and y_train {labels.shape}. For other inputs and labels state what the labels mean: "
            "data.head=classes, labels or numbers."
        )
    if labels.size == 0 or labels.dtype.kind not in "ui":
        raise InputError(f"'{archive}': y_train expects integers, received {labels.dtype} {labels.shape}.")
    # No class can be learned without a training image, so a label this large is a mistake.
    if labels.max() >= labels.size:
        raise InputError(
            f"'{archive}': y_train has the label {labels.max()}, but only {labels.size} labels. "
            "Number the classes from 0 without gaps."
        )
    return parts, tuple(str(i) for i in range(int(labels.max()) + 1)), f"the file {archive}"


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file, gzipped or not. Raises `InputError` if it is damaged or of another rank."""
    try:
        with open(path, "rb") as file:
            data = archives.Inflated(file, MOST_IDX_BYTES).readall()
    except archives.ERRORS as error:
        raise InputError(f"'{path}' is damaged or truncated ({error}). Get the file again.") from None
    header = 4 + 4 * dimensions
    magic = struct.unpack(">I", data[:4])[0] if len(data) >= 4 else None
    expected = 0x0800 + dimensions
    if magic != expected:
        received = "nothing" if magic is None else f"0x{magic:08x}"
        raise InputError(
            f"'{path}' is no IDX file of uint8 with {dimensions} dimensions: expected the magic number "
            f"0x{expected:08x}, received {received}. Get the file again."
        )
    if len(data) < header:
        raise InputError(f"'{path}' is truncated: its header of {header} bytes is incomplete. Get the file again.")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    size = int(np.prod(shape, dtype=object))
    if len(data) - header != size:
        raise InputError(
            f"'{path}' holds {len(data) - header} bytes where its header promises {size} (shape {shape}): "
            "it is truncated, or something is appended. Get the file again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def write_idx(path: Path, array: np.ndarray) -> None:
    """Writes a uint8 array as an IDX file."""
    shape = struct.pack(f">I{array.ndim}I", 0x0800 + array.ndim, *array.shape)
    path.write_bytes(shape + array.astype(np.uint8).tobytes())
