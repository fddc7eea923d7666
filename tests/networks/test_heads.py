"""What outputs mean: logits or probabilities, how many classes, and which of several outputs classifies."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.networks import heads
from kdistill.networks.heads import as_logits, class_count, head_of


def network(*tail) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4, 5, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), *tail])


@pytest.mark.parametrize(
    "outputs,message",
    [
        ({"a": 1, "b": 2}, "gives 2 outputs"),
        (tf.zeros((2, 1)), "give the model two outputs"),
        (tf.zeros((2, 3, 4)), "expected logits"),
    ],
)
def test_outputs_that_cannot_be_distilled_are_refused(outputs, message):
    with pytest.raises(InputError, match=message):
        as_logits(outputs)


def test_classes():
    assert class_count(network(keras.layers.Dense(4))) == 4
    assert class_count(keras.Sequential([keras.layers.Dense(4)])) is None


def test_the_head_follows_from_the_numbers():
    assert head_of(network(keras.layers.Dense(3))) == ("logits", 3)
    assert head_of(network(keras.layers.Dense(3, activation="softmax"))) == heads.Head("probabilities", 3)
    with pytest.raises(InputError, match=r"gives \(4, 2, 3\); export expects one output \[batch, classes\]"):
        head_of(network(keras.layers.Dense(6), keras.layers.Reshape((2, 3))))


def test_the_name_decides_in_a_dict_of_outputs():
    image = keras.Input((4, 5, 1))
    flat = keras.layers.Flatten()(image)
    numbers = keras.layers.Dense(3, activation="softmax")(flat)
    assert head_of(keras.Model(image, {"logits": numbers, "features": flat})) == ("logits", 3)
    with pytest.raises(InputError, match="has the outputs a, features; expected exactly one named 'logits'"):
        head_of(keras.Model(image, {"a": numbers, "features": flat}))


def test_noise_is_always_the_same():
    images = heads.noise_images(network())
    assert images.shape == (4, 4, 5, 1) and images.dtype == np.float32 and 200 < images.max() <= 255
    np.testing.assert_array_equal(images, heads.noise_images(network()))
