"""The verdict against printed tables, closed forms and counts by hand."""

import json
import math
import random
import statistics

import pytest
import scipy.stats

from kdistill.evaluation import verdict


def differences(t: float, freedom: int) -> list[float]:
    """Differences whose t statistic is `t`, with so many degrees of freedom: deviation 1, mean t / sqrt(n)."""
    n = freedom + 1
    values = [i - (n - 1) / 2 for i in range(n)]
    deviation = math.sqrt(math.fsum(v * v for v in values) / freedom)
    return [v / deviation + t / math.sqrt(n) for v in values]


def test_p_values_and_intervals_are_those_of_the_printed_tables():
    table = {(0.975, 1): 12.706, (0.975, 2): 4.303, (0.975, 4): 2.776, (0.975, 9): 2.262, (0.995, 4): 4.604}
    table |= {(0.95, 30): 1.697, (0.975, 120): 1.980, (0.9995, 5): 6.869, (0.5, 3): 0.0, (0.025, 4): -2.776}
    for (probability, freedom), t in table.items():
        low, high, p = verdict.paired_t(differences(t, freedom))
        assert p == pytest.approx(2 * min(probability, 1 - probability), rel=1e-3)
        if probability == 0.975:
            assert (high - low) / 2 * math.sqrt(freedom + 1) == pytest.approx(t, abs=6e-4)


def test_p_values_with_1_and_2_degrees_of_freedom_in_closed_form():
    for t in (-40.0, -1.5, 0.0, 0.3, 2.0, 300.0):
        p = verdict.paired_t(differences(t, 1))[2]
        assert p == pytest.approx(1 - 2 * math.atan(abs(t)) / math.pi, abs=1e-13)
        p = verdict.paired_t(differences(t, 2))[2]
        assert p == pytest.approx(1 - abs(t) / math.sqrt(2 + t * t), abs=1e-13)


def test_paired_t_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, error 1 / sqrt 3, t = 3.4641 with 2 degrees of freedom, p = 0.0742.
    low, high, p = verdict.paired_t([1, 2, 3])
    assert (low, high) == pytest.approx((2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)), abs=1e-4)
    assert p == pytest.approx(0.0742, abs=1e-4)


def test_four_words_over_seeds():
    control = [0.941, 0.940, 0.939, 0.942, 0.940]
    better = verdict.judge([0.992, 0.991, 0.991, 0.992, 0.990], control, 10000)
    worse = verdict.judge(control, [0.992, 0.991, 0.991, 0.992, 0.990], 10000)
    neither = verdict.judge([0.940, 0.941, 0.940, 0.940, 0.941], control, 10000, margin=0.001)
    equal = verdict.judge([0.940, 0.941, 0.940, 0.940, 0.941], control, 10000)
    assert [v["word"] for v in (better, worse, neither, equal)] == ["BETTER", "WORSE", "UNDECIDED", "EQUIVALENT"]
    assert all(v["headline"] == v["word"] for v in (better, worse, neither, equal))
    assert better["low"] > 0.04 and better["p"] < 1e-4 and better["difference"] == pytest.approx(0.0508)
    assert worse["low"] == pytest.approx(-better["high"]) and worse["p"] == pytest.approx(better["p"])
    assert neither["low"] < 0 < neither["high"] and neither["p"] > 0.05
    assert worse["sentence"].startswith("WORSE:") and "ahead for 0 of 5 seeds" in worse["sentence"]
    assert "Neither a difference nor a difference below 0.1 points is shown." in neither["sentence"]
    assert f"About {neither['more_seeds']} more seeds would likely decide." in neither["sentence"]
    assert "The difference is smaller than 0.2 points." in equal["sentence"] and equal["level"] == pytest.approx(0.9)
    assert "paired t-test" in better["sentence"] and json.loads(json.dumps(better)) == better


def test_it_is_paired():
    """A constant gain shows through a spread over seeds ten times as large."""
    control = [0.90, 0.92, 0.94, 0.91, 0.93]
    assert verdict.judge([c + 0.002 for c in control], control, 10000)["word"] == "BETTER"
    assert verdict.judge([0.902, 0.942, 0.912, 0.932, 0.922], control, 10000)["word"] == "UNDECIDED"


def test_equal_differences_are_luck_and_no_certainty():
    assert verdict.judge([0.91, 0.92], [0.90, 0.91], 100)["word"] == "UNDECIDED"  # one image, twice
    assert verdict.judge([0.9, 0.8], [0.9, 0.8], 100)["p"] == 1


