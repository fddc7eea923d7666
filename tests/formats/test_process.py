"""A teacher's process: what it prints, raises and does wrong is one message, and what it finished is kept."""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import numpy as np
import pytest

from kdistill.errors import InputError
from kdistill.formats import process, server
from kdistill.formats.process import Process

IMAGES = np.random.default_rng(0).random((6, 5, 4, 1), np.float32)
ROWS = "import numpy as np\ndef predict(images):\n    return images.reshape(len(images), -1)[:, :3]\n"


def opened(folder, script: str, **options) -> Process:
    path = folder / "teacher.py"
    path.write_text(script)
    return Process("Python file", str(path), "teacher", **{"timeout": 60, **options})


def test_batches_of_any_size_and_what_is_printed(tmp_path):
    script = f"print('loaded', flush=True)\ninput_closed = __import__('sys').stdin.read() == ''\n{ROWS}"
    script = script.replace("    return", "    print('seen', images.shape, input_closed)\n    return")
    teacher = opened(tmp_path, script)
    for count in (6, 2, 300):  # the last one needs more shared memory
        images = np.resize(IMAGES, (count, *IMAGES.shape[1:]))
        outputs = teacher.ask(images)
        np.testing.assert_array_equal(outputs, images.reshape(count, -1)[:, :3])
        assert outputs.dtype == np.float32
    assert teacher.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert teacher.versions["numpy"] == np.__version__
    teacher.log_to(tmp_path / "run" / "teacher.log")
    teacher.ask(IMAGES)
    teacher.close()
    lines = (tmp_path / "run" / "teacher.log").read_text().splitlines()
    assert lines[0] == "loaded" and lines[-1] == "seen (6, 5, 4, 1) True" and len(lines) == 5
    with pytest.raises(InputError, match="has ended. Open the teacher again"):
        teacher.ask(IMAGES)


@pytest.mark.parametrize(
    "body, message",
    [
        ("return np.full((len(images), 3), np.nan)", "it gave NaN or infinity for 6 of 6 images"),
        ("return np.zeros((len(images) - 1, 3))", r"it gave outputs \(5, 3\) for 6 images; expected \[6, classes\]"),
        ("return np.zeros((len(images), 2, 2))", r"it gave outputs \(6, 2, 2\) for 6 images"),
        ("return np.zeros((len(images), 1))", "one number for each image; expected one for each of two classes"),
        ("return images[:, :, 0, 0].argmax(axis=1)", "its outputs are int64; expected floating-point logits"),
        ("return np.array([['a', 'b']] * len(images))", "its outputs are <U1; expected floating-point"),
        ("return {'logits': images}", "predict returned a dict; expected one array"),
        ("return [[1.0, 2.0]] * len(images)", "predict returned a list; expected one array"),
        ("return np.zeros((len(images), 3), complex)", "its outputs are complex128"),
        ("raise KeyError('layer 7')", r"failed on a batch \[6, 5, 4, 1\]: KeyError: 'layer 7'"),
        ("import sys; sys.exit(3)", r"failed on a batch \[6, 5, 4, 1\]: SystemExit: 3"),
        ("return None", "its outputs are object"),
    ],
)
def test_outputs_that_cannot_be_used(tmp_path, body, message):
    teacher = opened(tmp_path, f"import numpy as np\ndef predict(images):\n    {body}\n")
    with pytest.raises(InputError, match=f"The teacher 'teacher': .*{message}"):
        teacher.ask(IMAGES)
    assert teacher.restarts == 0  # it would do the same again
    teacher.close()


@pytest.mark.parametrize(
    "script, message",
    [
        ("import no_such_package\n", "cannot be run: ModuleNotFoundError: No module named 'no_such_package'"),
        ("'''Needs torch 3.'''\nimport no_such_package\n", "Its docstring says: Needs torch 3."),
        ("def predict(images)\n", "cannot be run: SyntaxError"),
        ("x = 1\n", r"defines no function predict\(images\)"),
        ("raise SystemExit(2)\n", "cannot be run: SystemExit: 2"),
        (
            "import os\nprint('so long', flush=True)\nos._exit(7)\n",
            "ended with exit status 7 at its start. .*'so long'",
        ),
    ],
)
def test_files_that_do_not_start(tmp_path, script, message):
    with pytest.raises(InputError, match=message):
        opened(tmp_path, script)


def test_a_process_that_dies_is_restarted_once(tmp_path):
    dies = (
        "import os, signal\ndef predict(images):\n    if not os.path.exists({0!r}):\n        open({0!r}, 'w').close()\n"
    )
    dies += "        os.kill(os.getpid(), signal.SIGKILL)\n    return images.reshape(len(images), -1)[:, :3]\n"
    said = []
    teacher = opened(tmp_path, dies.format(str(tmp_path / "flag")), say=said.append)
    np.testing.assert_array_equal(teacher.ask(IMAGES), IMAGES.reshape(6, -1)[:, :3])
    assert said == ["The teacher 'teacher' ended by signal 9. Its process is restarted once."] and teacher.restarts == 1
    (tmp_path / "flag").unlink()
    with pytest.raises(InputError, match="'teacher' ended by signal 9, after it was restarted"):
        teacher.ask(IMAGES)
    teacher.close()


