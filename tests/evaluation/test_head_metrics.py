"""Metrics by head against numbers computed by hand, and against slow definitions in other words."""

import itertools

import numpy as np
import pytest

from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.head_metrics import agreement_of, measure_head, per_example, roc_auc
from kdistill.networks.heads import CLASSES, LABELS, NUMBERS, Head

RNG = np.random.default_rng(5)


def one_hot(classes, number):
    return np.eye(number)[np.asarray(classes)]


def test_classes_at_positions_by_hand():
    """Two examples of three positions: labels 0 1 1 and 2 0 (missing), predicted 0 0 1 and 2 2 0."""
    head = Head(CLASSES, "logits", (3, 4))
    outputs, labels = one_hot([[0, 0, 1], [2, 2, 0]], 4), np.array([[0, 1, 1], [2, 0, -1]])
    # Right: 3 of 5. IoU: class 0 has 1 of {right 1, predicted 2, labeled 2} = 1/3, class 1 1/2, class 2 1/2.
    expected = {"accuracy": 3 / 5, "mean_iou": (1 / 3 + 1 / 2 + 1 / 2) / 3}
    forms = (labels, labels[..., None], labels.astype("float32"), np.where(labels < 0, np.nan, labels))
    for form in (*forms, np.where(labels[..., None] < 0, -1, one_hot(labels, 4))):
        assert measure_head(head, outputs, form) == pytest.approx(expected)
    np.testing.assert_allclose(per_example(head, outputs, labels), [2 / 3, 1 / 2])
    # The weight 0 hides a position, and 2 counts twice: 1 right of 3 without the first example's last two.
    weighted = measure_head(head, outputs, labels, np.array([[1, 0, 0], [2, 1, 1]]))
    assert weighted == pytest.approx({"accuracy": 3 / 4, "mean_iou": (1 / 2 + 2 / 3) / 2})
    assert measure_head(head, outputs, labels, np.array([1.0, 0.0]))["accuracy"] == pytest.approx(2 / 3)
    other = one_hot([[0, 1, 1], [2, 2, 1]], 4)
    assert agreement_of(head, outputs, other) == pytest.approx(4 / 6)


def test_independent_labels_by_hand():
    """Scores of label 0: .9 .4 .6 .1 (on, on, off, off); of label 1: .7 .2 (missing) .2, on, off, -, on."""
    outputs = np.array([[0.9, 0.7], [0.4, 0.2], [0.6, 0.3], [0.1, 0.2]])
    labels = np.array([[1, 1], [1, 0], [0, -1], [0, 1]])
    expected = {
        "accuracy": 4 / 7,  # wrong: .4 on, .6 off, .2 on
        "auc": (3 / 4 + 3 / 4) / 2,  # label 0: of the pairs on-off only .4 < .6 is wrong; label 1: .7 > .2, .2 = .2
        "f1": 2 * 2 / (2 * 2 + 1 + 2),  # 2 hits, 1 false alarm, 2 missed
    }
    logits = np.log(outputs / (1 - outputs))
    for kind, numbers in (("probabilities", outputs), ("logits", logits)):
        head = Head(LABELS, kind, (2,))
        assert measure_head(head, numbers, labels) == pytest.approx(expected)
        assert measure_head(head, numbers, np.where(labels < 0, np.nan, labels)) == pytest.approx(expected)
    head = Head(LABELS, "probabilities", (2,))
    assert agreement_of(head, outputs, 1 - outputs) == 0 and agreement_of(head, outputs, logits, "logits") == 1
    binary = Head(LABELS, "probabilities", (1,))
    assert measure_head(binary, outputs[:, :1], labels[:, 0]) == pytest.approx(
        {"accuracy": 1 / 2, "auc": 3 / 4, "f1": 1 / 2}
    )
    assert measure_head(binary, outputs[:, :1], np.ones(4))["auc"] is None
    np.testing.assert_allclose(per_example(head, outputs, labels), [1, 1 / 2, 0, 1 / 2])


