"""Whether a change of the inputs makes a trained model better than chance explains. Needs no TensorFlow."""

import math

import numpy as np

MIN_GAIN = 0.1  # of accuracy, for another range to be suggested
BY_CHANCE = 0.001  # the probability that a model that has learned nothing gets another range suggested


def little_above_chance(classes: int) -> float:
    """An accuracy, a share of 1, below which a model has learned next to nothing: twice chance where that is little."""
    return min(2 / classes, (1 + 1 / classes) / 2)


def better(own: np.ndarray, results: dict, labels: np.ndarray, outputs: int):
    """The key of the results that are much better than a model's own, and not by chance; None if there are none.

    A network without training classifies a few images more with one range than with another. A sign test over the
    images that only one of the two gets right tells this from a range that is missing.

    Args:
        own: Which of the images the model classifies correctly, `[n]` booleans.
        results: The same with each of several changes.
        labels: classes `[n]`.
        outputs: The model's classes; those of these labels may be fewer.
    """
    best = max(results, key=lambda key: results[key].mean(), default=None)
    if best is None:
        return None
    classes = min(outputs, len(np.unique(labels)))
    if results[best].mean() <= max(own.mean() + MIN_GAIN, little_above_chance(classes)):
        return None
    gained, discordant = int((results[best] & ~own).sum()), int((results[best] != own).sum())
    by_chance = sum(math.comb(discordant, count) for count in range(gained, discordant + 1)) / 2**discordant
    return best if len(results) * by_chance < BY_CHANCE else None
