"""Students side by side are the students of single runs; the teacher runs once; resume is exact."""

import dataclasses
import itertools

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.data.splits import Examples
from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.networks import architectures
from kdistill.recipe import Data, Network, Training
from kdistill.training import checkpoint, side_by_side
from kdistill.training.fit import fit
from kdistill.training.side_by_side import OncePerBatch, SideBySide

pytestmark = pytest.mark.slow

DATA = Data(shift=1)
SGD = Training(epochs=2, batch_size=32, optimizer="sgd", learning_rate=0.05, momentum=0.9, warmup=0.1)
SMALL = Network("lenet", {"filters": (4, 6), "units": 16})  # with dropout
NORMED = Network("small_cnn", {"widths": (4, 6)})
# Settings that differ in everything that may differ.
STUDENTS = {
    "control": (SMALL, SGD, None),
    "half": (SMALL, SGD, (0.5, 4.0)),
    "slow": (SMALL, dataclasses.replace(SGD, learning_rate=0.01), (0.9, 1.0)),
    "normed": (NORMED, SGD, (1.0, 8.0)),
    "adam": (NORMED, Training(epochs=2, batch_size=32, learning_rate=1e-3), (0.7, 2.0)),
}


def network(spec: Network) -> keras.Model:
    keras.utils.set_random_seed(3)
    return architectures.build(spec, (28, 28, 1), 10)


def member(name: str, teacher) -> Supervised:
    spec, _, loss = STUDENTS[name]
    if loss is None:
        return Supervised(network(spec))
    return Distiller(network(spec), teacher, distillation_weight=loss[0], temperature=loss[1])


@pytest.fixture(scope="module")
def teacher() -> keras.Model:
    keras.utils.set_random_seed(9)
    return architectures.build(Network("lenet", {"filters": (5, 5), "units": 20}), (28, 28, 1), 10)


def group(teacher, names=tuple(STUDENTS)) -> SideBySide:
    shown = OncePerBatch(lambda images: teacher(images, training=False))
    made = {name: side_by_side.compiled(member(name, shown), STUDENTS[name][1], 16) for name in names}
    return SideBySide(made, shown)


@pytest.fixture(scope="module")
def together(teacher, digits):
    made = group(teacher)
    return made, side_by_side.fit(made, digits, DATA, SGD, seed=5, say=lambda text: None)


@pytest.mark.exhaustive("adam", "control", "normed", "slow")
@pytest.mark.parametrize("name", STUDENTS)
def test_each_student_is_that_of_its_single_run(together, teacher, digits, name):
    alone = member(name, teacher)
    fit(alone, digits, DATA, STUDENTS[name][1], 5, say=lambda text: None)
    start = network(STUDENTS[name][0])
    for a, b, before in zip(
        alone.student.weights, together[0].members[name].student.weights, start.weights, strict=True
    ):
        np.testing.assert_array_equal(b.numpy(), a.numpy(), err_msg=a.path)
        assert "seed" in a.path or np.abs(a.numpy() - before.numpy()).max() > 1e-4, a.path


def test_the_teacher_runs_once_per_batch_for_all(digits):
    batches = [(digits.train.images[:8].astype("float32"), digits.train.labels[:8])] * 3
    runs = []

    def run(images):
        runs.append(np.array_equal(images, batches[0][0]))  # the first look runs on noise, while a step is traced
        return tf.zeros((len(images), 10))

    shown = OncePerBatch(lambda images: tf.reshape(tf.py_function(run, [images], tf.float32), (-1, 10)))
    names = [name for name, (_, _, loss) in STUDENTS.items() if loss]
    made = SideBySide({n: side_by_side.compiled(member(n, shown), STUDENTS[n][1], 16) for n in names}, shown)
    signature = (tf.TensorSpec((8, 28, 28, 1)), tf.TensorSpec((8,), tf.int32))
    made.advance(iter(tf.data.Dataset.from_generator(lambda: batches, output_signature=signature)), 3)
    assert sum(runs) == 3 and len(names) == 4


