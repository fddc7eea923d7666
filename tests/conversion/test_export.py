"""Exports: every profile that ships, the same bytes twice, checks that fail a bad file, and one measure for all."""

import json
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest

from kdistill.conversion.export import export
from kdistill.conversion.float32 import prepare
from kdistill.conversion.verify import check, export_checked, with_limits
from kdistill.data.splits import Examples
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.networks import architectures
from kdistill.recipe import Data, Network, Profile, Training
from kdistill.recipe.loading import load_profile, names
from kdistill.tflite import metadata
from kdistill.tflite.interpreter import File
from kdistill.training import fit

pytestmark = pytest.mark.slow

DIGITS = tuple("0123456789")
QUANTIZED = {
    "none": 4.5,
    "float16": 2.9,
    "dynamic": 2.0,
    "int8": 2.0,
    "int4": 2.0,
}  # bytes per weight, small files' overhead in

INT4 = pytest.mark.skipif(
    not find_spec("litert_quantizer"), reason="litert-quantizer, an optional package, is not here"
)


@pytest.fixture(scope="module")
def student(digits):
    """The recipe's student, trained for a moment, so that its classes are apart."""
    keras.utils.set_random_seed(0)
    model = architectures.build(Network("small_cnn"), (28, 28, 1), 10)
    training = Training(epochs=12, batch_size=32, learning_rate=0.01)
    fit.fit(Supervised(model), digits, Data(), training, 0)
    return model


@pytest.mark.exhaustive("mediapipe", "microcontroller", "phone_cpu", "phone_gpu", "reference")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=INT4 if name == "int4" else ()) for name in names("exports")]
)
def test_every_profile_that_ships(name, student, digits, tmp_path):
    images, test = digits.train.images, digits.test
    target, prepared = with_limits(load_profile(name), max_drop=0.02, min_agreement=0.95), prepare(student)
    first, second = (
        export_checked(prepared, tmp_path / part, target, images, test, class_names=DIGITS) for part in ("one", "two")
    )
    contents = [Path(made["path"]).read_bytes() for made in (first, second)]
    assert contents[0] == contents[1]
    profile = first["check"]
    assert profile["agreement"] >= 0.95 and profile["images"] == len(test)
    assert not [op for op in first["operators"] if op.startswith("Flex") or op == "CUSTOM"]
    assert (tmp_path / "one/labels.txt").read_text().split() == list(DIGITS)
    described = json.loads((tmp_path / "one/model.json").read_text())
    assert described["sha256"] == first["sha256"] and described["class_names"] == list(DIGITS)
    assert (
        len(metadata.bare(contents[0]))
        < QUANTIZED[described["profile"]["quantization"]] * student.count_params() + 4000
    )
    assert described["input"]["name"] == "image" and described["output"]["name"] == (
        load_profile(name).output or "logits"
    )


def test_full_int8_holds_nothing_in_float_and_quantizes_its_input(student, digits, tmp_path):
    made = export(student, tmp_path / "s.tflite", "npu", digits.train.images)
    assert made["float_layers"] == [] and made["bytes"] < 24 * 1024
    assert made["input"]["type"] == made["output"]["type"] == "int8"
    # Raw pixels 0..255 fill the 256 steps of the input.
    assert made["input"]["scale"] == pytest.approx(1, abs=0.01) and made["input"]["zero_point"] == -128


def test_the_file_computes_what_the_model_computes(student, digits, tmp_path):
    made = export(student, tmp_path, "reference")
    images = digits.test.images[:70]
    np.testing.assert_allclose(File(made["path"]).predict(images, 32), predict(student, images), atol=1e-3)
    fixed = export(student, tmp_path / "b1.tflite", Profile("one", batch=1))
    assert fixed["input"]["shape"][0] == 1
    np.testing.assert_allclose(File(fixed["path"]).predict(images), predict(student, images), atol=1e-3)


