"""What to expect of distillation before a long training, from a short trial: the lead of the teacher, and power."""

import math
from collections.abc import Sequence

import numpy as np

from kdistill.evaluation.chance import LEVEL, drop_p_value, smallest_drop
from kdistill.evaluation.head_metrics import LOWER_IS_BETTER
from kdistill.evaluation.verdict import ALPHA, POWER, bootstrap, mcnemar, paired_t
from kdistill.teachers.gain import little_above_chance

GAIN, NO_GAIN, UNCLEAR = "a gain is likely", "no gain is likely", "unclear"


def teacher_lead(teacher: np.ndarray, control: np.ndarray, split: str = "validation") -> dict:
    """Whether the teacher is ahead of the control beyond chance: the paired test of `chance.drop_p_value`.

    Args:
        teacher, control: whether each model classifies each of n images correctly, bool `[n]`.
        split: what these images are, `validation` or `test`.

    Returns a JSON-ready dict: split, images, teacher and control (accuracies), only_teacher and only_control (images
    that only one of them classifies correctly), p, ahead (p is at most 5 %), and decidable: whether a perfect teacher
    would be ahead. The control has to be wrong on some images for that.
    """
    images, only_teacher, only_control = len(teacher), int((teacher & ~control).sum()), int((control & ~teacher).sum())
    # Against a true difference of 0: the control has lost images that the teacher has, and gained others.
    p_value = drop_p_value(only_teacher, only_control, images)
    return {
        "split": split,
        "images": images,
        "teacher": float(teacher.mean()),
        "control": float(control.mean()),
        "only_teacher": only_teacher,
        "only_control": only_control,
        "p": p_value,
        "ahead": p_value <= LEVEL,
        "decidable": int((~control).sum()) >= (smallest_drop(images, 0) or math.inf),
    }


def lead_of_scores(teacher: np.ndarray, control: np.ndarray, metric: str, split: str = "validation") -> dict:
    """As `teacher_lead`, for scores that are not just right or wrong: a paired bootstrap over examples.

    Args:
        teacher, control: the score of each of n examples, `[n]`, NaN for one without a label.
        metric: what the scores are, see `verdict.judge`.
    """
    low, high, p_value = bootstrap(teacher, control)
    labeled = ~np.isnan(teacher)
    return {
        "split": split,
        "images": int(labeled.sum()),
        "teacher": float(teacher[labeled].mean()),
        "control": float(control[labeled].mean()),
        "metric": metric,
        "p": p_value,
        "ahead": high < 0 if metric in LOWER_IS_BETTER else low > 0,
        "decidable": True,
    }


def lead_warning(lead: dict) -> str | None:
    """A warning if the teacher is not ahead of the control beyond chance. None if it is, or if nothing can show it."""
    if lead["ahead"] or not lead["decidable"]:
        return None
    metric, (teacher, control) = lead.get("metric", "accuracy"), (lead["teacher"], lead["control"])
    ahead = teacher < control if metric in LOWER_IS_BETTER else teacher > control
    chance = " beyond chance" if ahead else ""
    figures = f"{teacher:.2%} against {control:.2%}"
    if metric != "accuracy":
        figures = f"{metric.upper()} {teacher:.4g} against {control:.4g}"
    return (
        f"The teacher is not ahead of the control{chance}: {figures} on "
        f"{lead['images']:,} {lead['split']} {'images' if 'metric' not in lead else 'examples'} "
        f"(p = {lead['p']:.2g}). It has little to teach "
        "beyond the labels, so no gain is likely. Use a better teacher (larger, trained longer or on more data), or "
        "give the students more images than labels; `kdistill plan` shows beforehand what to expect."
    )


