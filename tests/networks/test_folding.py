"""The copy of a teacher for inference: the same logits, fewer operations, and no link to the model's weights."""

import dataclasses

import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import CLASSES, corners, network

from kdistill.data.splits import Splits
from kdistill.errors import CheckFailed
from kdistill.networks import folding
from kdistill.networks.taps import tapped
from kdistill.recipe import Network, Recipe
from kdistill.runs.teaching import Teaching
from kdistill.training.strategy import SINGLE_DEVICE


def shaken(model: keras.Model) -> keras.Model:
    """The model with normalizations that do something."""
    random = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.set_weights([random.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    return model


def odd() -> keras.Model:
    """Strided, depthwise and dense layers, shortcuts, and normalizations that must stay."""
    keras.utils.set_random_seed(1)
    image = keras.Input((12, 12, 2))
    first = layers.Conv2D(6, 3, padding="same", name="first")(image)
    x = layers.BatchNormalization(name="folded_1")(first)
    x = layers.ReLU()(x)
    x = layers.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False, name="depthwise")(x)
    x = layers.BatchNormalization(scale=False, name="folded_2")(x)
    y = layers.Conv2D(12, 1, activation="relu", name="with_activation")(x)
    y = layers.BatchNormalization(name="stays_behind_an_activation")(y)
    z = layers.Conv2D(12, 1, name="used_twice")(x)
    y = layers.Add()([y, layers.BatchNormalization(name="stays_beside_another_use")(z), z])
    y = layers.BatchNormalization(name="stays_behind_a_sum")(y)
    y = layers.GlobalAveragePooling2D()(y)
    y = layers.BatchNormalization(center=False, name="folded_3")(layers.Dense(8, name="hidden")(y))
    return shaken(keras.Model(image, layers.Dense(4)(layers.Dropout(0.5)(layers.ReLU()(y)))))


def images(shape):
    return np.random.default_rng(0).uniform(0, 1, (16, *shape)).astype("float32")


def kinds(model):
    return [layer.name for layer in model.layers if isinstance(layer, layers.BatchNormalization)]


def test_the_logits_are_the_same_and_the_right_normalizations_are_gone():
    model = odd()
    before, x = [w.copy() for w in model.get_weights()], images((12, 12, 2))
    expected = np.asarray(model(x, training=False))
    twin = folding.inference_copy(model)
    assert kinds(twin) == ["stays_behind_an_activation", "stays_beside_another_use", "stays_behind_a_sum"]
    np.testing.assert_allclose(twin(x, training=False), expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for layer in model.layers[1:]:
        layer.set_weights([np.zeros_like(w) for w in layer.get_weights()])
    np.testing.assert_allclose(twin(x, training=False), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["first", "folded_1", "depthwise", "folded_2", "hidden"])
def test_a_tapped_layer_gives_what_it_gave(name):
    model, x = odd(), images((12, 12, 2))
    folded = folding.inference_copy(model, taps=[name])
    one, two = (tapped(each, {name: "here"}, "teacher")(x, training=False) for each in (model, folded))
    for key in (name, "logits"):
        np.testing.assert_allclose(two[key], one[key], rtol=1e-4, atol=1e-5)
    assert len(kinds(folded)) < len(kinds(model))


def test_bfloat16_keeps_the_last_layer_and_says_what_it_does_to_the_logits():
    model, x, said = shaken(network()), images((12, 12, 1)) * 255, []
    twin = folding.checked_inference_copy(model, x, "mixed_bfloat16", said.append)
    outputs = twin(x, training=False)
    assert outputs.dtype == "float32" and twin.get_layer("first").compute_dtype == "bfloat16"
    np.testing.assert_allclose(outputs, model(x, training=False), rtol=0.05, atol=0.5)
    assert "in mixed_bfloat16: its logits change by 0." in said[0] and "of 16 images" in said[0]
    assert folding.checked_inference_copy(model, x).count_params() < model.count_params()


def test_the_comparison_takes_some_images_at_a_time(monkeypatch):
    """Of 256 images of 224x224 pixels the layers of a MobileNet together give 20 GB."""
    model, x, sizes = shaken(network()), images((12, 12, 1)) * 255, []
    monkeypatch.setattr(folding, "COMPARED_AT_ONCE", 5)

    def turned(part, training):
        sizes.append(len(part))
        return -model(part, training=training)

    change, agreement = folding.logit_difference(model, turned, x)
    logits = np.asarray(model(x, training=False), np.float64)
    assert sizes == [5, 5, 5, 1] and agreement == 0
    assert change == pytest.approx(2 * np.abs(logits).mean() / logits.std(), rel=1e-5)


def test_sequential_models_and_what_is_left_as_it_is():
    stack = [keras.Input((6, 6, 1)), layers.Conv2D(3, 3), layers.BatchNormalization(), layers.Flatten()]
    model = shaken(keras.Sequential([*stack, layers.Dense(2)]))
    twin, x = folding.inference_copy(model), images((6, 6, 1))
    assert kinds(twin) == []
    np.testing.assert_allclose(twin(x), model(x), rtol=1e-4, atol=1e-5)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    nested = keras.Sequential([keras.Input((6, 6, 1)), model])

    class Own(keras.Model):
        def call(self, inputs):
            return inputs

    own = Own()
    for each in (plain, nested, own):
        assert folding.inference_copy(each) is each


def test_a_wrong_copy_is_refused(monkeypatch):
    model = shaken(network())
    monkeypatch.setattr(folding, "_folded_weights", lambda layer, norm: [layer.kernel.numpy(), norm.beta.numpy()])
    with pytest.raises(CheckFailed, match="a mistake in kdistill"):
        folding.checked_inference_copy(model, corners(8).images.astype("float32"))


@pytest.mark.slow
def test_runs_ask_the_copy_which_keeps_the_layers_that_are_tapped(tmp_path):
    splits = Splits(corners(40), corners(20, seed=1), corners(20, seed=2), CLASSES, "corners", "0123456789abcdef")
    teacher, said = shaken(network()), []
    recipe = Recipe("corners", Network("small_cnn"), Network("small_cnn"))

    def copy(taps=None, **changes):
        changed = dataclasses.replace(recipe, **changes)
        return Teaching(teacher, changed, splits, None, SINGLE_DEVICE, said.append, taps).model

    assert kinds(copy()) == [] and kinds(teacher) == ["norm"] and not said
    narrow = copy(teacher_precision="mixed_bfloat16")
    assert narrow.get_layer("first").compute_dtype == "bfloat16" and "in mixed_bfloat16" in said[0]
    assert kinds(copy({"relu": "a term"})) == [] and kinds(copy({"first": "a term"})) == ["norm"]
