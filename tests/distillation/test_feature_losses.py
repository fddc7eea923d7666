"""Each feature method: a number by hand, a float64 oracle and its gradient, what changes nothing, equal inputs."""

import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation import feature_losses
from kdistill.distillation.terms import LOSSES
from kdistill.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def hint_oracle(student, teacher):
    return np.array([np.mean((s - t) ** 2) for s, t in zip(student, teacher, strict=True)])


def averaged(image, height, width):
    """Each cell repeated until both sizes divide evenly, then the mean of each block."""
    repeated = image.repeat(height, axis=0).repeat(width, axis=1)
    blocks = repeated.reshape(height, repeated.shape[0] // height, width, repeated.shape[1] // width)
    return blocks.mean(axis=(1, 3))


def attention_oracle(student, teacher):
    result = []
    for s, t in zip(student, teacher, strict=True):
        height, width = min(s.shape[0], t.shape[0]), min(s.shape[1], t.shape[1])
        s, t = (averaged(np.einsum("hwc,hwc->hw", x, x), height, width) for x in (s, t))
        result.append(np.sum((s / np.linalg.norm(s) - t / np.linalg.norm(t)) ** 2))
    return np.array(result)


def huber(x):
    return x**2 / 2 if abs(x) <= 1 else abs(x) - 0.5


def rkd_distance_oracle(student, teacher):
    n = len(student)
    pairs = list(itertools.permutations(range(n), 2))
    result, tables = np.zeros(n), []
    for x in (student.reshape(n, -1), teacher.reshape(n, -1)):
        table = {(i, j): np.linalg.norm(x[i] - x[j]) for i, j in pairs}
        mean = np.mean(list(table.values()))
        tables.append({pair: distance / mean for pair, distance in table.items()})
    for i, j in pairs:
        result[i] += huber(tables[0][i, j] - tables[1][i, j]) / (n - 1)
    return result


def rkd_angle_oracle(student, teacher):
    n = len(student)
    student, teacher = student.reshape(n, -1), teacher.reshape(n, -1)
    result = np.zeros(n)
    for i, j, k in itertools.permutations(range(n), 3):
        cosines = [
            (x[i] - x[j]) @ (x[k] - x[j]) / np.linalg.norm(x[i] - x[j]) / np.linalg.norm(x[k] - x[j])
            for x in (student, teacher)
        ]
        result[j] += huber(cosines[0] - cosines[1]) / ((n - 1) * (n - 2))
    return result


def similarity_oracle(student, teacher):
    n = len(student)
    rows = []
    for x in (student.reshape(n, -1), teacher.reshape(n, -1)):
        gram = np.array([[a @ b for b in x] for a in x])
        rows.append(gram / np.sqrt((gram**2).sum(axis=1, keepdims=True)))
    return ((rows[0] - rows[1]) ** 2).mean(axis=1)


ORACLES = {
    "hint": hint_oracle,
    "attention_transfer": attention_oracle,
    "rkd_distance": rkd_distance_oracle,
    "rkd_angle": rkd_angle_oracle,
    "similarity_preserving": similarity_oracle,
}
METHODS = {name: getattr(feature_losses, name) for name in ORACLES}
RELATIONS = ["rkd_distance", "rkd_angle", "similarity_preserving"]
every = pytest.mark.parametrize("name", METHODS)


def maps(name, scale=1.0, batch=5, seed=0):
    """Student `[batch, 2, 3, 4]` and a teacher of the same shape for `hint`, of another one otherwise."""
    random = np.random.default_rng(seed)
    shape = (batch, 2, 3, 4) if name == "hint" else (batch, 3, 2, 6)
    if scale == "extreme":
        return [random.uniform(-100, 100, s).astype(np.float32) for s in ((batch, 2, 3, 4), shape)]
    return [random.normal(1, 1, s).astype(np.float32) * np.float32(scale) for s in ((batch, 2, 3, 4), shape)]


def value_and_gradient(function, student):
    student = tf.convert_to_tensor(np.asarray(student, np.float32))
    with tf.GradientTape() as tape:
        tape.watch(student)
        value = function(student)
        mean = tf.reduce_mean(value)
    assert value.dtype == tf.float32 and value.shape == student.shape[:1]
    return value.numpy(), tape.gradient(mean, student).numpy()


def numerical_gradient(function, student, step):
    student = student.astype(np.float64)
    slope = np.zeros_like(student)
    for index in np.ndindex(student.shape):
        moved = np.zeros_like(student)
        moved[index] = step
        slope[index] = (function(student + moved) - function(student - moved)) / (2 * step)
    return slope


def test_hint_by_hand_and_its_closed_form_gradient():
    student, teacher = np.array([[[1.0, 2.0], [6.0, 0.0]]]), np.array([[[0.0, 2.0], [3.0, 0.0]]])
    value, slope = value_and_gradient(lambda s: feature_losses.hint(s, teacher), student)
    np.testing.assert_allclose(value, [10 / 4], rtol=1e-6)
    np.testing.assert_allclose(slope, 2 * (student - teacher) / 4, rtol=1e-6)


def test_attention_transfer_by_hand():
    """Maps (3, 4) and (1, 0), at length 1 (0.6, 0.8) and (1, 0): 0.16 + 0.64. Channels need not agree."""
    student = np.array([[[[1.0, 1.0, 1.0], [2.0, 0.0, 0.0]]]])
    teacher = np.array([[[[-5.0, 5.0], [0.0, 0.0]]]])
    np.testing.assert_allclose(feature_losses.attention_transfer(student, teacher), [0.8], rtol=1e-6)


def test_attention_maps_of_other_sizes_are_averaged_by_area():
    """Squares (3, 6, 9) become ((3 + 6/2) / 1.5, (6/2 + 9) / 1.5) = (4, 8); 4 x 4 becomes 2 x 2 block by block."""
    student = np.sqrt(np.array([3.0, 6.0, 9.0])).reshape(1, 1, 3, 1)
    teacher = np.sqrt(np.array([4.0, 8.0])).reshape(1, 1, 2, 1)
    np.testing.assert_allclose(feature_losses.attention_transfer(student, teacher), [0.0], atol=1e-12)
    large = np.random.default_rng(0).normal(size=(2, 4, 4, 3))
    blocks = (large**2).sum(-1).reshape(2, 2, 2, 2, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(feature_losses.attention_transfer(large, np.sqrt(blocks)[..., None]), [0, 0], atol=1e-12)
    np.testing.assert_allclose(feature_losses.attention_transfer(np.sqrt(blocks)[..., None], large), [0, 0], atol=1e-12)


LINE = np.array([[0.0], [1.0], [3.0]])


def test_rkd_distance_by_hand():
    """Distances 1, 2, 3 over their mean: 1/2, 1, 3/2; three vectors at right angles: 1, 1, 1."""
    np.testing.assert_allclose(feature_losses.rkd_distance(LINE, np.eye(3)), [0.125, 0.0625, 0.0625], rtol=1e-6)


def test_rkd_distance_beyond_one_is_linear():
    """Four of five examples equal: distances 0 and 1, over their mean 0.4: 0 and 2.5, instead of 1."""
    student = np.array([[0.0], [0.0], [0.0], [0.0], [1.0]])
    expected = [(3 * 0.5 + 1.0) / 4] * 4 + [1.0]
    np.testing.assert_allclose(feature_losses.rkd_distance(student, np.eye(5)), expected, rtol=1e-6)


def test_rkd_angle_by_hand():
    """Cosines on a line 1, -1, 1, in an equilateral triangle 1/2: Huber of 0.5, 1.5, 0.5."""
    np.testing.assert_allclose(feature_losses.rkd_angle(LINE, np.eye(3)), [0.125, 1.0, 0.125], rtol=1e-6)


def test_rkd_angle_leaves_out_what_the_teacher_does_not_define():
    """Examples 0 and 1 of the teacher are equal: of the angles at 0, only that between 2 and 3 counts."""
    teacher, student = np.eye(4), np.random.default_rng(0).normal(size=(4, 3))
    teacher[1] = teacher[0]
    at_0 = (student[2] - student[0]) @ (student[3] - student[0])
    at_0 /= np.linalg.norm(student[2] - student[0]) * np.linalg.norm(student[3] - student[0])
    expected = 2 * huber(at_0 - 0.5) / 6
    np.testing.assert_allclose(feature_losses.rkd_angle(student, teacher)[0], expected, rtol=1e-6)
    # The student's two equal examples do have an angle as seen from a third: its cosine is 1.
    np.testing.assert_allclose(feature_losses.rkd_angle(teacher[[0, 1, 2]], np.eye(3))[2], 0.125, rtol=1e-6)


def test_similarity_preserving_by_hand():
    """Unit rows (1, 0) and (1, 1)/sqrt(2): squared distance 2 - sqrt(2), over a batch of 2."""
    value = feature_losses.similarity_preserving(np.eye(2), np.ones((2, 5)))
    np.testing.assert_allclose(value, [0.292893, 0.292893], atol=1e-6)


@every
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, "extreme"])
def test_each_against_float64(name, scale):
    student, teacher = maps(name, scale, batch=9)
    expected = ORACLES[name](student.astype(np.float64), teacher.astype(np.float64))
    np.testing.assert_allclose(METHODS[name](student, teacher), expected, rtol=1e-5, atol=1e-12)


