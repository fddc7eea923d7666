"""Files that are complete or absent, even if the process is killed or the disk is full; locks for every system.

Only the standard library is imported before a function needs more.
"""

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kdistill import schema
from kdistill.errors import InputError

if TYPE_CHECKING:
    from filelock import BaseFileLock


def cache_root() -> Path:
    """The folder of all caches: `$KDISTILL_CACHE`, else `kdistill` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return user_folder("KDISTILL_CACHE", f"{user_cache}/kdistill", "The cache folder")


def user_folder(variable: str, default: str, name: str) -> Path:
    """The folder that an environment variable names, or `default`, where ~ is the user's home.

    Raises `InputError` that names the folder by `name` if there is no home, or no user of the name after ~.
    """
    try:
        return Path(os.environ.get(variable) or default).expanduser()
    except RuntimeError as error:
        raise InputError(f"{name} is unknown ({str(error).rstrip('.')}). Set {variable} to a folder.") from None


def byte_sizes(content: bytes) -> dict[str, int]:
    """The bytes of a content, plain and deflated as in a zip or an app bundle, where zeros and clusters save space."""
    return {"bytes": len(content), "deflated": len(zlib.compress(content, 9))}


NUMPY_FULL = re.compile(r"\d+ requested and \d+ written")
PART = ".part-"  # the name of an unfinished file begins so; a resumed run deletes such files
JSON_BYTES = 64 << 20  # a larger JSON file is not read; the largest report of 1,000 classes has 12 MB


@contextmanager
def new_file(folder: Path, ending: str = "") -> Iterator[Path]:
    """Yields the path of a new, empty file in `folder`, and deletes the file at the end if it is still there.

    Its name is random, and it is created exclusively: no file or link that somebody has put there is written to.
    """
    handle, name = tempfile.mkstemp(prefix=PART, suffix=ending, dir=folder)
    part = Path(name)
    try:
        if hasattr(os, "fchmod"):  # mkstemp lets the owner alone read; other files follow the umask
            os.fchmod(handle, 0o666 & ~_umask())
        os.close(handle)
        yield part
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yields a new folder for temporary files, which is deleted at the end.

    Raises `OSError` that names the folder of temporary files where it is full, whatever a library has raised then.
    """
    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder:
        try:
            yield folder
        except Exception as error:
            if not _means_full(error):
                raise
            text = "No space is left for temporary files. Free some, or set TMPDIR to another folder. This one is full"
            raise OSError(errno.ENOSPC, text, tempfile.gettempdir()) from error


def _means_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, is that of a full disk."""
    full = [errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)]
    for _ in range(20):
        if error is None:
            break
        if isinstance(error, OSError) and error.errno in full:
            return True
        # TensorFlow writes the text of the system, numpy how much it has written.
        if any(os.strerror(number) in str(error) for number in full) or NUMPY_FULL.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@cache
def _umask() -> int:
    mask = os.umask(0o077)  # there is no way to read it without setting it
    os.umask(mask)
    return mask


@contextmanager
def atomic_file(path: Path, synced: bool = False) -> Iterator[Path]:
    """Yields the path of a file to write, beside `path` and with the same ending; on success it replaces `path`.

    If writing fails or is interrupted, `path` does not change. If `path` is a link, the link is replaced, not the file
    that it points to. `synced`: waits until the content is on the disk.
    """
    with new_file(path.parent, f"-{path.name[-60:]}") as part:
        yield part
        if synced:
            with open(part, "rb+") as file:  # Windows syncs only files that are open for writing
                os.fsync(file.fileno())
        os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Writes a text file completely or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


def inside(folder: Path, name: str) -> Path:
    """The path of the file `name` in `folder`, for a name that comes from a file.

    Raises `InputError` for a name that leads out of the folder, by `..`, as an absolute path or through a link.
    """
    try:
        path, root = (folder / name).resolve(), folder.resolve()
    except (OSError, ValueError, RuntimeError):  # a null byte; links in a circle
        path = root = None
    if path is None or root not in path.parents:
        raise InputError(f"{name!a} is no file inside of the folder '{folder}', where it has to be.")
    return path


def check_no_links(folder: Path) -> None:
    """Checks that a folder consists of folders and plain files, so that nothing in it leads to a file elsewhere.

    Raises `InputError` that names a link, or a device, socket or pipe.
    """
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = os.path.join(place, name)
            try:
                mode = os.lstat(path).st_mode
            except FileNotFoundError:  # another process has deleted it
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                kind = "a link" if stat.S_ISLNK(mode) else "no plain file (a device, socket or pipe)"
                raise InputError(
                    f"'{shown_path(path)}' is {kind}. kdistill writes to this folder and follows no links in it. "
                    "Replace it by a copy of the file, or use another folder."
                )


def shown_path(path: str | Path) -> str:
    """A path as text for a message: control characters and bytes that are no UTF-8 are escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)[1:-1]


