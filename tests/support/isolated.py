"""Processes of `python -m kdistill.tflite...` without the start of Python: forks of one that has imported LiteRT.

A trial run of a `.tflite` stays a process of its own, that may crash and be killed. A new Python needs a quarter of a
second of CPU for its imports, three times in every export; a fork has them already.
"""

import contextlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from types import SimpleNamespace

ROOT = str(Path(__file__).resolve().parents[2])


class Forks:
    """`run` is `subprocess.run` as `kdistill.tflite.interpreter` calls it."""

    def __init__(self):
        self._parent, self._lock = None, threading.Lock()

    def run(self, command, *, env, timeout, **options):
        ours = command[:3] == [sys.executable, "-P", "-m"] and command[3].startswith("kdistill.tflite.")
        if not ours or env["PYTHONPATH"].split(os.pathsep)[0] != ROOT:
            return subprocess.run(command, env=env, timeout=timeout, **options)
        with self._lock, tempfile.TemporaryDirectory() as folder:
            if self._parent is None:
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                self._parent = subprocess.Popen([sys.executable, __file__], env=env, **pipes)
            files = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            job = {"module": command[3], "arguments": command[4:], "env": env, "cwd": os.getcwd(), "files": files}
            print(json.dumps(job), file=self._parent.stdin, flush=True)
            pid = int(self._parent.stdout.readline())
            late = not select.select([self._parent.stdout], [], [], timeout)[0]
            if late:
                os.kill(pid, signal.SIGKILL)
            status = int(self._parent.stdout.readline())
            if late:
                raise subprocess.TimeoutExpired(command, timeout)
            return subprocess.CompletedProcess(command, status, *(Path(file).read_text() for file in files))

    def close(self) -> None:
        if self._parent is not None:
            self._parent.communicate()
            self._parent = None

    def as_subprocess(self) -> SimpleNamespace:
        """What stands in the place of the module `subprocess`."""
        return SimpleNamespace(run=self.run, TimeoutExpired=subprocess.TimeoutExpired)


def _fork(job: dict) -> int:
    """The process id of a fork that runs the job."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for number, file in enumerate(job["files"], start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["cwd"])
        os.environ.clear()
        os.environ.update(job["env"])
        sys.argv = [job["module"], *job["arguments"]]
        runpy.run_module(job["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import ai_edge_litert.interpreter  # noqa: F401 - the forks have it

    for line in sys.stdin:
        pid = _fork(json.loads(line))
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    sys.path[0] = ROOT
    _serve()
