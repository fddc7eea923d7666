"""Layers that compute from more than their weights, each in a small network of images, and one that nobody can copy."""

import keras
import numpy as np
from keras import layers, ops

PIXELS = np.random.default_rng(5).uniform(0, 255, (40, 8, 8, 3)).astype("float32")


@keras.saving.register_keras_serializable("test")
class Centered(layers.Layer):
    """Subtracts a weight as a constant, which `finalize_state` derives, as the preprocessing layers of Keras do."""

    def build(self, shape):
        self.center = self.add_weight(name="center", shape=(shape[-1],), initializer="zeros", trainable=False)
        self.built = True
        self.finalize_state()

    def adapt(self, pixels):
        self.center.assign(np.mean(pixels, axis=(0, 1, 2)))
        self.finalize_state()

    def finalize_state(self):
        self.offset = -ops.convert_to_tensor(self.center)

    def call(self, x):
        return x + ops.cast(self.offset, x.dtype)


@keras.saving.register_keras_serializable("test")
class Scaled(Centered):
    """As `Centered`, but derives the constant where Keras loads weights."""

    finalize_state = property()  # has none

    def build(self, shape):
        self.center = self.add_weight(name="center", shape=(shape[-1],), initializer="ones", trainable=False)
        self.offset = np.zeros(shape[-1], "float32")

    def adapt(self, pixels):
        self.load_own_variables({"0": np.mean(pixels, axis=(0, 1, 2))})

    def load_own_variables(self, store):
        super().load_own_variables(store)
        self.offset = -0.5 * self.center.numpy()


@keras.saving.register_keras_serializable("test")
class Noted(layers.Layer):
    """Keeps a constant outside of its weights and its config."""

    offset = 0.0

    def adapt(self, pixels):
        self.offset = float(np.mean(pixels))

    def call(self, x):
        return x - self.offset


def adapted(layer):
    layer.adapt(PIXELS)
    return layer


def inside_time_distributed(dtype=None):
    norm = layers.Normalization(name="norm", dtype=dtype)
    norm.adapt(PIXELS.reshape(-1, 8, 3))
    return layers.TimeDistributed(norm, name="rows", dtype=dtype)


def inside_a_model(dtype=None):
    norm = adapted(layers.Normalization(axis=None, name="norm", dtype=dtype))
    return keras.Sequential([keras.Input((8, 8, 3)), norm], name="inside")


def vocabulary(dtype=None):
    lookup = layers.IntegerLookup(name="lookup")
    lookup.adapt(np.arange(50, 200, 3))
    return keras.Sequential(
        [keras.Input((8, 8, 3)), layers.Lambda(to_integers, output_shape=(8, 8, 3), dtype="float32"), lookup],
        name="table",
    )


@keras.saving.register_keras_serializable("test")
def to_integers(x):
    return ops.cast(x, "int64")


STATEFUL = {
    "Normalization": lambda dtype=None: adapted(layers.Normalization(name="norm", dtype=dtype)),
    "Normalization in TimeDistributed": inside_time_distributed,
    "Normalization in a model": inside_a_model,
    "Discretization": lambda dtype=None: adapted(layers.Discretization(num_bins=5, name="bins")),
    "IntegerLookup": vocabulary,
    "finalize_state": lambda dtype=None: adapted_when_built(Centered(name="own", dtype=dtype)),
    "load_own_variables": lambda dtype=None: adapted_when_built(Scaled(name="own", dtype=dtype)),
}


def adapted_when_built(layer):
    layer.build((None, 8, 8, 3))
    return adapted(layer)


def network(layer, dtype=None, name="student"):
    """Three logits of a raw image: the layer, a convolution with batch normalization, and a dense layer."""
    keras.utils.set_random_seed(0)
    parts = [
        layer,
        layers.Rescaling(1 / 255, dtype=dtype),
        layers.Conv2D(4, 3, name="conv", dtype=dtype),
        layers.BatchNormalization(name="batch", dtype=dtype),
        layers.Flatten(),
    ]
    return keras.Sequential(
        [keras.Input((8, 8, 3)), *parts, layers.Dense(3, name="logits", dtype="float32")], name=name
    )
