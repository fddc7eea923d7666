"""Each logit method: a number by hand, a float64 oracle and its gradient, what changes nothing, equal inputs."""

import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation import losses
from kdistill.errors import InputError

LABELS = np.array([3, 0, 9, 1, 1, 7, 4, 2])


def log_softmax(logits):
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl(teacher, student):
    """KL of log-probabilities, one row."""
    return sum(np.exp(t) * (t - s) for t, s in zip(teacher, student, strict=True))


def cosine_oracle(student, teacher):
    return np.array([1 - s @ t / np.sqrt((s @ s) * (t @ t)) for s, t in zip(student, teacher, strict=True)])


def dkd_oracle(student, teacher, labels=LABELS, alpha=1.0, beta=8.0, temperature=4.0):
    result = []
    for s, t, label in zip(student / temperature, teacher / temperature, labels, strict=True):
        s_rest, t_rest = np.delete(s, label), np.delete(t, label)
        s_two, t_two = ([x[label], np.logaddexp.reduce(rest)] for x, rest in ((s, s_rest), (t, t_rest)))
        tckd = kl(log_softmax(np.array(t_two)), log_softmax(np.array(s_two)))
        result.append(alpha * tckd + beta * kl(log_softmax(t_rest), log_softmax(s_rest)))
    return temperature**2 * np.array(result)


def pearson(a, b):
    return np.corrcoef(a, b)[0, 1]


def dist_parts(student, teacher, temperature):
    """1 - correlation of each example (inter) and of each class (intra)."""
    p, q = np.exp(log_softmax(student / temperature)), np.exp(log_softmax(teacher / temperature))
    rows = np.array([1 - pearson(a, b) for a, b in zip(p, q, strict=True)])
    columns = np.array([1 - pearson(a, b) for a, b in zip(p.T, q.T, strict=True)])
    return rows, columns


def standardized_oracle(student, teacher, temperature=2.0):
    student, teacher = ((x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) for x in (student, teacher))
    pairs = zip(log_softmax(teacher / temperature), log_softmax(student / temperature), strict=True)
    return temperature**2 * np.array([kl(t, s) for t, s in pairs])


METHODS = {
    "cosine": losses.cosine,
    "dkd": lambda s, t: losses.dkd(s, t, LABELS[: len(s)]),
    "dist": lambda s, t: losses.dist(s, t, beta=2.0, gamma=3.0, temperature=4.0),
    "standardized_kl": losses.standardized_kl,
}
# Of each, the mean over the batch: for dist that is what the paper defines.
MEANS = {
    "cosine": lambda s, t: cosine_oracle(s, t).mean(),
    "dkd": lambda s, t: dkd_oracle(s, t).mean(),
    "dist": lambda s, t: 16 * sum(w * part.mean() for w, part in zip((2.0, 3.0), dist_parts(s, t, 4.0), strict=True)),
    "standardized_kl": lambda s, t: standardized_oracle(s, t).mean(),
}
every = pytest.mark.parametrize("name", METHODS)


def logits(scale, seed=0):
    """Student and teacher `[8, 10]`: normal, or "extreme", from -100 to 100 with one certain example each."""
    random = np.random.default_rng(seed)
    if scale != "extreme":
        return [random.normal(0, scale, (8, 10)).astype(np.float32) for _ in range(2)]
    student, teacher = (random.uniform(-100, 100, (8, 10)).astype(np.float32) for _ in range(2))
    student[0] = np.where(np.arange(10) == 3, 100, -100)
    teacher[1] = np.where(np.arange(10) == 5, 100, -100)
    return [student, teacher]


def value_and_gradient(function, student):
    student = tf.convert_to_tensor(np.asarray(student, np.float32))
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = function(student)
        mean = tf.reduce_mean(value)
    assert value.dtype == tf.float32 and value.shape == student.shape[:1]
    return value.numpy(), tape.gradient(mean, student).numpy()


def numerical_gradient(function, student, step=1e-5):
    student = student.astype(np.float64)
    slope = np.zeros_like(student)
    for index in np.ndindex(student.shape):
        moved = np.zeros_like(student)
        moved[index] = step
        slope[index] = (function(student + moved) - function(student - moved)) / (2 * step)
    return slope


