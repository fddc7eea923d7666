"""What goes wrong in a user's hands: damaged files, a full disk, labels that do not fit; an error, and nothing half."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.scripts import benchmark
from support.small_models import CLASSES, corners, network
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.conversion.float32 import prepare
from kdistill.conversion.verify import export_checked
from kdistill.errors import InputError
from kdistill.recipe.loading import load_profile, load_recipe

EXAMPLES, IMAGES = corners(60, seed=7), corners(60).images


@pytest.mark.exhaustive
def test_damaged_files_at_the_command_line():
    """Three of each kind; `benchmarks/fuzz.py` tries as many as it is told."""
    fuzz = benchmark("fuzz")
    said = []
    assert fuzz.run(list(fuzz.KINDS), 3, seed=3, say=said.append) == []
    assert [line.partition(":")[0] for line in said] == list(fuzz.KINDS) and all(" 0 wrong" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize("call", ["write_bytes", "write_text"])
def test_a_full_disk_leaves_nothing_half(call, tmp_path, monkeypatch):
    folder = tmp_path / "npu"
    folder.mkdir()
    (folder / "student.tflite").write_bytes(b"the old one")

    def full(self, *_, **__):
        with open(self, "wb") as file:
            file.write(b"a part")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, call, full)
    with pytest.raises(OSError, match="No space left on device"):
        export_checked(prepare(network()), folder, load_profile("npu"), IMAGES, EXAMPLES, class_names=CLASSES)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.rglob("*")] == ["npu", "student.tflite"]
    assert (folder / "student.tflite").read_bytes() == b"the old one"


@pytest.mark.exhaustive
def test_a_limit_of_the_system_on_files_is_one_message(tmp_path):
    """A file may not grow beyond 4 kB here, as on a disk that fills up while the command runs."""
    network().save(tmp_path / "model.keras")
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from kdistill.cli.commands import app\nimport numpy as np\nrandom = np.random.default_rng(0)\n"
        "x, y = random.integers(0, 256, (40, 12, 12, 1)).astype('uint8'), np.arange(40) % 4\n"
        "np.savez('d.npz', x_train=x, y_train=y, x_test=x, y_test=y)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "app(['export', 'model.keras', '--data', 'npz', '--data-dir', 'd.npz', '--out', 'out'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: "), done.stderr
    assert not list(tmp_path.rglob("*.tflite"))


@pytest.mark.slow
def test_labels_and_license_at_the_command_line(tmp_path):
    runner = CliRunner()
    network().save(tmp_path / "model.keras")
    np.savez(
        tmp_path / "d.npz",
        **{"x_train": IMAGES, "y_train": corners(60).labels, "x_test": EXAMPLES.images, "y_test": EXAMPLES.labels},
    )
    words = ["export", str(tmp_path / "model.keras"), "--data", "npz", "--data-dir", str(tmp_path / "d.npz")]
    words += ["--out", str(tmp_path / "out"), "--profile", "reference", "--labels", str(tmp_path / "labels.txt")]
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    ended = runner.invoke(app, words)
    assert ended.exit_code == 2 and "class_names expects 4 names" in ended.output and not (tmp_path / "out").exists()
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\n")
    assert "no text in UTF-8" in runner.invoke(app, words).output
    (tmp_path / "labels.txt").write_text("a\nb\nc\nd\n")
    ended = runner.invoke(app, [*words, "--license", "MIT", "--version", "7"])
    assert ended.exit_code == 0, ended.output
    ended = runner.invoke(app, ["inspect", str(tmp_path / "out/reference/student.tflite")])
    assert "version 7; license MIT" in ended.output and "4 labels: a, b, c, d" in ended.output


def test_a_recipe_or_profile_that_raises_is_an_input_error(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def recipe(variant): return 1 + 'a'\ndef profile(): return {}['x']\n")
    with pytest.raises(InputError, match=r"recipe\(\) of '.*mine.py' cannot be run: TypeError"):
        load_recipe(str(path))
    with pytest.raises(InputError, match=r"profile\(\) of '.*mine.py' cannot be run: KeyError"):
        load_profile(str(path))