def read_bytes(path: Path, most: int) -> bytes:
    """The content of a plain file of at most `most` bytes; never waits, as on a pipe.

    Raises:
        InputError: It is no plain file, or larger.
        OSError: It cannot be read.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as file:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode):
            raise InputError(f"'{shown_path(path)}' is no plain file. Expected a file that can be read whole.")
        content = file.read(most + 1) if about.st_size <= most else b""
    if about.st_size > most or len(content) > most:
        raise InputError(f"'{shown_path(path)}' has {about.st_size:,} bytes, of at most {most:,} that it can have.")
    return content


def sha256(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def existing_file(path: str | Path, endings: tuple[str, ...]) -> Path:
    """The path of a file. Raises `InputError` if it does not exist; for a folder, the message names files in it."""
    path = Path(path)
    if path.is_dir():
        paths = sorted([*path.glob("*"), *path.glob("*/*")])
        candidates = [str(file) for file in paths if file.name.endswith(endings) and not file.name.startswith(PART)]
        examples = f", such as {', '.join(candidates[:4])}" if candidates else ""
        raise InputError(f"'{path}' is a folder. Give the path of a file ({', '.join(endings)}){examples}.")
    if not path.is_file():
        raise InputError(f"There is no file '{path}'. Check the path.")
    return path


def read_json(path: Path, shape=object, advice: str = "Start a new run in another folder.", most: int = JSON_BYTES):
    """The content of a JSON file, which fits a schema.

    Args:
        path: The file.
        shape: What it has to contain, see `kdistill.schema`.
        advice: A sentence on how to fix a damaged file, for the message.
        most: The bytes that it may have.

    Raises:
        InputError: It is damaged, does not fit the schema, is no plain file, or is too large.
        OSError: It cannot be read.
    """
    try:
        content = json.loads(read_bytes(path, most).decode("utf-8"))
        schema.check_depth(content)
        schema.check(content, shape)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, another content; too deep
        reason = "its values are too deep inside of each other" if isinstance(error, RecursionError) else error
        raise InputError(f"'{shown_path(path)}' is damaged ({reason}). {advice}".rstrip()) from None
    return content


def exclusive_lock(path: Path, message: str | None = None) -> "BaseFileLock":
    """Locks the file `path`, which is created if it is absent, and returns the lock. Does not wait.

    The lock lasts until its `release()` is called, its last reference goes, or the process ends, however it ends. So
    keep the returned object. The file stays.

    Args:
        path: The lock file. Its folder is created too.
        message: The text of the `InputError`; by default one that names the path.

    Raises:
        InputError: Another process, or another part of this one, holds the lock; or the path is no lock file.
        OSError: The file cannot be created or locked.
    """
    from filelock import FileLock, Timeout  # 50 ms, which `kdistill --help` need not pay

    if os.path.lexists(path) and not path.is_dir():
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_size or about.st_nlink > 1:
            # Opening it for a lock may empty it: it must not be a file of somebody, under a second name.
            raise InputError(f"'{shown_path(path)}' is no lock file, which is empty and no link. Delete it.")
    lock = FileLock(path, timeout=0, thread_local=False)  # any thread may release it
    try:
        lock.acquire()
    except Timeout:
        raise InputError(message or f"'{path}' is locked by another process. Wait until that process ends.") from None
    return lock
