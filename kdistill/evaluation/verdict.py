"""Did distillation help? BETTER, WORSE or NO DIFFERENCE, from a paired test with its interval.

Two or more seeds: Student's paired t-test on the differences student minus control, seed by seed. Student and control
of a seed share initial weights, data and order, so their difference is the effect of the teacher. The interval covers
new seeds, on these test images.

One seed: there is no spread over seeds. McNemar's test with the mid-p value (Fagerland, Lydersen, Laake 2013, BMC
Medical Research Methodology 13:91) compares the two models on the images that only one of them classifies correctly.
The interval covers new test images, not new seeds, and the sentence states that.
"""

import math
from collections.abc import Sequence

LEVEL = 0.95  # of the interval; the test is two-sided at 1 - LEVEL


def judge(
    student: Sequence[float], control: Sequence[float], images: int, discordant: tuple[int, int] | None = None
) -> dict:
    """The verdict on test accuracies.

    Args:
        student, control: accuracies by seed, shares of 1.
        images: the number of test images.
        discordant: with one seed, how many images only the student and only the control classify correctly.

    Returns a JSON-ready dict: word, unit ("seeds" or "test images"), test, seeds, student and control (accuracies by
    seed), difference (the mean of student minus control), low and high (its 95 % interval), p, level and sentence.
    """
    if len(student) != len(control) or not student:
        raise ValueError(f"Expected as many student as control accuracies, received {len(student)} and {len(control)}.")
    differences = [s - c for s, c in zip(student, control, strict=True)]
    if len(differences) > 1:
        low, high, p = paired_t(differences, 1 / images)
        unit, test = "seeds", "paired t-test over seeds"
    elif discordant is not None:
        low, high, p = mcnemar(*discordant, images)
        unit, test = "test images", "McNemar's mid-p test over test images"
    else:
        raise ValueError(
            "Accuracies of one seed need `discordant`, the images that only one model classifies correctly."
        )
    difference = math.fsum(differences) / len(differences)
    word = "BETTER" if low > 0 else "WORSE" if high < 0 else "NO DIFFERENCE"
    verdict = {"word": word, "unit": unit, "test": test, "seeds": len(differences), "level": LEVEL, "p": p}
    verdict |= {"student": list(student), "control": list(control), "difference": difference, "low": low, "high": high}
    return {**verdict, "sentence": _sentence(verdict)}


def _sentence(verdict: dict) -> str:
    seeds = verdict["seeds"]
    student, control = (math.fsum(verdict[name]) / seeds for name in ("student", "control"))
    difference, low, high = (f"{100 * verdict[name]:+.2f}" for name in ("difference", "low", "high"))
    numbers = (
        f"distilled {student:.2%}, control {control:.2%}, difference {difference} points, {verdict['level']:.0%} "
        f"interval {low} to {high}, p = {verdict['p']:.2g}"
    )
    if verdict["unit"] == "seeds":
        wins = sum(s > c for s, c in zip(verdict["student"], verdict["control"], strict=True))
        text = f"{verdict['word']}: {numbers} ({verdict['test']}: {seeds} pairs)."
        text += f" The student is ahead for {wins} of {seeds} seeds."
    else:
        text = (
            f"{verdict['word']} on these images: {numbers} ({verdict['test']}). This is one seed: the interval covers "
            "other test images, not other seeds. Use --seeds 5 to test over seeds."
        )
    if verdict["word"] == "NO DIFFERENCE":
        text += " This is no proof of equality: every difference inside the interval agrees with the measurements."
    return text


def paired_t(differences: Sequence[float], resolution: float = 0.0) -> tuple[float, float, float]:
    """The interval of the mean of two or more differences, and the two-sided p-value of the hypothesis that it is 0.

    `resolution` is the smallest step of a measurement (one test image) and the least standard deviation that counts:
    two seeds with exactly the same difference are luck, not certainty.
    """
    from scipy.stats import t  # here, because scipy takes a second to import

    n = len(differences)
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    error = max(deviation, resolution) / math.sqrt(n)
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    reach = float(t.ppf((1 + LEVEL) / 2, n - 1)) * error
    return mean - reach, mean + reach, 2 * float(t.sf(abs(mean) / error, n - 1))


def mcnemar(student_only: int, control_only: int, images: int) -> tuple[float, float, float]:
    """The interval of the difference of two accuracies on the same images, and the two-sided mid-p value.

    Of the images that only one model classifies correctly, the student's share is binomial, with probability 1/2 if
    the models are equally good. The interval is the mid-p interval of that share as a difference of accuracies, so it
    excludes 0 exactly when p is below 1 - LEVEL.
    """
    from scipy.optimize import brentq

    n = student_only + control_only
    if n == 0:
        return 0.0, 0.0, 1.0
    tail = (1 - LEVEL) / 2

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
