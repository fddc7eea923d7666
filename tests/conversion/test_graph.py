"""One graph from pixels to probabilities: normalization, colors, softmax, raw uint8 pixels, several outputs."""

import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import CLASSES, corners, network

from kdistill.conversion import graph
from kdistill.conversion.export import export
from kdistill.conversion.float32 import prepare
from kdistill.conversion.verify import export_checked
from kdistill.errors import InputError
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.tflite import metadata
from kdistill.tflite.interpreter import File

EXAMPLES = corners(100, seed=4)
IMAGES = EXAMPLES.images
AS_THEY_ARE = {"mean": (0.0,), "std": (1.0,)}  # of pixels


@pytest.fixture(scope="module")
def model():
    return network()


def softmax(logits):
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "dynamic"])
def test_raw_pixels_in_and_probabilities_out(model, quantization, tmp_path):
    found = export(model, tmp_path, Profile("camera", quantization, input_type="uint8", output="probabilities"))
    assert (found["input"]["type"], found["input"]["scale"]) == ("uint8", None)
    file = File(found["path"])
    assert file.probabilities
    np.testing.assert_allclose(file.predict(IMAGES), softmax(predict(model, IMAGES)), atol=1e-5)
    rows = [evaluate(each, EXAMPLES) for each in (found["path"], model)]
    assert rows[0]["accuracy"] == rows[1]["accuracy"] and rows[0]["ece"] == pytest.approx(rows[1]["ece"], abs=1e-4)


@pytest.mark.slow
def test_gray_models_get_color_and_metadata_for_mediapipe(model, tmp_path):
    found = export_checked(
        prepare(model), tmp_path / "out", load_profile("mediapipe"), None, EXAMPLES, class_names=CLASSES
    )
    assert found["input"]["shape"] == [1, 12, 12, 3] and found["check"]["agreement"] == 1.0
    color = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3)).astype(np.uint8)
    gray = color.astype(np.float32) @ np.float32([[0.299], [0.587], [0.114]])
    np.testing.assert_allclose(File(found["path"]).predict(color), softmax(predict(model, gray)), atol=1e-4)
    told = metadata.of_file(found["path"])
    assert told["inputs"][0] | {"description": ""} == {
        **{"name": "image", "description": "", "colors": "rgb"},
        **{"mean": [0.0], "std": [1.0]},
    }
    assert told["labels"] == list(CLASSES) and "three channels" in told["description"]
    figures = told["document"]["provenance"]["metrics"]
    assert figures["agreement"] == 1.0 and figures["images"] == 100


@pytest.mark.slow
def test_normalization_goes_into_the_graph(tmp_path):
    keras.utils.set_random_seed(1)
    image = keras.Input((6, 6, 3))
    model = keras.Model(image, layers.Dense(4, name="last")(layers.Flatten()(image)))
    pixels = np.random.default_rng(1).integers(0, 256, (40, 6, 6, 3)).astype(np.uint8)
    mean, std = (123.0, 117.0, 104.0), (58.0, 57.0, 57.5)
    profile = Profile("norm", "none", mean=mean, std=std)
    found = export(model, tmp_path, profile)
    expected = predict(model, (pixels - np.float32(mean)) / np.float32(std))
    np.testing.assert_allclose(File(found["path"]).predict(pixels), expected, atol=1e-4)
    np.testing.assert_allclose(predict(graph.with_normalization(model, profile), pixels), expected, atol=1e-4)
    one = Profile("one", "none", mean=(127.5,), std=(127.5,))
    np.testing.assert_allclose(
        predict(graph.with_normalization(model, one), pixels), predict(model, pixels / 127.5 - 1), atol=1e-4
    )
    with pytest.raises(InputError, match="mean expects 1 or 3 numbers.*received 2"):
        export(model, tmp_path, Profile("two", mean=(1.0, 2.0)))


@pytest.mark.exhaustive
def test_several_outputs_keep_their_names(tmp_path):
    keras.utils.set_random_seed(1)
    image = keras.Input((12, 12, 1))
    features = layers.GlobalAveragePooling2D()(layers.Conv2D(6, 3)(image))
    logits = layers.Dense(4)(features)
    model = keras.Model(image, {"features": features, "logits": logits})
    calibration = corners(60).images
    for profile in (Profile("plain", **AS_THEY_ARE), Profile("int8", "int8", "int8", "int8", batch=1, **AS_THEY_ARE)):
        report = export(model, tmp_path / profile.name, profile, calibration, class_names=CLASSES)
        assert {output["name"] for output in report["outputs"]} == {"features", "logits"}
        assert (report["output"]["name"], report["output"]["shape"][-1]) == ("logits", 4)
        file = File(report["path"])
        np.testing.assert_allclose(
            file.predict(IMAGES), predict(model, IMAGES), atol=1e-3 if profile.batch is None else 3
        )
        written = metadata.of_file(report["path"])
        assert {output["name"]: output["labels_file"] for output in written["outputs"]} == {
            "features": None,
            "logits": "labels.txt",
        }
    ended = export(model, tmp_path / "ended", Profile("ended", output="probabilities"))
    assert {output["name"] for output in ended["outputs"]} == {"features", "probabilities"}
    np.testing.assert_allclose(File(ended["path"]).predict(IMAGES), softmax(predict(model, IMAGES)), atol=1e-4)
    nameless = keras.Model(image, {"a": logits, "b": features})
    with pytest.raises(InputError, match="'ended' is for one output of probabilities; the model .* gives a, b"):
        export(nameless, tmp_path / "no", Profile("ended", output="probabilities"))
    both = export(nameless, tmp_path / "both", "reference")
    assert {output["name"] for output in both["outputs"]} == {"a", "b"}


def test_what_cannot_be_had_is_refused(model, tmp_path):
    with pytest.raises(InputError, match="wants logits, but the model 'small' ends in a softmax"):
        export(network(softmax=True), tmp_path, Profile("p", output="logits"))
    color = keras.Sequential([keras.Input((6, 6, 3)), layers.Flatten(), layers.Dense(2)])
    with pytest.raises(InputError, match="wants images of 1 channels; the model .* takes 3"):
        export(color, tmp_path, Profile("p", channels=1))
    assert list(tmp_path.iterdir()) == []
