"""The loss of a step against numbers by hand: its mix, the terms, labels that are missing, and messages."""

import math

import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation.step_loss import are_classes, is_labeled, is_right, step_loss
from kdistill.errors import InputError
from kdistill.recipe import Term

HARD = tf.constant([math.log(2), 3.0])
STUDENT = tf.zeros((2, 2))
TEACHER = tf.constant([[math.log(3), 0.0], [0.0, 0.0]])
# Teacher (3/4, 1/4), student (1/2, 1/2): 0.75 ln 1.5 + 0.25 ln 0.5; the second example agrees.
KD = np.array([0.130812, 0.0])
LABELS = tf.constant([0, 1])


def settings(weight=0.25, temperature=1.0, **more):
    numbers = {"distillation_weight": weight, "temperature": temperature}
    return {name: tf.constant(value, tf.float32) for name, value in (numbers | more).items()}


def test_labels_and_kl_are_mixed_by_the_weight():
    total, parts = step_loss(HARD, STUDENT, TEACHER, LABELS, settings(), {})
    assert list(parts) == ["hard", "kd"] and total.dtype == tf.float32
    np.testing.assert_array_equal(parts["hard"], HARD)
    np.testing.assert_allclose(parts["kd"], KD, atol=1e-6)
    np.testing.assert_allclose(total, [0.75 * 0.693147 + 0.25 * 0.130812, 0.75 * 3.0], atol=1e-6)


@pytest.mark.parametrize("weight,expected", [(0.0, HARD), (1.0, KD)])
def test_the_ends_of_the_weight_are_one_loss_alone(weight, expected):
    total, _ = step_loss(HARD, STUDENT, TEACHER, LABELS, settings(weight), {})
    np.testing.assert_allclose(total, expected, atol=1e-6)


def test_the_kl_has_the_factor_of_the_temperature():
    """At T = 2 with logits twice as large the distributions are the same, and the KL is 4 times as large."""
    _, parts = step_loss(HARD, STUDENT, 2 * TEACHER, LABELS, settings(temperature=2.0), {})
    np.testing.assert_allclose(parts["kd"], 4 * KD, atol=4e-6)


def test_terms_are_added_by_their_weights():
    terms = {"near": Term("mse_logits"), "ce": Term("soft_cross_entropy", options={"temperature": 1.0})}
    numbers = settings(**{"near.weight": 0.5, "ce.weight": 2.0})
    total, parts = step_loss(HARD, STUDENT, TEACHER, LABELS, numbers, terms)
    near, soft = [math.log(3) ** 2 / 2, 0.0], [math.log(2)] * 2
    np.testing.assert_allclose(parts["near"], near, rtol=1e-6)
    np.testing.assert_allclose(parts["ce"], soft, rtol=1e-6)
    mixed = 0.75 * HARD.numpy() + 0.25 * KD
    np.testing.assert_allclose(total, mixed + 0.5 * np.array(near) + 2 * np.array(soft), rtol=1e-6)


def test_a_term_named_kd_replaces_the_kl_and_the_weight_weighs_it():
    numbers = settings()
    del numbers["temperature"]
    total, parts = step_loss(HARD, STUDENT, TEACHER, LABELS, numbers, {"kd": Term("mse_logits")})
    assert list(parts) == ["hard", "kd"]
    np.testing.assert_allclose(parts["kd"], [math.log(3) ** 2 / 2, 0.0], rtol=1e-6)
    np.testing.assert_allclose(total, 0.75 * HARD.numpy() + 0.25 * parts["kd"].numpy(), rtol=1e-6)


def test_a_setting_replaces_the_number_in_the_term():
    terms = {"soft": Term("kl_logits", options={"temperature": 1.0})}
    numbers = settings(**{"soft.weight": 1.0})
    plain = step_loss(HARD, STUDENT, 2 * TEACHER, LABELS, numbers, terms)[1]["soft"]
    hot = step_loss(HARD, STUDENT, 2 * TEACHER, LABELS, numbers | {"soft.temperature": tf.constant(2.0)}, terms)[1]
    np.testing.assert_allclose(hot["soft"], 4 * KD, atol=4e-6)
    assert plain[0] != hot["soft"][0]


def test_a_term_of_layers_compares_their_features():
    pair = tf.constant([[1.0, 2.0], [0.0, 0.0]]), tf.constant([[1.0, 4.0], [0.0, 3.0]])
    terms = {"hint": Term("hint", student_tap="a", teacher_tap="b")}
    numbers = settings(**{"hint.weight": 1.0})
    _, parts = step_loss(HARD, STUDENT, TEACHER, LABELS, numbers, terms, {"hint": pair})
    np.testing.assert_allclose(parts["hint"], [4 / 2, 9 / 2])


def test_a_loss_receives_the_labels_it_names():
    def own(student, teacher, labels):
        return tf.cast(labels, tf.float32) + 1

    _, parts = step_loss(HARD, STUDENT, TEACHER, LABELS, settings(**{"own.weight": 1.0}), {"own": Term(own)})
    np.testing.assert_array_equal(parts["own"], [1.0, 2.0])


def test_a_message_names_the_term():
    terms = {"own": Term(lambda s, t: tf.reduce_mean(s - t))}
    with pytest.raises(InputError, match=r"The term 'own': A loss returns one number.*Fix distill.terms.own"):
        step_loss(HARD, STUDENT, TEACHER, LABELS, settings(**{"own.weight": 1.0}), terms)


@pytest.mark.parametrize(
    "labels,classes,labeled,right",
    [
        ([0, -1, 1], True, [1, 0, 1], [1, 0, 0]),
        ([[0], [-1], [1]], True, [1, 0, 1], [1, 0, 0]),
        ([0.0, -1.0, 1.0], True, [1, 0, 1], [1, 0, 0]),
        ([[0.9, 0.1], [0.2, 0.8], [0.0, 1.0]], False, [1, 1, 1], [1, 1, 0]),
    ],
)
def test_labels_of_every_form(labels, classes, labeled, right):
    labels = tf.constant(labels)
    logits = tf.constant([[2.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    assert are_classes(labels) == classes
    np.testing.assert_array_equal(is_labeled(labels), labeled)
    np.testing.assert_array_equal(is_right(labels, logits), right)
