"""Layers of others that hold Keras's own are opened into these: pruned, clustered and quantized without a handler."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L
from keras import ops
from support.compressing import CLASSES, QUIET, examples, stage

from kdistill.compression.bridge import copy_back, to_tf_keras
from kdistill.compression.compress import compress
from kdistill.errors import InputError

pytestmark = pytest.mark.slow


class DepthwiseBlock(L.Layer):
    """As KerasHub's block of MobileNet: it builds its layers itself, and calls them one after the other."""

    def __init__(self, filters, stride=1, **kwargs):
        super().__init__(**kwargs)
        self.filters, self.stride = filters, stride
        self.pad = L.ZeroPadding2D(((0, 1), (0, 1)), name="pad")
        self.depth = L.DepthwiseConv2D(3, stride, padding="valid" if stride == 2 else "same", use_bias=False, name="d")
        self.norm, self.relu = L.BatchNormalization(momentum=0.8, name="norm"), L.ReLU(6.0, name="relu")
        self.point = L.Conv2D(filters, 1, use_bias=False, name="point")

    def build(self, shape):
        if self.stride == 2:
            self.pad.build(shape)
            shape = self.pad.compute_output_shape(shape)
        self.depth.build(shape)
        shape = self.depth.compute_output_shape(shape)
        self.norm.build(shape)
        self.point.build(shape)
        self.built = True

    def call(self, x, training=None):
        x = self.pad(x) if self.stride == 2 else x
        return self.point(self.relu(self.norm(self.depth(x), training=training)))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters, "stride": self.stride}


class Residual(L.Layer):
    """A block that holds a block, with an operation between."""

    def __init__(self, filters, **kwargs):
        super().__init__(**kwargs)
        self.filters = filters
        self.block, self.drop = DepthwiseBlock(filters, name="block"), L.Dropout(0.1)

    def build(self, shape):
        self.block.build(shape)
        self.built = True

    def call(self, x):
        return ops.relu(x + self.drop(self.block(x)))

    def get_config(self):
        return {**super().get_config(), "filters": self.filters}


class Patches(L.Layer):
    """As KerasHub's patches of a vision transformer, without a class token."""

    def __init__(self, size, width, **kwargs):
        super().__init__(**kwargs)
        self.size, self.width = size, width
        self.project = L.Conv2D(width, size, size, name="project")

    def build(self, shape):
        self.project.build(shape)
        self.built = True

    def call(self, x):
        x = self.project(x)
        return ops.reshape(x, (-1, x.shape[1] * x.shape[2], self.width))

    def get_config(self):
        return {**super().get_config(), "size": self.size, "width": self.width}


class Own(DepthwiseBlock):
    """A block with a weight of its own."""

    def build(self, shape):
        super().build(shape)
        self.gain = self.add_weight(name="gain", shape=(), initializer="ones")

    def call(self, x):
        return super().call(x) * self.gain


class Foreign(DepthwiseBlock):
    """A block that calls TensorFlow itself."""

    def call(self, x):
        return tf.nn.relu(super().call(tf.identity(x)))


class Direct(DepthwiseBlock):
    """A block that uses the kernel of a layer without calling the layer."""

    def call(self, x):
        return ops.matmul(self.relu(self.norm(self.depth(x))), self.point.kernel[0, 0])


def student(*blocks):
    keras.utils.set_random_seed(1)
    body = [keras.Input((10, 10, 4)), L.Rescaling(1 / 255), *blocks]
    ends = [] if any(isinstance(block, Patches) for block in blocks) else [L.GlobalAveragePooling2D()]
    ends = ends or [L.GlobalAveragePooling1D()]
    model = keras.Sequential([*body, *ends, L.Dense(CLASSES, name="top")], name="student")
    for weight in model.weights:
        if weight.path.endswith(("moving_mean", "beta", "bias")):
            weight.assign(np.random.default_rng(0).normal(size=weight.shape) * 0.1)
    return model


CHAINS = {
    "block": lambda: [DepthwiseBlock(8, 2, name="first")],
    "block in a block": lambda: [L.Conv2D(8, 1), Residual(8, name="first"), Residual(8, name="second")],
    "called twice": lambda: [(block := Residual(4, name="first")), L.Activation("tanh"), block],
    "inside of a nested model": lambda: [keras.Sequential([keras.Input((10, 10, 4)), DepthwiseBlock(8, name="b")])],
    "patches": lambda: [Patches(5, 12, name="patches")],
}


@pytest.mark.parametrize("name", CHAINS)
def test_blocks_become_the_layers_that_they_hold_and_get_their_weights_back(name):
    if name == "called twice":  # a Sequential model would not take it
        first, between, again = CHAINS[name]()
        x = keras.Input((10, 10, 4))
        model = keras.Model(x, L.Dense(CLASSES)(L.GlobalAveragePooling2D()(again(between(first(x))))))
    else:
        model = student(*CHAINS[name]())
    before = model(examples(4).images.astype("float32"))
    bridged = to_tf_keras(model)
    assert not {"DepthwiseBlock", "Residual", "Patches"} & {type(layer).__name__ for layer in bridged.layers}
    kinds = {type(layer).__name__ for layer in bridged.layers}
    assert ("Conv2D" if name == "patches" else "DepthwiseConv2D") in kinds
    for weight in bridged.trainable_weights:
        weight.assign(weight * 0.5)
    copy_back(bridged, model)  # compares the outputs of both
    after = np.asarray(model(examples(4).images.astype("float32")))
    np.testing.assert_allclose(after, bridged(examples(4).images.astype("float32")), atol=1e-5)
    assert np.abs(after - before).max() > 1e-3


@pytest.mark.exhaustive
def test_blocks_are_pruned_and_clustered():
    """The result has the same blocks, with names of their own in the table by layer."""
    own = student(DepthwiseBlock(16, 2, name="first"), Residual(16, name="second"))
    values = stage("prune_cluster", final_sparsity=0.25, clusters=4)
    result = compress(own, values, own, examples(), **QUIET)
    block, inner = result.model.get_layer("first"), result.model.get_layer("second").block
    assert type(block) is DepthwiseBlock and type(inner) is DepthwiseBlock
    for kernel in (np.asarray(block.point.kernel), np.asarray(inner.point.kernel)):
        assert np.mean(kernel == 0) >= 0.24
    assert len(np.unique(inner.point.kernel)) <= 4
    rows = {row["layer"]: row for row in result.layers}
    assert rows["first.point"]["pruned"] == rows["second.block.point"]["clustered"] == "yes"
    assert not [row for row in result.layers if "Block" in row["kind"] or row["kind"] == "Residual"]


@pytest.mark.parametrize(
    "block, reason",
    [
        (lambda: Own(8, name="b"), "has weights and no twin"),
        (lambda: Foreign(8, name="b"), "cannot be opened into the layers that it holds: its call is no graph"),
        (lambda: Direct(8, name="b"), "its call uses the weights .*kernel outside of a layer"),
    ],
)
def test_what_cannot_be_opened_is_named_before_training(block, reason):
    with pytest.raises(InputError, match=rf"Layer 'b' .*{reason}.*handlers="):
        compress(student(block()), stage("prune"), None, examples(), **QUIET)
