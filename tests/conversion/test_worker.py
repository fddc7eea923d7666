"""Conversion never takes this process with it: the quantizer runs in another one, and its death is one message."""

import subprocess

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from support.small_models import corners

from kdistill.compression.quantized_file import convert_quantized
from kdistill.conversion import tflite_converter, worker
from kdistill.conversion.convert import convert
from kdistill.errors import InputError
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.tflite import interpreter

pytestmark = pytest.mark.slow

IMAGES = corners(32, seed=3).images
NPU, GPU, CPU = (load_profile(name) for name in ("npu", "phone_gpu", "phone_cpu"))


class Apply(layers.Layer):
    """A function as a layer."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, inputs):
        return self.function(inputs)


def classifier(*middle, name="small"):
    keras.utils.set_random_seed(1)
    scale, last = layers.Rescaling(1 / 255), [layers.Flatten(), layers.Dense(4, name="last")]
    return keras.Sequential([keras.Input((12, 12, 1)), scale, *middle, *last], name=name)


def convolved(function, name):
    return classifier(layers.Conv2D(4, 3, activation="relu"), Apply(function, name=name))


def scanned(steps):
    """`tf.scan` over the rows."""
    return tf.transpose(tf.scan(lambda a, b: 0.5 * a + b, tf.transpose(steps, [1, 0, 2])), [1, 0, 2])


ROWS = layers.Reshape((12, 12))


@pytest.fixture
def crashing(monkeypatch, tmp_path):
    """Puts other code in the place of the worker's."""

    def replace(code: str) -> None:
        package = tmp_path / "kdistill"
        for folder in (package, package / "conversion"):
            folder.mkdir(exist_ok=True)
            (folder / "__init__.py").touch()
        (package / "conversion" / "tflite_converter.py").write_text(code)
        worker.stop()
        monkeypatch.setattr(interpreter, "__file__", str(package / "tflite" / "interpreter.py"))

    yield replace
    worker.stop()


@pytest.mark.exhaustive("Bidirectional", "stacked cells")
@pytest.mark.parametrize(
    "middle,layer",
    [
        ([layers.ConvLSTM1D(4, 3, name="weather")], "weather"),
        ([ROWS, layers.Bidirectional(layers.SimpleRNN(6), name="both")], "both"),
        ([ROWS, layers.RNN([layers.GRUCell(6), layers.LSTMCell(4)], name="stack")], "stack"),
    ],
    ids=["ConvLSTM1D", "Bidirectional", "stacked cells"],
)
def test_recurrent_layers_crash_the_quantizer_and_not_us(middle, layer):
    model = classifier(*middle)
    with pytest.raises(InputError, match=rf"'npu'.*crashed \(signal 11.*the recurrent layer '{layer}'\. .*unroll=True"):
        convert(model, NPU, IMAGES)
    assert convert(model, GPU)[4:8] == b"TFL3"  # the profile that the message names


@pytest.mark.exhaustive("0 to a negative power", "1 / sqrt(0)")
@pytest.mark.parametrize(
    "function,operator",
    [(ops.rsqrt, "RSQRT"), (lambda x: ops.exp(1e3 * x), "EXP"), (lambda x: ops.power(x, -0.3), "POW")],
    ids=["1 / sqrt(0)", "exp overflows", "0 to a negative power"],
)
def test_numbers_that_are_not_finite_are_named_with_operator_and_layer(function, operator):
    model = convolved(function, "wild")
    with pytest.raises(InputError, match=rf"crashed.*operator {operator} of layer 'wild'.*NaN or infinite.*phone_cpu"):
        convert(model, NPU, IMAGES)
    assert convert(model, CPU)[4:8] == b"TFL3"
    tame = convolved(lambda x: function(0.001 * x + 1e-3), "tame")
    assert convert(tame, NPU, IMAGES)[4:8] == b"TFL3"  # the process has been started again


@pytest.mark.exhaustive
def test_a_loop_of_ones_own_is_named():
    with pytest.raises(InputError, match="crashed.*It cannot quantize the loop of layer 'sum'.*phone_gpu"):
        convert(classifier(ROWS, Apply(scanned, name="sum")), NPU, IMAGES)


