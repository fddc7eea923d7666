"""The search from a budget to a checked file: refusals, the folder, its recipe, and an interrupted search."""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from support.shrinking import CLASSES, FEATURES, write_rows

import kdistill
from kdistill.cli.commands import app
from kdistill.errors import CheckFailed, InputError
from kdistill.files import sha256
from kdistill.recipe import Data, Network
from kdistill.recipe.loading import load_recipe
from kdistill.shrinking import result as results
from kdistill.shrinking.search import number_of_rounds, ranked

SHORT = ("training.epochs=2", "training.batch_size=32")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("rows"))


def search(rows, out, budget, teacher=None, lines=None, **options):
    data, trained = rows
    options = {"seeds": 1, "settings": SHORT, "say": lambda text: None} | options
    if lines is not None:
        options["say"] = lines.append
    return kdistill.shrink(
        teacher or trained, Data("npz", head="classes"), "phone_cpu", budget, data_dir=data, out=out, **options
    )


@pytest.mark.slow
def test_what_cannot_work_is_refused_before_anything_trains(rows, tmp_path):
    out = tmp_path / "out"
    untrained = keras.Sequential([keras.Input((FEATURES,)), keras.layers.Dense(CLASSES, kernel_initializer="zeros")])
    untrained.layers[-1].bias.assign([0.0, 9.0, 0.0])
    (tmp_path / "noise.keras").touch()
    untrained.save(tmp_path / "noise.keras")
    narrow = {"families": ("dense",)}
    cases = [
        ({"max_bytes": "6kB", "max_arena": "2kB"}, {}, "fixed batch"),
        ({"max_bytes": "6kB", "min_accuracy": 0.9999}, {}, "contradicts the teacher"),
        ({}, {}, "one limit or more"),
        ("6kB", {"teacher": tmp_path / "noise.keras"}, "It teaches noise"),
        ("6kB", {"teacher": Network("dense")}, "expects a trained teacher"),
        ("6kB", {"teacher": "shipped:vgg"}, "does not ship"),
        ("6kB", {"teacher": "nowhere.keras"}, "There is no file 'nowhere.keras'"),
        ("6kB", {"settings": ("student.width=3",)}, "chooses that itself"),
        ("6kB", {"families": ("resnet",)}, "families for rows of numbers are dense"),
        ("6kB", {"resume": True}, "no run to resume"),
    ]
    with pytest.raises(InputError, match="profile expects the name"):
        kdistill.shrink(rows[1], {}, kdistill.load_profile("npu"), "6kB", out=out)
    for budget, options, message in cases:
        with pytest.raises(InputError, match=message):
            search(rows, out, budget, **narrow | options)
        assert not out.exists(), message


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_budget_that_cannot_be_met_is_refused_before_anything_trains(rows, tmp_path):
    out = tmp_path / "out"
    for budget, message in (
        ({"max_bytes": 700}, "No student meets the budget of 700 bytes .* --max-bytes [0-9]+"),
        ({"max_bytes": "6kB", "max_us": 1e-3}, "No student meets the budget .* --max-us [0-9]+"),
        ({"max_bytes": "6kB", "hours": 0.001}, "too little for one round.* hours here"),
    ):
        with pytest.raises(InputError, match=message):
            search(rows, out, budget)
        assert not out.exists(), message


def test_successive_halving_keeps_a_third():
    assert number_of_rounds(11) == [11, 4, 2] and number_of_rounds(3) == [3] and number_of_rounds(1) == [1]
    scores = {
        "broken": {"accuracy": None, "nll": None},
        "sure": {"accuracy": 0.9, "nll": 0.2},
        "unsure": {"accuracy": 0.9, "nll": 0.4},
        "best": {"accuracy": 0.91, "nll": 9.0},
    }
    assert ranked(scores) == ["best", "sure", "unsure", "broken"]


def test_pareto_points_are_not_dominated():
    def row(name, accuracy, size, arena, microseconds=10.0):
        return {"name": name, "accuracy": accuracy, "bytes": size, "arena": arena, "microseconds": microseconds}

    rows = results.mark_pareto(
        [
            row("large", 0.99, 900, 50),
            row("dominated", 0.98, 950, 60),
            row("small", 0.97, 500, 50),
            row("little memory", 0.97, 600, 20),
            row("as fast within noise", 0.96, 501, 50, 9.8),
            row("faster", 0.96, 502, 50, 5.0),
            row("refused", None, None, None),
        ]
    )
    assert [one["name"] for one in rows if one["pareto"]] == ["small", "faster", "little memory", "large"]
    assert rows[-1]["name"] == "refused"


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """A search that nothing has interrupted: its folder, result and lines."""
    out, lines = tmp_path_factory.mktemp("search") / "whole", []
    return out, search(rows, out, "3400", lines=lines), lines


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_folder_of_a_search(whole, rows):
    out, result, lines = whole
    text = "\n".join(lines)
    assert "students fit and will be trained" in text and text.index("fit and will") < text.index("round-1")
    file = out / result["file"]["path"]
    assert result["file"]["bytes"] == file.stat().st_size <= 3400
    assert result["file"]["container"] + result["file"]["parameters"] == file.stat().st_size
    predicted = results.costs_of(file, kdistill.load_profile("phone_cpu:compact"), result["file"]["parameters"])
    assert 0 <= result["candidates"][result["winner"]]["bytes"] - predicted["bytes"] <= 200, "known before training"
    # Validation picks, test reports.
    last = result["rounds"][-1]["students"]
    assert result["winner"] == ranked(last)[0] and set(last) <= set(result["candidates"])
    test = np.load(rows[0])
    accuracy = kdistill.evaluate(file, (test["x_test"], test["y_test"]))["accuracy"]
    assert result["files"][0]["accuracy"] == accuracy > 0.5 and len(result["controls"]) == 1
    assert result["verdict"]["sentence"] and result["test"] == 200
    for row in result["pareto"]:
        assert (out / row["file"]).stat().st_size == row["bytes"]
    assert any(row["winner"] for row in result["pareto"]) and len(result["pareto"]) >= 3
    assert json.loads((out / "pareto.json").read_text()) == result["pareto"]
    page = (out / "shrink.html").read_text()
    assert result["winner"] in page and "validation" in (out / "shrink.md").read_text()
    # The recipe trains the winner again.
    recipe = load_recipe(str(out / "recipe.py"))
    assert recipe.seeds == 1 and recipe.exports == ("phone_cpu:compact",) and recipe.repair
    again = kdistill.run(recipe, out.parent / "again", data_dir=rows[0], say=lambda text: None)
    assert sha256(Path(again["folder"], "phone_cpu", "student.tflite")) == sha256(file)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("place", ["round-1:", "is taught with", "Exporting phone_cpu"])
