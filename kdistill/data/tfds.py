"""Data sets that TensorFlow Datasets has prepared: as arrays, or as encoded images inside of its record files.

TFRecord has no index, and neither has a table of labels. So every record is read once, and where each begins, its label
and its size are kept in a file beside the records (`kdistill-SPLIT.npz`); from then on any order is as good as another.
TFDS is imported only where there is a copy to read.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kdistill.data.lazy_images import Damage, EncodedImages, header_of
from kdistill.errors import InputError
from kdistill.files import atomic_file
from kdistill.recipe import Data

HEAD, FRAME = 12, 16  # of a TFRecord: length and its checksum before the record, another checksum behind
COLUMNS = ("shards", "starts", "lengths", "labels", "names", "headers", "sizes")


class Records:
    """Encoded images in record files: a `Store` (see `encoded`)."""

    def __init__(self, shards: list[Path], index: dict[str, np.ndarray]):
        self._shards, self._index, self._readers = shards, index, {}
        self.names, self.headers = index["names"], index["headers"]
        self._lock = threading.Lock()

    def read(self, place: int) -> bytes:
        return _image(self._record(place))

    def elements(self, places: np.ndarray) -> np.ndarray:
        return np.asarray(places, np.int64)

    def content(self, element):
        import tensorflow as tf

        return tf.ensure_shape(tf.numpy_function(self.read, [element], tf.string), ())

    def _record(self, place: int) -> bytes:
        shard, start, length = (int(self._index[key][place]) for key in ("shards", "starts", "lengths"))
        path = self._shards[shard]
        if "array_record" in path.name:
            with self._lock:
                if shard not in self._readers:
                    self._readers[shard] = _array_reader(path)
                return self._readers[shard].read([start])[0]
        with open(path, "rb") as file:
            return os.pread(file.fileno(), length, start)


def tfds_images(copy: Path, data: Data, say: Callable[[str], None]):
    """The training and validation images (which are for testing) of a prepared copy with image, label and file name."""
    import tensorflow_datasets as tfds

    try:
        info = tfds.builder_from_directory(copy).info
        files = {part: [Path(path) for path in info.splits[split].filepaths] for part, split in _SPLITS.items()}
        classes = tuple(info.features["label"].names)
    except Exception as error:  # a description that cannot be parsed: many kinds
        raise unreadable(copy.parent.name, copy, error) from error
    counts = {part: info.splits[split].num_examples for part, split in _SPLITS.items()}
    found = {part: _index(copy, _SPLITS[part], shards, counts[part], say) for part, shards in files.items()}
    damage, parts = Damage(sum(len(index["labels"]) for index in found.values()), data.max_undecodable), {}
    for part, index in found.items():
        images = EncodedImages(Records(files[part], index), data.image_size, damage)
        good = index["headers"][:, 0] > 0
        for name in index["names"][~good]:
            damage.note(name, "no header of a JPEG or PNG that can be read")
        parts[part] = images.select(good), index["labels"][good]
    damage.check()
    return parts, classes, f"TensorFlow Datasets, {copy.parent.name} {copy.name} in {copy}"


_SPLITS = {"train": "train", "test": "validation"}


def _index(copy: Path, split: str, shards: list[Path], count: int, say: Callable[[str], None]) -> dict[str, np.ndarray]:
    """The index of these files, kept from before if it is of the same files, else made by reading them once."""
    kept = copy / f"kdistill-{split}.npz"
    sizes = np.array([shard.stat().st_size for shard in shards if shard.is_file()], np.int64)
    if len(sizes) != len(shards):
        raise unreadable(copy.parent.name, copy, InputError("some of its files are missing"))
    try:
        with np.load(kept, allow_pickle=False) as archive:
            if np.array_equal(archive["sizes"], sizes):
                return {key: archive[key] for key in COLUMNS}
    except Exception:  # absent, of another version, or damaged: it is made again
        pass
    say(f"Reading {split} of {copy.parent.name} once, {sizes.sum() / 1e9:.1f} GB, to know where each image is")
    rows = []
    for number, shard in enumerate(shards):
        try:
            rows += [(number, *row) for row in _rows(shard)]
        except Exception as error:  # TensorFlow's for lost data, array_record's, the parser's
            raise unreadable(copy.parent.name, copy, error) from error
    if len(rows) != count or not rows:  # a truncated ArrayRecord looks empty
        lost = InputError(f"{split} holds {len(rows)} records, its description says {count}")
        raise unreadable(copy.parent.name, copy, lost)
    shard, start, length, label, name, head = zip(*rows, strict=True)
    made = {
        "shards": np.array(shard, np.int32),
        "starts": np.array(start, np.int64),
        "lengths": np.array(length, np.int64),
        "labels": np.array(label, np.int32),
        "names": np.array(name),
        "headers": np.array(head, np.int64),
        "sizes": sizes,
    }
    try:
        with atomic_file(kept) as part:
            np.savez(part, **made)
    except OSError as error:
        say(f"The index cannot be kept in {kept} ({error.strerror}): it will be made again")
    return made


def _rows(shard: Path) -> Iterator[tuple]:
    """(start, length, label, name, header) of each record of a file; a header of zeros if it has no size."""
    import tensorflow as tf

    place = 0
    for record in _records(shard):
        example = tf.train.Example.FromString(record).features.feature
        content = example["image"].bytes_list.value[0]
        named = example["file_name"].bytes_list.value if "file_name" in example else ()
        name = named[0] if named else f"{shard.name}[{place}]".encode()
        try:
            head = header_of(content)
        except ValueError:
            head = (0, 0, 0, len(content))
        array = "array_record" in shard.name
        start = place if array else place + HEAD
        yield start, len(record), example["label"].int64_list.value[0], name, head
        place += 1 if array else len(record) + FRAME


def _records(shard: Path) -> Iterator[bytes]:
    if "array_record" in shard.name:
        reader = _array_reader(shard)
        for place in range(reader.num_records()):
            yield reader.read([place])[0]
        return
    import tensorflow as tf

    yield from tf.data.TFRecordDataset(str(shard)).as_numpy_iterator()  # checks the checksums


def _array_reader(path: Path):
    from array_record.python import array_record_module

    return array_record_module.ArrayRecordReader(str(path))


def _image(record: bytes) -> bytes:
    import tensorflow as tf

    return tf.train.Example.FromString(record).features.feature["image"].bytes_list.value[0]


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
