"""`fit`: the recipe's optimizer, resume to the last bit, TensorBoard by the global step, a stop at NaN."""

import dataclasses
import errno
import os

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.data.splits import Examples, Splits
from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import Data, Training
from kdistill.training import callbacks, checkpoint
from kdistill.training import fit as training_fit
from kdistill.training.fit_together import Member, fit_together
from kdistill.training.optimizers import learning_rate, scheduled_optimizer

RNG = np.random.default_rng(5)
DATA = Data(shift=1, flip=True)
TRAINING = Training(epochs=3, batch_size=8, optimizer="sgd", momentum=0.9, learning_rate=0.02, warmup=0.2)


def examples(count):
    return Examples(RNG.integers(0, 256, (count, 8, 8, 1), np.uint8), RNG.integers(0, 3, count).astype("int32"))


SPLITS = Splits(examples(93), examples(20), examples(16), ("a", "b", "c"), "built here", "0" * 16)


def network(seed=0):
    """With dropout, whose seeds must come back too, and batch normalization."""
    keras.utils.set_random_seed(seed)
    layers = [
        keras.layers.Rescaling(1 / 255, name="scale"),
        keras.layers.Conv2D(4, 3, name="conv"),
        keras.layers.BatchNormalization(name="norm"),
        keras.layers.ReLU(name="relu"),
        keras.layers.Dropout(0.3, name="drop"),
        keras.layers.Flatten(name="flat"),
        keras.layers.Dense(3, name="logits"),
    ]
    return keras.Sequential([keras.Input((8, 8, 1)), *layers], name="net")


def distiller():
    weight = keras.optimizers.schedules.CosineDecay(0.9, 30)
    return Distiller(network(1), network(2), distillation_weight=weight)


class Killed(Exception):
    pass


class KillAt(keras.callbacks.Callback):
    def __init__(self, step):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.global_step) >= self.step:
            raise Killed


def fit(model, folder, kill_at=None, monkeypatch=None, training=TRAINING, every=0.0):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", every)
    monkeypatch.setattr(training_fit, "STEPS_PER_EXECUTION", 2)
    if kill_at is not None:
        stop = callbacks.StopWhenNotFinite

        class Both(KillAt, stop):
            def __init__(self):
                KillAt.__init__(self, kill_at)

        # The killer stands where the NaN check stands: before the checkpoint of this very step is written.
        monkeypatch.setattr(callbacks, "StopWhenNotFinite", Both)
        try:
            with pytest.raises(Killed):
                training_fit.fit(model, SPLITS, DATA, training, 4, folder / "logs", folder / "checkpoints")
        finally:
            monkeypatch.setattr(callbacks, "StopWhenNotFinite", stop)
        return None
    return training_fit.fit(model, SPLITS, DATA, training, 4, folder / "logs", folder / "checkpoints")


