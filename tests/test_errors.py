"""The error for a name that does not exist."""

from kdistill.errors import unknown


def test_the_most_similar_name_and_the_advice():
    error = unknown("loss", "kl_divergense", ["mse", "kl_divergence"], "Fix distill.loss.")
    assert str(error) == (
        "Unknown loss 'kl_divergense'. Did you mean 'kl_divergence'? Available: kl_divergence, mse. Fix distill.loss."
    )


def test_nothing_similar_and_nothing_available():
    assert str(unknown("tap", "x", ["block"])) == "Unknown tap 'x'. Available: block."
    assert str(unknown("tap", "x", [])) == "Unknown tap 'x'. Available: none."
