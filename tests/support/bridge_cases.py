"""Odd models for the bridge, random weights and inputs for them, and what equal means."""

import keras
import numpy as np
import tensorflow as tf
from keras import layers as L
from keras import ops


def functional(shape, build, dtype=None):
    x = keras.Input(shape, dtype=dtype, name="x")
    return keras.Model(x, build(x), name="student")


def chain(shape, *stack, dtype=None):
    return keras.Sequential([keras.Input(shape, dtype=dtype), *stack], name="student")


def squared(x):
    return x * x


class Doubled(L.Layer):
    """A custom layer without weights."""

    def call(self, x):
        return 2 * x


def nested():
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4, activation="relu", name="d"), L.Dropout(0.5)], name="inner")
    middle = functional((4,), lambda x: inner(L.Dense(4, name="d")(x)) + x)
    middle.name = "middle"
    return functional((4,), lambda x: L.Dense(2, name="d")(middle(x, training=False)))


def shared():
    dense, norm = L.Dense(4, activation="hard_swish"), L.BatchNormalization()
    inner = keras.Sequential([keras.Input((4,)), L.Dense(4), L.LeakyReLU(negative_slope=0.1)])
    return functional((4,), lambda x: inner(norm(dense(x))) + dense(inner(x)) * norm(x))


def several():
    a, b = keras.Input((4,), name="a"), keras.Input((6, 3), name="b")
    y = L.Concatenate()([a, L.GlobalAveragePooling1D()(b)])
    return keras.Model({"a": a, "b": b}, {"one": L.Dense(2)(y), "two": [y, L.Dense(1)(a)]})


def nested_several():
    a, b = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    inner = keras.Model({"left": a, "right": b}, [L.Dense(3)(a) - L.Dense(3)(b), L.Add()([a, b])], name="pair")
    x = keras.Input((4,))
    first, second = inner({"left": x, "right": ops.flip(x, axis=-1)})
    return keras.Model(x, L.Dense(2)(first) + L.Dense(2)(second))


def attention():
    x = keras.Input((5, 6))
    y = L.MultiHeadAttention(2, 3, dropout=0.1)(x, x, use_causal_mask=True)
    return keras.Model(x, L.LayerNormalization()(x + y))


def embedding():
    x = keras.Input((7,), dtype="int32")
    y = L.Embedding(9, 4, mask_zero=True)(x)
    return keras.Model(x, L.Dense(2)(L.LSTM(3)(L.LSTM(3, return_sequences=True)(y))))


def states():
    x = keras.Input((5, 3))
    y, h, c = L.LSTM(4, return_state=True, return_sequences=True)(x)
    return keras.Model(x, [L.LSTM(4)(y, initial_state=[h, c]), h])


def adapted():
    norm = L.Normalization()
    norm.adapt(np.random.default_rng(1).normal(3, 2, (50, 3)).astype("float32"))
    return chain((3,), norm, L.Dense(2))


def adapted_inside():
    norm = L.Normalization()
    norm.adapt(np.random.default_rng(1).normal(3, 2, (50, 3)).astype("float32"))
    return chain((4, 3), L.TimeDistributed(norm), L.Dense(2))


def frozen_part():
    base = chain((4,), L.Dense(4), L.BatchNormalization())
    base.trainable = False
    return functional((4,), lambda x: L.Dense(2)(base(x, training=False)))


def mixed():
    return chain((6, 6, 3), *[L.Conv2D(4, 3, dtype="mixed_bfloat16"), L.Flatten(), L.Dense(2, dtype="float32")])


def strange_names():
    return chain((4,), L.Dense(3, name="a layer: 1"), L.Dense(3, name="_a"), L.Dense(3, name="A layer: 1"))


