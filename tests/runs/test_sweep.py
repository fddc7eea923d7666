"""The story of a sweep on a few digits: table, pictures, TensorBoard, resume, and the command line around it."""

import dataclasses
import json
import xml.etree.ElementTree as ET

import keras
import numpy as np
import pytest
from support import browser
from support.outline import Outline
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.data import load
from kdistill.errors import InputError
from kdistill.evaluation import chance
from kdistill.evaluation.evaluate import predict
from kdistill.recipe import Network
from kdistill.recipe.loading import load_recipe
from kdistill.report.sweep import student_table
from kdistill.runs.sweep import sweep
from kdistill.training import side_by_side

pytestmark = pytest.mark.slow

TINY = dataclasses.replace(
    load_recipe("mnist", "smoke", ["train_limit=160"]),
    teacher=Network("lenet", {"filters": (4, 4), "units": 16}),
    student=Network("small_cnn", {"widths": (4, 4)}),
    seeds=2,
)
CHARTS = ("accuracy_by_setting", "first_steps", "hard_loss", "kd_loss")
GRID = ["distillation_weight=0,1", "temperature=1,4"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweeps") / "one"
    return folder, sweep(TINY, GRID, folder, say=lambda text: None)


def test_the_folder_holds_table_pictures_and_logs(finished):
    folder, result = finished
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {f"{name}.svg" for name in CHARTS}
    assert {"recipe.json", "sweep.json", "sweep.md", "sweep.html", "curves.json", "teacher.keras", *pictures} <= names
    assert {f"students/{seed}/distillation_weight=1,temperature=4.keras" for seed in (0, 1)} <= names
    assert not [name for name in names if ".part" in name or "step-" in name]
    saved = json.loads((folder / "sweep.json").read_text())
    assert saved == {key: value for key, value in result.items() if key != "folder"}
    assert json.loads((folder / "recipe.json").read_text())["grid"] == GRID
    text = (folder / "sweep.md").read_text()
    assert result["verdict"]["sentence"] in text and "4 students in 1 pass" not in text
    assert "8 students in 2 pass(es)" in text  # control and 3 others, for each of 2 seeds


def test_the_page_holds_verdict_table_and_pictures(finished):
    folder, result = finished
    page = Outline((folder / "sweep.html").read_text())
    assert result["verdict"]["word"] in page.text and result["best"] in page.text
    charts = [a["aria-label"] for a in page.all("svg") if a.get("class") == "chart"]
    assert len(charts) == 1 + len(CHARTS) and all(len(label) > 40 for label in charts)
    assert not page.all("img")
    for name in CHARTS:
        root = ET.parse(folder / f"{name}.svg").getroot()
        [chart] = [each for each in root if each.get("role") == "img"]
        assert chart.get("aria-label") in charts and "prefers-color-scheme" in root[0].text
    for row in student_table(result)[1]:
        assert all(cell in page.text for cell in row)


@pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING))
def test_the_page_in_chromium(finished):
    with browser.Browser() as window:
        assert window.faults(finished[0] / "sweep.html") == []


def test_the_table_has_a_row_for_each_setting(finished):
    _, result = finished
    rows = {row["name"]: row for row in result["students"]}
    assert list(rows) == [
        "control",
        "distillation_weight=0,temperature=1",
        "distillation_weight=1,temperature=1",
        "distillation_weight=1,temperature=4",
    ]
    zero = rows["distillation_weight=0,temperature=1"]
    assert [each["distill.temperature"] for each in zero["settings"]] == ["1", "4"]
    # Weight 0 is the control: the same start, batches and loss.
    assert [t["accuracy"] for t in zero["test"]] == [t["accuracy"] for t in rows["control"]["test"]]
    assert zero["test"][0]["kl"] == pytest.approx(rows["control"]["test"][0]["kl"], abs=1e-4)
    from kdistill.report.sweep import student_table as table

    titles, cells = table(result)
    assert [cell[:2] for cell in cells] == [
        ["teacher", "–"],
        ["control", "–"],
        ["0", "1"],
        ["0", "4"],
        ["1", "1"],
        ["1", "4"],
    ]
    assert all(len(cell) == len(titles) for cell in cells)


def test_validation_picks_and_test_reports(finished):
    folder, result = finished
    chosen = [row for row in result["students"] if row["settings"]]
    means = {row["name"]: np.mean([v["accuracy"] for v in row["validation"]]) for row in chosen}
    assert means[result["best"]] == max(means.values())
    row = next(row for row in chosen if row["name"] == result["best"])
    pick = result["pick"]
    assert set(pick["p"]) == means.keys() - {result["best"]} and pick["level"] == 0.025
    # Two seeds of 160 images: chance explains it all, and the report states it everywhere.
    assert pick["equal"] == list(pick["p"]) and "over 2 of 2 other settings, on 160 validation" in pick["sentence"]
    for name in ("sweep.md", "sweep.html", "sweep.json"):
        assert pick["sentence"] in (folder / name).read_text()
    assert result["verdict"]["student"] == [t["accuracy"] for t in row["test"]]


def test_measured_are_the_students_in_the_folder(finished, digits):
    folder, result = finished
    splits = load(TINY.data)
    model = keras.models.load_model(folder / "students/1/distillation_weight=1,temperature=4.keras")
    accuracy = np.mean(predict(model, splits.test.images).argmax(axis=1) == splits.test.labels)
    assert result["students"][3]["test"][1]["accuracy"] == pytest.approx(accuracy)


