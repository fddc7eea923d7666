"""Conversion: what is written for each kind of model, what stayed float, and what is refused."""

import dataclasses
import hashlib
import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from keras import layers, ops
from support.small_models import CLASSES, corners, network
from tensorflow.lite.python import lite

from kdistill.conversion import convert, float32
from kdistill.conversion.export import export
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.recipe.values import as_dict
from kdistill.tflite import metadata
from kdistill.tflite.interpreter import File, open_interpreter

pytestmark = pytest.mark.slow

IMAGES = corners(200, seed=3).images


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def reference(model, tmp_path_factory):
    """The report of that model's float32 file."""
    return export(model, tmp_path_factory.mktemp("reference"), "reference")


def logits_of(model, images=IMAGES):
    return np.asarray(model(images.astype("float32")), np.float32)


def classifier(*middle, classes=4):
    """An untrained model with these layers between a convolution and a dense layer."""
    keras.utils.set_random_seed(1)
    last = [layers.GlobalAveragePooling2D(name="average"), layers.Dense(classes, name="last")]
    return keras.Sequential([keras.Input((12, 12, 1)), layers.Conv2D(8, 3, name="first"), *middle, *last])


def test_the_file_gives_what_the_model_gives(model, reference):
    path = Path(reference["path"])
    np.testing.assert_allclose(File(path).predict(IMAGES), logits_of(model), atol=1e-4)
    content = path.read_bytes()
    assert (reference["bytes"], reference["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert (reference["profile"], reference["float_layers"], reference["precision"]) == ("reference", [], "float32")
    assert [each.name for each in path.parent.iterdir()] == ["student.tflite"]


def test_the_signature_has_names(reference, tmp_path):
    ended = export(network(softmax=True), tmp_path, "reference")
    for found, name in ((reference, "logits"), (ended, "probabilities")):
        signatures = Interpreter(found["path"]).get_signature_list()
        assert signatures == {"serving_default": {"inputs": ["image"], "outputs": [name]}}
        assert File(found["path"]).probabilities == (name == "probabilities")


def test_a_keras_file_and_a_distiller_are_as_good_as_their_model(model, reference, tmp_path):
    model.save(tmp_path / "model.keras")
    for student in (tmp_path / "model.keras", Supervised(model)):
        assert export(student, tmp_path / "same.tflite", "reference")["sha256"] == reference["sha256"]


def test_int8_with_other_inputs_and_outputs_and_three_images_at_a_time(model, tmp_path):
    found = export(model, tmp_path, Profile("mixed", "int8", "uint8", "float32", batch=3), IMAGES[:40])
    assert (found["input"]["type"], found["output"]["type"]) == ("uint8", "float32")
    assert (found["input"]["shape"], found["output"]["shape"]) == ([3, 12, 12, 1], [3, 4])
    assert found["float_layers"] == []
    np.testing.assert_allclose(File(found["path"]).predict(IMAGES[:10]), logits_of(model, IMAGES[:10]), atol=0.4)


def test_a_file_that_cannot_be_opened_leaves_the_old_one(model, tmp_path, monkeypatch):
    (tmp_path / "student.tflite").write_bytes(b"the old one")
    monkeypatch.setattr(convert, "convert", lambda *_: b"    TFL3 and then nothing")
    with pytest.raises(InputError, match="damaged"):
        export(model, tmp_path, "phone_cpu")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the old one"]


def test_int8_has_no_float_operator_left(tmp_path):
    average = layers.GlobalAveragePooling2D(name="average")
    image = keras.Input((12, 12, 1))
    x = layers.Conv2D(8, 3, use_bias=False)(layers.Rescaling(1 / 255)(image))
    x = layers.ReLU()(layers.BatchNormalization()(x))
    model = keras.Model(image, layers.Dense(4)(average(x)))
    found = export(model, tmp_path, "npu", IMAGES)
    assert found["operators"] == ["CONV_2D", "MEAN", "FULLY_CONNECTED"]
    assert found["float_layers"] == []
    assert (found["input"]["type"], found["output"]["type"]) == ("int8", "int8")
    assert found["input"]["scale"] == pytest.approx(1) and found["input"]["zero_point"] == -128
    tensors = open_interpreter(found["path"], delegates=False).get_tensor_details()
    kinds = {np.dtype(each["dtype"]).name for each in tensors}
    assert kinds == {"int8", "int32"}  # int32: biases and the axes of the average


@pytest.mark.exhaustive
def test_what_stays_float_is_told_with_its_layer_and_reason(tmp_path):
    net = classifier(layers.ELU(name="bend"), layers.Conv2D(16, 3, name="wide"), layers.Conv2D(4, 1, name="thin"))
    dynamic = export(net, tmp_path, "phone_cpu")
    assert dynamic["min_runtime"] == "2.4.0"
    kept = {(each["operator"], each["layer"]): each["reason"] for each in dynamic["float_layers"]}
    assert set(kept) == {("CONV_2D", "first"), ("CONV_2D", "thin"), ("FULLY_CONNECTED", "last")}
    assert kept["CONV_2D", "first"].startswith("72 elements: ") and "1,024" in kept["CONV_2D", "first"]
    full = export(net, tmp_path, "npu", IMAGES, mean=0, std=1)
    assert [(each["operator"], each["layer"]) for each in full["float_layers"]] == [("ELU", "bend")]
    assert "no int8 version" in full["float_layers"][0]["reason"]
    assert export(net, tmp_path, "phone_gpu")["float_layers"] == []


def test_dense_layers_are_quantized_per_tensor_for_older_runtimes(tmp_path):
    net = keras.Sequential(
        [keras.Input((12, 12, 1)), layers.Flatten(), layers.Dense(32, name="wide"), layers.Dense(4, name="thin")]
    )
    found = export(net, tmp_path, "phone_cpu")
    assert tuple(map(int, found["min_runtime"].split("."))) <= (2, 4, 0)
    assert [each["layer"] for each in found["float_layers"]] == ["thin"]
    assert len(metadata.bare(Path(found["path"]).read_bytes())) < 8000  # 4,736 weights of one byte


def one_part(x):
    return ops.split(x, 4, axis=-1)[2]


def two_rows(x):
    rows = ops.unstack(x, axis=1)
    return rows[0] * rows[5]


def first_values(x):
    return ops.top_k(ops.reshape(x, (-1, 144)), 5)[0]


@pytest.mark.exhaustive(but=("one_part",))
@pytest.mark.parametrize("choose", [one_part, two_rows, first_values])
def test_results_that_nobody_uses_do_not_change_the_bytes(choose, tmp_path):
    """TensorFlow's quantizer alone gives one of several files then, by addresses in memory."""
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 1))
    hidden = ops.tanh(choose(ops.reshape(layers.Rescaling(1 / 255)(image), (-1, 12, 12))))
    model = keras.Model(image, layers.Dense(3)(layers.Flatten()(hidden)))
    images = np.random.default_rng(0).uniform(0, 255, (20, 12, 12, 1)).astype(np.float32)
    assert len({convert.convert(model, load_profile("npu"), images) for _ in range(4)}) == 1


