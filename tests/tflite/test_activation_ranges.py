import numpy as np
import pytest

from kdistill.tflite.activation_ranges import EXTREMES, LEVELS, SQUARED_ERROR, Activation, range_of


def activation(values: np.ndarray) -> Activation:
    one = Activation()
    one.extend(values)
    one.count(values)
    return one


def int8_error(values: np.ndarray, low: float, high: float) -> float:
    """What int8 with this range really loses."""
    step = (high - low) / LEVELS
    return float(np.sum((np.clip(np.round((values - low) / step), 0, LEVELS) * step + low - values) ** 2))


def test_extremes_contain_zero():
    assert range_of(activation(np.asarray([[2.0, 5.0]])), EXTREMES) == (0.0, 5.0)
    assert range_of(activation(np.asarray([[-3.0, -1.0]])), EXTREMES) == (-3.0, 0.0)


@pytest.mark.parametrize(
    "kind",
    ["one outlier", "normal", "both sides", "zeros", "uniform"],
)
def test_the_squared_error_is_near_the_least_one(kind):
    random = np.random.default_rng(0)
    values = {
        "one outlier": np.append(random.uniform(0, 1, 20_000), 300.0),
        "normal": random.normal(size=20_000),
        "both sides": np.concatenate([random.normal(size=20_000), [-80.0, 50.0]]),
        "zeros": np.maximum(random.normal(size=20_000) - 1, 0) ** 3,
        "uniform": random.uniform(-1, 2, 20_000),
    }[kind].reshape(-1, 1)
    one = activation(values)
    low, high = range_of(one, SQUARED_ERROR)
    extremes = range_of(one, EXTREMES)
    grid = np.geomspace(1, 1e-3, 60)
    best = min(int8_error(values, extremes[0] * a, extremes[1] * b) for a in grid[::12] for b in grid)
    assert int8_error(values, low, high) <= 1.1 * min(best, int8_error(values, *extremes))
    assert extremes[0] <= low <= 0 <= high <= extremes[1]
    if kind == "uniform":
        assert (low, high) == pytest.approx(extremes, abs=0.02)


def test_percentiles_cut_a_share_off_at_each_end():
    values = np.arange(-5_000, 5_000, dtype=np.float64).reshape(-1, 1)
    assert range_of(activation(values), "0.1 %") == pytest.approx((-4_990, 4_990), abs=4)
    assert range_of(activation(values), "1 %") == pytest.approx((-4_900, 4_900), abs=4)
    assert range_of(activation(np.zeros((10, 1))), "1 %") == (0.0, 0.0)


def test_batches_add_up():
    values = np.random.default_rng(1).normal(size=(400, 3))
    whole, parts = Activation(), Activation()
    whole.extend(values)
    for part in np.split(values, 4):
        parts.extend(part)
    whole.count(values)
    for part in np.split(values, 4):
        parts.count(part)
    assert (whole.low, whole.high) == (parts.low, parts.high) == (values.min(), values.max())
    assert whole.largest.tolist() == parts.largest.tolist() == abs(values).max(axis=0).tolist()
    assert (whole.counts == parts.counts).all()