def test_an_interrupted_search_ends_as_the_whole_one(whole, rows, tmp_path, place):
    def say(text):
        if place in text:
            raise KeyboardInterrupt

    out, budget = tmp_path / "out", "3400"
    with pytest.raises(KeyboardInterrupt):
        search(rows, out, budget, say=say)
    with pytest.raises(InputError, match="another budget"):
        search(rows, out, "9kB", resume=True)
    result = search(rows, out, budget, resume=True)
    assert result["winner"] == whole[1]["winner"]
    for key in ("rounds", "methods"):
        assert without_times(result[key]) == without_times(whole[1][key])
    assert sha256(out / result["file"]["path"]) == sha256(whole[0] / whole[1]["file"]["path"])


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(part) for key, part in value.items() if key != "seconds"}
    return [without_times(part) for part in value] if isinstance(value, list) else value


@pytest.mark.slow
@pytest.mark.exhaustive
def test_arrays_without_labels_are_labeled_by_the_teacher(rows, tmp_path):
    arrays = np.load(rows[0])
    inputs, lines = {"x_train": arrays["x_train"], "x_test": arrays["x_test"]}, []
    options = {"seeds": 1, "settings": SHORT, "out": tmp_path / "out", "say": lines.append}
    with pytest.raises(InputError, match="--min-accuracy expects data with labels"):
        kdistill.shrink(rows[1], inputs, "phone_cpu", {"max_bytes": 3000, "min_accuracy": 0.5}, **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="received x_train, y_test"):
        kdistill.shrink(
            rows[1], {"x_train": arrays["x_train"], "y_test": arrays["y_test"]}, "phone_cpu", 3000, **options
        )
    result = kdistill.shrink(rows[1], inputs, "phone_cpu", 3000, **options)
    assert (
        result["unlabeled"] == ["train", "test"]
        and "agreement with the teacher" in (tmp_path / "out/shrink.md").read_text()
    )
    teacher = keras.models.load_model(rows[1])
    written = np.load(tmp_path / "out" / "data.npz")
    np.testing.assert_array_equal(written["y_test"], teacher.predict(arrays["x_test"], verbose=0).argmax(axis=1))
    recipe = load_recipe(str(tmp_path / "out" / "recipe.py"))
    assert recipe.distill.distillation_weight == 1 or recipe.distill.terms
    teachers = next(
        row for row in json.loads((tmp_path / "out/run/report.json").read_text())["models"] if row["name"] == "teacher"
    )
    assert teachers["accuracy"] == 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_an_accuracy_that_is_not_reached_fails_after_the_report(rows, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CheckFailed, match=r"reaches .* below --min-accuracy 75"):
        search(rows, out, {"max_bytes": 3000, "min_accuracy": 0.75}, settings=("training.epochs=1",))
    assert (out / "shrink.html").exists()


def test_the_command_states_what_is_wrong(tmp_path, capsys):
    from typer.testing import CliRunner

    runner = CliRunner()
    for options, message in (
        (["--max-bytes", "16 parsecs"], "--max-bytes expects"),
        (["--hours", "1"], "one limit or more"),
        (["--max-bytes", "16kB", "--resume"], "--resume expects --out"),
    ):
        answer = runner.invoke(app, ["shrink", "shipped:mnist_cnn", *options])
        assert answer.exit_code == 2 and message in answer.output + getattr(answer, "stderr", "")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_seeds_of_a_narrowed_teacher_are_no_copies(rows, tmp_path):
    """They start from the teacher's weights: each seed has batches of its own."""
    result = search(rows, tmp_path / "out", "3400", families=("teacher",), seeds=2)
    recipe = load_recipe(str(tmp_path / "out" / "recipe.py"))
    assert result["winner"].startswith("teacher") and recipe.cache.seed is None and recipe.cache.views == 1
    for kind in ("control", "student"):
        first, second = (
            keras.models.load_model(tmp_path / "out" / "run" / f"{name}.keras").get_weights()
            for name in (kind, f"{kind}-1")
        )
        assert any(np.abs(one - other).max() > 1e-4 for one, other in zip(first, second, strict=True)), kind
