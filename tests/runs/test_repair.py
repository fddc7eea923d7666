"""The files of a run, repaired: on the way, and in a finished run that is resumed with repair=true."""

import dataclasses
import json

import keras
import pytest

from kdistill.errors import InputError
from kdistill.recipe import Network
from kdistill.recipe.checks import check_recipe
from kdistill.recipe.loading import load_recipe
from kdistill.recipe.overrides import override
from kdistill.recipe.values import as_dict, from_dict
from kdistill.runs.run import run

SMOKE = load_recipe("mnist", "smoke", ["train_limit=320"])
PROFILE = """
from kdistill.recipe import Profile
def profile(): return Profile("strict", quantization="int8", min_agreement=1.0, max_drop=0.0)
"""


def test_the_key_is_written_where_it_is_on():
    assert SMOKE.repair is False and "repair" not in as_dict(SMOKE)
    on = override(SMOKE, ["repair=true"])
    assert on.repair is True and as_dict(on)["repair"] is True
    assert from_dict(type(on), as_dict(on)).repair is True and from_dict(type(on), as_dict(SMOKE)).repair is False
    with pytest.raises(InputError, match="'repair' expects false without exports"):
        check_recipe(dataclasses.replace(on, exports=()))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_finished_run_is_repaired_without_training_again(tmp_path, monkeypatch):
    (tmp_path / "strict.py").write_text(PROFILE)
    recipe = dataclasses.replace(SMOKE, exports=(str(tmp_path / "strict.py"),))
    before = run(recipe, tmp_path / "run", say=lambda text: None)
    assert [row["name"] for row in before["refused"]] == ["strict"] and "attempts" not in before["refused"][0]
    monkeypatch.setattr("kdistill.runs.arms.fit", lambda *args, **options: pytest.fail("it trains again"))
    lines = []
    after = run(dataclasses.replace(recipe, repair=True), tmp_path / "run", resume=True, say=lines.append)
    assert after["refused"] == [] and [file["profile"] for file in after["files"]] == ["strict"]
    attempts = after["files"][0]["attempts"]
    assert attempts[0]["action"] == "as it is" and attempts[-1]["holds"]
    assert (tmp_path / "run" / after["files"][0]["path"]).exists()
    assert "layers in float" in (tmp_path / "run" / "report.md").read_text()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["files"][0]["attempts"] == attempts
    lines.clear()
    again = run(dataclasses.replace(recipe, repair=True), tmp_path / "run", resume=True, say=lines.append)
    assert again["files"][0]["sha256"] == after["files"][0]["sha256"]
    assert sum("(finished before)" in line for line in lines) == len(attempts) - 1


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_recurrent_student_is_unrolled(tmp_path):
    (tmp_path / "rows.py").write_text(
        "import keras\n"
        "def rows(shape, classes):\n"
        "    image = keras.Input(shape)\n"
        "    x = keras.layers.Reshape(shape[:2])(keras.layers.Rescaling(1 / 255)(image))\n"
        "    x = keras.layers.Dense(8)(x[:, ::4])\n"
        "    return keras.Model(image, keras.layers.Dense(classes, name='logits')(keras.layers.GRU(8)(x)))\n"
    )
    student = Network(f"{tmp_path / 'rows.py'}:rows")
    recipe = dataclasses.replace(SMOKE, student=student, exports=("npu",), repair=True)
    report = run(recipe, tmp_path / "run", say=lambda text: None)
    rows = (report["files"] or report["refused"])[0]["attempts"]
    assert rows[1]["action"].startswith("recurrent layers unrolled: gru")
    assert bool(report["files"]) == rows[-1]["holds"]
    keras.backend.clear_session()
