"""The pages name what exists: rooms, paths, and what their code imports."""

import ast
import re
from pathlib import Path

import pytest
from test_imports import LAYER_OF

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "README.md"]
FOLDERS = "kdistill|tests|docs|benchmarks|recipes|exports|examples"


def test_the_map_of_the_house_has_every_room():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = page.partition("## The map of the house")[2].partition("\n## ")[0]
    for room in LAYER_OF.keys() - {""}:
        assert f"\n| `{room}` |" in rooms, room


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    text = page.read_text()
    paths = re.findall(rf"(?<![\w/.-])((?:{FOLDERS})/[\w/.-]*\w)", text)
    paths = [path for path in paths if "." in path.rpartition("/")[2]]
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [path for path in paths if not (ROOT / path).exists()]
    missing += [link for link in links if link and not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_in_code_work(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(ast.unparse(node), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "heads.md"], ids=lambda page: page.name)
def test_the_examples_run_from_top_to_bottom(page, capsys, tmp_path, monkeypatch):
    """In one namespace, as a reader would paste them one after the other."""
    monkeypatch.chdir(tmp_path)
    names, text = {}, page.read_text()
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, page.name, "exec"), names)
    printed = capsys.readouterr().out
    for comment in re.findall(r"^print\(.*\)  # (.*)$", text, re.MULTILINE):
        assert "..." in comment or comment in printed
    if page.name == "README.md":
        assert len(text.splitlines()) <= 120
        accuracies = [float(line.rstrip("%")) for line in printed.splitlines() if re.fullmatch(r"[\d.]+%", line)]
        assert len(accuracies) == 3 and min(accuracies) > 94
