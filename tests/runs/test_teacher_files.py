"""Runs with teachers from files: the same students from every format, from one cache; what fails goes on later."""

import dataclasses
import json
import zipfile

import numpy as np
import pytest
from support import teacher_files
from support.teacher_files import teacher_model
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.errors import InputError
from kdistill.formats import process
from kdistill.recipe import Data, Network, Recipe, Training
from kdistill.runs.run import run
from kdistill.runs.sweep import sweep
from kdistill.teachers import replay
from kdistill.teachers.foreign import store_teacher

pytestmark = pytest.mark.slow

TRAINING = Training(epochs=2, batch_size=32, learning_rate=3e-3)
STUDENT = Network("small_cnn", {"widths": (4, 6)})


def recipe(file, data: Data | None = None, **settings) -> Recipe:
    teacher = Network("teacher", file=str(file), **settings)
    return Recipe("corners", teacher, STUDENT, data or Data("npz"), training=TRAINING, exports=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers")
    model = teacher_model()
    model.save(path / "model.keras")
    teacher_files.save_savedmodel(model, path / "saved")
    teacher_files.save_script(model, path / "script.py")
    teacher_files.save_numpy_script(model, path / "plain.py")
    teacher_files.save_onnx(model, path / "model.onnx")
    teacher_files.save_data(path)
    yield path
    process.close_all()


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The folder of a run with a Python file in NumPy, its report and what it said."""
    out, said = tmp_path_factory.mktemp("plain") / "run", []
    report = run(recipe(folder / "plain.py"), out, **options_of(folder, out.parent), say=said.append)
    return out, report, said


def options_of(folder, cache) -> dict:
    return {"data_dir": folder / "corners.npz", "cache": cache / "cache"}


def weights_of(run_folder) -> bytes:
    with zipfile.ZipFile(run_folder / "student.keras") as archive:
        return archive.read("model.weights.h5")


@pytest.mark.exhaustive
def test_every_format_teaches_the_same_student(folder, tmp_path):
    """Bit by bit, with augmentation, through the cache. The report names teacher, format and fingerprint."""
    weights, said = {}, {}
    data = Data("npz", shift=1)
    for name, kind in (("model.keras", "Keras"), ("saved", "SavedModel"), ("script.py", "Python file")):
        out, said[name] = tmp_path / name, []
        cache = tmp_path / "cache"
        report = run(
            recipe(folder / name, data), out, data_dir=folder / "corners.npz", cache=cache, say=said[name].append
        )
        weights[name] = weights_of(out)
        (teacher,) = report["teachers"]
        assert (teacher["format"], teacher["file"]) == (kind, str(folder / name)) and len(teacher["fingerprint"]) == 16
        for page in ("report.md", "report.html"):
            assert teacher["fingerprint"] in (out / page).read_text()
        assert any(f"{kind}, '{folder / name}', fingerprint {teacher['fingerprint']}" in text for text in said[name])
    assert weights["saved"] == weights["model.keras"] == weights["script.py"]
    times = [text for text in said["script.py"] if text.startswith("The outputs of the teacher are stored for 2 views")]
    assert len(times) == 1 and " ms an image, about " in times[0]
    assert "loading the teacher" in (tmp_path / "script.py" / "logs" / "teacher.log").read_text()


COUNTING = """
{script}
import os
own = predict
def predict(images):
    with open({log!r}, "a") as file:
        print(len(images), file=file)
    if os.path.exists({flag!r}) and sum(1 for line in open({log!r})) > {most}:
        os._exit(9)
    return own(images)
"""


@pytest.mark.exhaustive
def test_what_fails_goes_on_and_is_paid_once(folder, plain, tmp_path, monkeypatch):
    """The teacher dies while the cache is filled: one message. A resumed run computes the rest; a sweep reads it."""
    monkeypatch.setattr(replay, "PART_BYTES", 1)  # a part for each batch
    monkeypatch.setattr(replay, "EVALUATION_BATCH", 64)
    script, log, flag = folder / "counting.py", tmp_path / "calls", tmp_path / "flag"
    values = {"script": (folder / "plain.py").read_text(), "log": str(log), "flag": str(flag), "most": 8}
    script.write_text(COUNTING.format(**values))
    flag.touch()
    options = {**options_of(folder, tmp_path), "say": lambda text: None}
    with pytest.raises(InputError, match="'counting' ended with exit status 9, again after a restart") as error:
        run(recipe(script), tmp_path / "run", **options)
    assert "teacher.log'" in str(error.value)
    parts = set((tmp_path / "cache").rglob("*.npy"))
    assert parts
    flag.unlink()
    run(recipe(script), tmp_path / "run", resume=True, **options)
    whole = set((tmp_path / "cache").rglob("*.npy"))
    assert parts < whole
    assert weights_of(tmp_path / "run") == weights_of(plain[0])
    calls = len(log.read_text().split())
    assert len(sweep(recipe(script), ["temperature=2,4"], tmp_path / "sweep", **options)["students"]) == 3
    assert set((tmp_path / "cache").rglob("*.npy")) == whole
    asked = sum(map(int, log.read_text().split()[calls:]))
    assert asked < 3 * 80 + 216  # the test images, some validation images to look at, and no training images
    script.write_text(script.read_text() + "# another teacher\n")
    with pytest.raises(InputError, match="started with another recipe or other data: teacher_fingerprints"):
        run(recipe(script), tmp_path / "run", resume=True, **options)


@pytest.mark.exhaustive
def test_the_command_line_names_the_teacher(folder, tmp_path):
    """Each time: what a run folder names is not run again by itself."""
    own = tmp_path / "corners.py"
    own.write_text(
        '"""Corners."""\nfrom kdistill.recipe import *\n\n\ndef recipe(variant="default"):\n'
        "    training = Training(epochs=1, batch_size=32)\n"
        '    net = Network("small_cnn", {"widths": (4, 6)}, weights=("absent.npz",))\n'
        '    return Recipe("corners", net, Network("small_cnn", {"widths": (4, 6)}), Data("npz"), '
        "training=training, exports=())\n"
    )
    common = ["run", str(own), "--data-dir", str(folder / "corners.npz"), "--cache", str(tmp_path / "cache")]
    out = tmp_path / "run"
    teacher = ["--teacher", str(folder / "model.onnx"), "--teacher-mean", "127.5", "--teacher-std", "127.5"]
    result = CliRunner().invoke(app, [*common, *teacher, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    values = json.loads((out / "recipe.json").read_text())["teacher"]
    assert values["mean"] == [127.5] and values["file"].endswith("model.onnx") and "classes" not in values
    again = [*common, "--out", str(out), "--resume"]
    result = CliRunner().invoke(app, [*again, "--set", "teacher.weights="])
    assert result.exit_code == 2 and "teacher.file: " in result.output and "model.onnx" in result.output
    result = CliRunner().invoke(app, [*again, *teacher, "--json"])
    assert result.exit_code == 0, result.output
    for options, message in (
        (["--teacher", str(folder / "absent.py")], "There is no file"),
        (["--teacher-mean", "3"], "'teacher.mean' expects none without teacher.file"),
        ([*teacher, "--teacher-classes", "1,1"], "'teacher.classes' expects two or more different numbers"),
        ([*teacher, "--teacher-size", "12"], "'teacher.size' expects height and width"),
        ([*teacher, "--teacher-layout", "NHWC"], "'teacher.layout' expects channels_last or channels_first"),
        ([*teacher, "--set", "teacher_precision=mixed_bfloat16"], "teacher_precision=mixed_bfloat16 works with Keras"),
    ):
        result = CliRunner().invoke(app, [*common, *options, "--out", str(tmp_path / "refused")])
        assert result.exit_code == 2 and message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "refused").exists()


@pytest.mark.exhaustive
def test_stored_outputs_teach_without_augmentation(folder, plain, tmp_path):
    with np.load(folder / "corners.npz") as data:
        images = np.concatenate([data["x_train"], data["x_test"]])
    path = store_teacher(str(folder / "plain.py"), images, tmp_path)
    options = {**options_of(folder, tmp_path), "say": lambda text: None}
    run(recipe(path), tmp_path / "stored", **options)
    assert weights_of(tmp_path / "stored") == weights_of(plain[0])
    with pytest.raises(InputError, match="holds outputs for unchanged images, but data.shift, data.mixup changes them"):
        run(recipe(path, Data("npz", shift=1, mixup=0.2)), tmp_path / "refused", **options)


@pytest.mark.exhaustive
def test_several_teachers_without_a_cache(folder, tmp_path):
    more = Network("more", file=str(folder / "model.onnx"), mean=(127.5,), std=(127.5,))
    blend = dataclasses.replace(recipe(folder / "plain.py"), more_teachers=(more,))
    options = {**options_of(folder, tmp_path), "cache": "off", "say": lambda text: None}
    report = run(blend, tmp_path / "run", **options)
    assert [row["format"] for row in report["teachers"]] == ["Python file", "ONNX"]
    rows = {row["name"]: row for row in report["models"]}
    assert rows["teacher"]["accuracy"] > 0.9
    assert rows["teacher_0"]["parameters"] is rows["teacher_0"]["microseconds"] is None
