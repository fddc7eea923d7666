"""`Distiller` in `fit`: the loss of every step by an independent computation, what is logged, and what is kept out."""

import keras
import numpy as np
import pytest
from support.dense_models import SW, X, Y, compiled, dense, functional, values_of
from support.small_models import Counted

from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden = keras.layers.Dense(5, activation="tanh")
        self.last = keras.layers.Dense(4, activation="softmax")

    def call(self, x):
        return self.last(self.hidden(x))


def by_hand(student, teacher, weight, temperature, x=X, y=Y, sw=None, penalty=0.0):
    """The loss of one step in float64 numpy, from the models' logits."""

    def logs(z):
        z = z - z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    s, t = (np.asarray(z, np.float64) for z in (student(x), teacher(x)))
    hard = -logs(s)[np.arange(len(y)), y]
    p, q = logs(t / temperature), logs(s / temperature)
    kd = temperature**2 * (np.exp(p) * (p - q)).sum(-1)
    total = (1 - weight) * hard + weight * kd
    scale = np.ones(len(y)) if sw is None else sw
    return {name: (v * scale).mean() for name, v in {"loss": total, "hard": hard, "kd": kd}.items()} | {
        "loss": (total * scale).mean() + penalty
    }


@pytest.mark.slow
@pytest.mark.parametrize("weight,temperature", [(0.9, 4.0), (0.0, 1.0), (1.0, 1.0), (0.3, 20.0)])
def test_logged_losses_are_those_computed_by_hand(weight, temperature):
    student, teacher = dense(1), dense(2, width=9)
    expected = by_hand(student, teacher, weight, temperature)
    distiller = compiled(student, teacher, distillation_weight=weight, temperature=temperature)
    logs = distiller.evaluate(X, Y, batch_size=20, verbose=0, return_dict=True)
    for name in ("loss", "hard", "kd"):
        assert logs[name] == pytest.approx(expected[name], abs=1e-5)
    s, t = student(X).numpy(), teacher(X).numpy()
    assert logs["accuracy"] == pytest.approx(np.mean(s.argmax(-1) == Y))
    assert logs["agreement"] == pytest.approx(np.mean(s.argmax(-1) == t.argmax(-1)))
    history = distiller.fit(X, Y, batch_size=48, verbose=0, validation_data=(X, Y)).history
    assert set(history) == {p + n for p in ("", "val_") for n in ("loss", "hard", "kd", "accuracy", "agreement")}
    assert history["loss"][0] == pytest.approx(expected["loss"], abs=1e-5)


def test_one_sgd_step_moves_the_weights_by_the_closed_form_gradient():
    """For a linear student the gradient is X^T [(1-w)(softmax(s) - y) + w T (softmax(s/T) - softmax(t/T))] / n."""
    student = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    teacher = dense(3)
    kernel, bias = values_of(student)

    def softmax(z):
        z = np.exp(z - z.max(-1, keepdims=True))
        return z / z.sum(-1, keepdims=True)

    s, t, w, temperature = student(X).numpy(), teacher(X).numpy(), 0.7, 4.0
    slope = (1 - w) * (softmax(s) - np.eye(4)[Y])
    slope += w * temperature * (softmax(s / temperature) - softmax(t / temperature))
    distiller = compiled(student, teacher, rate=0.5, distillation_weight=w, temperature=temperature)
    distiller.fit(X, Y, batch_size=48, shuffle=False, verbose=0)
    np.testing.assert_allclose(student.weights[0], kernel - 0.5 * X.T @ slope / 48, atol=1e-6)
    np.testing.assert_allclose(student.weights[1], bias - 0.5 * slope.mean(0), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "sample_weight", "class_weight", "penalty"])
