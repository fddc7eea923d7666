"""Data sets that TensorFlow Datasets (TFDS) has prepared: as arrays, or as encoded images inside its record files.

TFRecord files have no index and no table of labels. So every record is read once, and the offset, label and size of
every image are stored in a file beside the records (`kdistill-SPLIT.npz`); then images can be read in any order.
TFDS is imported only if there is a copy to read.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kdistill.class_names import check_class_names
from kdistill.data.image_files import HEADER, header_of, header_warnings_ignored
from kdistill.data.lazy_images import Damage, EncodedImages
from kdistill.errors import InputError
from kdistill.files import atomic_file, user_folder
from kdistill.recipe import Data

LENGTH, OVERHEAD = 12, 16  # bytes of a TFRecord: a length and its checksum before the record, a checksum behind it
COLUMNS = ("shards", "starts", "lengths", "labels", "names", "headers", "sizes")


class Records:
    """Encoded images in record files: a `Store` (see `lazy_images`)."""

    def __init__(self, shards: list[Path], index: dict[str, np.ndarray]):
        self._shards, self._index, self._readers = shards, index, {}
        self.names, self.headers = index["names"], index["headers"]
        self._lock = threading.Lock()

    def read(self, index: int) -> bytes:
        return _image(self._record(index))

    def elements(self, indexes: np.ndarray) -> np.ndarray:
        return np.asarray(indexes, np.int64)

    def content(self, element):
        import tensorflow as tf

        return tf.ensure_shape(tf.numpy_function(self.read, [element], tf.string), ())

    def _record(self, index: int) -> bytes:
        shard, start, length = (int(self._index[column][index]) for column in ("shards", "starts", "lengths"))
        path = self._shards[shard]
        if "array_record" in path.name:
            with self._lock:
                if shard not in self._readers:
                    self._readers[shard] = _array_reader(path)
                return self._readers[shard].read([start])[0]
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)


def load_encoded_images(copy: Path, data: Data, say: Callable[[str], None]):
    """The images of a prepared copy with image, label and file name; its validation images are the test images."""
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(copy).info
        files = {part: [Path(path) for path in info.splits[split].filepaths] for part, split in _SPLITS.items()}
        classes = tuple(info.features["label"].names)
    except Exception as error:  # a description that cannot be parsed: many types
        raise _unreadable(copy.parent.name, copy, error) from error
    check_class_names(classes, f"'{copy}'")
    counts = {part: info.splits[split].num_examples for part, split in _SPLITS.items()}
    indexes = {part: _load_index(copy, _SPLITS[part], shards, counts[part], say) for part, shards in files.items()}
    damage, parts = Damage(sum(len(index["labels"]) for index in indexes.values()), data.max_undecodable), {}
    for part, index in indexes.items():
        images = EncodedImages(Records(files[part], index), data.image_size, damage)
        readable = index["headers"][:, 0] > 0
        for name in index["names"][~readable]:
            damage.add(name, "no header that can be read")
        parts[part] = images.select(readable), index["labels"][readable]
    damage.check()
    return parts, classes, f"TensorFlow Datasets, {copy.parent.name} {copy.name} in {copy}"


_SPLITS = {"train": "train", "test": "validation"}


def _load_index(
    copy: Path, split: str, shards: list[Path], count: int, say: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """The index of these files: the stored one if the files have not changed, else a new one, which is stored."""
    path = copy / f"kdistill-{split}.npz"
    sizes = np.array([shard.stat().st_size for shard in shards if shard.is_file()], np.int64)
    if len(sizes) != len(shards):
        raise _unreadable(copy.parent.name, copy, InputError("some of its files are missing"))
    try:
        with np.load(path, allow_pickle=False) as archive:
            if np.array_equal(archive["sizes"], sizes) and archive["headers"].shape[1] == HEADER:
                return {column: archive[column] for column in COLUMNS}
    except Exception:  # absent, of another version, or damaged: build it again
        pass
    say(f"Reading {split} of {copy.parent.name} once, {sizes.sum() / 1e9:.1f} GB, to index its images")
    index = {**_build_index(copy, split, shards, count), "sizes": sizes}
    try:
        with atomic_file(path) as part:
            np.savez(part, **index)
    except OSError as error:
        say(f"Cannot write the index {path} ({error.strerror}): the next run will build it again")
    return index


def _build_index(copy: Path, split: str, shards: list[Path], count: int) -> dict[str, np.ndarray]:
    rows = []
    for number, shard in enumerate(shards):
        try:
            with header_warnings_ignored():
                rows += [(number, *row) for row in _rows(shard)]
        except Exception as error:  # of TensorFlow for lost data, of array_record, of the parser
            raise _unreadable(copy.parent.name, copy, error) from error
    if len(rows) != count or not rows:  # a truncated ArrayRecord looks empty
        mismatch = InputError(f"{split} holds {len(rows)} records, its description promises {count}")
        raise _unreadable(copy.parent.name, copy, mismatch)
    shard, start, length, label, name, header = zip(*rows, strict=True)
    return {
        "shards": np.array(shard, np.int32),
        "starts": np.array(start, np.int64),
        "lengths": np.array(length, np.int64),
        "labels": np.array(label, np.int32),
        "names": np.array(name),
        "headers": np.array(header, np.int64),
    }


def _rows(shard: Path) -> Iterator[tuple]:
    """(start, length, label, name, header) of every record of a file; the header is zeros if it cannot be read."""
    import tensorflow as tf

    position = 0
    is_array_record = "array_record" in shard.name
    for record in _records(shard):
        features = tf.train.Example.FromString(record).features.feature
        content = features["image"].bytes_list.value[0]
        names = features["file_name"].bytes_list.value if "file_name" in features else ()
        name = names[0] if names else f"{shard.name}[{position}]".encode()
        try:
            header = header_of(content)
        except ValueError:
            header = (0,) * HEADER
        start = position if is_array_record else position + LENGTH
        yield start, len(record), features["label"].int64_list.value[0], name, header
        position += 1 if is_array_record else len(record) + OVERHEAD


def _records(shard: Path) -> Iterator[bytes]:
    if "array_record" in shard.name:
        reader = _array_reader(shard)
        for position in range(reader.num_records()):
            yield reader.read([position])[0]
        return
    import tensorflow as tf

    yield from tf.data.TFRecordDataset(str(shard)).as_numpy_iterator()  # verifies the checksums


def _array_reader(path: Path):
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(str(path))


def _image(record: bytes) -> bytes:
    import tensorflow as tf

    return tf.train.Example.FromString(record).features.feature["image"].bytes_list.value[0]


def data_root() -> Path:
    """The folder of TFDS. It is always passed to TFDS, which itself reads the variable only when it is imported."""
    return user_folder("TFDS_DATA_DIR", "~/tensorflow_datasets", "The folder of TensorFlow Datasets")


def newest_copy(name: str) -> Path | None:
    """The newest prepared copy of a data set. Looks at folders only, as importing TFDS takes seconds.

    TFDS writes into a folder with "incomplete" in its name and renames it, so a download that failed is no copy.
    """
    try:
        root = data_root()
    except InputError:
        if os.environ.get("TFDS_DATA_DIR"):
            raise
        return None  # a user without a home has no copy in it
    copies = [path.parent for path in (root / name).glob("*/dataset_info.json")]
    return max((path for path in copies if "incomplete" not in path.name), default=None)


def prepared_copy(name: str, say: Callable[[str], None]) -> Path:
    """The newest prepared copy of a data set; downloads the data set if there is none."""
    copy = newest_copy(name)
    if copy is not None:
        return copy
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=data_root())
    say(f"Downloading {name} with TensorFlow Datasets to {builder.data_path} (it gives up after some minutes)")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # TFDS prints; a program may read standard output
            builder.download_and_prepare()
    except Exception as error:  # network, disk, checksum: many types
        raise InputError(
            f"TensorFlow Datasets cannot download '{name}': {error}. Run without --download, or give --data-dir."
        ) from error
    return Path(builder.data_path)


def load_arrays(name: str, say: Callable[[str], None]):
    """The images and labels of a prepared copy, in memory, and their source in words."""
    import tensorflow_datasets as tfds

    copy = prepared_copy(name, say)
    try:
        builder = tfds.builder_from_directory(copy)
        examples = {part: tfds.as_numpy(builder.as_dataset(split=part, batch_size=-1)) for part in ("train", "test")}
    except Exception as error:  # damaged records, a description that cannot be parsed: many types
        raise _unreadable(name, copy, error) from error
    parts = {part: (columns["image"], columns["label"]) for part, columns in examples.items()}
    return parts, f"TensorFlow Datasets, {name} {builder.version} in {copy}"


def _unreadable(name: str, copy: Path, error: Exception) -> InputError:
    return InputError(f"TensorFlow Datasets cannot read its copy of '{name}' in {copy}: {error}. Remove that folder.")
