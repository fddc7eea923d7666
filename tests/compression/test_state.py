"""Compression of students that compute from more than their weights, and refusals of what cannot be carried."""

import keras
import numpy as np
import pytest
from keras import layers
from support.stateful_layers import PIXELS, STATEFUL, network

import kdistill
from kdistill.compression.bridge import copy_back, to_tf_keras
from kdistill.compression.inputs import check_student
from kdistill.errors import InputError
from kdistill.recipe import Stage

pytestmark = pytest.mark.slow
LABELS = np.arange(len(PIXELS)) % 3
OWN = ("finalize_state", "load_own_variables")  # layers with weights that tf_keras lacks


@pytest.mark.exhaustive(
    but=(
        "Normalization in a model-None",
        "Discretization-mixed_bfloat16",
    )
)
@pytest.mark.parametrize("dtype", [None, "mixed_bfloat16"])
@pytest.mark.parametrize("kind", [kind for kind in STATEFUL if kind not in OWN])
def test_the_compressed_model_has_the_state_of_the_student(kind, dtype):
    student = network(STATEFUL[kind](dtype), dtype)
    plain = student if dtype is None else network(STATEFUL[kind](), None)
    plain.set_weights(student.get_weights())
    stage = Stage("prune", epochs=1, batch_size=20, learning_rate=1e-9, final_sparsity=0.01)
    result = kdistill.compress(student, stage, data=(PIXELS, LABELS), distillation_weight=0.0, say=lambda text: None)
    batch = result.model.get_layer("batch")  # its statistics follow the images, whatever the learning rate
    batch.set_weights(plain.get_layer("batch").get_weights())
    np.testing.assert_allclose(result.model(PIXELS), plain(PIXELS), atol=0.05 * np.abs(plain(PIXELS)).max())


@pytest.mark.parametrize("kind", OWN)
def test_handlers_and_the_way_back_derive_again(kind):
    import tf_keras

    @tf_keras.saving.register_keras_serializable(package="test_state")
    class Shift(tf_keras.layers.Layer):
        def build(self, shape):
            self.center = self.add_weight("center", (shape[-1],))

        def call(self, x):
            return x - (0.5 if kind == "load_own_variables" else 1.0) * self.center

    student = network(STATEFUL[kind]())
    bridged = to_tf_keras(student, {type(student.layers[0]): lambda layer: Shift()})
    np.testing.assert_allclose(bridged(PIXELS), student(PIXELS), atol=1e-3)
    bridged.get_layer("own").center.assign([1.0, 2.0, 3.0])
    np.testing.assert_allclose(copy_back(bridged, student)(PIXELS), bridged(PIXELS), atol=1e-3)


def masked():
    rows = [layers.Reshape((8, 24)), layers.Masking(name="mask"), layers.Dense(4), layers.Flatten()]
    return keras.Sequential([keras.Input((8, 8, 3)), *rows, layers.Dense(3)])


def test_a_student_that_refuses_noise_is_compared_on_small_numbers():
    rows = [layers.Reshape((192,)), layers.Embedding(256, 2, name="table"), layers.Flatten(), layers.Dense(3)]
    student = keras.Sequential(
        [keras.Input((8, 8, 3)), *rows]
    )  # the table has no row for the negative numbers of noise
    np.testing.assert_allclose(to_tf_keras(student)(PIXELS), student(PIXELS), atol=1e-5)


@pytest.mark.filterwarnings("ignore:Layer .* was passed an input with a mask attached")
def test_what_cannot_be_carried_is_refused_before_anything_trains():
    calls = []
    spectral = network(layers.SpectralNormalization(layers.Conv2D(4, 3), name="sn"))
    wide = network(layers.Identity(), name="wide")
    with pytest.warns(UserWarning, match="does not have a `quantize` method"):
        wide.quantize("int8")
    stage = Stage("pqat", epochs=1, batch_size=20)
    for student, message in (
        (spectral, "Layer 'sn' .SpectralNormalization. has no twin"),
        (wide, "Layer 'logits' .Dense. of the model 'wide' is already quantized .int8."),
    ):
        with pytest.raises(InputError, match=message):
            kdistill.compress(student, stage, data=(PIXELS, LABELS), distillation_weight=0.0, say=calls.append)
        with pytest.raises(InputError, match=message):
            check_student(student, stage)
    with pytest.raises(InputError, match="cannot wrap the layers of this model for the step 'prune': .*dense.*Masks"):
        kdistill.compress(masked(), stage, data=(PIXELS, LABELS), distillation_weight=0.0, say=calls.append)
    assert not calls
