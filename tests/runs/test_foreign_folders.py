"""Run folders from elsewhere: links in them, damaged records and replaced models harm no file of the user."""

import json
import os
import shutil
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.recipe import Network, Recipe
from kdistill.runs.folder import RunFolder
from kdistill.runs.teaching import Teaching
from kdistill.training import checkpoint
from kdistill.training.strategy import SINGLE_DEVICE

RECORD = {"seconds": 1.5, "steps": 3, "history": {"accuracy": [0.5, float("nan")]}}


@pytest.fixture
def model():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])


@pytest.fixture
def run(tmp_path, model):
    """A folder with a finished stage."""
    with RunFolder(tmp_path / "run") as folder:
        folder.settle(Recipe("a", Network("lenet"), Network("small_cnn")), "data", False, print)
        folder.finish("teacher", model, RECORD)
    return tmp_path / "run"


def resume(path):
    return RunFolder(path, resume=True)


@pytest.mark.parametrize(
    "name",
    [".lock", ".part-report.json", "report.json", "recipe.json", "logs", "checkpoints/student", "npu/student.tflite"],
)
def test_no_link_in_a_run_folder_is_followed(run, tmp_path, name):
    victim = tmp_path / "victim"
    victim.mkdir()
    for file in ("file", "step-000000001-0123456789abcdef.npz", "events.out.tfevents.1", ".part-a"):
        (victim / file).write_text("precious")
    path = run / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(victim if "." not in name else victim / "file")
    with pytest.raises(InputError, match="is a link"):
        resume(run)
    assert all(file.read_text() == "precious" for file in victim.iterdir()) and len(list(victim.iterdir())) == 4


def test_a_hard_link_in_the_place_of_the_lock_or_a_file_keeps_its_content(run, tmp_path, model):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("report.json", "student.keras"):
        os.link(victim, run / name)
    with resume(run) as folder:
        folder.finish("student", model, RECORD)
    assert victim.read_text() == "precious"
    (run / ".lock").unlink()
    os.link(victim, run / ".lock")
    with pytest.raises(InputError, match="is no lock file"):
        resume(run)
    assert victim.read_text() == "precious"


def test_pipes_in_a_run_folder_are_no_hang(run):
    os.mkfifo(run / "checkpoints" / "step-000000001-0123456789abcdef.npz")
    with pytest.raises(InputError, match="no plain file"):
        resume(run)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 9999,
        '{"seconds": NaN}',
        '{"seconds": 1, "sha256": 3}',
        '{"seconds": 1, "warning": 5}',
        "{",
        "null",
        '{"seconds": "1"}',
        '{"seconds": 1, "history": [1]}',
        '{"seconds": 1, "history": {"a": 1}}',
        '{"seconds": -1}',
        '{"seconds": 1, "scheme": "qat"}',
    ],
)
def test_a_damaged_record_is_one_message(run, content):
    (run / "checkpoints/teacher/finished.json").write_text(content)
    with resume(run) as folder, pytest.raises(InputError, match=r"finished.json' is damaged .*Delete"):
        folder.finished("teacher")


def test_the_file_of_a_compression_is_inside_of_the_folder(run):
    record = {"seconds": 1, "scheme": "qat", "notes": [], "layers": [], "teacher": True, "refused": None}
    record["file"] = {"path": "../../victim.tflite"}
    (run / "checkpoints/teacher/finished.json").write_text(json.dumps(record))
    with resume(run) as folder, pytest.raises(InputError, match="is no file inside of the folder"):
        folder.finished("teacher")


def test_a_replaced_model_is_refused_and_one_of_an_earlier_version_is_not(run, model):
    with resume(run) as folder:
        loaded, record = folder.finished("teacher")
        assert np.array_equal(loaded.get_weights()[0], model.get_weights()[0])
        assert record["steps"] == 3 and "sha256" not in record
        other = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3)])
        other.save(run / "teacher.keras")
        with pytest.raises(InputError, match=r"teacher.keras' is not the model with which the stage 'teacher' ended"):
            folder.finished("teacher")
        (run / "checkpoints/teacher/finished.json").write_text(json.dumps(RECORD))
        assert np.array_equal(folder.finished("teacher")[0].get_weights()[0], other.get_weights()[0])


@pytest.mark.parametrize(
    "content", ["[]", '"' + "x" * 30 + '"', '{"seeds": "3"}', '{"margin": []}', '{"seeds": 1e999}']
)
def test_a_damaged_recipe_is_one_message(run, content):
    (run / "recipe.json").write_text(content)
    recipe = Recipe("a", Network("lenet"), Network("small_cnn"))
    with resume(run) as folder, pytest.raises(InputError, match=r"recipe.json' is damaged"):
        folder.settle(recipe, "data", False, print)


def test_what_another_recipe_contains_is_shown_escaped(run):
    (run / "recipe.json").write_text(json.dumps({"name": "\x1b[2J" + "x" * 9999, "more": [1] * 999, "n": 10**999}))
    recipe = Recipe("a", Network("lenet"), Network("small_cnn"))
    with resume(run) as folder, pytest.raises(InputError) as error:
        folder.settle(recipe, "data", False, print)
    assert str(error.value).isprintable() and r"\x1b[2J" in str(error.value) and len(str(error.value)) < 6000