def test_cosine_by_hand():
    value = losses.cosine([[1.0, 0.0], [1.0, 0.0], [2.0, 2.0]], [[1.0, 1.0], [-3.0, 0.0], [0.0, 5.0]])
    np.testing.assert_allclose(value, [0.292893, 2.0, 0.292893], atol=1e-6)


def test_cosine_has_the_closed_form_gradient():
    student, teacher = logits(3.0)
    s, t = (np.linalg.norm(x, axis=-1, keepdims=True) for x in (student, teacher))
    closed = -(teacher / t - student / s * (student * teacher).sum(-1, keepdims=True) / (s * t)) / s / 8
    np.testing.assert_allclose(value_and_gradient(lambda x: losses.cosine(x, teacher), student)[1], closed, atol=1e-6)


def test_dkd_by_hand():
    """TCKD of (1/2, 1/2) and (1/4, 3/4): 0.143841. NCKD of (1/2, 1/2) and (2/3, 1/3): 0.0588915."""
    teacher, student = np.log([[2.0, 1.0, 1.0]]), np.log([[1.0, 2.0, 1.0]])
    tckd, nckd = 0.143841, 0.0588915
    np.testing.assert_allclose(losses.dkd(student, teacher, [0], 1.0, 0.0, 1.0), [tckd], atol=1e-6)
    np.testing.assert_allclose(losses.dkd(student, teacher, [0], 0.0, 1.0, 1.0), [nckd], atol=1e-6)
    np.testing.assert_allclose(losses.dkd(student, teacher, [0], temperature=1.0), [tckd + 8 * nckd], atol=2e-6)
    # At T = 2 with logits twice as large the distributions are the same, and the loss is 4 times as large.
    twice = losses.dkd(2 * student, 2 * teacher, [0], 1.0, 1.0, 2.0)
    np.testing.assert_allclose(twice, [4 * (tckd + nckd)], atol=4e-6)


@pytest.mark.parametrize("scale", [1.0, 10.0, "extreme"])
def test_dkd_holds_kl_as_the_paper_decomposes_it(scale):
    """Equation 7 of the paper: KL = TCKD + (1 - p_teacher(target)) NCKD."""
    student, teacher = logits(scale)
    p = np.exp(log_softmax(teacher.astype(np.float64) / 4))[np.arange(8), LABELS]
    value = losses.dkd(student, teacher, LABELS, alpha=1.0, beta=1 - p, temperature=4.0)
    np.testing.assert_allclose(value, losses.kl_logits(student, teacher, 4.0), rtol=1e-5, atol=1e-5)


def test_dkd_takes_labels_of_every_form():
    student, teacher = logits(3.0)
    expected = losses.dkd(student, teacher, LABELS).numpy()
    for labels in (LABELS[:, None], LABELS.astype(np.float32), np.eye(10)[LABELS], 0.9 * np.eye(10)[LABELS] + 0.01):
        np.testing.assert_array_equal(losses.dkd(student, teacher, labels), expected)
    unlabeled = np.where(np.arange(8) < 4, -1, LABELS)
    filled = np.where(np.arange(8) < 4, teacher.argmax(-1), LABELS)
    np.testing.assert_array_equal(losses.dkd(student, teacher, unlabeled), losses.dkd(student, teacher, filled).numpy())


def test_dkd_refuses_a_class_that_does_not_exist():
    with pytest.raises(tf.errors.InvalidArgumentError):
        losses.dkd(*logits(1.0), [3, 0, 10, 1, 1, 7, 4, 2])


def test_dkd_with_two_classes_is_kl():
    """One other class leaves nothing to tell apart: NCKD is 0."""
    student, teacher = (x[:, :2] for x in logits(3.0))
    expected = losses.kl_logits(student, teacher, 4.0)
    np.testing.assert_allclose(losses.dkd(student, teacher, LABELS % 2), expected, rtol=1e-6, atol=1e-6)


