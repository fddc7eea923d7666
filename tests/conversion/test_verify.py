"""The check of a file against its model, and that only a file which passes it is put in place."""

import json
from pathlib import Path

import numpy as np
import pytest
from keras import layers
from support.small_models import CLASSES, corners, network

import kdistill
from kdistill.conversion import verify
from kdistill.conversion.export import export
from kdistill.conversion.float32 import prepare
from kdistill.conversion.verify import check, export_checked
from kdistill.data.splits import Examples
from kdistill.errors import CheckFailed, FileRefused, InputError
from kdistill.evaluation.evaluate import predict
from kdistill.networks.heads import Head
from kdistill.networks.precision import dtype_policy
from kdistill.recipe.loading import load_profile
from kdistill.tflite import interpreter

pytestmark = pytest.mark.slow

EXAMPLES, TRAINING = corners(200, seed=7), corners(60, seed=1).images
NPU = load_profile("npu")


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    return export(model, tmp_path_factory.mktemp("file"), "reference")["path"]


@pytest.fixture
def answers(monkeypatch):
    """Puts other outputs in the place of the file's."""
    return lambda outputs: monkeypatch.setattr(verify, "predict_isolated", lambda *_: np.array(outputs, np.float32))


def eight(right: int) -> np.ndarray:
    """Logits of 8 rows of class 0, the last of which say class 1 instead."""
    return np.eye(4, dtype=np.float32)[[0] * right + [1] * (8 - right)]


ZEROS = Examples(np.zeros((8, 12, 12, 1), np.uint8), np.zeros(8, np.int32))


def test_the_numbers_by_hand(file, answers):
    answers(eight(6) * 2)
    found = check(file, eight(7) * 2, ZEROS, "npu", max_drop=0.5, min_agreement=0.5)
    expected = {"accuracy": 6 / 8, "model_accuracy": 7 / 8, "drop": 1 / 8, "agreement": 7 / 8, "max_difference": 2.0}
    assert found.pop("per_class") == [{"class": 0, "images": 8, "accuracy": 6 / 8, "model_accuracy": 7 / 8}]
    assert 0.5 < found.pop("p_drop") <= 1 and found.pop("p_agreement") == 1 - 0.5**8
    assert found.pop("resolution").startswith("8 images can show no loss of accuracy, and a")
    assert found == {
        **expected,
        **{"images": 8, "max_drop": 0.5, "min_agreement": 0.5, "lost": 1, "gained": 0, "same": 7, "note": None},
    }


def rows_of(images: int, *lost_gained: int) -> np.ndarray:
    """Logits of as many rows: class 1 on the first ones (`lost`), class 0, their label, on the others."""
    return np.eye(4, dtype=np.float32)[[1] * sum(lost_gained) + [0] * (images - sum(lost_gained))]


def zeros(images: int) -> Examples:
    return Examples(np.zeros((images, 12, 12, 1), np.uint8), np.zeros(images, np.int32))


def test_a_limit_that_is_exceeded_by_chance_is_noted_not_refused(file, answers):
    """Two sounds of 300 are no loss of 0.67 points; 100 images of 10,000 are one of 1 point."""
    answers(rows_of(300, 2))
    found = check(file, rows_of(300), zeros(300), "npu")
    assert (found["lost"], found["gained"], found["same"]) == (2, 0, 298) and found["drop"] > found["max_drop"]
    assert found["note"] == (
        "accuracy fell from 100.00% to 99.33% (2 images lost, 0 gained; limit: 0.2 points, p = 0.2). Chance allows "
        "this on 300 images."
    )
    assert found["resolution"] == (
        "300 images can show a loss of accuracy from 5 images (1.67 points) on, and a disagreement from 11 images "
        "(3.67 %) on; less can be chance."
    )
    answers(rows_of(10_000, 100))
    with pytest.raises(
        FileRefused, match=r"10,000 images: accuracy fell from 100.00% to 99.00% \(100 images lost, 0 g"
    ):
        check(file, rows_of(10_000), zeros(10_000), "npu")
    answers(rows_of(10_000, 20))
    assert check(file, rows_of(10_000), zeros(10_000), "npu")["note"] is None  # the limit itself is fine


