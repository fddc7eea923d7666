"""Did distillation help? BETTER, WORSE or NO DIFFERENCE, from a paired test with its interval. Standard library only.

Over two seeds or more: the paired t-test of Student on the differences student minus control, seed by seed. Both arms
of a seed share start, data and order, so that the difference is the teacher's doing; the interval is about other
seeds, on these test images.

With one seed there is no spread over seeds to measure. What can be tested is whether these two models differ on more
images like the test images: McNemar's test with the mid-p value (Fagerland, Lydersen, Laake 2013, BMC Medical Research
Methodology 13:91), which counts the images that only one of the two gets right. It says nothing about another seed, and
the sentence says so.
"""

import math
from collections.abc import Sequence

LEVEL = 0.95  # of the interval; the test is two-sided at 1 - LEVEL


def judge(student: Sequence[float], control: Sequence[float], images: int, only: tuple[int, int] | None = None) -> dict:
    """The verdict on test accuracies (shares of 1) by seed, measured on so many `images`; JSON-ready.

    `only`: how many images only the student and only the control got right, for the test with one seed. Returns word,
    unit ("seeds" or "test images"), test, seeds, student and control (accuracies by seed), difference (the mean of
    student minus control), low and high (its 95 % interval), p, level and sentence.
    """
    if len(student) != len(control) or not student:
        raise ValueError(f"expected as many student as control accuracies, received {len(student)} and {len(control)}")
    differences = [s - c for s, c in zip(student, control, strict=True)]
    if len(differences) > 1:
        low, high, p = paired_t(differences, 1 / images)
        unit, test = "seeds", "paired t-test over seeds"
    elif only is not None:
        low, high, p = mcnemar(*only, images)
        unit, test = "test images", "McNemar's mid-p test over test images"
    else:
        raise ValueError("one seed needs `only`, the counts of images that one of the two gets right")
    difference = math.fsum(differences) / len(differences)
    word = "BETTER" if low > 0 else "WORSE" if high < 0 else "NO DIFFERENCE"
    found = {"word": word, "unit": unit, "test": test, "seeds": len(differences), "level": LEVEL, "p": p}
    found |= {"student": list(student), "control": list(control), "difference": difference, "low": low, "high": high}
    return {**found, "sentence": _sentence(found)}


def _sentence(found: dict) -> str:
    student, control = (math.fsum(found[name]) / found["seeds"] for name in ("student", "control"))
    numbers = (
        f"distilled {student:.2%}, control {control:.2%}: {100 * found['difference']:+.2f} points, "
        f"{found['level']:.0%} interval {100 * found['low']:+.2f} to {100 * found['high']:+.2f}, p = {found['p']:.2g}"
    )
    if found["unit"] == "seeds":
        text = f"{found['word']}: {numbers} ({found['test']}: {found['seeds']} pairs)."
        won = sum(s > c for s, c in zip(found["student"], found["control"], strict=True))
        text += f" The student is ahead for {won} of {found['seeds']} seeds."
    else:
        text = (
            f"{found['word']} on these images: {numbers} ({found['test']}). This is one seed: the interval is about "
            "other images, and another seed may come out otherwise; --seeds 5 tests that."
        )
    if found["word"] == "NO DIFFERENCE":
        text += " That is no proof of equality: any difference within the interval agrees with what was measured."
    return text


def paired_t(differences: Sequence[float], resolution: float = 0.0) -> tuple[float, float, float]:
    """The interval of the mean of two differences or more, and the two-sided p-value that the mean is 0.

    `resolution` is the smallest step of a measured value (one test image). The standard deviation counts as at least
    that: two seeds that differ from their controls by the very same count of images are luck, no certainty.
    """
    n = len(differences)
    mean = math.fsum(differences) / n
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    error = max(deviation, resolution) / math.sqrt(n)
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 0.0
    reach = t_quantile((1 + LEVEL) / 2, n - 1) * error
    return mean - reach, mean + reach, _both_tails(mean / error, n - 1)


def mcnemar(student_only: int, control_only: int, images: int) -> tuple[float, float, float]:
    """The interval of the difference of two accuracies on the same images, and the two-sided mid-p value.

    Given that so many images are right for one model alone, the student's share of them is binomial, 1/2 if the models
    are equally good. The interval is that share's mid-p interval, turned into a difference of accuracies; so it
    excludes 0 exactly when p is below 1 - LEVEL.
    """
    n = student_only + control_only
    if n == 0:
        return 0.0, 0.0, 1.0
    tail = (1 - LEVEL) / 2

    def above(share: float) -> float:  # mid-p of so many or more
        return _binomial_tail(student_only, n, share)

    def below(share: float) -> float:
        return _binomial_tail(control_only, n, 1 - share)

    low = 0.0 if student_only == 0 else _bisect(lambda share: above(share) - tail, 0.0, 1.0)
    high = 1.0 if control_only == 0 else _bisect(lambda share: tail - below(share), 0.0, 1.0)
    p = min(1.0, 2 * min(above(0.5), below(0.5)))
    return (2 * low - 1) * n / images, (2 * high - 1) * n / images, p


def _binomial_tail(k: int, n: int, share: float) -> float:
    """P(X > k) + P(X = k) / 2 for X binomial."""
    if share in (0.0, 1.0):
        return (share == 1.0) * (0.5 if k == n else 1.0) + (share == 0.0) * (0.5 if k == 0 else 0.0)

    def probability(i: int) -> float:
        ways = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1)
        return math.exp(ways + i * math.log(share) + (n - i) * math.log1p(-share))

    return probability(k) / 2 + math.fsum(probability(i) for i in range(k + 1, n + 1))


def _bisect(rising, low: float, high: float) -> float:
    """Where a rising function is 0, between `low` and `high`."""
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for Student's t with so many degrees of freedom."""
    tail = _both_tails(t, freedom) / 2
    return 1 - tail if t > 0 else tail


def _both_tails(t: float, freedom: int) -> float:
    return _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))


def t_quantile(p: float, freedom: int) -> float:
    """The t with P(T <= t) = p: `t_quantile(0.975, 4)` is 2.776."""
    if not 0 < p < 1:
        raise ValueError(f"expected a probability between 0 and 1, received {p}")
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    high = 1.0
    while t_cdf(high, freedom) < p:
        high *= 2
    return _bisect(lambda t: t_cdf(t, freedom) - p, 0.0, high)


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularized incomplete beta function I_x(a, b), by its continued fraction (modified Lentz method).

    See NIST's Digital Library of Mathematical Functions, 8.17.22.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _incomplete_beta(b, a, 1 - x)
    front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    tiny = 1e-300
    value = c = tiny
    d = 0.0
    for i in range(1000):
        m = i // 2
        if i == 0:
            term = 1.0
        elif i % 2 == 0:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + term * d or tiny)
        c = 1 + term / c or tiny
        value *= c * d
        if i and abs(c * d - 1) < 1e-15:
            break
    return math.exp(front) / a * value
