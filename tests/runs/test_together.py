"""Seeds side by side: the models, the report and the logs of seeds one after the other; what goes on, and what not."""

import dataclasses
import json
import shutil

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.errors import InputError
from kdistill.recipe.loading import load_recipe
from kdistill.runs import together as runs_together
from kdistill.runs.run import run
from kdistill.training.side_by_side import SideBySide

pytestmark = pytest.mark.slow
TINY = load_recipe("mnist", "smoke", ["train_limit=96", "exports=reference", "training.epochs=2", "seeds=2"])
NAMES = ("control", "student", "control-1", "student-1")


def quiet(text: str) -> None:
    pass


def same_models(one, other, names=NAMES) -> None:
    for name in names:
        first, second = (keras.models.load_model(folder / f"{name}.keras") for folder in (one, other))
        for a, b in zip(first.weights, second.weights, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=f"{name} {a.path}")


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "in turn"
    return folder, run(TINY, folder, together=1, say=quiet)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory):
    folder, said = tmp_path_factory.mktemp("runs") / "at once", []
    return folder, run(TINY, folder, say=said.append), said


@pytest.mark.exhaustive
def test_a_run_side_by_side_is_the_run_one_after_the_other(in_turn, at_once):
    same_models(in_turn[0], at_once[0])
    one, other = in_turn[1], at_once[1]
    assert one["verdict"] == other["verdict"] and one["models"][0].keys() == other["models"][0].keys()
    assert [row["name"] for row in one["models"]] == [row["name"] for row in other["models"]]
    assert [row["accuracy"] for row in one["models"]] == [row["accuracy"] for row in other["models"]]
    assert list(one["training"]) == list(other["training"]) and one["warnings"] == other["warnings"]
    for name, record in one["training"].items():
        assert record["history"] == other["training"][name]["history"], name
    assert other["training"]["student-1"]["together"] == 4 and "together" not in one["training"]["student-1"]
    assert any("Training side by side: control, student, control-1, student-1" in text for text in at_once[2])
    for name in NAMES:
        files = [
            {path.parent.name for path in (folder / "logs" / name).rglob("events*")}
            for folder in (in_turn[0], at_once[0])
        ]
        assert files[0] == files[1] >= {"train", "validation"}
        assert not list((at_once[0] / "checkpoints").rglob("step-*"))


@pytest.mark.exhaustive
def test_a_finished_run_is_not_trained_again_and_takes_more_seeds(at_once, tmp_path, monkeypatch):
    shutil.copytree(at_once[0], tmp_path / "run")
    trained, fit_together = [], runs_together.fit_together
    monkeypatch.setattr(
        runs_together, "fit_together", lambda members, *rest: trained.append([*members]) or fit_together(members, *rest)
    )
    report = run(dataclasses.replace(TINY, seeds=3), tmp_path / "run", resume=True, say=quiet)
    assert trained == [["control-2", "student-2"]] and report["verdict"]["seeds"] == 3
    same_models(at_once[0], tmp_path / "run")


@pytest.mark.exhaustive
def test_an_interrupted_group_goes_on_whatever_the_options(in_turn, tmp_path, monkeypatch):
    train = SideBySide.train

    def until(group, iterator, count):
        if int(group.global_step.numpy()) == 3:
            raise KeyboardInterrupt
        train(group, iterator, count)

    monkeypatch.setattr(SideBySide, "train", until)
    with pytest.raises(KeyboardInterrupt):
        run(TINY, tmp_path / "run", together=3, say=quiet)
    monkeypatch.setattr(SideBySide, "train", train)
    folder = tmp_path / "run/checkpoints/together-control"
    assert json.loads((folder / "members.json").read_text()) == "control student control-1"
    said = []
    run(TINY, tmp_path / "run", resume=True, together=1, say=said.append)
    assert "Resuming at step 3 of 6" in said
    assert [text[:26] for text in said if text.startswith("Training")] == [
        "Training side by side: con",
        "Training student-1: 7,170 ",
    ]
    same_models(in_turn[0], tmp_path / "run")


@pytest.mark.exhaustive
def test_few_labels_and_looks(tmp_path):
    """The control has batches of its own; a seed that a look adds trains as a pair."""
    few = dataclasses.replace(TINY.data, labeled=40, train_limit=200)
    training = dataclasses.replace(TINY.training, epochs=1)
    recipe = dataclasses.replace(TINY, data=few, training=training, margin=1e-9)
    run(dataclasses.replace(recipe, seeds=1), tmp_path / "one", say=quiet)
    said = []
    report = run(dataclasses.replace(recipe, max_seeds=3), tmp_path / "other", say=said.append)
    same_models(tmp_path / "one", tmp_path / "other", NAMES[:2])
    pair = [text for text in said if "side by side: control-2, student-2;" in text]
    assert len(pair) == (report["verdict"]["seeds"] == 3)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--together", "0"], "--together expects a number from 1 to 10,000, or auto, received '0'"),
        (["--together", "all"], "received 'all'"),
        (["--together", "2", "--profile"], "--together 2: --profile records one model at a time"),
        (["--together", "2", "--strategy", "mirrored"], "--together 2: with --strategy, models train one by one"),
    ],
)
def test_what_the_command_refuses(words, message):
    ended = CliRunner().invoke(app, ["run", "mnist", *words])
    assert ended.exit_code == 2 and message in ended.output.replace("\n", " ")


def test_what_python_refuses(tmp_path):
    with pytest.raises(InputError, match="together expects a number of models from 1 on, or auto, received 0"):
        run(TINY, tmp_path / "run", together=0, say=quiet)
    assert not (tmp_path / "run").exists()
