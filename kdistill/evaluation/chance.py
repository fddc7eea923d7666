"""What chance allows: whether a loss on so many examples is larger than a limit, or only looks so.

Every test is one-sided at `LEVEL`. It asks: if the true loss were exactly the limit, how probable is a measurement that
is at least as bad as this one? Only if that is improbable has the loss exceeded the limit.
"""

import math

LEVEL = 0.05  # of the one-sided tests
TAIL = 1e-12  # probability that a sum may leave out


def drop_p_value(lost: int, gained: int, images: int, limit: float = 0.0) -> float:
    """P(a drop at least as large as `lost - gained` images), if the true drop of accuracy were exactly `limit`.

    The test is paired: both models see the same images, and only those count that one of them alone classifies
    correctly. It is exact, except that the share of such images, which is unknown, is the most probable one under the
    limit (the restricted maximum likelihood of Nam 1997, Biometrics 53:1422). With `limit` 0 it asks whether the second
    model is worse than the first at all.

    Args:
        lost: The images that only the first model (such as a Keras model) classifies correctly.
        gained: The images that only the second model (such as its file) classifies correctly.
        images: All images.
        limit: A share of 1, from 0.
    """
    import numpy as np
    from scipy.stats import binom  # here, because scipy takes a second to import

    drop, share = lost - gained, _share_gained(lost, gained, images, limit)
    discordant = min(1.0, limit + 2 * share)
    if discordant == 0:
        return float(drop <= 0)
    first, last = binom.ppf(TAIL, images, discordant), binom.isf(TAIL, images, discordant)
    counts = np.arange(max(0, int(first) - 1), min(images, int(last) + 1) + 1)
    # lost - gained >= drop, with lost + gained = count, means lost >= (count + drop) / 2.
    tails = binom.sf(np.ceil((counts + drop) / 2) - 1, counts, min(1.0, (limit + share) / discordant))
    return float(min(1.0, (binom.pmf(counts, images, discordant) * tails).sum()))


def _share_gained(lost: int, gained: int, images: int, limit: float) -> float:
    """The most probable true share of images that only the second model gets right, where the drop is `limit`.

    With the share q, the likelihood is (q + limit)^lost * q^gained * (1 - 2 q - limit)^(the other images).
    """
    linear = (lost + gained) * (1 + limit) - 2 * limit * (gained + images)
    root = math.sqrt(linear**2 + 8 * images * gained * limit * (1 - limit))
    return min((1 - limit) / 2, max(0.0, (linear + root) / (4 * images)))


def agreement_p_value(same: int, images: int, limit: float) -> float:
    """P(`same` images or fewer on which two models agree), if their true agreement were exactly `limit`."""
    from scipy.stats import binom

    return float(binom.cdf(same, images, limit))


def smallest_drop(images: int, limit: float) -> int | None:
    """The fewest lost images, with none gained, that exceed the limit beyond chance. None: not even all of them do.

    This is what so many images can show at best: a smaller loss can be chance.
    """
    low, high = math.floor(limit * images + 1e-9) + 1, images + 1
    while low < high:  # a larger loss is less probable
        middle = (low + high) // 2
        low, high = (low, middle) if drop_p_value(middle, 0, images, limit) <= LEVEL else (middle + 1, high)
    return low if low <= images else None


def largest_disagreement(images: int, limit: float) -> int:
    """The most images on which two models may differ before their agreement is below the limit beyond chance."""
    from scipy.stats import binom

    # The most that agree although agreement is refused: P(X <= same) <= LEVEL.
    same = int(binom.ppf(LEVEL, images, limit))
    same -= agreement_p_value(same, images, limit) > LEVEL
    return images - same - 1


def resolution(images: int, max_drop: float, min_agreement: float) -> str:
    """What so many images can show at best, in a sentence."""
    lost, differing = smallest_drop(images, max_drop), largest_disagreement(images, min_agreement) + 1
    drop = (
        f"a loss of accuracy from {lost:,} images ({100 * lost / images:.3g} points) on"
        if lost
        else "no loss of accuracy"
    )
    differs = (
        f"a disagreement from {differing:,} images ({100 * differing / images:.3g} %) on"
        if differing <= images
        else "no disagreement"
    )
    return f"{images:,} images can show {drop}, and {differs}; less can be chance."
