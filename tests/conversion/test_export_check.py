"""`kdistill.export` compares file and model: a file that disagrees with its model does not pass unseen in Python."""

import json

import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import corners, network

import kdistill
from kdistill.data.splits import Examples
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import Profile
from kdistill.tflite import metadata

pytestmark = pytest.mark.slow

IMAGES, TEST = corners(60, seed=1).images, corners(300, seed=7)


@pytest.fixture(scope="module")
def model():
    return network()


def wide_channels() -> keras.Model:
    """One activation reaches a thousand times as far as the others, which int8 then rounds to nothing."""
    model = network()
    norm = model.get_layer("norm")
    gamma, beta, mean, variance = norm.get_weights()
    factors = np.ones(len(gamma))
    factors[0] = 3000.0
    norm.set_weights([gamma * factors, beta * factors, mean, variance])
    dense = model.get_layer("last")
    kernel, bias = dense.get_weights()
    positions = np.arange(len(kernel)) % len(gamma) == 0
    dense.set_weights([np.where(positions[:, None], kernel / 3000.0, kernel), bias])
    return model


def one_large_weight() -> keras.Model:
    """A weight that never counts, because its input is 0, but leaves no steps for the others of its tensor."""
    model = network(filters=12)  # kernels below 1,024 numbers stay float
    image = keras.Input((12, 12, 1))
    features = keras.Model(model.input, model.get_layer("flat").output)(image)
    silent = layers.Lambda(lambda x: x[:, :1] * 0.0, name="silent")(features)
    kernel, bias = model.get_layer("last").get_weights()
    last = layers.Dense(4, name="last")
    outputs = last(layers.Concatenate()([features, silent]))
    last.set_weights([np.concatenate([kernel, [[3000.0, 0.0, 0.0, 0.0]]]), bias])
    return keras.Model(image, outputs)


def beyond_float16() -> keras.Model:
    """Weights above 65,504, the largest number of float16, after activations that are small."""
    model = network()
    norm, last = model.get_layer("norm"), model.get_layer("last")
    gamma, beta, mean, variance = norm.get_weights()
    norm.set_weights([gamma * 1e-6, beta * 1e-6, mean, variance])
    kernel, bias = last.get_weights()
    last.set_weights([kernel * 1e6, bias])
    return model


@pytest.mark.exhaustive("int8 activations", "int8 weights")
@pytest.mark.parametrize(
    "make,profile",
    [(wide_channels, "npu"), (one_large_weight, "phone_cpu"), (beyond_float16, "phone_gpu")],
    ids=["int8 activations", "int8 weights", "float16 weights"],
)
def test_a_file_that_disagrees_with_its_model_is_noticed(make, profile, tmp_path):
    model = make()
    assert np.mean(np.argmax(model.predict(TEST.images.astype("float32"), verbose=0), 1) == TEST.labels) > 0.9
    with pytest.warns(UserWarning, match=f"'{profile}'.*The file is written all the same. check='raise'"):
        report = kdistill.export(model, tmp_path / "file", profile, IMAGES)
    assert report["agreement"] is None or report["agreement"] < 0.9
    assert (tmp_path / "file" / "student.tflite").exists()
    if profile == "npu":  # what decides is above; this is the same for all
        with pytest.raises(CheckFailed, match=f"'{profile}'"):
            kdistill.export(model, tmp_path / "strict", profile, IMAGES, check="raise")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_agreement_and_drop_are_those_of_check(model, tmp_path):
    report = kdistill.export(model, tmp_path, "npu", IMAGES, examples=(TEST.images, TEST.labels))
    expected = kdistill.check(report["path"], model, TEST, "npu")
    assert report["check"] == expected and expected["images"] == 300
    assert (report["agreement"], report["drop"]) == (expected["agreement"], expected["drop"])
    # What was measured on examples of one's own is in the file.
    stored = metadata.of_file(report["path"])["document"]["provenance"]["metrics"]
    assert stored["agreement"] == report["agreement"] and stored["images"] == 300
    assert kdistill.export(model, tmp_path, "npu", IMAGES, examples=TEST)["check"] == expected


def test_without_labels_the_agreement_alone(model, tmp_path):
    # On the calibration images of int8, and on those that are given to other profiles.
    for profile in ("npu", "phone_cpu"):
        report = kdistill.export(model, tmp_path, profile, IMAGES)
        assert report["agreement"] >= 0.98 and report["drop"] is None and report["check"]["images"] == 60
        assert metadata.of_file(report["path"])["document"]["provenance"]["metrics"] is None
    report = kdistill.export(model, tmp_path, "npu", IMAGES, examples=TEST.images)
    assert report["drop"] is None and report["check"]["images"] == 300


def test_nothing_is_compared_without_images_or_with_none(model, tmp_path, monkeypatch):
    from kdistill.conversion import verify

    monkeypatch.setattr(verify, "predict_isolated", lambda *_: pytest.fail("compared"))
    for options in ({"profile": "reference"}, {"profile": "npu", "calibration": IMAGES, "check": None}):
        report = kdistill.export(model, tmp_path, **options)
        assert (report["agreement"], report["drop"], report["check"]) == (None, None, None)


def test_labels_count(model, tmp_path):
    """Labels that the model does not predict: the file loses nothing, because the model has nothing."""
    shifted = Examples(TEST.images, ((TEST.labels + 1) % 4).astype("int32"))
    report = kdistill.export(model, tmp_path, "npu", IMAGES, examples=shifted)
    assert report["check"]["model_accuracy"] < 0.1 and report["agreement"] > 0.98
    one_hot = (TEST.images, np.eye(4)[TEST.labels])
    assert kdistill.export(model, tmp_path, "npu", IMAGES, examples=one_hot)["check"]["accuracy"] > 0.9


def test_limits_of_a_profile_decide(tmp_path):
    model, loose = wide_channels(), Profile("loose", "int8", max_drop=1.0, min_agreement=0.0)
    report = kdistill.export(model, tmp_path, loose, IMAGES, check="raise", examples=TEST)
    assert report["agreement"] < 0.9 and report["drop"] > 0.1
    json.dumps(report)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"check": "error"}, "check expects 'raise', 'warn' or None, received 'error'"),
        ({"check": True}, "received True"),
        ({"check": "raise"}, "check='raise' needs images"),
        ({"check": None, "examples": TEST}, "examples does nothing with check=None"),
        ({"examples": TEST.images[0, ..., 0]}, "examples expects kdistill.Examples"),
        ({"examples": (TEST.images, TEST.labels[:7])}, "a label for each of 300 images"),
        ({"examples": TEST.images[:, :6]}, "expects images"),
        ({"calibration": [1, 2]}, r"calibration expects images: an array.*received list"),
    ],
)
def test_arguments_that_cannot_work_are_refused_and_nothing_is_written(model, options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        kdistill.export(model, tmp_path / "out", "reference", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_that_gives_nan_is_named(tmp_path):
    image = keras.Input((12, 12, 1))
    model = keras.Model(image, layers.Dense(4)(layers.Flatten()(keras.ops.log(image - 1.0))))
    with pytest.raises(InputError, match="Keras model gives NaN or infinite numbers for 300 of 300 images"):
        kdistill.export(model, tmp_path / "out", "reference", examples=TEST)
    assert not list(tmp_path.iterdir())