def test_dist_by_hand():
    """Probabilities (2, 1, 1)/4 and (1, 2, 1)/4 have correlation -1/2, over classes and over examples."""
    student = np.log([[2.0, 1, 1], [1, 2, 1], [1, 1, 2]])
    teacher = np.roll(student, 1, axis=1)
    np.testing.assert_allclose(losses.dist(student[:1], teacher[:1]), [1.5], atol=1e-6)
    np.testing.assert_allclose(losses.dist(student, teacher, 1.0, 0.0), [1.5] * 3, atol=1e-6)
    np.testing.assert_allclose(losses.dist(student, teacher, 0.0, 1.0), [1.5] * 3, atol=1e-6)
    np.testing.assert_allclose(losses.dist(2 * student, 2 * teacher, 1.0, 2.0, 2.0), [4 * 4.5] * 3, atol=1e-5)


def test_dist_gives_each_example_its_own_part():
    """All examples but the first agree with the teacher on what a class's probability is: they pay less."""
    teacher = logits(1.0)[1]
    student = teacher.copy()
    student[0] = teacher[0, ::-1]
    parts = losses.dist(student, teacher, beta=0.0).numpy()
    assert parts[0] > 2 * parts[1:].max() and parts.min() >= 0


def test_standardized_kl_by_hand():
    """Two logits have z-scores of 1 and -1: at T = 2, 4 * KL of (0.268941, 0.731059) and (0.731059, 0.268941)."""
    value = losses.standardized_kl([[5.0, 1.0]], [[0.0, 2.0]], temperature=2.0)
    np.testing.assert_allclose(value, [4 * 0.462117], atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0, "extreme"])
def test_each_against_float64(scale):
    student, teacher = logits(scale)
    wide = student.astype(np.float64), teacher.astype(np.float64)
    close = {"rtol": 1e-5, "atol": 1e-5}
    np.testing.assert_allclose(METHODS["cosine"](student, teacher), cosine_oracle(*wide), **close)
    np.testing.assert_allclose(METHODS["dkd"](student, teacher), dkd_oracle(*wide), **close)
    np.testing.assert_allclose(METHODS["standardized_kl"](student, teacher), standardized_oracle(*wide), **close)
    for temperature in (1.0, 4.0):
        rows, columns = dist_parts(*wide, temperature)
        inter = losses.dist(student, teacher, 1.0, 0.0, temperature)
        np.testing.assert_allclose(inter, temperature**2 * rows, **close)
        intra = losses.dist(student, teacher, 0.0, 1.0, temperature).numpy()
        np.testing.assert_allclose(intra.mean(), temperature**2 * columns.mean(), **close)


@every
@pytest.mark.parametrize("scale", [1.0, 10.0, "extreme"])
def test_each_gradient_against_float64(name, scale):
    student, teacher = logits(scale)
    _, slope = value_and_gradient(lambda s: METHODS[name](s, teacher), student)
    expected = numerical_gradient(lambda s: MEANS[name](s, teacher.astype(np.float64)), student)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["dkd", "dist", "standardized_kl"])
def test_a_constant_on_either_models_logits_changes_nothing(name):
    student, teacher = logits(3.0)
    expected = METHODS[name](student, teacher)
    for moved in ((student + 5, teacher), (student, teacher + 5), (student + 5, teacher + 5)):
        np.testing.assert_allclose(METHODS[name](*moved), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "standardized_kl"])
