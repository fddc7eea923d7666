"""All blocks of code and commands of README and docs run, a page from top to bottom in one folder and namespace.

A block of Python is executed; the comment behind a `print` is its output. A command of a block runs in this process;
what would train for minutes runs up to its training: arguments, recipe, data, teacher and the folder are checked.
What needs a network, a GPU, a phone or hours is marked on the page, `<!-- not run: REASON -->`, or is a script of
`benchmarks/`, whose file and options are looked up. `<!-- raises: TEXT -->` stands before a block that shows an error.

A page may use a trained `student` and `teacher` of digits, `x_train`, `y_train`, `x_val`, ..., `images`, `labels`,
`splits`, the files `student.keras` and `teacher.keras`, `model.keras` (of pixels from 0 to 1), some `.tflite` files,
folders of images in `images/`, and begun and finished runs in `runs/`.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import keras
import numpy as np
import pytest
import typer
from support.image_files import folders
from support.pages import COMMAND, PAGES, ROOT, blocks, inline_commands
from support.reports import report
from support.scripts import call

import kdistill
from kdistill.cli.commands import app
from kdistill.data.splits import load
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import Data
from kdistill.report import page as report_page

ELSEWHERE = {"teachers.md"}  # run by end_to_end/test_teacher_docs.py, which compares what its teachers give
NETWORK = {"pip", "git"}
TRAINING = {"run", "sweep", "plan", "compress"}
REASONS = ("needs", "takes", "is a server")


class TrainingStarts(Exception):
    """Everything that a command checks before its training is done."""


def _start(*_, **__):
    raise TrainingStarts


def reason_not_to_run(block) -> str:
    """Why a block does not run here; empty if it does."""
    if block.mark_of("not run"):
        return block.mark_of("not run")
    if block.kind == "sh":
        programs = {words[0] for words in block.commands}
        if programs & NETWORK:
            return "needs a network"
        if any(words[:2][-1].startswith("benchmarks/") for words in block.commands):
            return "takes minutes to hours: a script of benchmarks/"
        if "make" in programs:
            return "takes minutes: a target of the Makefile"
    return ""


CODE = [block for page in PAGES for block in blocks(page) if block.kind in ("python", "sh")]


def test_most_blocks_run(capsys):
    """The count, which the output shows; with what does not run, and why."""
    left_out = Counter(filter(None, map(reason_not_to_run, CODE)))
    running = len(CODE) - sum(left_out.values())
    commands = [len(block.commands) for block in CODE if block.kind == "sh" and not reason_not_to_run(block)]
    with capsys.disabled():
        print(f"\n{len(CODE)} blocks of code on {len(PAGES)} pages: {running} run, with {sum(commands)} commands.")
        for reason, count in left_out.most_common():
            print(f"  {count} not run: {reason}")
    assert running >= 80
    assert all(reason.startswith(REASONS) for reason in left_out), left_out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_state_their_language_and_commands_exist(page):
    for block in blocks(page):
        assert block.kind, f"{block.place} expects a language: python, sh, text, ..."
        assert block.kind == "sh" or not COMMAND.search(block.code) or block.kind == "python", block.place
        if block.kind == "sh":
            for words in block.commands:
                _look_up(words, block.place)
    for command in inline_commands(page):
        _parse(command, page.name)


def _look_up(words: list[str], place: str) -> None:
    """A script and its options, or a target of the Makefile."""
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:2]) <= set(targets), place
    if words[:2][-1].startswith("benchmarks/"):
        source = (ROOT / words[1]).read_text()
        own = words[2 : words.index("--")] if "--" in words else words[2:]
        if words[1] not in ("benchmarks/two_workers.py",):  # passes its options on to `kdistill run`
            assert all(f'"{word}"' in source for word in own if word.startswith("--")), place


def _parse(command: str, place: str) -> None:
    """The command and its options exist; placeholders in capitals and three dots stand for anything."""
    words = command.split()[1:]
    words = [word for word in words if word not in ("...", "|", "verify", "list", "prune") or words[0] == word]
    group = typer.main.get_command(app)
    found = group.commands.get(words[0])
    assert found is not None, f"{place}: {command}"
    while hasattr(found, "commands") and len(words) > 1 and words[1] in found.commands:
        found, words = found.commands[words[1]], words[1:]
    options = {name for parameter in found.params for name in parameter.opts} | {"--help"}
    named = {word.partition("=")[0].rstrip(",.;") for word in words if word.startswith("--")}
    assert named <= options, f"{place}: {command}: {named - options}"


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """A folder with the files, and the names, that pages may use."""
    folder = tmp_path_factory.mktemp("workshop")
    splits = load(Data(train_limit=700), say=lambda text: None)
    keras.utils.set_random_seed(0)

    def network(width):
        layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten(), keras.layers.Dense(width, "relu")]
        model = keras.Sequential([keras.Input((28, 28, 1)), *layers, keras.layers.Dense(10)])
        model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(splits.train.images, splits.train.labels, batch_size=32, epochs=4, verbose=0)
        model.save(folder / f"{'teacher' if width > 16 else 'student'}.keras")
        return model

    names = {"teacher": network(64), "student": network(16), "splits": splits}
    for part, split in (("train", splits.train), ("val", splits.validation), ("test", splits.test)):
        names |= {f"x_{part}": split.images.astype("float32"), f"y_{part}": split.labels}
    names |= {"images": names["x_train"][:64], "labels": names["y_train"][:64]}
    names |= {"keras": keras, "kdistill": kdistill, "np": np}
    _scaled_model(splits).save(folder / "model.keras")
    kdistill.export(names["student"], folder / "reference", "reference")
    for place in ("npu", "files/npu"):
        shutil.copytree(folder / "reference", folder / place)
    folders(folder / "images", parts=("train", "test"), count=10)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("kdistill.runs.arms.Arms.fit_teacher", _start)
        call("run", "mnist", "--variant", "smoke", "--out", str(folder / "runs" / "mnist-smoke-1"))
    report_page.save(report(), folder / "runs" / "mnist-smoke-1")
    shutil.copytree(folder / "runs" / "mnist-smoke-1", folder / "runs" / "mnist-smoke-2")
    return folder, names


def _scaled_model(splits) -> keras.Model:
    """A model that takes pixels from 0 to 1."""
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten(), keras.layers.Dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(splits.train.images / 255, splits.train.labels, epochs=3, verbose=0)
    return model


@contextlib.contextmanager
def no_training():
    """Commands that train for minutes raise `TrainingStarts` where their training starts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("kdistill.runs.arms.Arms.fit_teacher", _start)
        monkeypatch.setattr("kdistill.runs.compressions.compress", _start)
        yield


