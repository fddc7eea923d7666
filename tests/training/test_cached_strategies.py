"""The teacher's cache on several replicas and workers: filled by all, read by each, and the student of one device."""

import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import CLASSES, corners, network

from kdistill.data.splits import Splits
from kdistill.distillation.distiller import Distiller
from kdistill.networks.architectures import build
from kdistill.recipe import Data, Network, Recipe, Term, Training
from kdistill.recipe.loading import load_recipe
from kdistill.runs.folder import RunFolder
from kdistill.runs.run import run
from kdistill.runs.teaching import Teaching
from kdistill.teachers import replay
from kdistill.teachers.replay import Replay
from kdistill.training import fit, strategy
from kdistill.training.strategy import SINGLE_DEVICE

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import two_workers

pytestmark = pytest.mark.slow

PARTS = [dataclasses.replace(corners(*each), classes=4) for each in ((83, 0), (30, 1), (30, 2))]
SPLITS = Splits(*PARTS, CLASSES, "corners", "0123456789abcdef")
TRAINING = Training(epochs=2, batch_size=16, learning_rate=0.05, optimizer="sgd")
RECIPE = Recipe("corners", Network("small_cnn"), Network("small_cnn"), training=TRAINING)
DATA = {
    "by image": Data("corners"),
    "by position": Data("corners", shift=2, flip=True),
    "mixed": Data("corners", mixup=0.4, cutmix=0.5),
}


def quiet(text):
    pass


@pytest.fixture(scope="module")
def mirrored():
    assert len(tf.config.list_logical_devices("CPU")) == 2, "conftest.py makes two logical CPUs"
    return strategy.choose_devices("mirrored")


def stored_by(devices, data, root, taps=None):
    """The outputs that a run on these devices stores, or finds."""
    with devices.scope():
        teacher = network(filters=6)
    recipe = dataclasses.replace(RECIPE, data=data)
    with RunFolder(Path(tempfile.mkdtemp(dir=root.parent))) as folder:
        return Teaching(teacher, recipe, SPLITS, folder, devices, quiet, taps).replay("student", 3, str(root))


def rows_of(stored):
    views = range(stored.views(2))
    return np.concatenate([stored.train.read_rows(view, slice(0, stored.train.rows)) for view in views]).astype("f4")


def small():
    """A student; its normalization is over the whole batch, as in the networks of kdistill."""
    keras.utils.set_random_seed(2)
    image = keras.Input((12, 12, 1))
    x = layers.Conv2D(3, 3, strides=2)(layers.Rescaling(1 / 255)(image))
    x = layers.ReLU(name="relu")(layers.BatchNormalization(synchronized=True, momentum=0.8)(x))
    return keras.Model(image, layers.Dense(4)(layers.Flatten()(x)))


def student(devices, data, stored, batch_size=16, terms=None):
    with devices.scope():
        teacher = network(filters=6)
        model = Distiller(small(), teacher, terms=terms)
    training = dataclasses.replace(TRAINING, batch_size=batch_size)
    record = fit.fit(model, SPLITS, data, training, 3, say=quiet, stored=stored, devices=devices)
    return model.student.get_weights(), record["history"]


