"""The same measure for models and files."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_models import corners, network

import kdistill
from kdistill.conversion.export import export
from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.evaluate import evaluate, predict

EXAMPLES = corners(300, seed=7)


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model.save(folder / "model.keras")
    export(model, folder / "model.tflite", "reference")
    export(network(softmax=True), folder / "softmax.tflite", "npu", corners(100).images)
    return folder


@pytest.mark.slow
def test_a_model_its_file_and_its_tflite_have_the_same_numbers(model, files):
    teacher_logits = predict(network(filters=12), EXAMPLES.images)
    rows = [evaluate(each, EXAMPLES, teacher_logits) for each in (model, files / "model.keras", files / "model.tflite")]
    plain, keras_file, tflite = rows
    for key in ("accuracy", "top5", "ece", "agreement", "kl"):
        assert keras_file[key] == plain[key]
        assert tflite[key] == pytest.approx(plain[key], abs=1e-4)
    assert (plain["parameters"], keras_file["parameters"], tflite["parameters"]) == (908, 908, None)
    sizes = [(files / name).stat().st_size for name in ("model.keras", "model.tflite")]
    assert [row["bytes"] for row in rows] == [None, *sizes]
    assert all(row["microseconds"] > 0 for row in rows)
    assert plain["accuracy"] > 0.9


def test_without_a_teacher_nothing_is_said_of_one(model):
    cost = {"parameters", "bytes", "deflated", "microseconds"}
    assert evaluate(model, EXAMPLES).keys() == {"accuracy", "top5", "ece"} | cost


def test_predict_gives_the_models_own_logits_in_any_batch_size(model):
    expected = model(EXAMPLES.images.astype("float32")).numpy()
    for size in (7, 300, 1000):
        result = predict(model, EXAMPLES.images, size)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.slow
def test_models_that_end_in_a_softmax_are_measured_as_others(model, files):
    logits, ended = predict(model, EXAMPLES.images), network(softmax=True)
    centered = logits - logits.mean(axis=1, keepdims=True)
    result = predict(ended, EXAMPLES.images)
    np.testing.assert_allclose(result - result.mean(axis=1, keepdims=True), centered, atol=1e-3)
    plain = evaluate(model, EXAMPLES, logits)
    for each, tolerance in ((ended, 1e-5), (files / "softmax.tflite", 0.02)):
        measured = evaluate(each, EXAMPLES, logits)
        for key in ("accuracy", "agreement", "kl", "ece"):
            assert measured[key] == pytest.approx(plain[key], abs=tolerance)


@pytest.mark.slow
def test_examples_may_be_a_pair_with_labels_of_every_form(model, files):
    images, labels = EXAMPLES.images, np.where(np.arange(300) % 5, EXAMPLES.labels, (EXAMPLES.labels + 1) % 4)
    expected = evaluate(model, kdistill.Examples(images, labels))["accuracy"]
    assert 0.5 < expected < 0.9
    for form in (labels, labels[:, None], np.eye(4)[labels], labels.astype("float32"), labels.tolist()):
        assert evaluate(model, (images, form))["accuracy"] == expected
    assert evaluate(files / "model.tflite", [tf.constant(images), labels])["accuracy"] == pytest.approx(expected)
    batches = tf.data.Dataset.from_tensor_slices((images, labels))
    for dataset in (batches, batches.batch(64), batches.batch(100, drop_remainder=True)):
        assert evaluate(model, dataset)["accuracy"] == expected
    for wrong, message in (
        ((images, labels[:9]), "as many images as labels, received 300 and 9"),
        (images, r"Examples or a pair \(images, labels\), received ndarray"),
        ((images, labels + 0.5), "whole numbers from 0 to 3"),
        ((images, labels + 1), "whole numbers from 0 to 3.*from 1 to 4"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(model, wrong)


def test_of_a_distiller_its_student_is_measured(model):
    distiller = kdistill.Distiller(model, network(filters=12))
    found, expected = evaluate(distiller, EXAMPLES), evaluate(model, EXAMPLES)
    assert [found[key] for key in ("accuracy", "parameters")] == [expected[key] for key in ("accuracy", "parameters")]


def test_inputs_need_not_be_images():
    values, labels = np.random.default_rng(0).normal(size=(64, 8)).astype("float32"), np.arange(64) % 5
    small = keras.Sequential([keras.Input((8,)), keras.layers.Dense(5)])
    expected = np.mean(small(values).numpy().argmax(axis=1) == labels)
    assert evaluate(small, (values, labels))["accuracy"] == pytest.approx(expected)


def test_a_model_of_mixed_precision_gives_float32():
    result = predict(network(dtype="mixed_bfloat16"), EXAMPLES.images)
    assert result.dtype == np.float32 and np.isfinite(result).all()


def test_what_cannot_be_measured_is_refused(model, files, tmp_path):
    (tmp_path / "bad.keras").write_bytes(b"PK\3\4 nothing")
    (tmp_path / "cut.keras").write_bytes((files / "model.keras").read_bytes()[:-2000])
    (tmp_path / "cut.tflite").write_bytes((files / "model.tflite").read_bytes()[:-2000])
    for name in ("bad.keras", "cut.keras", "cut.tflite", "absent.keras", "absent.tflite", "model.h5"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            evaluate(tmp_path / name, EXAMPLES)
    with pytest.raises(InputError, match=r"received \(4, 9, 9, 1\)"):
        predict(model, np.zeros((4, 9, 9, 1), np.uint8))
    with pytest.raises(InputError, match="received none"):
        predict(model, EXAMPLES.images[:0])
    with pytest.raises(InputError, match="keras.Model or a"):
        predict(3, EXAMPLES.images)
    two = keras.Model(model.input, [model.output, model.output])
    assert list(predict(two, EXAMPLES.images)) == ["output_0", "output_1"]
    with pytest.raises(InputError, match="labels expects a dict with output_0, output_1, or a tuple in this order"):
        evaluate(two, EXAMPLES)


def test_a_keras_file_with_code_is_not_run(tmp_path):
    image = keras.Input((12, 12, 1))
    x = keras.layers.Lambda(lambda pixels: pixels + 1)(image)
    keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(x))).save(tmp_path / "code.keras")
    with pytest.raises(InputError, match=r"code\.keras"):
        evaluate(tmp_path / "code.keras", EXAMPLES)


def test_a_model_that_gives_nan_fails(model):
    broken = keras.models.clone_model(model)
    broken.set_weights([np.full_like(w, np.nan) for w in model.get_weights()])
    with pytest.raises(CheckFailed, match="300 of 300"):
        evaluate(broken, EXAMPLES)


def test_a_tflite_is_evaluated_without_tensorflow(files, tmp_path):
    np.savez(tmp_path / "examples.npz", images=EXAMPLES.images, labels=EXAMPLES.labels)
    code = (
        "import sys, numpy as np, kdistill\n"
        f"stored = np.load({str(tmp_path / 'examples.npz')!r})\n"
        "examples = kdistill.Examples(stored['images'], stored['labels'])\n"
        f"result = kdistill.evaluate({str(files / 'model.tflite')!r}, examples)\n"
        "print(result['accuracy'], sorted({name.partition('.')[0] for name in sys.modules} & {'tensorflow', 'keras'}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(kdistill.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    assert done.stdout == f"{evaluate(files / 'model.tflite', EXAMPLES)['accuracy']} []\n"
