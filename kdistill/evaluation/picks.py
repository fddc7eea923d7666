"""Is the best setting of a sweep ahead of the others, or is it the luckiest of many?

The best of many settings looks better than it is. So every other setting is compared with it, at a level that counts
the comparisons (Bonferroni): 5 % divided by their number. The settings that are not behind beyond chance, and the best
itself, contain the setting that is truly the best with a probability of 95 % (subset selection: Gupta 1965,
Technometrics 7:225): the true best is left out only if another one is ahead of it by luck, and each is with the
divided level at most.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from kdistill.evaluation.chance import LEVEL, drop_p_value
from kdistill.evaluation.verdict import paired_t

NAMED = 5  # settings in the sentence


def compare_with_best(
    best: str, accuracies: Mapping[str, Sequence[float]], images: int, correct: Mapping[str, np.ndarray] | None = None
) -> dict:
    """Which settings chance does not distinguish from the best one.

    Args:
        best: the name of the picked setting.
        accuracies: by setting, the accuracy of each seed on the images that picked it, shares of 1.
        images: the number of these images.
        correct: with one seed, by setting, whether each image is classified correctly, bool `[n]`.

    Returns a JSON-ready dict: test, level (of one comparison), p (by setting, one-sided, of the hypothesis that it is
    as good as the best), equal (the settings whose p is above the level) and sentence.

    Over several seeds the test is the paired t-test of the verdict. With one seed it is that of `chance.drop_p_value`,
    which compares the models and not the settings: the sentence states it.
    """
    others = [name for name in accuracies if name != best]
    seeds = len(accuracies[best])
    if seeds > 1:
        p_values = {name: _one_sided(accuracies[best], accuracies[name], images) for name in others}
        test = f"paired t-tests over {seeds} seeds"
    elif correct is not None:
        p_values = {name: _paired(correct[best], correct[name]) for name in others}
        test = "paired tests over the images, one seed"
    else:
        raise ValueError("Accuracies of one seed need `correct`, the images that each setting classifies correctly.")
    level = LEVEL / max(1, len(others))
    equal = [name for name in others if p_values[name] > level]
    comparison = {"test": test, "level": level, "p": p_values, "equal": equal}
    return {**comparison, "sentence": _sentence(best, comparison, images)}


def _one_sided(best: Sequence[float], other: Sequence[float], images: int) -> float:
    differences = [b - o for b, o in zip(best, other, strict=True)]
    p_value = paired_t(differences, 1 / images)[2]
    return p_value / 2 if math.fsum(differences) > 0 else 1 - p_value / 2


def _paired(best: np.ndarray, other: np.ndarray) -> float:
    return drop_p_value(int((best & ~other).sum()), int((other & ~best).sum()), len(best))


def _sentence(best: str, comparison: dict, images: int) -> str:
    equal, others = comparison["equal"], len(comparison["p"])
    if not others:
        return f"{best} is the only setting."
    method = f"on {images:,} validation images ({comparison['test']}; 5 % over all {others} comparisons, Bonferroni)"
    if not equal:
        return f"{best} is ahead of all {others} other settings beyond chance, {method}."
    more = f" and {len(equal) - NAMED} more" if len(equal) > NAMED else ""
    return (
        f"Chance explains the lead of {best} over {len(equal)} of {others} other settings, {method}: "
        f"{'; '.join(equal[:NAMED])}{more}."
    )
