"""The process in which TFLite's quantizer runs, because it can crash. It is started once, and again after a crash.

Starting it takes as long as importing TensorFlow, so that `start` begins early, in the background, and the process
stays for further conversions. It ends with this process, or after some minutes without a job.
"""

import atexit
import contextlib
import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path

from kdistill.conversion.tflite_converter import CONTENT, Job, Refusal, as_line
from kdistill.tflite.interpreter import module_command

SECONDS = 3600  # for one conversion; calibration runs every image through kernels that are not fast


class Crash(Exception):
    """The process has ended without an answer. `status`: its exit status, below 0 for a signal; None: it took too long.

    `text` is the last line of its standard error.
    """

    def __init__(self, status: int | None, text: str = ""):
        super().__init__(text)
        self.status, self.text = status, text


class _Worker:
    """The process, with its pipes. Only the process that has started it may use it, and one thread at a time."""

    def __init__(self):
        command, environment = module_command("conversion.tflite_converter")
        # Conversion needs no GPU, whose memory may belong to this process.
        environment |= {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self.owner, self.errors = os.getpid(), tempfile.TemporaryFile()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def usable(self) -> bool:
        return self.owner == os.getpid() and self.process.poll() is None

    def answer(self, line: str) -> dict:
        """The answer to a line. Raises `Crash`, and `BrokenPipeError` if the process has ended before the line came."""
        self.process.stdin.write(line)
        self.process.stdin.flush()
        received = []
        # A thread, because a pipe has no time limit on every system.
        reader = threading.Thread(target=lambda: received.append(self.process.stdout.readline()), daemon=True)
        reader.start()
        try:
            reader.join(SECONDS)
            if reader.is_alive():
                raise Crash(None)
        except BaseException:  # Ctrl-C too: the next job must not get this answer
            self.close()
            raise
        if received and received[0].endswith("\n"):
            return json.loads(received[0])
        status = self.process.wait()
        if status == 0:  # it was idle, and ended while the line was on its way
            raise BrokenPipeError
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        self.close()
        raise Crash(status, lines[-1] if lines else "")

    def close(self) -> None:
        if self.owner != os.getpid():  # a fork: the process is not a child of this one
            return
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):  # a line that was not read is discarded
                pipe.close()
        self.errors.close()


_lock = threading.Lock()
_worker: _Worker | None = None


def start() -> None:
    """Starts the process in the background, if it does not run. Call it as soon as a conversion is foreseen."""
    with _lock:
        _running()


def convert(job: Job) -> bytes:
    """The bytes of the `.tflite`. Raises `Refusal` and `Crash`, and `OSError` such as of a full disk."""
    _answer("convert", job)
    return Path(job.folder, CONTENT).read_bytes()


def find_fault(job: Job) -> dict | None:
    """What stopped the quantizer, probably; see `tflite_converter.find_fault`. None where that is unknown."""
    try:
        return _answer("find_fault", job)["fault"]
    except (Refusal, Crash):
        return None


def stop() -> None:
    """Ends the process, if it runs."""
    global _worker
    with _lock:
        if _worker is not None:
            _worker.close()
            _worker = None


def _answer(task: str, job: Job) -> dict:
    with _lock:
        for last in (False, True):
            try:
                reply = _running().answer(as_line(task, job))
                break
            except BrokenPipeError:
                if last:
                    raise Crash(0) from None
    if "refusal" in reply:
        raise Refusal([tuple(operator) for operator in reply["refusal"]["operators"]], reply["refusal"]["text"])
    if "os_error" in reply:
        raise OSError(*reply["os_error"])
    return reply


def _running() -> _Worker:
    global _worker
    if _worker is None or not _worker.usable():
        if _worker is not None:
            _worker.close()
        _worker = _Worker()
    return _worker


atexit.register(stop)