def test_weight_zero_trains_exactly_as_keras_does(kind):
    penalty = keras.regularizers.L2(0.01) if kind == "penalty" else None
    mine, theirs = dense(1, penalty=penalty), dense(1, penalty=penalty)
    options = {"sample_weight": {"sample_weight": SW}, "class_weight": {"class_weight": {0: 3.0, 1: 1, 2: 0.5, 3: 1}}}
    fit = {"batch_size": 20, "epochs": 3, "shuffle": False, "verbose": 0, **options.get(kind, {})}
    theirs.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    expected = theirs.fit(X, Y, **fit).history["loss"]
    for model in (Supervised(mine), compiled(dense(1, penalty=penalty), dense(5), distillation_weight=0.0)):
        model.compile(keras.optimizers.SGD(0.1))
        found = model.fit(X, Y, **fit).history["loss"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        for a, b in zip(model.student.weights, theirs.weights, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_sample_weights_scale_the_teachers_term_too():
    student, teacher = dense(1), dense(2)
    expected = by_hand(student, teacher, 0.9, 4.0, sw=SW)
    logs = compiled(student, teacher).evaluate(X, Y, sample_weight=SW, batch_size=48, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.exhaustive(
    but=(
        "functional-fused",
        "dense-softmax",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("ending", ["fused", "softmax", "activation"])
@pytest.mark.parametrize("make", [dense, functional])
def test_softmax_ended_models_train_like_logit_ended_ones(ending, make):
    plain, ended = dense(1), make(1, ending)
    ended.set_weights(plain.get_weights())
    teacher, soft_teacher = dense(2), make(2, ending)
    soft_teacher.set_weights([60 * w for w in teacher.get_weights()])  # probabilities of exactly 0 in float32
    teacher.set_weights(soft_teacher.get_weights())
    assert float(keras.ops.max(keras.ops.abs(teacher(X)))) > 100
    for student, its_teacher in ((plain, teacher), (ended, soft_teacher)):
        compiled(student, its_teacher, rate=0.01).fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(plain.weights, ended.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_subclassed_student_that_ends_in_softmax():
    student = Subclassed()
    student(X)
    plain = dense(1)
    plain.set_weights(student.get_weights())
    expected = by_hand(plain, dense(2), 0.9, 4.0)
    logs = compiled(student, dense(2)).evaluate(X, Y, batch_size=48, verbose=0, return_dict=True)
    assert logs["loss"] == pytest.approx(expected["loss"], abs=1e-5)


@pytest.mark.slow
def test_a_given_loss_gets_the_students_own_outputs():
    distiller = Distiller(dense(1, "fused"), dense(2), distillation_weight=0.0)
    distiller.compile("sgd", loss=keras.losses.SparseCategoricalCrossentropy(), metrics=["sparse_categorical_accuracy"])
    logs = distiller.evaluate(X, Y, verbose=0, return_dict=True)
    distiller.compile("sgd")
    own = distiller.evaluate(X, Y, verbose=0, return_dict=True)
    assert logs["hard"] == pytest.approx(own["hard"], abs=1e-5)
    assert logs["sparse_categorical_accuracy"] == pytest.approx(own["accuracy"], abs=1e-6)


@pytest.mark.slow
def test_one_hot_labels_give_the_same():
    first, second, third = (
        compiled(dense(1), dense(2)).evaluate(X, labels, verbose=0, return_dict=True)
        for labels in (Y, np.eye(4, dtype="float32")[Y], Y[:, None])
    )
    assert second == pytest.approx(first, abs=1e-6)
    assert third == pytest.approx(first, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)])
def test_examples_without_a_label_count_in_the_teachers_part_alone(loss):
    """`hard` and `accuracy` are means over the labeled examples, `kd` and `agreement` over all."""
    student, teacher = dense(1), dense(2)
    few = np.where(np.arange(48) % 3 == 0, Y, -1).astype("int32")
    everything, labeled = by_hand(student, teacher, 0.7, 4.0), by_hand(student, teacher, 0.7, 4.0, X[::3], Y[::3])
    expected = 0.3 * labeled["hard"] + 0.7 * everything["kd"]
    distiller = Distiller(student, teacher, distillation_weight=0.7)
    distiller.compile(keras.optimizers.SGD(1e-9), loss=loss)
    logs = distiller.evaluate(X, few, batch_size=48, verbose=0, return_dict=True)
    logs_of_fit = {k: v[0] for k, v in distiller.fit(X, few, batch_size=48, verbose=0).history.items()}
    for found in (logs, logs_of_fit):
        assert found["hard"] == pytest.approx(labeled["hard"], abs=1e-5)
        assert found["kd"] == pytest.approx(everything["kd"], abs=1e-5)
        assert found["loss"] == pytest.approx(expected, abs=1e-5)
    assert logs["accuracy"] == pytest.approx(np.mean(student(X[::3]).numpy().argmax(-1) == Y[::3]))
    none = distiller.evaluate(X, np.full_like(Y, -1), batch_size=48, verbose=0, return_dict=True)
    assert none["hard"] == 0 and none["loss"] == pytest.approx(0.7 * everything["kd"], abs=1e-5)


def test_weight_and_temperature_change_between_epochs_without_a_new_trace():
    calls = []

    def teacher(x):
        calls.append(1)
        return x[:, :4]

    distiller = compiled(dense(1), teacher, rate=1e-9)

    class Change(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.temperature = 1.0
                self.model.distillation_weight = 0.25

    losses = distiller.fit(X, Y, batch_size=48, epochs=2, verbose=0, callbacks=[Change()]).history["loss"]
    traced = len(calls)
    distiller.fit(X, Y, batch_size=48, verbose=0)
    assert len(calls) == traced
    for value, (weight, temperature) in zip(losses, [(0.9, 4.0), (0.25, 1.0)], strict=True):
        expected = by_hand(distiller.student, lambda x: x[:, :4], weight, temperature)["loss"]
        assert value == pytest.approx(expected, abs=1e-4)


def test_schedules_follow_the_global_step():
    weight = keras.optimizers.schedules.PiecewiseConstantDecay([2], [1.0, 0.0])
    distiller = compiled(dense(1), dense(2), rate=1e-9, distillation_weight=weight, temperature=2.0)
    assert distiller.distillation_weight == 1.0
    history = distiller.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0).history
    assert distiller.distillation_weight == 0.0
    # Steps 0, 1 and 2 of the first epoch are the teacher's alone, the second epoch is the labels' alone.
    assert history["loss"][0] == pytest.approx(history["kd"][0], abs=1e-5)
    assert history["loss"][1] == pytest.approx(history["hard"][1], abs=1e-5)


def test_one_forward_of_each_model_per_step():
    counts = {"student": 0, "teacher": 0}

    def net(who):
        layers = [keras.Input((6,)), Counted(who, counts), keras.layers.Reshape((6,)), keras.layers.Dense(4)]
        return keras.Sequential(layers)

    distiller = compiled(net("student"), net("teacher"))
    distiller.fit(X, Y, batch_size=16, epochs=1, verbose=0)
    assert counts["teacher"] == 3 and counts["student"] == 3


def test_teachers_of_other_kinds():
    first, second = dense(2), dense(3, "fused")
    logs = compiled(dense(1), [first, second], teacher_weights=[3, 1]).evaluate(X, Y, verbose=0, return_dict=True)

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    blended = np.log(0.75 * softmax(first(X).numpy()) + 0.25 * second(X).numpy())
    expected = by_hand(dense(1), lambda x: blended, 0.9, 4.0)
    assert logs["kd"] == pytest.approx(expected["kd"], abs=1e-5)


def test_mixed_precision_students_log_the_loss_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        student = dense(1)
    finally:
        keras.config.set_dtype_policy("float32")
    distiller = compiled(student, dense(2))
    assert distiller.dtype_policy.name == "mixed_bfloat16"
    history = distiller.fit(X, Y, epochs=2, verbose=0).history
    assert history["loss"][1] < history["loss"][0]


@pytest.mark.slow
def test_loss_scaling_reaches_the_same_weights():
    """mixed_float16 scales the loss and unscales the gradients; SGD shows a wrong factor at once."""

    def student(policy):
        keras.utils.set_random_seed(1)
        return keras.Sequential([keras.Input((6,)), keras.layers.Dense(4, dtype=policy)])

    ends = {}
    for policy in ("float32", "mixed_float16"):
        net = student(policy)
        distiller = Distiller(net, dense(2), dtype=policy)
        distiller.compile(keras.optimizers.SGD(0.1))
        distiller.fit(X, Y, batch_size=16, shuffle=False, verbose=0, epochs=3)
        ends[policy] = net.get_weights()
    assert isinstance(distiller.optimizer, keras.optimizers.LossScaleOptimizer)
    for a, b in zip(*ends.values(), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.slow
def test_a_skipped_step_keeps_the_weights_and_counts():
    net = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    distiller = Distiller(net, dense(2), dtype="mixed_float16")
    distiller.compile(keras.optimizers.SGD(0.1))
    before = net.get_weights()
    distiller.fit(np.full_like(X, np.inf), Y, batch_size=48, verbose=0)
    for a, b in zip(before, net.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert int(distiller.global_step) == 1 and int(distiller.optimizer.iterations) == 0


def test_mistakes_are_named():
    with pytest.raises(InputError, match="4 classes, the teacher 3"):
        Distiller(dense(1), dense(2, classes=3))
    with pytest.raises(InputError, match="4 classes, the teacher 3"):
        compiled(dense(1), lambda x: x[:, :3]).fit(X, Y, verbose=0)
    same = dense(1)
    with pytest.raises(InputError, match="same model"):
        Distiller(same, same)
    with pytest.raises(InputError, match="distillation_weight expects a number from 0 to 1"):
        Distiller(dense(1), dense(2), distillation_weight=1.5)
    with pytest.raises(InputError, match="temperature expects a number above 0"):
        Distiller(dense(1), dense(2), temperature=0)
    with pytest.raises(InputError, match="is one number for each example.*head='labels'"):
        compiled(dense(1, classes=1), dense(2, classes=1)).fit(X, Y, verbose=0)
    with pytest.raises(InputError, match="one per teacher"):
        Distiller(dense(1), [dense(2), dense(3)], teacher_weights=[1.0])
    with pytest.raises(InputError, match=r"keras\.Model"):
        Distiller("student", dense(2))