@every
@pytest.mark.parametrize("scale", [1.0, "extreme"])
def test_each_gradient_against_float64(name, scale):
    student, teacher = maps(name, scale)
    _, slope = value_and_gradient(lambda s: METHODS[name](s, teacher), student)
    wide = teacher.astype(np.float64)
    expected = numerical_gradient(lambda s: ORACLES[name](s, wide).mean(), student, 1e-5 if scale == 1.0 else 1e-3)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_small_differences_far_from_zero_count(name):
    """Features of 10000 that differ by 0.01: without the mean they would pass for equal."""
    student, teacher = maps(name, 0.01)
    student += 10000
    expected = ORACLES[name](student.astype(np.float64), teacher.astype(np.float64))
    np.testing.assert_allclose(METHODS[name](student, teacher), expected, rtol=1e-5)


def test_hint_depends_on_the_difference_alone():
    student, teacher = maps("hint")
    expected = feature_losses.hint(student, teacher)
    np.testing.assert_allclose(feature_losses.hint(student + 5, teacher + 5), expected, rtol=1e-5)
    np.testing.assert_allclose(feature_losses.hint(student * 3, teacher * 3), 9 * expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["attention_transfer", *RELATIONS])
def test_a_factor_on_either_models_features_changes_nothing(name):
    student, teacher = maps(name)
    expected = METHODS[name](student, teacher)
    for factors in ((7, 1), (1, -0.3), (1e-6, 1e6)):
        moved = METHODS[name](student * np.float32(factors[0]), teacher * np.float32(factors[1]))
        np.testing.assert_allclose(moved, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle"])
def test_a_shift_of_all_examples_changes_nothing(name):
    student, teacher = maps(name)
    expected = METHODS[name](student, teacher)
    np.testing.assert_allclose(METHODS[name](student + 5, teacher), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(METHODS[name](student, teacher + student[0].mean()), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", RELATIONS)
def test_a_rotation_and_an_order_of_features_change_nothing(name):
    student, teacher = (x.reshape(5, -1) for x in maps(name))
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(24, 24)))[0]
    expected = METHODS[name](student, teacher)
    np.testing.assert_allclose(METHODS[name](student @ rotation, teacher), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(METHODS[name](student[:, ::-1], teacher), expected, rtol=1e-6)
    order = [3, 1, 4, 0, 2]
    np.testing.assert_allclose(METHODS[name](student[order], teacher[order]), expected.numpy()[order], rtol=1e-5)


@pytest.mark.parametrize("name", RELATIONS)
def test_features_are_flattened_in_row_major_order(name):
    student, teacher = maps(name)
    expected = METHODS[name](student.reshape(5, -1), teacher.reshape(5, -1))
    np.testing.assert_array_equal(METHODS[name](student, teacher), expected.numpy())


@every
@pytest.mark.parametrize("scale", [1e-3, 1.0, "extreme"])
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_equal_inputs_give_zero_and_no_gradient(name, scale, batch):
    student = maps(name, scale, batch)[0]
    value, slope = value_and_gradient(lambda s: METHODS[name](s, student), student)
    np.testing.assert_array_equal(value, np.zeros(batch))
    np.testing.assert_allclose(slope, np.zeros_like(slope), atol=1e-9)


NORMAL = np.random.default_rng(2).normal(size=(4, 2, 2, 3))
OTHER = np.random.default_rng(3).normal(size=(4, 2, 2, 3))
ZEROS = np.zeros_like(NORMAL)
HALF = NORMAL * np.array([0, 0, 1, 1]).reshape(4, 1, 1, 1)
DEGENERATE = {
    "student of zeros": (ZEROS, NORMAL),
    "teacher of zeros": (NORMAL, ZEROS),
    "both of zeros": (ZEROS, ZEROS),
    "some examples of zeros": (HALF, NORMAL),
    "some of the teacher's of zeros": (NORMAL, HALF),
    "equal examples": (ZEROS + 0.1, NORMAL),
    "two equal examples": (NORMAL[[0, 0, 1, 2]], NORMAL),
    "one example": (NORMAL[:1], OTHER[:1]),
    "two examples": (NORMAL[:2], OTHER[:2]),
    "tiny": (NORMAL * 1e-20, OTHER),
    "huge": (NORMAL, OTHER * 1e15),
}


@every
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_inputs_give_numbers_and_gradients(name, case):
    student, teacher = DEGENERATE[case]
    value, slope = value_and_gradient(lambda s: METHODS[name](s, teacher), student)
    # The smaller a vector, the faster its direction turns; and hint's gradient is as large as its inputs.
    limit = 1e22 if case in ("tiny", "huge") else 100
    assert np.all(np.isfinite(value)) and np.all(np.isfinite(slope)) and np.abs(slope).max() <= limit


@pytest.mark.exhaustive(
    but=(
        "student of zeros-rkd_angle",
        "two equal examples-rkd_distance",
        "one example-attention_transfer",
        "student of zeros-hint",
        "student of zeros-similarity_preserving",
    )
)
@pytest.mark.slow
@every
@pytest.mark.parametrize("case", ["student of zeros", "two equal examples", "one example"])
def test_degenerate_inputs_give_gradients_under_xla(name, case):
    """TensorFlow's own kernels take 0 times the infinite slope of a root for 0; XLA's do not."""
    student, teacher = DEGENERATE[case]

    def value_and_slope(s):
        with tf.GradientTape() as tape:
            tape.watch(s)
            value = METHODS[name](s, teacher)
        return value, tape.gradient(value, s)

    value, slope = tf.function(value_and_slope, jit_compile=True)(tf.constant(student, tf.float32))
    expected, expected_slope = value_and_slope(tf.constant(student, tf.float32))
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(slope, expected_slope, rtol=1e-4, atol=1e-6)


def test_a_batch_too_small_for_a_relation_costs_nothing():
    for name in RELATIONS:
        np.testing.assert_array_equal(METHODS[name](NORMAL[:1], OTHER[:1]), [0.0])
    np.testing.assert_array_equal(feature_losses.rkd_angle(NORMAL[:2], OTHER[:2]), [0.0, 0.0])


def test_zero_features_have_no_direction():
    np.testing.assert_allclose(feature_losses.attention_transfer(ZEROS, NORMAL), np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(feature_losses.similarity_preserving(ZEROS, NORMAL), np.full(4, 1 / 4), rtol=1e-6)
    _, slope = value_and_gradient(lambda s: feature_losses.attention_transfer(s, NORMAL), ZEROS)
    np.testing.assert_array_equal(slope, ZEROS)


@every
@pytest.mark.parametrize("compiled", [False, True])
def test_a_broken_student_shows_in_a_traced_step(name, compiled):
    student, teacher = maps(name)
    free = [tf.TensorSpec((None, *x.shape[1:]), tf.float32) for x in (student, teacher)]
    function = tf.function(METHODS[name], input_signature=free, jit_compile=compiled)
    np.testing.assert_allclose(function(student, teacher), METHODS[name](student, teacher), rtol=1e-5, atol=1e-7)
    student[0] = np.nan
    assert np.isnan(function(student, teacher).numpy()[0])


@pytest.mark.parametrize("shapes", [((4, 6), (2, 3)), ((4, 4), (4, 4)), ((3, 5), (5, 3))])
def test_attention_maps_may_have_sizes_known_only_in_the_step(shapes):
    random = np.random.default_rng(0)
    student, teacher = (random.normal(size=(2, *shape, 3)).astype(np.float32) for shape in shapes)
    free = tf.TensorSpec((None, None, None, 3), tf.float32)
    function = tf.function(feature_losses.attention_transfer, input_signature=[free, free])
    expected = attention_oracle(student.astype(np.float64), teacher.astype(np.float64))
    np.testing.assert_allclose(function(student, teacher), expected, rtol=1e-5)


@every
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_features_are_computed_in_full(name, dtype):
    """In float16 the square of 300 is infinite."""
    student, teacher = (tf.cast(x, dtype) for x in maps(name, 300.0))
    wide = METHODS[name](tf.cast(student, tf.float32), tf.cast(teacher, tf.float32))
    assert np.all(np.isfinite(wide))
    np.testing.assert_array_equal(METHODS[name](student, teacher), wide)


def test_other_shapes_are_refused_by_name():
    with pytest.raises(InputError, match=r"hint expects .* one shape, received .*1x1 convolution"):
        feature_losses.hint(NORMAL, OTHER[..., :2])
    with pytest.raises(InputError, match=r"attention_transfer expects .*\(4, 12\).*before global pooling"):
        feature_losses.attention_transfer(NORMAL.reshape(4, 12), OTHER)
    for name in METHODS:
        with pytest.raises(InputError, match="of the same examples, received"):
            METHODS[name](NORMAL, OTHER[:1])
        with pytest.raises(InputError, match="of the same examples, received"):
            METHODS[name](NORMAL[:, 0, 0, 0], OTHER[:, 0, 0, 0])


def test_the_table_in_the_documentation_is_whole():
    """docs/methods.md has a row for every loss of a term, with its arguments and their defaults."""
    rows = re.findall(r"^\| `(\w+)` \|(?:[^|]*\|){3} ([^|]*) \|$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE)
    arguments = {}
    for name, function in LOSSES.items():
        parameters = list(inspect.signature(function).parameters.values())[2:]
        texts = [p.name if p.default is p.empty else f"{p.name}={p.default:g}" for p in parameters]
        arguments[name] = ", ".join(f"`{text}`" for text in texts) or "none"
    assert dict(rows) == arguments
