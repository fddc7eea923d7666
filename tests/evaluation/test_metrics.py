"""Every number against one worked out by hand, and none of them shaken by large logits."""

import numpy as np
import pytest

from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.metrics import agreement, log_softmax, measure
from kdistill.networks.heads import are_probabilities


def logits_of(*probabilities):
    return np.log(np.array(probabilities))


def test_accuracy_and_calibration_by_hand():
    logits = logits_of([0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9])
    metrics = measure(logits, np.array([0, 1, 1, 1]))
    assert metrics["accuracy"] == 0.75
    # Confidences .9 .8 .7 .9; right: 1 0 1 1. Bins of 1/15: (.9, .9) | .8 | .7
    assert metrics["ece"] == pytest.approx((abs(2 - 1.8) + abs(0 - 0.8) + abs(1 - 0.7)) / 4)
    assert metrics.keys() == {"accuracy", "top5", "ece"}


def test_calibration_averages_within_a_bin_before_it_takes_the_size():
    # Both confidences (.71, .72) are in the bin from 10/15 to 11/15; one right, one wrong.
    metrics = measure(logits_of([0.71, 0.29], [0.72, 0.28]), np.array([0, 1]))
    assert metrics["ece"] == pytest.approx(abs(1 - 1.43) / 2)


def test_a_confidence_of_one_is_in_the_last_bin():
    metrics = measure(np.array([[500.0, -500.0]]), np.array([0]))
    assert metrics == {"accuracy": 1.0, "top5": 1.0, "ece": 0.0}


def test_kl_and_agreement_by_hand():
    student, teacher = logits_of([0.5, 0.5], [0.25, 0.75]), logits_of([0.8, 0.2], [0.25, 0.75])
    metrics = measure(student, np.array([0, 1]), teacher)
    expected = (0.8 * np.log(0.8 / 0.5) + 0.2 * np.log(0.2 / 0.5)) / 2
    assert metrics["kl"] == pytest.approx(expected)
    assert metrics["agreement"] == 1.0
    swapped = measure(teacher, np.array([0, 1]), student)
    assert swapped["kl"] == pytest.approx((0.5 * np.log(0.5 / 0.8) + 0.5 * np.log(0.5 / 0.2)) / 2)
    assert agreement(student[[0, 1]], student[[1, 1]]) == 0.5


def test_large_logits_and_a_shift_change_nothing():
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(size=(2, 40, 10)) * 100
    labels = rng.integers(0, 10, 40)
    plain = measure(logits, labels, teacher)
    assert all(np.isfinite(value) for value in plain.values())
    assert measure(logits + 1000, labels, teacher - 1000) == pytest.approx(plain, abs=1e-9)
    np.testing.assert_allclose(np.exp(log_softmax(logits.astype("float32"))).sum(axis=1), 1, atol=1e-12)


def test_the_teacher_has_no_distance_to_itself():
    logits = np.random.default_rng(1).normal(size=(30, 7)).astype("float32")
    metrics = measure(logits, np.zeros(30, int), logits)
    assert (metrics["agreement"], metrics["kl"]) == (1.0, 0.0)


def test_top5_counts_ranks_and_ties_go_to_the_lower_class():
    logits = np.array([[6.0, 5, 4, 3, 2, 1, 0]] * 4)
    assert measure(logits, np.array([0, 4, 5, 6]))["top5"] == 0.5
    equal = np.zeros((7, 7))
    metrics = measure(equal, np.arange(7))
    assert (metrics["accuracy"], metrics["top5"]) == (1 / 7, 5 / 7)


@pytest.mark.parametrize("classes", [2, 5])
def test_top5_of_few_classes_is_one(classes):
    assert measure(np.eye(classes), np.zeros(classes, int))["top5"] == 1.0


def test_probabilities_are_measured_as_the_logits_behind_them():
    logits = np.random.default_rng(2).normal(size=(50, 6))
    labels, teacher = np.arange(50) % 6, np.random.default_rng(3).normal(size=(50, 6))
    plain = measure(logits, labels, teacher)
    assert measure(np.exp(log_softmax(logits)), labels, teacher, probabilities=True) == pytest.approx(plain)
    rounded = measure(np.eye(6)[labels], labels, teacher, probabilities=True)  # exact zeros, as int8 files give
    assert np.isfinite(rounded["kl"]) and rounded["accuracy"] == 1.0


def test_distributions_are_told_from_logits():
    logits = np.random.default_rng(4).normal(size=(20, 5))
    assert are_probabilities(np.exp(log_softmax(logits)))
    assert not are_probabilities(logits)
    assert not are_probabilities(abs(logits))
    assert not are_probabilities(np.zeros((0, 5)))


def test_what_does_not_fit_is_refused():
    logits = np.zeros((3, 4))
    with pytest.raises(InputError, match=r"received \(3, 4\) and \(2,\)"):
        measure(logits, np.zeros(2, int))
    with pytest.raises(InputError, match=r"received \(0, 4\)"):
        measure(np.zeros((0, 4)), np.zeros(0, int))
    with pytest.raises(InputError, match="from 0 to 4"):
        measure(logits, np.array([0, 4, 1]))
    with pytest.raises(InputError, match="whole numbers"):
        measure(logits, np.zeros(3))
    with pytest.raises(InputError, match="teacher_logits"):
        measure(logits, np.zeros(3, int), np.zeros((3, 5)))
    broken = np.array([[0, np.nan], [1, 2], [np.inf, 0]])
    with pytest.raises(CheckFailed, match="2 of 3 images"):
        measure(broken, np.zeros(3, int))
    with pytest.raises(CheckFailed, match="teacher's outputs"):
        measure(np.zeros((3, 2)), np.zeros(3, int), broken)
