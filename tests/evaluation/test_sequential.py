"""Boundaries of repeated tests: all looks together are wrong as often as one test would be."""

import math

import numpy as np
import pytest
import scipy.stats

from kdistill.evaluation.verdict import levels, spent

LOOKS = tuple(range(3, 11))


def rejected(effect: float, alpha: float, looks=LOOKS, experiments: int = 100_000) -> np.ndarray:
    """The share of experiments that are decided by each look, of an effect in standard deviations."""
    samples = np.random.default_rng(7).normal(effect, 1, (experiments, looks[-1]))
    decided, shares = np.zeros(experiments, bool), []
    for n, level in zip(looks, levels(looks, alpha), strict=True):
        mean, deviation = samples[:, :n].mean(axis=1), samples[:, :n].std(axis=1, ddof=1)
        decided |= 2 * scipy.stats.t.sf(np.abs(mean) / deviation * math.sqrt(n), n - 1) < level
        shares.append(decided.mean())
    return np.array(shares)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.05, 0.1])
@pytest.mark.parametrize("looks", [LOOKS, (2, 3), (5, 6, 20)])
def test_without_an_effect_each_look_spends_what_it_may(alpha, looks):
    expected = [spent(n / looks[-1], alpha) for n in looks]
    np.testing.assert_allclose(rejected(0, alpha, looks), expected, atol=0.003)


@pytest.mark.slow
def test_a_large_effect_is_decided():
    shares = rejected(2, 0.05)
    assert shares[-1] > 0.99 and shares[2] > 0.3  # half of the looks are not needed


def test_one_look_is_the_usual_test():
    assert levels((5,)) == (0.05,) and levels((5,), 0.1) == (0.1,)


def test_repeated_tests_at_5_percent_would_be_wrong_more_often():
    samples = np.random.default_rng(7).normal(0, 1, (20_000, 10))
    wrong = np.zeros(20_000, bool)
    for n in LOOKS:
        mean, deviation = samples[:, :n].mean(axis=1), samples[:, :n].std(axis=1, ddof=1)
        wrong |= 2 * scipy.stats.t.sf(np.abs(mean) / deviation * math.sqrt(n), n - 1) < 0.05
    assert wrong.mean() > 0.1
