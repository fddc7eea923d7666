"""The loss passed to `compile`: its casts, its reduction and `loss_weights`, by hand and against `keras.Model.fit`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.dense_models import SW, X, Y, dense

from kdistill.distillation.distiller import Distiller
from kdistill.distillation.hard_loss import HardLoss
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.training.strategy import choose_devices

ONE_HOT = np.eye(4, dtype="int64")[Y]
REDUCTIONS = ["sum_over_batch_size", "mean", "mean_with_sample_weight", "sum", "none", None]


class Squared(keras.losses.Loss):
    """Without Keras's cast, integer labels cannot be subtracted from."""

    def call(self, y_true, y_pred):
        return keras.ops.mean(keras.ops.square(y_true - y_pred), -1)


class ByClass(keras.losses.Loss):
    """One value for each class of an example, `[batch, classes]`."""

    def call(self, y_true, y_pred):
        return keras.ops.abs(y_true - y_pred)


def margin(y_true, y_pred):
    return keras.ops.maximum(0.0, 1.0 - (2 * y_true - 1) * y_pred)


LOSSES = {
    "custom": (lambda reduction: Squared(reduction=reduction), ONE_HOT),
    "by class": (lambda reduction: ByClass(reduction=reduction), ONE_HOT),
    "float64": (lambda reduction: Squared(reduction=reduction, dtype="float64"), ONE_HOT),
    "sparse": (lambda reduction: keras.losses.SparseCategoricalCrossentropy(True, reduction=reduction), Y),
    "focal": (
        lambda reduction: keras.losses.CategoricalFocalCrossentropy(from_logits=True, reduction=reduction),
        ONE_HOT,
    ),
}


def trained(model, loss, labels, weights=None, strategy_data=None, **options):
    model.compile(keras.optimizers.SGD(0.04), loss, run_eagerly=strategy_data is None, **options)
    fit = {"x": X, "y": labels, "sample_weight": weights, "batch_size": 20} if strategy_data is None else strategy_data
    return model.fit(**fit, shuffle=False, verbose=0).history


def equal(first, second, tolerance=1e-6):
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=tolerance)


def moved(student):
    return max(abs(a.numpy() - b.numpy()).max() for a, b in zip(student.weights, dense(1).weights, strict=True))


@pytest.mark.exhaustive(
    but=(
        "float64-mean",
        "by class-mean",
        "custom-sum",
        "custom-None",
        "sparse-mean",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "name,reduction",
    [
        *(("custom", reduction) for reduction in REDUCTIONS),
        *(("by class", reduction) for reduction in ("mean", "sum")),
        *(("float64", reduction) for reduction in ("mean", "mean_with_sample_weight")),
        *(("focal", reduction) for reduction in ("mean", "sum")),
        ("sparse", "mean"),
    ],
)
def test_a_loss_trains_as_in_keras(name, reduction):
    make, labels = LOSSES[name]
    weights = None if name == "by class" else SW  # Keras multiplies [batch, classes] by no weights [batch]
    plain = dense(1)
    expected = trained(plain, make(reduction), labels, weights)
    assert moved(plain) > 1e-3
    for model in (Supervised(dense(1)), Distiller(dense(1), dense(2), distillation_weight=0.0)):
        found = trained(model, make(reduction), labels, weights)
        equal(model.student, plain)
        assert found["hard"] == pytest.approx(found["loss"], rel=1e-5)
        if reduction not in ("none", None):  # Keras trains on their sum, and logs their mean
            assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_logs_are_those_computed_by_hand(reduction):
    student, teacher = dense(1), dense(2)
    errors = ((ONE_HOT - student(X).numpy().astype(np.float64)) ** 2).mean(-1)
    hard = {"mean_with_sample_weight": (errors * SW).sum() / SW.sum()}
    if reduction in ("sum", "none", None):
        hard[reduction] = (errors * SW).sum()
    hard = hard.get(reduction, (errors * SW).mean())
    distiller = Distiller(student, teacher, distillation_weight=0.3)
    distiller.compile("sgd", Squared(reduction=reduction), loss_weights=2.5, run_eagerly=True)
    logs = distiller.evaluate(X, ONE_HOT, sample_weight=SW, batch_size=48, verbose=0, return_dict=True)
    assert logs["hard"] == pytest.approx(2.5 * hard, rel=1e-5)
    assert logs["loss"] == pytest.approx(0.7 * 2.5 * hard + 0.3 * logs["kd"], rel=1e-5)


@pytest.mark.slow
def test_examples_without_a_label_are_in_no_reduction():
    few = np.where(np.arange(48) % 3 == 0, Y, -1)
    for reduction in ("mean", "sum", "mean_with_sample_weight"):
        loss = keras.losses.SparseCategoricalCrossentropy(True, reduction=reduction)
        model = Supervised(dense(1))
        model.compile("sgd", loss, run_eagerly=True)
        found = model.evaluate(X, few, sample_weight=SW, batch_size=48, verbose=0, return_dict=True)["hard"]
        labeled = float(loss(Y[::3], dense(1)(X[::3]), SW[::3]))
        assert found == pytest.approx(labeled, rel=1e-5), reduction


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "crossentropy", margin, lambda y_true, y_pred: y_pred - y_true, ["mae"]])
def test_names_and_functions_get_keras_casts_too(loss):
    student, labels = dense(1, "fused"), ONE_HOT
    plain = dense(1, "fused")
    trained(plain, loss, labels)
    trained(model := Distiller(student, dense(2), distillation_weight=0.0), loss, labels)
    equal(model.student, plain)
    if loss == "crossentropy":  # the function follows the labels
        trained(other := Supervised(dense(1, "fused")), loss, Y)
        equal(other.student, plain)


