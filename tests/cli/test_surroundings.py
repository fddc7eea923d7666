"""Commands in unusual surroundings: signals, closed streams, encodings, no home, another backend."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

WAITS = (
    "import sys, tempfile, time\n"
    "from kdistill.cli.app import app, command\n"
    "@command\n"
    "def wait(out: str = '', resume: bool = False):\n"
    "    with tempfile.TemporaryDirectory():\n"
    "        print('ready', flush=True); time.sleep(60)\n"
    "class Slow:\n"
    "    def __del__(self):\n"
    "        print('ready', flush=True); time.sleep(60)\n"
    "@command\n"
    "def swallow(out: str = '', resume: bool = False):\n"
    "    with tempfile.TemporaryDirectory() as folder:\n"
    "        try:\n"
    "            Slow()\n"
    "            time.sleep(60)\n"
    "        finally: time.sleep(2.5); print('cleaned', flush=True)\n"
    "@command\n"
    "def speak(count: int = 1):\n"
    "    for _ in range(count): print('µ\\x1b' * 50)\n"
    "@command\n"
    "def fail(text: str = ''):\n"
    "    from kdistill.errors import InputError\n"
    "    raise InputError('name \\x1b[2J\\n\\x07' + text)\n"
    "app()\n"
)


def start(*words, **options):
    # A shell lets what it starts in the background ignore Ctrl-C, and a child inherits that from the tests.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, "-c", WAITS, *words], text=True, preexec_fn=heed, **options)


@pytest.mark.slow
@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_clean_up_and_say_how_to_go_on(tmp_path, number, status):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start("wait", "--out", "runs/a", env={**os.environ, "TMPDIR": str(tmp_path)}, **pipes) as process:
        assert process.stdout.readline() == "ready\n" and any(tmp_path.iterdir())
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == status and "--resume --out runs/a" in errors and "Traceback" not in errors
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_signal_that_python_drops_in_a_finalizer_is_not_lost(tmp_path):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start("swallow", env={**os.environ, "TMPDIR": str(tmp_path)}, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=120)
    assert process.returncode == 143 and output == "cleaned\n" and "Terminated. To go on" in errors
    assert not any(tmp_path.iterdir())


def test_a_broken_pipe_is_silent():
    with start("speak", "--count", "99999", stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(10)
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(120) in (0, 141) and errors == ""


def run(*words, **options):
    command = [sys.executable, "-c", WAITS, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)


@pytest.mark.slow
def test_output_that_is_not_utf8_and_streams_that_are_closed():
    for encoding in ("ascii", "latin-1"):
        ended = run("speak", env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}, encoding="latin-1")
        assert ended.returncode == 0 and ended.stderr == ""
    for closed in (">&-", "2>&-", "<&- >&- 2>&-"):
        for words, status in (("speak", 0), ("fail", 2)):
            line = f'exec {sys.executable} -c "$0" {words} {closed}'
            ended = subprocess.run(["sh", "-c", line, WAITS], capture_output=True, text=True, timeout=120, check=False)
            assert ended.returncode == status and "Traceback" not in ended.stderr


def test_control_characters_of_messages_are_escaped():
    ended = run("fail")
    assert ended.returncode == 2 and ended.stderr == "Error: name \\x1b[2J\n\\x07\n"


@pytest.mark.parametrize("change", [{"KDISTILL_CACHE": "~nosuch/cache"}, {"XDG_CACHE_HOME": "~nosuch"}])
def test_a_home_that_does_not_exist_is_one_message(change):
    command = [sys.executable, "-m", "kdistill.cli", "cache", "list"]
    environment = {key: value for key, value in os.environ.items() if key != "KDISTILL_CACHE"} | change
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2 and "Set KDISTILL_CACHE" in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("flags", [["-O"], ["-OO"], ["-W", "error"]])
def test_flags_of_python(flags):
    command = [sys.executable, *flags, "-m", "kdistill.cli", "list", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)


def test_another_backend_is_refused_in_a_second():
    command = [sys.executable, "-m", "kdistill.cli", "run", "mnist", "--variant", "smoke"]
    started = time.monotonic()
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 2 and "KERAS_BACKEND is 'torch'" in ended.stderr
    assert time.monotonic() - started < 10  # a second on an idle machine


NO_HOME = (
    "import os, pwd, sys\n"
    "os.environ.pop('HOME', None)\n"
    "def unnamed(*ids): raise KeyError('no name for this uid')\n"
    "pwd.getpwuid = pwd.getpwnam = unnamed\n"
    "from kdistill import cli\n"
    "cli.main()\n"
)


@pytest.mark.parametrize(
    "words,change,status,message",
    [
        (["list"], {}, 0, "mnist"),
        (["cache", "list"], {}, 2, "Set KDISTILL_CACHE to a folder"),
        (["cache", "list"], {"KDISTILL_CACHE": "~nosuch"}, 2, "Set KDISTILL_CACHE to a folder"),
        (["cache", "list"], {"KDISTILL_CACHE": "/nowhere"}, 0, ""),
        (["evaluate", "x.tflite", "--data", "cifar10"], {}, 2, "Give --data-dir"),
        (["evaluate", "x.tflite", "--data", "imagenet", "--image-size", "64"], {}, 2, "Set TFDS_DATA_DIR to a folder"),
        (["evaluate", "x.tflite", "--data", "cifar10"], {"TFDS_DATA_DIR": "~nosuch/x"}, 2, "Set TFDS_DATA_DIR"),
    ],
)
def test_a_uid_without_a_name_and_a_home(words, change, status, message):
    drop = ("KDISTILL_CACHE", "XDG_CACHE_HOME", "TFDS_DATA_DIR")
    environment = {key: value for key, value in os.environ.items() if key not in drop} | change
    ended = subprocess.run(
        [sys.executable, "-c", NO_HOME, *words], capture_output=True, text=True, env=environment, check=False
    )
    assert ended.returncode == status and message in ended.stdout + ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr and len(ended.stderr.splitlines()) == (status == 2)
