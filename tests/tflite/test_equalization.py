"""A file computes the same before and after its channels get the same width."""

import keras
import numpy as np
import pytest
from keras import layers

from kdistill.conversion.convert import convert
from kdistill.recipe import Profile
from kdistill.tflite import flatbuffer
from kdistill.tflite.activation_ranges import activations_of
from kdistill.tflite.equalization import equalize
from kdistill.tflite.interpreter import open_interpreter

pytestmark = pytest.mark.slow
IMAGES = np.random.default_rng(0).uniform(-1, 1, (24, 8, 8, 3)).astype(np.float32)
WIDTH = 10.0 ** np.linspace(-2, 2, 6)


def chain(*middle: keras.layers.Layer, end=layers.GlobalAveragePooling2D, activation="relu", bias: float = 0.1):
    """A convolution with channels of very different widths, layers behind it, and a dense layer."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    first = layers.Conv2D(
        6, 3, padding="same", activation=activation, bias_initializer=keras.initializers.Constant(bias)
    )
    x = first(image)
    for layer in middle:
        x = layer(x)
    x = layers.Conv2D(5, 1, activation="relu")(x)
    model = keras.Model(image, layers.Dense(4)(end()(x)))
    kernel, bias_ = first.get_weights()
    first.set_weights([kernel * WIDTH, bias_ * WIDTH])
    return model


def residual() -> keras.Model:
    """The wide activations go two ways."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    x = layers.Conv2D(6, 3, padding="same", activation="relu")(image)
    return keras.Model(image, layers.Conv2D(4, 1)(layers.Add()([x, layers.Conv2D(6, 1, activation="relu")(x)])))


def shared() -> keras.Model:
    """One layer is called twice."""
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3))
    conv = layers.Conv2D(3, 3, padding="same", activation="relu")
    return keras.Model(image, layers.Dense(4)(layers.Flatten()(conv(conv(image)))))


def outputs(content: bytes) -> np.ndarray:
    interpreter = open_interpreter(content, delegates=False)
    index, out = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    interpreter.resize_tensor_input(index, IMAGES.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(index, IMAGES)
    interpreter.invoke()
    return interpreter.get_tensor(out)


def widths(content: bytes) -> list[float]:
    """Of each activation with six channels, the largest channel as a multiple of the smallest."""
    found = activations_of(content, lambda: [{"image": IMAGES}], distributions=False).values()
    return [float(one.largest.max() / one.largest.min()) for one in found if one.largest.shape == (6,)]


CASES = {
    "next layer": (lambda: chain(), 1),
    "depthwise between": (lambda: chain(layers.DepthwiseConv2D(3, padding="same", activation="relu")), 2),
    "max pooling": (lambda: chain(layers.MaxPooling2D()), 1),
    "average pooling and leaky ReLU": (
        lambda: chain(layers.LeakyReLU(), layers.AveragePooling2D(2), activation=None),
        1,
    ),
    "padding": (lambda: chain(layers.ZeroPadding2D(1)), 1),
    "no bias anywhere": (lambda: chain(bias=0.0), 1),
    "mean over positions": (lambda: chain(end=layers.GlobalAveragePooling2D), 1),
    "ReLU6 stays": (lambda: chain(activation="relu6"), 0),
    "swish stays": (lambda: chain(activation="swish"), 0),
    "residual stays": (lambda: residual(), 0),
    "shared layer stays": (lambda: shared(), 0),
}


@pytest.mark.exhaustive(
    but=(
        "next layer",
        "residual stays",
        "max pooling",
    )
)
@pytest.mark.parametrize("name", CASES)
def test_a_file_computes_the_same(name):
    build, pairs = CASES[name]
    content = convert(build(), Profile("float"))
    before = flatbuffer.parse(content)
    changed = equalize(before, activations_of(content, lambda: [{"image": IMAGES}], distributions=False))
    equalized = flatbuffer.pack(before)
    expected, received = outputs(content), outputs(equalized)
    np.testing.assert_allclose(received, expected, rtol=1e-3, atol=1e-4 * abs(expected).max())
    assert changed >= pairs
    if pairs:
        assert max(widths(content)) > 1_000
        assert max(widths(equalized)) < 0.05 * max(widths(content))
    else:
        assert widths(equalized) == pytest.approx(widths(content), rel=1e-3)