def steps_written(folder):
    found = {}
    for path in sorted(folder.rglob("events*")):
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            event = callbacks.Event.FromString(record)
            for value in event.summary.value:
                found.setdefault((path.parent.name, value.tag), []).append(event.step)
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A training that is never interrupted, with a checkpoint of every step: the model, the result, the folder."""
    model, folder = distiller(), tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return model, fit(model, folder, monkeypatch=monkeypatch), folder


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


@pytest.mark.slow
def test_resume_ends_with_the_same_bits(straight, tmp_path, monkeypatch):
    """Killed before the first checkpoint, within an epoch, around its end, twice in one epoch, and near the end."""
    model, expected, folder = straight
    for step in (1, 5, 11, 12, 14, 20, 31):
        fit(distiller(), tmp_path, step, monkeypatch)
    resumed = distiller()
    result = fit(resumed, tmp_path, monkeypatch=monkeypatch)
    assert_same_bits(checkpoint.state_of(model), checkpoint.state_of(resumed))
    assert {k: v for k, v in result.items() if k != "seconds"} == {k: v for k, v in expected.items() if k != "seconds"}
    logs = [steps_written(path / "logs") for path in (folder, tmp_path)]
    assert logs[0] == logs[1] and logs[0]["train", "epoch_loss"] == [11, 22, 33]


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(straight, tmp_path, monkeypatch):
    fit(distiller(), tmp_path / "killed", 16, monkeypatch)
    newest = sorted((tmp_path / "killed/checkpoints").glob("step-*"))[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    said, resumed = [], distiller()
    monkeypatch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
    training_fit.fit(
        resumed, SPLITS, DATA, TRAINING, 4, tmp_path / "logs", tmp_path / "killed/checkpoints", said.append
    )
    assert any(newest.name in line and "damaged" in line for line in said)
    assert_same_bits(straight[0].student.weights, resumed.student.weights)
    with pytest.raises(InputError, match="belongs to another model"):
        fit(Supervised(network(1)), tmp_path / "killed", monkeypatch=monkeypatch)


@pytest.mark.slow
def test_checkpoints_are_few_and_hold_no_teacher(straight):
    model, _, folder = straight
    files = list((folder / "checkpoints").iterdir())
    assert len(files) == 2 and all(f.name.startswith("step-") for f in files)
    with np.load(sorted(files)[-1]) as saved:
        count = sum(saved[name].size for name in saved.files if name != "about")
    assert count < 2 * model.student.count_params() + 60  # weights, momenta, counters and metrics


@pytest.mark.slow
def test_with_and_without_checkpoints_the_weights_are_the_same(straight):
    plain = distiller()
    training_fit.fit(plain, SPLITS, DATA, TRAINING, 4)
    for a, b in zip(plain.student.weights, straight[0].student.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)


@pytest.mark.slow
def test_tensorboard_holds_the_names_that_users_look_for(straight):
    tags = {tag for _, tag in steps_written(straight[2] / "logs")}
    for name in ("loss", "hard", "kd", "accuracy", "agreement"):
        assert f"epoch_{name}" in tags
    assert {"learning_rate", "distillation_weight", "temperature", "images_per_second"} <= tags


@pytest.mark.slow
def test_a_loss_that_turns_nan_stops_the_run_and_names_step_and_term():
    wild = dataclasses.replace(TRAINING, learning_rate=1e30, warmup=0.0, schedule="constant")
    with pytest.raises(CheckFailed, match=r"not finite at step \d+ \(term: .*hard.*\)"):
        training_fit.fit(Supervised(network()), SPLITS, DATA, wild, 0)

    def teacher(x):
        return tf.fill((tf.shape(x)[0], 3), float("nan"))

    with pytest.raises(CheckFailed, match=r"step 0 \(term: kd\)"):
        training_fit.fit(Distiller(network(), teacher), SPLITS, DATA, TRAINING, 0)


def test_rates():
    training = Training(learning_rate=0.5, warmup=0.1)
    schedule = learning_rate(training, 100)
    assert [round(float(schedule(s)), 4) for s in (0, 5, 10, 55, 100)] == [0.0, 0.25, 0.5, 0.25, 0.0]
    assert learning_rate(Training(learning_rate=0.5, schedule="constant"), 100) == 0.5
    schedule = learning_rate(dataclasses.replace(training, schedule="constant"), 100)
    assert [float(schedule(s)) for s in (5, 10, 99)] == [0.25, 0.5, 0.5]
    schedule = learning_rate(Training(learning_rate=0.5), 100)
    assert [round(float(schedule(s)), 4) for s in (0, 50, 100)] == [0.5, 0.25, 0.0]


def test_optimizers():
    assert type(scheduled_optimizer(Training(), 10)).__name__ == "Adam"
    decayed = scheduled_optimizer(Training(weight_decay=0.1, learning_rate=0.5, schedule="constant"), 10)
    weight, bias = (keras.Variable([2.0], name=name) for name in ("kernel", "bias"))
    decayed.apply([tf.zeros(1), tf.zeros(1)], [weight, bias])
    # As AdamW: 2 - 0.5 * 0.1 * 2, beside the gradient and not through it; a bias does not decay.
    assert float(weight[0]) == pytest.approx(1.9) and float(bias[0]) == 2.0
    sgd = scheduled_optimizer(TRAINING, 10)
    assert type(sgd).__name__ == "SGD" and sgd.momentum == 0.9


@pytest.mark.slow
def test_steps_are_traced_once_whatever_the_number_of_epochs(tmp_path, monkeypatch):
    """11 steps an epoch, two in a call: the odd one at the end must not cost a trace in each epoch either."""
    traced = {"train": [], "test": []}

    class Counted(Distiller):
        def train_step(self, data):
            traced["train"].append(len(model.history_of_epochs))
            return super().train_step(data)

        def test_step(self, data):
            traced["test"].append(len(model.history_of_epochs))
            return super().test_step(data)

    model = Counted(network(1), network(2))
    model.history_of_epochs = []
    monkeypatch.setattr(
        training_fit.callbacks, "OneEpoch", type("Noted", (callbacks.OneEpoch,), {"on_epoch_end": noted})
    )
    fit(model, tmp_path, monkeypatch=monkeypatch)
    assert model.history_of_epochs == [0, 1, 2]
    for step, epochs in traced.items():
        assert epochs and set(epochs) == {0}, (step, epochs)


def noted(self, epoch, logs=None):
    self.model.history_of_epochs.append(epoch)
    self.model.stop_training = True


@pytest.mark.slow
def test_a_full_disk_loses_nothing(straight, tmp_path, monkeypatch):
    """The third checkpoint does not fit: a message, the two before it whole, no part of it; then it goes on exactly."""
    written, fsync = [], os.fsync

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"Cannot write '.*step-.*npz' .*No space left on device.*--resume"):
        fit(distiller(), tmp_path / "full", monkeypatch=monkeypatch)
    names = [path.name for path in (tmp_path / "full/checkpoints").iterdir()]
    assert len(names) == 2 and all(name.startswith("step-") for name in names)
    monkeypatch.setattr(os, "fsync", fsync)
    resumed = distiller()
    fit(resumed, tmp_path / "full", monkeypatch=monkeypatch)
    assert_same_bits(straight[0].student.weights, resumed.student.weights)


@pytest.mark.slow
def test_a_profile_is_recorded_and_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(training_fit, "STEPS_PER_EXECUTION", 2)
    plain, profiled = Supervised(network()), Supervised(network())
    training_fit.fit(plain, SPLITS, DATA, TRAINING, 4, tmp_path / "plain")
    training_fit.fit(profiled, SPLITS, DATA, TRAINING, 4, tmp_path / "profiled", profile=True)
    assert not list((tmp_path / "plain").rglob("*.xplane.pb"))
    [trace] = (tmp_path / "profiled/profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    for a, b in zip(plain.student.weights, profiled.student.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def normed(momentum, inside=False, **options):
    """A network with batch normalization, which may be inside of another model."""
    norm = keras.layers.BatchNormalization(momentum=momentum, name="norm", **options)
    layers = [keras.layers.Flatten(), norm, keras.layers.Dense(3)]
    if inside:
        layers = [keras.Sequential([keras.Input((4, 4, 1)), *layers])]
    return keras.Sequential([keras.Input((4, 4, 1)), *layers], name="net")


def test_moving_statistics_that_cannot_settle_are_named():
    """0.99^140 = 0.245 and 0.999^140 = 0.869; 0.05 is left of them after 299 and 2,995 steps."""
    images = np.full((2, 4, 4, 1), 3, "float32")
    for momentum, share, needed in ((0.99, "24%", "299"), (0.999, "87%", "2,995")):
        for inside in (False, True):
            warning = training_fit.unsettled_warning(normed(momentum, inside), 140)
            assert f"momentum of {momentum}: after all 140 steps {share} of its moving mean" in warning
            assert (
                warning.endswith(f"Set a momentum of at most 0.978, or train {needed} steps.")
                and "'net' (1 of" in warning
            )
    for momentum, steps in ((0.978, 140), (0.99, 299), (0.999, 2995)):
        assert training_fit.unsettled_warning(normed(momentum), steps) is None
        assert training_fit.unsettled_warning(normed(momentum), steps - 10) is not None
    assert training_fit.unsettled_warning(normed(1.0), 10_000).endswith("Set a momentum of at most 0.999.")
    # What it says is so: the mean of the input is 3, and the share of the start is 0.99^5.
    model = normed(0.99)
    for _ in range(5):
        model(images, training=True)
    np.testing.assert_allclose(model.get_layer("norm").moving_mean, 3 * (1 - 0.99**5), rtol=1e-4)
    assert training_fit.unsettled_warning(model, 10) is None  # trained ones: they start from there
    assert training_fit.unsettled_warning(normed(0.99, trainable=False), 10) is None
    layer = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.LayerNormalization()])
    assert training_fit.unsettled_warning(layer, 1) is None


@pytest.mark.slow
def test_fits_say_that_statistics_cannot_settle(tmp_path):
    """Alone and side by side: 33 steps with the usual momentum of 0.99."""
    said = []
    record = training_fit.fit(Supervised(network()), SPLITS, DATA, TRAINING, 0, say=said.append)
    assert f"Warning: {record['warning']}" in said and "after all 33 steps 72%" in record["warning"]
    members = {name: Member(Supervised(network(seed)), SPLITS, seed) for seed, name in enumerate(("a", "b"))}
    together = fit_together(members, None, DATA, TRAINING, tmp_path / "logs", tmp_path / "points", said.append)
    assert {together[name]["warning"] for name in members} == {record["warning"]}
    assert said.count(f"Warning: {record['warning']}") == 2
