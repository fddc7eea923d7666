"""What a user sees in a terminal: one screen of results, color, the page in a browser, completion."""

import os
import re
import shutil
import subprocess
import sys
import webbrowser

import pytest
import typer
from support.reports import report
from support.scripts import call

from kdistill.cli import app
from kdistill.report import page


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    page.save(report(), folder)
    return folder


class Terminal:
    """A stream that keeps what is written, and says that it is a terminal."""

    def __init__(self):
        self.text, self.encoding = "", "utf-8"

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    @property
    def lines(self):
        return re.sub(r"\x1b\[[\d;]*m", "", self.text).splitlines()

    def flush(self):
        pass


def test_open_shows_the_page_and_warns_without_a_browser(run_folder, monkeypatch, tmp_path):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.append(address) or len(opened) < 3)
    assert call("report", run_folder).exit_code == 0 and not opened
    assert call("report", run_folder, "--open").exit_code == 0
    other = tmp_path / "other.html"
    shutil.copytree(run_folder, tmp_path / "again")
    assert call("report", run_folder, tmp_path / "again", "--out", other, "--open").exit_code == 0
    assert opened == [(run_folder / "report.html").as_uri(), other.as_uri()]
    ended = call("report", run_folder, "--open")
    assert ended.exit_code == 0 and "Warning: There is no browser here. Open '" in ended.stderr
    for command in ("run", "sweep"):
        assert "--open" in call(command, "--help").output


def test_a_run_ends_with_one_screen_of_80_columns(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdout", terminal)
    run = {**report(), "folder": "run"}
    run["models"] = [row for row in run["models"] if len(row["name"]) < 20]
    app.show_report(run)
    lines = terminal.lines
    table = [line for line in lines if line[:1] in "┃│"]
    assert max(map(len, table)) <= 80 and len(lines) <= 30
    titles = re.findall(r"[^┃]+", table[0])
    assert [title.strip() for title in titles] == list(app.MAIN_COLUMNS)
    assert any(line.startswith("Student and control cannot be told apart: +4.2 points") for line in lines)
    assert any("UNDECIDED" in line for line in lines)
    wide = Terminal()
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "stdout", wide)
    app.show_report(run)
    assert "ECE %" in wide.text and "KL to teacher" in wide.text


@pytest.mark.parametrize("text,color", [("Error: bad: worse", "red"), ("Warning: two: parts", "yellow")])
def test_the_first_word_is_in_color_in_a_terminal_only(text, color, monkeypatch):
    word, _, more = text.partition(":")
    colored = f"{typer.style(word + ':', fg=color, bold=True)}{more}\n"
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    app.print_in_color(text, color)
    assert sys.stderr.text == colored and "\x1b[" in colored
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", Terminal())
    app.print_in_color(text, color)
    assert sys.stderr.text == f"{text}\n"


@pytest.mark.slow
def test_the_shell_completes_commands_options_and_recipes(tmp_path):
    (tmp_path / "mine.py").write_text("")

    def complete(*words: str) -> list[str]:
        environment = {"_KDISTILL_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words)}
        environment |= {"COMP_CWORD": str(len(words) - 1)}
        code = "from kdistill.cli.commands import app; app(prog_name='kdistill')"
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=os.environ | environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        ).stdout.split()

    assert complete("kdistill", "comp") == ["compress"]
    assert complete("kdistill", "run", "--stra") == ["--strategy"]
    assert complete("kdistill", "run", "m") == ["mnist", "mnist_linear", "mine.py"]
