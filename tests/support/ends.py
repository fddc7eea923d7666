"""Models that give the probabilities of one classifier in many ways, and models whose outputs are no exclusive classes.

All take `X` and have the weights `W`, so every member of `DISTRIBUTIONS` gives softmax(X @ W).
"""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 8)).astype("float32")
Y = RNG.integers(0, 5, 32).astype("int32")
W = (RNG.normal(size=(8, 5)) * 2).astype("float32")


def model(*end, weights=W, scale: float = 1.0) -> keras.Model:
    """A dense layer with these weights, and what comes after it."""
    dense = layers.Dense(weights.shape[1], use_bias=False)
    x = image = keras.Input((8,))
    for layer in (dense, *end):
        x = layer(x)
    dense.set_weights([weights * scale])
    return keras.Model(image, x, name="net")


class Subclassed(keras.Model):
    """`X` -> `end(X @ W)`, without a graph that Keras knows."""

    def __init__(self, end, weights=W):
        super().__init__(name="own")
        self.dense, self.end = layers.Dense(weights.shape[1], use_bias=False), end
        self.dense.build((None, 8))
        self.dense.set_weights([weights])

    def call(self, x):
        return self.end(self.dense(x))


def averaged() -> keras.Model:
    """The mean of two equal classifiers."""
    ends = []
    image = keras.Input((8,))
    for name in ("first", "second"):
        dense = layers.Dense(5, use_bias=False, name=name)
        ends.append(layers.Softmax()(dense(image)))
        dense.set_weights([W])
    return keras.Model(image, layers.Average()(ends))


def merged() -> keras.Model:
    """Ten classes of which pairs are added by a matrix: a linear layer behind a softmax."""
    weights = np.concatenate([W, W], axis=1)
    pairs = layers.Dense(5, use_bias=False)
    network = model(layers.Softmax(), pairs, weights=weights)
    pairs.set_weights([np.concatenate([np.eye(5), np.eye(5)]).astype("float32")])
    return network


def served(folder: Path):
    """The function `serve` of a SavedModel."""
    model(layers.Softmax()).export(folder / "saved", verbose=False)
    loaded = tf.saved_model.load(str(folder / "saved"))
    return lambda images: loaded.serve(images)


def from_python(folder: Path):
    """A `.tflite` that runs in Python, inside of the graph of a step."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model(layers.Softmax()))
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=converter.convert())

    def run(images):
        interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])

    return lambda images: tf.ensure_shape(tf.numpy_function(run, [images], tf.float32), (None, 5))


def by_hand(z):
    z = tf.exp(z - tf.reduce_max(z, axis=-1, keepdims=True))
    return z / tf.reduce_sum(z, axis=-1, keepdims=True)


DISTRIBUTIONS = {
    "clip": lambda folder: model(layers.Softmax(), layers.Lambda(lambda p: keras.ops.clip(p, 1e-12, 1.0))),
    "identity": lambda folder: model(layers.Softmax(), layers.Identity()),
    "dropout": lambda folder: model(layers.Softmax(), layers.Dropout(0.5)),
    "ops.softmax": lambda folder: model(keras.ops.softmax),
    "lambda": lambda folder: model(layers.Lambda(by_hand)),
    "average": lambda folder: averaged(),
    "merged": lambda folder: merged(),
    "subclassed": lambda folder: Subclassed(tf.nn.softmax),
    "traced": lambda folder: Subclassed(tf.function(tf.nn.softmax)),
    "function": lambda folder: lambda x: tf.nn.softmax(x @ W),
    "serve": served,
    "tflite": from_python,
}
SIGMOIDS = {
    "dense": lambda: model(layers.Activation("sigmoid")),
    "tf.nn.sigmoid": lambda: model(layers.Activation(tf.nn.sigmoid)),
    "reshaped": lambda: model(layers.Activation("sigmoid"), layers.Reshape((5,))),
    "lambda": lambda: model(layers.Lambda(tf.sigmoid)),
    "subclassed": lambda: Subclassed(keras.ops.sigmoid),
    "two labels at their start": lambda: model(layers.Activation("sigmoid"), weights=np.zeros((8, 2), "float32")),
}
UNCLEAR = {
    "hard sigmoid": lambda: model(layers.Activation("hard_sigmoid")),
    "some classes": lambda: model(layers.Softmax(), layers.Lambda(lambda p: p[:, 1:4])),
    "gathered classes": lambda: model(layers.Softmax(), layers.Lambda(lambda p: keras.ops.take(p, [0, 2], axis=1))),
    "softmax over the batch": lambda: model(layers.Softmax(axis=0)),
}
# Numbers from 0 to 1, or anything else, of layers that give scores.
SCORES = {
    "zeros": lambda: model(weights=np.zeros((8, 5), "float32")),
    "small": lambda: model(
        layers.Lambda(lambda z: z * 0.01), layers.Dense(4, use_bias=False, kernel_initializer="ones")
    ),
    "relu": lambda: model(layers.ReLU()),
    "slice": lambda: model(layers.Lambda(lambda z: z[:, 1:4])),
    "sum": lambda: model(layers.Lambda(lambda z: z / 100 + 0.01)),
    "log_softmax": lambda: model(keras.ops.log_softmax),
    "subclassed": lambda: Subclassed(lambda z: z, weights=np.full((8, 5), 1e-3, "float32")),
}
