import keras
import numpy as np
import pytest
from keras import layers

from kdistill.conversion.convert import convert
from kdistill.conversion.tflite_converter import Tuning
from kdistill.recipe import Profile
from kdistill.tflite import flatbuffer
from kdistill.tflite.interpreter import open_interpreter

pytestmark = pytest.mark.slow
DYNAMIC = Profile("dynamic", quantization="dynamic")


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 8))
    x = layers.Conv2D(32, 3, activation="relu", name="conv")(image)
    x = layers.Dense(32, activation="relu", name="hidden")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(48, name="last")(x))


def outputs(content: bytes) -> np.ndarray:
    interpreter = open_interpreter(content, delegates=False)
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def kinds(content: bytes) -> list[tuple[str, str]]:
    return [
        (row["tensor"], row["weights"]) for row in flatbuffer.operators(flatbuffer.parse(content)) if row["weights"]
    ]


def test_chosen_kernels_are_those_of_the_float_file(model):
    plain, dynamic = convert(model, Profile("float")), convert(model, DYNAMIC)
    names = [name for name, _ in kinds(dynamic)]
    assert [kind for _, kind in kinds(dynamic)] == ["int8"] * 3
    one = convert(model, DYNAMIC, tuning=Tuning(float_tensors=(names[1],)))
    assert [kind for _, kind in kinds(one)] == ["int8", "float32", "int8"]
    every = convert(model, DYNAMIC, tuning=Tuning(float_tensors=tuple(names)))
    expected = outputs(plain)
    np.testing.assert_allclose(outputs(every), expected, rtol=1e-5, atol=1e-6)
    error = [float(np.abs(outputs(content) - expected).mean()) for content in (every, one, dynamic)]
    assert error[0] < error[1] < error[2]
    assert len(dynamic) < len(one) < len(every)
