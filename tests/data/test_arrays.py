"""Inputs and labels of any kind: as they come out of an .npz, and what is refused."""

import numpy as np
import pytest

from kdistill.data.batches import evaluation_batches, training_batches
from kdistill.data.composed_digits import INK, compose
from kdistill.data.few_labels import for_control, for_student
from kdistill.data.splits import load
from kdistill.errors import InputError
from kdistill.recipe import Data

RANDOM = np.random.default_rng(0)
TABLE = {"x_train": RANDOM.normal(size=(40, 5)), "x_test": RANDOM.normal(size=(12, 5))}
QUIET = {"say": lambda text: None}


def splits_of(tmp_path, arrays: dict, **settings):
    np.savez(tmp_path / "data.npz", **arrays)
    return load(Data("npz", validation=0.25, **settings), tmp_path / "data.npz", **QUIET)


def test_a_table_with_numbers(tmp_path):
    labels = {"y_train": RANDOM.normal(size=40), "y_test": RANDOM.normal(size=12)}
    labels["y_train"][3] = np.nan  # missing
    splits = splits_of(tmp_path, {**TABLE, **labels}, head="numbers")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (30, 10, 12)
    assert splits.input_shape == (5,) and splits.sizes == 1 and splits.head == "numbers"
    assert not splits.classifies and not splits.has_images and splits.class_names == ()
    assert splits.train.inputs.dtype == splits.train.labels.dtype == np.float32 and splits.train.labels.shape == (30, 1)
    inputs, targets = next(iter(training_batches(splits.train, Data("npz"), 8, seed=0, epoch=0)))
    assert inputs.shape == (8, 5) and targets.shape == (8, 1)
    # The same examples in the order of the epoch, and at the end of an evaluation examples that do not count.
    places = [np.flatnonzero((splits.train.inputs == row).all(axis=1))[0] for row in inputs.numpy()]
    np.testing.assert_array_equal(targets, splits.train.labels[places])
    *_, (inputs, targets, weights) = evaluation_batches(splits.test, 8)
    np.testing.assert_array_equal(weights, [1, 1, 1, 1, 0, 0, 0, 0])
    assert np.isnan(targets[4:]).all() and not np.isnan(targets[:4]).any()


def test_labels_may_be_bool_and_numbers_below_zero(tmp_path):
    flags = {"y_train": np.arange(40) % 2 == 0, "y_test": np.arange(12) % 2 == 0}
    for head in ("labels", "classes"):
        labels = splits_of(tmp_path, {**TABLE, **flags}, head=head).test.labels
        np.testing.assert_array_equal(labels.reshape(-1), flags["y_test"])
    cold = {"y_train": -np.arange(1, 41), "y_test": -np.arange(1, 13)}
    splits = splits_of(tmp_path, {**TABLE, **cold}, head="numbers")
    np.testing.assert_array_equal(splits.test.labels[:, 0], cold["y_test"])


def test_several_inputs_and_outputs_by_name(tmp_path):
    arrays = {}
    for part, count in (("train", 40), ("test", 12)):
        arrays[f"x_{part}_tokens"] = RANDOM.integers(0, 1000, (count, 7))
        arrays[f"x_{part}_photo"] = RANDOM.integers(0, 256, (count, 4, 4, 3)).astype(np.uint8)
        arrays[f"y_{part}_word"] = RANDOM.integers(0, 3, (count, 7))
        arrays[f"y_{part}_tags"] = RANDOM.integers(0, 2, (count, 2))
    head = {"word": "classes", "tags": "labels"}
    splits = splits_of(tmp_path, arrays, head=head)
    assert splits.input_shape == {"photo": (4, 4, 3), "tokens": (7,)} and splits.sizes == {"word": 3, "tags": 2}
    assert splits.outputs["word"].shape == (7, 3) and splits.outputs["tags"].shape == (2,)
    inputs, targets = next(iter(training_batches(splits.train, Data("npz"), 8, seed=0, epoch=0)))
    assert {name: part.dtype.name for name, part in inputs.items()} == {"photo": "float32", "tokens": "int32"}
    assert targets["word"].shape == (8, 7) and targets["tags"].dtype == "float32"
    *_, (_, targets, _) = evaluation_batches(splits.test, 8)
    assert (targets["word"].numpy()[4:] == -1).all() and not (targets["tags"].numpy()[4:] >= 0).any()
    # The other part of a batch, as of two workers, is the same bits.
    whole = next(iter(training_batches(splits.train, Data("npz"), 8, 0, 0)))
    halves = [next(iter(training_batches(splits.train, Data("npz"), 8, 0, 0, share=(i, 2)))) for i in (0, 1)]
    for name in ("photo", "tokens"):
        np.testing.assert_array_equal(np.concatenate([half[0][name] for half in halves]), whole[0][name])