def test_the_converter_has_its_private_settings(tmp_path):
    """A TensorFlow that renames them would write files that older runtimes refuse, or other bytes each time."""
    assert callable(lite._mlir_quantize)
    network().export(tmp_path / "model", verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "model"))
    assert converter._experimental_disable_per_channel_quantization_for_dense_layers is False


def test_calibration_takes_500_images_at_most_evenly_spaced(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(convert, "convert", lambda model, profile, images, *rest: seen.append(images) or b"no file")
    images = np.broadcast_to(np.arange(1001).reshape(-1, 1, 1, 1) / 10, (1001, 12, 12, 1))
    with pytest.raises(InputError):
        export(model, tmp_path, "npu", images)
    assert seen[0].shape == (500, 12, 12, 1)
    places = seen[0][:, 0, 0, 0] * 10
    assert (places[0], places[-1]) == (0, 1000) and set(np.diff(places).round()) == {2, 3}
    assert list(tmp_path.iterdir()) == []


def test_labels_and_description_are_written_beside(model, tmp_path):
    found = export(model, tmp_path / "corner.tflite", "npu", IMAGES, CLASSES)
    assert (tmp_path / "labels.txt").read_text().splitlines() == list(CLASSES)
    told = json.loads((tmp_path / "model.json").read_text())
    assert (told["file"], told["sha256"], told["bytes"]) == ("corner.tflite", found["sha256"], found["bytes"])
    assert told["profile"] == as_dict(load_profile("npu"))
    assert told["input"]["values"] == "raw pixels 0..255" and told["output"]["values"] == "logits"
    assert (told["input"]["scale"], told["input"]["zero_point"], told["class_names"]) == (1.0, -128, list(CLASSES))
    assert told["versions"]["tensorflow"] == tf.__version__
    for names in (CLASSES[:3], "abcd", ("a", "b", "c", "d\ne"), ("a", "", "c", "d")):
        with pytest.raises(InputError, match="class_names expects 4 names"):
            export(model, tmp_path, "reference", class_names=names)


@pytest.mark.exhaustive(but=("mixed_float16",))
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float16"])
def test_a_model_of_mixed_precision_is_rebuilt_in_float32(policy, tmp_path):
    mixed, plain = network(dtype=policy), network()
    plain.set_weights([np.asarray(w, np.float32) for w in mixed.get_weights()])
    found = export(mixed, tmp_path, "reference")
    assert found["operators"][0] == "CONV_2D"
    np.testing.assert_allclose(File(found["path"]).predict(IMAGES), logits_of(plain), atol=1e-4)
    assert mixed.get_layer("first").dtype_policy.name == policy  # the given model is left as it was


def test_a_rebuilt_model_that_computes_otherwise_fails(monkeypatch):
    mixed = network(dtype="mixed_bfloat16")
    first = mixed.get_weights()
    monkeypatch.setattr(type(mixed), "get_weights", lambda self: [w * 3 for w in first])
    with pytest.raises(CheckFailed, match="rebuilt in float32, differs"):
        float32.prepare(mixed)


class Hand(keras.Model):
    """A subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Conv2D(4, 3, strides=2, name="inner")
        self.flat, self.last = layers.Flatten(), layers.Dense(4)

    def call(self, images, training=False):
        return self.last(self.flat(self.inner(images)))


def test_subclassed_models_are_exported_if_their_input_is_known(tmp_path):
    model = Hand()
    with pytest.raises(InputError, match="is not built"):
        export(model, tmp_path, "reference")
    model(IMAGES[:2].astype("float32"))
    found = export(model, tmp_path, "reference")
    np.testing.assert_allclose(File(found["path"]).predict(IMAGES), logits_of(model), rtol=1e-4, atol=1e-2)


def test_a_subclassed_model_of_mixed_precision_is_rebuilt(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = Hand()
        model(IMAGES[:2].astype("float32"))
        found = export(model, tmp_path, "reference")
        assert keras.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        keras.config.set_dtype_policy("float32")
    plain = Hand()
    plain(IMAGES[:2].astype("float32"))
    plain.set_weights(model.get_weights())
    np.testing.assert_allclose(File(found["path"]).predict(IMAGES), logits_of(plain), rtol=1e-4, atol=1e-2)
    assert (model.inner.compute_dtype, found["precision"]) == ("bfloat16", "bfloat16")


class Stubborn(layers.Layer):
    """A layer that cannot be made anew."""

    def __init__(self, secret, **kwargs):
        super().__init__(**kwargs)
        self.secret = secret

    def call(self, inputs):
        return inputs + self.secret

    def get_config(self):
        raise NotImplementedError("no config")


def test_a_model_that_cannot_be_rebuilt_says_why(tmp_path):
    mixed = network(dtype="mixed_bfloat16", middle=[Stubborn(1, dtype="mixed_bfloat16")])
    with pytest.raises(InputError, match=r"in bfloat16 and cannot .*'stubborn' \(Stubborn\) .* \(no config\)"):
        export(mixed, tmp_path, "reference")


class Bessel(layers.Layer):
    """An operator that LiteRT does not have."""

    def call(self, inputs):
        return tf.math.special.bessel_j0(inputs)


@pytest.mark.parametrize("profile", ["reference", "npu"])
def test_an_operator_without_builtin_is_named_with_its_layer(tmp_path, profile, capfd):
    with pytest.raises(InputError, match="no builtin operator for 'BesselJ0' of layer 'wave'"):
        export(classifier(Bessel(name="wave")), tmp_path, profile, IMAGES)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_conversion_is_silent(model, tmp_path, capfd):
    export(model, tmp_path, "npu", IMAGES)
    assert capfd.readouterr() == ("", "")


def test_models_that_cannot_be_used_are_refused(model, tmp_path):
    image, other = keras.Input((12, 12, 1), name="a"), keras.Input((12, 12, 1), name="b")
    words = keras.Input((None,))
    broken = keras.models.clone_model(model)
    broken.get_layer("last").set_weights([np.full((200, 4), np.nan), np.zeros(4)])
    both = layers.Dense(4)(layers.Flatten()(layers.Add()([image, other])))
    free = keras.Sequential([keras.Input((None, None, 1)), layers.GlobalAveragePooling2D(), layers.Dense(4)])
    cases = {
        "last/kernel.*not finite": broken,
        "of a fixed size": free,
        r"'input' of the model .* is \[batch, any\]; a file needs a fixed size": keras.Model(words, words),
        "keras.Model or the path": "a function".upper,
        "no file": tmp_path / "absent.keras",
    }
    for message, case in cases.items():
        with pytest.raises(InputError, match=message):
            export(case, tmp_path, "reference")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="'mediapipe' is for one image.*takes 'a' .*, 'b'"):
        export(keras.Model([image, other], both), tmp_path, "mediapipe")


def test_calibration_that_cannot_be_used_is_refused(model, tmp_path):
    bad = IMAGES.astype("float32")
    cases = {
        "received none": None,
        "received list": [1, 2],
        r"an array \(200, 12\)": IMAGES[..., 0, 0],
        r"an array \(200, 24, 6, 1\)": IMAGES.reshape(200, 24, 6, 1),
        "no image": IMAGES[:0],
        "received int64": IMAGES.astype("int64"),
        "NaN": np.where(bad == 7, np.nan, bad),
        "from -1 to 254": bad - 1,
        "from 0 to 510": bad * 2,
        r"the same image 3 time\(s\)": np.repeat(IMAGES[:1], 3, axis=0),
        r"the same image 1 time\(s\)": IMAGES[:1],
        "scaled already": bad / 255,
    }
    for message, images in cases.items():
        with pytest.raises(InputError, match=message):
            export(model, tmp_path, "npu", images)
    export(model, tmp_path, "reference", None)


def test_profiles_that_make_no_sense_are_refused(model, tmp_path):
    for change, message in (
        ({"quantization": "int3"}, "one of none, float16, dynamic, int8, int4"),
        ({"input_type": "int8"}, "input_type expects float32 or uint8 with quantization 'none'"),
        ({"quantization": "int8", "output_type": "int16"}, "output_type expects float32 or int8 or uint8"),
        ({"batch": 0}, "batch expects"),
        ({"output": "scores"}, "output expects None, 'logits' or 'probabilities'"),
        ({"channels": 4}, "channels expects"),
        ({"operators": "flex"}, "operators expects"),
        ({"c_array": True}, "c_array expects operators 'micro' and batch 1"),
        ({"mean": (float("nan"),)}, "mean expects numbers"),
        ({"std": (0.0,)}, "std expects numbers above 0"),
        ({"max_drop": 2.0}, "max_drop expects a share"),
        ({"min_agreement": -1.0}, "min_agreement expects a share"),
    ):
        with pytest.raises(InputError, match=message):
            export(model, tmp_path, dataclasses.replace(Profile("odd"), **change))
    with pytest.raises(InputError, match="Did you mean 'phone_cpu'"):
        export(model, tmp_path, "phone_cup")