def test_what_is_beyond_chance_is_refused(file, answers):
    answers(rows_of(300, 5))
    with pytest.raises(
        FileRefused, match=r"\(5 images lost, 0 gained; limit: 0.2 points, p = 0.0\d+\)\. Try"
    ) as refused:
        check(file, rows_of(300), zeros(300), "npu")
    assert refused.value.check["lost"] == 5 and "phone_cpu" in refused.value.advice and refused.value.size is None
    answers(rows_of(300, 4))
    assert "Chance allows" in check(file, rows_of(300), zeros(300), "npu")["note"]
    # The agreement alone: the model is wrong wherever they differ.
    answers(rows_of(300))
    assert check(file, rows_of(300, 10), zeros(300), "npu")["note"].startswith("it agrees with its model on 96.67%")
    with pytest.raises(FileRefused, match=r"300 images: it agrees with its model on 96.33% \(limit: 98.00%, p = 0.0"):
        check(file, rows_of(300, 11), zeros(300), "npu")
    with pytest.raises(FileRefused, match=r"accuracy fell .* limit: 0.2 points.*; it agrees .* \(limit: 98.00%"):
        answers(rows_of(300, 100))
        check(file, rows_of(300), zeros(300), "npu")
    answers(eight(8))
    assert check(file, eight(7), ZEROS, "npu", min_agreement=0.5)["drop"] == -1 / 8  # better than the model is fine


def test_without_labels_the_agreement_alone_is_measured(file, answers):
    answers(rows_of(300, 3))
    found = check(file, rows_of(300), zeros(300).images, "npu")
    assert [found[name] for name in ("accuracy", "drop", "lost", "p_drop", "per_class")] == [None] * 5
    assert found["agreement"] == 0.99 and found["images"] == 300
    labels = np.where(np.arange(300) < 150, -1, 0)  # half of them unlabeled: among these the three that are lost
    found = check(file, rows_of(300), (zeros(300).images, labels), "npu")
    assert (found["accuracy"], found["drop"], found["agreement"]) == (1.0, 0.0, 0.99)
    for labels in (np.zeros((300, 1), int), np.eye(4)[[0] * 300]):
        assert check(file, rows_of(300), (zeros(300).images, labels), "npu")["lost"] == 3


@pytest.mark.parametrize(
    "examples,message",
    [
        ("the test images", "examples expects kdistill.Examples.*received str"),
        (np.zeros((8, 144)), r"received ndarray \(8, 144\)"),
        (np.zeros((0, 12, 12, 1)), "1 image or more"),
        ((np.zeros((8, 12, 12, 1)), np.zeros(7)), r"a label for each of 8 images.*float64 \(7,\)"),
        ((np.zeros((8, 12, 12, 1)), np.array(["a"] * 8)), "whole numbers"),
        ((np.zeros((8, 12, 12, 1)), np.full(8, 4)), "labels go up to 4, but the model has 4 classes"),
    ],
)
def test_examples_that_cannot_be_used_are_refused(file, answers, examples, message):
    answers(eight(8))
    with pytest.raises(InputError, match=message):
        check(file, eight(8), examples, "npu")


def test_a_model_or_its_file_may_stand_for_its_logits(model, file, tmp_path):
    model.save(tmp_path / "model.keras")
    expected = check(file, predict(model, EXAMPLES.images), EXAMPLES, "reference")
    for student in (model, tmp_path / "model.keras"):
        assert kdistill.check(file, student, EXAMPLES, "reference") == expected


def test_the_file_itself_is_run(model, file):
    found = check(file, predict(model, EXAMPLES.images), EXAMPLES, "reference")
    assert (found["agreement"], found["drop"], found["images"]) == (1.0, 0.0, 200)
    assert found["max_difference"] < 1e-4 and found["accuracy"] > 0.9


def test_numbers_that_are_not_finite_fail(file, answers):
    answers([[0, 1, np.nan, 0]] * 8)
    with pytest.raises(CheckFailed, match="NaN or infinite"):
        check(file, eight(8), ZEROS, "npu")


def test_other_shapes_fail(file, answers):
    answers(np.zeros((8, 3)))
    with pytest.raises(CheckFailed, match=r"gives \(8, 3\), its model \(8, 4\)"):
        check(file, eight(8), ZEROS, "npu")
    with pytest.raises(InputError, match="model_logits expects a row for each of 8 test images .* received 5 rows"):
        check(file, eight(8)[:5], ZEROS, "npu")


