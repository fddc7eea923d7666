"""Compression of students of any inputs and outputs: the loss of a Distiller, zeros and clusters, clear refusals."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L

from kdistill.compression.compress import compress
from kdistill.compression.other_outputs import HeadLoss
from kdistill.conversion.float32 import prepare
from kdistill.data.splits import Examples
from kdistill.distillation.distiller import Distiller
from kdistill.errors import InputError
from kdistill.recipe import Data, Stage, Term

pytestmark = pytest.mark.slow

ROWS = 48
RNG = np.random.default_rng(0)
SERIES = RNG.normal(size=(ROWS, 12, 5)).astype(np.float32)
TABLE = RNG.normal(size=(ROWS, 20)).astype(np.float32)
QUIET = {"say": lambda text: None}


def series(*layers, seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((12, 5)), *layers], name="series")


def numbers(seed=1):
    return series(L.LSTM(12, name="loop"), L.Dense(10, activation="relu", name="plain"), L.Dense(2), seed=seed)


def positions(seed=1):
    convolution = L.Conv1D(16, 3, padding="same", activation="relu", name="conv")
    return series(convolution, L.BatchNormalization(), L.Dense(4, activation="softmax", name="top"), seed=seed)


def labels(seed=1):
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [keras.Input((20,)), L.Dense(16, activation="relu", name="plain"), L.Dense(3, activation="sigmoid")],
        name="table",
    )


def classes(seed=1):
    return series(L.Conv1D(8, 3, name="conv"), L.GlobalAveragePooling1D(), L.Dense(4), seed=seed)


def two(seed=1):
    """Two inputs by name, and two outputs by name."""
    keras.utils.set_random_seed(seed)
    inputs = {"series": keras.Input((12, 5), name="series"), "table": keras.Input((20,), name="table")}
    x = L.Concatenate()([L.GRU(8, name="loop")(inputs["series"]), L.Dense(16, name="plain")(inputs["table"])])
    outputs = {"tags": L.Dense(3, activation="sigmoid", name="tags")(x), "size": L.Dense(1, name="size")(x)}
    return keras.Model(inputs, outputs, name="two")


CASES = {
    "numbers": (numbers, SERIES, RNG.normal(size=(ROWS, 2)).astype(np.float32), "numbers"),
    "positions": (positions, SERIES, RNG.integers(-1, 4, (ROWS, 12)).astype(np.int32), None),
    "labels": (labels, TABLE, RNG.integers(0, 2, (ROWS, 3)).astype(np.float32), None),
    "classes": (classes, SERIES, RNG.integers(-1, 4, ROWS).astype(np.int32), None),
    "two": (
        two,
        {"series": SERIES, "table": TABLE},
        {"tags": RNG.integers(0, 2, (ROWS, 3)).astype(np.float32), "size": TABLE[:, :1] ** 2},
        {"tags": "labels", "size": "numbers"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_a_distiller(name):
    """Value by value, of labels, teacher and metrics, with missing labels."""
    build, inputs, targets, head = CASES[name]
    student, teacher = build(), build(seed=2)
    distiller = Distiller(student, teacher, distillation_weight=0.7, head=head)
    distiller.compile("sgd")
    distiller.check_inputs = False
    expected = distiller.evaluate(inputs, targets, batch_size=ROWS, verbose=0, return_dict=True)
    loss = HeadLoss(student, prepare(student, head).heads, teacher, 0.7, 4.0, {})
    tensors = tf.nest.map_structure(tf.constant, inputs)
    means, counts = loss(tensors, tf.nest.map_structure(tf.constant, targets), student(tensors), 0)
    assert set(means) == set(loss.names) == set(expected) == set(counts)
    for part, value in expected.items():
        assert float(means[part]) == pytest.approx(value, rel=2e-5, abs=1e-6), part
    alone = HeadLoss(student, prepare(student, head).heads, None, 0.7, 4.0, {})
    hard = alone(tensors, tf.nest.map_structure(tf.constant, targets), student(tensors), 0)[0]
    assert float(hard["loss"]) == pytest.approx(sum(v for k, v in expected.items() if k.endswith("hard")), rel=2e-5)


def zeros(kernel) -> float:
    return float(np.mean(np.asarray(kernel) == 0))


@pytest.mark.exhaustive
def test_a_recurrent_student_of_numbers_is_pruned_and_its_zeros_outlive_the_clustering():
    keras.utils.set_random_seed(0)
    build, inputs, targets, head = CASES["numbers"]
    student = build()
    before = [weight.copy() for weight in student.get_weights()]
    stage = Stage("prune_cluster", epochs=2, batch_size=16, learning_rate=5e-3, final_sparsity=0.5, clusters=5)
    result = compress(student, stage, build(seed=2), Examples(inputs, targets), head=head, **QUIET)
    loop = result.model.get_layer("loop")
    for kernel in (loop.cell.kernel, loop.cell.recurrent_kernel, result.model.get_layer("plain").kernel):
        assert zeros(kernel) == pytest.approx(0.5, abs=0.02)
    assert len(np.unique(result.model.get_layer("plain").kernel)) <= 5
    rows = {row["layer"]: row for row in result.layers}
    assert rows["loop"]["pruned"] == "yes" and rows["loop"]["clustered"] == "LSTM layers are not clustered"
    assert result.model.input_shape == student.input_shape and result.model(inputs).shape == (ROWS, 2)
    for a, b in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    history = result.history["prune"]
    assert set(history) == {"loss", "hard", "kd", "mae", "teacher_mae"} and history["kd"][1] < history["kd"][0]
    assert result.sizes["cluster"]["deflated"] < result.sizes["student"]["deflated"]


@pytest.mark.exhaustive
def test_several_inputs_and_outputs_with_validation_and_a_resumed_step(tmp_path):
    build, inputs, targets, head = CASES["two"]
    student, said = build(), []
    data = tf.data.Dataset.from_tensor_slices((inputs, targets)).batch(16)
    stage = Stage("prune", epochs=1, batch_size=16, final_sparsity=0.5)
    options = {"head": head, "keep": tmp_path, "say": said.append}
    result = compress(student, stage, build(seed=2), data, **options)
    again = compress(student, stage, build(seed=2), (inputs, targets), **options)
    for a, b in zip(result.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert "finished before" in said[-1]
    kernels = [result.model.get_layer(name).kernel for name in ("plain", "tags", "size")]
    kernels += [result.model.get_layer("loop").cell.recurrent_kernel]
    assert min(map(zeros, kernels)) >= 0.45
    assert {"tags_accuracy", "size_mae", "tags_kd", "size_kd", "loss"} <= set(result.history["prune"])
    assert set(result.model.output) == {"tags", "size"}


@pytest.mark.exhaustive
def test_positions_of_a_one_dimensional_network_are_pruned_and_clustered():
    build, inputs, targets, _ = CASES["positions"]
    stage = Stage("prune_cluster", epochs=1, batch_size=16, final_sparsity=0.25, clusters=4)
    terms = {"more": Term("mse_logits", 0.1)}
    result = compress(build(), stage, build(seed=2), (inputs, targets), terms=terms, **QUIET)
    kernel = np.asarray(result.model.get_layer("conv").kernel)
    assert zeros(kernel) >= 0.24 and len(np.unique(kernel)) <= 4
    assert result.history["cluster"]["more"][0] > 0


@pytest.mark.parametrize(
    "case, scheme, change, message",
    [
        ("classes", "qat", {}, "not one of images with a class each, for which the scheme 'qat' is.*profile 'npu'"),
        ("labels", "int8", {"teacher": None}, "for which the scheme 'int8' is"),
        ("two", "prune", {"mean": 1.0, "std": 2.0}, "leave out mean, std"),
        ("numbers", "prune", {"temperature": 2.0}, "temperature would do nothing: numbers"),
        ("numbers", "prune", {"terms": {"more": Term("dkd", 1.0)}}, "dkd compares classes"),
        ("labels", "prune", {"teacher": classes(2)}, "teacher cannot take the inputs of the student.*ValueError"),
        ("classes", "prune", {"teacher": positions(2)}, r"student gives \(4,\), the teacher \(12, 4\)|one shape"),
        ("labels", "prune", {"data": (TABLE[:, :7], CASES["labels"][2])}, r"expects \[n, 20\] for the input"),
        ("labels", "prune", {"data": (TABLE, CASES["labels"][2][:-1])}, "as many labels as inputs, received 47 and 48"),
        ("labels", "prune", {"data": (TABLE,)}, "compress needs labels"),
        ("labels", "prune", {"data": None}, "compress needs training examples"),
        (
            "labels",
            "prune",
            {"augment": Data(shift=2)},
            "augment changes images .shift.; this student's inputs are others",
        ),
        ("numbers", "cluster", {"clusters": 60}, "LSTM layers are not clustered"),
        ("two", "prune", {"terms": {"more": Term("mse_logits", 1.0)}}, "need a student with one output"),
        ("labels", "prune", {"head": "classes"}, "classes"),
    ],
)
def test_what_cannot_work_is_refused_before_training(case, scheme, change, message):
    build, inputs, targets, head = CASES[case]
    arguments = {"teacher": build(2), "data": (inputs, targets), "head": head, "epochs": 1, **QUIET, **change}
    with pytest.raises(InputError, match=f"(?s){message}"):
        compress(build(), scheme, **arguments)