def test_one_class_for_each_example_counts_like_images(tmp_path):
    arrays = {**TABLE, "y_train": np.arange(40) % 4, "y_test": np.arange(12)[:, None] % 4}
    splits = splits_of(tmp_path, arrays, head="classes")
    assert splits.classifies and not splits.has_images and splits.class_names == ("0", "1", "2", "3")
    assert np.bincount(splits.validation.labels).tolist() == [2, 2, 2, 2]  # the same share of every class
    few = splits_of(tmp_path, arrays, head="classes", labeled=16)
    assert np.bincount(few.train.labels[few.labeled_mask]).tolist() == [3, 3, 3, 3]


def test_few_labels_of_numbers_and_of_several_outputs(tmp_path):
    arrays = {**TABLE, "y_train": RANDOM.normal(size=(40, 2)), "y_test": RANDOM.normal(size=(12, 2))}
    splits = splits_of(tmp_path, arrays, head="numbers", labeled=10)
    student, control = for_student(splits).train, for_control(splits).train
    assert np.isnan(student.labels).all(axis=1).sum() == len(student) - splits.labeled_mask.sum() > 0
    assert len(control) == len(student) and not np.isnan(control.labels).any()
    assert len(np.unique(control.inputs, axis=0)) == splits.labeled_mask.sum()


def test_the_fingerprint_knows_inputs_labels_and_which_labels_are_seen(tmp_path):
    arrays = {**TABLE, "y_train": np.arange(40.0), "y_test": np.arange(12.0)}
    prints = {splits_of(tmp_path, arrays, head="numbers").fingerprint}
    prints.add(splits_of(tmp_path, arrays, head="numbers", labeled=10).fingerprint)
    prints.add(splits_of(tmp_path, {**arrays, "y_test": np.arange(12.0) + 1}, head="numbers").fingerprint)
    prints.add(splits_of(tmp_path, {**arrays, "x_test": TABLE["x_test"] + 1}, head="numbers").fingerprint)
    assert len(prints) == 4


REFUSED = {
    "neither images nor a head": ({}, None, "state what the labels mean"),
    "no labels": ({"y_train": None}, "numbers", "^'[^']*data.npz' lacks y_train; it holds"),
    "texts": ({"x_train": np.array([["a"] * 5] * 40)}, "numbers", "TextVectorization"),
    "not finite": ({"x_test": np.full((12, 5), np.inf)}, "numbers", "60 numbers that are NaN"),
    "another count": ({"y_train": np.zeros(39)}, "numbers", r"expected numbers for each of 40"),
    "no axis": ({"x_train": np.zeros(40)}, "numbers", r"expected \[n, \.\.\.\]"),
    "other features": ({"x_test": np.zeros((12, 4))}, "numbers", r"\(5,\).*\(4,\)"),
    "labels above 1": ({"y_train": np.full(40, 2)}, "labels", "expects 0 or 1"),
    "classes with a fraction": ({"y_train": np.full(40, 0.5)}, "classes", "whole numbers"),
    "all missing": ({"y_train": np.full(40, np.nan)}, "numbers", "missing labels only"),
    "heads by name, one array": ({}, {"a": "numbers"}, "data.head expects one meaning"),
    "infinite": ({"y_train": np.full(40, np.inf)}, "numbers", "infinite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_one_message(case, tmp_path):
    changes, head, message = REFUSED[case]
    arrays = {**TABLE, "y_train": np.arange(40) % 2, "y_test": np.arange(12) % 2} | changes
    with pytest.raises(InputError, match=message):
        splits_of(tmp_path, {name: array for name, array in arrays.items() if array is not None}, head=head)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "digits_rows", "shift": 1}, "data.shift change images, and these inputs are none"),
        ({"name": "digits_segment", "flip": True}, "labels of positions"),
        ({"name": "digits_multilabel", "mixup": 0.2}, "mix one class"),
        ({"name": "digits_multilabel", "head": "numbers"}, "are known"),
    ],
)
def test_augmentation_that_labels_cannot_follow_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        load(Data(**settings), **QUIET)


def test_canvases_are_what_their_labels_say():
    digits = np.zeros((3, 28, 28), np.uint8)
    for number in range(3):
        digits[number, 4:24, 4:24] = 200 + number  # brightness states the digit
    images, pixels, labels = compose(digits, np.array([7, 0, 9]), 50, seed=3)
    assert images.shape == (50, 40, 40, 1) and pixels.shape == (50, 40, 40) and labels.shape == (50, 10)
    values = images[..., 0]
    for digit, brightness in ((7, 200), (0, 201), (9, 202)):
        np.testing.assert_array_equal(pixels == digit + 1, values == brightness)
    assert ((pixels == 0) == (values < INK)).all()
    shown = np.stack([(pixels == digit + 1).any(axis=(1, 2)) for digit in range(10)], axis=1)
    assert (shown <= labels).all() and (labels.sum(axis=1) >= 1).all()  # a digit below another is on the canvas, too
    again = compose(digits, np.array([7, 0, 9]), 50, seed=3)
    np.testing.assert_array_equal(images, again[0])
    assert (compose(digits, np.array([7, 0, 9]), 50, seed=4)[0] != images).any()