@pytest.mark.slow
def test_loss_weights_are_a_factor_as_in_keras():
    loss = keras.losses.SparseCategoricalCrossentropy(True)
    plain = dense(1)
    expected = trained(plain, loss, Y, loss_weights=2.5)
    for weight in (2.5, [2.5], {"out": 2.5}):
        model = Supervised(dense(1))
        found = trained(model, loss, Y, loss_weights=weight)
        equal(model.student, plain)
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    half = Supervised(dense(1))  # without a loss, of the default cross-entropy
    trained(half, None, Y, loss_weights=2.5)
    equal(half.student, plain)


@pytest.mark.slow
def test_a_loss_with_one_number_for_the_batch():
    def of_the_batch(y_true, y_pred):
        return tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y_true, y_pred, from_logits=True))

    class OfTheBatch(keras.losses.Loss):
        def call(self, y_true, y_pred):
            return of_the_batch(y_true, y_pred)

    plain = dense(1)
    trained(plain, of_the_batch, Y)
    for loss in (of_the_batch, OfTheBatch(), OfTheBatch(reduction=None)):
        model = Supervised(dense(1))
        trained(model, loss, Y)
        equal(model.student, plain)
    with pytest.raises(InputError, match="'sum' would do nothing"):
        trained(Supervised(dense(1)), OfTheBatch(reduction="sum"), Y)
    for eager in (True, False):
        model = Supervised(dense(1))
        model.compile("sgd", of_the_batch, run_eagerly=eager)
        with pytest.raises(InputError, match=r"^The loss of_?the_?batch returns one number .* no label .*\[batch\]\.$"):
            model.evaluate(X, np.where(Y > 1, Y, -1), verbose=0)


def test_the_loss_itself_stays_as_it_was():
    loss = Squared(reduction="sum")
    hard = HardLoss(loss)
    assert loss.reduction == "sum" and hard.loss is loss
    np.testing.assert_allclose(hard(tf.constant([[1, 0]]), tf.constant([[0.5, 1.0]])), [0.625])


@pytest.mark.parametrize(
    "loss,message",
    [
        ("msee", "expects a Keras loss.*received 'msee'"),
        (3, "expects a Keras loss"),
        (["mse", "mae"], "one entry, because the student has one output; received 2"),
        (lambda y_true, y_pred: tf.reduce_sum(y_pred, 0), r"returns the shape \(4,\).*expected one value for each"),
    ],
)
def test_what_is_no_loss_is_refused(loss, message):
    model = Supervised(dense(1))
    with pytest.raises(InputError, match=message):
        model.compile("sgd", loss, run_eagerly=True)
        model.evaluate(X, ONE_HOT, verbose=0)


@pytest.mark.parametrize("weight", [-1.0, "2", float("inf"), True])
def test_loss_weights_are_numbers(weight):
    with pytest.raises(InputError, match="loss_weights expects a number, 0 or more"):
        Supervised(dense(1)).compile("sgd", loss_weights=weight)


@pytest.mark.exhaustive(
    but=(
        "sum",
        "mean_with_sample_weight",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "mean_with_sample_weight", "sum", None])
def test_two_replicas_end_with_the_weights_of_one_device(reduction):
    """Unequal parts of a batch (9 and 8 examples), unequal sample weights, unequal shares of labels."""
    few = np.where(np.arange(48) % 17 < 12, Y, -1)

    def data():
        batches = tf.data.Dataset.from_tensor_slices((X, few, SW)).batch(17)
        return {"x": batches}

    def loss():
        return keras.losses.SparseCategoricalCrossentropy(True, reduction=reduction)

    plain = Distiller(dense(1), dense(2), distillation_weight=0.4)
    expected = trained(plain, loss(), None, strategy_data=data(), loss_weights=1.5)
    with choose_devices("mirrored").strategy.scope():
        mirrored = Distiller(dense(1), dense(2), distillation_weight=0.4)
        found = trained(mirrored, loss(), None, strategy_data=data(), loss_weights=1.5)
    equal(mirrored.student, plain.student)
    assert moved(plain.student) > 1e-2
    for name in expected:
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
