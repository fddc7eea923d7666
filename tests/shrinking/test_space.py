"""Families by the inputs of the data, and a user's own function."""

import pytest

from kdistill.errors import InputError
from kdistill.networks import architectures
from kdistill.recipe import Network
from kdistill.shrinking.space import FAMILIES, Candidate, families_for


def names(*arguments, **options):
    return [family.name for family in families_for(*arguments, **options)]


def test_families_follow_from_the_inputs():
    assert names((28, 28, 1)) == ["small_cnn", "ds_cnn", "resnet"]
    assert names((50, 6)) == ["conv1d"]
    assert names((6,)) == ["dense"]
    assert names((32, 32, 3), ("resnet",)) == ["resnet"]


@pytest.mark.parametrize(
    "shape, chosen, message",
    [
        ((6,), ("resnet",), "families for rows of numbers are dense; received resnet"),
        ((28, 28, 1), ("vgg",), "vgg"),
        ((4, 4, 4, 1), (), "inputs of 4 dimensions are none"),
        ({"a": (3,), "b": (4,)}, (), "several inputs"),
    ],
)
def test_what_does_not_fit_is_refused(shape, chosen, message):
    with pytest.raises(InputError, match=message):
        families_for(shape, chosen)


def test_candidates_are_networks_of_recipes():
    built = {}
    for name, shape in (("small_cnn", (28, 28, 1)), ("ds_cnn", (28, 28, 1)), ("conv1d", (20, 3)), ("dense", (6,))):
        for width in (2, 3):
            candidate = Candidate(FAMILIES[name], width, 2)
            assert candidate.name == f"{name}-w{width}-d2"
            built[name, width] = architectures.build(candidate.network, shape, 5).count_params()
        assert built[name, 2] < built[name, 3]
    # By hand: normalization of 6, 6 -> 2 -> 2 -> 5.
    assert built["dense", 2] == 4 * 6 + (6 * 2 + 2) + (2 * 2 + 2) + (2 * 5 + 5)
    # By hand, w = 2: stem 9*2 + norm; depthwise 9*2, 1x1 2*2; then stride 2: depthwise 9*2, 1x1 2*4; dense 4*5 + 5.
    weights = 18 + 18 + 4 + 18 + 8 + 25
    assert built["ds_cnn", 2] == weights + 4 * (2 + 2 + 2 + 2 + 4)
    half = Candidate(FAMILIES["ds_cnn"], 2, 2, reduce=2)
    assert half.name == "ds_cnn-w2-d2-r2"
    model = architectures.build(half.network, (28, 28, 1), 5)
    assert model.get_layer("reduce").output.shape[1:] == (14, 14, 1)
    # 7 pixels after the stem: the second block keeps size and filters.
    assert model.count_params() == (18 + 18 + 4 + 18 + 4 + 15) + 4 * (2 + 2 + 2 + 2 + 2)


def test_a_function_of_a_users_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "import keras\n"
        "def both(width, depth):\n"
        "    return keras.Sequential([keras.Input((4,))] + "
        "[keras.layers.Dense(width) for _ in range(depth)] + [keras.layers.Dense(3)])\n"
        "def all_four(shape, classes, width, depth):\n"
        "    return keras.Sequential([keras.Input(shape), keras.layers.Dense(width), keras.layers.Dense(classes)])\n"
    )
    for function, parameters in (("both", 35 + 56 + 24), ("all_four", 35 + 24)):
        (family,) = families_for((4,), own=f"{file}:{function}")
        candidate = Candidate(family, 7, 2)
        assert candidate.network == Network(f"{file}:{function}", {"width": 7, "depth": 2})
        assert architectures.build(candidate.network, (4,), 3).count_params() == parameters
    with pytest.raises(InputError, match="FILE.py:FUNCTION"):
        families_for((4,), own="mine")
