"""The trial before a run, its command, what it leaves behind; and the warning of a run whose teacher is not ahead."""

import json
import tempfile

import pytest
from support.scripts import call, untrained

from kdistill.evaluation.expectation import visible_difference
from kdistill.recipe.loading import load_recipe
from kdistill.runs.plan import plan
from kdistill.runs.run import run
from kdistill.training import fit

pytestmark = pytest.mark.slow
SETTINGS = ["train_limit=96", "exports=reference"]
TINY = load_recipe("mnist", "smoke", SETTINGS)  # two epochs each: the trial has one, the longer control both


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The current folder, the folder of temporary files and of the caches, and what is left in them afterwards."""
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("KDISTILL_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def planned(folder):
    messages = []
    result = plan(TINY, say=messages.append)
    assert entries(folder) == set()
    return result, messages


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A file of a teacher that has learned nothing."""
    return untrained(tmp_path_factory.mktemp("models") / "untrained.keras")


def entries(folder) -> set[str]:
    """The names in a folder, without the sources that TensorFlow keeps among temporary files until a process ends."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("__autograph")}


@pytest.mark.exhaustive
def test_the_trial_trains_what_a_run_trains_for_a_part_of_the_epochs(planned):
    result, messages = planned
    assert json.loads(json.dumps(result)) == result
    models = result["models"]
    assert list(models) == ["teacher", "control", "student", "control-longer"]
    assert {name: (row["epochs"], row["of"], len(row["accuracy"])) for name, row in models.items()} == {
        "teacher": (1, 2, 1),
        "control": (1, 2, 3),
        "student": (1, 2, 3),
        "control-longer": (2, 2, 1),
    }
    assert [text.partition(":")[0] for text in messages if text.startswith("Training ")] == [
        "Training teacher",
        *(f"Training {arm}{end}" for end in ("", "-1", "-2") for arm in ("control", "student")),
        "Training control-longer",
    ]
    trial = result["trial"]
    assert trial["seeds"] == [0, 1, 2] and trial["images"] == 96 and trial["seconds"] > 0
    assert trial["sentence"].startswith(
        "Trial: teacher 1 of 2 epochs; control and student 1 of 2 epochs, 3 seeds, one control 2 of 2 epochs; "
        "accuracies on the 96 validation images. So few epochs underrate all models, the teacher most"
    )
    assert result["difference"] == pytest.approx(
        [s - c for s, c in zip(models["student"]["accuracy"], models["control"]["accuracy"], strict=True)]
    )


@pytest.mark.exhaustive
def test_the_forecast_follows_from_scatter_and_seconds(planned):
    result, _ = planned
    models, deviation = result["models"], max(result["scatter"]["difference"], 1 / result["data"]["test"])
    assert [row["seeds"] for row in result["forecast"]] == [3, 5, 10]
    for row in result["forecast"]:
        assert row["difference"] == pytest.approx(visible_difference(deviation, row["seeds"]))
        seed = models["control"]["full_seconds"] + models["student"]["full_seconds"]
        assert row["seconds"] == pytest.approx(models["teacher"]["full_seconds"] + row["seeds"] * seed)
    for row in models.values():
        assert row["full_seconds"] is None or row["seconds"] <= row["full_seconds"] + 1e-9
    assert models["teacher"]["full_seconds"] <= 2 * models["teacher"]["seconds"] + 1e-9
    lines = result["lines"]
    assert len(lines) == 5 and lines[0].startswith("3 seeds show a difference from ")
    assert "(80 % power), in about " in lines[2] and lines[3].startswith("The test set of 96 examples cannot show")
    assert lines[4] == result["expectation"]["sentence"]
    # Teacher and control have had half of their epochs, and are compared on images that are not for testing.
    assert result["lead"]["split"] == "validation" and result["lead"]["share"] == 0.5
    assert result["lead"]["control"] == sorted(models["control"]["accuracy"])[1]


@pytest.mark.exhaustive
def test_a_teacher_that_comes_trained(folder, teacher):
    out = folder / "kept"
    settings = [word for setting in (*SETTINGS, f"teacher.file={teacher}") for word in ("--set", setting)]
    ended = call("plan", "mnist", "--variant", "smoke", *settings, "--out", out, "--json")
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.stdout)
    assert json.loads((out / "plan.json").read_text()) == result
    assert {"control-2.keras", "student.keras", "control-longer.keras", "logs"} <= {path.name for path in out.iterdir()}
    row = result["models"]["teacher"]
    assert (row["epochs"], row["of"], row["seconds"], row["full_seconds"]) == (0, 0, 0, 0)
    # It may have been trained on the validation images. It has had all of its training: it meets the longer control.
    lead = result["lead"]
    assert lead["split"] == "test" and lead["share"] == 1 and lead["control"] > lead["teacher"]
    assert result["expectation"]["word"] == "unclear" and "learned next to nothing" in result["lines"][-1]
    assert "the teacher comes trained" in result["trial"]["sentence"] and "that were trained." in ended.stdout
    assert not list(folder.glob("kdistill-plan-*")) and not (folder / "runs").exists()
    ended = call("plan", "mnist", "--variant", "smoke", *settings, "--out", out)
    assert ended.exit_code == 2 and "holds other files" in ended.output


def test_an_interruption_leaves_nothing_behind(folder, teacher, monkeypatch):
    before = entries(folder)
    fits = []

    def interrupted(*arguments, **options):
        fits.append(arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(fit, "fit", interrupted)
    ended = call("plan", "mnist", "--variant", "smoke", "--set", "train_limit=64", "--set", f"teacher.file={teacher}")
    assert ended.exit_code == 130 and "Interrupted." in ended.output and len(fits) == 1
    assert entries(folder) == before


@pytest.mark.parametrize(
    "words,message",
    [
        (["mnits"], "Did you mean 'mnist'"),
        (["mnist", "--variant", "larg"], "Unknown variant 'larg'"),
        (["mnist", "--share", "0"], "'share' expects a share of the epochs above 0, up to 1, received 0.0"),
        (["mnist", "--share", "1.5"], "less than or equal to 1"),
        (["mnist", "--variant", "smoke", "--set", "teacher.file=nothing.keras"], "nothing.keras"),
        (["mnist", "--set", "exports=npv"], "Did you mean 'npu'"),
        (["mnist", "--data-dir", "/nowhere/at/all"], "no folder or .npz file"),
        (["mnist", "--variant", "smoke", "--strategy", "many"], "many"),
    ],
)
def test_bad_input_is_one_message_before_anything_trains(folder, words, message):
    before = entries(folder)
    ended = call("plan", *words)
    assert ended.exit_code == 2 and message in ended.output and "Traceback" not in ended.output, ended.output
    assert entries(folder) == before


@pytest.mark.exhaustive
def test_a_run_warns_before_the_student_trains_and_logs_its_verdict(folder, teacher, planned):
    import tensorflow as tf

    messages = []
    recipe = load_recipe("mnist", "smoke", [*SETTINGS, f"teacher.file={teacher}"])
    report = run(recipe, folder / "run", say=messages.append)
    places = [
        next(place for place, message in enumerate(messages) if message.startswith(beginning))
        for beginning in ("Training control", "Warning: The teacher is not ahead of the control", "Training student")
    ]
    assert places == sorted(places)
    warning = messages[places[1]].removeprefix("Warning: ")
    assert warning in report["warnings"] and "on 96 test images" in warning and "Use a better teacher" in warning
    for name in ("report.md", "report.html", "report.json"):
        assert "not ahead of the control" in (folder / "run" / name).read_text()
    # The longer control of the plan has had all epochs, and is the control of the run.
    accuracy = report["training"]["control"]["history"]["val_accuracy"][-1]
    assert planned[0]["models"]["control-longer"]["accuracy"] == [pytest.approx(accuracy)]

    def logged() -> list[tuple[str, int, str]]:
        [path] = (folder / "run/logs/verdict").glob("events*")
        events = tf.compat.v1.train.summary_iterator(str(path))
        values = [(event.step, value) for event in events for value in event.summary.value]
        return [(value.tag, step, value.tensor.string_val[0].decode()) for step, value in values]

    [(tag, step, text)] = logged()
    verdict = report["verdict"]
    assert (tag, step) == ("verdict", 1) and text == f"**{verdict['headline']}**\n\n{verdict['sentence']}"
    assert "on these examples" in text
    messages.clear()
    again = run(recipe, folder / "run", resume=True, say=messages.append)
    assert again["warnings"] == report["warnings"] and len(logged()) == 1
