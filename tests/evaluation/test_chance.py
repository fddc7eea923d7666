"""What chance allows: the tests against an enumeration of all outcomes, their size, and what examples can show."""

import math

import numpy as np
import pytest

from kdistill.evaluation import chance
from kdistill.evaluation.chance import (
    agreement_p_value,
    drop_p_value,
    largest_disagreement,
    resolution,
    smallest_drop,
)


def likelihood(lost: int, gained: int, images: int, limit: float, share: float) -> float:
    """The log-likelihood of counts, where `share` of the images is gained and `share + limit` lost."""
    parts = ((lost, share + limit), (gained, share), (images - lost - gained, 1 - 2 * share - limit))
    return sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)


def outcomes(images: int):
    """All (lost, gained)."""
    return [(lost, gained) for lost in range(images + 1) for gained in range(images + 1 - lost)]


def probability(lost: int, gained: int, images: int, lost_share: float, gained_share: float) -> float:
    rest, others = images - lost - gained, max(0.0, 1 - lost_share - gained_share)
    ways = math.comb(images, lost) * math.comb(images - lost, gained)
    return ways * lost_share**lost * gained_share**gained * others**rest


@pytest.mark.parametrize(
    "lost,gained,images,limit", [(2, 0, 12, 0.01), (5, 2, 14, 0.05), (3, 3, 10, 0.0), (0, 3, 10, 0.1), (9, 1, 14, 0.2)]
)
def test_the_p_value_is_the_sum_over_all_outcomes(lost, gained, images, limit):
    # The most probable share that is gained, by trying them all.
    shares = np.linspace(0, (1 - limit) / 2, 20_001)
    share = max(shares, key=lambda share: likelihood(lost, gained, images, limit, share))
    expected = sum(
        probability(a, b, images, share + limit, share) for a, b in outcomes(images) if a - b >= lost - gained
    )
    assert drop_p_value(lost, gained, images, limit) == pytest.approx(expected, abs=2e-4)


def test_numbers_by_hand():
    # One image, lost, and no drop allowed: most probably one half of the images are lost, one half gained.
    assert drop_p_value(1, 0, 1, 0.0) == pytest.approx(0.5)
    assert drop_p_value(0, 0, 9, 0.0) == 1.0 and drop_p_value(0, 0, 9, 0.5) == pytest.approx(1.0)
    assert drop_p_value(4, 0, 4, 1.0) == pytest.approx(1.0)
    assert agreement_p_value(1, 2, 0.9) == pytest.approx(1 - 0.81)
    assert agreement_p_value(2, 2, 0.9) == 1.0


def test_a_larger_loss_is_less_probable_and_a_wider_limit_more_tolerant():
    values = [drop_p_value(lost, 5, 200, 0.01) for lost in range(0, 60, 5)]
    assert values == sorted(values, reverse=True) and values[-1] < 1e-4
    values = [drop_p_value(20, 5, 200, limit) for limit in (0.0, 0.02, 0.05, 0.075, 0.2)]
    assert values == sorted(values) and values[0] < 0.01 and values[-1] > 0.9


@pytest.mark.parametrize("images,limit", [(20, 0.0), (20, 0.05), (25, 0.1)])
def test_a_file_at_its_limit_is_refused_in_one_case_of_twenty_at_most(images, limit):
    refused = [
        (lost, gained)
        for lost, gained in outcomes(images)
        if lost - gained > limit * images and drop_p_value(lost, gained, images, limit) <= chance.LEVEL
    ]
    assert refused
    for share in np.linspace(0, (1 - limit) / 2, 21):
        assert sum(probability(a, b, images, share + limit, share) for a, b in refused) <= 1.05 * chance.LEVEL


def test_what_so_many_images_can_show():
    # The issue: two sounds of 300 are no loss of 0.67 points, 100 images of 10,000 are one of 1 point.
    assert drop_p_value(2, 0, 300, 0.002) > chance.LEVEL
    for gained in (0, 50, 300):
        assert drop_p_value(100 + gained, gained, 10_000, 0.002) <= chance.LEVEL
    assert [smallest_drop(images, 0.002) for images in (4, 20, 300, 10_000)] == [None, 4, 5, 29]
    assert [largest_disagreement(images, 0.98) for images in (1, 20, 300, 10_000)] == [0, 2, 10, 223]
    for images, limit in ((300, 0.002), (2000, 0.01)):
        lost = smallest_drop(images, limit)
        assert drop_p_value(lost, 0, images, limit) <= chance.LEVEL < drop_p_value(lost - 1, 0, images, limit)
        same = images - largest_disagreement(images, 1 - limit)
        assert (
            agreement_p_value(same - 1, images, 1 - limit) <= chance.LEVEL < agreement_p_value(same, images, 1 - limit)
        )
    assert (smallest_drop(10, 1.0), largest_disagreement(10, 0.0), largest_disagreement(10, 1.0)) == (None, 10, 0)


def test_the_sentence():
    assert resolution(10_000, 0.002, 0.98) == (
        "10,000 images can show a loss of accuracy from 29 images (0.29 points) on, and a disagreement from 224 images "
        "(2.24 %) on; less can be chance."
    )
    assert resolution(2, 0.01, 0.5) == "2 images can show no loss of accuracy, and no disagreement; less can be chance."
