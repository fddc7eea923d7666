"""A process that runs a teacher's file: started, fed through shared memory, timed, and restarted once.

The other side is `server.py`. A crash, a hang or a print in the teacher's code is a message here, and no more.
"""

import atexit
import collections
import contextlib
import json
import mmap
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdistill.errors import InputError
from kdistill.formats import server

TIMEOUT = 120.0  # seconds for the start, and for each batch
LOG_LINES, LOG_BYTES = 200, 16 << 20  # lines that are kept for messages and for a log that is opened later; of a log
SHARED_MEMORY = Path("/dev/shm")


class Process:
    """A running teacher.

    Args:
        kind: one of `server.KINDS`.
        target: its file, folder or address.
        name: names the teacher in messages.
        options: of the kind.
        python: the interpreter to use; None: this one.
        timeout: seconds for the start and for each batch.
        say: receives a sentence when the process is restarted.

    Attributes:
        about: what the file says of itself, where it does: `shape` (of an image), `outputs`, `output`, `parameters`,
            `mean` and `std`.
        taps: the shapes of an example's taps by name, known after the first batch.
        versions: of Python and of the packages that the process has loaded.
        restarts: how often it was restarted: once at most.

    Raises `InputError` for an interpreter that does not exist, and a file that does not run.
    """

    def __init__(
        self,
        kind: str,
        target: str,
        name: str,
        options: dict | None = None,
        python: str | None = None,
        timeout: float | None = None,
        say: Callable[[str], None] | None = None,
    ):
        self.kind, self.target, self.name = kind, target, name
        self.timeout, self.say = TIMEOUT if timeout is None else timeout, say
        self.options = {**(options or {}), "timeout": self.timeout}
        # An address that is late is a message of the process itself, which need not be restarted.
        self._patience = 1.2 * self.timeout + 1 if kind == "address" else self.timeout
        self.python = _interpreter(python)
        self.about, self.versions, self.taps, self.restarts = {}, {}, {}, 0
        self._lock, self._memory, self._log = threading.Lock(), None, _Log()
        self._child: subprocess.Popen | None = None
        self._start()

    def ask(self, images: np.ndarray) -> np.ndarray:
        """The outputs `[n, columns]`, float32, for a batch of float32 images `[n, ...]`: logits, then `taps`.

        Raises `InputError` for outputs that are not such an array, and for a process that dies or takes too long twice.
        """
        images = np.ascontiguousarray(images, np.float32)
        with self._lock:
            try:
                return self._ask(images)
            except _Lost as lost:
                if self.restarts:
                    raise InputError(
                        f"The teacher '{self.name}' {lost}, after it was restarted. {self._where()}"
                    ) from None
                self.restarts += 1
                if self.say:
                    self.say(
                        f"The teacher '{self.name}' {lost}. Its process is restarted once. {self._where()}".rstrip()
                    )
            self._stop()
            self._start()
            try:
                return self._ask(images)
            except _Lost as lost:
                self._stop()
                raise InputError(
                    f"The teacher '{self.name}' {lost}, again after a restart, on a batch {list(images.shape)}. "
                    f"{self._where()}"
                ) from None

    def log_to(self, path: Path) -> None:
        """Appends what the process has printed, and what it prints from now on, to a file."""
        self._log.open(path)

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        environment = dict(os.environ)
        if self.python == sys.executable:  # another Python must not see this one's packages
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        environment["PYTHONUNBUFFERED"] = "1"
        command = [self.python, server.__file__, self.kind, self.target, json.dumps(self.options)]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
            )
        except OSError as error:
            raise InputError(
                f"The teacher '{self.name}' cannot be started with '{self.python}' ({error.strerror})."
            ) from None
        self._frames = queue.Queue()
        threading.Thread(target=_receive, args=(self._child.stdout, self._frames), daemon=True).start()
        self._printer = threading.Thread(target=self._log.follow, args=(self._child.stderr,), daemon=True)
        self._printer.start()
        self._finalizer = weakref.finalize(self, _end, self._child)
        self._memory = None
        try:
            message, _ = self._next(f"did not start within {self.timeout:g} s")
        except _Lost as lost:
            self._stop()
            raise InputError(f"The teacher '{self.name}' {lost} at its start. {self._where()}") from None
        self.about, self.versions = message["about"], message["versions"]

    def _ask(self, images: np.ndarray) -> np.ndarray:
        if self._child is None:
            raise InputError(f"The process of the teacher '{self.name}' has ended. Open the teacher again.")
        if self._memory is None or len(self._memory) < images.nbytes:
            self._share(images.nbytes)
        np.frombuffer(self._memory, np.float32, images.size)[:] = images.ravel()
        self._send({"shape": list(images.shape)})
        message, numbers = self._next(f"did not answer a batch {list(images.shape)} within {self.timeout:g} s")
        self.versions, self.taps = message["versions"], {k: tuple(v) for k, v in message.get("taps", {}).items()}
        return np.frombuffer(numbers, np.float32).reshape(message["shape"]).copy()

    def _share(self, size: int) -> None:
        """Maps memory of this size in both processes. Its file has no name afterwards, so that nothing is left over."""
        self._memory = None
        handle, path = _memory_file(size)
        try:
            self._memory = mmap.mmap(handle, size)
            os.close(handle)
            self._send({"map": path, "bytes": size})
            self._next(f"did not map memory within {self.timeout:g} s")
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # it has died: `_next` says so
            server.write_frame(self._child.stdin, message)

    def _next(self, late: str) -> tuple[dict, bytes]:
        try:
            frame = self._frames.get(timeout=self._patience)
        except queue.Empty:
            raise _Lost(late) from None
        if frame is None:
            status = self._child.wait()
            self._printer.join(timeout=2)
            reason = f"by signal {-status}" if status < 0 else f"with exit status {status}"
            raise _Lost(f"ended {reason}")
        message, numbers = frame
        if "refused" in message:
            log = f" See '{self._log.path}'." if self._log.path else ""
            raise InputError(f"The teacher '{self.name}': {message['refused']}{log}")
        return message, numbers

    def _where(self) -> str:
        line = self._log.last_line()
        printed = f"The last line that it printed: {line!a}. " if line else ""
        return (printed + (f"See '{self._log.path}'." if self._log.path else "")).strip()

    def _stop(self) -> None:
        if self._child is not None:
            self._finalizer()
            self._printer.join(timeout=2)
            self._child = self._memory = None