CASES = {
    "dense": lambda: chain((4,), L.Dense(3)),
    "nested": nested,
    "shared": shared,
    "several": several,
    "nested several": nested_several,
    "attention": attention,
    "embedding": embedding,
    "states": states,
    "adapted": adapted,
    "adapted inside of a wrapper": adapted_inside,
    "frozen part": frozen_part,
    "mixed": mixed,
    "strange names": strange_names,
    "normalization of given numbers": lambda: chain((4, 4, 3), L.Normalization(mean=[1.0, 2, 3], variance=[4.0, 5, 6])),
    "rescaling of uint8": lambda: chain((4, 4, 3), L.Rescaling(1 / 127.5, offset=-1), L.Flatten(), dtype="uint8"),
    "resizing": lambda: chain((9, 9, 3), L.Resizing(5, 4), L.CenterCrop(3, 3), L.Conv2D(2, 3)),
    "resizing with an option of Keras 3": lambda: chain((9, 5, 3), L.Resizing(4, 4, antialias=True), L.Conv2D(2, 3)),
    "augmentation": lambda: chain((8, 8, 3), L.RandomFlip(), L.RandomRotation(0.1), L.Conv2D(2, 3), L.Flatten()),
    "lambda": lambda: chain((4,), L.Dense(4), L.Lambda(lambda x: ops.tanh(x) + 1), L.Dense(2)),
    "custom layer without weights": lambda: chain((4,), Doubled(), L.Dense(2), Doubled()),
    "custom activation": lambda: chain((4,), L.Dense(3, activation=squared), L.Activation(squared)),
    "tf.nn activation": lambda: chain((4,), L.Dense(3, activation=tf.nn.relu6), L.Dense(2)),
    "layer as activation": lambda: chain((4,), L.Dense(3, activation=L.LeakyReLU(negative_slope=0.4)), L.Dense(2)),
    "scalars and slices": lambda: functional((6,), lambda x: (2.0 - x[:, 1:4]) / (1 + ops.exp(-x[:, 2:5])) ** 2),
    "operations": lambda: functional((4, 6), lambda x: ops.einsum("bij,bkj->bik", x, ops.roll(x, 1, axis=1))),
    "reshape": lambda: functional((4, 6), lambda x: ops.transpose(ops.reshape(x, (-1, 3, 8)), (0, 2, 1))),
    "maximum": lambda: functional((4,), lambda x: ops.maximum(L.Dense(4)(x), x) - ops.stack([x, -x], 1)[:, 0]),
    "split": lambda: functional((6,), lambda x: L.Concatenate()(ops.split(x, 3, axis=-1)[::-1])),
    "constant": lambda: functional((3,), lambda x: x + np.array([1.0, 2.0, 3.0], "float32")),
    "padding": lambda: chain((6, 6, 2), L.ZeroPadding2D(((0, 1), (2, 0))), L.Cropping2D(1), L.MaxPooling2D(2, 1)),
    "convolutions": lambda: chain(
        (8, 8, 4), L.DepthwiseConv2D(3, depth_multiplier=2), L.SeparableConv2D(3, 3), L.Conv2DTranspose(2, 3)
    ),
    "separable with an activation": lambda: chain(
        (9, 9, 4), L.SeparableConv2D(3, 3, strides=2, padding="same", depth_multiplier=2, activation="hard_swish")
    ),
    "separable without bias": lambda: chain((9, 9, 4), L.SeparableConv2D(3, 3, dilation_rate=2, use_bias=False)),
    "one dimension": lambda: chain(
        (9, 4), L.Conv1D(4, 3, padding="causal", dilation_rate=2), L.DepthwiseConv1D(3), L.SeparableConv1D(3, 2)
    ),
    "groups": lambda: chain((8, 8, 4), L.Conv2D(4, 3, groups=2, strides=2, padding="same"), L.GroupNormalization(2)),
    "three dimensions": lambda: chain((4, 4, 4, 2), L.Conv3D(3, 2), L.AveragePooling3D(2), L.GlobalMaxPooling3D()),
    "upsampling": lambda: chain((4, 4, 2), L.UpSampling2D(2, interpolation="bilinear"), L.AveragePooling2D(3, 2)),
    "norms": lambda: chain((5, 6), L.LayerNormalization(epsilon=1e-2), L.UnitNormalization(), L.BatchNormalization(1)),
    "prelu and elu": lambda: chain((4, 4, 2), L.PReLU(shared_axes=[1, 2]), L.ELU(0.5), L.ReLU(3.0, 0.1, 0.2)),
    "noise": lambda: chain((4, 3), L.GaussianNoise(1.0), L.AlphaDropout(0.5), L.SpatialDropout1D(0.5), L.Dense(1)),
    "recurrent": lambda: chain((5, 3), L.GRU(4, return_sequences=True), L.SimpleRNN(3, go_backwards=True)),
    "gru of the old kind": lambda: chain((5, 3), L.GRU(4, reset_after=False, recurrent_activation="hard_sigmoid")),
    "bidirectional": lambda: chain((5, 3), L.Bidirectional(L.LSTM(4), merge_mode="sum"), L.Dense(2)),
    "bidirectional of two": lambda: chain(
        (5, 3), L.Bidirectional(L.GRU(2), backward_layer=L.GRU(3, go_backwards=True))
    ),
    "time distributed": lambda: chain((5, 3), L.TimeDistributed(L.Dense(2, activation="hard_sigmoid"))),
    "cells": lambda: chain((5, 3), L.RNN([L.LSTMCell(4), L.GRUCell(3)]), L.Dense(2)),
    "convolutional lstm": lambda: chain((3, 5, 5, 2), L.ConvLSTM2D(2, 3)),
    "einsum dense": lambda: chain((4, 6), L.EinsumDense("abc,cd->abd", (4, 3), bias_axes="d", activation="relu6")),
    "additive attention": lambda: functional((4, 6), lambda x: L.AdditiveAttention()([x, L.Attention(True)([x, x])])),
    "dot and average": lambda: functional((4,), lambda x: L.Dot(1)([L.Average()([x, L.Dense(4)(x), x + 1]), x])),
    "permute": lambda: chain((4, 3), L.Permute((2, 1)), L.Flatten(), L.RepeatVector(3), L.Reshape((-1, 4)), L.Dense(2)),
    "unknown size": lambda: chain((None, None, 3), L.Conv2D(2, 3), L.GlobalAveragePooling2D(keepdims=True)),
    "fixed batch": lambda: keras.Sequential([keras.Input(batch_shape=(3, 4)), L.Dense(2)]),
    "regularized": lambda: chain(
        (4,), L.Dense(3, kernel_regularizer=keras.regularizers.L1L2(0.1, 0.2), bias_constraint="non_neg"), L.Dense(1)
    ),
    "output is an input": lambda: functional((4,), lambda x: [x, L.Dense(2)(x)]),
    "softmax at the end": lambda: chain((4,), L.Dense(3, activation="softmax"), L.Softmax(axis=-1)),
    "built late": lambda: built_late(),
    **{
        f"activation {name}": lambda name=name: chain((4,), L.Dense(4, activation=name), L.Activation(name))
        for name in ("hard_sigmoid", "hard_swish", "relu6", "leaky_relu", "gelu", "elu", "silu", "log_softmax", "celu")
    },
}