def test_mcnemar_by_hand():
    # 10 against 3 of 13: mid-p = 2 * (1 + 13 + 78 + 286 / 2) / 2^13
    low, high, p = verdict.mcnemar(10, 3, 1000)
    assert p == pytest.approx(2 * (1 + 13 + 78 + 286 / 2) / 2**13)
    assert low < 0 < 0.007 < high
    assert verdict.mcnemar(3, 10, 1000) == pytest.approx((-high, -low, p))
    assert verdict.mcnemar(0, 0, 1000) == (0.0, 0.0, 1.0)
    # 6 against 0: mid-p = 2 * (1/2)^7; the interval's low share solves share^6 / 2 = 0.025.
    low, high, p = verdict.mcnemar(6, 0, 100)
    assert p == pytest.approx(2**-6) and high == pytest.approx(0.06)
    assert low == pytest.approx((2 * 0.05 ** (1 / 6) - 1) * 0.06)


def test_interval_and_p_of_one_seed_never_contradict():
    for n in (1, 5, 6, 7, 40, 3000):
        for student_only in range(0, n + 1, max(1, n // 20)):
            low, high, p = verdict.mcnemar(student_only, n - student_only, 10000)
            assert ((low > 0) or (high < 0)) == (p < 0.05) and low <= high


def test_the_sentence_states_that_there_is_one_seed():
    judged = verdict.judge([0.95], [0.90], 100, discordant=(6, 1))
    assert judged["unit"] == "test images" and "This is one seed" in judged["sentence"]
    assert judged["headline"] == "UNDECIDED on these examples"
    assert judged["word"] == "UNDECIDED"  # mid-p of 6 against 1 is 0.07
    assert verdict.judge([0.9], [0.95], 1000, discordant=(10, 60))["sentence"].startswith("WORSE on these examples")
    with pytest.raises(ValueError, match="of one seed"):
        verdict.judge([0.9], [0.8], 100)
    with pytest.raises(ValueError, match="as many"):
        verdict.judge([0.9, 0.9], [0.8], 100)


@pytest.mark.slow
def test_better_and_worse_are_wrong_in_1_of_20_experiments_without_one():
    """Seeds drawn from one distribution: BETTER and WORSE come up in 5 % of 2,000 experiments."""
    draw = random.Random(0)
    false = 0
    for _ in range(2000):
        student, control = ([0.95 + draw.gauss(0, 0.002) for _ in range(5)] for _ in range(2))
        false += verdict.judge(student, control, 10**9, margin=1e-9)["word"] in ("BETTER", "WORSE")
    assert 70 <= false <= 130


def by_hand(differences: list[float], level: float) -> tuple[float, float]:
    n, mean = len(differences), sum(differences) / len(differences)
    error = statistics.stdev(differences) / math.sqrt(n)
    reach = float(scipy.stats.t.ppf((1 + level) / 2, n - 1)) * error
    return mean - reach, mean + reach


def test_equivalence_is_two_one_sided_tests_at_5_percent():
    """EQUIVALENT exactly where the 90 % interval is inside of the margin, and the 95 % interval holds 0."""
    control = [0.0] * 4
    student = [0.0003, -0.0004, 0.0006, -0.0002]
    low, high = by_hand(student, 0.9)
    largest = max(-low, high)
    for margin, word in ((largest * 1.001, "EQUIVALENT"), (largest * 0.999, "UNDECIDED")):
        assert verdict.judge(student, control, 10**6, margin=margin)["word"] == word
    assert verdict.judge(student, control, 10**6, margin=1)["low"] == pytest.approx(low)


def test_a_difference_below_the_margin_is_still_a_difference():
    judged = verdict.judge([0.0011, 0.0010, 0.0012, 0.0011], [0.0] * 4, 10**6, margin=0.002)
    assert judged["word"] == "BETTER"


@pytest.mark.slow
def test_more_seeds_decide_as_often_as_promised():
    """With the proposed number of seeds, an effect of the measured size is decided in about 80 % of experiments."""
    judged = verdict.judge([0.004, 0.0, 0.001], [0.0] * 3, 10**6, margin=1e-6)
    mean, deviation = statistics.mean([0.004, 0.0, 0.001]), statistics.stdev([0.004, 0.0, 0.001])
    seeds, draw = 3 + judged["more_seeds"], random.Random(1)
    decided = sum(
        verdict.judge([draw.gauss(mean, deviation) for _ in range(seeds)], [0.0] * seeds, 10**6, margin=1e-6)["word"]
        == "BETTER"
        for _ in range(1000)
    )
    assert 740 <= decided <= 900
    assert verdict.judge([0.004, -0.004], [0.0] * 2, 10**6, margin=1e-9)["more_seeds"] is None


@pytest.mark.slow
def test_at_a_look_the_level_is_that_of_the_look():
    looks = range(3, 11)
    student = [0.02, 0.01, 0.03]
    alone, look = (verdict.judge(student, [0.0] * 3, 10**6, margin=1e-6, looks=ns) for ns in ((), looks))
    level = 1 - verdict.levels(tuple(looks))[0]
    assert look["level"] == pytest.approx(level) and look["low"] == pytest.approx(by_hand(student, level)[0])
    assert look["low"] < alone["low"] and look["p"] == alone["p"]