def visible_difference(deviation: float, seeds: int, alpha: float = ALPHA, power: float = POWER) -> float:
    """The true difference that a paired t-test over this many seeds shows with this power, from the noncentral t.

    Args:
        deviation: the standard deviation of the differences over seeds; the result has its unit.
        seeds: 2 or more.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    reach = float(t.ppf(1 - alpha / 2, seeds - 1))

    def missing(shift: float) -> float:
        shown = float(nct.sf(reach, seeds - 1, shift) + nct.cdf(-reach, seeds - 1, shift))
        return (shown if math.isfinite(shown) else 1.0) - power  # scipy returns NaN far in the tail

    # The shift is in standard errors.
    return brentq(missing, 0.0, 4 * reach + 10) * deviation / math.sqrt(seeds)


def deviations(student: np.ndarray, control: np.ndarray, images: int) -> dict[str, float]:
    """The standard deviations over seeds, on as many images as the test set has, from those on the validation images.

    Args:
        student, control: whether the model of each seed classifies each of n images correctly, bool `[seeds, n]`.
        images: the number of test images.

    Returns `difference`, of student minus control in pairs, and `control`. The variance over seeds has a part that
    shrinks with the number of images, as every image flips for itself, and a part that does not: few validation images
    show a scatter that the test set does not have. Where the first part alone is larger than the whole (chance, with a
    few seeds), it counts alone.
    """
    return {
        "difference": _deviation(student.astype(float) - control, images),
        "control": _deviation(control.astype(float), images),
    }


def _deviation(values: np.ndarray, images: int) -> float:
    """Of the means of `images` columns, from the means of n columns `[seeds, n]`."""
    whole, flips = float(values.mean(axis=1).var(ddof=1)), float(values.var(axis=0, ddof=1).mean())
    return math.sqrt(max(0.0, whole - flips / values.shape[1]) + flips / images)


def error_after(first: float, second: float, images: int, shares: tuple[float, float], share: float) -> float:
    """The error rate after another share of the training, on the power law through two (Hestness et al. 2017).

    Args:
        first, second: error rates after a short and a longer training, shares of 1, measured on `images` images.
        shares: the share of the full training that each has had; the second is the larger one.
        share: the share of the full training in question.

    Returns a share of 1. arXiv 1712.00409 states the law for the size of the data. For steps it is usually too steep at
    the end, so that the true error is larger.
    """
    low, high = ((error * images + 0.5) / (images + 1) for error in (first, second))  # 0 errors have a logarithm, too
    slope = max(0.0, math.log(low / high) / math.log(shares[1] / shares[0]))
    return min(1.0, high * (share / shares[1]) ** -slope)


def expect(
    lead: dict, difference: Sequence[float], images: int, still: float, test_images: int, classes: int
) -> dict[str, str]:
    """What a full run will probably show: `word` and `sentence`.

    Args:
        lead: of `teacher_lead`, teacher and control after about the same share of their training.
        difference: student minus control in the trial, by seed, measured on `images` images.
        still: what the control is expected to gain until its training is as complete as the teacher's, a share of 1.
        test_images: the number of test images.
        classes: the number of classes, for the accuracy of chance.

    A gain is likely if the teacher is ahead beyond chance, remains ahead of what the control is expected to reach, and
    the student was ahead of the control in the trial on average. No gain is likely if the teacher is not ahead, or the
    student is behind the control beyond chance (paired t-test over the seeds). All else is unclear, and the sentence
    states why.
    """
    gap, examples = lead["teacher"] - lead["control"] - still, f"{lead['images']:,} {lead['split']} images"
    mean = math.fsum(difference) / len(difference)
    low, high, _ = paired_t(difference, 1 / images)
    student = f"the student is at {_points(mean)} against the control over {len(difference)} seeds"
    extrapolated = still > 0 and lead["teacher"] > lead["control"]
    expected = f" (after what the control still gains: {_points(gap)}, extrapolated)" if extrapolated else ""
    figures = f"{lead['teacher']:.2%} against {lead['control']:.2%} on {examples}{expected}"
    visible = _visible_images(test_images) / test_images
    if not lead["decidable"]:
        word = UNCLEAR
        reason = (
            f"the control is wrong on so few of the {examples} that they could not show even a perfect teacher to be "
            "ahead"
        )
    elif max(lead["teacher"], lead["control"]) < little_above_chance(classes):
        word, reason = UNCLEAR, f"teacher and control have learned next to nothing yet, {figures}: train for longer"
    elif gap <= 0 or lead["teacher"] <= lead["control"]:
        word, reason = NO_GAIN, f"the teacher is not ahead of the control, {figures}"
        if low > 0:  # seen early on, also with a teacher that is no better: it often does not last
            word, reason = UNCLEAR, f"{reason}, although {student}"
    elif not lead["ahead"]:
        word, reason = UNCLEAR, f"chance explains the teacher's lead over the control, {figures}, p = {lead['p']:.2g}"
    elif high < 0:
        word = NO_GAIN
        reason = f"the teacher is ahead of the control, {figures}, but {student}, beyond chance: change the settings"
    elif gap < visible:
        word = UNCLEAR
        reason = (
            f"the test set of {test_images:,} examples cannot show less than {_size(visible)}, and the teacher is "
            f"ahead of the control by less, {figures}"
        )
    elif mean <= 0:
        word, reason = UNCLEAR, f"the teacher is ahead of the control, {figures}, but {student}"
    else:
        word, reason = GAIN, f"the teacher is ahead of the control, {figures}, and {student}"
    return {"word": word, "sentence": f"{word[:1].upper()}{word[1:]}: {reason}."}


def resolution_sentence(test_images: int) -> str:
    """What one pair of models can show at best on so many test images."""
    visible = _visible_images(test_images)
    if visible > test_images:
        return f"The test set of {test_images:,} examples cannot show any difference with one seed."
    return (
        f"The test set of {test_images:,} examples cannot show less than {_size(visible / test_images)} with one seed "
        f"({visible} images that only one of the two models classifies correctly)."
    )


def _visible_images(images: int) -> int:
    """The fewest images on which the verdict of one seed is BETTER, if the student alone classifies them correctly."""
    return next(count for count in range(1, 100) if mcnemar(count, 0, images)[2] < ALPHA)


def _points(value: float) -> str:
    return f"{100 * value:+.2f} points"


def _size(value: float) -> str:
    return f"{100 * value:.2g} points"
