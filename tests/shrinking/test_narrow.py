"""The teacher made narrower: filters without an effect go first, and what is left computes the same."""

import keras
import numpy as np
import pytest
from keras import layers

from kdistill.networks import architectures
from kdistill.shrinking.narrow import can_be_narrowed, family_of, narrowed

RANDOM = np.random.default_rng(0)


def silence(layer, places):
    """Sets filters or units to 0, with their biases."""
    weights = layer.get_weights()
    weights[0][..., places] = 0
    for bias in weights[1:]:
        bias[places] = 0
    layer.set_weights(weights)


def with_random_state(model):
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([np.abs(RANDOM.normal(size=w.shape)) + 0.5 for w in layer.get_weights()])
    return model


def chain(shape, *parts):
    return with_random_state(keras.Sequential([keras.Input(shape), *parts]))


def images():
    convolutions = [layers.Conv2D(8, 3, activation="relu"), layers.DepthwiseConv2D(3), layers.Conv2D(4, 1)]
    return chain((9, 9, 2), layers.Rescaling(1 / 255), *convolutions, layers.Flatten(), layers.Dense(3))


def sequences():
    return chain((12, 3), layers.Conv1D(6, 3), layers.MaxPooling1D(), layers.Flatten(), layers.Dense(3))


def rows():
    return chain((5,), layers.BatchNormalization(), layers.Dense(8, "relu"), layers.Dropout(0.5), layers.Dense(3))


@pytest.mark.parametrize("build", [images, sequences, rows])
def test_filters_without_an_effect_are_removed(build):
    model = build()
    weighted = [layer for layer in model.layers if isinstance(layer, (layers.Conv1D, layers.Conv2D, layers.Dense))]
    for layer in weighted[:-1]:
        count = layer.get_weights()[0].shape[-1]
        silence(layer, RANDOM.permutation(count)[: count // 2])
    if build is images:  # a depthwise layer without a bias gives 0 for 0; with one, the last layers would see it
        depthwise = model.layers[2]
        depthwise.set_weights([depthwise.get_weights()[0], np.zeros(8)])
    half = narrowed(model, 0.5)
    inputs = 100 * RANDOM.random((7, *model.input_shape[1:])).astype("float32")
    np.testing.assert_allclose(half(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    kept = [layer for layer in half.layers if isinstance(layer, (layers.Conv1D, layers.Conv2D, layers.Dense))]
    counts = [[layer.get_weights()[0].shape[-1] for layer in of_model] for of_model in (weighted, kept)]
    assert counts[1] == [count // 2 for count in counts[0][:-1]] + [3]


def test_an_initializer_that_holds_an_array_does_not_matter():
    array = keras.initializers.Constant(RANDOM.normal(size=(3, 3, 2, 8)).tolist())
    start = {"kernel_initializer": array, "bias_initializer": keras.initializers.Constant([1.0] * 8)}
    model = chain((9, 9, 2), layers.Conv2D(8, 3, trainable=False, **start), layers.Flatten(), layers.Dense(3))
    half = narrowed(model, 0.5)
    assert half.layers[1].filters == 4 and not half.layers[1].trainable
    np.testing.assert_array_equal(half.layers[1].get_weights()[1], np.ones(4))


def test_the_scale_of_a_normalization_counts():
    model = chain((4,), layers.Dense(2, use_bias=False), layers.BatchNormalization(), layers.Dense(3))
    dense, norm, _ = model.layers
    dense.set_weights([np.array([[1.0, 3.0]] * 4)])
    norm.set_weights([np.array([9.0, 1.0]), np.zeros(2), np.zeros(2), np.ones(2)])
    assert narrowed(model, 0.5).layers[1].get_weights()[0].tolist() == [[1.0]] * 4
    norm.set_weights([np.array([2.0, 1.0]), np.zeros(2), np.zeros(2), np.ones(2)])
    assert narrowed(model, 0.5).layers[1].get_weights()[0].tolist() == [[3.0]] * 4


def test_what_is_no_chain_is_not_narrowed(tmp_path):
    inputs = keras.Input((8,))
    hidden = layers.Dense(8)(inputs)
    branches = keras.Model(inputs, layers.Dense(3)(layers.Add()([inputs, hidden])))
    grouped = chain((8, 8, 4), layers.Conv2D(8, 3, groups=2), layers.Flatten(), layers.Dense(3))
    single = chain((8,), layers.Dense(3))
    recurrent = chain((8, 3), layers.GRU(4), layers.Dense(3), layers.Dense(3))
    for model in (branches, grouped, single, recurrent, lambda images: images):
        assert not can_be_narrowed(model)
    assert family_of(branches, tmp_path / "none") is None and not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_family_of_a_teacher_is_a_network_of_recipes(tmp_path):
    teacher = images()
    family = family_of(teacher, tmp_path / "narrowed")
    network = family.network(8, 1, 1)
    model = architectures.build(network, (9, 9, 2), 3)
    inputs = RANDOM.random((4, 9, 9, 2)).astype("float32")
    np.testing.assert_array_equal(model(inputs), narrowed(teacher, 0.5)(inputs))
    sizes = [architectures.build(family.network(width, 1, 1), (9, 9, 2), 3).count_params() for width in (1, 8, 15)]
    assert sizes == sorted(set(sizes)) and sizes[-1] <= teacher.count_params() and family.widest == 15
