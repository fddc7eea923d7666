"""CIFAR-10's binary version in a folder and in a tar; what is damaged, pickled or something else is refused."""

import io
import tarfile

import numpy as np
import pytest

from kdistill.data.splits import load
from kdistill.errors import InputError
from kdistill.recipe import Data

RNG = np.random.default_rng(5)


def record_file(count, first=0):
    """`count` records as the data set has them: label, red, green and blue plane."""
    labels = (np.arange(count, dtype=np.uint8) + first) % 10
    planes = RNG.integers(0, 256, (count, 3, 32, 32), np.uint8)
    content = b"".join(bytes([label]) + plane.tobytes() for label, plane in zip(labels, planes, strict=True))
    return content, planes, labels


TRAIN = [record_file(20, first) for first in (0, 3)]
TEST = record_file(10)
FILES = {"data_batch_1.bin": TRAIN[0][0], "data_batch_2.bin": TRAIN[1][0], "test_batch.bin": TEST[0]}


def tar_of(path, files, folder="cifar-10-batches-bin/"):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(folder + name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def folder_of(path, files):
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize("kind", ["folder", "inner folder", "tar", "folder of a tar"])
def test_pixels_and_labels_are_those_of_the_records(tmp_path, kind):
    if kind == "tar":
        place = tar_of(tmp_path / "cifar-10-binary.tar.gz", {"readme.html": b"hello", **FILES})
    elif kind == "folder of a tar":
        place = tar_of(tmp_path / "cifar-10-binary.tar.gz", FILES).parent
    elif kind == "folder":
        place = folder_of(tmp_path, FILES)
    else:
        place = folder_of(tmp_path / "cifar-10-batches-bin", FILES).parent
    splits = load(Data("cifar10", validation=0.25), place)
    assert str(tmp_path) in splits.source and splits.class_names[:2] == ("airplane", "automobile")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 10)
    np.testing.assert_array_equal(splits.test.labels, TEST[2])
    assert splits.test.images[3, 5, 7].tolist() == TEST[1][3, :, 5, 7].tolist()  # row 5, column 7: red, green, blue
    every = np.concatenate([splits.train.images, splits.validation.images]).transpose(0, 3, 1, 2)
    given = np.concatenate([planes for _, planes, _ in TRAIN])
    assert sorted(map(bytes, every)) == sorted(map(bytes, given))


@pytest.mark.parametrize(
    "change,message",
    [
        ({"test_batch.bin": None}, "lacks test_batch.bin"),
        ({"data_batch_1.bin": None, "data_batch_2.bin": None}, r"lacks data_batch_\*.bin"),
        ({"test_batch.bin": TEST[0][:-1]}, r"test_batch.bin holds 30729 bytes; expected a multiple of 3073"),
        ({"data_batch_2.bin": b""}, "data_batch_2.bin holds 0 bytes"),
        ({"test_batch.bin": b"\x0a" + TEST[0][1:]}, r"labels 0\.\.9, received int32 from 1 to 10"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    files = {name: content for name, content in {**FILES, **change}.items() if content is not None}
    for place in (folder_of(tmp_path / "folder", files), tar_of(tmp_path / "one.tar.gz", files)):
        with pytest.raises(InputError, match=message):
            load(Data("cifar10"), place)


def test_a_truncated_tar(tmp_path):
    whole = tar_of(tmp_path / "whole.tar.gz", FILES).read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 4):
        (tmp_path / "cut.tar.gz").write_bytes(whole[:size])
        with pytest.raises(InputError, match="damaged, truncated or no tar.*Download it again"):
            load(Data("cifar10"), tmp_path / "cut.tar.gz")


def test_a_path_in_a_tar_points_nowhere(tmp_path):
    tar_of(tmp_path / "in.tar.gz", FILES, folder="../../outside/")
    load(Data("cifar10", validation=0.5), tmp_path / "in.tar.gz")
    assert [path.name for path in tmp_path.iterdir()] == ["in.tar.gz"] and not (tmp_path.parent / "outside").exists()
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("test_batch.bin")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(InputError, match="lacks test_batch.bin"):
        load(Data("cifar10"), tmp_path / "link.tar.gz")


def test_pickle_is_never_loaded(tmp_path):
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    folder_of(tmp_path / "py", {f"data_batch_{i}": bomb for i in range(1, 6)})
    tar_of(tmp_path / "py.tar.gz", {"data_batch_1": bomb}, "cifar-10-batches-py/")
    for place in (tmp_path / "py", tmp_path / "py.tar.gz"):
        with pytest.raises(InputError, match=r"pickle.*binary version"):
            load(Data("cifar10"), place)
    assert not (tmp_path / "ran").exists()


def test_nothing_given_and_nothing_there(tmp_path):
    with pytest.raises(InputError, match="does not ship with kdistill. Give --data-dir.*binary version.*--download"):
        load(Data("cifar10"))
    with pytest.raises(InputError, match=r"holds no data_batch_\*.bin"):
        load(Data("cifar10"), tmp_path)
    with pytest.raises(InputError, match="no folder or file at"):
        load(Data("cifar10"), tmp_path / "nowhere")


def test_a_copy_of_tensorflow_datasets(tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    images = np.concatenate([planes for _, planes, _ in TRAIN]).transpose(0, 2, 3, 1)
    labels = np.concatenate([labels for *_, labels in TRAIN]).astype("int64")
    rows = tf.data.Dataset.from_tensor_slices({"image": images, "label": labels})
    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar10",
        version="3.0.2",
        data_dir=tmp_path,
        features=tfds.features.FeaturesDict(
            {"image": tfds.features.Image(shape=(32, 32, 3)), "label": tfds.features.ClassLabel(num_classes=10)}
        ),
        split_datasets={"train": rows, "test": rows},
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    splits = load(Data("cifar10", validation=0.25))
    assert "TensorFlow Datasets, cifar10 3.0.2" in splits.source
    assert sorted(map(bytes, splits.test.images)) == sorted(map(bytes, images))