RUNNING = [page for page in PAGES if page.name not in ELSEWHERE and any(block.page == page for block in CODE)]


@pytest.mark.exhaustive(
    "docs/cache.md",
    "docs/compression.md",
    "docs/export.md",
    "docs/from/tfmot.md",
    "docs/heads.md",
    "docs/howto/few-labels.md",
    "docs/howto/mediapipe.md",
    "docs/howto/own-data.md",
    "docs/howto/own-teacher.md",
    "docs/howto/phone.md",
    "docs/tutorial.md",
    "docs/methods.md",
    "docs/howto/resume.md",
    "docs/howto/sweeps.md",
)
@pytest.mark.slow
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_run(page, workshop, capsys, tmp_path, monkeypatch):
    shutil.copytree(workshop[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    names = {} if page.name in ("README.md", "heads.md") else dict(workshop[1])
    for block in blocks(page):
        if block.kind not in ("python", "sh") or reason_not_to_run(block):
            continue
        if block.kind == "sh":
            with no_training():
                for words in block.commands:
                    _run(words, block.place)
            continue
        capsys.readouterr()
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # teachers at random, and fits of one epoch
            if block.mark_of("raises"):
                with pytest.raises((InputError, CheckFailed), match=re.escape(block.mark_of("raises"))):
                    exec(code, names)
            else:
                exec(code, names)
        printed = capsys.readouterr().out
        for comment in re.findall(r"^print\(.*\)  # (.*)$", block.code, re.MULTILINE):
            pattern = re.escape(_words(comment)).replace(re.escape("..."), ".*")
            assert re.search(pattern, _words(printed)), f"{block.place}: expected {comment}, printed {printed}"
        if page.name == "README.md":
            accuracies = [float(line.rstrip("%")) for line in printed.splitlines() if re.fullmatch(r"[\d.]+%", line)]
            assert len(accuracies) == 3 and min(accuracies) > 94


def _words(text: str) -> str:
    """A text without the quotes and brackets of Python's values."""
    return re.sub(r"[\[\]{}()'\"]", "", text)


def _run(words: list[str], place: str) -> None:
    if words[0] == "kdistill":
        ended = call(*words[1:])
        trains = words[1] in TRAINING and "--help" not in words
        reached = isinstance(ended.exception, TrainingStarts)
        assert reached if trains else ended.exit_code == 0, f"{place}: {' '.join(words)}\n{ended.output}"
        return
    words = [sys.executable, str(ROOT / words[1]), *words[2:]] if words[0] == "python" else words
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, f"{place}: {ended.stderr}"


def test_the_readme_is_short():
    assert len(Path(ROOT, "README.md").read_text().splitlines()) <= 120