@pytest.mark.parametrize("content", ["3", "true", "{}", "[1]", '"' + "x" * 99999 + '"', '"/victim'])
def test_a_damaged_choice_is_one_message(run, content):
    (run / "checkpoints/student").mkdir()
    (run / "checkpoints/student/cache.json").write_text(content)
    with resume(run) as folder, pytest.raises(InputError, match="cache.json"):
        folder.choice("student", "cache", lambda: None)


def test_the_command_line_decides_where_the_cache_is(run, tmp_path, monkeypatch):
    """The run folder states that outputs are stored, and where they were: nothing is written there."""
    monkeypatch.setenv("KDISTILL_CACHE", str(tmp_path / "own"))
    (run / "checkpoints/student").mkdir()
    (run / "checkpoints/student/cache.json").write_text(json.dumps(str(tmp_path / "victim")))
    roots, said = [], []

    def replay(seed, root):
        roots.append(root)
        path = tmp_path / (root or "own")
        return SimpleNamespace(root=path, build=lambda *rest: None, views=lambda *rest: 1)

    with resume(run) as folder:
        teaching = object.__new__(Teaching)
        teaching.folder, teaching.say, teaching.devices = folder, said.append, SINGLE_DEVICE
        teaching.recipe = Recipe("a", Network("lenet"), Network("small_cnn"))
        teaching._replay = replay
        for cache in ("auto", "off", "mine"):
            teaching.replay("student", 0, cache)
    assert roots == [None, None, "mine"] and all("victim" in line and "give --cache" in line for line in said)


def test_a_checkpoint_with_other_arrays_is_one_message(tmp_path, model):
    import hashlib
    import io

    from kdistill.distillation.supervised import Supervised

    student = Supervised(model)
    student.compile("sgd")
    student.optimizer.build(student.trainable_variables)
    variables = {f"{i:04}": v.numpy() for i, v in enumerate(checkpoint.state_of(student))}
    about = json.dumps({"history": {}, "seconds": 1})
    for change, message in (
        ({"about": np.array("{}")}, "lacks history, seconds"),
        ({"about": np.array('{"history": [], "seconds": 1}')}, "'history' expects an object"),
        ({"about": np.array([about, about])}, "is damaged"),
        ({"0000": np.zeros(3, [("a", "f4")])}, "no plain array"),
        ({"0001": np.zeros((99, 2))}, "belongs to another model"),
        ({"more": np.zeros(2)}, "belongs to another model"),
    ):
        content = io.BytesIO()
        np.savez(content, **{**variables, "about": np.array(about), **change})
        digest = hashlib.sha256(content.getvalue()).hexdigest()[:16]
        (tmp_path / f"step-000000001-{digest}.npz").write_bytes(content.getvalue())
        with pytest.raises(InputError, match=message):
            checkpoint.restore(student, tmp_path)
        (tmp_path / f"step-000000001-{digest}.npz").unlink()


def test_another_number_of_threads_is_shown(run):
    recipe = Recipe("a", Network("lenet"), Network("small_cnn"))
    values = json.loads((run / "recipe.json").read_text())
    with resume(run) as folder:
        folder.settle(recipe, "data", False, print)
        (run / "recipe.json").write_text(json.dumps({**values, "threads": "64 and 64"}))
        with pytest.raises(InputError, match="threads: 64 and 64 -> "):
            folder.settle(recipe, "data", False, print)
        del values["threads"]
        (run / "recipe.json").write_text(json.dumps(values))  # of an earlier version
        folder.settle(recipe, "data", False, print)


def use(name, folder, model):
    """One of the ways in which a run uses its folder."""
    uses = {
        "finish": lambda: folder.finish("student", model, RECORD),
        "record": lambda: folder.finish_record("students-0", RECORD),
        "finished": lambda: folder.finished("teacher"),
        "choice": lambda: folder.choice("student", "cache", lambda: None),
        "the end": lambda: None,
        "an error that follows": lambda: (folder.path / "report.json").write_text("x"),
    }
    uses[name]()


@pytest.mark.parametrize("name", ["finish", "record", "finished", "choice", "the end", "an error that follows"])
@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_is_deleted_while_a_run_uses_it_is_one_message(run, model, name, again):
    if again and name == "an error that follows":
        return  # then it can be written
    with (
        pytest.raises(InputError, match="was deleted, or its file .lock, while the run used it"),
        resume(run) as folder,
    ):
        shutil.rmtree(run)
        if again:  # by another run, or the user
            run.mkdir()
            (run / ".lock").touch()
        use(name, folder, model)
    assert not run.exists() or (again and [path.name for path in run.iterdir()] == [".lock"])


def test_checkpoints_do_not_create_a_deleted_folder_again(run, model):
    student = Supervised(model)
    student.compile("adam", jit_compile=False)
    stage = run / "checkpoints" / "student"
    assert checkpoint.save(student, stage, {}, 1.0).is_file()
    shutil.rmtree(run)
    with pytest.raises(InputError, match="was deleted while the run used it"):
        checkpoint.save(student, stage, {}, 2.0)
    with pytest.raises(KeyboardInterrupt), RunFolder(run):
        shutil.rmtree(run)
        raise KeyboardInterrupt
