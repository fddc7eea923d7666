"""A teacher or a student of probabilities trains as one of logits does, wherever kdistill trains."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import CLASSES, corners, network

import kdistill
from kdistill.data.splits import Splits
from kdistill.distillation.distiller import Distiller
from kdistill.recipe import Data, Training
from kdistill.teachers.frozen import blend_models, frozen
from kdistill.teachers.replay import Replay
from kdistill.training import checkpoint, fit, side_by_side

pytestmark = pytest.mark.slow

SPLITS = Splits(corners(64), corners(32, seed=1), corners(32, seed=2), CLASSES, "corners", "0123456789abcdef")
TRAINING = Training(epochs=2, batch_size=16, learning_rate=3e-3)
DATA = Data("corners")


def with_end(model: keras.Model, *end) -> keras.Model:
    """The same layers, and these behind them."""
    x = model.outputs[0]
    for layer in end:
        x = layer(x)
    return keras.Model(model.input, x, name=model.name)


ENDS = {
    "tf.nn.softmax": lambda: [layers.Activation(tf.nn.softmax)],
    "reshape": lambda: [layers.Softmax(), layers.Reshape((4,))],
    "ops": lambda: [keras.ops.softmax],
}


def teacher(*end):
    return with_end(network(filters=6, name="teacher"), *end)


def student(*end):
    return with_end(network(filters=3), *end)


def equal(first: keras.Model, second: keras.Model, tolerance: float):
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=tolerance)


def distilled(student, teacher, folder=None, stored=None):
    distiller = Distiller(student, teacher)
    found = fit.fit(distiller, SPLITS, DATA, TRAINING, 3, checkpoints=folder, say=lambda text: None, stored=stored)
    return student, found


@pytest.mark.exhaustive("ops", "tf.nn.softmax")
@pytest.mark.parametrize("name", ENDS)
def test_runs(name):
    expected, logs = distilled(student(), teacher())
    for models in ((student(), teacher(*ENDS[name]())), (student(*ENDS[name]()), teacher())):
        found, its_logs = distilled(*models)
        equal(found, expected, 2e-4)
        for key in ("kd", "hard", "val_kd"):
            assert its_logs[key] == pytest.approx(logs[key], rel=1e-3)
    assert abs(expected.weights[0].numpy() - student().weights[0].numpy()).max() > 1e-3


@pytest.mark.exhaustive
def test_a_resumed_training_decides_the_same(tmp_path, monkeypatch):
    straight, _ = distilled(student(*ENDS["ops"]()), teacher(*ENDS["tf.nn.softmax"]()))

    class Killed(Exception):
        pass

    saved = checkpoint.Checkpoints.on_epoch_end

    def killed(self, epoch, logs=None):
        saved(self, epoch, logs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "on_epoch_end", killed)
        with pytest.raises(Killed):
            distilled(student(*ENDS["ops"]()), teacher(*ENDS["tf.nn.softmax"]()), tmp_path)
    resumed, _ = distilled(student(*ENDS["ops"]()), teacher(*ENDS["tf.nn.softmax"]()), tmp_path)
    equal(resumed, straight, 0.0)


@pytest.mark.exhaustive
def test_a_teacher_cache_stores_logits(tmp_path):
    images = tf.constant(SPLITS.train.images, tf.float32)
    for name, end in ENDS.items():
        replay = Replay(teacher(*end()), SPLITS, DATA, 16, seed=3, root=tmp_path / name)
        replay.build(1, lambda text: None)
        rows = replay.train.read_rows(0, slice(0, 64)).astype("float64")
        expected = np.asarray(tf.nn.log_softmax(teacher()(images)), np.float64)
        np.testing.assert_allclose(rows - np.log(np.exp(rows).sum(1, keepdims=True)), expected, atol=0.02)  # float16
        stored, _ = distilled(student(), teacher(*end()), stored=replay)
        online, _ = distilled(student(), teacher())
        equal(stored, online, 2e-3)


@pytest.mark.exhaustive
def test_side_by_side():
    def group(*end):
        shared = side_by_side.OncePerBatch(frozen(teacher(*end)))
        members = {str(t): Distiller(student(), shared, temperature=t) for t in (1.0, 4.0)}
        members["soft"] = Distiller(student(layers.Activation(tf.nn.softmax)), shared)
        members = {n: side_by_side.compiled(m, TRAINING, 8) for n, m in members.items()}
        return side_by_side.SideBySide(members, shared)

    groups = [group(), group(layers.Lambda(tf.nn.softmax))]
    for members in groups:
        side_by_side.fit(members, SPLITS, DATA, TRAINING, 3, say=lambda text: None)
    for name in groups[0].members:
        equal(groups[1].members[name].student, groups[0].members[name].student, 2e-4)
    equal(groups[0].members["soft"].student, groups[0].members["4.0"].student, 2e-4)


def test_a_blended_model_is_saved_and_loaded(tmp_path):
    images = SPLITS.train.images.astype("float32")
    other = network(filters=5, name="other")
    blend = blend_models([teacher(*ENDS["tf.nn.softmax"]()), other], [1, 3])
    p, q = (np.asarray(tf.nn.softmax(model(images)), np.float64) for model in (teacher(), other))
    np.testing.assert_allclose(np.exp(blend(images)), 0.25 * p + 0.75 * q, atol=1e-6)
    again = blend_models([teacher(*ENDS["reshape"]()), other], [1, 3])
    again.save(tmp_path / "blend.keras")
    loaded = keras.saving.load_model(tmp_path / "blend.keras")
    np.testing.assert_allclose(np.exp(loaded(images)), 0.25 * p + 0.75 * q, atol=1e-6)
    expected, _ = distilled(student(), blend_models([teacher(), other], [1, 3]))
    equal(distilled(student(), loaded)[0], expected, 2e-4)


@pytest.mark.exhaustive
def test_compression():
    histories = {}
    for name, (its_student, its_teacher) in {
        "logits": (student(), teacher()),
        "teacher": (student(), teacher(*ENDS["tf.nn.softmax"]())),
        "student": (student(*ENDS["reshape"]()), teacher()),
    }.items():
        settings = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "say": lambda text: None}
        result = kdistill.compress(its_student, "prune", its_teacher, SPLITS, **settings)
        histories[name] = result.history["prune"]
    for name in ("teacher", "student"):
        for key in ("kd", "hard", "loss"):
            assert histories[name][key] == pytest.approx(histories["logits"][key], rel=2e-3), (name, key)