@pytest.mark.exhaustive("GRU", "LSTM")
@pytest.mark.parametrize("kind", [layers.LSTM, layers.SimpleRNN, layers.GRU])
def test_unroll_is_a_way_out(kind):
    looping = classifier(ROWS, kind(6, name="words"))
    unrolled = classifier(ROWS, kind(6, unroll=True, name="words"))
    unrolled.set_weights(looping.get_weights())
    images = IMAGES.astype("float32")
    np.testing.assert_allclose(looping(images), unrolled(images), atol=1e-5)
    for profile in (NPU, CPU):
        assert convert(unrolled, profile, IMAGES)[4:8] == b"TFL3"


@pytest.mark.exhaustive("LSTM", "two layers")
@pytest.mark.parametrize(
    "middle,subject",
    [
        ([ROWS, layers.LSTM(6, name="words")], "recurrent layer 'words'"),
        (
            [
                layers.ConvLSTM1D(4, 3, return_sequences=True, name="a"),
                layers.Reshape((12, 40)),
                layers.GRU(4, name="b"),
            ],
            "s 'a', 'b'",
        ),
        ([ROWS, Apply(scanned, name="sum")], "the loop of layer 'sum'"),
    ],
    ids=["LSTM", "two layers", "tf.scan"],
)
def test_a_loop_needs_a_fixed_batch_size(middle, subject):
    model = classifier(*middle)
    with pytest.raises(InputError, match=f"no operator 'TensorList.*{subject} needs with an open batch size.*batch=1"):
        convert(model, CPU)
    open_int8 = Profile("mine", "int8")
    with pytest.raises(InputError, match=f"'mine'.*{subject} needs with an open batch size.*not enough with int8"):
        convert(model, open_int8, IMAGES)
    assert convert(model, GPU)[4:8] == b"TFL3"


def test_a_process_that_is_killed_is_said_to_lack_memory(crashing):
    crashing("import os, signal; input(); os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(InputError, match=r"crashed \(signal 9, Killed\)\. Memory ran out, or someone ended"):
        convert(classifier(), NPU, IMAGES)


def test_a_process_that_does_not_start_says_why(crashing):
    crashing("input(); import absent_module")
    with pytest.raises(InputError, match=r"crashed \(exit status 1: ModuleNotFoundError: No module named 'absent_mod"):
        convert(classifier(), NPU, IMAGES)


def test_a_process_that_ends_between_two_jobs_is_started_again(crashing):
    crashing("input()")  # like one that was idle for too long, each time
    with pytest.raises(InputError, match=r"crashed \(exit status 0\)"):
        convert(classifier(), NPU, IMAGES)


def test_a_time_limit(crashing, monkeypatch):
    crashing("import time; time.sleep(60)")
    monkeypatch.setattr(worker, "SECONDS", 1)
    with pytest.raises(InputError, match="did not finish within 1 s. Give fewer calibration images"):
        convert(classifier(), NPU, IMAGES)


def test_the_ranges_of_training_are_converted_in_that_process_too(crashing):
    import tf_keras

    crashing("import os, signal; input(); os.kill(os.getpid(), signal.SIGSEGV)")
    network = tf_keras.Sequential([tf_keras.layers.Input((4, 4, 1)), tf_keras.layers.Flatten()], name="student")
    with pytest.raises(InputError, match="'student' cannot be exported for 'quantization-aware training'.*signal 11"):
        convert_quantized(network, "logits")


def test_one_process_for_all_conversions(monkeypatch):
    started = []

    def popen(*args, **kwargs):
        started.append(args)
        return original(*args, **kwargs)

    original = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    worker.stop()
    model = classifier(layers.Conv2D(4, 3, name="conv"))
    first, second = (convert(model, NPU, IMAGES) for _ in range(2))
    assert first == second and len(started) == 1
    worker.stop()
    assert convert(model, NPU, IMAGES) == first and len(started) == 2


def test_other_profiles_start_no_process(monkeypatch):
    monkeypatch.setattr(worker, "start", lambda: pytest.fail("started"))
    monkeypatch.setattr(worker, "convert", lambda *_: pytest.fail("converted there"))
    for profile in (GPU, CPU, load_profile("reference")):
        convert(classifier(), profile)


def test_the_bytes_are_those_of_a_conversion_in_this_process(monkeypatch):
    model = classifier(layers.Conv2D(4, 3, name="conv"))
    there = convert(model, NPU, IMAGES)
    monkeypatch.setattr(worker, "convert", tflite_converter.convert)
    assert convert(model, NPU, IMAGES) == there
