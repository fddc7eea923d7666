"""CIFAR-10: its binary version, as a folder or the downloaded tar.gz, or a copy of TensorFlow Datasets.

The "python version" is refused: it is pickle, which runs code when it is loaded. A tar is read in memory and never
unpacked, so no path in it can point outside.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdistill import archives
from kdistill.data import tfds
from kdistill.errors import InputError
from kdistill.recipe import Data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane, row by row
MAX_BYTES = 100_000 * RECORD  # ten times a real file: a larger file is something else
MOST_TAR_BYTES = 120_000 * RECORD  # twice the real tar, inflated
DOWNLOAD = "the 'binary version' (cifar-10-binary.tar.gz) of https://www.cs.toronto.edu/~kriz/cifar.html"


def cifar10(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """60,000 images of 32x32, ten classes (Krizhevsky 2009)."""
    if data_dir is None:
        if not download and not tfds.newest_copy("cifar10"):
            raise InputError(
                f"CIFAR-10 does not ship with kdistill. Give --data-dir, a folder or tar.gz with {DOWNLOAD}, or "
                "--download, which fetches it with TensorFlow Datasets."
            )
        parts, source = tfds.load_arrays("cifar10", say)
    elif data_dir.is_file():
        parts, source = _parse(_read_tar(data_dir), data_dir), f"the file {data_dir}"
    elif data_dir.is_dir():
        parts, source = _read_folder(data_dir)
    else:
        raise InputError(f"--data-dir: no folder or file at '{data_dir}'.")
    return parts, CLASSES, source


def _is_batch(name: str) -> bool:
    return name == "test_batch.bin" or (name.startswith("data_batch_") and name.endswith(".bin"))


def _read_folder(folder: Path):
    for place in (folder, folder / "cifar-10-batches-bin"):
        files = {path.name: path for path in place.glob("*.bin") if _is_batch(path.name)} if place.is_dir() else {}
        if files:
            too_large = [name for name, path in files.items() if path.stat().st_size > MAX_BYTES]
            if too_large:
                raise InputError(f"'{place / too_large[0]}' is too large for a file of CIFAR-10. Get {DOWNLOAD}.")
            return _parse({name: path.read_bytes() for name, path in files.items()}, place), f"the files in {place}"
    tar = folder / "cifar-10-binary.tar.gz"
    if tar.is_file():
        return _parse(_read_tar(tar), tar), f"the file {tar}"
    places = (folder, folder / "cifar-10-batches-py")
    if any((place / "data_batch_1").exists() for place in places) or (folder / "cifar-10-python.tar.gz").exists():
        raise InputError(
            f"'{folder}' holds the 'python version' of CIFAR-10, which is pickle: loading it can run any code. "
            f"Get {DOWNLOAD}."
        )
    raise InputError(f"--data-dir: '{folder}' holds no data_batch_*.bin and test_batch.bin. Get {DOWNLOAD}.")


def _read_tar(path: Path) -> dict[str, bytes]:
    """The files of CIFAR-10 in a tar, by name; other files in it are not read."""
    files = {}
    try:
        for member, content in archives.tar_members(path, MOST_TAR_BYTES):
            name = member.name.rpartition("/")[2]
            if name == "data_batch_1":
                raise InputError(f"'{path}' is the 'python version' of CIFAR-10, which is pickle. Get {DOWNLOAD}.")
            if content is None or not _is_batch(name):
                continue
            if member.size > MAX_BYTES or name in files:
                raise InputError(
                    f"'{path}': its '{name!a}' is too large for CIFAR-10, or occurs twice. Get {DOWNLOAD}."
                )
            files[name] = content.read()
            if len(files[name]) != member.size:
                raise EOFError(f"{name} ends after {len(files[name])} of {member.size} bytes")
    except InputError:
        raise
    except archives.ERRORS as error:
        reason = (str(error).splitlines() or ["the end is missing"])[0]
        raise InputError(
            f"'{path}' is damaged, truncated or no tar ({reason}). Download it again: {DOWNLOAD}."
        ) from None
    return files


def _parse(files: dict[str, bytes], where: Path):
    names = {"train": sorted(name for name in files if name != "test_batch.bin"), "test": ["test_batch.bin"]}
    if "test_batch.bin" not in files or not names["train"]:
        missing = "test_batch.bin" if "test_batch.bin" not in files else "data_batch_*.bin"
        raise InputError(f"'{where}' lacks {missing}. Get {DOWNLOAD}.")
    for name, content in files.items():
        if not content or len(content) % RECORD:
            raise InputError(
                f"'{where}': {name} holds {len(content)} bytes; expected a multiple of {RECORD} (label and pixels of "
                f"an image). The file is truncated or something else. Get {DOWNLOAD}."
            )
    parts = {}
    for part in ("train", "test"):
        records = np.frombuffer(b"".join(files[name] for name in names[part]), np.uint8).reshape(-1, RECORD)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[part] = np.ascontiguousarray(images), records[:, 0].astype(np.int32)
    return parts
