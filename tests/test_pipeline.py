"""Order and augmentation are a function of (seed, epoch, position); evaluation loses no example."""

import numpy as np
import pytest
import tensorflow as tf

from kdistill import pipeline
from kdistill.data import Examples
from kdistill.recipe import Data

COUNT = 23
IMAGES = np.arange(COUNT * 6 * 5, dtype=np.uint8).reshape(COUNT, 6, 5, 1)
EXAMPLES = Examples(IMAGES, np.arange(COUNT, dtype=np.int32))


def batches(data=None, seed=1, first_step=0):
    """Two epochs of 4 steps, from a step of the first one on."""
    data = data or Data()
    first = pipeline.training_batches(EXAMPLES, data, 5, seed, 0, first_step)
    return [*first, *pipeline.training_batches(EXAMPLES, data, 5, seed, 1)]


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    orders = [pipeline.order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for each in orders:
        assert sorted(each) == list(range(1000))
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert np.mean(first == second) < 0.01
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_the_batches_follow_the_order():
    found = [labels.numpy() for _, labels in batches()]
    assert len(found) == 2 * 4
    for epoch in (0, 1):
        np.testing.assert_array_equal(
            np.concatenate(found[4 * epoch : 4 * epoch + 4]), pipeline.order(1, epoch, COUNT)[:20]
        )


@pytest.mark.parametrize("first_step", [0, 1, 3])
def test_starting_in_the_middle_gives_what_would_have_come(first_step):
    data = Data(shift=2, flip=True)
    whole, rest = batches(data), batches(data, first_step=first_step)
    assert len(rest) == len(whole) - first_step
    for (x, y), (u, v) in zip(whole[first_step:], rest, strict=True):
        np.testing.assert_array_equal(x, u)
        np.testing.assert_array_equal(y, v)


def test_augmentation_changes_with_seed_epoch_and_position():
    data = Data(shift=2)
    one, again, other = batches(data), batches(data), batches(data, seed=2)
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(one, again, strict=True))
    assert not any(np.array_equal(a[0], b[0]) for a, b in zip(one, other, strict=True))


def test_shifts_are_uniform_and_lose_nothing_but_the_edge():
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 4] = 200
    many = tf.constant(np.repeat(image, 2500, axis=0))
    moved = pipeline.augment(many, Data(shift=2), tf.constant([1, 2])).numpy()
    assert moved.dtype == np.float32 and (moved.sum((1, 2, 3)) == 200).all()
    counts = (moved[..., 0] > 0).sum(0)
    assert (counts[2:7, 2:7] > 60).all() and counts.sum() == counts[2:7, 2:7].sum()


def test_flips_are_about_half():
    image = np.zeros((400, 2, 3, 1), np.uint8)
    image[:, :, 0] = 7
    flipped = pipeline.augment(tf.constant(image), Data(flip=True), tf.constant([3, 4])).numpy()
    assert 150 < (flipped[:, 0, 2, 0] == 7).sum() < 250
    assert ((flipped[:, :, 0] == 7) ^ (flipped[:, :, 2] == 7)).all()


def test_without_augmentation_pixels_are_untouched():
    (images, labels), *_ = batches(Data())
    np.testing.assert_array_equal(images, IMAGES[labels.numpy()].astype("float32"))


def test_evaluation_keeps_the_order_and_pads_the_last_batch_without_weight():
    found = list(pipeline.evaluation_batches(EXAMPLES, 10))
    assert [x.shape[0] for x, _, _ in found] == [10, 10, 10]
    labels, weights = (np.concatenate([batch[i] for batch in found]) for i in (1, 2))
    np.testing.assert_array_equal(labels[:COUNT], EXAMPLES.labels)
    assert (labels[COUNT:] == -1).all() and weights.sum() == COUNT and (weights[COUNT:] == 0).all()


def test_keys_are_apart():
    keys = {tuple(pipeline.key(s, e, p)) for s in range(8) for e in range(8) for p in range(64)}
    assert len(keys) == 8 * 8 * 64
