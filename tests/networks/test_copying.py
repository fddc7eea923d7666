"""Copies of models: what layers derive from weights, or keep beside them, is copied too; copies are compared."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.stateful_layers import PIXELS, STATEFUL, Centered, Noted, adapted, adapted_when_built, network

from kdistill.errors import CheckFailed, InputError
from kdistill.networks import applications, copying, folding, weights


@pytest.mark.parametrize("kind", STATEFUL)
def test_a_clone_computes_the_same_with_weights_of_its_own(kind):
    model = network(STATEFUL[kind]())
    copied = copying.clone(model)
    expected = np.asarray(model(PIXELS))
    np.testing.assert_array_equal(copied(PIXELS), expected)
    plain = keras.models.clone_model(model)  # what Keras offers: it must be wrong, or the test shows nothing
    plain.set_weights(model.get_weights())
    if kind != "Discretization":  # whose config has the bins
        try:
            assert np.abs(plain(PIXELS) - expected).max() > 1e-3
        except tf.errors.FailedPreconditionError:
            assert kind == "IntegerLookup"  # it has no vocabulary
    model.get_layer("logits").kernel.assign(np.zeros(model.get_layer("logits").kernel.shape))
    np.testing.assert_array_equal(copied(PIXELS), expected)


@pytest.mark.parametrize("kind", STATEFUL)
def test_the_inference_copy_computes_the_same(kind):
    model = network(STATEFUL[kind]())
    if any(isinstance(layer, keras.Model) for layer in model.layers):
        assert folding.inference_copy(model) is model  # nested models are not copied
        return
    copied = folding.checked_inference_copy(model, PIXELS)
    assert "batch" not in [layer.name for layer in copied.layers if isinstance(layer, layers.BatchNormalization)]
    np.testing.assert_allclose(copied(PIXELS), model(PIXELS), atol=1e-4)


def test_the_inference_copy_of_a_network_with_layers_inside_of_layers():
    image = keras.Input((8, 8, 3))
    x = layers.BatchNormalization(name="batch")(layers.Conv2D(4, 3)(adapted(layers.Normalization())(image)))
    x = layers.Bidirectional(layers.GRU(3, name="gru"), name="both")(layers.Reshape((6, 24))(x))
    model = keras.Model(image, layers.Dense(3)(x))
    copied = folding.checked_inference_copy(model, PIXELS)
    assert isinstance(copied.get_layer("batch"), layers.Identity)
    np.testing.assert_allclose(copied(PIXELS), model(PIXELS), atol=1e-5)


def test_a_layer_with_a_state_that_nobody_saves_is_named():
    model = network(adapted(Noted(name="noted")))
    message = r"copy of the model 'student' .* layer 'noted' \(Noted\) differs by .*save_own_variables"
    with pytest.raises(InputError, match=message):
        copying.clone(model)
    with pytest.raises(CheckFailed, match=r"layer 'noted' \(Noted\) differs by"):
        folding.checked_inference_copy(model, PIXELS)
    inner = keras.Sequential([keras.Input((8, 8, 3)), adapted(Noted(name="deep"))], name="block")
    with pytest.raises(InputError, match="its layer 'block/deep'"):
        copying.clone(network(inner))
    with pytest.raises(InputError, match=r"layer 'noted' \(Noted\) differs"):  # where nothing is folded, too
        folding.checked_inference_copy(
            keras.Sequential([keras.Input((8, 8, 3)), adapted(Noted(name="noted")), layers.Flatten(), layers.Dense(2)]),
            PIXELS,
            "mixed_bfloat16",
        )


class Unconfigured(layers.Layer):
    """A layer whose config lacks an argument."""

    def __init__(self, units, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)


def test_a_layer_without_a_config_is_named():
    model = network(Unconfigured(3, lambda x: 2 * x, name="own"))
    with pytest.raises(InputError, match=r"'student' cannot be copied: layer 'own' \(Unconfigured\) cannot be created"):
        copying.clone(model)


def test_a_change_of_configs_and_a_subclassed_model():
    def change(layer, config):
        if isinstance(layer, layers.BatchNormalization):
            config["momentum"] = 0.5

    copied = copying.clone(network(STATEFUL["Normalization"]()), change)
    assert copied.get_layer("batch").momentum == 0.5

    @keras.saving.register_keras_serializable("test")
    class Subclassed(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.norm, self.flat, self.dense = layers.Normalization(), layers.Flatten(), layers.Dense(3)

        def call(self, images):
            return self.dense(self.flat(self.norm(images)))

    model = Subclassed()
    adapted(model.norm)
    model(PIXELS)
    np.testing.assert_array_equal(copying.clone(model)(PIXELS), model(PIXELS))


@pytest.mark.slow
def test_functions_that_are_traced_already_forget_the_former_state():
    model, other = network(layers.Normalization(name="norm")), network(STATEFUL["Normalization"]())
    before = model.predict(PIXELS, verbose=0)
    copying.copy_weights(other, model)
    assert np.abs(model.predict(PIXELS, verbose=0) - before).max() > 1e-3
    np.testing.assert_allclose(model.predict(PIXELS, verbose=0), other(PIXELS), atol=1e-5)


def test_random_layers_and_states_of_batches_are_not_compared():
    draw = layers.Lambda(lambda x: x + keras.random.normal((3,)))
    noise = keras.Sequential([keras.Input((4,)), layers.Dense(3), draw])
    assert copying.clone(noise).count_params() == noise.count_params()
    stateful = keras.Sequential([keras.Input(batch_shape=(2, 4, 3)), layers.LSTM(3, stateful=True, name="rows")])
    rows = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("float32")
    first, second = stateful(rows), stateful(rows)
    assert np.abs(first - second).max() > 1e-3
    stateful.layers[0].reset_state()
    stateful(rows)
    copying.clone(stateful)
    np.testing.assert_array_equal(stateful(rows), second)


def test_noise_is_what_models_take():
    a, b = keras.Input((4,), name="a"), keras.Input((None, 3), dtype="int32", name="b")
    model = keras.Model({"a": a, "b": b}, [layers.Dense(2)(a), layers.Embedding(2, 3)(b)])
    values = copying.noise(model)
    assert values["a"].shape == (2, 4) and values["b"].shape == (2, copying.UNKNOWN_SIZE, 3)
    assert (
        np.abs(values["a"][0]).max() < 6 and values["a"][1].numpy().max() > 20 and set(np.unique(values["b"])) == {0, 1}
    )
    assert copying.noise(keras.Sequential([keras.Input((1,), dtype="string")])) is None
    assert copying.clone(model).count_params() == model.count_params()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_network_of_applications_keeps_what_its_normalization_has_learned(tmp_path):
    trained = keras.applications.EfficientNetB0(
        weights=None, input_shape=(32, 32, 3), classes=4, classifier_activation=None
    )
    norm = next(layer for layer in trained.layers if isinstance(layer, layers.Normalization))
    images = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
    norm.adapt(images / 255)
    trained.save_weights(tmp_path / "b0.weights.h5")
    file = str(tmp_path / "b0.weights.h5")
    model = applications.application("efficientnet_b0", (32, 32, 3), 4, weights=file, size=32, momentum=0.9)
    np.testing.assert_allclose(model(images), trained(images), rtol=1e-4, atol=1e-5)
    assert {layer.momentum for layer in model.layers if isinstance(layer, layers.BatchNormalization)} == {0.9}


@pytest.mark.exhaustive(
    but=(
        "Normalization in TimeDistributed-npz",
        "finalize_state-npz",
        "load_own_variables-keras",
        "Normalization-weights.h5",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["keras", "weights.h5", "npz"])
@pytest.mark.parametrize(
    "layer", ["Normalization", "Normalization in TimeDistributed", "finalize_state", "load_own_variables"]
)
def test_weights_of_files_are_derived_from_again(tmp_path, layer, kind):
    model, path = network(STATEFUL[layer]()), tmp_path / f"file.{kind}"
    target = network(type(model.layers[0]).from_config(model.layers[0].get_config()))
    if kind == "keras":
        model.save(path)
    elif kind == "weights.h5":
        model.save_weights(path)
    else:
        np.savez(path, **{f"{part.name}/{i}": w.numpy() for part in model.layers for i, w in enumerate(part.weights)})
    assert np.abs(target.predict(PIXELS, verbose=0) - model(PIXELS)).max() > 1e-3
    assert weights.load(target, [(path, None)])["not_loaded"] == []
    np.testing.assert_array_equal(target(PIXELS), model(PIXELS))
    np.testing.assert_allclose(target.predict(PIXELS, verbose=0), model(PIXELS), atol=1e-5)


def test_state_is_derived_for_single_layers():
    layer = adapted_when_built(Centered())
    layer.center.assign([1.0, 2.0, 3.0])
    copying.derive_state(layer)
    np.testing.assert_array_equal(layer(np.zeros((1, 3), "float32")), [[-1, -2, -3]])