@pytest.mark.exhaustive
def test_softmax_ended_and_mixed_precision_models(digits, tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        mixed = architectures.build(Network("small_cnn"), (28, 28, 1), 10)
    finally:
        keras.config.set_dtype_policy("float32")
    reference = load_profile("reference")
    made = export_checked(prepare(mixed), tmp_path / "mixed", reference, None, digits.test)
    assert made["precision"] == "bfloat16" and made["check"]["max_difference"] < 1e-3
    image = keras.Input((28, 28, 1))
    ended = keras.Model(image, keras.layers.Softmax()(prepare(mixed).model(image)))
    made = export_checked(prepare(ended), tmp_path / "ended", reference, None, digits.test)
    assert made["output"]["name"] == "probabilities"
    for model in (ended, made["path"]):
        a, b = evaluate(model, digits.test), evaluate(prepare(mixed).model, digits.test)
        assert a["accuracy"] == b["accuracy"] and a["ece"] == pytest.approx(b["ece"], abs=1e-5)


def test_keras_and_tflite_are_measured_by_the_same_code(student, digits, tmp_path):
    made = export(student, tmp_path, "reference")
    student.save(tmp_path / "student.keras")
    teacher = predict(student, digits.test.images)
    rows = [evaluate(m, digits.test, teacher) for m in (student, tmp_path / "student.keras", made["path"])]
    for row in rows:
        assert row["agreement"] == 1.0 and row["kl"] == pytest.approx(0, abs=1e-6) and row["microseconds"] > 0
        assert row["accuracy"] == np.mean(teacher.argmax(-1) == digits.test.labels)
    assert [row["parameters"] for row in rows] == [7170, 7170, None]
    assert [row["bytes"] is None for row in rows] == [True, False, False]


@pytest.mark.exhaustive
def test_a_file_that_disagrees_fails_and_is_not_kept(student, digits, tmp_path):
    keras.utils.set_random_seed(9)
    other = architectures.build(Network("small_cnn"), (28, 28, 1), 10)
    logits = predict(other, digits.test.images)
    made = export(student, tmp_path / "trial", "reference")
    with pytest.raises(CheckFailed, match="agrees with its model on"):
        check(made["path"], logits, digits.test, "reference", max_drop=1.0)
    with pytest.raises(CheckFailed, match="agrees"):
        target = with_limits(load_profile("reference"), max_drop=1.0)
        export_checked(prepare(student), tmp_path / "kept", target, None, digits.test, logits)
    assert not (tmp_path / "kept").exists() and [p.name for p in tmp_path.iterdir()] == ["trial"]
    with pytest.raises(CheckFailed, match="accuracy fell"):
        shuffled = Examples(digits.test.images, predict(other, digits.test.images).argmax(-1).astype("int32"))
        check(made["path"], logits, shuffled, "reference", min_agreement=0.0)
    Path(made["path"]).write_bytes(Path(made["path"]).read_bytes()[:2000])
    with pytest.raises(CheckFailed, match="cannot be used"):
        check(made["path"], logits, digits.test, "reference")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda x: None, "received none"),
        (lambda x: x[:0], "no image"),
        (lambda x: x[:, :20], "an array"),
        (lambda x: x / np.float32(255), "scaled already"),
        (lambda x: np.repeat(x[:1], 9, 0), "the same image 9 time"),
        (lambda x: np.where(x > 200, np.nan, x.astype("float32")), "NaN"),
        (lambda x: x.astype("float32") * 2, "pixels from 0 to 510"),
    ],
)
def test_calibration_images_that_calibrate_nothing(change, message, student, digits, tmp_path):
    with pytest.raises(InputError, match=message):
        export(student, tmp_path / "s.tflite", "npu", change(digits.train.images))
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_exported(student, digits, tmp_path):
    broken = keras.models.clone_model(student)
    broken.get_layer("conv2").kernel.assign(np.full(broken.get_layer("conv2").kernel.shape, np.nan))
    with pytest.raises(InputError, match="conv2.*not finite"):
        export(broken, tmp_path, "reference")
    image = keras.Input((8, 8, 1))
    flat = keras.layers.Flatten()(image)
    with pytest.raises(InputError, match="'mediapipe' is for one output of probabilities; .* gives output_0, output_1"):
        export(keras.Model(image, [flat, flat]), tmp_path, "mediapipe")
    with pytest.raises(InputError, match="'mediapipe' is for one image"):
        export(keras.Sequential([keras.Input((5,)), keras.layers.Dense(2)]), tmp_path, "mediapipe")
    plane = image[..., 0]
    unsupported = keras.Model(image, keras.layers.Flatten()(keras.ops.fft2((plane, plane))[0]))
    with pytest.raises(InputError, match="no builtin|cannot be converted"):
        export(unsupported, tmp_path / "out", "reference")
    with pytest.raises(InputError, match="class_names expects 10 names"):
        export(student, tmp_path, "reference", class_names=["a"])
    assert not list(tmp_path.rglob("*.tflite"))


def test_profiles_whose_values_do_nothing_are_refused(student, tmp_path):
    for profile, message in (
        (Profile("p", quantization="int3"), "quantization expects one of"),
        (Profile("p", input_type="int8"), "input_type expects float32"),
        (Profile("p", batch=0), "batch expects"),
        (Profile("p", min_agreement=2.0), "min_agreement expects a share"),
    ):
        with pytest.raises(InputError, match=message):
            export(student, tmp_path, profile)
