"""What a command needs of its surroundings: streams, signals, a temporary folder, Keras's settings."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator

from kdistill.errors import InputError

AGAIN_SECONDS = 1.0
INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143  # exit status: 128 and the number of the signal


class Terminated(KeyboardInterrupt):
    """SIGTERM was received. As after Ctrl-C, everything that is temporary is deleted on the way out."""


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Raises `Terminated` at SIGTERM, where the default ends the process at once and leaves temporary files."""
    if threading.current_thread() is not threading.main_thread():  # only there signals can be handled
        yield
        return

    has_timer = hasattr(signal, "setitimer")  # not on Windows

    def end(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the cleaning up
        if has_timer:
            signal.signal(signal.SIGALRM, end_again)
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS, AGAIN_SECONDS)
        raise Terminated

    def end_again(number, frame):
        # Python drops an exception in a finalizer or a callback of C, and libraries drop some: the command would go on.
        if not isinstance(sys.exception(), Terminated):  # otherwise it is being cleaned up
            raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        if has_timer:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before)


def prepare_streams() -> None:
    """Makes standard output and error usable where they are closed, or have an encoding that lacks characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by who started the command
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """After a broken pipe: what is still buffered goes nowhere, so that Python reports no error at its end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())


def check_keras() -> None:
    """Raises `InputError` for a backend of Keras other than TensorFlow, before Keras is imported."""
    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    if backend != "tensorflow":
        raise InputError(
            f"KERAS_BACKEND is '{backend}'; kdistill expects Keras on TensorFlow. Unset it, or set it to tensorflow."
        )


def check_temporary_folder() -> None:
    """Raises `InputError` if no temporary folder can be written to."""
    try:
        tempfile.gettempdir()
    except OSError:
        raise InputError(
            f"No temporary folder can be written to (TMPDIR is {os.environ.get('TMPDIR', 'not set')!r}): its disk may "
            "be full or read-only. Free some space, or set TMPDIR to another folder."
        ) from None


def printable(text: str, breaks: str = "\n") -> str:
    """A text with its control characters escaped, except for those in `breaks`: names in it may come from a file."""
    return "".join(c if c in breaks or c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_line(text: str) -> str:
    """A line of a table or list, in which a name cannot begin another line."""
    return printable(text, breaks="")


def how_to_go_on(options: dict) -> str:
    """What to do after an interruption, for a command with these options."""
    if "resume" not in options:
        return ""
    folder = options.get("out") or "FOLDER (named above)"
    return f" To go on, give the same command with: --resume --out {folder}"