def built_late():
    model = keras.Sequential([L.Dense(3), L.Dense(2)])
    model.build((None, 4))
    return model


def randomised(model, seed=0):
    """New weights everywhere, moving statistics too (variances stay positive)."""
    generator = np.random.default_rng(seed)
    for variable in model.weights:
        if "int" in variable.dtype or variable.path.split("/")[-1] in ("mean", "variance"):
            continue
        spread = 0.3 if len(variable.shape) < 2 else (2 / np.prod(variable.shape[:-1])) ** 0.5
        values = generator.normal(0, spread, variable.shape)
        if variable.path.endswith(("variance", "gamma")):
            values = np.exp(values)
        variable.assign(values)
    return model


def examples(model, seed=1):
    generator = np.random.default_rng(seed)

    def make(tensor):
        shape = [tensor.shape[0] or 3, *(n or 12 for n in tensor.shape[1:])]
        if "int" in tensor.dtype:
            return generator.integers(0, 9, shape).astype(tensor.dtype)
        return generator.normal(size=shape).astype("float32")

    single = isinstance(model, keras.Sequential)
    return make(model.inputs[0]) if single else keras.tree.map_structure(make, model.input)


def assert_equal(a, b, tolerance=1e-5):
    a, b = keras.tree.flatten(a), tf.nest.flatten(b)
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        x, y = np.asarray(tf.cast(x, "float32")), np.asarray(tf.cast(y, "float32"))
        assert x.shape == y.shape and np.isfinite(x).all()
        np.testing.assert_allclose(x, y, atol=tolerance * max(1, np.abs(x).max()), rtol=0)
