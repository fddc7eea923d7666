"""The bridge: equal models there and back, on odd cases and on the large architectures; refusals by name."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers as L
from keras import ops
from support.bridge_cases import CASES, Doubled, assert_equal, chain, examples, functional, randomised, squared

from kdistill.compression.bridge import copy_back, load_tfmot, to_tf_keras
from kdistill.errors import InputError
from kdistill.networks import architectures
from kdistill.recipe import Network

pytestmark = pytest.mark.slow


@pytest.mark.exhaustive("embedding", "bidirectional of two", "recurrent")
@pytest.mark.parametrize("case", CASES)
def test_equal_there_cloned_and_back(case):
    keras.utils.set_random_seed(0)
    model = randomised(CASES[case]())
    tolerance = 2e-2 if case == "mixed" else 1e-5
    x = examples(model)
    expected = model(x, training=False)
    bridged = to_tf_keras(model)
    assert_equal(expected, bridged(x, training=False), tolerance)
    assert len(bridged.trainable_variables) == len(model.trainable_variables)

    clone = tf_keras.models.clone_model(bridged)  # tfmot clones at every turn
    clone.set_weights(bridged.get_weights())
    assert_equal(expected, clone(x, training=False), tolerance)

    for variable in clone.trainable_variables:
        variable.assign(variable * 1.1)
    copy_back(clone, model)
    assert_equal(model(x, training=False), clone(x, training=False), tolerance)
    if model.trainable_variables and case != "softmax at the end":
        assert any(np.abs(a - b).max() > 1e-4 for a, b in zip(*map(flat, (expected, model(x))), strict=True))


def flat(outputs):
    return [np.asarray(tf.cast(each, "float32")) for each in keras.tree.flatten(outputs)]


def test_training_behaves_alike():
    model = randomised(
        chain((6, 6, 3), L.Conv2D(4, 3), L.BatchNormalization(momentum=0.7), L.Flatten(), L.Dropout(0.5))
    )
    bridged, x = to_tf_keras(model), examples(model)
    outputs = np.asarray(bridged(x, training=True))
    assert 0.2 < np.mean(outputs == 0) < 0.8, "dropout is alive"
    model(x, training=True)
    for ours, theirs in zip(model.layers[1].weights, bridged.layers[2].weights, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0.02)  # tf_keras divides the variance by n - 1


def test_penalties_are_kept():
    model = randomised(CASES["regularized"]())
    np.testing.assert_allclose(float(sum(model.losses)), float(sum(to_tf_keras(model).losses)), rtol=1e-6)


def applications():
    apps = keras.applications
    yield "mobilenet_v2", lambda: apps.MobileNetV2((48, 48, 3), alpha=0.35, weights=None, classes=10)
    yield "mobilenet_v3", lambda: apps.MobileNetV3Small((48, 48, 3), alpha=0.75, weights=None, classes=10)
    yield "efficientnet", lambda: apps.EfficientNetB0(weights=None, input_shape=(48, 48, 3), classes=10)
    yield "resnet50", lambda: apps.ResNet50(weights=None, input_shape=(48, 48, 3), classes=10)


def lenet():
    return chain(
        *[(28, 28, 1), L.Rescaling(1 / 255), L.Conv2D(20, 5, activation="relu"), L.MaxPooling2D()],
        *[L.Conv2D(50, 5, activation="relu"), L.MaxPooling2D(), L.Flatten(), L.Dense(500, activation="relu")],
        *[L.Dropout(0.5), L.Dense(10)],
    )


def of_cifar():
    for name, options in (("cifar_quick", {}), ("cifar_mini", {}), ("resnet", {"depth": 8}), ("resnet", {"depth": 56})):
        network = Network(name, options)
        yield network.name + str(options.get("depth", "")), lambda n=network: architectures.build(n, (32, 32, 3), 10)


@pytest.mark.exhaustive(
    "efficientnet-<lambda>", "mobilenet_v2-<lambda>", "mobilenet_v3-<lambda>", "resnet50-<lambda>", "resnet56-<lambda>"
)
@pytest.mark.parametrize("name,build", [("lenet", lenet), *of_cifar(), *applications()])
def test_whole_architectures(name, build):
    model = randomised(build())
    x = np.random.default_rng(2).uniform(0, 255, (2, *model.input_shape[1:])).astype("float32")
    expected = model(x, training=False)
    assert np.ptp(expected, axis=-1).min() > 1e-3, "the test sees something"
    bridged = to_tf_keras(model)
    assert_equal(expected, bridged(x, training=False))
    copy_back(bridged, randomised(model, seed=5))
    assert_equal(expected, model(x, training=False))


class Scaled(L.Layer):
    """A custom layer with a weight, which only a handler can take across."""

    def build(self, shape):
        self.scale = self.add_weight(name="scale", shape=(shape[-1],))

    def call(self, x):
        return x * self.scale


@tf_keras.saving.register_keras_serializable(package="test_bridge")
class TfScaled(tf_keras.layers.Layer):
    """The twin of Scaled."""

    def build(self, shape):
        self.scale = self.add_weight("scale", (shape[-1],))

    def call(self, x):
        return x * self.scale


class Subclassed(keras.Model):
    """A model without a graph."""

    def call(self, x):
        return x


class Overridden(keras.Model):
    """A model with a graph that its own call ignores."""

    def call(self, x):
        return x


def overridden():
    x = keras.Input((3,))
    return Overridden(x, L.Dense(3)(x))


def kernel_used_directly():
    dense = L.Dense(4, name="d")
    return functional((4,), lambda x: ops.matmul(dense(x), dense.kernel))


def changed(method, argument):
    model = chain((4,), L.Dense(3))
    getattr(model.layers[0], method)(argument)
    return model


def gated():
    x = keras.Input((4, 6))
    return keras.Model(x, L.MultiHeadAttention(1, 2, use_gate=True)(x, x))


class Adding(L.Wrapper):
    """A wrapper of the user with a weight of its own."""

    def build(self, shape):
        super().build(shape)
        self.offset = self.add_weight(name="offset", shape=())

    def call(self, x):
        return self.layer(x) + self.offset


def kept_state(layer):
    return keras.Sequential([keras.Input(batch_shape=(4, 5, 3)), layer])


def squared_sum(kernel):
    return ops.sum(kernel**2)


def test_handlers():
    model = randomised(chain((4,), L.Dense(3), Scaled(name="own"), L.Dense(2)))
    bridged = to_tf_keras(model, {Scaled: lambda layer: TfScaled()})
    assert_equal(model(examples(model)), bridged(examples(model)))
    bridged.get_layer("own").scale.assign([1.0, 2.0, 3.0])
    copy_back(bridged, model)
    np.testing.assert_array_equal(model.get_layer("own").scale, [1, 2, 3])


def wrong(layer):
    return tf_keras.layers.Activation("exponential")


@pytest.mark.parametrize(
    "build,handlers,message",
    [
        (Subclassed, None, "is a subclassed model .Subclassed.*distiller.student"),
        (overridden, None, "is a subclassed model .Overridden"),
        (lambda: keras.Sequential([L.Dense(2)], name="s"), None, "'s' is not built. Give it a keras.Input"),
        (lambda: tf_keras.Sequential(), None, "Expected a Keras 3 model, received tf_keras"),
        (lambda: chain((4,), Scaled(name="own")), None, r"'own' \(Scaled\) has weights and no twin.*handlers="),
        (lambda: chain((4,), L.RMSNormalization(name="r")), None, r"'r' \(RMSNormalization\) has weights and no twin"),
        (lambda: chain((4,), Scaled()), {Scaled: lambda layer: 3}, "must return a tf_keras layer, returned int"),
        (lambda: chain((4,), Scaled()), {Scaled: wrong}, "its weight 'scale' of shape .4,. has no counterpart"),
        (lambda: chain((4,), Doubled(name="two"), L.Dense(2)), {Doubled: wrong}, "Layer 'two' .* has other outputs"),
        (kernel_used_directly, None, "'matmul.*' uses a variable of a layer directly"),
        (lambda: changed("enable_lora", 2), None, "options that tf_keras lacks: lora_rank=2"),
        (lambda: changed("quantize", "int8"), None, "is already quantized .int8"),
        (gated, None, "options that tf_keras lacks: use_gate=True"),
        (lambda: chain((4,), L.Dense(2, activation=L.PReLU())), None, "is a layer with weights .PReLU"),
        (lambda: chain((4, 3), L.LSTM(2, activation=squared, name="m")), None, "'m' has an activation of its own"),
        (lambda: chain((4, 3), L.TimeDistributed(L.Dense(2, activation=squared, name="m"))), None, "'m' has an activa"),
        (lambda: chain((4,), L.Dense(2, kernel_regularizer=squared_sum)), None, "kernel_regularizer without a counter"),
        (lambda: keras.Sequential([keras.Input((4,), sparse=True), L.Dense(2)]), None, "is sparse"),
        (lambda: chain((4, 3), L.TimeDistributed(chain((3,), L.Dense(2)))), None, "'student' stands inside a wrapper"),
        (lambda: chain((4,), L.SpectralNormalization(L.Dense(2, name="in"), name="s")), None, "'s' .Spectral.*of 'in'"),
        (
            lambda: chain((6, 6, 2), L.SpectralNormalization(L.Conv2D(2, 3), name="s")),
            None,
            "'s' .SpectralNorm.*no twin",
        ),
        (
            lambda: chain((4, 3), L.TimeDistributed(L.SpectralNormalization(L.Dense(2), name="s"))),
            None,
            "'s' .Spectral",
        ),
        (lambda: chain((4,), Adding(L.Dense(2), name="w")), None, r"'w' \(Adding\) has weights and no twin"),
        (
            lambda: kept_state(L.LSTM(2, stateful=True, name="m")),
            None,
            "'m' .LSTM. keeps its state from batch to batch",
        ),
        (lambda: kept_state(L.GRU(2, stateful=True, name="m")), None, "'m' .GRU. keeps its state from batch to batch"),
        (lambda: kept_state(L.Bidirectional(L.GRU(2, stateful=True), name="m")), None, "keeps its state from batch to"),
    ],
)
def test_refusals(build, handlers, message):
    with pytest.raises(InputError, match=message):
        to_tf_keras(build(), handlers)


def test_the_way_back_misses_nothing():
    model = randomised(chain((4,), L.Dense(3, name="a"), L.Dense(2, name="b")))
    bridged = to_tf_keras(model)
    with pytest.raises(InputError, match="no layer 'b' with the weights"):
        copy_back(tf_keras.Sequential(bridged.layers[:2]), model)
    other = to_tf_keras(chain((4,), L.Dense(5, name="a"), L.Dense(2, name="b")))
    with pytest.raises(InputError, match=r"'a' .Dense.: its weight 'kernel' of shape \(4, 3\) has no counterpart"):
        copy_back(other, model)


def small():
    return randomised(chain((8, 8, 2), L.Conv2D(8, 3, name="c"), L.ReLU(), L.Flatten(), L.Dense(4, name="d")))


def fitted(wrapped, callbacks=()):
    generator = np.random.default_rng(3)
    wrapped.compile("adam", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = generator.normal(size=(32, 8, 8, 2)), generator.integers(0, 4, 32)
    wrapped.fit(x, y, batch_size=8, verbose=0, callbacks=callbacks)
    return wrapped


def test_the_way_back_out_of_pruning():
    sparsity, model = load_tfmot().sparsity.keras, small()
    schedule = sparsity.ConstantSparsity(0.5, 0, frequency=1)
    wrapped = fitted(sparsity.prune_low_magnitude(to_tf_keras(model), schedule), [sparsity.UpdatePruningStep()])
    copy_back(wrapped, model)
    assert np.mean(model.get_layer("c").kernel == 0) == pytest.approx(0.5)
    assert_equal(model(examples(model)), wrapped(examples(model), training=False))


def test_the_way_back_out_of_clustering():
    clustering, model = load_tfmot().clustering.keras, small()
    wrapped = fitted(clustering.cluster_weights(to_tf_keras(model), 4, clustering.CentroidInitialization.LINEAR))
    copy_back(wrapped, model)
    assert len(np.unique(model.get_layer("d").kernel)) == 4
    assert_equal(model(examples(model)), wrapped(examples(model), training=False))


def test_the_way_back_out_of_quantizers():
    model = small()
    wrapped = fitted(load_tfmot().quantization.keras.quantize_model(to_tf_keras(model)))
    before = model.get_weights()
    copy_back(wrapped, model)
    theirs = wrapped.get_layer("quant_c").trainable_weights
    kernel = next(v for v in theirs if v.name.endswith("kernel:0"))
    np.testing.assert_array_equal(model.get_layer("c").kernel, kernel)
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, model.get_weights(), strict=True))
    exact, rounded = np.asarray(model(examples(model))), np.asarray(wrapped(examples(model), training=False))
    assert 0 < np.abs(exact - rounded).max() < 0.2 * np.abs(exact).max()


def test_tf_keras_and_the_environment_stay_as_they_were():
    code = """
import os, kdistill.compression.bridge as bridge, keras, tensorflow as tf
bridge.load_tfmot()
print(tf.keras.Model is keras.Model, tf.keras.layers.Dense is keras.layers.Dense, 'TF_USE_LEGACY_KERAS' in os.environ)
os.environ['TF_USE_LEGACY_KERAS'] = '0'
bridge.load_tfmot()
print(os.environ['TF_USE_LEGACY_KERAS'])
"""
    environment = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "True True False\n0\n"


@pytest.mark.exhaustive("import tensorflow_model_optimization")
@pytest.mark.parametrize(
    "first", ["import tensorflow_model_optimization", "import os; os.environ['TF_USE_LEGACY_KERAS'] = '1'"]
)
def test_a_process_whose_tf_keras_is_keras_2_gets_one_message(first):
    code = f"{first}; import keras\ntry:\n  from kdistill import compress\nexcept ValueError as error: print(error)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("tf.keras is tf_keras (Keras 2) in this process, expected Keras 3"), ended.stderr
