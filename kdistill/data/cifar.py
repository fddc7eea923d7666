"""CIFAR-10 from its binary version, as a folder or the downloaded tar.gz, or from TensorFlow Datasets.

The "python version" is pickle, which runs code when it is loaded: it is refused. A tar is read in memory, never
unpacked, so a path inside it cannot point anywhere.
"""

import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdistill.data import tfds
from kdistill.errors import InputError
from kdistill.recipe import Data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane, row by row
LARGEST = 100_000 * RECORD  # ten times a real file: what is larger is something else
DOWNLOAD = "the 'binary version' (cifar-10-binary.tar.gz) of https://www.cs.toronto.edu/~kriz/cifar.html"


def cifar10(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """60,000 images of 32x32, ten classes (Krizhevsky 2009)."""
    if data_dir is None:
        if not download and not tfds.newest("cifar10"):
            raise InputError(
                f"CIFAR-10 does not ship with kdistill. Give --data-dir, a folder or tar.gz with {DOWNLOAD}, or "
                "--download for TensorFlow Datasets to fetch it."
            )
        parts, source = tfds.arrays("cifar10", say)
    elif data_dir.is_file():
        parts, source = _parts(_of_tar(data_dir), data_dir), f"the file {data_dir}"
    elif data_dir.is_dir():
        parts, source = _of_folder(data_dir)
    else:
        raise InputError(f"--data-dir: no folder or file at '{data_dir}'.")
    return parts, CLASSES, source


def _wanted(name: str) -> bool:
    return name == "test_batch.bin" or (name.startswith("data_batch_") and name.endswith(".bin"))


def _of_folder(folder: Path):
    for place in (folder, folder / "cifar-10-batches-bin"):
        files = {path.name: path for path in place.glob("*.bin") if _wanted(path.name)} if place.is_dir() else {}
        if files:
            too_large = [name for name, path in files.items() if path.stat().st_size > LARGEST]
            if too_large:
                raise InputError(f"'{place / too_large[0]}' is too large for a file of CIFAR-10.")
            return _parts({name: path.read_bytes() for name, path in files.items()}, place), f"the files in {place}"
    tar = folder / "cifar-10-binary.tar.gz"
    if tar.is_file():
        return _parts(_of_tar(tar), tar), f"the file {tar}"
    places = (folder, folder / "cifar-10-batches-py")
    if any((place / "data_batch_1").exists() for place in places) or (folder / "cifar-10-python.tar.gz").exists():
        raise InputError(
            f"'{folder}' holds the 'python version' of CIFAR-10, which is pickle: loading it would run code from a "
            f"download. Take {DOWNLOAD}."
        )
    raise InputError(f"--data-dir: '{folder}' holds no data_batch_*.bin and test_batch.bin. Take {DOWNLOAD}.")


def _of_tar(path: Path) -> dict[str, bytes]:
    """The files of CIFAR-10 in a tar, by name; what else is in it is not looked at."""
    found = {}
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:*") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name == "data_batch_1":
                    raise InputError(f"'{path}' is the 'python version' of CIFAR-10, which is pickle. Take {DOWNLOAD}.")
                if not member.isfile() or not _wanted(name):
                    continue
                if member.size > LARGEST or name in found:
                    raise InputError(f"'{path}': its '{member.name}' is too large for CIFAR-10, or there twice.")
                content = tar.extractfile(member).read()
                if len(content) != member.size:
                    raise EOFError(f"{name} ends after {len(content)} of {member.size} bytes")
                found[name] = content
            while tar.fileobj.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise InputError(
            f"'{path}' is damaged, truncated or no tar ({str(error).splitlines()[0]}). Download it again: {DOWNLOAD}."
        ) from None
    return found


def _parts(files: dict[str, bytes], where: Path):
    names = {"train": sorted(name for name in files if name != "test_batch.bin"), "test": ["test_batch.bin"]}
    if "test_batch.bin" not in files or not names["train"]:
        missing = "test_batch.bin" if "test_batch.bin" not in files else "data_batch_*.bin"
        raise InputError(f"'{where}' lacks {missing}. Take {DOWNLOAD}.")
    for name, content in files.items():
        if not content or len(content) % RECORD:
            raise InputError(
                f"'{where}': {name} holds {len(content)} bytes; expected a multiple of {RECORD} (label and pixels of "
                f"an image). It is truncated or something else. Take {DOWNLOAD}."
            )
    parts = {}
    for part in ("train", "test"):
        records = np.frombuffer(b"".join(files[name] for name in names[part]), np.uint8).reshape(-1, RECORD)
        images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        parts[part] = np.ascontiguousarray(images), records[:, 0].astype(np.int32)
    return parts
