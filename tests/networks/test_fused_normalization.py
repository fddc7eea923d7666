"""`fused_normalization`: TensorFlow's one operation in the place of Keras's dozen, with the same numbers."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation.supervised import Supervised
from kdistill.networks.architectures import small_cnn
from kdistill.networks.keras_internals import fused_normalization

FUSED = "FusedBatchNormV3"


def trained_once(norm, inputs, weights, fused: bool, **call):
    """Outputs, moving statistics and gradients of one training step of a layer, and the operations that it took."""
    model = keras.Sequential([norm])
    operations = set()

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            outputs = norm(x, training=True, **call)
            loss = tf.reduce_sum(tf.cast(outputs, tf.float32) * weights)
        operations.update(operation.type for operation in tf.compat.v1.get_default_graph().get_operations())
        return outputs, tape.gradient(loss, [x, *norm.trainable_variables], unconnected_gradients="zero")

    if fused:
        with fused_normalization(model):
            outputs, gradients = tf.function(step)(tf.constant(inputs))
    else:
        outputs, gradients = tf.function(step)(tf.constant(inputs))
    assert "call" not in vars(norm)
    assert outputs.dtype == norm.compute_dtype
    return [np.array(value, np.float64) for value in (outputs, *gradients, *norm.weights)], operations


def both(shape, seed=0, dtype="float32", **options):
    """The same step by Keras and fused, on the same inputs: two lists of arrays, and the operations of the second."""
    random = np.random.default_rng(seed)
    inputs = random.normal(3.0, 2.0, shape).astype("float32")
    if dtype in ("mixed_bfloat16", "bfloat16"):
        inputs = tf.cast(inputs, tf.bfloat16).numpy()
    elif dtype == "mixed_float16":
        inputs = inputs.astype("float16")
    weights = random.normal(size=shape).astype("float32")
    results = []
    for fused in (False, True):
        norm = keras.layers.BatchNormalization(dtype=dtype, **options)
        norm.build(shape)
        start = np.random.default_rng(seed + 1)
        norm.set_weights([start.uniform(0.5, 1.5, weight.shape) for weight in norm.weights])
        results.append(trained_once(norm, inputs, weights, fused))
    (plain, _), (fused, operations) = results
    return plain, fused, operations


@pytest.mark.parametrize("shape", [(6, 5), (4, 7, 3), (4, 6, 5, 3), (3, 4, 5, 2, 3), (64, 7, 7, 16), (1, 5)])
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False}, {"synchronized": True, "momentum": 0.9}])
def test_outputs_statistics_and_gradients_are_those_of_keras(shape, options):
    plain, fused, operations = both(shape, **options)
    assert FUSED in operations
    for one, other in zip(plain, fused, strict=True):
        np.testing.assert_allclose(other, one, rtol=2e-5, atol=2e-5 * max(1, np.abs(one).max()))


@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("mixed_bfloat16", 2e-2), ("bfloat16", 2e-2), ("mixed_float16", 2e-3)]
)
def test_in_16_bits_as_exact_as_keras(channels, dtype, tolerance):
    plain, fused, operations = both((8, 5, 5, channels), dtype=dtype)
    assert FUSED in operations
    for one, other in zip(plain, fused, strict=True):
        np.testing.assert_allclose(other, one, rtol=tolerance, atol=tolerance * np.abs(one).max())


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"axis": 1}, {}),
        ({"renorm": True}, {}),
        ({"epsilon": 1e-6}, {}),
        ({"dtype": "float64"}, {}),
        ({}, {"mask": np.arange(12).reshape(4, 3) % 5 > 0}),
    ],
)
def test_what_the_operation_does_not_compute_stays_with_keras(options, call):
    shape = (4, 3, 5)
    random = np.random.default_rng(0)
    inputs, weights = random.normal(size=shape), random.normal(size=shape)
    results = []
    for fused in (False, True):
        norm = keras.layers.BatchNormalization(**options)
        norm.build(shape)
        values, operations = trained_once(norm, inputs.astype(norm.compute_dtype), weights, fused, **call)
        assert FUSED not in operations
        results.append(values)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(other, one)


def test_a_subclass_a_frozen_layer_and_inference_stay_with_keras():
    class Own(keras.layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return inputs + 1.0

    frozen = keras.layers.BatchNormalization(trainable=False)
    norm = keras.layers.BatchNormalization()
    images = np.random.default_rng(0).normal(2.0, 3.0, (4, 3, 3, 2)).astype("float32")
    model = keras.Sequential([keras.Input((3, 3, 2)), Own(), frozen, norm])
    expected = np.array(model(images, training=False))
    with fused_normalization(model):
        np.testing.assert_array_equal(np.array(model(images, training=False)), expected)
        np.testing.assert_allclose(np.array(frozen(images, training=True)), images / np.sqrt(1.001), rtol=1e-5)
    assert np.abs(frozen.moving_mean.numpy()).max() == 0


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("channels", [3, 16])
def test_a_relu_that_follows_does_not_hide_nan(channels, residual):
    """oneDNN's operation for both at once does: the loss of a student that diverges would be finite."""
    image = keras.Input((4, 4, channels))
    normal = keras.layers.BatchNormalization()(image)
    normal = keras.layers.Add()([normal, image]) if residual else normal
    model = keras.Model(image, keras.layers.ReLU()(normal))
    images = np.random.default_rng(0).normal(size=(8, 4, 4, channels)).astype("float32")
    images[0, 0, 0, 1] = np.nan

    @tf.function
    def step(batch):
        with fused_normalization(model):
            return model(batch, training=True)

    is_nan = np.isnan(step(tf.constant(images)).numpy())
    assert is_nan[..., 1].all() and not is_nan[..., 0].any()


def test_layers_are_as_before_after_an_error():
    model = keras.Sequential([keras.Input((2,)), keras.layers.BatchNormalization()])
    with pytest.raises(KeyError), fused_normalization(model):
        assert "call" in vars(model.layers[0])
        raise KeyError
    assert "call" not in vars(model.layers[0])
    assert keras.models.clone_model(model).layers[0].call.__func__ is keras.layers.BatchNormalization.call


def weights_after(make, fit) -> list[np.ndarray]:
    model = make()
    fit(model)
    return model.get_weights()


def test_a_student_trains_to_the_weights_of_keras():
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 255, (64, 28, 28, 1)).astype("float32"), random.integers(0, 10, 64)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def student():
        keras.utils.set_random_seed(3)
        return small_cnn((28, 28, 1), 10)

    def plain(model):
        model.compile(keras.optimizers.SGD(0.01), loss)
        model.fit(images, labels, batch_size=16, epochs=1, shuffle=False, verbose=0)

    def ours(model):
        supervised = Supervised(model)
        supervised.compile(keras.optimizers.SGD(0.01))
        supervised.fit(images, labels, batch_size=16, epochs=1, shuffle=False, verbose=0)

    for one, other in zip(weights_after(student, plain), weights_after(student, ours), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-5)


def test_the_training_step_uses_the_operation():
    model = Supervised(small_cnn((28, 28, 1), 10))
    model.compile("sgd")
    batch = tf.zeros((4, 28, 28, 1)), tf.zeros(4, tf.int32)
    step = tf.function(lambda: model.train_step(batch), autograph=False)
    types = [operation.type for operation in step.get_concrete_function().graph.get_operations()]
    assert types.count(FUSED) == 3
