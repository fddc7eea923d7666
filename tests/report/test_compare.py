"""Runs side by side: the table, what differs, the page, and the command with its messages."""

import json
import re
import subprocess
import sys

import pytest
from support.outline import Outline
from support.reports import HOSTILE, report
from support.scripts import call

from kdistill.errors import InputError
from kdistill.report import compare, page


@pytest.fixture
def folders(tmp_path):
    """Two finished runs; the second with another temperature, seed verdict and a better file."""
    first, second = report(), report()
    first["recipe"]["name"] = second["recipe"]["name"] = "mnist"
    second["recipe"]["distill"]["temperature"] = 8.0
    second["models"][4].update(bytes=1_234, accuracy=0.9625)
    second["machine"] = "another machine"
    paths = [tmp_path / name for name in ("one", "two")]
    for path, run in zip(paths, (first, second), strict=True):
        path.mkdir()
        page.save(run, path)
    return paths


def test_the_table_by_hand(folders):
    titles, cells = compare.run_table(compare.load_runs(folders))
    row = dict(zip(titles, cells[0], strict=True))
    assert row["run"] == "one" and row["verdict"] == "UNDECIDED" and row["seeds"] == "2"
    # students 95.0 and 97.5, controls 91.25 and 92.75: differences of 3.75 and 4.75 points
    assert (row["student %"], row["control %"], row["points"], row["teacher %"]) == ("96.25", "92.00", "+4.25", "98.75")
    low, high = map(float, row["interval"].split(" to "))
    assert low + high == pytest.approx(2 * 4.25, abs=0.011) and low < 0 < high
    assert (row["bytes"], row["µs"]) == ("3,456", "7.5")
    assert dict(zip(titles, cells[1], strict=True))["bytes"] == "1,234"


def test_what_differs_and_what_does_not_compare(folders):
    runs = compare.load_runs(folders)
    differences = compare.differences(runs)
    assert differences == {"distill.temperature": [4.0, 8.0], "machine": ["a machine, 2 cores", "another machine"]}
    assert compare.caveats(runs) == ["The runs were measured on different machines: their times do not compare."]
    runs[1][1]["data"]["source"] = "other images"
    assert any("accuracies do not compare" in sentence for sentence in compare.caveats(runs))
    assert compare.differences([runs[0], runs[0]]) == {} and compare.caveats([runs[0], runs[0]]) == []


def test_the_page_of_several_runs(folders):
    runs = compare.load_runs(folders)
    runs = [(HOSTILE, runs[0][1]), *runs[1:]]
    text = compare.render(runs)
    outline = Outline(text)
    assert HOSTILE not in text and outline.text.count(HOSTILE) >= 4
    charts = [a["aria-label"] for a in outline.all("svg") if "chart" in a["class"].split()]
    assert len(charts) == 6 and f"{HOSTILE} npu 3.456k" in charts[0]
    # Of all files of both runs: the smallest, which no other beats.
    assert charts[0].endswith("Pareto front: two reference.")
    assert [a["href"][1:] for a in outline.all("a")] == [a["id"] for _, a in outline.elements if "id" in a]


def test_the_command(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = call("report", *folders)
    assert ended.exit_code == 0 and "UNDECIDED" in ended.output and "their times do not compare" in ended.output
    assert (tmp_path / "comparison.html").read_text().startswith("<!doctype html>")
    comparison = json.loads(call("report", *folders, "--json", "--out", "x.html").stdout)
    assert [run["name"] for run in comparison["runs"]] == ["one", "two"] and (tmp_path / "x.html").exists()
    assert comparison["differences"]["distill.temperature"] == [4.0, 8.0]
    (folders[0] / "report.html").unlink()
    ended = call("report", "one")
    assert ended.exit_code == 0 and "reference" in ended.output
    assert "Accuracy of the student" in (folders[0] / "report.html").read_text()


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "no report.json in .*Has the run finished"),
        ("{", "is damaged"),
        ("[1]", "is not the report of a run: it lacks recipe, models"),
        ('{"recipe": {}}', "it lacks models, data"),
    ],
)
def test_what_is_no_run_is_one_message_and_status_2(folders, tmp_path, content, message):
    other = tmp_path / "other"
    other.mkdir()
    if content is not None:
        (other / "report.json").write_text(content)
    ended = call("report", folders[0], other, "--out", tmp_path / "page.html")
    assert ended.exit_code == 2 and re.search(message, ended.output), ended.output
    assert "Traceback" not in ended.output and not (tmp_path / "page.html").exists()


def test_a_sweep_and_the_same_run_twice_are_refused(folders, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/sweep.json").write_text("{}")
    with pytest.raises(InputError, match="folder of a sweep"):
        compare.load_report(tmp_path / "sweep")
    with pytest.raises(InputError, match="one' twice"):
        compare.load_runs([folders[0], folders[0] / "report.json"])


def test_equal_names_of_folders_get_longer_paths(folders, tmp_path):
    (tmp_path / "more").mkdir()
    again = (tmp_path / "more/one").resolve()
    again.symlink_to(tmp_path / "two")
    copy = tmp_path / "more/two"
    copy.mkdir()
    (copy / "report.json").write_text(json.dumps(report()))
    assert [name for name, _ in compare.load_runs([folders[1], copy])] == [f"{tmp_path.name}/two", "more/two"]


def test_the_command_imports_no_tensorflow(folders):
    code = (
        "import sys\nfrom kdistill.cli.commands import app\n"
        f"try: app(['report', {str(folders[0])!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'tensorflow', 'keras', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
