"""The global dtype policy is what it was, whatever happens meanwhile."""

import keras
import pytest

from kdistill.networks.precision import dtype_policy


def test_new_layers_take_the_policy_and_the_previous_one_returns():
    with dtype_policy("mixed_bfloat16"):
        layer = keras.layers.Dense(2)
        with dtype_policy(keras.DTypePolicy("float16")):
            assert keras.layers.Dense(2).compute_dtype == "float16"
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    assert layer.compute_dtype == "bfloat16" and keras.config.dtype_policy().name == "float32"


def test_the_previous_policy_returns_after_an_error():
    with pytest.raises(KeyError), dtype_policy("mixed_float16"):
        raise KeyError
    assert keras.config.dtype_policy().name == "float32"