@pytest.mark.parametrize(
    "code,message",
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import time; time.sleep(60)", "did not finish within 1 s"),
        ("raise MemoryError('too large')", "too large"),
    ],
)
def test_a_file_that_crashes_hangs_or_raises_fails(code, message, file, tmp_path, monkeypatch):
    package = tmp_path / "kdistill"
    (package / "tflite").mkdir(parents=True)
    for folder in (package, package / "tflite"):
        (folder / "__init__.py").touch()
    (package / "tflite" / "interpreter.py").write_text(code)
    monkeypatch.setattr(interpreter, "__file__", str(package / "tflite" / "interpreter.py"))
    with pytest.raises(CheckFailed, match=f"'npu' cannot be used.*{message}"):
        check(file, eight(8), ZEROS, "npu", seconds=1)


def test_a_file_that_passes_is_put_in_place_and_nothing_else_is_touched(model, tmp_path):
    folder = tmp_path / "phones" / "npu"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    (folder / "labels.txt").write_text("old")
    found = export_checked(prepare(model), folder, NPU, TRAINING, EXAMPLES, class_names=CLASSES)
    assert found["path"] == str(folder / "student.tflite")
    assert found["check"]["agreement"] >= 0.98
    names = ["labels.txt", "model.json", "notes.txt", "student.tflite"]
    assert sorted(path.name for path in folder.iterdir()) == names and list(folder.parent.iterdir()) == [folder]
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "labels.txt").read_text().splitlines() == list(CLASSES)
    assert json.loads((folder / "model.json").read_text())["sha256"] == found["sha256"]
    assert len(Path(found["path"]).read_bytes()) == found["bytes"]


def test_a_file_that_fails_leaves_everything_as_it_was(model, tmp_path):
    (tmp_path / "npu").mkdir()
    (tmp_path / "npu" / "student.tflite").write_text("the one that is good")
    other = -predict(model, EXAMPLES.images)
    with pytest.raises(CheckFailed, match="it agrees"):
        export_checked(prepare(model), tmp_path / "npu", NPU, TRAINING, EXAMPLES, other, CLASSES)
    with pytest.raises(InputError, match="calibration"):
        export_checked(prepare(model), tmp_path / "npu", NPU, None, EXAMPLES)
    assert [path.read_text() for path in tmp_path.rglob("*.*")] == ["the one that is good"]


def test_a_softmax_is_compared_with_the_probabilities_of_its_model(tmp_path):
    found = export_checked(prepare(network(softmax=True)), tmp_path / "npu", NPU, TRAINING, EXAMPLES)
    assert found["output"]["name"] == "probabilities" and found["check"]["max_difference"] < 0.05


def test_a_model_of_mixed_precision_is_compared_with_itself_in_float32(tmp_path):
    student = prepare(network(dtype="mixed_bfloat16"))
    found = export_checked(student, tmp_path / "r", load_profile("reference"), TRAINING, EXAMPLES)
    assert found["check"]["max_difference"] < 1e-4


class Counted(layers.Layer):
    """Counts how often it is created, in `created`."""

    created = 0

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        Counted.created += 1

    def call(self, inputs):
        return inputs


def test_a_student_is_rebuilt_once_for_all_profiles(tmp_path):
    with dtype_policy("mixed_bfloat16"):
        model = network(middle=[Counted(name="counted")])
    created = Counted.created
    student = prepare(model)
    for name in ("reference", "phone_cpu", "npu"):
        report = export_checked(student, tmp_path / name, load_profile(name), TRAINING, EXAMPLES)
        assert (report["precision"], report["weights_sha256"]) == ("bfloat16", student.weights_sha256)
    assert Counted.created == created + 1 and student.model is not model
    assert student.head == Head("classes", "logits", (4,)) and student.image_shape == (12, 12, 1)
    assert prepare(student.model).model is student.model  # float32 already: nothing is rebuilt


def test_limits_take_the_place_of_the_profiles():
    limited = verify.with_limits(NPU, max_drop=0.5)
    assert (limited.max_drop, limited.min_agreement) == (0.5, NPU.min_agreement)
    assert verify.with_limits(NPU) == NPU and verify.with_limits(NPU, min_agreement=0.0).min_agreement == 0.0
