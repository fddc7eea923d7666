"""Compression as a stage of a run and as a command: models and files with and without the teacher, kept and resumed."""

import dataclasses
import json
import zlib

import keras
import numpy as np
import pytest
from support.small_models import corners, network
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.compression.compress import Compressed, compress
from kdistill.conversion import verify
from kdistill.data.splits import Splits
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import SCHEMES, Data, Stage
from kdistill.recipe.checks import MOST_OF_REALS, check_recipe
from kdistill.recipe.loading import load_recipe
from kdistill.recipe.overrides import override
from kdistill.recipe.values import as_dict, from_dict
from kdistill.runs import compressions
from kdistill.runs.arms import Arms
from kdistill.runs.folder import RunFolder
from kdistill.runs.run import run
from kdistill.runs.teaching import Teaching
from kdistill.teachers.cache import list_caches
from kdistill.training.strategy import SINGLE_DEVICE

pytestmark = pytest.mark.slow

NAMES = ("north west", "north east", "south west", "south east")
STAGES = (Stage("prune", epochs=1, batch_size=32, final_sparsity=0.5), Stage("qat", epochs=1, batch_size=32))


@pytest.fixture(scope="module")
def splits():
    return Splits(corners(256, 3), corners(64, 4), corners(128, 5), NAMES, "corners", "0")


def arms_in(folder, splits, recipe):
    """A run that has trained its teacher and its student."""
    made = Arms(recipe, splits, folder, lambda text: None)
    made.models |= {"teacher": network(filters=12), "student": network()}
    return made


@pytest.fixture(scope="module")
def recipe():
    return dataclasses.replace(load_recipe("mnist", "smoke"), compress=STAGES, data=Data(shift=1))


@pytest.fixture(scope="module")
def done(splits, recipe, tmp_path_factory):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    arms = arms_in(folder, splits, recipe)
    records = compressions.run_stages(arms)
    yield arms, records
    folder.close()


@pytest.mark.exhaustive
def test_each_stage_with_and_without_the_teacher(done):
    arms, records = done
    assert list(records) == ["prune", "prune_labels", "qat", "qat_labels"]
    for name, record in records.items():
        path = arms.folder.path / record["file"]["path"]
        content = path.read_bytes()
        assert record["file"]["bytes"] == len(content) and record["file"]["deflated"] == len(zlib.compress(content, 9))
        assert record["file"]["check"]["accuracy"] > 0.9 and path.with_name("model.json").exists()
        assert record["teacher"] == ("labels" not in name) and record["file"]["name"] == name
        for layer in ("first", "last"):
            kernel = np.asarray(arms.models[name].get_layer(layer).kernel)
            assert np.mean(kernel == 0) == pytest.approx(0.5, abs=0.02), "qat goes on from the pruned student"
            assert record["file"]["kept"][layer]["sparsity"] >= 0.48
    history = records["qat_labels"]["history"]["qat"]
    assert history["loss"] == history["hard"] and history["kd"] == [0.0]
    assert records["qat"]["history"]["qat"]["kd"][0] > 0
    assert records["qat"]["notes"] == ["The student is already pruned: qat preserves that."]
    assert records["qat"]["file"]["bytes"] < records["prune"]["file"]["bytes"]
    assert (arms.folder.path / "logs/qat/qat/train").is_dir()
    json.dumps(records)


