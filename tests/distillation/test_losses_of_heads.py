"""Losses of independent labels and of numbers: by hand, the gradient in closed form, invariances, equal inputs."""

import math

import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation import losses

RNG = np.random.default_rng(0)
S, T = RNG.normal(size=(2, 6, 4)) * 3
LABELS = (RNG.random((6, 4)) > 0.5).astype(float)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gradient(loss, student):
    student = tf.constant(student, tf.float64)
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = loss(student)
    return tape.gradient(value, student).numpy()


def by_hand_kl(s, t, temperature):
    p, q = sigmoid(t / temperature), sigmoid(s / temperature)
    return temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_bernoulli_kl(temperature):
    np.testing.assert_allclose(losses.bernoulli_kl(S, T, temperature), by_hand_kl(S, T, temperature), rtol=1e-5)
    expected = temperature * (sigmoid(S / temperature) - sigmoid(T / temperature))
    np.testing.assert_allclose(gradient(lambda s: losses.bernoulli_kl(s, T, temperature), S), expected, atol=1e-5)
    assert np.all(losses.bernoulli_kl(S, S, temperature).numpy() == 0)
    flipped = losses.bernoulli_kl(-S, -T, temperature)  # which side of a label is called 1 does not matter
    np.testing.assert_allclose(flipped, losses.bernoulli_kl(S, T, temperature), rtol=1e-6)


def test_two_classes_are_one_label():
    s, t = S[:, :1], T[:, :1]
    pair = [np.concatenate([np.zeros_like(z), z], axis=1) for z in (s, t)]
    for temperature in (1.0, 3.0):
        np.testing.assert_allclose(
            losses.bernoulli_kl(s, t, temperature), losses.kl_logits(*pair, temperature), rtol=1e-6
        )
    labels = LABELS[:, :1]
    np.testing.assert_allclose(
        losses.binary_cross_entropy(labels, s), losses.hard_cross_entropy(labels[:, 0].astype(int), pair[0]), rtol=1e-6
    )


def test_at_a_high_temperature_it_is_the_squared_difference_of_logits():
    """T^2 KL -> (s - t)^2 / 8, as of two classes."""
    near = losses.bernoulli_kl(S / 10, T / 10, 1000.0)
    np.testing.assert_allclose(near, ((S - T) ** 2 / 800).sum(-1), rtol=1e-3)


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_extreme_logits_stay_finite(size):
    for loss in (losses.bernoulli_kl, lambda s, t: losses.binary_cross_entropy(LABELS, s)):
        assert np.isfinite(loss(S * size, T * size)).all()
        assert np.isfinite(gradient(lambda s, loss=loss: loss(s, T * size), S * size)).all()


def test_binary_cross_entropy_over_the_labels_that_are_there():
    q = sigmoid(S)
    expected = -(LABELS * np.log(q) + (1 - LABELS) * np.log(1 - q))
    np.testing.assert_allclose(losses.binary_cross_entropy(LABELS, S), expected.sum(-1), rtol=1e-6)
    labels = LABELS.copy()
    labels[0, 1], labels[1, 2], labels[2] = -1, np.nan, -1
    expected[0, 1] = expected[1, 2] = expected[2] = 0
    np.testing.assert_allclose(losses.binary_cross_entropy(labels, S), expected.sum(-1), rtol=1e-6)
    present = labels >= 0
    expected = np.where(present, sigmoid(S) - np.where(present, labels, 0), 0)
    np.testing.assert_allclose(gradient(lambda s: losses.binary_cross_entropy(labels, s), S), expected, atol=1e-6)


def test_numbers():
    np.testing.assert_allclose(losses.squared_error(S, T), ((S - T) ** 2).mean(-1), rtol=1e-6)
    np.testing.assert_allclose(gradient(lambda s: losses.squared_error(s, T), S), 2 * (S - T) / 4, atol=1e-6)
    difference = np.abs(S - T)
    for delta in (0.5, 1.0, 2.0):
        expected = np.where(difference <= delta, difference**2 / 2, delta * (difference - delta / 2))
        np.testing.assert_allclose(losses.huber(S, T, delta), expected.mean(-1), rtol=1e-6)
        slope = np.clip(S - T, -delta, delta) / 4
        np.testing.assert_allclose(gradient(lambda s, d=delta: losses.huber(s, T, d), S), slope, atol=1e-6)
    for loss in (losses.squared_error, losses.huber):
        assert np.all(loss(S, S).numpy() == 0)
        np.testing.assert_allclose(loss(S + 5, T + 5), loss(S, T), rtol=1e-6)


def test_numbers_that_are_missing_do_not_count():
    labels = T.copy()
    labels[0, 0], labels[3] = np.nan, np.nan
    expected = [np.nanmean((S[i] - labels[i]) ** 2) if i != 3 else 0 for i in range(6)]
    np.testing.assert_allclose(losses.masked_squared_error(labels, S), expected, rtol=1e-6)
    slope = gradient(lambda s: losses.masked_squared_error(labels, s), S)
    assert np.isfinite(slope).all() and slope[0, 0] == 0 and not slope[3].any() and slope[1].all()


def test_the_examples_of_the_docstrings():
    assert losses.bernoulli_kl([[0.0]], [[math.log(3)]]).numpy() == pytest.approx([0.1308], abs=1e-4)
    assert losses.binary_cross_entropy([[1, 0]], [[0.0, 0.0]]).numpy() == pytest.approx([1.3863], abs=1e-4)
    assert losses.squared_error([[0.0, 0.0]], [[1.0, 3.0]]).numpy() == pytest.approx([5.0])
    assert losses.huber([[0.0, 0.0]], [[1.0, 3.0]]).numpy() == pytest.approx([1.5])
