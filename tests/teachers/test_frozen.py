"""The frozen teacher: logits of whatever it is, blended in probability space, never in training mode."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.teachers.frozen import frozen

X = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")


def net(*tail, seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((3,)), *tail])


def test_probabilities_come_back_as_the_logits_before_them():
    plain = net(keras.layers.Dense(4))
    for tail in ([keras.layers.Dense(4, activation="softmax")], [keras.layers.Dense(4), keras.layers.Softmax()]):
        ended = net(*tail)
        ended.set_weights(plain.get_weights())
        np.testing.assert_allclose(frozen(ended)(X), plain(X), atol=1e-6)
        np.testing.assert_allclose(tf.function(frozen(ended))(X), plain(X), atol=1e-6)


def test_a_blend_is_the_weighted_mean_of_probabilities():
    p, q = np.array([[0.7, 0.2, 0.1]]), np.array([[0.1, 0.3, 0.6]])
    blend = frozen([lambda x: tf.math.log(tf.constant(p)), lambda x: tf.math.log(tf.constant(q)) + 3], [1, 3])
    np.testing.assert_allclose(tf.exp(blend(X)), (p + 3 * q) / 4, atol=1e-6)


def test_a_teacher_runs_in_inference_mode_and_without_gradient():
    teacher = net(keras.layers.Dropout(0.9), keras.layers.BatchNormalization(), keras.layers.Dense(4))
    predict, before = frozen(teacher), [w.copy() for w in teacher.get_weights()]
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        first = predict(x)
    assert tape.gradient(first, [x, *[v.value for v in teacher.trainable_variables]]) == [None] * 5
    np.testing.assert_array_equal(first, predict(x))
    for a, b in zip(before, teacher.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_half_precision_teachers_give_float32():
    teacher = net(keras.layers.Dense(4, dtype="mixed_bfloat16"))
    assert frozen(teacher)(X).dtype == tf.float32


def test_what_is_no_teacher_is_refused():
    with pytest.raises(InputError, match="received 'resnet'"):
        frozen("resnet")
    with pytest.raises(InputError, match="empty list"):
        frozen([])
    with pytest.raises(InputError, match="2 positive numbers"):
        frozen([net(keras.layers.Dense(4))] * 2, [1, 0])