def assert_same(first, second):
    for one, two in zip(first[0], second[0], strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    for name, values in first[1].items():
        np.testing.assert_allclose(values, second[1][name], atol=1e-5, err_msg=name)


@pytest.mark.exhaustive("by image", "mixed")
@pytest.mark.parametrize("name", DATA)
def test_two_replicas_fill_the_cache_of_one_device_and_end_with_its_student(mirrored, tmp_path, name):
    """83 images in batches of 16: the last part of the validation images, 30, is uneven among the replicas."""
    data = DATA[name]
    alone, both = (stored_by(devices, data, tmp_path / devices.name) for devices in (SINGLE_DEVICE, mirrored))
    assert (alone.train.key, alone.validation.key) == (both.train.key, both.validation.key)
    np.testing.assert_allclose(rows_of(both), rows_of(alone), rtol=2e-3, atol=1e-3)  # of float16
    assert both.missing(both.views(2)) == 0
    one = stored_by(mirrored, data, tmp_path / "none")  # the cache that one device has filled
    assert_same(student(SINGLE_DEVICE, data, alone), student(mirrored, data, one))


@pytest.mark.exhaustive
def test_layers_of_the_teacher_are_stored_and_read_on_replicas(mirrored, tmp_path):
    data, taps = DATA["by position"], {"relu": "a term"}
    term = Term("hint", 1.0, student_tap="relu", teacher_tap="relu", projector="conv1x1")
    alone, both = (stored_by(devices, data, tmp_path / devices.name, taps) for devices in (SINGLE_DEVICE, mirrored))
    assert alone.train.key == both.train.key and alone.shapes["relu"] == (5, 5, 6)
    np.testing.assert_allclose(rows_of(both), rows_of(alone), rtol=2e-3, atol=1e-3)
    found = [student(devices, data, alone, terms={"hint": term}) for devices in (SINGLE_DEVICE, mirrored)]
    assert_same(*found)


@pytest.mark.parametrize("count,size", [(1, 256), (3, 2), (5, 4), (256, 256)])
def test_replicas_compute_any_number_of_images(mirrored, tmp_path, count, size):
    """Also one image, which only one replica needs."""
    with mirrored.scope():
        teacher = network(filters=6)
    stored = Replay(teacher, SPLITS, DATA["by image"], 16, 0, tmp_path, strategy=mirrored.strategy)
    images = tf.constant(corners(count, seed=7).images, tf.float32)
    np.testing.assert_allclose(stored._teach(images), teacher(images, training=False), atol=1e-5)


@pytest.mark.exhaustive("by image-2", "by position-2", "mixed-3")
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", DATA)
def test_each_worker_reads_its_part_of_the_rows(tmp_path, name, workers, monkeypatch):
    """16 images among 3 workers are 5, 5 and 6; the rows are read two steps at a time, and from the middle."""
    monkeypatch.setattr(replay, "CHUNK_BYTES", 2 * 4 * 16 * len(CLASSES))
    stored = stored_by(SINGLE_DEVICE, DATA[name], tmp_path / "cache")
    for first in (0, 3):
        whole = list(stored.training_batches(1, first))
        parts = [list(stored.training_batches(1, first, (worker, workers))) for worker in range(workers)]
        for step, (images, targets) in enumerate(whole):
            own = [part[step] for part in parts]
            np.testing.assert_array_equal(np.concatenate([x for x, _ in own]), images)
            for key in ("labels", "teacher_logits"):
                np.testing.assert_array_equal(np.concatenate([y[key] for _, y in own]), targets[key])


def test_a_worker_s_part_goes_to_its_replicas(mirrored, tmp_path):
    """As with several workers of two replicas each: an element of the data set for each replica."""
    data = DATA["by position"]
    stored = stored_by(SINGLE_DEVICE, data, tmp_path / "cache")
    expected = student(SINGLE_DEVICE, data, stored)[0]
    with mirrored.scope():
        model = Distiller(small(), network(filters=6))
        fit._compile(model, TRAINING, 5, mirrored)
    for view in (0, 1):
        model.fit(mirrored.parts(stored.training_batches(view)), steps_per_epoch=5, shuffle=False, verbose=0)
    for one, two in zip(expected, model.student.get_weights(), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


@pytest.mark.exhaustive
def test_two_workers_fill_and_read_the_cache_of_a_plain_run(tmp_path):
    """The workers fill an empty folder together, and read one that a plain run has filled; see a resumed run, too."""
    network_of_digits = build(Network("small_cnn"), (28, 28, 1), 10)
    network_of_digits.save(tmp_path / "teacher.keras")
    settings = ["training.optimizer=sgd", "train_limit=128", "training.batch_size=31", "exports="]
    teacher = str(tmp_path / "teacher.keras")
    recipe = load_recipe("mnist", "smoke", [*settings, f"teacher.file={teacher}"])
    run(recipe, tmp_path / "plain", cache=tmp_path / "cache", say=quiet)
    words = ["mnist", "--variant", "smoke", "--json", "--teacher", teacher]
    words += [word for each in settings for word in ("--set", each)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    for cache, missing in (("cache", 0), ("empty", recipe.training.epochs)):
        out = tmp_path / f"run-{cache}"
        more = ["--cache", str(tmp_path / cache), "--out", str(out)]
        workers = two_workers.start([*words, *more], **pipes)
        told = [worker.communicate(timeout=400) for worker in workers]
        assert [worker.returncode for worker in workers] == [0, 0], told
        assert f"filling the cache {missing}" in told[0][1] and json.loads(told[0][0])["strategy"]["workers"] == 2
        tolerance = 5e-6 if cache == "cache" else 1e-3  # a logit may be rounded to the next number of float16
        for name in ("control", "student"):
            one, two = (keras.models.load_model(folder / f"{name}.keras") for folder in (tmp_path / "plain", out))
            for x, y in zip(one.weights, two.weights, strict=True):
                np.testing.assert_allclose(x.numpy(), y.numpy(), atol=tolerance, err_msg=f"{cache}: {x.path}")
    keys = [sorted(path.name for path in (tmp_path / cache).iterdir()) for cache in ("cache", "empty")]
    assert keys[0] == keys[1]
    parts = [sum(1 for _ in (tmp_path / cache).rglob("view-*.npy")) for cache in ("cache", "empty")]
    assert parts[0] == parts[1] == recipe.training.epochs + 1
    (out / "checkpoints/student/finished.json").unlink()  # the workers train it again, from the cache
    workers = two_workers.start([*words, *more, "--resume"], **pipes)
    told = [worker.communicate(timeout=400) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    for name in ("control", "student"):
        two = keras.models.load_model(out / f"{name}.keras")
        for x, y in zip(
            keras.models.load_model(tmp_path / "plain" / f"{name}.keras").weights, two.weights, strict=True
        ):
            np.testing.assert_allclose(x.numpy(), y.numpy(), atol=1e-3)
