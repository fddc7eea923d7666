"""Teacher outputs on disk: parts that are whole or absent, named by their own checksum, read through memory maps.

A cache is a folder under a root, named by the hash of everything that decides its numbers (`about`): a cache that does
not match is another folder, and so never used. Numpy only; what fills and replays it is `replay.py`.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kdistill.errors import CheckFailed, InputError
from kdistill.files import write_text

FORMAT = 1
PART_BYTES = 32 << 20  # about: large enough for a disk to stream, small enough to lose little when killed
NAME = re.compile(r"view-(\d{4})-part-(\d{4})-([0-9a-f]{16})\.npy")
KEY = re.compile(r"[0-9a-f]{16}")


class Cache:
    """The outputs of one teacher: for each view (an epoch's order and augmentation) a row of logits per position.

    Args:
        root: the folder of all caches.
        about: everything that decides the numbers, JSON-ready; its hash names the cache. words: what a reader wants to
            know besides, such as where the data came from.
        rows: rows of a view; part_rows: rows of a part, the last one may have fewer.
        classes: logits of a row; top_k: keep only so many of them, and the log-sum-exp of the rest.
    """

    def __init__(
        self,
        root: Path,
        about: dict,
        rows: int,
        part_rows: int,
        classes: int,
        top_k: int | None = None,
        words: dict | None = None,
    ):
        shape = {"rows": rows, "part_rows": part_rows, "classes": classes, "top_k": top_k, "format": FORMAT}
        self.about, self.words = {**about, **shape}, words or {}
        self.rows, self.part_rows, self.classes, self.top_k = rows, part_rows, classes, top_k
        self.key = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.root, self.path = root, root / self.key
        self._open: dict[int, list[np.ndarray]] = {}

    def touch(self) -> None:
        """Notes that the cache is used now, for `pruned`."""
        os.utime(self.path)

    @property
    def parts(self) -> int:
        """Parts of a view."""
        return -(-self.rows // self.part_rows)

    @property
    def view_bytes(self) -> int:
        """Bytes of a view on disk, without the parts' headers of 128 bytes or so."""
        return self.rows * bytes_per_row(self.classes, self.top_k)

    def span(self, part: int) -> tuple[int, int]:
        """First row and row behind the last of a part."""
        return part * self.part_rows, min(self.rows, (part + 1) * self.part_rows)

    def create(self) -> None:
        """Makes the folder, and `about.json` in it. Raises `InputError` where nothing can be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / "about.json").exists():
                write_text(self.path / "about.json", json.dumps({**self.words, **self.about}, indent=1) + "\n")
        except OSError as error:
            raise InputError(
                f"Cannot write to the teacher cache '{self.path}': {error.strerror}. Give --cache another folder, "
                "or off."
            ) from None

    def missing(self, views: int, say: Callable[[str], None] = print) -> list[tuple[int, int]]:
        """(view, part) of what has still to be computed, of the first so many views.

        Every part that is there is read and compared with its checksum; a damaged one is said, and is missing.
        """
        there = _files(self.path)
        absent = []
        for view in range(views):
            for part in range(self.parts):
                path = there.get((view, part))
                if path is not None and not _sound(path):
                    say(f"The part {path} of the teacher cache is damaged; it is computed again.")
                    path.unlink(missing_ok=True)
                    path = None
                if path is None:
                    absent.append((view, part))
        return absent

    @contextlib.contextmanager
    def claimed(self, view: int, part: int) -> Iterator[bool]:
        """Whether this process may compute the part: no other is at it, none has finished it.

        The lock ends with the process that holds it, so what was killed can be taken up at once.
        """
        with open(self.path / f".lock-{view:04}-{part:04}", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield (view, part) not in _files(self.path)

    def put(self, view: int, part: int, logits: np.ndarray) -> Path:
        """Writes float32 logits `[rows of the part, classes]`; the file is whole or absent."""
        first, end = self.span(part)
        if logits.shape != (end - first, self.classes):
            raise ValueError(f"part {part} expects {(end - first, self.classes)} logits, received {logits.shape}")
        stored = packed(logits, self.top_k)
        temporary = self.path / f".part-{view:04}-{part:04}-{os.getpid()}"
        try:
            with open(temporary, "wb") as file:
                np.save(file, stored)
                file.flush()
                os.fsync(file.fileno())
            path = self.path / f"view-{view:04}-part-{part:04}-{_checksum(temporary)}.npy"
            os.replace(temporary, path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise InputError(f"Cannot write to the teacher cache '{self.path}': {error.strerror}.") from None
        (self.path / f".lock-{view:04}-{part:04}").unlink(missing_ok=True)
        self._open.pop(view, None)
        return path

    def take(self, view: int, rows: np.ndarray | slice) -> np.ndarray:
        """Logits `[len(rows), classes]` of a view by row, in any order, float16 (of a top-k cache float32)."""
        if view not in self._open:
            there = _files(self.path)
            self._open[view] = [np.load(there[view, part], mmap_mode="r") for part in range(self.parts)]
        parts = self._open[view]
        if isinstance(rows, slice):
            first, last = rows.start // self.part_rows, (rows.stop - 1) // self.part_rows
            pieces = [
                parts[i][max(0, rows.start - i * self.part_rows) : rows.stop - i * self.part_rows]
                for i in range(first, last + 1)
            ]
            found = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        else:
            found = np.empty(len(rows), parts[0].dtype) if self.top_k else np.empty((len(rows), self.classes), "f2")
            for i, part in enumerate(parts):
                mine = rows // self.part_rows == i
                found[mine] = part[rows[mine] - i * self.part_rows]
        return unpacked(found, self.classes) if self.top_k else np.ascontiguousarray(found)


def _row(classes: int, top_k: int) -> np.dtype:
    number = np.uint16 if classes <= 1 << 16 else np.uint32
    return np.dtype([("rest", np.float16), ("classes", number, top_k), ("logits", np.float16, top_k)])


def bytes_per_row(classes: int, top_k: int | None) -> int:
    """Bytes of one example's outputs."""
    return _row(classes, top_k).itemsize if top_k else 2 * classes


def packed(logits: np.ndarray, top_k: int | None) -> np.ndarray:
    """float32 logits `[n, classes]` as they are stored. Raises `CheckFailed` for what float16 cannot hold."""
    with np.errstate(over="ignore"):
        narrow = logits.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise CheckFailed(
            f"The teacher's logits reach {np.abs(logits).max():g}; float16 ends at 65504. Such a teacher is broken, or "
            "its inputs are not scaled as it expects. Look at its test accuracy, or use --cache off."
        )
    if not top_k:
        return narrow
    count, classes = logits.shape
    chosen = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    rest = np.ones(logits.shape, bool)
    np.put_along_axis(rest, chosen, False, axis=1)
    others = logits[rest].reshape(count, classes - top_k).astype(np.float64)
    largest = others.max(axis=1, keepdims=True)
    rows = np.empty(count, _row(classes, top_k))
    rows["rest"] = (largest + np.log(np.exp(others - largest).sum(axis=1, keepdims=True)))[:, 0]
    rows["classes"], rows["logits"] = chosen, np.take_along_axis(narrow, chosen, axis=1)
    return rows


def unpacked(rows: np.ndarray, classes: int) -> np.ndarray:
    """float32 logits `[n, classes]` of top-k rows: the mass of the rest is spread evenly over the other classes.

    At temperature 1 the probabilities of the k and of the rest together are those of the teacher; at higher ones the
    rest comes out a little heavier, as an even spread has the most entropy.
    """
    top_k = rows.dtype["logits"].shape[0]
    logits = np.repeat(rows["rest"].astype(np.float32)[:, None] - np.log(classes - top_k), classes, axis=1)
    np.put_along_axis(logits, rows["classes"].astype(np.int64), rows["logits"].astype(np.float32), axis=1)
    return logits.astype(np.float32)


def _files(folder: Path) -> dict[tuple[int, int], Path]:
    """(view, part) -> file."""
    found = {}
    if folder.is_dir():
        for path in sorted(folder.iterdir()):
            if match := NAME.fullmatch(path.name):
                found[int(match[1]), int(match[2])] = path
    return found


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _sound(path: Path) -> bool:
    return _checksum(path) == NAME.fullmatch(path.name)[3]


def listed(root: Path) -> list[dict]:
    """Every cache under a root: key, teacher, data, views, bytes, and when it was last written or used."""
    rows = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not KEY.fullmatch(folder.name) or not (folder / "about.json").is_file():
            continue
        about, files = json.loads((folder / "about.json").read_text()), _files(folder)
        parts = -(-about["rows"] // about["part_rows"])
        views = {view for view, _ in files}
        rows.append(
            {
                "key": folder.name,
                "teacher": about.get("teacher_name", ""),
                "data": about.get("source", ""),
                "split": about.get("split", ""),
                "views": sum(all((view, part) in files for part in range(parts)) for view in views),
                "parts": len(files),
                "bytes": sum(path.stat().st_size for path in files.values()),
                "used": folder.stat().st_mtime,
            }
        )
    return rows


def verified(root: Path, key: str | None = None) -> list[dict]:
    """Reads every part of every cache (or of one) and compares it with its checksum: damaged ones by name."""
    rows = []
    for row in _chosen(root, key):
        bad = [path.name for path in _files(root / row["key"]).values() if not _sound(path)]
        rows.append({**row, "damaged": bad})
    return rows


def pruned(root: Path, key: str | None = None, days: float | None = None) -> list[dict]:
    """Deletes one cache, or all that were not used for so many days; returns what was deleted."""
    gone = []
    for row in _chosen(root, key):
        if days is None or time.time() - row["used"] >= 86400 * days:
            shutil.rmtree(root / row["key"])
            gone.append(row)
    return gone


def _chosen(root: Path, key: str | None) -> list[dict]:
    rows = listed(root)
    if key is None:
        return rows
    found = [row for row in rows if row["key"].startswith(key)]
    if len(found) != 1:
        known = ", ".join(row["key"] for row in rows) or "none"
        raise InputError(f"'{key}' names {len(found)} caches in '{root}'; expected one of: {known}.")
    return found