@pytest.mark.exhaustive
def test_stages_train_on_the_stored_outputs_of_the_teacher(done, splits, recipe, tmp_path):
    """The models are those of the running teacher, except for float16. A resumed stage keeps its choice."""
    said = []
    with RunFolder(tmp_path / "run") as folder:
        arms = arms_in(folder, splits, recipe)
        arms.say = said.append
        arms.teaching = Teaching(arms.models["teacher"], recipe, splits, folder, SINGLE_DEVICE, said.append)
        records = compressions.run_stages(arms, str(tmp_path / "cache"))
        chosen = json.loads((folder.checkpoints("prune") / "cache.json").read_text())
        assert chosen == str((tmp_path / "cache").resolve())
        assert folder.choice("prune", "cache", lambda: "another") == chosen
    rows = [row for row in list_caches(tmp_path / "cache") if row["split"] == "train"]
    assert [row["views"] for row in rows] == [1]  # one epoch, with augmentation; both stages share it
    assert sum("Teacher cache: used" in text for text in said) == 2
    running, labels = done[0].models["prune"], done[0].models["prune_labels"]
    for a, b, c in zip(*(m.get_weights() for m in (arms.models["prune"], running, labels)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)
        assert a.ndim < 2 or np.abs(a - b).max() < np.abs(a - c).max()
    assert records["qat"]["file"] and not records["qat"]["refused"]


@pytest.mark.exhaustive
def test_what_is_finished_is_not_done_again(done, recipe, splits, monkeypatch):
    arms, records = done
    monkeypatch.setattr(compressions, "compress", lambda *a, **k: pytest.fail("it is done already"))
    again = arms_in(arms.folder, splits, recipe)
    assert compressions.run_stages(again) == json.loads(json.dumps(records))
    for a, b in zip(again.models["qat"].get_weights(), arms.models["qat"].get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.exhaustive
def test_a_stage_that_fails_leaves_the_student_of_the_stage_before(splits, recipe, tmp_path, monkeypatch):
    monkeypatch.setitem(MOST_OF_REALS, "learning_rate", 1e30)
    broken = dataclasses.replace(recipe, compress=(STAGES[0], dataclasses.replace(STAGES[1], learning_rate=1e30)))
    folder = RunFolder(tmp_path / "run")
    records = compressions.run_stages(arms_in(folder, splits, broken))
    assert "Lower learning_rate" in records["qat"]["refused"]["reason"] and records["prune"]["file"]
    assert folder.finished("prune") and not folder.finished("qat") and not (folder.path / "qat").exists()
    kept = keras.models.load_model(folder.path / "prune.keras")
    assert np.mean(np.asarray(kept.get_layer("first").kernel) == 0) == pytest.approx(0.5, abs=0.02)
    folder.close()


def test_a_file_that_lost_what_was_done_is_not_written(splits, tmp_path):
    result = compress(network(), STAGES[0], None, splits, say=lambda text: None)
    whole = Compressed(network(), "prune", _kernels=result._kernels)
    with pytest.raises(CheckFailed, match="lost the compression of layer"):
        compressions.write_file(whole, tmp_path / "file", splits)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def other_outputs(monkeypatch):
    """Files give the opposite of what they compute."""
    original = verify.predict_isolated
    monkeypatch.setattr(verify, "predict_isolated", lambda *args: -original(*args))


@pytest.mark.exhaustive
def test_a_file_that_is_not_good_enough_does_not_end_the_run(splits, recipe, tmp_path, other_outputs):
    folder, lines = RunFolder(tmp_path / "run"), []
    arms = arms_in(folder, splits, dataclasses.replace(recipe, compress=STAGES[:1]))
    arms.say = lines.append
    records = compressions.run_stages(arms)
    folder.close()
    assert set(records) == {"prune", "prune_labels"} <= set(arms.models)
    for name, record in records.items():
        assert record["file"] is None and record["refused"]["name"] == f"{name}.tflite"
        assert "accuracy fell" in record["refused"]["reason"] and record["refused"]["check"]["accuracy"] < 0.5
        assert (folder.path / f"{name}.keras").exists() and not (folder.path / name).exists()
    assert sum(line.startswith("Refused: The file for 'reference'") for line in lines) == 2
    json.dumps(records)


def test_the_command_writes_everything_but_a_refused_file(files, tmp_path, other_outputs):
    out = tmp_path / "small"
    out.mkdir()
    (out / "student.tflite").write_text("of an earlier student")
    words = ("--scheme", "prune", "--data", "npz", "--data-dir", files / "data.npz", "--epochs", 1, "--out", out)
    ended = call(files / "student.keras", *words)
    assert ended.exit_code == 1 and "1 file is refused and not written: prune.tflite" in ended.output, ended.output
    assert "prune.tflite (refused)" in ended.output
    report = json.loads((out / "compression.json").read_text())
    assert report["file"] is None and "accuracy fell" in report["refused"]["reason"]
    assert {path.name for path in out.iterdir()} == {"student.keras", "compression.json", "steps"}


def test_stages_of_a_recipe_are_values(recipe):
    assert from_dict(type(recipe), as_dict(recipe)).compress == STAGES
    changed = override(recipe, ["compress.0.final_sparsity=0.7", "compress.1.epochs=3", "compress.1.skip=a,b"])
    assert changed.compress[0].final_sparsity == 0.7 and changed.compress[1].skip == ("a", "b")
    assert changed.compress[1].epochs == 3 and recipe.compress == STAGES
    for scheme in SCHEMES:
        assert [stage.scheme for stage in load_recipe("mnist", scheme).compress] == [scheme]


@pytest.mark.parametrize(
    "stage,message",
    [
        (Stage("pruned"), "Unknown scheme 'pruned'. Did you mean 'prune'.*Fix compress.0.scheme"),
        (Stage("prune", epochs=0), "'compress.0.epochs' expects 1 or more, received 0"),
        (Stage("prune", learning_rate=0.0), "'compress.0.learning_rate' expects a number above 0"),
        (Stage("prune", final_sparsity=80.0), "'compress.0.final_sparsity' expects a share between 0 and 1"),
        (
            Stage("qat", final_sparsity=0.5),
            "'compress.0.final_sparsity' expects none in the scheme 'qat', where it does",
        ),
        (Stage("cluster", clusters=2), "'compress.0.clusters' expects a number from 3 to 256"),
        (Stage("prune", layer_clusters={"a": 8}), "'compress.0.layer_clusters.a' expects none in the scheme 'prune'"),
    ],
)
def test_a_wrong_stage_is_one_clear_error(recipe, stage, message):
    with pytest.raises(InputError, match=message):
        check_recipe(dataclasses.replace(recipe, compress=(stage,)))


@pytest.mark.exhaustive
def test_a_run_ends_with_the_compressed_student(tmp_path):
    quick = dataclasses.replace(load_recipe("mnist", "smoke", ["train_limit=160"]), exports=("reference",))
    quick = dataclasses.replace(quick, compress=(Stage("prune", epochs=1, batch_size=32, learning_rate=1e-2),))
    result = run(quick, tmp_path / "run", say=lambda text: None)
    names = [row["name"] for row in result["models"]]
    assert names[:5] == ["teacher", "control", "student", "prune", "prune_labels"]
    assert names[5:] == ["reference", "prune.tflite", "prune_labels.tflite"]
    assert [file["profile"] for file in result["files"]] == ["reference"] * 3
    reference, pruned = (file["deflated"] for file in result["files"][:2])
    assert pruned < 0.6 * reference and result["files"][0]["bytes"] > reference
    assert "| conv1 | Conv2D | 200 | 80 |" in (tmp_path / "run/report.md").read_text()


def call(*words):
    return CliRunner().invoke(app, ["compress", *(str(word) for word in words)])


@pytest.fixture(scope="module")
def files(splits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    network().save(folder / "student.keras")
    network(filters=12).save(folder / "teacher.keras")
    arrays = {"x_train": splits.train.images, "y_train": splits.train.labels}
    np.savez(folder / "data.npz", **arrays, x_test=splits.test.images, y_test=splits.test.labels)
    return folder


@pytest.mark.exhaustive
def test_the_command(files, tmp_path):
    words = (files / "student.keras", "--scheme", "pqat", "--teacher", files / "teacher.keras", "--data", "npz")
    words += ("--data-dir", files / "data.npz", "--epochs", 1, "--batch-size", 32, "--layer-sparsity", "last=0.25")
    ended = call(*words, "--out", tmp_path / "small", "--sparsity", 0.5, "--json")
    assert ended.exit_code == 0, ended.output
    found = json.loads(ended.stdout)
    assert found == json.loads((tmp_path / "small/compression.json").read_text())
    assert [row["name"] for row in found["models"]] == ["before", "pqat", "pqat.tflite"]
    made = keras.models.load_model(tmp_path / "small/student.keras")
    shares = {name: np.mean(np.asarray(made.get_layer(name).kernel) == 0) for name in ("first", "last")}
    assert shares == pytest.approx({"first": 0.5, "last": 0.25}, abs=0.02)
    assert {path.name for path in (tmp_path / "small").iterdir()} == {
        *("student.keras", "student.tflite", "labels.txt", "model.json", "compression.json", "steps")
    }


@pytest.mark.parametrize(
    "words,message",
    [
        (("--scheme", "pqatt"), "Did you mean 'pqat'"),
        (("--scheme", "prune", "--weight", 0.5), "--weight does nothing without a teacher"),
        (("--scheme", "int8", "--teacher", "teacher.keras"), "--teacher does nothing"),
        (("--scheme", "prune", "--layer-sparsity", "last"), "--layer-sparsity expects LAYER=FLOAT, received 'last'"),
        (("--scheme", "prune", "--clusters", 8), "'stage.clusters' expects none in the scheme 'prune'"),
    ],
)
def test_a_wrong_command_is_one_clear_error(files, words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(files)
    data = ("--data", "npz", "--data-dir", files / "data.npz", "--out", tmp_path / "out")
    ended = call(files / "student.keras", *words, *data)
    assert ended.exit_code == 2 and message in ended.output, ended.output
    assert not (tmp_path / "out").exists()


def test_a_compression_that_fails_is_a_row_and_ends_no_run(splits, tmp_path, monkeypatch):
    monkeypatch.setitem(MOST_OF_REALS, "learning_rate", 1e38)
    overflowing = (Stage("prune", epochs=1, batch_size=32, learning_rate=1e38), Stage("qat", epochs=1, batch_size=32))
    recipe = dataclasses.replace(load_recipe("mnist", "smoke"), compress=overflowing, data=Data(shift=1))
    folder = RunFolder(tmp_path)
    arms = arms_in(folder, splits, recipe)
    records = compressions.run_stages(arms)
    folder.close()
    assert list(records) == ["prune", "prune_labels", "qat", "qat_labels"]
    assert "prune" not in arms.models and "The loss is nan" in records["prune"]["refused"]["reason"]
    assert "continues from 'prune', which failed" in records["qat"]["refused"]["reason"]
    assert all(record["file"] is None for record in records.values())
    assert not list(tmp_path.rglob("*.tflite")) and json.dumps(records)
