"""Each loss: a number by hand, its gradient, a shift that changes nothing, equal inputs, a float64 oracle."""

import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation import losses


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return np.exp(scaled) / np.exp(scaled).sum(axis=-1, keepdims=True)


def log_softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))


def kl_oracle(student, teacher, temperature):
    p = softmax(teacher, temperature)
    difference = log_softmax(teacher, temperature) - log_softmax(student, temperature)
    return temperature**2 * (p * difference).sum(axis=-1)


def soft_oracle(student, teacher, temperature):
    return -(temperature**2) * (softmax(teacher, temperature) * log_softmax(student, temperature)).sum(axis=-1)


def gradient(function, student):
    student = tf.constant(student, tf.float32)
    with tf.GradientTape() as tape:
        tape.watch(student)
        total = tf.reduce_sum(function(student))
    return tape.gradient(total, student).numpy()


def pairs(scale, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(0, scale, (8, 10)).astype(np.float32) for _ in range(2)]


EXTREME = (
    np.array([[100, -100, 0], [100, 99, -100], [0, 0, 0], [-100, -100, 100]], np.float32),
    np.array([[-100, 100, 0], [100, 99, -100], [100, 0, -100], [-99, -100, 100]], np.float32),
)


def test_kl_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2) at T = 1: 0.75 ln 1.5 + 0.25 ln 0.5 = 0.130812."""
    teacher, student = np.log([[3.0, 1.0]]), np.zeros((1, 2))
    np.testing.assert_allclose(losses.kl_logits(student, teacher, 1.0), [0.130812], atol=1e-6)
    # At T = 2 with logits twice as large the distributions are the same, and the loss is 4 times as large.
    np.testing.assert_allclose(losses.kl_logits(student, 2 * teacher, 2.0), [4 * 0.130812], atol=4e-6)


def test_temperature_of_the_study():
    """The study's example: logits (7, 2, 3, 20) at T = 20 give (0.2216, 0.1726, 0.1814, 0.4244)."""
    teacher = np.array([[7.0, 2.0, 3.0, 20.0]])
    uniform = np.zeros((1, 4))
    p = np.array([0.2216, 0.1726, 0.1814, 0.4244])
    expected = 400 * (p * np.log(4 * p)).sum()
    np.testing.assert_allclose(losses.kl_logits(uniform, teacher, 20.0), [expected], rtol=2e-3)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0, "extreme"])
def test_kl_against_float64(temperature, scale):
    student, teacher = EXTREME if scale == "extreme" else pairs(scale)
    value = losses.kl_logits(student, teacher, temperature).numpy()
    np.testing.assert_allclose(value, kl_oracle(student, teacher, temperature), rtol=1e-6, atol=1e-6)
    slope = gradient(lambda s: losses.kl_logits(s, teacher, temperature), student)
    closed = temperature * (softmax(student, temperature) - softmax(teacher, temperature))
    np.testing.assert_allclose(slope, closed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale", [1.0, 40.0, "extreme"])
def test_soft_cross_entropy_against_float64(temperature, scale):
    student, teacher = EXTREME if scale == "extreme" else pairs(scale)
    value = losses.soft_cross_entropy(student, teacher, temperature).numpy()
    np.testing.assert_allclose(value, soft_oracle(student, teacher, temperature), rtol=1e-6, atol=1e-6)
    slope = gradient(lambda s: losses.soft_cross_entropy(s, teacher, temperature), student)
    closed = temperature * (softmax(student, temperature) - softmax(teacher, temperature))
    np.testing.assert_allclose(slope, closed, rtol=1e-5, atol=1e-5)


def test_soft_cross_entropy_by_hand():
    """Teacher (3/4, 1/4) and a student of (1/2, 1/2): ln 2, whatever the teacher."""
    value = losses.soft_cross_entropy(np.zeros((1, 2)), np.log([[3.0, 1.0]]))
    np.testing.assert_allclose(value, [0.693147], atol=1e-6)


def test_mse_by_hand_and_gradient():
    student, teacher = np.array([[1.0, 2.0, 6.0]]), np.array([[0.0, 2.0, 3.0]])
    np.testing.assert_allclose(losses.mse_logits(student, teacher), [(1 + 0 + 9) / 3], rtol=1e-6)
    slope = gradient(lambda s: losses.mse_logits(s, teacher), student)
    np.testing.assert_allclose(slope, 2 * (student - teacher) / 3, rtol=1e-6)
    np.testing.assert_allclose(losses.mse_logits(*EXTREME)[:1], [2 * 200**2 / 3], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0, 40.0, "extreme"])