def test_numbers_by_hand():
    head = Head(NUMBERS, "numbers", (1,))
    outputs, labels = np.array([[1.0], [2.0], [5.0], [7.0]]), np.array([2.0, 2.0, np.nan, 4.0])
    assert measure_head(head, outputs, labels) == pytest.approx({"mse": 10 / 3, "mae": 4 / 3})
    assert measure_head(head, outputs, labels, np.array([2, 1, 1, 1])) == pytest.approx({"mse": 11 / 4, "mae": 5 / 4})
    assert agreement_of(head, outputs, 3 * outputs + 1) == pytest.approx(1)
    assert agreement_of(head, outputs, -outputs) == pytest.approx(-1)
    assert agreement_of(head, outputs, np.ones((4, 1))) is None
    several = Head(NUMBERS, "numbers", (2, 3))
    a, b = RNG.normal(size=(2, 20, 2, 3))
    expected = np.mean([np.corrcoef(a[..., i].ravel(), b[..., i].ravel())[0, 1] for i in range(3)])
    assert agreement_of(several, a, b) == pytest.approx(expected)
    assert measure_head(several, a, b)["mse"] == pytest.approx(((a - b) ** 2).mean())
    np.testing.assert_allclose(per_example(several, a, b), ((a - b) ** 2).mean((1, 2)))


def test_the_area_under_the_curve_counts_pairs():
    """By definition: over all pairs of one on and one off, the share in which the one that is on is larger."""
    for _ in range(20):
        scores, on = RNG.integers(0, 6, 40).astype(float), RNG.random(40) < 0.3
        weights = RNG.random(40)
        pairs = list(itertools.product(np.flatnonzero(on), np.flatnonzero(~on)))
        wins = [(scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j]) for i, j in pairs]
        assert roc_auc(scores, on) == pytest.approx(np.mean(wins))
        heavy = [weights[i] * weights[j] for i, j in pairs]
        assert roc_auc(scores, on, weights) == pytest.approx(np.average(wins, weights=heavy))
    assert roc_auc(scores, np.ones(40, bool)) is None


def test_mean_iou_is_that_of_sets():
    head = Head(CLASSES, "logits", (5, 5, 3))
    outputs, labels = RNG.normal(size=(6, 5, 5, 3)), RNG.integers(-1, 3, (6, 5, 5))
    predicted, counted = outputs.argmax(-1), labels >= 0
    shares = []
    for c in range(3):
        a, b = (predicted == c) & counted, labels == c
        shares.append((a & b).sum() / (a | b).sum())
    assert measure_head(head, outputs, labels)["mean_iou"] == pytest.approx(np.mean(shares))


@pytest.mark.parametrize(
    "head,outputs,labels,weights,message",
    [
        (
            Head(CLASSES, "logits", (2, 3)),
            (4, 2, 3),
            np.zeros((4, 3)),
            None,
            r"whole numbers \(4, 2\) below 3",
        ),
        (Head(CLASSES, "logits", (2, 3)), (4, 2, 3), np.full((4, 2), 3), None, "received int64 .* from 3 to 3"),
        (Head(CLASSES, "logits", (2, 3)), (4, 2, 3), np.full((4, 2), 0.5), None, "whole numbers"),
        (
            Head(CLASSES, "logits", (2, 3)),
            (4, 2, 3),
            np.full((4, 2), -1),
            None,
            "Every label of the output",
        ),
        (Head(LABELS, "logits", (3,)), (4, 3), np.zeros(4), None, "labels of its shape; received"),
        (Head(LABELS, "logits", (3,)), (4, 3), np.full((4, 3), 2), None, "labels that are 0 or 1"),
        (Head(NUMBERS, "numbers", (1,)), (4, 1), np.full(4, np.nan), None, "Every label .* is missing"),
        (Head(NUMBERS, "numbers", (1,)), (4, 1), np.array(list("abcd")), None, "labels that are numbers"),
        (Head(NUMBERS, "numbers", (1,)), (4, 1), np.zeros(4), np.ones(3), "The weights of the output 'output' expect"),
        (Head(NUMBERS, "numbers", (1,)), (4, 1), np.zeros(4), -np.ones(4), "numbers from 0"),
    ],
)
def test_labels_that_do_not_fit_are_refused(head, outputs, labels, weights, message):
    with pytest.raises(InputError, match=message):
        measure_head(head, np.zeros(outputs), labels, weights)


def test_outputs_that_are_not_finite():
    with pytest.raises(CheckFailed, match="The output 'price' is not finite .* for 1 of 4 examples"):
        measure_head(Head(NUMBERS, "numbers", (1,)), np.array([[1], [np.inf], [2], [3]]), np.zeros(4), name="price")
