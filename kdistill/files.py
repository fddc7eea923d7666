"""Files that are whole or not there, whenever the process or the disk gives out. Standard library only."""

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdistill.errors import InputError


def cache_root() -> Path:
    """`$KDISTILL_CACHE`, else the user's own cache folder."""
    own = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("KDISTILL_CACHE") or Path(own) / "kdistill").expanduser()


def sizes(content: bytes) -> dict[str, int]:
    """Bytes of some content as it is, and deflated as in a zip or an app bundle, where zeros and clusters show."""
    return {"bytes": len(content), "deflated": len(zlib.compress(content, 9))}


PART = ".part-"  # how the name begins of what is being written; a run that goes on deletes what was left so


@contextmanager
def whole(path: Path, synced: bool = False) -> Iterator[Path]:
    """A file beside `path`, with the same ending, to write; at the end it takes the place of `path`.

    If that fails, or is broken off, `path` is as it was. `synced`: only once the content is on the disk.
    """
    part = path.with_name(PART + path.name)
    try:
        yield part
        if synced:
            with open(part, "rb") as written:
                os.fsync(written.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    with whole(path) as part:
        part.write_text(text, encoding="utf-8")


def checked(path: str | Path, endings: tuple[str, ...]) -> Path:
    """The path of a file. Raises `InputError` if there is none, and for a folder with those in it that would do."""
    path = Path(path)
    if path.is_dir():
        near = sorted([*path.glob("*"), *path.glob("*/*")])
        inside = [str(each) for each in near if each.name.endswith(endings) and not each.name.startswith(PART)]
        some = f", such as {', '.join(inside[:4])}" if inside else ""
        raise InputError(f"'{path}' is a folder. Give the path of a file ({', '.join(endings)}){some}.")
    if not path.is_file():
        raise InputError(f"There is no file '{path}'.")
    return path


def read(path: Path):
    """The content of a JSON file that a run has written. Raises `InputError` if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no UTF-8, or no JSON
        raise InputError(f"'{path}' is damaged ({error}). Start the run anew in another folder.") from None
