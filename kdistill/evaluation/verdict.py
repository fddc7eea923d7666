"""Did distillation help? BETTER, WORSE, EQUIVALENT or UNDECIDED, from a paired test with its interval.

Two or more seeds: Student's paired t-test on the differences student minus control, seed by seed. Student and control
of a seed share initial weights, data and order, so their difference is the effect of the teacher. The interval covers
new seeds, on these test images. EQUIVALENT means that two one-sided tests (Schuirmann 1987, J. Pharmacokin. Biopharm.
15:657) reject a difference of the margin or more. Where seeds are added until the verdict is clear, the levels are
those of `levels`, so that all looks together are wrong in at most 5 % of the experiments.

One seed: there is no spread over seeds. McNemar's test with the mid-p value (Fagerland, Lydersen, Laake 2013, BMC
Medical Research Methodology 13:91) compares the two models on the images that only one of them classifies correctly.
The interval covers new test images, not new seeds, and headline and sentence state that. Where an example is more than
right or wrong (shares of positions or labels, squared errors of numbers), the test is a paired bootstrap over examples
(Efron and Tibshirani 1993, chapter 13).

Looking repeatedly: boundaries for a paired t-test that is repeated as seeds are added. A test at 5 % after each of 8
looks is wrong in far more than 5 % of all experiments. Alpha spending (Lan and DeMets 1983, Biometrika 70:659) divides
the 5 % among the looks: after a share `t` of the planned seeds, `alpha * t^2` is spent (Kim and DeMets 1987, Biometrika
74:149). Large effects are decided early, and the last look keeps most of the power. The usual boundaries are those of a
normal statistic. For the t-statistic of three seeds they are too small: wrong in 6 % instead of 5 %. But t-statistics
without an effect have a distribution without unknowns, so the boundaries are taken from that distribution: simulated,
with a fixed seed.
"""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np

from kdistill.evaluation.head_metrics import LOWER_IS_BETTER

ALPHA = 0.05  # of the two-sided test for a difference, and of each one-sided test for equivalence
MARGIN = 0.002  # differences smaller than this share count as equal
POWER = 0.8  # with which more seeds would decide
MOST_SEEDS = 200  # more are not proposed
RESAMPLES, MOST_DRAWS = 10_000, 10_000_000  # of a bootstrap: means, and examples drawn at once
EXPERIMENTS = 400_000  # simulated; the level of each look is then right to about 2 %, relative


def judge(
    student: Sequence[float],
    control: Sequence[float],
    images: int,
    discordant: tuple[int, int] | None = None,
    *,
    scores: tuple[np.ndarray, np.ndarray] | None = None,
    metric: str = "accuracy",
    margin: float = MARGIN,
    looks: Sequence[int] = (),
) -> dict:
    """The verdict on test accuracies, or on another main metric of a head (`head_metrics.MAIN_METRIC`).

    Args:
        student, control: accuracies by seed, shares of 1; or what `metric` says.
        images: the number of test images.
        discordant: with one seed, how many images only the student and only the control classify correctly.
        scores: with one seed, where examples are not just right or wrong: the metric of each test example for student
            and control, `[n]` each, as `head_metrics.per_example` returns it (NaN: without a label).
        metric: `accuracy`, or `mse` and `mae`, of which less is better; then verdict["metric"] is its name.
        margin: a share of 1, of `mse` and `mae` a share of the control's; smaller differences count as equal.
        looks: the planned numbers of seeds after which a verdict is taken, if seeds are added until one is clear.

    Returns a JSON-ready dict: word, headline, unit ("seeds" or "test images"), test, seeds, student and control
    (accuracies by seed), difference (the mean of student minus control), low and high (its interval), level (of the
    interval), p, margin, more_seeds (the number that would likely decide, None if that is over 200 or not needed) and
    sentence.
    """
    if len(student) != len(control) or not student:
        raise ValueError(f"Expected as many student as control accuracies, received {len(student)} and {len(control)}.")
    differences = [s - c for s, c in zip(student, control, strict=True)]
    seeds, more = len(differences), None
    better, smallest = (-1 if metric in LOWER_IS_BETTER else 1), 1 / images
    if better < 0:
        margin, smallest = margin * math.fsum(control) / seeds, 0.0
    alpha, equal_alpha = _levels(seeds, tuple(looks))
    if seeds > 1:
        low, high, p = paired_t(differences, smallest, 1 - alpha)
        inner = paired_t(differences, smallest, 1 - equal_alpha)[:2]
        unit, test = "seeds", "paired t-test over seeds"
    elif discordant is not None:
        low, high, p = mcnemar(*discordant, images, 1 - alpha)
        inner = mcnemar(*discordant, images, 1 - equal_alpha)[:2]
        unit, test = "test images", "McNemar's mid-p test over test images"
    elif scores is not None:
        low, high, p = bootstrap(*scores, 1 - alpha)
        inner = bootstrap(*scores, 1 - equal_alpha)[:2]
        unit, test = "test examples", "paired bootstrap over test examples"
    else:
        raise ValueError(
            "Accuracies of one seed need `discordant`, the images that only one model classifies correctly, or "
            "`scores`."
        )
    ahead, behind = (low > 0, high < 0) if better > 0 else (high < 0, low > 0)
    word = "BETTER" if ahead else "WORSE" if behind else "UNDECIDED"
    if word == "UNDECIDED" and -margin < inner[0] and inner[1] < margin:
        word, low, high, alpha = "EQUIVALENT", *inner, equal_alpha
    if word == "UNDECIDED" and seeds > 1:
        more = _more_seeds(differences, smallest, margin)
    verdict = {
        **({} if metric == "accuracy" else {"metric": metric}),
        "word": word,
        "headline": word if seeds > 1 else f"{word} on these examples",
        "unit": unit,
        "test": test,
        "seeds": seeds,
        "student": list(student),
        "control": list(control),
        "difference": math.fsum(differences) / seeds,
        "low": low,
        "high": high,
        "level": 1 - alpha,
        "p": p,
        "margin": margin,
        "more_seeds": more,
    }
    return {**verdict, "sentence": _sentence(verdict)}


