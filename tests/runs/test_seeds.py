"""Seeds that are added until the verdict is clear, and runs that continue with more seeds."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.errors import InputError
from kdistill.evaluation import verdict
from kdistill.recipe.loading import load_recipe
from kdistill.runs import results
from kdistill.runs.run import run

pytestmark = pytest.mark.slow
TINY = load_recipe("mnist", "smoke", ["train_limit=64", "exports=reference", "training.epochs=1", "seeds=2"])


def quiet(text: str) -> None:
    pass


def decided_at(seeds: int, monkeypatch) -> None:
    """From this number of seeds on, every verdict is BETTER, before it UNDECIDED."""
    judge = verdict.judge

    def judged(student, *arguments, **options):
        result = judge(student, *arguments, **options)
        return {**result, "word": "BETTER" if len(student) >= seeds else "UNDECIDED"}

    monkeypatch.setattr(results.verdict, "judge", judged)


@pytest.mark.exhaustive
def test_seeds_are_added_until_the_verdict_is_clear(tmp_path, monkeypatch):
    decided_at(3, monkeypatch)
    messages = []
    recipe = dataclasses.replace(TINY, max_seeds=5)
    report = run(recipe, tmp_path / "run", say=messages.append)
    assert report["verdict"]["seeds"] == 3 and report["verdict"]["word"] == "BETTER"
    fits = report["training"].keys()
    assert {"student-1", "control-2", "student-2"} <= fits and "student-3" not in fits
    assert [message[:13] for message in messages if message.startswith("After ")] == ["After 2 seeds", "After 3 seeds"]
    assert "0 to 2" in (tmp_path / "run/report.md").read_text()
    # Continued, it looks at the same numbers of seeds and trains nothing.
    again = run(recipe, tmp_path / "run", resume=True, say=quiet)
    assert again["verdict"]["student"] == report["verdict"]["student"]


@pytest.mark.exhaustive
def test_the_most_seeds_are_the_end(tmp_path, monkeypatch):
    decided_at(9, monkeypatch)
    report = run(dataclasses.replace(TINY, max_seeds=3), tmp_path / "run", say=quiet)
    assert report["verdict"]["seeds"] == 3 and report["verdict"]["word"] == "UNDECIDED"


@pytest.mark.exhaustive
def test_a_finished_run_continues_with_more_seeds_without_force(tmp_path):
    one = dataclasses.replace(TINY, seeds=1)
    first = run(one, tmp_path / "run", say=quiet)
    messages = []
    more = run(dataclasses.replace(one, seeds=2), tmp_path / "run", resume=True, say=messages.append)
    assert more["verdict"]["seeds"] == 2 and more["verdict"]["student"][:1] == first["verdict"]["student"]
    assert "Changed since the run was started: seeds: 1 -> 2" in messages and "student: already finished" in messages
    assert json.loads((tmp_path / "run/recipe.json").read_text())["seeds"] == 2
    with pytest.raises(InputError, match="seeds: 2 -> 1"):
        run(one, tmp_path / "run", resume=True, say=quiet)
    with pytest.raises(InputError, match="seed: 0 -> 1; seeds: 2 -> 3"):
        run(dataclasses.replace(one, seed=1, seeds=3), tmp_path / "run", resume=True, say=quiet)


@pytest.mark.parametrize(
    "words,message",
    [
        (["--seeds", "many"], "--seeds expects a number, or two as in 3..10, received 'many'"),
        (["--seeds", "3.."], "received '3..'"),
        (["--seeds", "5..5"], r"'max_seeds' expects a number above seeds (5), or none, received 5"),
        (["--seeds", "1..4"], "'seeds' expects 2 or more with max_seeds"),
        (["--seeds", "3..1000"], "'max_seeds' expects"),
        (["--margin", "0"], "'margin' expects a share between 0 and 1"),
    ],
)
def test_what_the_command_refuses(words, message):
    ended = CliRunner().invoke(app, ["run", "mnist", *words])
    assert ended.exit_code == 2 and message in ended.output
