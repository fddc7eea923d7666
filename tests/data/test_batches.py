"""Order and augmentation are a function of (seed, epoch, position); evaluation loses no example."""

import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from support.image_files import COLORS, content, folders
from support.image_files import image as picture_of

from kdistill.data import augmentation, lazy_images
from kdistill.data.batches import epoch_order, evaluation_batches, training_batches
from kdistill.data.lazy_images import center_crop_boxes
from kdistill.data.splits import Examples, load
from kdistill.errors import InputError
from kdistill.recipe import Data

COUNT = 23
IMAGES = np.arange(COUNT * 6 * 5, dtype=np.uint8).reshape(COUNT, 6, 5, 1)
EXAMPLES = Examples(IMAGES, np.arange(COUNT, dtype=np.int32))


def batches(data=None, seed=1, first_step=0):
    """Two epochs of 4 steps, from a step of the first one on."""
    data = data or Data()
    first = training_batches(EXAMPLES, data, 5, seed, 0, first_step)
    return [*first, *training_batches(EXAMPLES, data, 5, seed, 1)]


def test_an_epoch_holds_every_example_once_in_an_order_of_its_own():
    orders = [epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(1000))
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert np.mean(first == second) < 0.01
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.15


def test_the_batches_follow_the_order():
    labels_of_steps = [labels.numpy() for _, labels in batches()]
    assert len(labels_of_steps) == 2 * 4
    for epoch in (0, 1):
        np.testing.assert_array_equal(
            np.concatenate(labels_of_steps[4 * epoch : 4 * epoch + 4]), epoch_order(1, epoch, COUNT)[:20]
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


@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 2), (28, 28, 1), (300, 4, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("flip", [False, True])
def test_shifts_and_flips_move_whole_pixels(shape, dtype, flip):
    """Every pixel is that of NumPy, bit by bit, at every shift."""
    count, shift = 64, 4
    images = (np.random.default_rng(0).random((count, *shape)) * 256).astype(dtype)
    key = tf.constant([3, 4])
    found = augmentation.augment(tf.constant(images), Data(shift=shift, flip=flip), key).numpy()
    draws = tf.random.stateless_uniform([3, count], key).numpy()
    padded = np.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    for place in range(count):
        down, right = (int(draws[axis, place] * np.float32(2 * shift + 1)) for axis in (0, 1))
        expected = padded[place, down : down + shape[0], right : right + shape[1]]
        expected = expected[:, ::-1] if flip and draws[2, place] < 0.5 else expected
        np.testing.assert_array_equal(found[place], expected.astype(np.float32))


def test_shifts_are_uniform_and_lose_nothing_but_the_edge():
    image = np.zeros((1, 9, 9, 1), np.uint8)
    image[0, 4, 4] = 200
    many = tf.constant(np.repeat(image, 2500, axis=0))
    moved = augmentation.augment(many, Data(shift=2), tf.constant([1, 2])).numpy()
    assert moved.dtype == np.float32 and (moved.sum((1, 2, 3)) == 200).all()
    counts = (moved[..., 0] > 0).sum(0)
    assert (counts[2:7, 2:7] > 60).all() and counts.sum() == counts[2:7, 2:7].sum()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_flips_are_those_of_the_draws(count):
    """All, none or some of a batch; the type stays."""
    images = np.random.default_rng(0).integers(0, 256, (count, 3, 5, 3), dtype=np.uint8)
    numbers = set()
    for number in range(12):
        draws = tf.random.stateless_uniform([3, count], [number, 0]).numpy()
        expected = np.where((draws[2] < 0.5)[:, None, None, None], images[:, :, ::-1], images)
        found = augmentation.augment(tf.constant(images), Data(flip=True), tf.constant([number, 0]))
        assert found.dtype == tf.uint8 and found.shape == images.shape
        np.testing.assert_array_equal(found, expected)
        numbers.add(int((draws[2] < 0.5).sum()))
    assert numbers >= {0, count} or count == 5


@pytest.mark.parametrize("box", [(0, 0, 4, 5), (1, 2, 0, 0), (0, 0, 2, 3), (2, 1, 2, 4)])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_a_box_at_the_edge_or_without_pixels(box, kind):
    images = tf.constant(np.random.default_rng(0).integers(0, 256, (3, 4, 5, 2)).astype(kind))
    top, left, tall, wide = box
    expected = images.numpy().astype(np.float32)
    expected[:, top : top + tall, left : left + wide] = np.roll(images, 1, 0)[:, top : top + tall, left : left + wide]
    mixed, answers = augmentation.mix_neighbors(images, tf.constant([0, 1, 1]), tf.constant(1.0), tf.constant(box), 2)
    np.testing.assert_array_equal(mixed, expected)
    share = tall * wide / 20
    np.testing.assert_allclose(answers, [[1 - share, share], [share, 1 - share], [0, 1]], atol=1e-6)


def test_flips_are_about_half():
    image = np.zeros((400, 2, 3, 1), np.uint8)
    image[:, :, 0] = 7
    flipped = augmentation.augment(tf.constant(image), Data(flip=True), tf.constant([3, 4])).numpy()
    assert 150 < (flipped[:, 0, 2, 0] == 7).sum() < 250
    assert ((flipped[:, :, 0] == 7) ^ (flipped[:, :, 2] == 7)).all()


def test_without_augmentation_pixels_are_untouched():
    (images, labels), *_ = batches(Data())
    np.testing.assert_array_equal(images, IMAGES[labels.numpy()].astype("float32"))


def test_evaluation_keeps_the_order_and_pads_the_last_batch_without_weight():
    padded = list(evaluation_batches(EXAMPLES, 10))
    assert [x.shape[0] for x, _, _ in padded] == [10, 10, 10]
    labels, weights = (np.concatenate([batch[i] for batch in padded]) for i in (1, 2))
    np.testing.assert_array_equal(labels[:COUNT], EXAMPLES.labels)
    assert (labels[COUNT:] == -1).all() and weights.sum() == COUNT and (weights[COUNT:] == 0).all()


def test_keys_are_apart():
    keys = {tuple(augmentation.random_key(s, e, p)) for s in range(8) for e in range(8) for p in range(64)}
    assert len(keys) == 8 * 8 * 64


# -- random parts, mixing, encoded images --------------------------------------------------------------------------

SIDE = 16
ENCODED = Data("image_folder", image_size=SIDE, validation=0.34)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return folders(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def splits(image_folder):
    """Images that stay in their files, as those of a large data set do."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(lazy_images, "KEPT_BYTES", 0)
        return load(ENCODED, image_folder, say=lambda text: None)


def both(splits):
    """The same pixels as an array and encoded."""
    return (dataclasses.replace(splits.train, inputs=splits.train.images[:]), splits.train)


def epoch_of(examples, data, epoch=0, first=0, seed=4, batch=5):
    epoch = training_batches(examples, data, batch, seed, epoch, first)
    return [(x.numpy(), y.numpy()) for x, y in epoch]


def same(first, second):
    return len(first) == len(second) and all(
        np.array_equal(a, u) and np.array_equal(b, v) for (a, b), (u, v) in zip(first, second, strict=True)
    )


ALL = {"shift": 2, "flip": True, "crop_area": 0.3, "mixup": 0.4, "cutmix": 1.0}


@pytest.mark.exhaustive(
    but=(
        "{'shift': 2, 'flip': True, 'crop_area': 0.3, 'mixup': 0.4, 'cutmix': 1.0}-1",
        "{}-0",
        "{'crop_area': 0.3}-0",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("changes", [{}, {"crop_area": 0.3}, {"mixup": 0.4}, {"cutmix": 1.0}, ALL], ids=str)
def test_one_key_gives_one_epoch_and_the_rest_of_it(splits, kind, changes):
    examples, data = both(splits)[kind], dataclasses.replace(ENCODED, **changes)
    whole = epoch_of(examples, data)
    assert len(whole) == 3 and same(whole, epoch_of(examples, data))
    assert same(whole[1:], epoch_of(examples, data, first=1)) and same(whole[2:], epoch_of(examples, data, first=2))
    assert not same(whole, epoch_of(examples, data, epoch=1)) and not same(whole, epoch_of(examples, data, seed=5))
    for images, labels in whole:
        assert images.shape == (5, SIDE, SIDE, 3) and images.dtype == np.float32
        assert images.min() >= 0 and images.max() <= 255
        if augmentation.mixes_images(data):
            assert labels.shape == (5, 4) and labels.dtype == np.float32
            np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)


@pytest.mark.exhaustive(
    but=(
        "{'shift': 2, 'flip': True, 'crop_area': 0.3, 'mixup': 0.4, 'cutmix': 1.0}-1",
        "{'crop_area': 0.3, 'shift': 2}-0",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("changes", [{"crop_area": 0.3, "shift": 2}, {"mixup": 0.4}, ALL], ids=str)
def test_the_parts_of_workers_are_the_whole_batch_bit_by_bit(splits, kind, changes):
    """Parts of 2 and 3 of 5 images, and five of one; with mixing, whose partner is in another worker's part too."""
    examples, data = both(splits)[kind], dataclasses.replace(ENCODED, **changes)
    whole = epoch_of(examples, data, first=1)
    for count in (2, 5):
        parts = [
            list(training_batches(examples, data, 5, 4, 0, 1, (i, count)).as_numpy_iterator()) for i in range(count)
        ]
        assert {len(batch[0]) for part in parts for batch in part} == ({2, 3} if count == 2 else {1})
        joined = [tuple(map(np.concatenate, zip(*step, strict=True))) for step in zip(*parts, strict=True)]
        assert same(whole, joined)


def test_a_worker_reads_its_own_part_only(splits, monkeypatch):
    """And with mixing one image more."""
    encoded, read = splits.train, []
    elements = type(encoded.images.store).elements

    def counted(store, places):
        read.append(len(places))
        return elements(store, places)

    monkeypatch.setattr(type(encoded.images.store), "elements", counted)
    for data, expected in ((ENCODED, 2), (dataclasses.replace(ENCODED, mixup=0.4), 3)):
        read.clear()
        half = training_batches(encoded, data, 5, 4, 0, 0, (0, 2))
        assert len(list(half)) == 3 and [count for count in read if count] == [expected] * 3


def test_encoded_images_give_what_arrays_give(splits):
    """Without random parts: the same pixels, labels, order, shifts and mixtures; and the same for evaluation."""
    array, encoded = both(splits)
    data = dataclasses.replace(ENCODED, shift=2, flip=True, mixup=0.4, cutmix=1.0)
    assert same(epoch_of(array, data), epoch_of(encoded, data))
    for first, second in zip(*(evaluation_batches(each, 6) for each in (array, encoded)), strict=True):
        real = first[2] > 0
        np.testing.assert_array_equal(first[0][real], second[0][real])
        for a, b in zip(first[1:], second[1:], strict=True):
            np.testing.assert_array_equal(a, b)
    assert evaluation_batches(encoded, 6).cardinality() == 3
    assert training_batches(encoded, data, 5, 0, 0).cardinality() == 3


@pytest.mark.parametrize("changes", [{}, {"shift": 2, "flip": True, "mixup": 0.4}, ALL], ids=str)
def test_few_images_stay_in_memory_and_give_what_files_give(splits, image_folder, changes, monkeypatch):
    """The same bits, whole and in parts; of random parts the files are read, and only then."""
    said, data = [], dataclasses.replace(ENCODED, **changes)
    monkeypatch.setattr(lazy_images, "STATED_BYTES", 1000)
    kept = load(ENCODED, image_folder, say=said.append)
    stated = [text for text in said if text.endswith("decoded images stay in memory, 0.0184 MB")]
    assert (
        len(stated) == 2
        and stated[0].startswith("24 ")
        and kept.fingerprint == splits.fingerprint
        and kept.train.images.pixels is not None
    )
    reads = []
    content = type(kept.train.images.store).content
    monkeypatch.setattr(type(kept.train.images.store), "content", lambda *pair: reads.append(1) or content(*pair))
    found = epoch_of(kept.train, data, first=1)
    assert bool(reads) == ("crop_area" in changes)
    assert same(found, epoch_of(splits.train, data, first=1))
    for part in ((0, 2), (1, 2)):
        pair = (training_batches(each.train, data, 5, 4, 0, 0, part) for each in (kept, splits))
        assert same(*[[(x.numpy(), y.numpy()) for x, y in each] for each in pair])
    for first, second in zip(*(evaluation_batches(each.validation, 6) for each in (kept, splits)), strict=True):
        real = first[2] > 0
        np.testing.assert_array_equal(first[0][real], second[0][real])
        np.testing.assert_array_equal(first[1], second[1])
    np.testing.assert_array_equal(kept.test.images[3:6], splits.test.images[3:6])
    np.testing.assert_array_equal(kept.train.select([3, 1]).images[:], splits.train.images[np.array([3, 1])])


def test_every_way_of_decoding_in_one_folder(tmp_path):
    """PNG, JPEG, and JPEG shrunk by 2 and by 8 while it is decoded, which the graph chooses between."""
    for part in ("train", "val"):
        for name, sizes in (("red", (20, 40, 200, 24)), ("blue", (44, 24, 190, 30))):
            (tmp_path / part / name).mkdir(parents=True)
            for size in sizes:
                kind = "PNG" if size == 24 else "JPEG"
                picture = content(picture_of(COLORS[name], size, size + 5), kind)
                (tmp_path / part / name / f"{size}.{kind}").write_bytes(picture)
    encoded = load(ENCODED, tmp_path, say=lambda text: None).test
    array = dataclasses.replace(encoded, inputs=encoded.images[:])
    assert set(center_crop_boxes(encoded.images.store.headers, SIDE)[:, 4]) == {0, 1, 3, 4}
    assert same(epoch_of(array, ENCODED, batch=4), epoch_of(encoded, ENCODED, batch=4))


def test_an_epoch_that_is_over_has_no_batches(splits):
    for examples in both(splits):
        assert epoch_of(examples, ENCODED, first=3) == []


def test_the_number_of_threads_changes_nothing(splits, monkeypatch):
    data = dataclasses.replace(ENCODED, **ALL)
    parallel = epoch_of(splits.train, data)
    monkeypatch.setattr(tf.data, "AUTOTUNE", 1)
    assert same(parallel, epoch_of(splits.train, data))


@pytest.mark.parametrize("kind", [0, 1])
def test_random_parts_of_an_image_are_inside_it(splits, kind):
    """The red channel of each class is nearly constant over the image, so of any part of it."""
    examples = both(splits)[kind]
    for images, labels in epoch_of(examples, dataclasses.replace(ENCODED, crop_area=0.1)):
        for image, label in zip(images, labels, strict=True):
            assert abs(image[..., 0].mean() - list(COLORS.values())[label][0]) < 15


def test_a_random_part_of_a_ramp_is_the_part_that_was_drawn():
    """Pixels that say where they are: bilinear resizing of a ramp is a ramp, from the part's first to its last row."""
    ramp = np.broadcast_to(np.arange(0, 240, 10, dtype=np.uint8)[:, None, None], (24, 24, 1))
    examples = Examples(np.stack([ramp] * 6), np.zeros(6, np.int32))
    data = Data(crop_area=0.2)
    ((images, _),) = epoch_of(examples, data, batch=6)
    windows = augmentation.random_windows((24, 24, 1), 6, data, 4, 0, 0)
    np.testing.assert_allclose(images[:, 0, 0, 0], windows[:, 0] * 230, atol=1e-3)
    np.testing.assert_allclose(images[:, -1, 0, 0], windows[:, 2] * 230, atol=1e-3)
    assert len(set(windows[:, 0])) > 3 and (windows >= 0).all() and (windows <= 1).all()


def test_mixup_by_hand():
    images = tf.constant([[[[10.0]]], [[[110.0]]], [[[60.0]]]])
    labels = tf.constant([0, 1, 1])
    mixed, answers = augmentation.mix_neighbors(images, labels, tf.constant(0.3), tf.constant([0, 0, 1, 1]), 2)
    np.testing.assert_allclose(mixed[:, 0, 0, 0], [0.7 * 10 + 0.3 * 60, 0.7 * 110 + 0.3 * 10, 0.7 * 60 + 0.3 * 110])
    np.testing.assert_allclose(answers, [[0.7, 0.3], [0.3, 0.7], [0, 1]], atol=1e-6)


def test_cutmix_by_hand():
    images = tf.stack([tf.zeros((4, 5, 1)), tf.ones((4, 5, 1))])
    mixed, answers = augmentation.mix_neighbors(
        images, tf.constant([0, 2]), tf.constant(1.0), tf.constant([1, 2, 2, 3]), 3
    )
    expected = np.zeros((4, 5))
    expected[1:3, 2:5] = 1
    np.testing.assert_array_equal(mixed[0, ..., 0], expected)
    np.testing.assert_array_equal(mixed[1, ..., 0], 1 - expected)
    np.testing.assert_allclose(answers, [[0.7, 0, 0.3], [0.3, 0, 0.7]], atol=1e-6)  # 6 of 20 pixels


def test_mixtures_are_as_the_papers_say():
    """Beta(1, 1) is uniform: shares average a half; with both each has about half of the batches."""
    shape = (20, 30, 3)
    up = [augmentation.draw_mixture(Data(mixup=1.0), shape, 0, 0, step) for step in range(400)]
    assert all(box.tolist() == [0, 0, 20, 30] for _, box in up)
    shares = np.array([share for share, _ in up])
    assert abs(shares.mean() - 0.5) < 0.05 and shares.min() < 0.05 and shares.max() > 0.95
    cut = np.array([augmentation.draw_mixture(Data(cutmix=1.0), shape, 0, 0, step)[1] for step in range(400)])
    assert (cut[:, :2] >= 0).all() and (cut[:, 0] + cut[:, 2] <= 20).all() and (cut[:, 1] + cut[:, 3] <= 30).all()
    areas = cut[:, 2] * cut[:, 3] / 600
    assert areas.max() > 0.7 and areas.min() < 0.02 and 0.25 < areas.mean() < 0.45  # less than a half: edges cut off
    mixed = [augmentation.draw_mixture(Data(mixup=1.0, cutmix=1.0), shape, 0, 0, step) for step in range(400)]
    assert 150 < sum(share == 1.0 for share, _ in mixed) < 250


def test_mixed_labels_need_the_number_of_classes():
    with pytest.raises(InputError, match="the number of classes"):
        training_batches(EXAMPLES, Data(mixup=0.2), 5, 0, 0)


def test_no_epoch_waits_for_the_thread_that_tunes():
    for dataset in (
        training_batches(EXAMPLES, Data(), 4, 0, 0),
        evaluation_batches(EXAMPLES, 4),
    ):
        for stage in (dataset, dataset.map(lambda *batch: batch).prefetch(1)):
            assert stage.options().autotune.enabled is False


@pytest.mark.parametrize("data", [Data(), Data(crop_area=0.5), Data(mixup=0.2), Data(shift=1, cutmix=1.0)])
def test_the_rest_of_an_epoch_after_its_last_step_is_empty(data):
    assert list(training_batches(dataclasses.replace(EXAMPLES, classes=COUNT), data, 5, 0, 0, first_step=4)) == []
