"""The pages name what exists: rooms and paths. Their code runs in test_code_blocks.py."""

import re
from pathlib import Path

import pytest
from test_imports import LAYER_OF

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
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
