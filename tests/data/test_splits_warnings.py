"""What looks wrong with a data set is one warning before anything trains: range, labels, classes, duplicates."""

import dataclasses
import re

import numpy as np
import pytest
from PIL import Image
from support.image_files import COLORS, content, folders, image

from kdistill.data import splits as splits_module
from kdistill.data.splits import load
from kdistill.errors import InputError
from kdistill.recipe import Data
from kdistill.recipe.loading import load_recipe
from kdistill.runs.arms import Arms

RANDOM = np.random.default_rng(0)
LABELS, TEST_LABELS = np.arange(120) % 4, np.arange(40) % 4
IMAGES = {
    "x_train": RANDOM.integers(0, 256, (120, 9, 8), np.uint8),
    "x_test": RANDOM.integers(0, 256, (40, 9, 8), np.uint8),
}


def warnings_of(tmp_path, data=None, **arrays) -> list[str]:
    """The warnings for an `.npz` with these arrays; the same have been said, before the splits are returned."""
    np.savez(tmp_path / "own.npz", **{**IMAGES, "y_train": LABELS, "y_test": TEST_LABELS, **arrays})
    messages = []
    splits = load(data or Data("npz", validation=0.2), tmp_path / "own.npz", say=messages.append)
    assert messages == [f"Warning: {warning}" for warning in splits.warnings]
    return list(splits.warnings)


def test_good_data_has_no_warning(tmp_path):
    assert warnings_of(tmp_path) == []
    assert load(Data()).warnings == ()  # the sample of MNIST


@pytest.mark.parametrize(
    "scale,fix",
    [
        (lambda x: x / 255, r"save np.round\(images \* 255\).astype\('uint8'\)"),
        (lambda x: (x / 255).astype("float32"), r"from 0 to 1. They look scaled: save np.round\(images \* 255\)"),
        (
            lambda x: (x / 255 * 2 - 1).astype("float16"),
            r"from -1 to 1. They look scaled: save np.round\(\(images \+ 1\)",
        ),
        (lambda x: (x - 120.0) / 60, "numbers from -2 to 2.25. Give uint8"),
    ],
)
def test_scaled_pixels_are_refused_with_the_way_back(tmp_path, scale, fix):
    with pytest.raises(InputError, match=f"train: expected whole pixel values 0..255, received.*{fix}"):
        warnings_of(tmp_path, x_train=scale(IMAGES["x_train"]))
    with pytest.raises(InputError, match=f"test: expected whole pixel values 0..255, received.*{fix}"):
        warnings_of(tmp_path, x_test=scale(IMAGES["x_test"]))


@pytest.mark.parametrize("kind", ["uint8", "int64", "float32"])
def test_whole_pixels_up_to_one(tmp_path, kind):
    """Scaled pixels that were cast to whole numbers, or black and white as 0 and 1."""
    arrays = {name: (array > 127).astype(kind) for name, array in IMAGES.items()}
    (text,) = warnings_of(tmp_path, **arrays)
    assert text.startswith("The training pixels are from 0 to 1: they look scaled") and "Multiply the images by" in text
    arrays = {name: np.floor(array / 256).astype(kind) for name, array in IMAGES.items()}
    black, duplicates = warnings_of(tmp_path, **arrays)
    assert black.startswith("The training pixels are from 0 to 0: they look scaled") and "40 of 40" in duplicates