class _Lost(Exception):
    """The process has died, or does not answer in time."""


class _Log:
    """What a process prints: the last lines are kept, and all of it goes to a file once there is one."""

    def __init__(self):
        self.lines, self.path, self._file = collections.deque(maxlen=LOG_LINES), None, None
        self._room, self._lock = LOG_BYTES, threading.Lock()

    def open(self, path: Path) -> None:
        """Appends what is kept, and from now on every line, to a file."""
        with self._lock:
            if self.path != path:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._close()
                self.path = path
                self._write(b"".join(self.lines))

    def follow(self, stream) -> None:
        """Keeps the lines of a stream until it ends."""
        for line in iter(lambda: stream.readline(1 << 16), b""):
            with self._lock:
                self.lines.append(line)
                self._write(line)
        stream.close()
        with self._lock:
            self._close()

    def _write(self, text: bytes) -> None:
        if self.path is None or self._room <= 0:
            return
        self._room -= len(text)
        with contextlib.suppress(OSError):  # a full disk must not end the teacher
            self._file = self._file or open(self.path, "ab", buffering=0)
            self._file.write(text)

    def _close(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def last_line(self) -> str:
        with self._lock:
            texts = [line.decode("utf-8", "replace").strip() for line in self.lines]
        return next((text[:300] for text in reversed(texts) if text), "")


def _receive(stream, frames: queue.Queue) -> None:
    """Puts the frames of a process into a queue, then None."""
    with contextlib.suppress(OSError, ValueError):
        while (frame := server.read_frame(stream)) is not None:
            frames.put(frame)
    frames.put(None)
    stream.close()


def _end(child: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        child.stdin.close()
    child.kill()
    child.wait()


def _interpreter(python: str | None) -> str:
    if python is None:
        return sys.executable
    path = shutil.which(os.path.expanduser(python))
    if path is None:
        raise InputError(
            f"There is no interpreter '{python}' that can be run. Give --teacher-python the path of a Python, such as "
            "'/path/to/environment/bin/python'."
        )
    return path


def _memory_file(size: int) -> tuple[int, str]:
    """A new file of this size, in memory where there is room for it; the space is reserved, so that writing works."""
    folders = [SHARED_MEMORY] if SHARED_MEMORY.is_dir() else []
    for folder in (*folders, None):
        try:
            handle, path = tempfile.mkstemp(prefix="kdistill-", dir=folder)
        except OSError:
            continue
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, size)
            else:
                os.truncate(handle, size)
            return handle, path
        except OSError:
            os.close(handle)
            os.unlink(path)
    raise InputError(f"A batch of images takes {size:,} bytes, for which there is no room in the temporary folder.")


# -- open processes ---------------------------------------------------------------------------------------------------

_OPEN: collections.OrderedDict[str, Process] = collections.OrderedDict()
MOST_OPEN = 4


def open_process(
    kind: str, target: str, name: str, options: dict, python: str | None, timeout: float | None, fingerprint: str = ""
) -> Process:
    """The process for this target. One that is open is used again, so that a run and its checks start it once."""
    key = repr((kind, target, options, python, timeout, fingerprint))
    process = _OPEN.pop(key, None)
    if process is None or process._child is None:
        process = Process(kind, target, name, options, python, timeout)
    _OPEN[key] = process
    while len(_OPEN) > MOST_OPEN:
        _OPEN.popitem(last=False)  # it ends when nobody uses it any more
    return process


def close_all() -> None:
    """Ends the processes that are open."""
    while _OPEN:
        _OPEN.popitem()[1].close()


atexit.register(close_all)
