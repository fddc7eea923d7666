"""Compression from the teacher's stored outputs is compression with the teacher running, up to float16."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.compressing import CLASSES, QUIET, examples, flat, network, stage

from kdistill.compression.compress import compress
from kdistill.data.splits import Splits
from kdistill.errors import InputError
from kdistill.recipe import Data
from kdistill.teachers.cache import list_caches
from kdistill.teachers.replay import Replay

pytestmark = pytest.mark.slow

NAMES = tuple("abcd")
SPLITS = Splits(examples(), examples(40, 1), examples(60, 2), NAMES, "patterns", "0")


@pytest.fixture(scope="module")
def teacher():
    keras.utils.set_random_seed(3)
    return network()


@pytest.fixture(scope="module")
def student():
    keras.utils.set_random_seed(1)
    return flat()


def counted(model, calls):
    """The model, which notes how many images it sees."""

    class Count(keras.layers.Layer):
        def call(self, x):
            tf.numpy_function(lambda x: calls.append(len(x)) or np.float32(0), [x], tf.float32)
            return x

        def compute_output_shape(self, shape):
            return shape

    image = keras.Input((10, 10, 4))
    return keras.Model(image, model(Count(name="count")(image)))


def rounded(model):
    """The teacher with outputs rounded as the cache rounds them."""
    return lambda images: tf.cast(tf.cast(model(images, training=False), tf.float16), tf.float32)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "scheme, augment, settings",
    [
        ("prune_cluster", Data(), {}),
        ("prune", Data(shift=1, flip=True), {}),
        ("pqat", Data(), {"mean": 127.5, "std": 127.5}),  # the student sees raw pixels, its teacher normalized ones
    ],
)
def test_the_weights_are_those_with_the_teacher_running(scheme, augment, settings, teacher, student, tmp_path):
    goals = {"final_sparsity": 0.5} | ({"clusters": 7} if "cluster" in scheme else {})
    values = stage(scheme, epochs=2, learning_rate=2e-3, **goals)
    options = {"augment": augment, "check": None, **settings, **QUIET}
    cached = compress(student, values, teacher, SPLITS, cache=str(tmp_path), **options)
    with_teacher = None if settings else rounded(teacher)
    running = compress(student, values, with_teacher or teacher, SPLITS, **options)
    labels = compress(student, values, None, SPLITS, **options)
    distances = [
        max(np.abs(a - b).max() for a, b in zip(cached.model.get_weights(), other.model.get_weights(), strict=True))
        for other in (running, labels)
    ]
    assert distances[0] < (2e-5 if with_teacher else 2e-3) < distances[1]
    for step, history in running.history.items():
        for name, numbers in history.items():
            assert cached.history[step][name] == pytest.approx(numbers, rel=5e-3, abs=2e-3), (step, name)
        assert min(history["val_kd"]) > 0
    if scheme == "pqat":
        assert cached.tflite()


def test_a_cache_is_paid_once_and_shared_with_runs(teacher, student, tmp_path):
    calls, said = [], []
    model = counted(teacher, calls)
    stored = Replay(model, SPLITS, Data(), 16, 7, tmp_path)  # as a run of another batch size and seed stores it
    stored.build(1, lambda text: None)
    calls.clear()
    values = stage("prune_cluster", epochs=2, final_sparsity=0.5, clusters=7)
    compress(student, values, model, SPLITS, cache=str(tmp_path), say=said.append)
    assert sum(calls) <= 2 * 256  # noise, and a batch that is compared with what is stored
    assert "filling the cache 0 (1 views" in " ".join(said)
    assert len(list_caches(tmp_path)) == 2  # training and validation
    calls.clear()
    compress(student, values, model, SPLITS, **QUIET)
    assert sum(calls) >= 2 * 2 * 96


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher": None}, "does nothing without a teacher"),
        ({"data": (SPLITS.train.images, SPLITS.train.labels)}, "cache expects data=Splits .* received tuple"),
        ({"teacher": lambda images: tf.zeros([len(images), CLASSES])}, "expects teachers that are keras.Models"),
        ({"cache": "/dev/null/kdistill"}, "Cannot write to the teacher cache"),
    ],
)
def test_what_cannot_be_stored(change, message, teacher, student, tmp_path):
    arguments = {"teacher": teacher, "data": SPLITS, "cache": str(tmp_path), **change}
    with pytest.raises(InputError, match=message):
        compress(student, stage("prune"), **arguments, **QUIET)


def test_auto_states_its_reason(teacher, student, tmp_path, monkeypatch):
    monkeypatch.setenv("KDISTILL_CACHE", str(tmp_path))
    said = []
    once = stage("prune", epochs=1)
    compress(student, once, teacher, SPLITS, cache="auto", say=said.append)
    assert any("Teacher cache: not used; 1 x 1 epochs" in text for text in said) and not list_caches(tmp_path)
    compress(student, dataclasses.replace(once, epochs=2), teacher, SPLITS, cache="auto", say=said.append)
    assert any("Teacher cache: used; 1 x 2 epochs" in text for text in said)
    assert json.loads(next(tmp_path.rglob("about.json")).read_text())["source"] == "patterns"