def test_curves_and_predictions(together, digits):
    made, fitted = together
    curve = fitted["curves"]["half"]
    assert curve["step"] == list(range(1, 17)) and fitted["steps"] == 16
    assert all(len(curve[key]) == 16 for key in ("validation", "loss", "hard", "kd", "accuracy"))
    assert set(fitted["curves"]["control"]) == {"step", "validation", "loss", "hard", "accuracy"}
    # The first look: the mean over step 1 alone, of a new network: the cross-entropy of no idea.
    assert fitted["curves"]["control"]["hard"][0] == pytest.approx(np.log(10), abs=0.35)
    outputs = made.predict(digits.test.images, batch_size=100)
    for name in STUDENTS:
        expected = made.members[name].student(digits.test.images.astype("float32"), training=False)
        np.testing.assert_allclose(outputs[name], expected, atol=1e-4)


@pytest.mark.exhaustive
def test_a_group_that_was_stopped_goes_on_exactly(together, teacher, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    stopped = group(teacher)
    original = stopped.advance

    def until_11(iterator, steps):
        if int(stopped.global_step.numpy()) == 11:
            raise KeyboardInterrupt
        return original(iterator, steps)

    stopped.advance = until_11
    with pytest.raises(KeyboardInterrupt):
        side_by_side.fit(stopped, digits, DATA, SGD, 5, tmp_path, say=lambda text: None)
    resumed, said = group(teacher), []
    fitted = side_by_side.fit(resumed, digits, DATA, SGD, 5, tmp_path, say=said.append)
    assert "Resuming at step 11 of 16" in said
    for name in STUDENTS:
        first, second = together[0].members[name], resumed.members[name]
        for a, b in zip(first.student.weights, second.student.weights, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=f"{name} {a.path}")
    assert fitted["curves"] == together[1]["curves"]


def test_a_diverging_student_is_named_and_leaves_the_others_alone(together, teacher, digits):
    made = group(teacher, ("control",))
    wild = Supervised(network(SMALL))
    made.members["wild"] = side_by_side.compiled(wild, dataclasses.replace(SGD, learning_rate=1e30), 16)
    said = []
    fitted = side_by_side.fit(SideBySide(made.members), digits, DATA, SGD, 5, say=said.append)
    assert len([text for text in said if text.startswith("wild: the loss is not finite from step")]) == 1
    assert fitted["curves"]["wild"]["loss"][-1] is None and SideBySide(made.members).broken().keys() == {"wild"}
    for a, b in zip(
        together[0].members["control"].student.weights, made.members["control"].student.weights, strict=True
    ):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-6)


def test_memory_by_hand(monkeypatch):
    assert side_by_side.free_memory() > 1 << 20
    keras.utils.set_random_seed(0)
    image = keras.Input((4, 4, 1))
    plain = keras.Model(image, keras.layers.Dense(3)(keras.layers.Flatten()(image)))  # 16 * 3 + 3 = 51 weights
    found = Supervised(plain)
    side_by_side.compiled(found, Training(), 10)
    need = side_by_side.memory({"one": found}, batch_size=2)
    # Weights, gradients and Adam's two slots; iteration and learning rate, step and two marks, metrics' sums apart.
    assert 4 * 51 * 4 <= need["state"] <= 4 * 51 * 4 + 200
    assert need["activations"] == 2 * 4 * 2 * (16 + 16 + 3)  # input, flat, dense
    # Half of the free memory, at least one model.
    for free, models in ((6 * sum(need.values()), 3), (10, 1)):
        monkeypatch.setattr(side_by_side, "free_memory", lambda free=free: free)
        assert side_by_side.models_that_fit({"one": found}, batch_size=2) == models


def test_looks_cover_the_first_1000_steps_and_every_epoch():
    found = side_by_side.measured_steps(421, 12)
    assert found[:19] == [*range(50, 421, 50), 421, *range(450, 842, 50), 842, 850]
    assert all(421 * epoch in found for epoch in range(1, 13)) and found[-1] == 421 * 12
    far = side_by_side.measured_steps(54000, 1)
    assert max(b - a for a, b in itertools.pairwise(far)) <= 500
    assert side_by_side.measured_steps(3, 2) == [1, 2, 3, 4, 5, 6]


def test_an_empty_tail_is_no_batch(teacher, digits):
    """A batch larger than the data is the data, as in a single run."""
    few = dataclasses.replace(digits, train=Examples(digits.train.images[:20], digits.train.labels[:20]))
    fitted = side_by_side.fit(group(teacher, ("half",)), few, DATA, SGD, 0, say=lambda text: None)
    assert fitted["steps"] == 2
