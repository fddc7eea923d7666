"""The same global batch reaches the same weights on one device, on replicas, and on several workers."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation.distiller import Distiller
from kdistill.errors import InputError
from kdistill.recipe import Term
from kdistill.training import optimizers, strategy

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(3)
X = RNG.normal(size=(108, 6)).astype("float32")
Y = RNG.integers(0, 4, 108).astype("int32")


@pytest.fixture(scope="module")
def mirrored_strategy():
    """Two replicas on two logical CPUs, which conftest.py makes before TensorFlow starts."""
    assert len(tf.config.list_logical_devices("CPU")) == 2, "conftest.py makes two logical CPUs"
    return strategy.choose_devices("mirrored").strategy


def distiller(policy=None, **options):
    keras.utils.set_random_seed(1)
    student = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, kernel_regularizer=keras.regularizers.L2(0.01)),
            keras.layers.BatchNormalization(synchronized=True, momentum=0.8),
            keras.layers.Activation("tanh"),
            keras.layers.Dense(4),
        ]
    )
    teacher = keras.Sequential([keras.Input((6,)), keras.layers.Dense(9, activation="tanh"), keras.layers.Dense(4)])
    made = Distiller(student, teacher, dtype=policy) if policy else Distiller(student, teacher)
    made.compile(keras.optimizers.SGD(0.1, momentum=0.9), **options)
    return made


def batches(size=16, count=None):
    data = tf.data.Dataset.from_tensor_slices((X[:count], Y[:count])).batch(size)
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return data.with_options(options)


def weights(model):
    return [v.numpy() for v in model.student.weights]


def close(first, second, tolerance=1e-6):
    for a, b in zip(first, second, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


@pytest.mark.exhaustive("18-108", "20-108", "21-100")
@pytest.mark.parametrize("size,count", [(20, 100), (20, 108), (18, 108), (21, 100)])
def test_mirrored_equals_one_device_also_with_an_uneven_last_batch(mirrored_strategy, size, count):
    """4 epochs of 5 or 6 steps: 20 SGD steps and more. 8 after 20 is uneven in time, 21 among the replicas."""
    plain = distiller()
    expected = plain.fit(batches(size, count), epochs=4, shuffle=False, verbose=0).history
    with mirrored_strategy.scope():
        mirrored = distiller()
    found = mirrored.fit(batches(size, count), epochs=4, shuffle=False, verbose=0).history
    assert int(mirrored.global_step.numpy()) >= 20
    close(weights(plain), weights(mirrored))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)
    first, second = (m.evaluate(batches(18), verbose=0, return_dict=True) for m in (plain, mirrored))
    assert first == pytest.approx(second, abs=1e-5)


def test_a_worker_s_own_part_is_split_among_its_replicas(mirrored_strategy):
    """An element for each replica: 20 SGD steps on them are those on whole batches."""
    plain = distiller()
    plain.fit(batches(20, 100), epochs=4, shuffle=False, verbose=0)
    with mirrored_strategy.scope():
        mirrored = distiller()
    devices = strategy.Devices("mirrored", mirrored_strategy)
    for _ in range(4):
        mine = devices.parts(batches(20, 100).unbatch().batch(20, drop_remainder=True))
        mirrored.fit(mine, steps_per_epoch=5, shuffle=False, verbose=0)
    assert int(mirrored.global_step.numpy()) == 20
    close(weights(plain), weights(mirrored))


def test_who_makes_which_part_of_a_batch():
    class Four:
        num_replicas_in_sync = 4

    two = strategy.Devices("multiworker", Four(), worker=1, workers=2)
    assert two.part(12) == (1, 2) and two.part(14) == (0, 1)  # replicas of unequal parts get them from TensorFlow
    assert strategy.Devices("multiworker", Four(), worker=3, workers=4).part(15) == (3, 4)
    assert strategy.Devices("mirrored", Four()).part(12) == strategy.SINGLE_DEVICE.part(12) == (0, 1)


@pytest.mark.exhaustive
def test_mirrored_equals_one_device_where_replicas_have_other_shares_of_labels(mirrored_strategy):
    def partly_labeled():
        few = np.where(np.arange(100) % 20 < 10, Y[:100], np.where(np.arange(100) % 5 == 0, Y[:100], -1))
        return tf.data.Dataset.from_tensor_slices((X[:100], few.astype("int32"))).batch(20)

    plain = distiller()
    expected = plain.fit(partly_labeled(), epochs=3, shuffle=False, verbose=0).history
    with mirrored_strategy.scope():
        mirrored = distiller()
    found = mirrored.fit(partly_labeled(), epochs=3, shuffle=False, verbose=0).history
    close(weights(plain), weights(mirrored))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


@pytest.mark.exhaustive
def test_terms_with_a_projector_reach_the_same_weights_on_replicas(mirrored_strategy):
    """Of each example; a method over the batch compares a replica's own examples, see docs/methods.md."""

    def with_terms():
        keras.utils.set_random_seed(4)
        student, teacher = (
            keras.Sequential([keras.Input((6,)), keras.layers.Dense(n, "tanh", name="in"), keras.layers.Dense(4)])
            for n in (5, 9)
        )
        hint = Term("hint", 2.0, student_tap="in", teacher_tap="in", projector="dense")
        terms = {"hint": hint, "dkd": Term("dkd", 0.1), "cosine": Term("cosine")}
        made = Distiller(student, teacher, terms=terms)
        made.compile(keras.optimizers.SGD(0.1, momentum=0.9))
        return made

    plain = with_terms()
    expected = plain.fit(batches(20, 100), epochs=2, shuffle=False, verbose=0).history
    with mirrored_strategy.scope():
        mirrored = with_terms()
    found = mirrored.fit(batches(20, 100), epochs=2, shuffle=False, verbose=0).history
    assert len(mirrored.trainable_variables) == 6
    for a, b in zip(plain.trainable_variables, mirrored.trainable_variables, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("broken_replica", [0, 1])
def test_an_overflow_on_either_replica_skips_the_step_on_all(mirrored_strategy, broken_replica):
    with mirrored_strategy.scope():
        model = distiller("mixed_float16")
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    before = [v.numpy() for v in model.student.trainable_weights]
    x = X[:16].copy()
    x[8 * broken_replica] = np.inf
    data = tf.data.Dataset.from_tensor_slices((x, Y[:16])).batch(16)
    model.fit(data, verbose=0)
    close(before, [v.numpy() for v in model.student.trainable_weights], 0)
    assert int(model.global_step.numpy()) == 1 and int(model.optimizer.iterations.numpy()) == 0


def test_loss_scaled_float16_reaches_the_same_weights_on_two_replicas(mirrored_strategy):
    """Three steps; rounded to 11 bits, each replica's sums differ by some 1e-3 of a gradient, times a rate of 0.1."""
    plain = distiller("mixed_float16")
    before = weights(plain)
    plain.fit(batches(16, 48), epochs=1, shuffle=False, verbose=0)
    with mirrored_strategy.scope():
        mirrored = distiller("mixed_float16")
    mirrored.fit(batches(16, 48), epochs=1, shuffle=False, verbose=0)
    for model in (plain, mirrored):
        assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert int(model.optimizer.iterations.numpy()) == int(model.global_step.numpy()) == 3  # none was skipped
    close(weights(plain), weights(mirrored), 2e-4)
    assert max(np.abs(a - b).max() for a, b in zip(before, weights(plain), strict=True)) > 0.05


def test_what_crashes_on_replicas_is_refused_by_name(mirrored_strategy):
    with mirrored_strategy.scope():
        first, second = distiller(steps_per_execution=2), distiller(jit_compile=True)
        third = distiller(metrics=["sparse_categorical_accuracy"])
    for model, message in ((first, "steps_per_execution=2"), (second, "jit_compile=True"), (third, "metrics=")):
        with pytest.raises(InputError, match=message):
            model.fit(batches(), verbose=0)


def test_fused_optimizers_on_replicas_go_the_way_of_keras(mirrored_strategy):
    with mirrored_strategy.scope():
        made, variables = optimizers.SGD(0.5), [keras.Variable(np.ones(3), dtype="float32")]
        made.build(variables)

    @tf.function
    def step():
        mirrored_strategy.run(lambda: made.apply([tf.ones(3)], variables))

    step()
    np.testing.assert_allclose(variables[0].numpy(), np.zeros(3))  # both replicas' gradients are summed


WORKER = """
import json, os, sys
import numpy as np, tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
sys.path.insert(0, os.environ["TESTS"])
import test_strategies_equal as t
with strategy.scope():
    model = t.distiller()
history = model.fit(t.batches(20, 100), epochs=4, shuffle=False, verbose=0, steps_per_epoch=5).history
logs = model.evaluate(t.batches(18), verbose=0, return_dict=True, steps=6)
model.predict(t.X[:8], verbose=0)
np.savez(os.environ["RESULT"], *t.weights(model), logs=json.dumps([history, logs]))
"""


def test_two_workers_equal_one_device(tmp_path):
    def free_port():
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            return probe.getsockname()[1]

    cluster = {"worker": [f"localhost:{free_port()}" for _ in range(2)]}
    workers = []
    for index in range(2):
        config = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
        own = {"TF_CONFIG": config, "RESULT": str(tmp_path / f"{index}.npz"), "TESTS": str(Path(__file__).parent)}
        workers.append(subprocess.Popen([sys.executable, "-c", WORKER], env={**os.environ, **own}))
    plain = distiller()
    expected = plain.fit(batches(20, 100), epochs=4, shuffle=False, verbose=0).history
    logs = plain.evaluate(batches(18), verbose=0, return_dict=True)
    assert [worker.wait(120) for worker in workers] == [0, 0]
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as saved:
            close(weights(plain), [saved[f"arr_{i}"] for i in range(len(weights(plain)))])
            history, evaluated = json.loads(str(saved["logs"]))
        for name in expected:
            np.testing.assert_allclose(history[name], expected[name], atol=1e-5, err_msg=name)
        assert evaluated == pytest.approx(logs, abs=1e-5)
