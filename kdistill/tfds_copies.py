"""Copies of data sets that TensorFlow Datasets has prepared; it is imported only where there is one to read."""

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

from kdistill.errors import InputError


def root() -> Path:
    """Where TensorFlow Datasets keeps its data. Named to TFDS too, which reads the variable only when imported."""
    return Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets").expanduser()


def newest(name: str) -> Path | None:
    """The newest prepared copy of a data set. Only folders are looked at, as importing TFDS takes seconds.

    TFDS writes into a folder with "incomplete" in its name and renames it, so a download that failed is no copy.
    """
    found = [path.parent for path in (root() / name).glob("*/dataset_info.json")]
    return max((path for path in found if "incomplete" not in path.name), default=None)


def prepared(name: str, say: Callable[[str], None]) -> Path:
    """The prepared copy of a data set; where there is none it is downloaded."""
    copy = newest(name)
    if copy is not None:
        return copy
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=root())
    say(f"Downloading {name} with TensorFlow Datasets to {builder.data_path} (it gives up after some minutes)")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints; standard output may be for a machine
            builder.download_and_prepare()
    except Exception as error:  # network, disk, checksum: many kinds
        raise InputError(
            f"TensorFlow Datasets cannot download '{name}': {error}. Leave out --download, or give --data-dir."
        ) from error
    return Path(builder.data_path)


def arrays(name: str, say: Callable[[str], None]):
    """The images and labels of a prepared copy, in memory, and where they come from."""
    import tensorflow_datasets as tfds

    copy = prepared(name, say)
    try:
        builder = tfds.builder_from_directory(copy)
        examples = {part: tfds.as_numpy(builder.as_dataset(split=part, batch_size=-1)) for part in ("train", "test")}
    except Exception as error:  # damaged records, a description that cannot be parsed: many kinds
        raise unreadable(name, copy, error) from error
    parts = {part: (each["image"], each["label"]) for part, each in examples.items()}
    return parts, f"TensorFlow Datasets, {name} {builder.version} in {copy}"


def unreadable(name: str, copy: Path, error: Exception) -> InputError:
    """The one sentence for a copy that is damaged."""
    return InputError(f"TensorFlow Datasets cannot read its copy of '{name}' in {copy}: {error}. Remove that folder.")
