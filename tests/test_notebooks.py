"""The notebooks run from start to end on the shipped sample, cell by cell in one namespace, and become .ipynb files."""

import importlib.util
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from kdistill.formats import process

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
_spec = importlib.util.spec_from_file_location("to_ipynb", FOLDER / "to_ipynb.py")
to_ipynb = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(to_ipynb)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "name,least",
    [("ten_minutes", {"teacher": 95, "control": 90}), ("from_pytorch", {"teacher": 92})],
)
def test_it_runs(name, least, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind, source in to_ipynb.cells((FOLDER / f"{name}.py").read_text()):
            if kind == "code":
                exec(compile(re.sub(r"^%.*", "", source, flags=re.MULTILINE), name, "exec"), names)
    process.close_all()
    printed = capsys.readouterr().out
    for model, percent in {"student": 92, "accuracy of the file": 92, **least}.items():
        (value,) = re.findall(rf"^{model}:? ([\d.]+)%", printed, re.MULTILINE)
        assert float(value) >= percent, printed
    assert (tmp_path / "files" / "student.tflite").is_file()


def test_it_becomes_a_notebook(tmp_path):
    for name in ("ten_minutes", "from_pytorch"):
        text = (FOLDER / f"{name}.py").read_text()
        (tmp_path / f"{name}.py").write_text(text)
        command = [sys.executable, str(FOLDER / "to_ipynb.py"), f"{name}.py"]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        made = json.loads((tmp_path / f"{name}.ipynb").read_text())
        kinds = [cell["cell_type"] for cell in made["cells"]]
        assert kinds[:2] == ["markdown", "code"] and set(kinds) == {"markdown", "code"} and len(kinds) >= 10
        sources = ["".join(cell["source"]) for cell in made["cells"]]
        assert sources[0].startswith("# ") and sources[1].startswith("%pip install ")
        code = "\n".join(source for kind, source in zip(kinds, sources, strict=True) if kind == "code")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert [line for line in code.splitlines() if line and not line.startswith(("#", "%"))] == lines
