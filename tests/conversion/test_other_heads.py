"""Outputs that are not exclusive classes: files say what they are, and what needs classes refuses them."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import kdistill
from kdistill.conversion.export import export
from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.evaluation.evaluate import evaluate, predict, predict_numbers
from kdistill.evaluation.metrics import measure
from kdistill.networks.saving import load_checked
from kdistill.recipe import Profile
from kdistill.tflite import metadata
from kdistill.tflite.interpreter import File

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (64, 8, 8, 3)).astype("uint8")
WEIGHTS = RNG.normal(size=(3, 3)).astype("float32") * 4
BIAS = np.float32([0.5, -1.0, -2.0])
LABELS = ["dog", "outdoors", "car"]


def model(*end, columns: int = 3) -> keras.Model:
    """The mean color of an image, a dense layer, and what comes after it."""
    dense = layers.Dense(columns, name="dense")
    x = image = keras.Input((8, 8, 3), name="image")
    for layer in (layers.Rescaling(1 / 127.5, -1.0), layers.GlobalAveragePooling2D(), dense, *end):
        x = layer(x)
    dense.set_weights([WEIGHTS[:, :columns], BIAS[:columns]])
    return keras.Model(image, x, name="tagger")


def by_hand(columns: int = 3, sigmoid: bool = True) -> np.ndarray:
    colors = (IMAGES.astype("float64") / 127.5 - 1).mean((1, 2))
    z = colors @ WEIGHTS[:, :columns] + BIAS[:columns]
    return 1 / (1 + np.exp(-z)) if sigmoid else z


MULTI_LABEL = {
    "activation": lambda: model(layers.Activation("sigmoid", name="tags")),
    "tf.nn.sigmoid": lambda: model(layers.Activation(tf.nn.sigmoid, name="tags")),
    "reshaped": lambda: model(layers.Activation("sigmoid"), layers.Reshape((3,), name="tags")),
}


@pytest.mark.exhaustive(
    but=(
        "tf.nn.sigmoid-phone_gpu",
        "activation-reference",
        "reshaped-mediapipe",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("profile", ["reference", "phone_gpu", "phone_cpu", "mediapipe"])
@pytest.mark.parametrize("name", MULTI_LABEL)
def test_a_file_of_sigmoids_gives_what_keras_gives(name, profile, tmp_path):
    found = export(MULTI_LABEL[name](), tmp_path, profile, class_names=LABELS)
    file = File(found["path"])
    np.testing.assert_allclose(
        file.predict(IMAGES), by_hand(), atol=0.02 if profile in ("phone_cpu", "mediapipe") else 2e-3
    )
    assert file.output["name"] == "labels" and file.sigmoid and not file.exclusive and not file.probabilities
    document = metadata.of_file(found["path"])["document"]
    assert document["outputs"][0]["values"].startswith("probabilities of labels that do not exclude each other")
    assert document["description"].startswith("A model of images")


@pytest.mark.slow
def test_int8_files_of_other_heads(tmp_path):
    for columns, end, sigmoid, name in (
        (3, "sigmoid", True, "labels"),
        (1, "sigmoid", True, "labels"),
        (1, None, False, "outputs"),
    ):
        found = export(model(layers.Activation(end), columns=columns), tmp_path / f"{columns}{end}", "npu", IMAGES)
        file = File(found["path"])
        expected = by_hand(columns, sigmoid)
        np.testing.assert_allclose(file.predict(IMAGES), expected, atol=0.05 * max(1.0, np.ptp(expected)))
        assert (file.output["name"], file.sigmoid, file.exclusive) == (name, sigmoid, False)


def test_a_profile_that_a_head_cannot_serve_is_refused(tmp_path):
    with pytest.raises(InputError, match="wants logits, but the model 'tagger' ends in a sigmoid"):
        export(MULTI_LABEL["activation"](), tmp_path, Profile("plain", output="logits"))
    with pytest.raises(
        InputError, match="^The output 'dense' of the model 'tagger', for the profile 'mediapipe' .*two outputs"
    ):
        export(model(columns=1), tmp_path, "mediapipe")
    gathered = model(layers.Softmax(), layers.Lambda(lambda p: p[:, :2], name="two"))
    with pytest.raises(InputError, match="'two' .* 'mediapipe' .* do not sum to 1.*Or name an output of exclusive"):
        export(gathered, tmp_path, "mediapipe")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("end", [tf.nn.softmax, keras.ops.softmax], ids=["tf.nn", "keras.ops"])
def test_no_second_softmax(end, tmp_path):
    """Wherever the softmax comes from, `mediapipe` adds none, and the output is called `probabilities`."""
    network = model(layers.Lambda(end), layers.Reshape((3,)))
    file = File(export(network, tmp_path, "mediapipe")["path"])
    powers = np.exp(by_hand(sigmoid=False))
    np.testing.assert_allclose(file.predict(IMAGES), powers / powers.sum(1, keepdims=True), atol=0.02)
    assert file.output["name"] == "probabilities" and file.exclusive
    np.testing.assert_allclose(predict(network, IMAGES), np.log(powers / powers.sum(1, keepdims=True)), atol=1e-5)


@pytest.mark.slow
def test_files_of_labels_are_measured_as_their_models(tmp_path):
    on = by_hand() > 0.5
    flipped = np.where(RNG.random(on.shape) < 0.2, ~on, on).astype(int)
    expected = evaluate(MULTI_LABEL["activation"](), Examples(IMAGES, flipped))
    assert expected["accuracy"] == pytest.approx((flipped == on).mean()) and 0.7 < expected["accuracy"] < 0.9
    for make in MULTI_LABEL.values():
        assert evaluate(make(), (IMAGES, flipped))["auc"] == pytest.approx(expected["auc"], abs=1e-6)
    with pytest.raises(InputError, match=r"The output 'tags' \(64, 3\) expects labels of its shape; received int64"):
        evaluate(MULTI_LABEL["activation"](), Examples(IMAGES, np.zeros(64, int)))
    with pytest.raises(
        InputError, match="The output 'dense' of the model 'tagger' gives one number .* State it: head="
    ):
        evaluate(model(columns=1), Examples(IMAGES, np.zeros(64, int)))
    with pytest.raises(InputError, match="with 2 classes or more"):
        measure(np.zeros((4, 1)), np.zeros(4, int))
    path = export(MULTI_LABEL["activation"](), tmp_path / "own", "reference")["path"]
    converter = tf.lite.TFLiteConverter.from_keras_model(MULTI_LABEL["activation"]())
    (tmp_path / "other.tflite").write_bytes(converter.convert())
    for file in (path, tmp_path / "other.tflite"):  # of a converter that names its outputs otherwise
        assert evaluate(file, (IMAGES, flipped))["f1"] == pytest.approx(expected["f1"])
        np.testing.assert_allclose(predict_numbers(file, IMAGES), by_hand(), atol=1e-5)
        np.testing.assert_allclose(predict(file, IMAGES), by_hand(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["prune", "qat", "int8"])
def test_compression_of_other_labels(scheme):
    """Pruning takes labels, and refuses other shapes before it trains; quantization needs exclusive classes."""
    data = (IMAGES, RNG.integers(0, 3, 64))
    other = "is not one of images with a class each.*kdistill.export"
    with pytest.raises(InputError, match="labels are 0 or 1 for each label" if scheme == "prune" else other):
        kdistill.compress(MULTI_LABEL["tf.nn.sigmoid"](), scheme, data=data)
    with pytest.raises(InputError, match="State it" if scheme == "prune" else other):  # one number for each example
        kdistill.compress(model(columns=1), scheme, data=data)
    if scheme != "int8":
        with pytest.raises(InputError, match="^The output 'tags' of the teacher 'tagger' ends in a sigmoid"):
            kdistill.compress(model(), scheme, MULTI_LABEL["activation"](), data)


def test_commands_refuse_a_file_of_sigmoids_before_they_read_more(tmp_path):
    MULTI_LABEL["activation"]().save(tmp_path / "tagger.keras")
    with pytest.raises(InputError, match="^The output 'tags' of the model 'tagger' ends in a sigmoid"):
        load_checked(tmp_path / "tagger.keras", (8, 8, 3), 3)