@pytest.mark.slow
def test_a_process_that_hangs_is_ended(tmp_path):
    script = "import time\ndef predict(images):\n    time.sleep(60)\n"
    teacher = opened(tmp_path, script, timeout=0.6)
    start, child = time.monotonic(), teacher._child
    message = r"did not answer a batch \[6, 5, 4, 1\] within 0.6 s, again after a restart"
    with pytest.raises(InputError, match=message):
        teacher.ask(IMAGES)
    assert time.monotonic() - start < 10 and child.poll() is not None
    with pytest.raises(InputError, match="did not start within 0.3 s at its start"):
        opened(tmp_path, "import time\ntime.sleep(60)\n", timeout=0.3)


def test_interpreters_that_are_none(tmp_path):
    with pytest.raises(InputError, match="no interpreter '/nowhere/python' that can be run. Give --teacher-python"):
        opened(tmp_path, ROWS, python="/nowhere/python")
    for command in ("false", "cat"):  # one that fails, and one that says something else
        # cat may still be writing when nobody reads on: then SIGPIPE ends it.
        with pytest.raises(InputError, match="ended (with exit status 1|by signal 13) at its start"):
            opened(tmp_path, ROWS, python=command)


def test_a_process_is_used_again_and_ends_with_its_last_user(tmp_path):
    (tmp_path / "t.py").write_text(ROWS)
    one, two = (process.open_process("Python file", str(tmp_path / "t.py"), "t", {}, None, 60) for _ in range(2))
    child = one._child
    assert one is two
    process.close_all()
    assert child.poll() is not None
    three = process.open_process("Python file", str(tmp_path / "t.py"), "t", {}, None, 60)
    assert three is not one
    process.close_all()


def test_memory_that_both_map_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    teacher = opened(tmp_path, ROWS)
    teacher.ask(IMAGES)
    assert not list((tmp_path / "temporary").iterdir())
    teacher.close()


# -- addresses --------------------------------------------------------------------------------------------------------


class Answering(BaseHTTPRequestHandler):
    """Answers by the path: /rows as it should."""

    def do_POST(self):
        images = np.load(BytesIO(self.rfile.read(int(self.headers["Content-Length"]))), allow_pickle=False)
        answer, content = self.path, BytesIO()
        if answer == "/moved":
            self.send_response(302)
            self.send_header("Location", "/rows")
            self.end_headers()
            return
        if answer == "/busy":
            self.send_error(503, "overloaded")
            return
        if answer == "/slow":
            time.sleep(1)
        if answer == "/pickle":
            np.save(content, np.array([{"a": 1}] * len(images), object), allow_pickle=True)
        elif answer == "/text":
            content.write(b"<html>hello</html>")
        else:
            np.save(content, images.reshape(len(images), -1)[:, :3].astype(np.float64))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content.getvalue())

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_an_address_takes_and_gives_npy(address):
    teacher = Process("address", f"{address}/rows", "rows", timeout=20)
    np.testing.assert_array_equal(teacher.ask(IMAGES), IMAGES.reshape(6, -1)[:, :3])
    teacher.close()


@pytest.mark.parametrize(
    "path, message",
    [
        ("/moved", "redirects to http://.*/rows .status 302.. Redirects are not followed"),
        ("/busy", "answers with status 503"),
        ("/slow", "/slow does not answer within 0.5 s"),
        ("/pickle", "does not answer with .npy"),
        ("/text", "does not answer with .npy .its answer begins with b'<html>hello</html>'"),
    ],
)
def test_addresses_that_answer_wrongly(address, path, message):
    teacher = Process("address", address + path, "address", timeout=0.5)
    with pytest.raises(InputError, match=message):
        teacher.ask(IMAGES)
    teacher.close()


def test_an_address_where_nobody_is():
    teacher = Process("address", "http://127.0.0.1:9/none", "none", timeout=5)
    with pytest.raises(InputError, match="http://127.0.0.1:9/none does not answer within 5 s .*refused"):
        teacher.ask(IMAGES)
    teacher.close()


def test_frames():
    stream = BytesIO()
    server.write_frame(stream, {"a": 1}, b"xyz")
    stream.seek(0)
    assert server.read_frame(stream) == ({"a": 1}, b"xyz")
    assert server.read_frame(stream) is None
    assert server.read_frame(BytesIO(b"Python 3.11 is not a teacher\n")) is None
