"""How often one may look: boundaries for a paired t-test that is repeated as seeds are added.

A test at 5 % after each of eight looks is wrong in far more than 5 % of all experiments. Alpha spending (Lan and DeMets
1983, Biometrika 70:659) divides the 5 % among the looks: after a share `t` of the planned seeds, `alpha * t^2` is spent
(Kim and DeMets 1987, Biometrika 74:149). Large effects are decided early, and the last look keeps most of the
power.

The usual boundaries are those of a normal statistic. For the t-statistic of three seeds they are too small: wrong in
6 % instead of 5 %. But t-statistics without an effect have a distribution without unknowns, so the boundaries are taken
from that distribution: simulated, with a fixed seed.
"""

import math
from functools import cache

import numpy as np

EXPERIMENTS = 400_000  # simulated; the level of each look is then right to about 2 %, relative


def spent(share: float, alpha: float) -> float:
    """The part of `alpha` that is spent when this share of the planned seeds has been trained."""
    return alpha * share**2


@cache
def levels(looks: tuple[int, ...], alpha: float = 0.05) -> tuple[float, ...]:
    """The two-sided level of the t-test at each look, so that all looks together are wrong with probability `alpha`.

    `looks`: numbers of seeds, ascending, such as `(3, 4, 5)`. A single look has the level `alpha`.
    """
    if len(looks) == 1:
        return (alpha,)
    from scipy.stats import t

    samples = np.random.default_rng(0).standard_normal((EXPERIMENTS, looks[-1]))
    sums, squares = samples.cumsum(axis=1), (samples**2).cumsum(axis=1)
    undecided, before, result = np.ones(EXPERIMENTS, bool), 0.0, []
    for n in looks:
        mean = sums[:, n - 1] / n
        deviation = np.sqrt(np.maximum(squares[:, n - 1] - n * mean**2, 1e-300) / (n - 1))
        statistics = np.abs(mean) / (deviation / math.sqrt(n))
        now = spent(n / looks[-1], alpha)
        count = round((now - before) * EXPERIMENTS)  # experiments that may be decided wrongly at this look
        boundary = np.partition(statistics[undecided], -count)[-count]
        undecided &= statistics < boundary
        before = now
        result.append(2 * float(t.sf(boundary, n - 1)))
    return tuple(result)
