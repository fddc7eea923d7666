"""Names that cannot be labels are refused when the data is read, not when a trained model is exported."""

import os

import numpy as np
import pytest
from support.image_files import COLORS, content, folders, image

from kdistill.class_names import check_class_names
from kdistill.data import splits
from kdistill.data.splits import load
from kdistill.errors import InputError
from kdistill.recipe import Data

REFUSED = [
    ("two\nlines", r"'two\\nlines'", "line break"),
    ("carriage\rreturn", r"'carriage\\rreturn'", "line break"),
    ("tab\there", r"'tab\\there'", "control character"),
    ("\x1b[31mred", r"'\\x1b\[31mred'", "control character"),
    ("next\x85line", r"'next\\x85line'", "control character"),
    ("separator\u2028here", r"'separator\\u2028here'", "line break"),
    ("a" * 201, f"'{'a' * 40}...'", "has 201 characters"),
]


@pytest.mark.parametrize("name,shown,reason", [*REFUSED, ("", "''", "is empty"), ("  ", "'  '", "is empty")])
def test_names_that_cannot_be_labels(name, shown, reason):
    with pytest.raises(
        InputError, match=f"here: the class {shown} cannot be a class name: .*{reason}.*Rename"
    ) as raised:
        check_class_names(["good", name], "here")
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("name", ["0", "a" * 200, "golden retriever", "Größe", "猫", "it's <b>", "a, b; c"])
def test_names_that_can_be_labels(name):
    check_class_names([name], "here")


@pytest.mark.parametrize("name,shown,reason", REFUSED)
def test_a_class_folder_is_refused_before_its_images_are_read(tmp_path, name, shown, reason):
    root = folders(tmp_path)
    (root / "train" / "red").rename(root / "train" / name)
    with pytest.raises(InputError, match=rf"train': the folder {shown} cannot be a class name.*Rename the folder"):
        load(Data("image_folder", image_size=16), root)


def test_a_class_folder_whose_name_is_no_utf_8(tmp_path):
    root = folders(tmp_path)
    os.rename(root / "train" / "red", os.fsencode(root / "train") + b"/r\xe9d")
    with pytest.raises(InputError, match=r"the folder 'r\\udce9d' cannot be a class name: .*no UTF-8.*Rename"):
        load(Data("image_folder", image_size=16), root)


def test_a_copy_of_tensorflow_datasets(tmp_path, monkeypatch):
    import tensorflow as tf
    import tensorflow_datasets as tfds

    names = ["good", "\x1b[31mred"]
    pictures = [content(image(color)) for color in list(COLORS.values())[:2]]
    pixels = np.stack([tf.io.decode_jpeg(picture).numpy() for picture in pictures])
    rows = tf.data.Dataset.from_tensor_slices({"image": pixels, "label": [0, 1], "file_name": ["a", "b"]})
    tfds.dataset_builders.store_as_tfds_dataset(
        name="imagenet2012",
        version="5.1.0",
        data_dir=tmp_path,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=names),
                "file_name": tfds.features.Text(),
            }
        ),
        split_datasets={"train": rows, "validation": rows},
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(InputError, match=r"imagenet2012.*: the class '\\x1b\[31mred' cannot be a class name"):
        load(Data("imagenet", image_size=16))


def test_every_other_source(monkeypatch):
    images, labels = np.zeros((4, 8, 8, 1), np.uint8), np.array([0, 1, 0, 1])
    parts = {"train": (images, labels), "test": (images, labels)}
    monkeypatch.setitem(splits.SOURCES, "npz", lambda *options: (parts, ("good", "a\nb"), "the file own.npz"))
    with pytest.raises(InputError, match=r"the file own.npz: the class 'a\\nb' cannot be a class name"):
        load(Data("npz"))