def _levels(seeds: int, looks: tuple[int, ...]) -> tuple[float, float]:
    """The two-sided levels for a difference and, as two one-sided tests, for equivalence."""
    if seeds not in looks:
        return ALPHA, 2 * ALPHA
    place = looks.index(seeds)
    return levels(looks, ALPHA)[place], levels(looks, 2 * ALPHA)[place]


def _sentence(verdict: dict) -> str:
    seeds, metric = verdict["seeds"], verdict.get("metric")
    student, control = (math.fsum(verdict[name]) / seeds for name in ("student", "control"))
    if metric:
        margin = f"{verdict['margin']:.2g}"
        difference, low, high = (f"{verdict[name]:+.3g}" for name in ("difference", "low", "high"))
        values = f"{metric} distilled {student:.4g}, control {control:.4g}, difference {difference}"
    else:
        margin = f"{100 * verdict['margin']:.2g} points"
        difference, low, high = (f"{100 * verdict[name]:+.2f}" for name in ("difference", "low", "high"))
        values = f"distilled {student:.2%}, control {control:.2%}, difference {difference} points"
    scope = "other seeds" if verdict["unit"] == "seeds" else f"other {verdict['unit']}, not other seeds"
    text = (
        f"{verdict['headline']}: {values} "
        f"({100 * verdict['level']:.3g} % interval for {scope}: {low} to {high}, p = {verdict['p']:.2g}, "
        f"{verdict['test']})."
    )
    if seeds > 1:
        pairs = zip(verdict["student"], verdict["control"], strict=True)
        wins = sum(s < c if metric in LOWER_IS_BETTER else s > c for s, c in pairs)
        text += f" The student is ahead for {wins} of {seeds} seeds."
    if verdict["word"] == "EQUIVALENT":
        text += f" The difference is smaller than {margin}."
    elif verdict["word"] == "UNDECIDED":
        text += f" Neither a difference nor a difference below {margin} is shown."
    if seeds == 1:
        return text + " This is one seed. Use --seeds 5 to compare over seeds."
    more = verdict["more_seeds"]
    if more:
        text += f" About {more} more seed{'s' if more > 1 else ''} would likely decide."
    elif verdict["word"] == "UNDECIDED":
        text += f" Even {MOST_SEEDS} seeds would probably not decide."
    return text


