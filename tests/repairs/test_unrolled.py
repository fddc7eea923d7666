"""Recurrent layers without their loop compute the same, with the same weights."""

import keras
import numpy as np
import pytest
from keras import layers

from kdistill.conversion.float32 import prepare
from kdistill.conversion.refusals import recurrent_layers
from kdistill.errors import InputError
from kdistill.repairs.unrolled import unrolled

pytestmark = pytest.mark.slow
SEQUENCES = np.random.default_rng(0).normal(size=(5, 6, 4)).astype(np.float32)


def one(*stack) -> keras.Model:
    keras.utils.set_random_seed(0)
    return keras.Sequential([keras.Input((6, 4)), *stack, layers.Dense(3)])


def inside() -> keras.Model:
    """A recurrent layer in a model in a model."""
    keras.utils.set_random_seed(0)
    sequence = keras.Input((6, 4))
    return keras.Model(sequence, layers.Dense(3)(one(layers.GRU(5))(sequence)))


CASES = {
    "LSTM": lambda: one(layers.LSTM(5)),
    "GRU behind GRU": lambda: one(layers.GRU(5, return_sequences=True), layers.GRU(4, go_backwards=True)),
    "SimpleRNN": lambda: one(layers.SimpleRNN(5)),
    "Bidirectional": lambda: one(layers.Bidirectional(layers.LSTM(5), merge_mode="sum")),
    "cells": lambda: one(layers.RNN([layers.GRUCell(5), layers.LSTMCell(3)])),
    "a model inside": inside,
}


@pytest.mark.parametrize("name", CASES)
def test_unrolled_models_compute_the_same(name):
    student = prepare(CASES[name](), "numbers")
    assert recurrent_layers(student.model)
    again = unrolled(student)
    assert not recurrent_layers(again.model) and again.heads == student.heads
    assert again.weights_sha256 == student.weights_sha256
    expected, received = (np.asarray(one.model(SEQUENCES)) for one in (student, again))
    np.testing.assert_allclose(received, expected, rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_be_rebuilt_is_one_message():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.gru, self.dense = layers.GRU(5), layers.Dense(3)

        def call(self, inputs):
            return self.dense(self.gru(inputs))

    model = Own()
    model(SEQUENCES)
    student = prepare(model, "numbers")
    with pytest.raises(InputError, match=r"have no unroll=True|cannot be rebuilt"):
        unrolled(student)
