"""Files that are complete or absent, even if the process is killed or the disk is full; locks for every system.

Only the standard library is imported before a function needs more.
"""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from kdistill.errors import InputError

if TYPE_CHECKING:
    from filelock import BaseFileLock


def cache_root() -> Path:
    """The folder of all caches: `$KDISTILL_CACHE`, else `kdistill` in the user's cache folder."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KDISTILL_CACHE") or Path(user_cache) / "kdistill").expanduser()


def byte_sizes(content: bytes) -> dict[str, int]:
    """The bytes of a content, plain and deflated as in a zip or an app bundle, where zeros and clusters save space."""
    return {"bytes": len(content), "deflated": len(zlib.compress(content, 9))}


PART = ".part-"  # the name of an unfinished file begins so; a resumed run deletes such files


@contextmanager
def atomic_file(path: Path, synced: bool = False) -> Iterator[Path]:
    """Yields the path of a file to write, beside `path` and with the same ending; on success it replaces `path`.

    If writing fails or is interrupted, `path` does not change. `synced`: waits until the content is on the disk.
    """
    part = path.with_name(PART + path.name)
    try:
        yield part
        if synced:
            with open(part, "rb+") as file:  # Windows syncs only files that are open for writing
                os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file completely or not at all."""
    with atomic_file(path) as part:
        part.write_text(text, encoding="utf-8")


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


def read_json(path: Path):
    """The content of a JSON file of a run. Raises `InputError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise InputError(f"'{path}' is damaged ({error}). Start a new run in another folder.") from None


def exclusive_lock(path: Path, message: str | None = None) -> "BaseFileLock":
    """Locks the file `path`, which is created if it is absent, and returns the lock. Does not wait.

    The lock lasts until its `release()` is called, its last reference goes, or the process ends, however it ends. So
    keep the returned object. The file stays.

    Args:
        path: The lock file. Its folder is created too.
        message: The text of the `InputError`; by default one that names the path.

    Raises:
        InputError: Another process, or another part of this one, holds the lock.
        OSError: The file cannot be created or locked.
    """
    from filelock import FileLock, Timeout  # 50 ms, which `kdistill --help` need not pay

    lock = FileLock(path, timeout=0, thread_local=False)  # any thread may release it
    try:
        lock.acquire()
    except Timeout:
        raise InputError(message or f"'{path}' is locked by another process. Wait until that process ends.") from None
    return lock
