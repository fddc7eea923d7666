"""Tiny models of every kind of input and output."""

import keras
from keras import layers


def segmentation(*end):
    return keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(4, 3, padding="same"), layers.Conv2D(3, 1), *end])


def tagging():
    words = keras.Input((6,), dtype="int32", name="words")
    rows = layers.LSTM(4, return_sequences=True)(layers.Embedding(20, 4, mask_zero=True)(words))
    return keras.Model(words, layers.Dense(3)(rows))


def text(dtype="int32"):
    words = keras.Input((6,), dtype=dtype)
    return keras.Model(words, layers.Dense(4)(layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(words))))


def audio():
    return keras.Sequential(
        [keras.Input((32, 1)), layers.Conv1D(4, 5), layers.GlobalAveragePooling1D(), layers.Dense(4)]
    )


def table(columns, activation=None):
    return keras.Sequential([keras.Input((5,)), layers.Dense(8), layers.Dense(columns, activation, name="out")])


def two_inputs(as_dict=False):
    a, b = keras.Input((8,), name="a"), keras.Input((3,), name="b", dtype="int32")
    joined = layers.Concatenate()([a, layers.Rescaling(1.0)(b)])
    return keras.Model({"b": b, "a": a} if as_dict else [a, b], layers.Dense(4)(joined))


def two_heads(as_dict=True):
    x = keras.Input((5,))
    kind = layers.Dense(3, name="kind")(x)
    price = layers.Dense(1, name="price")(x)
    return keras.Model(x, {"kind": kind, "price": price} if as_dict else [kind, price])
