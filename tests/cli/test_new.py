"""`kdistill new` writes recipes and profiles that work; `kdistill doctor` states what is there."""

import json

import numpy as np
import pytest
from support.image_files import folders
from support.scripts import call, untrained

from kdistill.recipe.loading import load_profile, load_recipe


def test_what_it_writes_is_loaded_and_nothing_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind in ("image_folder", "npz"):
        ended = call("new", f"mine_{kind}", "--kind", kind)
        assert ended.exit_code == 0 and f"kdistill run mine_{kind}.py --data-dir" in ended.output
        for variant in ("default", "smoke"):
            assert load_recipe(f"mine_{kind}.py", variant).name == f"mine_{kind}"
    assert call("new", "board", "--kind", "profile").exit_code == 0
    assert load_profile("board.py").name == "board"
    before = (tmp_path / "board.py").read_bytes()
    again = call("new", "board", "--kind", "npz")
    assert (
        again.exit_code == 2 and "'board.py' exists" in again.output and (tmp_path / "board.py").read_bytes() == before
    )
    for name in ("../evil", "a b", "9lives"):
        assert call("new", name).exit_code == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["board.py", "mine_image_folder.py", "mine_npz.py"]


@pytest.mark.exhaustive
def test_a_new_recipe_runs_on_images_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders(tmp_path / "images", parts=("train", "test"), count=10)
    call("new", "colors")
    ended = call("run", "colors.py", "--data-dir", "images", "--variant", "smoke", "--out", "run", "--cache", "off")
    assert ended.exit_code == 0, ended.output
    assert (tmp_path / "run" / "report.html").is_file()
    call("new", "board", "--kind", "profile")
    model = untrained(tmp_path / "student.keras")
    ended = call("export", str(model), "--profile", "board.py", "--out", "files")
    assert "board" in ended.output


def test_the_doctor_states_versions_devices_folders_and_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("KDISTILL_CACHE", str(tmp_path / "cache"))
    text, findings = call("doctor").output, json.loads(call("doctor", "--json").output)
    assert f"numpy {np.__version__}" in text and "GPU none" in text and str(tmp_path / "cache") in text
    assert findings["versions"]["numpy"] == np.__version__
    assert set(findings) >= {"machine", "versions", "missing", "folders", "devices", "other versions than tested"}
    monkeypatch.setenv("KDISTILL_CACHE", "~nosuch")
    assert "unusable: " in call("doctor").output
