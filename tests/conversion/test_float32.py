"""Students as they are converted: rebuilt in float32 with all their state, or refused by the name of a layer."""

import keras
import numpy as np
import pytest
from keras import layers
from support.stateful_layers import PIXELS, STATEFUL, Noted, adapted, network

from kdistill.conversion.export import export
from kdistill.conversion.float32 import prepare
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.tflite.interpreter import File


@pytest.mark.parametrize("kind", STATEFUL)
def test_what_layers_derive_is_in_the_float32_model(kind):
    mixed, plain = (network(STATEFUL[kind](dtype), dtype) for dtype in ("mixed_bfloat16", None))
    plain.set_weights(mixed.get_weights())
    prepared = prepare(mixed)
    assert prepared.model is not mixed and all(layer.compute_dtype == "float32" for layer in prepared.model.layers)
    np.testing.assert_allclose(prepared.model(PIXELS), plain(PIXELS), atol=1e-5)
    assert np.ptp(plain(PIXELS), axis=0).min() > 1e-3  # the test sees something


def test_a_state_that_nobody_saves_is_named():
    mixed = network(adapted(Noted(name="noted", dtype="mixed_bfloat16")), "mixed_bfloat16")
    with pytest.raises(CheckFailed, match=r"in bfloat16 .*: its layer 'noted' \(Noted\) differs by 12.*save_own"):
        prepare(mixed)


class Fixed(layers.Layer):
    """A layer that does not let its dtype be changed."""

    def __init__(self, **kwargs):
        super().__init__(**{**kwargs, "dtype": "mixed_bfloat16"})

    def call(self, x):
        return x


def test_a_fixed_dtype_is_named():
    with pytest.raises(InputError, match="the dtype of its layers 'own' is fixed"):
        prepare(network(Fixed(name="own"), "mixed_bfloat16"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.parametrize("mode", ["int8", "float8"])
def test_models_after_quantize_are_refused(mode, tmp_path):
    model = network(layers.Identity())
    model.quantize(mode)
    with pytest.raises(InputError, match=rf"'logits' \(Dense\) of the model 'student' is already quantized \({mode}\)"):
        export(model, tmp_path, "reference")
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, name="deep")], name="inner")
    inner.quantize(mode)
    nested = keras.Sequential([keras.Input((2, 2, 1)), layers.Flatten(), inner, layers.Dense(3)])
    with pytest.raises(InputError, match=f"'deep' .* is already quantized .{mode}.*from before model.quantize"):
        prepare(nested)
    if mode == "int8":  # float8 is a precision of Keras for training
        with pytest.raises(InputError, match="'deep' .* is already quantized .int8."):
            Supervised(nested)


def rows():
    image = keras.Input((8, 8))
    return keras.Model(
        image, layers.Dense(3)(layers.GRU(4, unroll=True)(layers.Rescaling(1 / 255)(image))), name="rows"
    )


def dense():
    return keras.Sequential(
        [keras.Input((8, 8)), layers.Rescaling(1 / 255), layers.Flatten(), layers.Dense(3)], name="dense"
    )


class Spectrogram(keras.Model):
    """A subclassed model of (frequency, time)."""

    def __init__(self):
        super().__init__(name="sound")
        self.scale, self.conv = layers.Rescaling(1 / 255), layers.Conv1D(4, 3)
        self.pool, self.last = layers.GlobalMaxPooling1D(), layers.Dense(3)

    def call(self, x):
        return self.last(self.pool(self.conv(self.scale(x))))


def subclassed():
    model = Spectrogram()
    model(PIXELS[..., 0])
    return model


@pytest.mark.exhaustive("npu-rows", "reference-dense", "reference-rows", "reference-subclassed")
@pytest.mark.parametrize("build", [rows, dense, subclassed])
@pytest.mark.parametrize("profile", ["reference", "npu"])
@pytest.mark.slow
def test_a_model_without_a_channel_is_exported(build, profile, tmp_path):
    keras.utils.set_random_seed(0)
    model = build()
    report = export(model, tmp_path, profile, calibration=PIXELS[..., :1])
    assert report["input"]["shape"][1:] == [8, 8, 1] and report["agreement"] >= 0.9
    outputs, expected = File(report["path"]).predict(PIXELS[..., :1]), np.asarray(model(PIXELS[..., 0]))
    np.testing.assert_allclose(outputs, expected, atol=1e-3 if profile == "reference" else 0.1 * np.abs(expected).max())
    assert prepare(model).weights_sha256 == report["weights_sha256"] and prepare(model).model.name == model.name
    again = export(model, tmp_path, profile, calibration=PIXELS[..., 0], examples=PIXELS[..., 0])  # without the channel
    assert again["sha256"] == report["sha256"] and again["agreement"] == report["agreement"]


def first_convolution():
    conv = layers.Conv2D(4, 3, data_format="channels_first", name="conv")
    return keras.Sequential([keras.Input((3, 8, 8)), conv, layers.Flatten(), layers.Dense(3)], name="net")


def first_moves():
    move = layers.Permute((2, 3, 1), name="move")
    return keras.Sequential([keras.Input((1, 8, 8)), move, layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)])


def nested_convolution():
    return keras.Sequential([keras.Input((3, 8, 8)), first_convolution()])


@pytest.mark.slow
@pytest.mark.parametrize("build", [first_convolution, first_moves, nested_convolution])
def test_a_channels_first_model_is_named_and_its_way_out_works(build, tmp_path):
    model = build()
    with pytest.raises(
        InputError, match=r"takes images channels first, \([13], 8, 8\): its layer '(conv|move)' (has|moves)"
    ):
        prepare(model)
    image = keras.Input((*model.input_shape[2:], model.input_shape[1]))  # as the message says
    wrapped = keras.Model(image, model(layers.Permute((3, 1, 2))(image)))
    report = export(wrapped, tmp_path, "reference")
    images = PIXELS[..., : model.input_shape[1]]
    np.testing.assert_allclose(File(report["path"]).predict(images), wrapped(images), rtol=1e-3, atol=1e-2)
