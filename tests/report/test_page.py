"""The page of a run: complete, escaped, of one file, and readable by headings, in both themes."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.outline import Outline
from support.reports import HOSTILE, NAMES, images, report

from kdistill.report import page
from kdistill.report.markdown import to_markdown


@pytest.fixture(scope="module")
def outline():
    return Outline(page.render(report(), images()))


def test_one_file_without_scripts_or_addresses(outline):
    assert not outline.all("script") and not outline.all("iframe")
    addresses = [a.get("src") or a.get("href") for tag, a in outline.elements if "src" in a or "href" in a]
    assert len(addresses) >= 10
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)
    styles = (Path(page.__file__).parent / "page.css").read_text()
    assert "url(" not in styles and "@import" not in styles


def test_names_of_users_are_text(outline):
    assert HOSTILE not in page.render(report(), images())
    assert outline.text.count(HOSTILE) >= 8  # recipe, command, file, profile, layer, class, table, chart
    assert "few <b>elements</b>" in outline.text


def test_the_contents_lead_to_the_sections(outline):
    ids = [a["id"] for _, a in outline.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"][1:] for a in outline.all("a")]
    assert links == ids and len(ids) == 8
    assert len(outline.all("h1")) == 1 and len(outline.all("h2")) == 1 + len(ids)  # that of the verdict


def test_charts_and_pictures_have_text_alternatives(outline):
    pictured = [a for a in outline.all("svg") if "chart" in a["class"].split()]
    # the verdict; four curves; two costs; three reliability diagrams; three confusion matrices
    assert len(pictured) == 13 and all(a["role"] == "img" and a["aria-label"] for a in pictured)
    assert all(a.get("aria-hidden") == "true" for a in outline.all("svg") if a not in pictured)
    alts = [a["alt"] for a in outline.all("img")]
    assert alts == [
        f"Test image {i}, label {NAMES[2]}: predicted as {NAMES[2 - i]} by the student, as {NAMES[3]} by the teacher"
        for i in (0, 1)
    ]


def test_the_verdict_comes_first_and_numbers_are_those_of_the_report(outline):
    text = outline.text[outline.text.index("</style>") if "</style>" in outline.text else 0 :]
    places = [text.index(part) for part in ("Did distillation help?", "UNDECIDED", "Accuracy of the student", "KL to")]
    assert places == sorted(places)
    assert report()["verdict"]["word"] == "UNDECIDED"
    for number in ("95.00", "3,456", "9,876", "1.23", "40,000", "20 times", "+3.75", "0123456789abcdef", "98.75"):
        assert number in text, number
    assert "the teacher is right on 0, the student on 1, neither on 1" in text


@pytest.mark.parametrize("part", ("verdict", "diagnostics", "differences", "files", "commit", "machine", "versions"))
def test_the_page_has_no_section_for_what_a_report_lacks(part):
    changed = report()
    del changed[part]
    outline = Outline(page.render(changed))
    assert [a["href"][1:] for a in outline.all("a")] == [a["id"] for _, a in outline.elements if "id" in a]


def test_a_report_of_an_earlier_version_and_a_loaded_teacher():
    changed = report()
    for fit in changed["training"].values():
        del fit["history"]
    del changed["training"]["teacher"], changed["data"]["class_names"]
    assert "Validation error" not in page.render(changed)
    assert "true class" in page.render(changed)


def test_many_classes_are_listed_not_drawn():
    changed = report()
    many = [[50 if i == j else 0 for j in range(200)] for i in range(200)]
    many[7][9] = 4
    changed["diagnostics"] = {"student": {"confusion": many, "per_class": [1.0] * 200}}
    changed["data"]["class_names"] = [f"class {i}" for i in range(200)]
    text = page.render(changed)
    assert "true class</text>" not in text and "<td>class 9</td><td>4</td>" in text and len(text) < 80_000


def test_deflated_sizes_are_drawn_if_the_report_has_them():
    changed = report()
    assert "size, deflated" not in page.render(changed)
    changed["models"][3]["deflated"] = 2_345
    assert "Accuracy against size, deflated. npu 2.345k" in page.render(changed)


def test_compressions_are_shown_layer_by_layer():
    changed = report()
    stage = {"layer": HOSTILE, "kind": "Conv2D", "parameters": 1_600, "sparsity": 0.75, "clusters": 16, "pruned": "yes"}
    changed["compressions"] = {HOSTILE: {"scheme": "pcqat", "notes": ["A <b>note</b>."], "layers": [stage]}}
    text = page.render(changed)
    shown = Outline(text)
    assert "<td>Conv2D</td><td>1,600</td><td>75</td><td>16</td><td>yes</td>" in text
    assert "A <b>note</b>." in shown.text and HOSTILE not in text
    assert any(a["href"] == "#compression" for a in shown.all("a"))


def test_warnings_stand_right_below_the_verdict_and_are_escaped():
    changed = report()
    assert "Warning" not in page.render(changed) and "**Warning**" not in to_markdown(changed)
    near_chance, unscaled = f"The teacher is near chance on {HOSTILE}.", "The layer 'fc1' sees inputs from 0 to 255."
    changed["warnings"] = [near_chance]
    changed["training"]["student"]["warning"] = unscaled
    text = page.render(changed)
    shown = Outline(text)
    assert HOSTILE not in text and len([a for a in shown.all("p") if a.get("class") == "caveat"]) == 2
    parts = ("UNDECIDED", f"Warning: {near_chance}", f"Warning: student: {unscaled}", "Accuracy of the student")
    places = [shown.text.index(part) for part in parts]
    assert places == sorted(places)
    lines = to_markdown(changed).splitlines()
    places = [lines.index(f"**Warning**: {warning}") for warning in (near_chance, f"student: {unscaled}")]
    assert lines.index(changed["verdict"]["sentence"]) < places[0] < places[1] < lines.index("|---" + "|---:" * 9 + "|")


def test_the_same_report_gives_the_same_page_and_the_report_is_not_changed():
    changed = report()
    before = copy.deepcopy(changed)
    assert page.render(changed, images()) == page.render(changed, images()) and changed == before


def test_save_writes_three_files_and_takes_the_pictures_that_are_there(tmp_path):
    (tmp_path / "differences").mkdir()
    (tmp_path / "differences/000001.png").write_bytes(images()["differences/000001.png"])
    page.save(report(), tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report()
    assert (tmp_path / "report.md").read_text().startswith("# ")
    assert len(Outline((tmp_path / "report.html").read_text()).all("img")) == 1


def test_nothing_heavy_is_imported():
    heavy = {"tensorflow", "keras", "numpy", "matplotlib"}
    code = f"import sys, kdistill.report.page; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2."""
    parts = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", (0, 1))
def test_contrast_in_both_themes(theme):
    """4.5 to 1 for every text and curve, on the page and on cards (WCAG 2, level AA)."""
    styles = (Path(page.__file__).parent / "page.css").read_text()
    block = re.findall(r":root \{(.*?)\}", styles, re.DOTALL)[theme]
    colors = dict(re.findall(r"--([\w]+): (#[0-9a-f]{6})", block))
    assert len(colors) == 30
    for name in colors.keys() - {"ground", "card", "rule", "faint"}:
        for ground in ("ground", "card"):
            low, high = sorted((luminance(colors[name]), luminance(colors[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (name, ground)