def test_mse_against_float64(scale):
    student, teacher = EXTREME if scale == "extreme" else pairs(scale)
    wide = student.astype(np.float64) - teacher.astype(np.float64)
    np.testing.assert_allclose(losses.mse_logits(student, teacher), (wide**2).mean(-1), rtol=1e-6, atol=1e-6)
    slope = gradient(lambda s: losses.mse_logits(s, teacher), student)
    np.testing.assert_allclose(slope, 2 * wide / wide.shape[1], rtol=1e-5, atol=1e-5)


def test_hard_cross_entropy_by_hand_and_gradient():
    logits = np.log([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0]])
    np.testing.assert_allclose(losses.hard_cross_entropy([1, 0], logits), np.log([2.0, 4.0]), rtol=1e-6)
    onehot = np.eye(3)[[1, 0]]
    np.testing.assert_allclose(losses.hard_cross_entropy(onehot, logits), np.log([2.0, 4.0]), rtol=1e-6)
    slope = gradient(lambda s: losses.hard_cross_entropy([1, 0], s), logits)
    np.testing.assert_allclose(slope, softmax(logits) - onehot, atol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 40.0, "extreme"])
def test_hard_cross_entropy_against_float64(scale):
    logits = EXTREME[0] if scale == "extreme" else pairs(scale)[0]
    labels = np.arange(len(logits)) % logits.shape[1]
    expected = -log_softmax(logits)[np.arange(len(labels)), labels]
    np.testing.assert_allclose(losses.hard_cross_entropy(labels, logits), expected, rtol=1e-6, atol=1e-6)
    slope = gradient(lambda s: losses.hard_cross_entropy(labels, s), logits)
    onehot = np.eye(logits.shape[1])[labels]
    np.testing.assert_allclose(slope, softmax(logits) - onehot, rtol=1e-5, atol=1e-7)
    soft = softmax(pairs(2.0)[1][: len(logits), : logits.shape[1]])
    expected = -(soft * log_softmax(logits)).sum(-1)
    np.testing.assert_allclose(losses.hard_cross_entropy(soft, logits), expected, rtol=1e-6, atol=1e-6)
    slope = gradient(lambda s: losses.hard_cross_entropy(soft, s), logits)
    np.testing.assert_allclose(slope, softmax(logits) - soft, rtol=1e-5, atol=1e-7)


def test_an_unlabeled_example_costs_nothing_and_pulls_nowhere():
    logits = pairs(1.0)[0][:2]
    assert losses.hard_cross_entropy([-1, 3], logits).numpy()[0] == 0
    assert np.all(gradient(lambda s: losses.hard_cross_entropy([-1, 3], s), logits)[0] == 0)


SOFT = {
    "kl": lambda s, t: losses.kl_logits(s, t, 4.0),
    "soft": lambda s, t: losses.soft_cross_entropy(s, t, 4.0),
    "mse": losses.mse_logits,
}


@pytest.mark.parametrize("name", SOFT)
def test_a_constant_on_all_logits_changes_nothing(name):
    student, teacher = pairs(3.0)
    moved = SOFT[name](student + 5, teacher + 5)
    np.testing.assert_allclose(moved, SOFT[name](student, teacher), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "soft"])
def test_a_constant_on_the_students_logits_alone_changes_nothing(name):
    student, teacher = pairs(3.0)
    np.testing.assert_allclose(SOFT[name](student + 5, teacher), SOFT[name](student, teacher), rtol=1e-4, atol=1e-5)


def test_a_constant_changes_no_hard_loss():
    logits = pairs(3.0)[0]
    moved = losses.hard_cross_entropy(np.arange(8), logits + 5)
    np.testing.assert_allclose(moved, losses.hard_cross_entropy(np.arange(8), logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kl", "mse"])
def test_equal_inputs_give_zero(name):
    student = pairs(30.0)[0]
    np.testing.assert_array_equal(SOFT[name](student, student), np.zeros(8))


def test_equal_inputs_give_the_entropy_and_no_gradient():
    student = pairs(3.0)[0]
    p = softmax(student, 4.0)
    np.testing.assert_allclose(SOFT["soft"](student, student), -16 * (p * np.log(p)).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(gradient(lambda s: SOFT["soft"](s, student), student), np.zeros((8, 10)), atol=1e-6)


def test_a_certain_right_answer_costs_nothing():
    np.testing.assert_allclose(losses.hard_cross_entropy([0], [[100.0, 0.0, 0.0]]), [0.0], atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", SOFT)
def test_half_precision_logits_are_computed_in_full(name, dtype):
    student, teacher = (tf.cast(logits, dtype) for logits in pairs(20.0))
    value = SOFT[name](student, teacher)
    assert value.dtype == tf.float32
    wide = SOFT[name](tf.cast(student, tf.float32), tf.cast(teacher, tf.float32))
    np.testing.assert_array_equal(value, wide)
