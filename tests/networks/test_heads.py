"""What outputs mean: logits or probabilities, how many classes, and which of several outputs classifies."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.networks import signatures
from kdistill.networks.heads import CLASSES, Head, are_probabilities, kind_of
from kdistill.networks.outputs import as_logits, end_of_call
from kdistill.networks.signatures import class_count, head_of, subject_of


def network(*tail) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((4, 5, 1)), keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), *tail])


@pytest.mark.parametrize(
    "outputs,message",
    [
        ({"a": 1, "b": 2}, "gives 2 outputs"),
        (tf.zeros((2, 1)), "expected logits .* head='labels' .a binary problem. or head='numbers'"),
        (tf.zeros((2,)), "expected logits"),
        (tf.zeros((2, 3), tf.int32), "expected floating-point numbers"),
    ],
)
def test_outputs_that_cannot_be_distilled_are_refused(outputs, message):
    with pytest.raises(InputError, match=message):
        as_logits(outputs)


def test_classes():
    assert class_count(network(keras.layers.Dense(4))) == 4
    assert class_count(keras.Sequential([keras.layers.Dense(4)])) is None


def test_the_head_follows_from_the_numbers():
    assert head_of(network(keras.layers.Dense(3))) == Head(CLASSES, "logits", (3,))
    assert head_of(network(keras.layers.Dense(3, activation="softmax"))) == Head(CLASSES, "probabilities", (3,))
    assert head_of(network(keras.layers.Dense(6), keras.layers.Reshape((2, 3)))) == Head(CLASSES, "logits", (2, 3))


def test_the_name_decides_in_a_dict_of_outputs():
    image = keras.Input((4, 5, 1))
    flat = keras.layers.Flatten()(image)
    numbers = keras.layers.Dense(3, activation="softmax")(flat)
    assert head_of(keras.Model(image, {"logits": numbers, "features": flat})) == Head(CLASSES, "logits", (3,))
    with pytest.raises(InputError, match="has the outputs a, features; expected exactly one named 'logits'"):
        head_of(keras.Model(image, {"a": numbers, "features": flat}))


def test_noise_is_always_the_same():
    (images,) = signatures.noise_inputs(network()).values()
    assert images.shape == (4, 4, 5, 1) and images.dtype == np.float32 and 200 < images.max() <= 255
    (again,) = signatures.noise_inputs(network()).values()
    np.testing.assert_array_equal(images, again)


def test_kinds_of_numbers():
    """What numbers alone tell, and what the operation that gives them has to tell."""
    distributions, halves = np.array([[0.25, 0.75], [1.0, 0.0]]), np.full((2, 2), 0.5)
    shares, outside = np.array([[0.25, 0.5], [0.9, 0.8]]), np.array([[0.25, 0.5], [-0.1, 1.1]])
    broken, zeros = np.full((2, 2), np.nan), np.zeros((2, 2))
    expected = {
        "softmax": ["probabilities", "probabilities", "unclear", "logits", "probabilities"],
        "sigmoid": ["labels", "labels", "labels", "logits", "labels"],
        "scores": ["probabilities", "probabilities", "logits", "logits", "logits"],
        "unknown": ["probabilities", "probabilities", "unclear", "logits", "logits"],
    }
    for end, kinds in expected.items():
        assert [
            kind_of(rows, lambda end=end: end) for rows in (distributions, halves, shares, outside, broken)
        ] == kinds, end
        assert kind_of(shares[:, :1], lambda end=end: end) == ("labels" if end == "sigmoid" else "numbers")
        assert kind_of(zeros, lambda end=end: end) == ("labels" if end == "sigmoid" else "logits")
    assert kind_of(np.concatenate([outside, broken]), lambda: pytest.fail("is not asked")) == "logits"


def test_the_sum_of_probabilities_is_as_exact_as_their_precision():
    exact = np.random.default_rng(0).dirichlet(np.ones(10), 50)
    for step, nearest in ((256, 0.005), (32768, 1e-5)):
        rounded = (np.round(exact * step) / step).astype("float32")
        assert are_probabilities(rounded) and abs(rounded.sum(1) - 1).max() > nearest
        assert not are_probabilities(0.9 * rounded) and not are_probabilities(rounded + 1 / 8)
    half = tf.cast(tf.cast(exact, tf.bfloat16), tf.float32).numpy()
    assert are_probabilities(half) and abs(half.sum(1) - 1).max() > 1e-3
    assert not are_probabilities((exact * 1.005).astype("float32"))  # float32 is exact to 1e-6


def test_other_heads_have_kinds_of_their_own():
    sigmoid = keras.layers.Activation("sigmoid")
    for tail, (expected, name) in {
        (keras.layers.Dense(3), sigmoid, keras.layers.Reshape((3,))): (("labels", "probabilities", (3,)), "labels"),
        (keras.layers.Dense(1),): (("numbers", "numbers", (1,)), "outputs"),
        (keras.layers.Dense(3, activation="softmax"), keras.layers.Lambda(lambda p: p[:, 1:])): (
            ("numbers", "unclear", (2,)),
            "outputs",
        ),
        (keras.layers.Dense(3), keras.layers.Activation(tf.nn.softmax)): (
            ("classes", "probabilities", (3,)),
            "probabilities",
        ),
        (keras.layers.Dense(3, kernel_initializer="zeros"),): (("classes", "logits", (3,)), "logits"),
    }.items():
        head = head_of(network(*tail))
        assert head == Head(*expected) and head.exclusive == (expected[0] == "classes") and head.name == name
    assert head_of(network(keras.layers.Dense(1, activation="sigmoid"))) == Head("labels", "probabilities", (1,))


@pytest.mark.parametrize(
    "call,end",
    [
        (lambda x: tf.cast(tf.reshape(tf.nn.softmax(x), (-1, 4)), tf.float16), "softmax"),
        (lambda x: tf.clip_by_value(tf.sigmoid(x), 1e-3, 1.0), "sigmoid"),
        (lambda x: 10 * tf.matmul(x, tf.ones((4, 2))) / 3 + 1, "scores"),
        (lambda x: tf.concat([tf.nn.relu(x), tf.nn.log_softmax(x)], 1)[:, 1:5], "scores"),
        (lambda x: tf.matmul(tf.nn.softmax(x), tf.ones((4, 2))), "unknown"),
        (lambda x: (tf.nn.softmax(x) + tf.nn.softmax(2 * x)) / 2, "unknown"),
        (lambda x: tf.nn.relu(x) / tf.reduce_sum(tf.nn.relu(x), 1, keepdims=True), "unknown"),
        (lambda x: tf.transpose(tf.nn.softmax(tf.transpose(x))), "unknown"),
        (lambda x: x, "unknown"),
        (lambda x: x.numpy(), "unknown"),
    ],
)
def test_ends_of_graphs(call, end):
    assert end_of_call(call, np.zeros((3, 4), "float32")) == end


def test_subjects_of_messages():
    model = network(keras.layers.Dense(3, name="scores"))
    assert subject_of(model, "teacher") == f"The output 'scores' of the teacher '{model.name}'"
    assert subject_of(lambda x: x, "teacher") == "The output of the teacher"
