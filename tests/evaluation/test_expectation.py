"""What to expect: the lead of the teacher by hand, power by simulation, scatter and learning curves in closed form."""

import math

import numpy as np
import pytest
from scipy.stats import t

from kdistill.evaluation import expectation
from kdistill.evaluation.expectation import GAIN, NO_GAIN, UNCLEAR, expect, teacher_lead


def correct(images: int, *wrong: range) -> np.ndarray:
    """bool `[images]`, False in the ranges."""
    values = np.ones(images, bool)
    for places in wrong:
        values[places] = False
    return values


def lead(images: int, teacher_wrong: int, control_wrong: int, split: str = "validation") -> dict:
    """Teacher and control are wrong on different images."""
    teacher = correct(images, range(teacher_wrong))
    return teacher_lead(teacher, correct(images, range(images - control_wrong, images)), split)


def test_the_lead_by_hand():
    ahead = lead(1000, 2, 12)
    assert (ahead["only_teacher"], ahead["only_control"], ahead["images"]) == (12, 2, 1000)
    assert ahead["teacher"] == 0.998 and ahead["control"] == 0.988
    # 12 of 14 heads: 106 / 2^14 = 0.0065 exactly; the unconditional test is about the same.
    assert ahead["p"] == pytest.approx(106 / 2**14, rel=0.3) and ahead["ahead"] and ahead["decidable"]
    assert expectation.lead_warning(ahead) is None
    assert not lead(1000, 12, 2)["ahead"] and lead(1000, 12, 2)["p"] > 0.99


@pytest.mark.parametrize(
    "images,teacher_wrong,control_wrong,message",
    [
        (
            1000,
            20,
            10,
            "The teacher is not ahead of the control: 98.00% against 99.00% on 1,000 validation images (p =",
        ),
        (1000, 10, 10, "The teacher is not ahead of the control: 99.00% against 99.00%"),
        (1000, 10, 12, "The teacher is not ahead of the control beyond chance: 99.00% against 98.80%"),
        (20, 0, 2, None),  # wrong on two of 20: nothing could show a teacher ahead
        (3, 0, 3, None),
    ],
)
def test_the_warning_of_a_run_takes_chance_into_account(images, teacher_wrong, control_wrong, message):
    warning = expectation.lead_warning(lead(images, teacher_wrong, control_wrong))
    assert warning is None if message is None else message in warning
    if warning:
        assert "no gain is likely. Use a better teacher" in warning and "kdistill plan" in warning


@pytest.mark.parametrize("seeds", (2, 3, 5, 10, 40))
def test_the_visible_difference_by_simulation(seeds):
    difference = expectation.visible_difference(2.0, seeds)
    samples = np.random.default_rng(seeds).normal(difference, 2.0, (60_000, seeds))
    statistics = samples.mean(axis=1) / (samples.std(axis=1, ddof=1) / math.sqrt(seeds))
    shown = np.mean(abs(statistics) > t.ppf(0.975, seeds - 1))
    assert shown == pytest.approx(0.8, abs=0.007)
    assert expectation.visible_difference(4.0, seeds) == pytest.approx(2 * difference)


def test_many_seeds_see_what_the_normal_distribution_says():
    # (1.96 + 0.84) / sqrt(200)
    assert expectation.visible_difference(1.0, 200) == pytest.approx(2.8016 / math.sqrt(200), rel=0.01)


def test_the_scatter_is_that_of_the_test_set():
    # Each seed is wrong on 40 images of its own: three times 40 of 400 images have the variance 1/3 over the seeds.
    control = np.stack([correct(400, range(40 * seed, 40 * seed + 40)) for seed in range(3)])
    everything = np.ones_like(control)
    for images in (400, 40_000):
        scatter = expectation.deviations(everything, control, images)
        assert scatter["control"] == scatter["difference"] == pytest.approx(math.sqrt(0.1 / images))
    # All images of a seed flip together: more images do not help.
    together = np.repeat(np.array([[True], [False], [True]]), 400, axis=1)
    assert expectation.deviations(together, together, 10**6)["control"] == pytest.approx(math.sqrt(1 / 3), rel=0.01)
    assert expectation.deviations(together, together, 10**6)["difference"] == 0


