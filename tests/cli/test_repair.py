"""`kdistill export --repair`."""

import json

import numpy as np
import pytest
from support.hard_models import wide_channels
from support.scripts import call
from support.small_models import corners

from kdistill.networks import saving


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    saving.save_model(wide_channels(), folder / "wide.keras")
    train, test = corners(300, seed=1), corners(200, seed=2)
    arrays = {"x_train": train.images, "y_train": train.labels, "x_test": test.images, "y_test": test.labels}
    np.savez(folder / "own.npz", **arrays)
    return folder


def test_a_teacher_without_repair_is_refused(wide):
    ended = call("export", wide / "wide.keras", "--teacher", wide / "wide.keras")
    assert ended.exit_code == 2 and "--teacher does nothing without --repair" in ended.output


@pytest.mark.slow
def test_a_refused_file_is_repaired(wide, tmp_path):
    data = ("--data", "npz", "--data-dir", wide / "own.npz", "--profile", "npu", "--out", tmp_path)
    refused = call("export", wide / "wide.keras", *data)
    assert refused.exit_code == 1 and not list(tmp_path.rglob("*.tflite"))
    ended = call("export", wide / "wide.keras", *data, "--repair", "--json")
    assert ended.exit_code == 0, ended.output
    (file,) = json.loads(ended.stdout)
    assert [row["holds"] for row in file["attempts"]] == [False, False, True]
    assert "Repair for 'npu': channels of equal width" in ended.stderr
    assert (tmp_path / "npu" / "student.tflite").stat().st_size == file["bytes"]
    again = call("export", wide / "wide.keras", *data, "--repair", "--json")
    assert again.exit_code == 0 and again.stderr.count("(finished before)") == 2
    assert json.loads(again.stdout)[0]["sha256"] == file["sha256"]
