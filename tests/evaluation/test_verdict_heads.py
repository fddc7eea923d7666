"""The verdict on other metrics than accuracy: positions and labels, and numbers of which less is better."""

import numpy as np
import pytest

from kdistill.evaluation.head_metrics import per_example
from kdistill.evaluation.verdict import bootstrap, judge, paired_t
from kdistill.networks.heads import CLASSES, NUMBERS, Head

RNG = np.random.default_rng(11)


def test_the_bootstrap_agrees_with_the_t_interval_of_many_examples():
    """Both estimate the same mean; of 400 examples their intervals differ by a few percent of the width."""
    control, student = RNG.random((2, 400))
    student = student * 0.9 + 0.12
    low, high, p = bootstrap(student, control)
    expected_low, expected_high, expected_p = paired_t(list(student - control))
    width = expected_high - expected_low
    assert low == pytest.approx(expected_low, abs=0.05 * width) and high == pytest.approx(
        expected_high, abs=0.05 * width
    )
    assert p == pytest.approx(expected_p, abs=0.01)
    assert bootstrap(student, control) == (low, high, p)
    mirrored = bootstrap(control, student)
    assert mirrored[:2] == pytest.approx((-high, -low)) and mirrored[2] == p


def test_the_bootstrap_covers_the_true_mean_as_often_as_it_says():
    covered = 0
    for _ in range(100):
        differences = RNG.normal(0.1, 1, 60)
        low, high, _ = bootstrap(differences, np.zeros(60))
        covered += low <= 0.1 <= high
    assert 88 <= covered <= 99  # 95 of 100, within three standard deviations


def test_equal_and_missing_scores():
    same = RNG.random(50)
    assert bootstrap(same, same) == (0.0, 0.0, 1.0)
    some = np.where(np.arange(50) < 10, np.nan, same)
    assert bootstrap(some, some - 0.5) == pytest.approx((0.5, 0.5, 2 / 10_001))
    with pytest.raises(ValueError, match="No example has a score"):
        bootstrap(np.full(3, np.nan), np.zeros(3))


def test_one_seed_of_positions():
    head, labels = Head(CLASSES, "logits", (8, 3)), RNG.integers(0, 3, (200, 8))

    def outputs(share):
        wrong = RNG.random(labels.shape) > share
        return np.eye(3)[np.where(wrong, (labels + 1) % 3, labels)]

    scores = [per_example(head, outputs(share), labels) for share in (0.9, 0.8)]
    accuracies = [[float(part.mean())] for part in scores]
    verdict = judge(*accuracies, 200, scores=tuple(scores))
    assert verdict["word"] == "BETTER" and verdict["test"] == "paired bootstrap over test examples"
    assert 0 < verdict["low"] < verdict["difference"] < verdict["high"] and verdict["p"] < 0.01
    assert "for other test examples, not other seeds" in verdict["sentence"] and "metric" not in verdict
    assert judge(*accuracies[::-1], 200, scores=tuple(scores[::-1]))["word"] == "WORSE"
    with pytest.raises(ValueError, match="or `scores`"):
        judge(*accuracies, 200)


def test_less_is_better_of_squared_errors():
    head, labels = Head(NUMBERS, "numbers", (1,)), RNG.normal(size=(300, 1))
    scores = [per_example(head, labels + RNG.normal(0, error, labels.shape), labels) for error in (0.5, 0.8)]
    means = [[float(part.mean())] for part in scores]
    verdict = judge(*means, 300, scores=tuple(scores), metric="mse")
    assert verdict["word"] == "BETTER" and verdict["high"] < 0 and verdict["metric"] == "mse"
    assert verdict["sentence"].startswith("BETTER on these examples: mse distilled 0.2")
    seeds = judge([0.2, 0.21, 0.19], [0.4, 0.43, 0.41], 300, metric="mse")
    assert seeds["word"] == "BETTER" and "ahead for 3 of 3 seeds" in seeds["sentence"]
    assert judge([0.4, 0.43, 0.41], [0.2, 0.21, 0.19], 300, metric="mse")["word"] == "WORSE"
    equal = judge([0.40001, 0.4, 0.4], [0.4, 0.4, 0.40001], 300, metric="mse", margin=0.01)
    assert equal["word"] == "EQUIVALENT" and equal["margin"] == pytest.approx(0.004, rel=1e-4)