def test_the_scatter_over_seeds_is_right_on_average():
    """Validation images of 300, a test set of 3,000, seeds with an effect of their own: simulated."""
    random, estimates, true = np.random.default_rng(1), [], []
    for _ in range(400):
        shares = np.clip(random.normal(0.9, 0.02, (3, 1)), 0, 1)
        control = random.random((3, 300)) < shares
        estimates.append(expectation.deviations(control, control, 3000)["control"] ** 2)
        true.append(np.var((random.random((3, 3000)) < shares).mean(axis=1), ddof=1))
    assert np.mean(estimates) == pytest.approx(np.mean(true), rel=0.15)


def test_the_learning_curve_is_a_power_law():
    # 8 % and 4 % at a tenth and at two tenths: halved with every doubling, so 0.8 % after everything.
    error = expectation.error_after(0.08, 0.04, 10**9, (0.1, 0.2), 1.0)
    assert error == pytest.approx(0.008, rel=1e-4)
    assert expectation.error_after(0.08, 0.04, 10**9, (0.1, 0.2), 0.4) == pytest.approx(0.02, rel=1e-4)
    assert expectation.error_after(0.03, 0.04, 10**9, (0.1, 0.2), 1.0) == pytest.approx(0.04)  # it does not get worse
    assert 0 < expectation.error_after(0.01, 0.0, 100, (0.1, 0.3), 1.0) < 0.005  # half an image counts


SMALL = [0.002, 0.004, 0.003]


@pytest.mark.parametrize(
    "facts,word,part",
    [
        ((lead(1000, 5, 40), SMALL, 1000, 0.0, 2000), GAIN, "ahead of the control, 99.50% against 96.00% on 1,000"),
        ((lead(1000, 5, 40), SMALL, 1000, 0.01, 2000), GAIN, "control still gains: +2.50 points, extrapolated"),
        ((lead(1000, 5, 40), SMALL, 1000, 0.04, 2000), UNCLEAR, "although the student is at +0.30 points"),
        ((lead(1000, 5, 40), [-0.01, 0.02, -0.01], 1000, 0.04, 2000), NO_GAIN, "the teacher is not ahead of the"),
        ((lead(1000, 40, 20), [-0.01, 0.02, -0.01], 1000, 0.0, 2000), NO_GAIN, "98.00% on 1,000 validation images."),
        ((lead(1000, 10, 13), SMALL, 1000, 0.0, 2000), UNCLEAR, "chance explains the teacher's lead"),
        ((lead(1000, 5, 40), [-0.02, -0.021, -0.019], 1000, 0.0, 2000), NO_GAIN, "beyond chance: change the settings"),
        ((lead(1000, 5, 40), [-0.02, 0.01, -0.01], 1000, 0.0, 2000), UNCLEAR, "but the student is at -0.67 points"),
        ((lead(1000, 0, 12), SMALL, 1000, 0.0, 300), UNCLEAR, "test set of 300 examples cannot show less than 1.7"),
        ((lead(1000, 880, 850), SMALL, 1000, 0.0, 2000), UNCLEAR, "have learned next to nothing yet, 12.00% against"),
        ((lead(20, 0, 3), SMALL, 20, 0.0, 2000), UNCLEAR, "wrong on so few of the 20 validation images"),
    ],
)
def test_the_expectation_and_its_reason(facts, word, part):
    expected = expect(*facts, classes=10)
    assert expected["word"] == word and part in expected["sentence"], expected
    assert expected["sentence"].startswith(word[:1].upper() + word[1:])


def test_the_resolution_is_that_of_the_verdict_of_one_seed():
    from kdistill.evaluation.verdict import judge

    text = expectation.resolution_sentence(300)
    assert text.startswith("The test set of 300 examples cannot show less than 1.7 points with one seed (5 images")
    for student_only, word in ((4, "UNDECIDED"), (5, "BETTER")):
        assert judge([0.9], [0.9], 300, (student_only, 0))["word"] == word
    assert "cannot show any difference" in expectation.resolution_sentence(4)
