"""Diagnostics against numbers worked out by hand."""

import json

import keras
import numpy as np
import pytest
from keras import layers

from kdistill.data import splits
from kdistill.evaluation import diagnostics, metrics
from kdistill.evaluation.evaluate import predict

# Three classes; the predicted class of each row is the largest.
PROBABILITIES = np.array([[0.70, 0.20, 0.10], [0.70, 0.10, 0.20], [0.10, 0.80, 0.10], [0.50, 0.25, 0.25]])
LABELS = np.array([0, 1, 1, 0])
LOGITS = np.log(PROBABILITIES)


def test_confusion_and_accuracy_by_class():
    result = diagnostics.diagnose(LOGITS, LABELS)
    assert result["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]  # rows: the true class
    assert result["per_class"] == [1.0, 0.5, None]
    assert json.loads(json.dumps(result)) == result


def test_reliability_by_hand():
    # Bins of 1/15: 0.7 is in (10/15, 11/15], number 10; 0.8 = 12/15 is on an edge: number 11; 0.5 is number 7.
    result = diagnostics.reliability(LOGITS, LABELS)
    assert result["count"] == [0] * 7 + [1, 0, 0, 2, 1, 0, 0, 0]
    assert result["confidence"][10] == pytest.approx(0.7) and result["accuracy"][10] == 0.5
    assert result["confidence"][7] == pytest.approx(0.5) and result["accuracy"][7] == 1.0
    assert result["confidence"][0] is None and result["accuracy"][0] is None


def test_reliability_holds_the_calibration_error():
    rng = np.random.default_rng(0)
    logits, labels = 2 * rng.normal(size=(500, 5)), rng.integers(0, 5, 500)
    result = diagnostics.reliability(logits, labels)
    gaps = [
        n * abs(c - a) for n, c, a in zip(result["count"], result["confidence"], result["accuracy"], strict=True) if n
    ]
    assert sum(gaps) / 500 == pytest.approx(metrics.measure(logits, labels)["ece"])


def test_entropy():
    assert diagnostics.entropy(np.zeros((3, 10))) == pytest.approx(np.log(10))
    assert diagnostics.entropy(np.array([[1000.0, 0.0]])) == 0
    assert diagnostics.entropy(np.log([[0.8, 0.2]])) == pytest.approx(-0.8 * np.log(0.8) - 0.2 * np.log(0.2))
    # At T = 2 the odds of 4 to 1 become 2 to 1.
    assert diagnostics.entropy(np.log([[0.8, 0.2]]), 2.0) == pytest.approx(np.log(3) - 2 / 3 * np.log(2))
    result = diagnostics.diagnose(LOGITS, LABELS, temperature=2.0)["entropy_at"]
    assert result == {"temperature": 2.0, "entropy": diagnostics.entropy(LOGITS, 2.0)}


def test_agreement_by_class():
    teacher = np.log(PROBABILITIES[[0, 2, 2, 2]])  # predicts 0, 1, 1, 1; the model predicts 0, 0, 1, 0
    assert diagnostics.diagnose(LOGITS, LABELS, teacher)["agreement_per_class"] == [0.5, 0.5, None]


def test_the_fit_temperature_undoes_a_scaling():
    """Two classes, logits (z, 0): of 4 examples with odds 3 to 1, three are of the first class. The best T is 1."""
    logits, labels = np.tile([np.log(3.0), 0.0], (4, 1)), np.array([0, 0, 0, 1])
    for factor in (0.5, 1.0, 4.0):
        assert diagnostics.fit_temperature(logits * factor, labels) == pytest.approx(factor, rel=1e-9)


def test_the_fit_temperature_is_bounded():
    logits = np.array([[4.0, 0.0], [4.0, 0.0]])
    assert diagnostics.fit_temperature(logits, np.array([0, 0])) == diagnostics.MIN_TEMPERATURE  # never wrong
    assert diagnostics.fit_temperature(logits, np.array([1, 1])) == diagnostics.MAX_TEMPERATURE  # never right


def test_scaling_corrects_overconfidence():
    rng = np.random.default_rng(1)
    truth = rng.normal(size=(4000, 4))
    labels = np.array([rng.choice(4, p=row) for row in np.exp(metrics.log_softmax(truth))])
    result = diagnostics.temperature_scaling((5 * truth[:2000], labels[:2000]), (5 * truth[2000:], labels[2000:]))
    assert result["temperature"] == pytest.approx(5, rel=0.1) and result["at_bound"] is False
    assert result["after"]["ece"] < 0.06 < result["before"]["ece"]
    assert result["after"]["nll"] < result["before"]["nll"]
    assert sum(result["before"]["reliability"]["count"]) == sum(result["after"]["reliability"]["count"]) == 2000


def network():
    image = keras.Input((4, 4, 1))
    x = layers.Conv2D(3, 3, name="conv", kernel_initializer="ones")(image)
    x = layers.ReLU(name="relu")(x)
    x = layers.Flatten()(x)
    x = layers.Dense(4, activation="relu", name="dense", kernel_initializer="ones")(x)
    x = layers.LeakyReLU(name="leaky")(layers.Dense(5, name="plain", kernel_initializer="ones")(x))
    return keras.Model(image, layers.Dense(2, name="out")(x))


def test_dead_units_are_counted_by_layer():
    model = network()
    model.get_layer("conv").bias.assign([0.0, -1e6, 0.0])  # one of 3 channels can never be active
    model.get_layer("dense").bias.assign([-1e9, 0.0, -1e9, -1e9])
    images = np.full((300, 4, 4, 1), 100, np.uint8)
    result = diagnostics.dead_units(model, images)
    assert result["layers"] == {"relu": {"units": 3, "dead": 1}, "dense": {"units": 4, "dead": 3}}
    assert result["share"] == pytest.approx(4 / 7) and result["images"] == 300 and result["skipped"] == []


def test_a_model_with_one_layer_of_units():
    one = keras.Sequential([keras.Input((2,)), layers.Dense(3, activation="relu", name="hidden"), layers.Dense(2)])
    one.layers[0].set_weights([np.array([[1.0, -1, 1], [1, -1, -1]]), np.zeros(3)])
    result = diagnostics.dead_units(one, np.ones((2, 2)))
    assert result["layers"] == {"hidden": {"units": 3, "dead": 2}}


def test_a_unit_that_is_active_once_is_not_dead():
    model = network()
    model.get_layer("conv").bias.assign([0.0, -899.5, 0.0])
    images = np.full((300, 4, 4, 1), 99, np.uint8)
    assert diagnostics.dead_units(model, images)["layers"]["relu"]["dead"] == 1
    images[299, 1:, 1:] = 100  # 9 * 100 - 899.5 > 0 at one place of one image, in the last batch
    assert diagnostics.dead_units(model, images)["layers"]["relu"]["dead"] == 0


def test_layers_that_dead_units_cannot_reach_are_reported():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2, activation="relu", name="hidden")])
    image = keras.Input((3,))
    result = diagnostics.dead_units(keras.Model(image, inner(image)), np.zeros((2, 3)))
    assert result["skipped"] == ["hidden"] and result["share"] is None


