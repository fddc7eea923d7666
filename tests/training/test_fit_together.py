"""Models of several seeds in one step are those of their own fits, bit by bit; architectures share a trace."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.data.splits import Examples, Splits
from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.distillation.terms import in_steps
from kdistill.errors import CheckFailed
from kdistill.networks import architectures
from kdistill.recipe import Data, Network, Schedule, Term, Training
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.frozen import frozen
from kdistill.teachers.replay import Replay
from kdistill.training import checkpoint, side_by_side
from kdistill.training.fit import fit
from kdistill.training.fit_together import Member, fit_together
from kdistill.training.shared_step import signature
from kdistill.training.side_by_side import OncePerBatch, SideBySide

pytestmark = pytest.mark.slow

DATA = Data(shift=1, flip=True)
ADAM = Training(epochs=2, batch_size=16, learning_rate=1e-2, warmup=0.2, weight_decay=1e-2)
NORMED, DROPPED = Network("small_cnn", {"widths": (4, 6)}), Network("lenet", {"filters": (3, 4), "units": 8})
TAP = {"hint": Term("hint", 0.1, student_tap="norm2", teacher_tap="norm2", projector="conv1x1")}


def quiet(text: str) -> None:
    pass


def examples(count: int, seed: int) -> Examples:
    random = np.random.default_rng(seed)
    labels = random.integers(0, 3, count).astype(np.int32)
    images = random.integers(0, 80, (count, 16, 16, 1)) + 80 * labels[:, None, None, None]
    return Examples(images.astype(np.uint8), labels)


SPLITS = Splits(examples(84, 0), examples(20, 1), examples(20, 2), ("a", "b", "c"), "random", "0123456789abcdef")
OTHER = dataclasses.replace(SPLITS, train=examples(84, 5))  # as the labeled images of a control


def network(spec: Network, seed: int) -> keras.Model:
    keras.utils.set_random_seed(seed)
    return architectures.build(spec, (16, 16, 1), 3)


@pytest.fixture(scope="module")
def teacher() -> keras.Model:
    return network(Network("small_cnn", {"widths": (5, 7)}), 9)


# By name: the network, the settings of a Distiller (None: a control), the seed, the data.
MEMBERS = {
    "control": (DROPPED, None, 0, OTHER),
    "student": (DROPPED, {"temperature": 2.0}, 0, SPLITS),
    "control-1": (DROPPED, None, 1, OTHER),
    "student-1": (DROPPED, {"temperature": 2.0}, 1, SPLITS),
    "normed": (NORMED, {"distillation_weight": in_steps(Schedule(0.9, 0.1, begin=0.3), 10)}, 2, SPLITS),
    "tapped": (NORMED, {"terms": TAP}, 2, SPLITS),
}


def model(name: str, teacher) -> Supervised:
    spec, settings, seed, _ = MEMBERS[name]
    return Supervised(network(spec, seed)) if settings is None else Distiller(network(spec, seed), teacher, **settings)


def members(teacher, names=tuple(MEMBERS), **options) -> tuple[dict[str, Member], OncePerBatch]:
    once = OncePerBatch(frozen(teacher, taps={"norm2": "hint"} if "tapped" in names else None))
    shown = Adapted(once, outputs="logits")
    return {name: Member(model(name, shown), MEMBERS[name][3], MEMBERS[name][2], **options) for name in names}, once


def equal(one: keras.Model, other: keras.Model) -> None:
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


@pytest.fixture(scope="module")
def together(teacher, tmp_path_factory):
    group, once = members(teacher)
    folder = tmp_path_factory.mktemp("together")
    return group, fit_together(group, once, DATA, ADAM, folder / "logs", folder / "checkpoints", quiet), folder


@pytest.mark.exhaustive("control", "normed", "student", "tapped")
@pytest.mark.parametrize("name", MEMBERS)
def test_each_model_is_that_of_its_own_fit(together, teacher, name, tmp_path):
    group, records, folder = together
    alone, (_, _, seed, splits) = model(name, teacher), MEMBERS[name]
    record = fit(alone, splits, DATA, ADAM, seed, tmp_path, say=quiet)
    assert records[name]["together"] == 6 and records[name]["steps"] == record["steps"] == 10
    if name == "tapped":  # in its own fit, TensorFlow merges the teacher's last operations with those of the term
        for a, b in zip(group[name].model.student.weights, alone.student.weights, strict=True):
            np.testing.assert_allclose(a.numpy(), b.numpy(), atol=1e-5, err_msg=a.path)
        return
    equal(group[name].model.student, alone.student)
    assert {k: v for k, v in records[name].items() if k not in ("seconds", "together")} == {
        k: v for k, v in record.items() if k != "seconds"
    }

    def scalars(path) -> dict:
        events = {}
        for file in sorted(path.rglob("events.out.tfevents.*")):
            for event in tf.compat.v1.train.summary_iterator(str(file)):
                for value in event.summary.value:
                    if value.tag != "images_per_second":
                        events[file.parent.name, value.tag, event.step] = value.tensor.SerializeToString()
        return events

    assert scalars(folder / "logs" / name) == scalars(tmp_path) != {}


@pytest.mark.exhaustive
def test_stored_logits_take_the_place_of_the_teacher(teacher, tmp_path):
    """Two seeds with caches of their own; the control of a seed reads the batches of its student."""
    stored = {seed: Replay(teacher, SPLITS, DATA, 16, seed, tmp_path / "cache") for seed in (0, 1)}
    for replay in stored.values():
        replay.build(1, quiet)
    views = {"repeat": 1}

    def fail(images):
        raise AssertionError("the teacher runs")

    once = OncePerBatch(fail)
    group = {
        name: Member(
            model(name, Adapted(once, outputs="logits")), SPLITS, MEMBERS[name][2], 1, stored[MEMBERS[name][2]]
        )
        for name in ("student", "student-1")
    }
    group["control"] = Member(model("control", None), SPLITS, 0, 1)
    fit_together(group, once, DATA, ADAM, tmp_path / "logs", tmp_path / "checkpoints", quiet)
    for name, member in group.items():
        alone = model(name, teacher)
        fit(alone, SPLITS, DATA, ADAM, member.seed, say=quiet, stored=member.stored, **views)
        equal(member.model.student, alone.student)


@pytest.mark.exhaustive
@pytest.mark.parametrize("steps", [3, 5])
def test_stopped_inside_and_between_epochs_they_go_on_with_the_same_bits(
    together, teacher, steps, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr("kdistill.training.fit_together.STEPS_PER_EXECUTION", 1)
    names, train = ("control", "student-1", "normed"), SideBySide.train

    def until(group, iterator, count):
        if int(group.global_step.numpy()) == steps:
            raise KeyboardInterrupt
        train(group, iterator, count)

    places = DATA, ADAM, tmp_path / "logs", tmp_path / "checkpoints"
    monkeypatch.setattr(SideBySide, "train", until)
    with pytest.raises(KeyboardInterrupt):
        fit_together(*members(teacher, names), *places, quiet)
    monkeypatch.setattr(SideBySide, "train", train)
    (group, once), said = members(teacher, names), []
    records = fit_together(group, once, *places, said.append)
    assert f"Resuming at step {steps} of 10" in said
    for name in names:
        equal(group[name].model.student, together[0][name].model.student)
        assert records[name]["history"] == together[1][name]["history"]


def test_a_loss_that_is_not_finite_names_its_model(teacher, tmp_path):
    group, once = members(teacher, ("control", "control-1"))
    group["control-1"].model.student.layers[-1].bias.assign([float("inf"), 0, 0])
    with pytest.raises(CheckFailed, match=r"control-1: The loss is not finite at step 0 \(term: hard\)"):
        fit_together(group, once, DATA, ADAM, tmp_path / "logs", tmp_path / "checkpoints", quiet)


def test_students_of_one_architecture_share_a_trace(teacher):
    once = OncePerBatch(frozen(teacher))
    shown = Adapted(once, outputs="logits")

    def distiller(seed: int = 0, spec: Network = NORMED, rate: float = 0.1, **settings) -> Supervised:
        training = dataclasses.replace(ADAM, learning_rate=rate, schedule="constant", warmup=0.0)
        return side_by_side.compiled(Distiller(network(spec, seed), shown, **settings), training, 10)

    one = distiller()
    same = [distiller(1), distiller(temperature=8.0), distiller(distillation_weight=0.1), distiller(rate=0.3)]
    late = in_steps(Schedule(0.9, 0.1), 10)
    others = [
        distiller(spec=Network("small_cnn", {"widths": (4, 7)})),
        distiller(distillation_weight=late),
        distiller(terms={"more": Term("mse_logits", 0.1)}),
        distiller(terms={"kd": Term("soft_cross_entropy", options={"temperature": 2.0})}),
        side_by_side.compiled(Distiller(network(NORMED, 0), shown), ADAM, 10),  # the rate has a schedule
        side_by_side.compiled(Supervised(network(NORMED, 0)), ADAM, 10),
    ]
    frozen_layer = network(NORMED, 0)
    frozen_layer.layers[2].trainable = False
    others.append(side_by_side.compiled(Distiller(frozen_layer, shown), ADAM, 10))
    assert {signature(student) for student in same} == {signature(one)}
    assert len({signature(student) for student in [one, *others]}) == len(others) + 1

    group = SideBySide({str(place): student for place, student in enumerate([one, *same])}, once)
    batch = SPLITS.train.images[:16].astype("float32"), SPLITS.train.labels[:16]
    group.advance(iter(tf.data.Dataset.from_tensors(batch).repeat(2)), 2)
    assert group._train.traces == 1
    first, second = one.student.get_weights()[0], distiller().student.get_weights()[0]
    assert np.abs(first - second).max() > 1e-3
    for student in same:  # each has trained its own weights, with its own settings
        assert np.abs(student.student.get_weights()[0] - first).max() > 1e-4


def test_a_step_with_a_variable_that_is_no_state_is_traced_for_each():
    """A layer that hides a variable from Keras: the trace of one student would use it for the other."""

    class Hidden(keras.layers.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.holder = lambda: None
            self.holder.factor = tf.Variable(1.0)

        def call(self, inputs):
            return inputs * self.holder.factor

    def student(factor: float) -> Supervised:
        keras.utils.set_random_seed(0)
        image = keras.Input((16, 16, 1))
        hidden = Hidden()
        hidden.holder.factor.assign(factor)
        scores = keras.layers.Dense(3)(hidden(keras.layers.Rescaling(1 / 255)(keras.layers.Flatten()(image))))
        return side_by_side.compiled(Supervised(keras.Model(image, scores)), ADAM, 10)

    group = SideBySide({str(factor): student(factor) for factor in (1.0, 3.0)})
    batch = SPLITS.train.images[:16].astype("float32"), SPLITS.train.labels[:16]
    group.advance(iter(tf.data.Dataset.from_tensors(batch).repeat(2)), 2)
    alone = SideBySide({"3.0": student(3.0)})
    alone.advance(iter(tf.data.Dataset.from_tensors(batch).repeat(2)), 2)
    equal(group.members["3.0"].student, alone.members["3.0"].student)
