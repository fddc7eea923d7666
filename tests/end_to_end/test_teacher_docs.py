"""The blocks of docs/teachers.md run, one after the other, and every command opens the file that they made."""

import re
import shlex
import warnings

import numpy as np
import pytest
import tensorflow as tf
from support.pages import ROOT, blocks

from kdistill.cli.teacher import OPTIONS, network_of, settings
from kdistill.formats import process
from kdistill.teachers.as_model import load_teacher

pytestmark = pytest.mark.slow

PATH = ROOT / "docs" / "teachers.md"
PAGE = PATH.read_text()


@pytest.mark.exhaustive
def test_the_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras calls .h5 legacy; the weights of these teachers are random
        for block in blocks(PATH):
            if block.kind == "python" and not block.mark_of("not run"):
                exec(block.code, names)
    commands = re.findall(r"^kdistill run mnist (--teacher .*)$", PAGE, re.MULTILINE)
    assert len(commands) == 6
    images = tf.constant(names["images"])
    outputs = {}
    for command in commands:
        words = shlex.split(command)
        given = dict(zip(words[::2], words[1::2], strict=True))
        file = given.pop("--teacher")
        options = {name: given.pop(f"--teacher-{name}", None) for name in OPTIONS}
        assert not given
        teacher = load_teacher(network_of(settings(file, options)), (28, 28, 1), 10)
        outputs[file] = np.asarray(teacher.model(images))
        assert outputs[file].shape == (64, 10)
    process.close_all()
    for name in ("teacher.h5", "saved_model", "teacher.tflite"):
        np.testing.assert_allclose(outputs[name], outputs["teacher.keras"], atol=1e-4)


def test_the_page_has_every_option():
    for name in OPTIONS:
        assert f"--teacher-{name}" in PAGE, name