def test_diagnostics_of_a_run(digits: splits.Splits):
    image = keras.Input((28, 28, 1))
    models = {
        name: keras.Model(image, layers.Dense(10)(layers.Flatten()(layers.Rescaling(1 / 255)(image))))
        for name in ("teacher", "student")
    }
    logits = {name: predict(model, digits.test.images) for name, model in models.items()}
    validation = predict(models["teacher"], digits.validation.images)
    result = diagnostics.diagnose_models(models, digits, 4.0, logits, validation)
    assert result.keys() == {"teacher", "student"}
    assert result["teacher"]["entropy_at"]["temperature"] == 4.0 and "scaling" in result["teacher"]
    assert "scaling" not in result["student"] and len(result["student"]["agreement_per_class"]) == 10
    rows = np.array(result["student"]["confusion"])
    assert rows.sum() == 256 and (rows.sum(axis=1) == np.bincount(digits.test.labels)).all()
    json.dumps(result, allow_nan=False)


def test_what_the_teacher_knows_and_the_control_does_not():
    teacher = np.array([1, 1, 1, 0, 0, 1], bool)
    control = np.array([[1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 1, 1]], bool)
    student = np.array([[1, 1, 0, 0, 0, 1], [1, 1, 1, 1, 0, 0]], bool)
    result = diagnostics.teacher_advantage(teacher, control, student)
    # Seed 0: ahead in 1 and 2, of which the student has 1; behind in 3, which it loses. Seed 1: ahead in 2, which it
    # has; behind in 3 and 4, of which it loses 4.
    assert {name: result[name] for name in ("ahead", "learned", "behind", "lost")} == {
        "ahead": 1.5,
        "learned": 1.0,
        "behind": 1.5,
        "lost": 1.0,
    }
    assert (
        "Of 6 test examples the teacher classifies 1.5 correctly that the control does not, and the student 1 of"
        in (result["sentence"])
    )
