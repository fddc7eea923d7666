"""What plain Keras takes in `compile` and `fit`, and what it keeps: the same numbers in a `Distiller`."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.dense_models import SW, X, Y, compiled, dense

from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.recipe import Term

FEW = np.where(np.arange(48) % 3 == 0, Y, -1).astype("int32")  # labels of every third example
ENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
LOGITS = dense(2)(X).numpy()
BY_CLASS = {0: 3.0, 2: 0.5}


def eager(model, rate=0.1, **options):
    model.compile(keras.optimizers.SGD(rate), run_eagerly=True, **options)
    return model


def equal(first, second, tolerance=1e-6):
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=tolerance)


# -- without labels ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_without_labels_the_teacher_alone_teaches():
    kept = {}
    unlabeled = {"x": X}, {"x": tf.data.Dataset.from_tensor_slices(X).batch(16)}, {"x": X, "y": np.full(48, -1)}
    for data in unlabeled:
        distiller = eager(Distiller(dense(1), dense(2), distillation_weight=1.0))
        history = distiller.fit(
            **data,
            batch_size=None if len(data) == 1 and data["x"] is not X else 16,
            epochs=2,
            shuffle=False,
            verbose=0,
            validation_data=(X[:8], Y[:8]),
        ).history
        names = {"loss", "kd", "agreement"} | ({"hard", "accuracy"} if "y" in data else set())
        validated = {"val_" + name for name in ("loss", "kd", "agreement", "hard", "accuracy")}
        assert history.keys() == names | validated
        assert history["loss"] == pytest.approx(history["kd"])
        kept[len(kept)] = distiller.student
    equal(kept[0], kept[1])
    equal(kept[0], kept[2])
    assert abs(kept[0].weights[0].numpy() - dense(1).weights[0].numpy()).max() > 1e-2
    logs = distiller.evaluate(X, verbose=0, return_dict=True)
    assert logs.keys() == {"loss", "kd", "agreement"}


@pytest.mark.slow
def test_metrics_wait_for_labels():
    distiller = eager(
        Distiller(dense(1), dense(2), distillation_weight=1.0), metrics=["sparse_top_k_categorical_accuracy"]
    )
    history = distiller.fit(X, epochs=2, verbose=0, validation_data=(X, Y)).history
    assert "sparse_top_k_categorical_accuracy" not in history
    assert history["val_sparse_top_k_categorical_accuracy"] == [1.0, 1.0]


@pytest.mark.slow
def test_labels_that_are_missing_are_no_quiet_zero():
    half = keras.optimizers.schedules.PiecewiseConstantDecay([5], [1.0, 0.5])
    for weight, name in ((0.9, "0.9"), (half, "a schedule")):
        distiller = eager(Distiller(dense(1), dense(2), distillation_weight=weight))
        with pytest.raises(InputError, match=f"no labels, but the distillation weight is {name}: .*weight=1.0"):
            distiller.fit(X, verbose=0)
    with pytest.raises(InputError, match=r"learns from labels, but the data has none\. Call fit\(x, y\)"):
        compiled_control = Supervised(dense(1))
        compiled_control.compile("sgd")
        compiled_control.fit(X, verbose=0)


# -- class_weight -----------------------------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        part = slice(16 * index, 16 * index + 16)
        return X[part], {"labels": Y[part], "teacher_logits": LOGITS[part]}


def of_class(labels):
    return np.array([BY_CLASS.get(int(label), 1.0) for label in labels], "float32")


@pytest.mark.exhaustive(
    but=(
        "dict",
        "batch",
        "PyDataset",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dict", "data set", "PyDataset", "one-hot", "column", "unlabeled", "batch"])
def test_class_weights_are_sample_weights(kind):
    targets = {"labels": Y, "teacher_logits": LOGITS}
    data = {
        "dict": {"x": X, "y": targets},
        "data set": {"x": tf.data.Dataset.from_tensor_slices((X, targets)).batch(16)},
        "PyDataset": {"x": Batches()},
        "one-hot": {"x": X, "y": {**targets, "labels": np.eye(4)[Y]}},
        "column": {"x": X, "y": Y[:, None].astype("float32")},
        "unlabeled": {"x": X, "y": FEW},
        "batch": {"x": X, "y": targets},
    }[kind]
    labels = FEW if kind == "unlabeled" else Y
    weighted, classes = (eager(Distiller(dense(1), dense(2))) for _ in range(2))
    if kind == "batch":
        weighted.train_on_batch(X, targets, sample_weight=of_class(labels))
        classes.train_on_batch(X, targets, class_weight=BY_CLASS)
    else:
        options = {"epochs": 2, "shuffle": False, "verbose": 0}
        size = {"batch_size": 16} if "y" in data else {}
        expected = weighted.fit(
            X, {**targets, "labels": labels}, sample_weight=of_class(labels), batch_size=16, **options
        )
        found = classes.fit(**data, **size, class_weight=BY_CLASS, **options)
        for name, values in expected.history.items():
            assert found.history[name] == pytest.approx(values, rel=1e-5), name
    equal(classes.student, weighted.student)


@pytest.mark.slow
def test_class_weights_last_for_one_fit_and_not_for_validation():
    """Traced: other weights, and none, are another step."""
    once, other = compiled(dense(1), dense(2), rate=1e-9), Distiller(dense(1), dense(2))
    expected = eager(other).evaluate(X, Y, batch_size=48, verbose=0, return_dict=True)["loss"]
    fit = {"batch_size": 48, "verbose": 0}
    first = once.fit(X, Y, class_weight=BY_CLASS, validation_data=(X, Y), **fit).history
    assert first["val_loss"][0] == pytest.approx(expected, abs=1e-5)
    weighted = other.evaluate(X, Y, sample_weight=of_class(Y), batch_size=48, verbose=0, return_dict=True)["loss"]
    assert first["loss"][0] == pytest.approx(weighted, abs=1e-5) and abs(weighted - expected) > 1e-3
    assert once.fit(X, Y, **fit).history["loss"][0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weights", [[1.0, 2.0], {}, {"a": 1.0}, {0: -1.0}, {0: None}, {0: float("nan")}])
def test_class_weights_are_numbers_by_class(weights):
    with pytest.raises(InputError, match="class_weight expects a dict from classes to weights"):
        eager(Supervised(dense(1))).fit(X, Y, class_weight=weights, verbose=0)


def test_class_weights_need_labels_and_no_other_weights():
    with pytest.raises(InputError, match="received labels with sample_weight"):
        eager(Supervised(dense(1))).fit(X, Y, class_weight=BY_CLASS, sample_weight=SW, verbose=0)
    with pytest.raises(InputError, match="received no labels"):
        eager(Distiller(dense(1), dense(2), distillation_weight=1.0)).fit(X, class_weight=BY_CLASS, verbose=0)


# -- metrics ----------------------------------------------------------------------------------------------------------


class Unweighted(keras.metrics.Metric):
    """Counts its examples, and takes no notice of weights."""

    def __init__(self, name="examples"):
        super().__init__(name=name)
        self.count = self.add_variable((), "zeros", name="count")

    def update_state(self, y_true, y_pred, sample_weight=None):
        self.count.assign_add(tf.cast(tf.shape(y_true)[0], tf.float32))

    def result(self):
        return self.count


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"run_eagerly": True}, pytest.param({"jit_compile": True}, marks=pytest.mark.slow)]
)
def test_metrics_skip_examples_without_a_label(options):
    def metrics():
        return {
            "metrics": ["accuracy", Unweighted(), keras.metrics.SparseTopKCategoricalAccuracy(2, "top2")],
            "weighted_metrics": [keras.metrics.SparseCategoricalCrossentropy("entropy", from_logits=True)],
        }

    plain = dense(1)
    plain.compile("sgd", ENTROPY, **metrics(), run_eagerly=True)
    expected = plain.evaluate(X[::3], Y[::3], sample_weight=SW[::3], verbose=0, return_dict=True)
    distiller = Distiller(dense(1), dense(2))
    distiller.compile("sgd", **metrics(), **options)
    found = distiller.evaluate(X, FEW, sample_weight=SW, batch_size=20, verbose=0, return_dict=True)
    assert expected["examples"] == 16
    for name in ("accuracy", "examples", "top2", "entropy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name
    names = ["loss", "hard", "kd", "accuracy", "agreement"]
    if options.get("run_eagerly"):
        values = distiller.evaluate(X, FEW, sample_weight=SW, batch_size=20, verbose=0)
        assert values[:5] == pytest.approx([found[name] for name in names])


@pytest.mark.slow
def test_all_labels_give_metrics_of_all_examples():
    plain = dense(1)
    plain.compile("sgd", ENTROPY, metrics=[Unweighted()], run_eagerly=True)
    distiller = eager(Distiller(dense(1), dense(2)), metrics=[Unweighted()])
    for model in (plain, distiller):
        assert model.fit(X, Y, verbose=0).history["examples"] == [48]
        assert model.evaluate(X, Y, verbose=0, return_dict=True)["examples"] == 48
    assert distiller.evaluate(X, np.eye(4)[Y], verbose=0, return_dict=True)["examples"] == 48


@pytest.mark.parametrize("name", ["loss", "kd", "hard", "agreement", "hint"])
def test_a_metric_needs_a_name_of_its_own(name):
    distiller = Distiller(dense(1), dense(2), terms={"hint": Term("cosine")})
    with pytest.raises(InputError, match=f"metric named '{name}', which is logged already"):
        distiller.compile("sgd", metrics=[keras.metrics.Mean(name=name)])


@pytest.mark.slow
def test_weighted_metrics_are_refused_on_replicas_and_accuracy_is_not():
    from kdistill.training.strategy import choose_devices

    with choose_devices("mirrored").strategy.scope():
        refused, accepted = Distiller(dense(1), dense(2)), Distiller(dense(1), dense(2))
        refused.compile("sgd", weighted_metrics=["sparse_categorical_accuracy"])
        accepted.compile("sgd", metrics=["accuracy"])
    with pytest.raises(InputError, match="Leave metrics= and weighted_metrics= out"):
        refused.fit(X, Y, batch_size=16, verbose=0)
    assert "accuracy" in accepted.fit(X, Y, batch_size=16, verbose=0).history


# -- the other arguments of Keras -------------------------------------------------------------------------------------

OPTIMIZERS = {
    "clipped": lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipnorm=0.1),
    "accumulated": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "averaged": lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5),
    "decayed": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "by name": lambda: "rmsprop",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_end_with_the_weights_of_keras(name):
    plain, distiller = dense(1), Distiller(dense(1), dense(2), distillation_weight=0.0)
    for model in (plain, distiller):
        model.compile(OPTIMIZERS[name](), ENTROPY, run_eagerly=True)
        model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    equal(distiller.student, plain)


@pytest.mark.exhaustive(
    "validation_data-3 steps at once", "validation_split-1 steps at once", "validation_split-3 steps at once"
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "options,steps",
    [
        ({"validation_split": 0.25}, 1),
        ({"validation_split": 0.25}, 3),
        ({"validation_data": (X[:20], Y[:20], SW[:20]), "validation_batch_size": 7, "validation_steps": 2}, 3),
        ({"validation_data": (X, Y), "validation_freq": 2, "initial_epoch": 1}, 1),
        ({"steps_per_epoch": 1, "sample_weight": SW}, 3),
        ({"class_weight": BY_CLASS}, 1),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else f"{value} steps at once",
)
def test_fit_takes_the_arguments_of_keras(options, steps):
    plain, distiller = dense(1), Distiller(dense(1), dense(2), distillation_weight=0.0)
    histories = []
    for model in (plain, distiller):
        model.compile(keras.optimizers.SGD(0.1), ENTROPY, metrics=["acc"], steps_per_execution=steps)
        fitted = model.fit(X, Y, batch_size=16, epochs=3, shuffle=False, verbose=0, **options)
        histories.append((fitted.epoch, fitted.history))
    (epochs, expected), (own_epochs, found) = histories
    assert own_epochs == epochs and found.keys() >= expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, abs=1e-5), name
    equal(distiller.student, plain)


def test_single_batches_and_predict_are_as_in_keras():
    plain, distiller = dense(1), Distiller(dense(1), dense(2), distillation_weight=0.0)
    plain.compile(keras.optimizers.SGD(0.1), ENTROPY, run_eagerly=True)
    eager(distiller, loss=ENTROPY)
    for _ in range(2):
        logs = distiller.train_on_batch(X, Y, SW, return_dict=True)
        assert logs["loss"] == pytest.approx(float(plain.train_on_batch(X, Y, SW)), rel=1e-5)
    equal(distiller.student, plain)
    assert distiller.test_on_batch(X, Y)[0] == pytest.approx(float(plain.test_on_batch(X, Y)), rel=1e-5)
    np.testing.assert_array_equal(distiller.predict_on_batch(X), plain.predict_on_batch(X))
    np.testing.assert_array_equal(distiller.predict(X, batch_size=7, verbose=0), plain.predict(X, 7, verbose=0))


def test_a_student_with_two_inputs():
    def network():
        keras.utils.set_random_seed(4)
        a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
        return keras.Model({"a": a, "b": b}, keras.layers.Dense(4)(a - b))

    plain, distiller = network(), Distiller(network(), lambda inputs: inputs["a"][:, :4], distillation_weight=0.0)
    for model in (plain, distiller):
        model.compile(keras.optimizers.SGD(0.1), ENTROPY, run_eagerly=True)
        model.fit({"a": X, "b": X**2}, Y, verbose=0, shuffle=False)
    equal(distiller.student, plain)
