"""The fine-tuning of compression: its loss by hand, schedules, terms, callbacks, and resuming after interruptions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers as L
from support.compressing import QUIET, examples, flat, kernel, network, stage
from tensorboard.compat.proto.event_pb2 import Event

from kdistill.compression import finetune
from kdistill.compression.bridge import to_tf_keras
from kdistill.compression.compress import compress
from kdistill.data.splits import Examples, Splits
from kdistill.distillation import losses
from kdistill.errors import CheckFailed
from kdistill.recipe import Term
from kdistill.recipe.checks import MOST_OF_REALS
from kdistill.teachers.frozen import frozen
from kdistill.tflite.flatbuffer import kernels, parse

pytestmark = pytest.mark.slow


def test_the_teacher_teaches():
    """With weight 1 labels play no part: random ones change nothing, another teacher does."""
    data, student = examples(48), flat()
    wrong = Examples(data.images, np.roll(data.labels, 7))
    other = flat()
    a, b, c = (
        compress(student, stage("prune", learning_rate=1e-2), teacher, training, distillation_weight=1.0, **QUIET)
        for teacher, training in ((student, data), (student, wrong), (other, data))
    )
    np.testing.assert_array_equal(kernel(a, "plain"), kernel(b, "plain"))
    assert np.abs(kernel(a, "plain") - kernel(c, "plain")).max() > 1e-3
    assert a.history["prune"]["loss"] == pytest.approx(a.history["prune"]["kd"])


def test_the_step_mixes_both_losses():
    keras.utils.set_random_seed(0)
    model, teacher = (keras.Sequential([keras.Input((3,)), L.Dense(4)]) for _ in range(2))
    tuned = finetune.FineTuned(to_tf_keras(model), finetune.StudentLoss(frozen(teacher), 0.3, 5.0, False))
    tuned.compile(tf_keras.optimizers.SGD(0.0))
    x, y = tf.random.normal((8, 3)), tf.range(8) % 4
    logs = tuned.train_on_batch(x, y, return_dict=True)
    hard = np.mean(losses.hard_cross_entropy(y, model(x)))
    kd = np.mean(losses.kl_logits(model(x), teacher(x), 5.0))
    assert logs["hard"] == pytest.approx(hard, rel=1e-5) and logs["kd"] == pytest.approx(kd, rel=1e-5)
    assert logs["loss"] == pytest.approx(0.7 * hard + 0.3 * kd, rel=1e-5)
    assert len(tuned.variables) == len(tuned.network.variables) + 2 * 4, "the teacher is not tracked"


@pytest.mark.exhaustive
def test_probabilities_are_trained_as_such():
    model, data = flat("softmax"), examples(48)
    result = compress(model, stage("qat"), model, data, **QUIET)
    expected = -np.mean(np.log(model.predict(data.images.astype("float32"), verbose=0)[np.arange(48), data.labels]))
    assert result.history["qat"]["hard"][0] == pytest.approx(expected, abs=0.4)
    assert result.history["qat"]["kd"][0] < 0.4, "the teacher is the student itself"
    assert b"probabilities" in result.tflite()


def test_examples_without_a_label_count_for_the_teacher_alone():
    """By hand: the labels' loss is the mean over the labeled, the teacher's over all."""
    keras.utils.set_random_seed(0)
    model, teacher = (keras.Sequential([keras.Input((3,)), L.Dense(4)]) for _ in range(2))
    x, y = tf.random.normal((8, 3)), tf.range(8) % 4
    few = tf.where(tf.range(8) < 2, y, -1)
    tuned = finetune.FineTuned(to_tf_keras(model), finetune.StudentLoss(frozen(teacher), 0.3, 5.0, False))
    tuned.compile(tf_keras.optimizers.SGD(0.0))
    for logs in (tuned.test_on_batch(x, few, return_dict=True), tuned.train_on_batch(x, few, return_dict=True)):
        hard = np.mean(losses.hard_cross_entropy(y[:2], model(x[:2])))
        kd = np.mean(losses.kl_logits(model(x), teacher(x), 5.0))
        assert logs["hard"] == pytest.approx(hard, rel=1e-5) and logs["kd"] == pytest.approx(kd, rel=1e-5)
        assert logs["loss"] == pytest.approx(0.7 * hard + 0.3 * kd, rel=1e-5)
        assert logs["accuracy"] == pytest.approx(np.mean(np.argmax(model(x[:2]), -1) == y[:2]))


def test_weight_and_temperature_follow_keras_schedules():
    schedules = keras.optimizers.schedules
    weight, heat = schedules.PolynomialDecay(0.8, 4, 0.2), schedules.PiecewiseConstantDecay([1], [2.0, 6.0])
    images, labels, outputs = tf.zeros((2, 3)), tf.constant([0, 1]), tf.constant([[1.0, 0, 0], [0, 2, 0]])

    def teach(images):
        return tf.constant([[0.0, 1, 0], [3, 0, 0]])

    loss = finetune.StudentLoss(teach, weight, heat, False)
    hard = np.mean(losses.hard_cross_entropy(labels, outputs))
    for step, share, temperature in ((0, 0.8, 2.0), (2, 0.5, 6.0), (9, 0.2, 6.0)):
        parts, _ = loss(images, labels, outputs, tf.constant(step, tf.int64))
        kd = np.mean(losses.kl_logits(outputs, teach(images), temperature))
        assert float(parts["loss"]) == pytest.approx((1 - share) * hard + share * kd, rel=1e-5)


def test_terms_of_logits_are_kept_on():
    heat = keras.optimizers.schedules.PiecewiseConstantDecay([1], [2.0, 6.0])
    terms = {"kd": Term("soft_cross_entropy", options={"temperature": heat}), "near": Term("mse_logits", 0.5)}
    images, labels, outputs = tf.zeros((2, 3)), tf.constant([0, -1]), tf.constant([[1.0, 0, 0], [0, 2, 0]])
    shown = tf.constant([[0.0, 1, 0], [3, 0, 0]])
    loss = finetune.StudentLoss(lambda x: shown, 0.7, 4.0, False, terms)
    parts, counts = loss(images, labels, outputs, tf.constant(5))
    kd = np.mean(losses.soft_cross_entropy(outputs, shown, 6.0))
    near, hard = np.mean([(1 + 1) / 3, (9 + 4) / 3]), np.log(np.e + 2) - 1
    assert float(parts["kd"]) == pytest.approx(kd) and float(parts["near"]) == pytest.approx(near)
    assert float(parts["loss"]) == pytest.approx(0.3 * hard + 0.7 * kd + 0.5 * near)
    assert float(counts["near"]) == 2 and float(counts["hard"]) == 1
    student = flat()
    result = compress(student, stage("prune"), student, examples(24), terms={"near": terms["near"]}, **QUIET)
    assert set(result.history["prune"]) == {"loss", "hard", "kd", "near", "accuracy"}


class Watching(keras.callbacks.Callback):
    """Stops after the second epoch."""

    def on_train_begin(self, logs=None):
        self.logs, self.kernels, self.batches = [], [], 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1

    def on_epoch_end(self, epoch, logs=None):
        self.logs.append(dict(logs))
        self.kernels.append(np.asarray(self.model.get_layer("plain").kernel))
        self.model.stop_training = epoch == 1


def test_callbacks_validation_and_tensorboard(tmp_path):
    watching, data = Watching(), examples(48)
    splits = Splits(data, examples(10, seed=3), data, tuple("abcd"), "here", "0")
    lines, student = [], flat()
    rate = keras.optimizers.schedules.ExponentialDecay(1e-2, 4, 0.5)
    values = stage("cluster", epochs=3, learning_rate=rate, clusters=4)
    result = compress(student, values, student, splits, callbacks=[watching], logs=tmp_path, say=lines.append)
    history = result.history["cluster"]
    assert [len(values) for values in history.values()] == [2] * 8, "stopped by the callback"
    assert [logs["val_hard"] for logs in watching.logs] == pytest.approx(history["val_hard"])
    assert isinstance(watching.model, keras.Model) and watching.batches == 2, "one call for each execution"
    assert len(np.unique(watching.kernels[0])) <= 4 and np.any(watching.kernels[0] != watching.kernels[1])
    np.testing.assert_array_equal(watching.kernels[1], kernel(result, "plain"))
    assert lines[0].startswith("cluster: cluster, epoch 1/3: loss ") and "val_accuracy" in lines[0]
    events = {}
    for name in ("train", "validation"):
        (path,) = (tmp_path / "cluster" / name).glob("events*")
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = Event.FromString(record)
            for value in event.summary.value:
                events.setdefault(f"{name}/{value.tag}", {})[event.step] = float(tf.make_ndarray(value.tensor))
    assert list(events["train/epoch_loss"].values()) == pytest.approx(history["loss"])
    assert list(events["validation/epoch_hard"]) == [2, 4], "global steps"
    assert events["train/learning_rate"] == pytest.approx({2: 1e-2 * 0.5**0.5, 4: 5e-3})


def before_clusters(folder, layer):
    return np.asarray(keras.models.load_model(folder / "1-prune.keras").get_layer(layer).kernel)


@pytest.mark.exhaustive
def test_an_interrupted_compression_ends_with_the_same_weights(tmp_path):
    student, data, pcqat = network(), examples(48), stage("pcqat", clusters=4)
    whole = compress(student, pcqat, student, data, **QUIET)

    def killed_in_the_third(text):
        if "qat, epoch" in text.partition(":")[2]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(student, pcqat, student, data, keep=tmp_path, say=killed_in_the_third)
    assert sorted(path.name for path in tmp_path.glob("*.keras")) == ["1-prune.keras", "2-cluster.keras"]
    before = keras.models.load_model(tmp_path / "2-cluster.keras")
    assert np.mean(np.asarray(before.get_layer("plain").kernel) == 0) == pytest.approx(0.8, abs=0.01)
    lines = []
    resumed = compress(student, pcqat, student, data, keep=tmp_path, say=lines.append)
    assert [line for line in lines if "epoch" in line and "qat, epoch" not in line.partition(":")[2]] == []
    for a, b in zip(whole.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(kernels(parse(whole.tflite())), kernels(parse(resumed.tflite())), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.history == whole.history
    shared = []
    pruned = compress(student, stage("prune"), student, data, keep=tmp_path, say=shared.append)
    assert len(shared) == 1 and shared[0].startswith("prune: prune finished before, 7"), "steps are shared"
    np.testing.assert_array_equal(kernel(pruned, "plain"), before_clusters(tmp_path, "plain"))
    lines.clear()
    with pytest.raises(KeyboardInterrupt):  # other settings: every step is trained again
        compress(student, pcqat, None, data, keep=tmp_path, say=lambda t: lines.append(t) or killed_in_the_third(t))
    assert "to other settings" in lines[0]


def test_a_loss_that_is_not_finite_stops(monkeypatch):
    monkeypatch.setitem(MOST_OF_REALS, "learning_rate", 1e30)
    with pytest.raises(CheckFailed, match="Lower learning_rate"):
        compress(flat(), stage("prune", learning_rate=1e30, epochs=3), None, examples(24), **QUIET)
