"""Folders of classes, of every kind of JPEG; damaged files are named; pixels are compared with Pillow's."""

import dataclasses
import json
import os
import socket

import numpy as np
import pytest
from PIL import Image
from support.image_files import COLORS, content, folders, image

from kdistill.data import few_labels, lazy_images
from kdistill.data.image_files import center_crop_boxes, header_of, random_crop_boxes
from kdistill.data.lazy_images import Damage, EncodedImages, Files
from kdistill.data.splits import load as load_splits
from kdistill.errors import InputError
from kdistill.files import cache_root
from kdistill.recipe import Data

SMALL = Data("image_folder", image_size=16, validation=0.34)


def load(folder, data_=SMALL, messages=None):
    return load_splits(data_, folder, say=(messages if messages is not None else []).append)


def encoded_of(tmp_path, files, side=16):
    """`EncodedImages` of these files' contents."""
    names = sorted(files)
    for name in names:
        (tmp_path / name).write_bytes(files[name])
    headers = np.array([header_of(files[name]) for name in names])
    return EncodedImages(Files(tmp_path, np.array([n.encode() for n in names]), headers), side, Damage(len(names), 0.5))


@pytest.mark.parametrize("test", ["val", "validation", "test"])
def test_train_and_test_folders(tmp_path, test):
    splits = load(folders(tmp_path, ("train", test)))
    assert splits.class_names == ("blue", "green", "red", "white") and str(tmp_path) in splits.source
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (16, 8, 24)
    assert splits.train.images.shape == (16, 16, 16, 3) and splits.train.images.dtype == np.uint8
    for part in (splits.train, splits.validation, splits.test):
        assert np.bincount(part.labels).tolist() == [len(part) // 4] * 4
        means = part.images[:].mean((1, 2))
        for mean, label in zip(means, part.labels, strict=True):
            assert np.abs(mean - list(COLORS.values())[label]).max() < 12


def test_class_folders_alone_hold_a_share_out_for_testing(tmp_path):
    folders(tmp_path, ("",), count=9)
    splits = load(tmp_path, Data("image_folder", image_size=16, validation=1 / 3))
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 8, 12]
    names = [
        set(part.images.store.names[part.images.indexes]) for part in (splits.train, splits.validation, splits.test)
    ]
    assert len(set.union(*names)) == 36 and not names[0] & names[1] and not names[0] & names[2]


def test_the_same_files_have_the_same_fingerprint_wherever_they_are(tmp_path):
    first, second = folders(tmp_path / "a"), folders(tmp_path / "b")
    assert load(first).fingerprint == load(second).fingerprint
    (second / "train" / "red" / "00.JPEG").write_bytes(content(image((1, 2, 3), 30, 30)))
    assert load(first).fingerprint != load(second).fingerprint


def test_a_limit_takes_images_of_all_classes(tmp_path):
    splits = load(folders(tmp_path), Data("image_folder", image_size=16, validation=0.34, train_limit=12))
    assert len(splits.train) == 12 and set(splits.train.labels) == {0, 1, 2, 3}


def test_they_are_taken_apart_without_being_decoded(tmp_path, monkeypatch):
    splits = load(folders(tmp_path))
    monkeypatch.setattr(EncodedImages, "_try_decoding", lambda *a: pytest.fail("decoded"))
    some = dataclasses.replace(splits, labeled_mask=splits.train.labels < 2)
    control = few_labels.for_control(some)
    assert len(control.train.images) == 16 and set(control.train.labels) == {0, 1}
    assert len(splits.train.select(splits.train.labels == 1)) == 4
    assert splits.train.images.select(slice(3, 7)).shape == (4, 16, 16, 3)