@pytest.mark.parametrize(
    "change,received",
    [
        (lambda x: x // 2, r"from 0 to 127 \(mean 6\d\)"),
        (lambda x: (x / 255).astype("uint8"), r"from 0 to 1 \(mean 0\)"),
        (lambda x: x // 16, r"from 0 to 15 \(mean \d\)"),
        (lambda x: 128 + x // 2, r"from 128 to 255 \(mean 19\d\)"),
    ],
)
def test_test_pixels_in_another_range(tmp_path, change, received):
    (text,) = warnings_of(tmp_path, x_test=change(IMAGES["x_test"]))
    assert text.startswith("The training pixels are from 0 to 255 (mean 12") and "Prepare both in the same way" in text
    assert re.search(received, text)
    (text,) = warnings_of(tmp_path, x_train=np.maximum(change(IMAGES["x_train"]), 2))  # 2: not the warning above
    assert "their range differs" in text


def test_inverted_test_images(tmp_path):
    """White digits on black for training, black on white for testing: the same range, another brightness."""
    digits = load(Data(train_limit=200))
    arrays = {"x_train": digits.train.images, "y_train": digits.train.labels}
    (text,) = warnings_of(tmp_path, **arrays, x_test=255 - digits.test.images, y_test=digits.test.labels)
    assert "(mean 3" in text and "(mean 22" in text and "their range differs" in text


def test_images_in_files_are_compared_too(tmp_path):
    """Such as those that were scaled to 0..1 before they were saved: black for every reader."""
    folders(tmp_path / "a")
    settings = Data("image_folder", image_size=16, validation=0.34)
    assert load(settings, tmp_path / "a", say=str).warnings == ()
    for path in (tmp_path / "a").rglob("*.JPEG"):
        if "val" in path.parts:
            path.write_bytes(content(Image.eval(Image.open(path), lambda value: value // 4)))
    (text,) = load(settings, tmp_path / "a", say=str).warnings
    assert "their range differs" in text
    for path in (tmp_path / "a").rglob("*.JPEG"):
        path.write_bytes(content(Image.eval(Image.open(path), lambda value: value // 255), "PNG"))
    assert load(settings, tmp_path / "a", say=str).warnings[0].startswith("The training pixels are from 0 to 0")


@pytest.mark.parametrize(
    "labels,expected",
    [
        (lambda y: y + 1, "from 1 to 4. The class '0' has no image, but.*Number the classes from 0 .labels - 1., or"),
        (lambda y: y + 3, "from 3 to 6. The classes '0', '1', '2' have no image.*labels - 3"),
        (lambda y: y * 2, "from 0 to 6. The classes '1', '3', '5' have no image.*without gaps"),
        (lambda y: np.where(y == 2, 9, y), "from 0 to 9. The classes '2', '4', '5', '6', '7' and 1 more have no image"),
        (lambda y: y * 3 + 1, "from 1 to 10. .*'0', '2', '3', '5', '6' and 2 more have no image.*without gaps"),
    ],
)
def test_labels_that_start_above_0_or_skip_values(tmp_path, labels, expected):
    (text,) = warnings_of(tmp_path, y_train=labels(LABELS), y_test=labels(TEST_LABELS))
    assert re.match(f"The labels of the training images are {expected}", text), text


def test_a_class_without_an_image_in_one_of_the_parts(tmp_path):
    rare = LABELS.copy()
    rare[rare == 3] = 0
    rare[:2] = 3  # two images: no fifth of them is for validation
    warnings = warnings_of(tmp_path, y_train=rare)
    assert warnings == [
        "The class '3' has no validation image. Validation accuracy does not count it. Add images, or change "
        "data.validation."
    ]
    (text,) = warnings_of(tmp_path, y_test=TEST_LABELS % 2)
    assert text.startswith("The classes '2', '3' have no test image. Test accuracy does not count it.")
    rare[1] = 0
    (text,) = warnings_of(tmp_path, Data("npz", validation=0.6), y_train=rare)  # the only image is for validation
    assert text.startswith("The class '3' has no training image. The students cannot learn it.")
    assert warnings_of(tmp_path, Data("npz", validation=0.2, train_limit=30), y_test=TEST_LABELS % 2) == []


def test_a_class_without_images_has_its_name(tmp_path):
    folders(tmp_path)
    for path in (tmp_path / "val" / "red").iterdir():
        path.unlink()
    (text,) = load(Data("image_folder", image_size=16, validation=0.34), tmp_path, say=str).warnings
    assert text.startswith("The class 'red' has no test image.")


def test_test_images_that_are_training_images(tmp_path):
    test = IMAGES["x_test"].copy()
    test[[3, 8, 9]] = IMAGES["x_train"][[0, 50, 50]]
    (text,) = warnings_of(tmp_path, x_test=test)
    assert text.startswith("3 of 40 test images are training images, byte for byte")
    test[[3, 8, 9], 4, 4] ^= 1  # nearly equal is not equal
    assert warnings_of(tmp_path, x_test=test) == []
    (text,) = warnings_of(tmp_path, x_test=IMAGES["x_train"], y_test=LABELS)
    assert text.startswith("120 of 120 test images")


def test_duplicates_larger_than_what_their_keys_look_at(tmp_path):
    large = RANDOM.integers(0, 256, (20, 30, 31, 3), np.uint8)
    test = large[:6].copy()
    test[0, 0, 1, 0] ^= 255  # a pixel that the key of 256 numbers leaves out
    labels = np.arange(20) % 2
    (text,) = warnings_of(tmp_path, x_train=large, y_train=labels, x_test=test, y_test=labels[:6])
    assert text.startswith("5 of 6 test images")


def test_files_are_compared_by_their_content(tmp_path, monkeypatch):
    settings = Data("image_folder", image_size=16, validation=0.34)
    folders(tmp_path)
    for place, name in enumerate(("a.jpg", "b.jpeg")):
        copy = (tmp_path / "train" / "red" / f"0{place}.JPEG").read_bytes()
        (tmp_path / "val" / "red" / name).write_bytes(copy)
    (tmp_path / "val" / "blue" / "c.jpg").write_bytes(content(image(COLORS["blue"], seed=1234), quality=90))
    (text,) = load(settings, tmp_path, say=str).warnings
    assert text.startswith("2 of 27 test images are training images")
    monkeypatch.setattr(splits_module, "MOST_READ", 27)  # too many files of the same size, nothing is read
    assert load(settings, tmp_path, say=str).warnings == ()
    read = []
    monkeypatch.setattr(splits_module, "LOOKED_UP", 5)
    monkeypatch.setattr(splits_module, "_digest", lambda images, place: read.append(place) or b"")
    load(settings, tmp_path, say=str)
    assert read == [] or len(read) <= 10


def test_warnings_are_kept_when_splits_are_changed(tmp_path):
    np.savez(tmp_path / "own.npz", **IMAGES, y_train=LABELS + 1, y_test=TEST_LABELS + 1)
    splits = load(Data("npz"), tmp_path / "own.npz", say=str)
    assert dataclasses.replace(splits, train=splits.test).warnings == splits.warnings and len(splits.warnings) == 1


def test_a_run_has_them_in_its_report(tmp_path):
    np.savez(tmp_path / "own.npz", **IMAGES, y_train=LABELS + 1, y_test=TEST_LABELS + 1)
    splits = load(Data("npz"), tmp_path / "own.npz", say=str)
    assert Arms(load_recipe("mnist", "smoke"), splits, folder=None, say=str).warnings == list(splits.warnings)
