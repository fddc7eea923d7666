"""The fine-tuning of compression: its loss by hand, schedules, terms, callbacks, and what an interruption leaves."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers as L
from support.compressing import QUIET, examples, flat, kernel, network
from tensorboard.compat.proto.event_pb2 import Event

from kdistill.compression import finetune
from kdistill.compression.bridge import to_tf_keras
from kdistill.compression.compress import compress
from kdistill.data.splits import Examples, Splits
from kdistill.distillation import losses
from kdistill.errors import CheckFailed
from kdistill.recipe import Term
from kdistill.teachers.frozen import frozen
from kdistill.tflite.flatbuffer import weights_of


def test_the_teacher_teaches():
    """With weight 1 labels play no part: random ones change nothing, another teacher does."""
    data, student = examples(48), flat()
    wrong = Examples(data.images, np.roll(data.labels, 7))
    other = flat()
    options = {
        "epochs": 1,
        "batch_size": 24,
        "learning_rate": 1e-2,
        "distillation_weight": 1.0,
        "say": lambda text: None,
    }
    a, b, c = (
        compress(student, "prune", teacher, given, **options)
        for teacher, given in ((student, data), (student, wrong), (other, data))
    )
    np.testing.assert_array_equal(kernel(a, "plain"), kernel(b, "plain"))
    assert np.abs(kernel(a, "plain") - kernel(c, "plain")).max() > 1e-3
    assert a.history["prune"]["loss"] == pytest.approx(a.history["prune"]["kd"])


def test_the_step_mixes_both_losses():
    keras.utils.set_random_seed(0)
    model, teacher = (keras.Sequential([keras.Input((3,)), L.Dense(4)]) for _ in range(2))
    tuned = finetune.FineTuned(to_tf_keras(model), finetune.loss(frozen(teacher), 0.3, 5.0, False))
    tuned.compile(tf_keras.optimizers.SGD(0.0))
    x, y = tf.random.normal((8, 3)), tf.range(8) % 4
    logs = tuned.train_on_batch(x, y, return_dict=True)
    hard = np.mean(losses.hard_cross_entropy(y, model(x)))
    kd = np.mean(losses.kl_logits(model(x), teacher(x), 5.0))
    assert logs["hard"] == pytest.approx(hard, rel=1e-5) and logs["kd"] == pytest.approx(kd, rel=1e-5)
    assert logs["loss"] == pytest.approx(0.7 * hard + 0.3 * kd, rel=1e-5)
    assert len(tuned.variables) == len(tuned.network.variables) + 2 * 4, "the teacher is not tracked"


def test_probabilities_are_trained_as_such():
    model, data = flat("softmax"), examples(48)
    result = compress(model, "qat", model, data, batch_size=24, say=lambda text: None)
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
    tuned = finetune.FineTuned(to_tf_keras(model), finetune.loss(frozen(teacher), 0.3, 5.0, False))
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

    parts_of = finetune.loss(teach, weight, heat, False)
    hard = np.mean(losses.hard_cross_entropy(labels, outputs))
    for step, share, temperature in ((0, 0.8, 2.0), (2, 0.5, 6.0), (9, 0.2, 6.0)):
        parts, _ = parts_of(images, labels, outputs, tf.constant(step, tf.int64))
        kd = np.mean(losses.kl_logits(outputs, teach(images), temperature))
        assert float(parts["loss"]) == pytest.approx((1 - share) * hard + share * kd, rel=1e-5)


def test_terms_of_logits_are_kept_on():
    heat = keras.optimizers.schedules.PiecewiseConstantDecay([1], [2.0, 6.0])
    terms = {"kd": Term("soft_cross_entropy", options={"temperature": heat}), "near": Term("mse_logits", 0.5)}
    images, labels, outputs = tf.zeros((2, 3)), tf.constant([0, -1]), tf.constant([[1.0, 0, 0], [0, 2, 0]])
    shown = tf.constant([[0.0, 1, 0], [3, 0, 0]])
    parts, counts = finetune.loss(lambda x: shown, 0.7, 4.0, False, terms)(images, labels, outputs, tf.constant(5))
    kd = np.mean(losses.soft_cross_entropy(outputs, shown, 6.0))
    near, hard = np.mean([(1 + 1) / 3, (9 + 4) / 3]), np.log(np.e + 2) - 1
    assert float(parts["kd"]) == pytest.approx(kd) and float(parts["near"]) == pytest.approx(near)
    assert float(parts["loss"]) == pytest.approx(0.3 * hard + 0.7 * kd + 0.5 * near)
    assert float(counts["near"]) == 2 and float(counts["hard"]) == 1
    student = flat()
    result = compress(student, "prune", student, examples(24), terms={"near": terms["near"]}, **QUIET)
    assert set(result.history["prune"]) == {"loss", "hard", "kd", "near", "accuracy"}


class Watching(keras.callbacks.Callback):
    """Stops after the second epoch."""

    def on_train_begin(self, logs=None):
        self.seen, self.kernels, self.batches = [], [], 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(dict(logs))
        self.kernels.append(np.asarray(self.model.get_layer("plain").kernel))
        self.model.stop_training = epoch == 1


def test_callbacks_validation_and_tensorboard(tmp_path):
    watching, data = Watching(), examples(48)
    splits = Splits(data, examples(10, seed=3), data, tuple("abcd"), "here", "0")
    told, student = [], flat()
    options = {"epochs": 3, "learning_rate": keras.optimizers.schedules.ExponentialDecay(1e-2, 4, 0.5)}
    options |= {"callbacks": [watching], "logs": tmp_path, "batch_size": 24, "say": told.append}
    result = compress(student, "cluster", student, splits, clusters=4, **options)
    history = result.history["cluster"]
    assert [len(values) for values in history.values()] == [2] * 8, "stopped by the callback"
    assert [logs["val_hard"] for logs in watching.seen] == pytest.approx(history["val_hard"])
    assert isinstance(watching.model, keras.Model) and watching.batches == 2, "one call for each execution"
    assert len(np.unique(watching.kernels[0])) <= 4 and np.any(watching.kernels[0] != watching.kernels[1])
    np.testing.assert_array_equal(watching.kernels[1], kernel(result, "plain"))
    assert told[0].startswith("cluster: cluster, epoch 1/3: loss ") and "val_accuracy" in told[0]
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


def test_an_interrupted_compression_ends_with_the_same_weights(tmp_path):
    student, data = network(), examples(48)
    whole = compress(student, "pcqat", student, data, clusters=4, **QUIET)

    def killed_in_the_third(text):
        if "qat, epoch" in text.partition(":")[2]:
            raise KeyboardInterrupt

    options = {"batch_size": 24, "clusters": 4, "keep": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compress(student, "pcqat", student, data, **options, say=killed_in_the_third)
    assert sorted(path.name for path in tmp_path.glob("*.keras")) == ["1-prune.keras", "2-cluster.keras"]
    before = keras.models.load_model(tmp_path / "2-cluster.keras")
    assert np.mean(np.asarray(before.get_layer("plain").kernel) == 0) == pytest.approx(0.8, abs=0.01)
    told = []
    resumed = compress(student, "pcqat", student, data, **options, say=told.append)
    assert [line for line in told if "epoch" in line and "qat, epoch" not in line.partition(":")[2]] == []
    for a, b in zip(whole.model.get_weights(), resumed.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(weights_of(whole.tflite()), weights_of(resumed.tflite()), strict=True):
        np.testing.assert_array_equal(a, b)
    assert resumed.history == whole.history
    shared = []
    pruned = compress(student, "prune", student, data, batch_size=24, keep=tmp_path, say=shared.append)
    assert len(shared) == 1 and shared[0].startswith("prune: prune finished before, 7"), "stages are shared"
    np.testing.assert_array_equal(kernel(pruned, "plain"), before_clusters(tmp_path, "plain"))
    told.clear()
    with pytest.raises(KeyboardInterrupt):  # other settings: nothing is taken over
        compress(student, "pcqat", None, data, **options, say=lambda t: told.append(t) or killed_in_the_third(t))
    assert "of other settings" in told[0]


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(CheckFailed, match="Lower learning_rate"):
        compress(flat(), "prune", None, examples(24), learning_rate=1e30, epochs=3, say=lambda text: None)