def test_an_image_is_cut_to_its_middle_square_and_resized(tmp_path):
    """Against Pillow: the same part, bilinear; an image that needs no resizing to the pixel."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 48, 3), np.uint8)
    images = encoded_of(tmp_path, {"a.png": content(Image.fromarray(pixels), "PNG")}, side=28)
    np.testing.assert_array_equal(images[0], pixels[2:30, 10:38])  # 28 = 0.875 * 32
    smooth = Image.fromarray(pixels[:8, :8]).resize((300, 200), Image.Resampling.BICUBIC)
    images = encoded_of(tmp_path, {"a.jpg": content(smooth, quality=95)}, side=100)
    with Image.open(tmp_path / "a.jpg") as file:
        expected = np.asarray(file.crop((62, 12, 237, 187)).resize((100, 100), Image.Resampling.BILINEAR), int)
    assert np.abs(images[0].astype(int) - expected).mean() < 2.0


def test_every_kind_of_image_file(tmp_path):
    picture = image(COLORS["red"], 40, 60, noise=0)
    images = encoded_of(
        tmp_path,
        {
            "a.jpg": content(picture.convert("CMYK")),
            "b.jpg": content(picture.convert("L")),
            "c.jpg": content(picture, progressive=True),
            "d.png": content(picture.convert("RGBA"), "PNG"),
            "e.png": content(picture.convert("L"), "PNG"),
            "f.jpg": content(image(COLORS["red"], 1, 1, noise=0), quality=95),
            "g.jpg": content(image(COLORS["red"], 300, 2, noise=0)),
            "h.jpg": content(picture, exif=b"Exif\0\0" + bytes(60_000)),
            "i.jpg": content(image(COLORS["red"], 700, 900, noise=0)),  # shrunk while it is decoded
            "j.png": content(picture.quantize(), "PNG"),
        },
    )
    gray = round(0.299 * 210 + 0.587 * 40 + 0.114 * 30)
    for name, pixels in zip(images.store.names, images[:], strict=True):
        expected = [gray] * 3 if name in (b"b.jpg", b"e.png") else COLORS["red"]
        assert np.abs(pixels.astype(int) - expected).max() <= 5, name
    assert images[3].shape == (16, 16, 3) and images[np.array([1, 4])].shape == (2, 16, 16, 3)
    assert center_crop_boxes(images.store.headers[8:9], 16)[0].tolist() == [44, 144, 612, 612, 3]


def test_damaged_files_are_left_out_and_named(tmp_path):
    folders(tmp_path)
    whole = (tmp_path / "train/red/00.JPEG").read_bytes()
    header = bytearray(whole)
    place = whole.index(b"\xff\xc0") + 5
    header[place : place + 4] = (10_000).to_bytes(2, "big") * 2
    for name, broken in (
        ("train/red/00.JPEG", whole[: len(whole) // 2]),
        ("train/red/01.JPEG", b""),
        ("train/blue/02.JPEG", b"<html>not found</html>"),
        ("val/green/03.JPEG", whole[:100]),
        ("val/green/04.JPEG", bytes(header)),
    ):
        (tmp_path / name).write_bytes(broken)
    messages = []
    splits = load(tmp_path, Data("image_folder", image_size=16, validation=0.34, max_undecodable=0.2), messages)
    assert len(splits.train) + len(splits.validation) == 21 and len(splits.test) == 22
    (text,) = messages
    for part in ("5 of 48", "train/red/01.JPEG (an empty file)", "train/blue/02.JPEG (no JPEG, PNG, "):
        assert part in text
    assert "val/green/04.JPEG (100 megapixels, the limit is 50)" in text and "train/red/00.JPEG (" in text
    with pytest.raises(InputError, match=r"4 of 48 images cannot be decoded.*allows a share of 0.001.*max_undecodable"):
        load(tmp_path, Data("image_folder", image_size=16, validation=0.34))
    (tmp_path / "val/green/03.JPEG").write_bytes(whole)
    (tmp_path / "val/green/04.JPEG").write_bytes(whole)
    with pytest.raises(InputError, match=r"3 of 48"):
        load(tmp_path, Data("image_folder", image_size=16, validation=0.34, max_undecodable=0.05))


def test_what_was_found_damaged_is_kept_for_large_data_sets(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_images, "CACHED_FROM", 5)
    monkeypatch.setattr(lazy_images, "KEPT_BYTES", 0)
    monkeypatch.setenv("KDISTILL_CACHE", str(tmp_path / "cache"))
    folders(tmp_path / "a")
    whole = (tmp_path / "a/train/red/00.JPEG").read_bytes()
    (tmp_path / "a/train/red/00.JPEG").write_bytes(whole[:-40])
    settings = Data("image_folder", image_size=16, validation=0.34, max_undecodable=0.1)
    messages = []
    first = load(tmp_path / "a", settings, messages)
    assert "Decoding 24 images once" in messages[0]
    kept = sorted(cache_root().glob("decoded-*.json"))
    assert len(kept) == 2 and sorted(len(json.loads(path.read_text())) for path in kept) == [0, 1]
    monkeypatch.setattr(EncodedImages, "_reasons", lambda *a, **options: pytest.fail("all decoded again"))
    again = load(tmp_path / "a", settings, messages)
    assert again.fingerprint == first.fingerprint and len(first.train) + len(first.validation) == 23
    assert "1 of 48 images cannot be decoded: train/red/00.JPEG" in messages[-1]


def test_an_image_that_is_gone_later_is_named(tmp_path, monkeypatch):
    """Unless it is in memory."""
    assert load(folders(tmp_path / "small")).test.images.pixels.shape == (24, 16, 16, 3)
    monkeypatch.setattr(lazy_images, "KEPT_BYTES", 0)
    splits = load(folders(tmp_path))
    name = os.fsdecode(splits.test.images.store.names[splits.test.images.indexes[0]])
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=f"The image '{name}' cannot be decoded: .*No such file"):
        splits.test.images[:6]


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="expects --data-dir, a folder"):
        load(None)
    with pytest.raises(InputError, match="no folder at"):
        load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds 0 folder\(s\)"):
        load(tmp_path)
    folders(tmp_path / "one", ("train", "val"), colors={"red": (200, 0, 0)})
    with pytest.raises(
        InputError, match=r"holds 1 folder\(s\); expected one folder of images per class.*it has only 'red'"
    ):
        load(tmp_path / "one")
    folders(tmp_path / "no test", ("train",))
    with pytest.raises(InputError, match="has train/, but none of test, val, validation"):
        load(tmp_path / "no test")
    two = folders(tmp_path / "two")
    (two / "val" / "yellow").mkdir()
    with pytest.raises(InputError, match="has the class 'yellow', but"):
        load(two)
    (two / "val" / "yellow").rmdir()
    (two / "train" / "yellow").mkdir()
    with pytest.raises(InputError, match="yellow' holds no image"):
        load(two)
    (two / "train" / "yellow" / "note.txt").write_text("hello")
    with pytest.raises(InputError, match="yellow' holds no image"):
        load(two)


def test_skipped_files_are_counted_by_ending(tmp_path):
    folders(tmp_path, ("train", "val", "test"))
    for name in ("note.txt", "IMG_1.HEIC", "IMG_2.heic", "IMG_3.heic", "README", ".DS_Store"):
        (tmp_path / "train" / "red" / name).write_text("hello")
    (tmp_path / "train" / "blue" / "more.txt").write_text("hello")
    (tmp_path / "train" / "blue" / "duplicates").mkdir()
    messages = []
    load(tmp_path, SMALL, messages)
    assert (
        f"'{tmp_path / 'train'}': 7 files skipped: 3 .heic, 2 .txt, 1 folders, 1 without an ending. "
        "To use .heic files, convert them to JPEG."
    ) in messages
    assert f"'{tmp_path / 'val'}' is not used: test images come from" in "\n".join(messages)
    assert len(messages) == 2


def test_a_class_of_photographs_that_cannot_be_read(tmp_path):
    folders(tmp_path)
    (tmp_path / "train" / "yellow").mkdir()
    for i in range(4):
        (tmp_path / "train" / "yellow" / f"{i}.heif").write_bytes(b"\0\0\0\x20ftypheic")
    with pytest.raises(InputError, match=r"yellow' holds no image .* It has 4 \.heif\. To use \.heif files, convert"):
        load(tmp_path)


def test_folders_with_every_format_and_with_wrong_endings(tmp_path):
    """WebP in files called .jpg, as browsers save them, is read; HEIC called .jpg is damage with a reason."""
    folders(tmp_path)
    for place, (kind, name) in enumerate(
        [
            ("WEBP", "a.webp"),
            ("WEBP", "b.jpg"),
            ("GIF", "c.GIF"),
            ("BMP", "d.bmp"),
            ("TIFF", "e.tif"),
            ("AVIF", "f.avif"),
        ]
    ):
        (tmp_path / "train" / "red" / name).write_bytes(content(image(COLORS["red"], seed=place), kind))
    (tmp_path / "train" / "red" / "g.jpg").write_bytes(b"\0\0\0\x20ftypheic" + bytes(99))
    messages = []
    splits = load(tmp_path, dataclasses.replace(SMALL, max_undecodable=0.1), messages)
    assert len(splits.train) + len(splits.validation) == 30
    assert messages == [
        "Skipped: 1 of 55 images cannot be decoded: train/red/g.jpg (HEIC, which cannot be read; convert it to JPEG)"
    ]
    for part in (splits.train, splits.validation):
        for mean, label in zip(part.images[:].mean((1, 2)), part.labels, strict=True):
            assert np.abs(mean - list(COLORS.values())[label]).max() < 16


@pytest.mark.parametrize("layout", ["flat", "unknown", "both"])
def test_imagenet_as_published_is_tested_on_val(tmp_path, layout):
    folders(tmp_path, ("train", "val"))
    (tmp_path / "test" / "unknown").mkdir(parents=True)
    for place in {"flat": ("",), "unknown": ("unknown",), "both": ("", "unknown")}[layout]:
        (tmp_path / "test" / place / "ILSVRC2012_test_00000001.JPEG").write_bytes(content(image(COLORS["red"])))
    messages = []
    splits = load(tmp_path, SMALL, messages)
    names = splits.test.images.store.names[splits.test.images.indexes]
    assert len(splits.test) == 24 and all(name.startswith(b"val/") for name in names)
    assert messages == [
        f"'{tmp_path / 'test'}' is not used (its images have no labels: it has no folder of a class): test images come "
        f"from '{tmp_path / 'val'}', validation images are a share of train/"
    ]


def test_only_flat_test_images_are_refused(tmp_path):
    folders(tmp_path, ("train",))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.JPEG").write_bytes(content(image(COLORS["red"])))
    with pytest.raises(InputError, match=r"test' holds 0 folder\(s\); expected one folder of images per class"):
        load(tmp_path)


def test_settings_that_do_not_fit():
    with pytest.raises(InputError, match="data.image_size expects a number of pixels, such as 224"):
        load_splits(Data("image_folder"))
    with pytest.raises(InputError, match="data.image_size expects none"):
        load_splits(Data("mnist", image_size=28))
    with pytest.raises(InputError, match="ImageNet cannot be downloaded by a program.*ILSVRC2012_img_train.tar"):
        load_splits(Data("imagenet", image_size=16), download=True)


def test_random_parts_keep_to_the_image_and_to_the_area():
    headers = np.tile([300, 200, 0, 0, 1], (4000, 1))
    draws = np.random.default_rng(0).random((4000, 4))
    top, left, tall, wide, _ = random_crop_boxes(headers, 32, draws, 0.25).T
    assert (top >= 0).all() and (left >= 0).all() and (top + tall <= 300).all() and (left + wide <= 200).all()
    share = tall * wide / 60_000
    assert share.min() > 0.24 and share.max() <= 1.0 and abs(np.median(share) - 0.6) < 0.05
    assert (top + tall == 300).any() and (top == 0).any() and (np.abs(wide / tall) <= 1.35).all()


@pytest.mark.parametrize("kind", ["tfrecord", "array_record"])
def test_a_copy_of_tensorflow_datasets(tmp_path, monkeypatch, kind):
    """ImageNet as TFDS prepares it: JPEGs in records, reached in any order, the index kept beside them."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    pictures = [content(image(COLORS[name], seed=i), quality=95) for i, name in enumerate([*COLORS] * 5)]
    pixels = np.stack([tf.io.decode_jpeg(each).numpy() for each in pictures])
    rows = tf.data.Dataset.from_tensor_slices(
        {"image": pixels, "label": np.arange(20) % 4, "file_name": [f"n_{i}.JPEG" for i in range(20)]}
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name="imagenet2012",
        version="5.1.0",
        data_dir=tmp_path,
        file_format=kind,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=list(COLORS)),
                "file_name": tfds.features.Text(),
            }
        ),
        split_datasets={"train": rows, "validation": rows},
    )
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    messages, settings = [], Data("imagenet", image_size=16, validation=0.2)
    splits = load_splits(settings, say=messages.append)
    assert "TensorFlow Datasets, imagenet2012 5.1.0" in splits.source and splits.class_names == tuple(COLORS)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [16, 4, 20]
    for mean, label in zip(splits.test.images[:].mean((1, 2)), splits.test.labels, strict=True):
        assert np.abs(mean - list(COLORS.values())[label]).max() < 12
    assert len(messages) == 3 and "once" in messages[0] and messages[2].startswith("Warning: 20 of 20 test images are")
    again = load_splits(settings, say=messages.append)
    assert len(messages) == 4 and messages[3] == messages[2] and again.fingerprint == splits.fingerprint
    np.testing.assert_array_equal(again.train.images[:], splits.train.images[:])
    shard = next((tmp_path / "imagenet2012/5.1.0").glob("*-train.*-of-*"))
    shard.write_bytes(shard.read_bytes()[:-300])
    with pytest.raises(InputError, match="cannot read its copy of 'imagenet2012'.*Remove that folder"):
        load_splits(settings, say=messages.append)


def test_pipes_sockets_and_devices_are_skipped_and_named(tmp_path):
    folders(tmp_path, ("train", "val"))
    os.mkfifo(tmp_path / "train" / "red" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()
        os.chdir(tmp_path / "train" / "blue")  # the path of a socket is short
        try:
            listener.bind("s.png")
        finally:
            os.chdir(here)
    os.symlink("/dev/zero", tmp_path / "train" / "green" / "zero.jpg")
    messages = []
    load(tmp_path, SMALL, messages)
    assert f"'{tmp_path / 'train'}': 3 files skipped: 3 that are pipes, sockets or devices." in messages