def _more_seeds(differences: Sequence[float], resolution: float, margin: float) -> int | None:
    """How many more seeds decide with a probability of 80 %, if mean and spread stay what they are now."""
    seeds = len(differences)
    mean = abs(math.fsum(differences) / seeds)
    errors = max(_deviation(differences), resolution) / np.sqrt(np.arange(2, MOST_SEEDS + 1))
    differs, equal = _reaches()
    # Both one-sided tests have to reject: where the mean is near 0, each needs a power of 90 %.
    decided = (mean > differs * errors) | (margin - mean > equal * errors)
    enough = 2 + np.flatnonzero(decided)
    enough = enough[enough > seeds]
    return int(enough[0]) - seeds if len(enough) else None


@cache
def _reaches() -> tuple[np.ndarray, np.ndarray]:
    """For 2 to `MOST_SEEDS` seeds, in standard errors: the difference that is shown with a probability of `POWER`, and
    the distance from the margin at which equivalence is."""
    from scipy.stats import t

    freedom = np.arange(1, MOST_SEEDS)
    differs = t.ppf(1 - ALPHA / 2, freedom) + t.ppf(POWER, freedom)
    return differs, t.ppf(1 - ALPHA, freedom) + t.ppf((1 + POWER) / 2, freedom)


def _deviation(differences: Sequence[float]) -> float:
    mean = math.fsum(differences) / len(differences)
    return math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (len(differences) - 1))


def paired_t(
    differences: Sequence[float], resolution: float = 0.0, level: float = 1 - ALPHA
) -> tuple[float, float, float]:
    """The interval of the mean of two or more differences, and the two-sided p-value of the hypothesis that it is 0.

    `resolution` is the smallest step of a measurement (one test image) and the least standard deviation that counts:
    two seeds with exactly the same difference are luck, not certainty.
    """
    from scipy.stats import t  # here, because scipy takes a second to import

    n = len(differences)
    mean = math.fsum(differences) / n
    error = max(_deviation(differences), resolution) / math.sqrt(n)
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    reach = float(t.ppf((1 + level) / 2, n - 1)) * error
    return mean - reach, mean + reach, 2 * float(t.sf(abs(mean) / error, n - 1))


def bootstrap(student: np.ndarray, control: np.ndarray, level: float = 1 - ALPHA) -> tuple[float, float, float]:
    """The interval of the mean difference of two models' scores of the same examples, and the two-sided p-value.

    Examples are drawn again with replacement; the interval is that of the percentiles. Examples of which a score is NaN
    do not count. The same scores give the same numbers: the draws have a fixed seed.
    """
    differences = np.asarray(student, np.float64) - np.asarray(control, np.float64)
    differences = differences[~np.isnan(differences)]
    if not len(differences):
        raise ValueError("No example has a score.")
    random, means = np.random.default_rng(0), np.empty(RESAMPLES)
    at_once = max(1, MOST_DRAWS // len(differences))
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        means[start : start + size] = differences[random.integers(0, len(differences), (size, len(differences)))].mean(
            1
        )
    tail = min((means <= 0).sum(), (means >= 0).sum())
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high), float(min(1.0, 2 * (tail + 1) / (RESAMPLES + 1)))


def mcnemar(student_only: int, control_only: int, images: int, level: float = 1 - ALPHA) -> tuple[float, float, float]:
    """The interval of the difference of two accuracies on the same images, and the two-sided mid-p value.

    Of the images that only one model classifies correctly, the student's share is binomial, with probability 1/2 if
    the models are equally good. The interval is the mid-p interval of that share as a difference of accuracies, so it
    excludes 0 exactly when p is below 1 - level.
    """
    from scipy.optimize import brentq

    n = student_only + control_only
    if n == 0:
        return 0.0, 0.0, 1.0
    tail = (1 - level) / 2

    def root(function) -> float:
        return brentq(function, 0.0, 1.0, xtol=1e-15)

    low = 0.0 if student_only == 0 else root(lambda share: _mid_p(student_only, n, share) - tail)
    high = 1.0 if control_only == 0 else root(lambda share: tail - _mid_p(control_only, n, 1 - share))
    p = min(1.0, 2 * min(_mid_p(student_only, n, 0.5), _mid_p(control_only, n, 0.5)))
    return (2 * low - 1) * n / images, (2 * high - 1) * n / images, p


def _mid_p(count: int, n: int, share: float) -> float:
    """P(X > count) + P(X = count) / 2 for X binomial of `n` images with the probability `share`."""
    from scipy.stats import binom

    return float(binom.sf(count, n, share) + binom.pmf(count, n, share) / 2)


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
