"""The story of a run on real digits: folder, report, resume, refusals; and the command line around it."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.data import load
from kdistill.errors import InputError
from kdistill.recipe import Data
from kdistill.recipe.loading import load_recipe
from kdistill.recipe.values import as_dict
from kdistill.runs import arms
from kdistill.runs.folder import RunFolder
from kdistill.runs.run import run
from kdistill.training import fit

pytestmark = pytest.mark.slow

SMOKE = load_recipe("mnist", "smoke", ["train_limit=320"])
# Untrained-looking students are uncertain: int8 flips many of their classes. The files are checked elsewhere.
QUICK = dataclasses.replace(SMOKE, exports=("reference",))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "one"
    return folder, run(QUICK, folder, say=lambda text: None)


def test_the_run_folder_holds_what_the_design_says(finished):
    folder, result = finished
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {
        "recipe.json",
        "report.json",
        "report.md",
        "report.html",
        "teacher.keras",
        "control.keras",
        "student.keras",
    } <= names
    assert {"reference/student.tflite", "reference/labels.txt", "reference/model.json"} <= names
    assert any(name.startswith("logs/student/differences/events") for name in names)
    for arm in ("teacher", "control", "student"):
        assert any(name.startswith(f"logs/{arm}/train/events") for name in names)
        assert any(name.startswith(f"logs/{arm}/validation/events") for name in names)
    assert not [name for name in names if ".part" in name or "step-" in name]
    report = json.loads((folder / "report.json").read_text())
    assert report["models"] == result["models"]
    assert report["diagnostics"].keys() == {"teacher", "control", "student"}
    assert report["diagnostics"]["teacher"]["scaling"].keys() >= {"temperature", "before", "after"}
    assert len(report["training"]["student"]["history"]["val_accuracy"]) == 2  # epochs
    shown = report["differences"]["pictures"]
    assert shown and {each["file"] for each in shown} <= names
    assert (folder / "report.html").read_text().count("<img ") == len(shown)
    assert [row["name"] for row in report["models"]] == ["teacher", "control", "student", "reference"]
    assert report["data"]["source"].startswith("the sample of MNIST") and len(report["data"]["fingerprint"]) == 16
    assert {"python", "tensorflow", "keras"} <= set(report["versions"])
    assert json.loads((folder / "recipe.json").read_text())["seed"] == 0
    text = (folder / "report.md").read_text()
    for part in ("| teacher |", "| control |", "sample of MNIST", "Commit", "tensorflow", "one seed", "NLL"):
        assert part in text


def test_the_table_says_what_the_files_say(finished):
    folder, result = finished
    from kdistill.evaluation.evaluate import evaluate

    splits = load(QUICK.data)
    rows = {row["name"]: row for row in result["models"]}
    again = evaluate(folder / "student.keras", splits.test)
    assert again["accuracy"] == rows["student"]["accuracy"] and again["ece"] == rows["student"]["ece"]
    assert rows["student"]["parameters"] == keras.models.load_model(folder / "student.keras").count_params() <= 10_000
    assert rows["reference"]["bytes"] == (folder / "reference/student.tflite").stat().st_size
    assert rows["teacher"]["agreement"] == 1.0 and rows["teacher"]["kl"] == pytest.approx(0, abs=1e-9)


@pytest.mark.exhaustive
def test_control_and_student_differ_by_the_teacher_alone(finished, tmp_path):
    """With the weight at 0 the student is the control, to the last bit: same start, data, order and steps."""
    folder, _ = finished
    plain = dataclasses.replace(QUICK, distill=dataclasses.replace(QUICK.distill, distillation_weight=0.0))
    run(plain, tmp_path / "zero", say=lambda text: None)
    control = keras.models.load_model(folder / "control.keras")
    student = keras.models.load_model(tmp_path / "zero" / "student.keras")
    for a, b in zip(control.weights, student.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=2e-6)
    distilled = keras.models.load_model(folder / "student.keras")
    assert any(
        np.abs(a.numpy() - b.numpy()).max() > 1e-3 for a, b in zip(control.weights, distilled.weights, strict=True)
    )


def test_a_finished_run_resumes_to_the_same_report_without_training(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setattr(fit, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = run(QUICK, folder, resume=True, say=lambda text: None)
    without_time = [{k: v for k, v in row.items() if k != "microseconds"} for row in result["models"]]
    assert [{k: v for k, v in row.items() if k != "microseconds"} for row in again["models"]] == without_time


@pytest.mark.exhaustive
def test_a_refused_file_loses_its_place_and_not_the_run(finished, tmp_path):
    folder, copy = finished[0], tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "strict").mkdir()
    (copy / "strict" / "student.tflite").write_text("of an earlier session")
    profile = tmp_path / "strict.py"
    profile.write_text(
        "from kdistill.recipe import Profile\n"
        "def profile(): return Profile('strict', 'int8', 'int8', 'int8', batch=1, max_drop=0.0, min_agreement=1.0)\n"
    )
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from kdistill.recipe import Recipe, from_dict\n"
        f"def recipe(variant): return from_dict(Recipe, {as_dict(SMOKE)!r})\n"
    )
    words = ["run", str(recipe), "--out", str(copy), "--resume", "--force", "--set"]
    ended = CliRunner().invoke(app, [*words, f"exports={profile},reference"])
    assert ended.exit_code == 1 and "Traceback" not in ended.output, ended.output
    assert "1 file is refused and not written: strict." in ended.output.replace("\n", " ")
    report = json.loads((copy / "report.json").read_text())
    assert [row["name"] for row in report["refused"]] == ["strict"]
    check = report["refused"][0]["check"]
    assert check["agreement"] < 1.0 and "limit: 100.00%" in report["refused"][0]["reason"]
    assert report["refused"][0]["bytes"] > 5000 and "phone_cpu" in report["refused"][0]["advice"]
    assert [file["profile"] for file in report["files"]] == ["reference"]
    rows = {row["name"]: row for row in report["models"]}
    assert rows["strict"] == {"name": "strict", "refused": True, "accuracy": check["accuracy"]}
    assert (
        "resolution" in check
        and f"| strict (refused) | {100 * check['accuracy']:.2f} |" in (copy / "report.md").read_text()
    )
    assert "strict (refused)" in (copy / "report.html").read_text()
    assert not (copy / "strict").exists()
    # In Python the run returns its report.
    again = run(
        dataclasses.replace(SMOKE, exports=(str(profile),)), copy, resume=True, force=True, say=lambda text: None
    )
    assert [row["name"] for row in again["refused"]] == ["strict"] and again["files"] == []


def test_refusals(finished, tmp_path):
    folder, _ = finished
    with pytest.raises(InputError, match="holds another run"):
        run(QUICK, folder, say=lambda text: None)
    with pytest.raises(InputError, match=r"no recipe\.json"):
        run(QUICK, tmp_path, resume=True, say=lambda text: None)
    changed = dataclasses.replace(QUICK, seed=5)
    with pytest.raises(InputError, match="seed: 0 -> 5.*--force"):
        run(changed, folder, resume=True, say=lambda text: None)
    other_data = dataclasses.replace(QUICK, data=Data(train_limit=300, shift=2))
    with pytest.raises(InputError, match="data.train_limit: 320 -> 300; data_fingerprint"):
        run(other_data, folder, resume=True, say=lambda text: None)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="expects a folder"):
        RunFolder(tmp_path / "file")
    holder = RunFolder(tmp_path / "locked")
    holder.settle(QUICK, "0", False, print)
    with pytest.raises(InputError, match="in use by another run"):
        RunFolder(tmp_path / "locked", resume=True)
    holder.close()
    RunFolder(tmp_path / "locked", resume=True).close()


def test_bad_data_leaves_nothing_behind(tmp_path):
    with pytest.raises(InputError, match="lacks train-images"):
        run(QUICK, tmp_path / "out", data_dir=tmp_path, say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_read_only_folder(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o500)
    if os.access(place, os.W_OK):  # root may write anywhere; the kernel's own read-only folder stands in
        place = "/proc/kdistill"
    with pytest.raises(InputError, match="Cannot write to the run folder"):
        run(QUICK, place, say=lambda text: None)


@pytest.mark.exhaustive
def test_a_run_killed_at_any_moment_resumes_to_the_same_student(finished, tmp_path):
    """`kill -9` from outside, twice, while it trains; then `--resume`."""
    folder, _ = finished
    out = tmp_path / "killed"
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from kdistill.recipe import Recipe, from_dict\n"
        f"def recipe(variant): return from_dict(Recipe, {as_dict(QUICK)!r})\n"
    )
    command = [sys.executable, "-m", "kdistill.cli", "run", str(recipe), "--out", str(out)]
    for marks in (["logs/teacher"], ["teacher.keras", "logs/control"]):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while not all((out / mark).exists() for mark in marks):
            assert time.time() < deadline and process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        command = [*command[:7], "--resume"] if "--resume" not in command else command
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for name in ("teacher", "control", "student"):
        first, second = (keras.models.load_model(place / f"{name}.keras") for place in (folder, out))
        for a, b in zip(first.weights, second.weights, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)


@pytest.mark.exhaustive
def test_a_run_in_bfloat16_ends_in_float32_files(tmp_path):
    recipe = dataclasses.replace(SMOKE, precision="mixed_bfloat16")
    profile = tmp_path / "loose.py"
    profile.write_text(
        "from kdistill.recipe import Profile\ndef profile(): return Profile('loose', min_agreement=0.95)\n"
    )
    folder = tmp_path / "run"
    result = run(dataclasses.replace(recipe, exports=(str(profile),)), folder, say=lambda text: None)
    student = keras.models.load_model(folder / "student.keras")
    assert student.get_layer("conv1").compute_dtype == "bfloat16" and student.weights[0].dtype == "float32"
    assert keras.config.dtype_policy().name == "float32"  # as it was before
    file = result["files"][0]
    assert file["precision"] == "bfloat16" and file["input"]["type"] == file["output"]["type"] == "float32"
    # The file is the student's weights in float32: the same network, built by hand, gives what the file gives.
    from kdistill.evaluation.evaluate import predict
    from kdistill.networks import architectures

    plain = architectures.build(recipe.student, (28, 28, 1), 10)
    plain.set_weights(student.get_weights())
    images = load(recipe.data).test.images[:64]
    np.testing.assert_allclose(predict(folder / file["path"], images), predict(plain, images), rtol=1e-4, atol=1e-4)
    assert result["training"]["student"]["steps"] == 20 and np.isfinite(result["training"]["student"]["kd"])


@pytest.mark.slow
def test_a_teacher_is_trained_in_its_own_precision(tmp_path):
    """Teacher and assistant in bfloat16, control and student in float32, and the control as in any other run."""
    recipe = load_recipe("mnist", "smoke", ["train_limit=64", "teacher_training.epochs=1", "training.epochs=1"])
    splits, controls, said = load(recipe.data), [], []
    for precision, folder in ((None, "plain"), ("mixed_bfloat16", "own")):
        given = dataclasses.replace(recipe, teacher_precision=precision, assistants=(recipe.student,))
        with RunFolder(tmp_path / folder) as run_folder:
            made = arms.Arms(given, splits, run_folder, said.append)
            made.fit_teacher()
            controls.append(made.fit_control(0))
            made.fit_student(0, "off")
        computed = {name: {layer.compute_dtype for layer in model.layers} for name, model in made.models.items()}
        narrow = "bfloat16" if precision else "float32"
        assert computed["teacher"] == computed["assistant_0"] == {narrow}
        assert computed["control"] == computed["student"] == {"float32"}
    assert "The teacher runs in mixed_bfloat16, its own precision" in "".join(said) and "Omit" not in "".join(said)
    assert arms.training_precision(dataclasses.replace(recipe, teacher_precision="litert")) == "float32"
    for one, two in zip(*(control.get_weights() for control in controls), strict=True):
        np.testing.assert_array_equal(one, two)


def test_a_run_that_was_killed_at_its_very_start_starts_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/.part-recipe.json").write_text("{")
    RunFolder(tmp_path / "run").close()
    (tmp_path / "run/recipe.json").write_text("{}")
    (tmp_path / "run/.part-npu-1").mkdir()
    (tmp_path / "run/.part-student.keras").write_text("half")
    RunFolder(tmp_path / "run", resume=True).close()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "recipe.json"}


def test_a_full_disk_is_one_message_and_status_2(tmp_path, monkeypatch):
    def full(model, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(keras.Model, "save", full)
    words = ["run", "mnist", "--variant", "smoke", "--set", "train_limit=64", "--out", str(tmp_path / "run")]
    ended = CliRunner().invoke(app, words)
    assert ended.exit_code == 2 and "No space left on device. Free some space" in ended.output
    assert "Traceback" not in ended.output and not list((tmp_path / "run").glob("*.keras"))
    assert len(list((tmp_path / "run/checkpoints/teacher").glob("step-*"))) == 2  # to go on from