def test_hparams_are_in_tensorboard(finished):
    import tensorflow as tf

    folder, result = finished
    path = next((folder / "logs/students/0/distillation_weight=1,temperature=4").glob("events*"))
    tags = {}
    for event in tf.compat.v1.train.summary_iterator(str(path)):
        for value in event.summary.value:
            tags.setdefault(value.tag, []).append(event.step)
    assert "_hparams_/session_start_info" in tags
    assert tags["curve/validation"] == list(range(1, 11)) and tags["test/accuracy"] == [10]
    [path] = (folder / "logs/verdict").glob("events*")
    [text] = [
        value.tensor.string_val[0].decode()
        for event in tf.compat.v1.train.summary_iterator(str(path))
        for value in event.summary.value
    ]
    assert text == f"**{result['verdict']['headline']}**\n\n{result['verdict']['sentence']}"


def test_a_finished_sweep_resumes_without_training_and_takes_more_seeds(finished, monkeypatch):
    folder, result = finished
    with pytest.raises(InputError, match="grid: .*--force"):
        sweep(TINY, ["temperature=1"], folder, resume=True, say=lambda text: None)
    monkeypatch.setattr(side_by_side, "fit", lambda *a, **k: pytest.fail("trained again"))
    again = sweep(TINY, GRID, folder, resume=True, say=lambda text: None)
    assert again["students"] == result["students"] and again["verdict"] == result["verdict"]


@pytest.mark.exhaustive
def test_seeds_that_share_their_views_train_on_one_pass(finished, tmp_path):
    recipe = dataclasses.replace(TINY, cache=dataclasses.replace(TINY.cache, seed=0))
    result = sweep(recipe, ["temperature=1,4"], tmp_path / "shared", cache="off", say=lambda text: None)
    assert [cost["students"] for cost in result["cost"]["passes"]] == [6]
    # Seed 0 saw its own views anyway; seed 1 has another start, and now the views of seed 0.
    weights = [
        keras.models.load_model(folder / f"students/{seed}/control.keras").get_layer("logits").kernel.numpy()
        for folder, seed in ((finished[0], 0), (tmp_path / "shared", 0), (finished[0], 1), (tmp_path / "shared", 1))
    ]
    np.testing.assert_allclose(weights[0], weights[1], atol=2e-5)
    assert np.abs(weights[2] - weights[3]).max() > 1e-3
    assert result["verdict"]["seeds"] == 2


@pytest.mark.exhaustive
def test_few_labels_in_two_passes_and_one_seed(tmp_path):
    few = dataclasses.replace(TINY.data, labeled=40)
    recipe = dataclasses.replace(TINY, data=few, seeds=1)
    said = []
    result = sweep(recipe, ["student.widths=4x4,4x8"], tmp_path / "few", together=1, say=said.append)
    assert [row["name"] for row in result["students"]] == ["control", "widths=4x4", "widths=4x8"]
    assert [cost["students"] for cost in result["cost"]["passes"]] == [1, 1]
    assert result["verdict"]["unit"] == "test images" and "This is one seed" in result["verdict"]["sentence"]
    # The pick is compared on the validation images, with the students in the folder.
    [other] = result["pick"]["p"]
    splits = load(few)
    best, second = (
        predict(keras.models.load_model(tmp_path / f"few/students/0/{name}.keras"), splits.validation.images).argmax(1)
        == splits.validation.labels
        for name in (result["best"], other)
    )
    lost, gained = int((best & ~second).sum()), int((second & ~best).sum())
    assert result["pick"]["p"][other] == chance.drop_p_value(lost, gained, len(best))
    assert "one seed; 5 % over all 1 comparisons" in result["pick"]["sentence"]
    assert result["students"][1]["parameters"] < result["students"][2]["parameters"]
    assert any("Memory, besides data and teacher: " in text for text in said)
    # Two passes of two epochs on the same views: the first fills the cache, which the second reads.
    told = [text for text in said if "Teacher cache" in text]
    assert ["used; 2 x 2 epochs run the teacher 4 times" in text for text in told] == [True, True]
    assert "filling the cache 2 (" in told[0] and "filling the cache 0 (" in told[1]


def test_a_student_that_diverges_is_in_the_table_and_never_best(tmp_path):
    # A student whose numbers nothing bounds: no normalization, no ReLU that ends at 0.
    sgd = {"training": dataclasses.replace(TINY.training, optimizer="sgd"), "student": Network("mlp")}
    recipe = dataclasses.replace(TINY, seeds=1, **sgd)
    result = sweep(recipe, ["training.learning_rate=0.01,1000"], tmp_path / "wild", say=lambda text: None)
    assert result["best"] == "learning_rate=0.01"
    assert result["students"][2]["test"] == [None]
    assert "not finite from step" in (tmp_path / "wild" / "sweep.md").read_text()


def test_the_command_refuses_a_bad_grid_at_once():
    for words, message in (
        (["--grid", "temperature=1,2,...,4.5"], "whole number of steps"),
        (["--grid", "training.epochs=1,2"], "side by side"),
        ([], "this recipe has no grid"),
        (["--grid", "temperature=1", "--resume"], "--resume expects --out"),
    ):
        outcome = CliRunner().invoke(app, ["sweep", "mnist", *words])
        assert outcome.exit_code == 2 and message in outcome.stderr
