"""The best setting of a sweep against the others: by hand, and how often the true best is left out by simulation."""

import numpy as np
import pytest

from kdistill.evaluation import picks
from kdistill.evaluation.chance import drop_p_value
from kdistill.evaluation.verdict import paired_t


def test_one_seed_compares_images():
    best = np.ones(200, bool)
    worse, near = best.copy(), best.copy()
    worse[:30] = False
    near[:2] = False
    correct = {"a": best, "b": worse, "c": near}
    accuracies = {name: [float(values.mean())] for name, values in correct.items()}
    compared = picks.compare_with_best("a", accuracies, 200, correct)
    assert compared["equal"] == ["c"] and compared["level"] == 0.025
    assert compared["p"] == {"b": drop_p_value(30, 0, 200), "c": drop_p_value(2, 0, 200)}
    assert compared["sentence"] == (
        "Chance explains the lead of a over 1 of 2 other settings, on 200 validation images (paired tests over the "
        "images, one seed; 5 % over all 2 comparisons, Bonferroni): c."
    )
    with pytest.raises(ValueError, match="need `correct`"):
        picks.compare_with_best("a", accuracies, 200)


def test_several_seeds_compare_in_pairs():
    accuracies = {"a": [0.95, 0.94, 0.96], "b": [0.90, 0.89, 0.91], "c": [0.94, 0.95, 0.95], "d": [0.97, 0.95, 0.97]}
    compared = picks.compare_with_best("a", accuracies, 1000)
    p = paired_t([0.01, -0.01, 0.01], 0.001)[2]
    assert compared["p"]["c"] == pytest.approx(p / 2) and compared["p"]["d"] > 0.9
    assert compared["equal"] == ["c", "d"] and compared["level"] == pytest.approx(0.05 / 3)
    assert "paired t-tests over 3 seeds" in compared["sentence"]


def test_the_only_setting_and_a_clear_winner():
    assert picks.compare_with_best("a", {"a": [0.9, 0.91]}, 100)["sentence"] == "a is the only setting."
    clear = picks.compare_with_best("a", {"a": [0.9, 0.91, 0.92], "b": [0.5, 0.51, 0.52]}, 1000)
    assert clear["equal"] == [] and clear["sentence"].startswith("a is ahead of all 1 other settings beyond chance")


def test_many_equal_settings_are_counted():
    accuracies = {f"t={i}": [0.9, 0.91, 0.9 + i / 1000] for i in range(9)}
    assert "t=4 and 3 more." in picks.compare_with_best("t=8", accuracies, 1000)["sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", (1, 4))
def test_the_true_best_is_seldom_left_out(seeds):
    """Six settings, of which the first is truly the best by next to nothing: left out in at most 5 %."""
    random, settings, images, experiments, missed = np.random.default_rng(seeds), 6, 200, 150, 0
    shares = np.full(settings, 0.9)
    shares[0] += 1e-6
    for _ in range(experiments):
        correct = random.random((settings, seeds, images)) < shares[:, None, None]
        names = [str(place) for place in range(settings)]
        accuracies = dict(zip(names, correct.mean(axis=2).tolist(), strict=True))
        best = max(names, key=lambda name: sum(accuracies[name]))
        by_name = dict(zip(names, correct[:, 0], strict=True)) if seeds == 1 else None
        compared = picks.compare_with_best(best, accuracies, images, by_name)
        missed += best != "0" and "0" not in compared["equal"]
    assert missed / experiments <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / experiments)
