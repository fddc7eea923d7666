"""A `report.json` from elsewhere: damaged values are one message, names in it and links lead to no other file."""

import copy
import hashlib
import json
import os
import random

import pytest
from support.reports import images, report
from support.scripts import call

from kdistill.errors import InputError
from kdistill.report import compare, page

VALUES = (None, True, -1, 0, 0.5, 3, 10**400, 1e308, -1e-320, "", "x", "\x1b[31m", [], [None], {}, {"a": 1}, [[[]]])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run/differences").mkdir(parents=True)
    for name, content in images().items():
        (tmp_path / "run" / name).write_bytes(content)
    page.save(report(), tmp_path / "run")
    return tmp_path / "run"


def places(value, path=()):
    """The path of every value inside of a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


@pytest.mark.slow
def test_every_damaged_value_is_a_page_or_one_message(folder):
    """Each value of a report is deleted and replaced by values of other types, sizes and signs."""
    whole, draw = json.loads((folder / "report.json").read_text()), random.Random(0)
    refused = 0
    for path in draw.sample(list(places(whole)), 150):
        for value in draw.sample(("delete", *VALUES), 2):
            damaged = copy.deepcopy(whole)
            owner = damaged
            for key in path[:-1]:
                owner = owner[key]
            if value == "delete":
                del owner[path[-1]]
            else:
                owner[path[-1]] = value
            (folder / "report.json").write_text(json.dumps(damaged))
            try:
                runs = compare.load_runs([folder])
            except InputError:
                refused += 1
                continue
            page.render(runs[0][1], page.read_pictures(runs[0][1], folder) if path[0] != "differences" else {})
            compare.render([*runs, ("whole", whole)])
            compare.run_table(runs)
    assert refused > 100


@pytest.mark.parametrize("name", ["../victim.png", "/etc/passwd", "differences/../../victim.png", "a\0", "loop", "out"])
def test_a_picture_outside_of_the_folder_is_refused(folder, tmp_path, name):
    (tmp_path / "victim.png").write_bytes(b"\x89PNG\r\n\x1a\nsecret")
    os.symlink("loop", folder / "loop")
    os.symlink(tmp_path / "victim.png", folder / "out")
    content = report()
    content["differences"]["pictures"][0]["file"] = name
    (folder / "report.json").write_text(json.dumps(content))
    before = (folder / "report.html").read_bytes()
    ended = call("report", folder)
    assert ended.exit_code == 2 and "is no file inside of the folder" in ended.stderr, ended.output
    assert (folder / "report.html").read_bytes() == before


def test_a_picture_that_is_no_png_or_a_pipe_is_refused(folder):
    for change in (lambda path: path.write_text("text"), lambda path: (path.unlink(), os.mkfifo(path))):
        change(folder / "differences/000000.png")
        ended = call("report", folder)
        shown = "000000.png" in ended.stderr
        assert (ended.exit_code == 2 and shown) or ended.exit_code == 0, ended.output  # a pipe counts as missing


@pytest.mark.parametrize("link", [".part-report.html", "report.html", "report.md", ".part-report.json"])
def test_the_page_is_written_through_no_link(folder, tmp_path, link):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (folder / link).unlink(missing_ok=True)
    (folder / link).symlink_to(victim)
    assert call("report", folder).exit_code == 0
    assert victim.read_text() == "precious"
    assert (folder / "report.html").read_text().startswith("<!doctype html>")


def test_a_report_that_is_a_link_out_of_its_folder_is_not_read(folder, tmp_path):
    (tmp_path / "victim.json").write_text(json.dumps(report()))
    (folder / "report.json").unlink()
    (folder / "report.json").symlink_to(tmp_path / "victim.json")
    ended = call("report", folder)
    assert ended.exit_code == 2 and "is no file inside of the folder" in ended.stderr
    (folder / "report.json").unlink()
    os.mkfifo(folder / "report.json")
    assert call("report", folder).exit_code == 2


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 500 + "1" + "}" * 500, "9" * 5000, "\ufeff{}", "NaN"])
def test_json_that_exhausts_the_reader_is_one_message(folder, content):
    (folder / "report.json").write_text(content)
    ended = call("report", folder)
    assert ended.exit_code == 2 and "report.json'" in ended.stderr and "Traceback" not in ended.output


def finished(folder, stage, sha256):
    path = folder / "checkpoints" / stage / "finished.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"seconds": 1, **({} if sha256 is None else {"sha256": sha256})}))
    return path


def test_the_model_of_a_finished_stage_is_compared_with_its_record(folder, tmp_path):
    (folder / "student.keras").write_bytes(b"a model")
    digest = hashlib.sha256(b"a model").hexdigest()
    finished(folder, "student", digest)
    finished(folder, "control", None)  # of an earlier version
    finished(folder, "students-0", "0" * 64)  # a pass of a sweep, or a model that was deleted
    assert call("report", folder).exit_code == 0
    page_before = (folder / "report.html").read_bytes()

    def refused(*words):
        ended = call("report", *(words or [folder]))
        assert ended.exit_code == 2 and "Traceback" not in ended.output, ended.output
        assert (folder / "report.html").read_bytes() == page_before
        return ended.stderr

    for content in (b"A model", b"", b"a model" * 999):
        (folder / "student.keras").write_bytes(content)
        assert "is not the model with which the stage 'student' ended" in refused()
        assert "is not the model" in refused(folder / "report.json")
    (folder / "student.keras").write_bytes(b"a model")
    for damage in ("{", '{"sha256": 3}', "[" * 9999):
        (folder / "checkpoints/student/finished.json").write_text(damage)
        assert "finished.json' is damaged" in refused()
    finished(folder, "student", digest)
    (tmp_path / "secret.keras").write_bytes(b"a model")
    (folder / "student.keras").unlink()
    (folder / "student.keras").symlink_to(tmp_path / "secret.keras")
    assert "is no file inside of the folder" in refused()
    (folder / "student.keras").unlink()
    os.mkfifo(folder / "student.keras")
    assert call("report", folder).exit_code == 0


HOSTILE = "\x1b[2J\x9b31m\u202e[red]:smile:\nError: x"


def test_names_from_a_report_are_escaped_on_the_terminal(folder):
    content = report()
    content["models"][0]["name"] = HOSTILE
    content["verdict"]["sentence"] = HOSTILE
    (folder / "report.json").write_text(json.dumps(content))
    ended = call("report", folder)
    assert ended.exit_code == 0
    assert not {"\x1b", "\x9b", "\u202e"} & set(ended.output) and "\nError" not in ended.output
    assert r"\x1b[2J\x9b31m\u202e[red]:smile:\nError: x" in ended.stdout
