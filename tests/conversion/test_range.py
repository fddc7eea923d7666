"""`mean` and `std` of an export, and its warning about images in another range than the model expects."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from support.ranges import PIXELS, RANGES, brightness, convolution, fitted

import kdistill
from kdistill.conversion.export import export
from kdistill.conversion.graph import keeps_range, with_range
from kdistill.conversion.verify import check
from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.evaluation.evaluate import evaluate, predict, takes_raw_pixels
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.tflite import metadata

MODEL, IMAGES, LABELS = brightness(4, "unit")
WIDE = {"max_drop": 1.0, "min_agreement": 0.0}


@pytest.mark.exhaustive(
    but=(
        "npu",
        "mediapipe",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("profile", ["npu", "phone_cpu", "reference", "microcontroller", "mediapipe"])
def test_the_file_takes_raw_pixels_of_a_model_of_0_to_1(tmp_path, profile):
    report = export(MODEL, tmp_path, profile, IMAGES, examples=(IMAGES, LABELS), mean=0, std=255, check="raise")
    assert report["check"]["accuracy"] == report["check"]["model_accuracy"] == report["agreement"] == 1.0
    assert evaluate(report["path"], Examples(IMAGES, LABELS))["accuracy"] == 1.0
    assert metadata.of_file(report["path"])["inputs"][0]["description"] == metadata.RAW_PIXELS
    assert takes_raw_pixels(report["path"])
    with pytest.raises(InputError, match="takes raw pixels: its normalization is inside. Leave out mean and std"):
        evaluate(report["path"], Examples(IMAGES, LABELS), std=255)
    assert check(report["path"], MODEL, IMAGES, profile, std=255)["agreement"] == 1.0


@pytest.mark.slow
def test_numbers_for_each_channel_and_instead_of_those_of_the_profile(tmp_path):
    model = keras.Sequential([keras.Input((10, 10, 3)), layers.Flatten(), layers.Dense(4)])
    mean, std = (123.7, 116.3, 103.5), (58.4, 57.1, 57.4)
    other = Profile("other", mean=(1.0,), std=(2.0,), **WIDE)
    report = export(model, tmp_path, other, PIXELS, mean=mean, std=std)
    expected = model.predict((PIXELS - np.array(mean)) / np.array(std), verbose=0)
    np.testing.assert_allclose(predict(report["path"], PIXELS), expected, rtol=1e-3, atol=1e-3)
    document = metadata.of_file(report["path"])["document"]
    assert document["profile"]["mean"] == list(mean) and document["profile"]["std"] == list(std)
    own = export(model, tmp_path, other, PIXELS)
    np.testing.assert_allclose(
        predict(own["path"], PIXELS), model.predict((PIXELS - 1.0) / 2, verbose=0), rtol=1e-3, atol=1e-2
    )


@pytest.mark.slow
@pytest.mark.parametrize("own,scale", [("unit", 1 / 255), ("signed", 2 / 255)])
def test_a_file_in_the_range_of_the_model(tmp_path, own, scale):
    """mean=0, std=1: calibration and examples are as in the training, and so is what the file takes."""
    model, images, labels = brightness(4, own)
    images = {"unit": images / 255.0, "signed": images / 127.5 - 1}[own]
    images[0, 0, 0], images[1, 0, 0] = {"unit": (0, 1), "signed": (-1, 1)}[own]
    images = images.astype(np.float32)
    report = export(model, tmp_path, "npu", images, examples=(images, labels), mean=0, std=1)
    assert report["input"]["scale"] == pytest.approx(scale, rel=0.01) and report["check"]["accuracy"] == 1.0
    content = metadata.of_file(report["path"])
    assert content["inputs"][0]["description"] == content["document"]["input"]["values"] == metadata.OWN_RANGE
    assert not takes_raw_pixels(report["path"]) and report["operators"] == ["MEAN", "FULLY_CONNECTED"]
    assert evaluate(report["path"], Examples(images, labels))["accuracy"] == 1.0
    plain = export(model, tmp_path / "plain", "reference", images, mean=0, std=1)
    np.testing.assert_allclose(predict(plain["path"], images), model.predict(images, verbose=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"mean": 0, "std": 255}])
@pytest.mark.parametrize("range_", ["unit", "signed"])
def test_scaled_calibration_is_refused_with_both_ways_out(tmp_path, range_, options):
    low = {"unit": 0, "signed": -1}[range_]
    with pytest.raises(
        InputError, match=f"from {low} to 1, which are scaled already. Give raw pixels.*mean=0, std=255.*std=1"
    ):
        export(convolution(), tmp_path, "npu", RANGES[range_].astype(np.float32), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_images_in_another_range_give_a_warning(tmp_path):
    """Statistics of batch normalization, what the first layer receives, and accuracy where the examples have labels."""
    trained = fitted(convolution(), RANGES["unit"])
    with pytest.warns(
        UserWarning, match="'norm' of the model 'net' are .* but fit with pixels / 255.*Pass mean=0 and std=255"
    ):
        export(trained, tmp_path, "npu", PIXELS)
    with pytest.warns(UserWarning, match="of the model 'net' receives inputs from 31 to 223: they look unscaled"):
        export(MODEL, tmp_path, "reference", IMAGES)
    with pytest.warns(UserWarning, match="model 'net' is 25.0% on 120 images, but 100.0% with pixels / 255"):
        export(MODEL, tmp_path, "reference", examples=(IMAGES, LABELS))
    with pytest.warns(UserWarning, match="they look unscaled"):
        export(MODEL, tmp_path, "npu", IMAGES, check=None)
    scaling = keras.Sequential([keras.Input((4, 4, 1)), layers.Rescaling(1 / 255), MODEL], name="scaling")
    with pytest.warns(UserWarning, match="'scaling' scales them itself|100.0% with inputs"):
        export(scaling, tmp_path, "reference", examples=(IMAGES / 255.0, LABELS))


@pytest.mark.slow
def test_images_in_the_right_range_give_none(tmp_path):
    raw, images, labels = brightness(4, "raw")
    trained = fitted(convolution(), RANGES["unit"])
    scaling = keras.Sequential([keras.Input((4, 4, 1)), layers.Rescaling(1 / 255), MODEL], name="scaling")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        export(trained, tmp_path, Profile("wide", quantization="int8", batch=1, **WIDE), PIXELS, std=255)
        export(raw, tmp_path, "reference", examples=(images, labels))  # right although it looks unscaled
        export(raw, tmp_path, "reference", images, mean=0, std=1)  # the user says so
        export(scaling, tmp_path, "npu", images)
        export(MODEL, tmp_path, "reference")  # no images to look at


def test_profiles_with_a_range():
    npu = load_profile("npu")
    assert with_range(npu) is npu and not keeps_range(npu)
    assert with_range(npu, 127.5, 127.5).mean == (127.5,) and not keeps_range(with_range(npu, std=255))
    assert keeps_range(with_range(npu, 0, 1)) and keeps_range(with_range(npu, mean=0))
    with pytest.raises(InputError, match="std expects numbers above 0"):
        kdistill.export(MODEL, "nowhere", std=0)
    with pytest.raises(InputError, match="mean expects 1 or 1 numbers"):
        kdistill.export(MODEL, "nowhere", mean=(1, 2, 3))