def test_a_factor_on_either_models_logits_changes_nothing(name):
    student, teacher = logits(3.0)
    expected = METHODS[name](student, teacher)
    for moved in ((student * 7, teacher), (student, teacher / 7), (student * 1e-30, teacher * 1e30)):
        np.testing.assert_allclose(METHODS[name](*moved), expected, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("scale", [1e-3, 1.0, "extreme"])
def test_equal_inputs_give_zero_and_no_gradient(name, scale):
    student = logits(scale)[0]
    value, slope = value_and_gradient(lambda s: METHODS[name](s, student), student)
    np.testing.assert_array_equal(value, np.zeros(8))
    np.testing.assert_allclose(slope, np.zeros((8, 10)), atol=1e-9)


ZEROS, NORMAL, CERTAIN = (
    np.zeros((4, 10)),
    logits(1.0)[0][:4],
    np.where(np.arange(10) == 3, 100.0, -100.0) * np.ones((4, 1)),
)
DEGENERATE = {
    "student of zeros": (ZEROS, NORMAL),
    "teacher of zeros": (NORMAL, ZEROS),
    "both of zeros": (ZEROS, ZEROS),
    "equal logits": (ZEROS + 0.1, NORMAL),
    "one example": (NORMAL[:1], NORMAL[1:2]),
    "the same example": (NORMAL[:1].repeat(4, 0), NORMAL),
    "certain student": (CERTAIN, NORMAL),
    "certain and wrong": (CERTAIN, CERTAIN[:, ::-1]),
    "one class": (NORMAL[:, :1], NORMAL[:, 1:2]),
}


@every
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_inputs_give_numbers_and_gradients(name, case):
    student, teacher = DEGENERATE[case]
    function = METHODS[name]
    if case == "one class":
        function = (lambda s, t: losses.dkd(s, t, np.zeros(4))) if name == "dkd" else function
    value, slope = value_and_gradient(lambda s: function(s, teacher), student)
    assert np.all(np.isfinite(value)) and value.min() >= -1e-6
    assert np.abs(slope).max() <= 100


def test_what_does_not_vary_has_no_correlation():
    np.testing.assert_array_equal(losses.cosine(ZEROS, NORMAL), np.ones(4))
    np.testing.assert_array_equal(losses.cosine(ZEROS, ZEROS), np.zeros(4))
    np.testing.assert_allclose(losses.dist(ZEROS + 0.1, NORMAL, gamma=0.0), np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(losses.dist(ZEROS + 0.1, NORMAL, beta=0.0).numpy().mean(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(losses.dist(ZEROS, ZEROS), np.zeros(4))
    uniform = np.log(10) + (log_softmax((NORMAL - NORMAL.mean(-1, keepdims=True)) / NORMAL.std(-1, keepdims=True) / 2))
    entropy_gap = 4 * (np.exp(uniform) / 10 * uniform).sum(-1)
    np.testing.assert_allclose(losses.standardized_kl(ZEROS + 0.1, NORMAL), entropy_gap, rtol=1e-5)


@pytest.mark.parametrize("count", [3, 5, 7, 11])
def test_rounding_is_not_taken_for_variation(count):
    """A student that gives every example the same logits: what its classes' probabilities differ by is rounding."""
    student, teacher = np.tile(NORMAL[0], (count, 1)), np.random.default_rng(1).normal(size=(count, 10))
    value, slope = value_and_gradient(lambda s: losses.dist(s, teacher, beta=0.0), student)
    np.testing.assert_allclose(value.mean(), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(slope, np.zeros_like(slope))


@pytest.mark.slow
@every
@pytest.mark.parametrize("compiled", [False, True])
def test_a_broken_student_shows(name, compiled):
    """NaN must not pass for a zero vector, in particular under XLA, whose maximum of NaNs is -inf."""
    student, teacher = logits(1.0)
    function = tf.function(METHODS[name], jit_compile=compiled)
    np.testing.assert_allclose(function(student, teacher), METHODS[name](student, teacher), rtol=1e-6, atol=1e-6)
    student[0] = np.nan
    assert np.isnan(function(student, teacher).numpy()[0])


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_logits_are_computed_in_full(name, dtype):
    student, teacher = (tf.cast(x, dtype) for x in logits(20.0))
    wide = METHODS[name](tf.cast(student, tf.float32), tf.cast(teacher, tf.float32))
    np.testing.assert_array_equal(METHODS[name](student, teacher), wide)


def test_settings_may_be_float32_tensors():
    student, teacher = logits(1.0)
    one, two = tf.constant(1.0), tf.constant(2.0)
    np.testing.assert_array_equal(
        losses.dkd(student, teacher, LABELS, one, two, two), losses.dkd(student, teacher, LABELS, 1, 2, 2).numpy()
    )
    np.testing.assert_array_equal(
        losses.dist(student, teacher, one, two, two), losses.dist(student, teacher, 1, 2, 2).numpy()
    )


@every
def test_other_classes_are_refused(name):
    student, teacher = logits(1.0)
    for wrong in (teacher[:, :7], teacher[:, :1], teacher[:1], teacher[:, :, None]):
        with pytest.raises(InputError, match=r"one shape \[batch, classes\], received"):
            METHODS[name](student, wrong)
