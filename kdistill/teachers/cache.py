"""Teacher outputs on disk: files that are complete or absent, named by their checksum, read through memory maps.

A cache is a folder under a root. Its name is the hash of everything that determines its numbers (`identity`), so a
cache that does not match is another folder and is never used. Numpy only; `replay.py` fills and reads it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from kdistill.archives import ERRORS
from kdistill.errors import CheckFailed, InputError
from kdistill.files import PART, exclusive_lock, inside, new_file, read_json, sha256, write_text
from kdistill.schema import Whole

FORMAT = 1
PART_BYTES = 32 << 20  # roughly: large enough for a disk to stream, small enough to lose little when killed
PART_NAME = re.compile(r"view-(\d{4})-part-(\d{4})-([0-9a-f]{16})\.npy")
KEY = re.compile(r"[0-9a-f]{16}")
ABANDONED_SECONDS = 86400  # an unfinished file that is older is deleted: no part takes so long
ABOUT = {"rows": Whole(1), "part_rows": Whole(1), "classes": Whole(1, 1 << 24), "top_k": (Whole(1, 1 << 16), None)}
ABOUT |= {"teacher_name?": str, "source?": str, "split?": str}
ABOUT |= {"teacher_files?": [{"file": str, "fingerprint?": str}]}


class Cache:
    """The outputs of one teacher: a row of logits for every position of every view.

    A view is the order and augmentation of the images in an epoch.

    Args:
        root: the folder of all caches.
        identity: everything that determines the numbers, JSON-ready; its hash names the cache.
        rows: rows of a view.
        part_rows: rows of a part, which is one file. The last part of a view may have fewer.
        classes: numbers of a row: logits, and those of the taps behind them.
        top_k: number of logits to keep of a row, with the log-sum-exp of the others. None keeps all.
        description: facts for readers of `about.json`, such as where the data came from.
    """

    def __init__(
        self,
        root: Path,
        identity: dict,
        rows: int,
        part_rows: int,
        classes: int,
        top_k: int | None = None,
        description: dict | None = None,
    ):
        shape = {"rows": rows, "part_rows": part_rows, "classes": classes, "top_k": top_k, "format": FORMAT}
        self.identity, self.description = {**identity, **shape}, description or {}
        self.rows, self.part_rows, self.classes, self.top_k = rows, part_rows, classes, top_k
        self.key = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.root, self.path = root, root / self.key
        self._open: dict[int, list[np.ndarray]] = {}

    def touch(self) -> None:
        """Sets the time of last use, for `prune_caches`."""
        os.utime(self.path)

    @property
    def parts(self) -> int:
        """Number of parts of a view."""
        return -(-self.rows // self.part_rows)

    @property
    def view_bytes(self) -> int:
        """Bytes of a view on disk, without the parts' headers of 128 bytes or so."""
        return self.rows * bytes_per_row(self.classes, self.top_k)

    def row_range(self, part: int) -> tuple[int, int]:
        """The rows of a part: the first one, and the one after the last."""
        return part * self.part_rows, min(self.rows, (part + 1) * self.part_rows)

    def create(self) -> None:
        """Creates the folder with `about.json`. Raises `InputError` where nothing can be written."""
        if self.path.is_symlink():
            raise InputError(f"The teacher cache '{self.path}' is a link, which is not followed. Delete the link.")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for part in self.path.glob(f"{PART}*"):  # of a process that was killed while writing
                if time.time() - part.lstat().st_mtime > ABANDONED_SECONDS:
                    part.unlink(missing_ok=True)
            if not (self.path / "about.json").exists():
                write_text(self.path / "about.json", json.dumps({**self.description, **self.identity}, indent=1) + "\n")
        except OSError as error:
            raise InputError(
                f"Cannot write to the teacher cache '{self.path}': {error.strerror}. Give --cache another folder, "
                "or off."
            ) from None

    def missing_parts(self, views: int, say: Callable[[str], None] = print) -> list[tuple[int, int]]:
        """The (view, part) pairs of the first `views` views that are not computed yet.

        Reads every part: shape, type, checksum, numbers. Deletes and reports damaged ones, which are then missing.
        """
        paths = _part_paths(self.path)
        missing = []
        for view in range(views):
            for part in range(self.parts):
                path = paths.get((view, part))
                damage = None if path is None else _damage_of(path, self.identity)
                if damage:
                    say(f"Part {path} of the teacher cache is damaged ({damage}); it is computed again.")
                    path.unlink(missing_ok=True)
                    path = None
                if path is None:
                    missing.append((view, part))
        return missing

    @contextlib.contextmanager
    def claim(self, view: int, part: int) -> Iterator[bool]:
        """Locks a part; yields whether this process may compute it: no other process does, and none has finished it.

        The lock ends with its process, so another one can take over at once from a killed one.
        """
        path = self.path / f".lock-{view:04}-{part:04}"
        try:
            lock = exclusive_lock(path)
        except InputError:
            yield False
            return
        try:
            yield not self._is_computed(view, part)
        finally:
            lock.release()
            if self._is_computed(view, part):  # whoever locks the old file or a new one sees that there is no work
                with contextlib.suppress(OSError):  # Windows does not delete a file that another process has open
                    path.unlink(missing_ok=True)

    def _is_computed(self, view: int, part: int) -> bool:
        return (view, part) in _part_paths(self.path)

    def write_part(self, view: int, part: int, logits: np.ndarray) -> Path:
        """Writes the float32 logits `[rows of the part, classes]` of a part; the file is complete or absent."""
        first, end = self.row_range(part)
        if logits.shape != (end - first, self.classes):
            raise ValueError(f"part {part} expects {(end - first, self.classes)} logits, received {logits.shape}")
        stored = pack(logits, self.top_k)
        try:
            with new_file(self.path, ".npy") as temporary:
                with open(temporary, "wb") as file:
                    np.save(file, stored)
                    file.flush()
                    os.fsync(file.fileno())
                path = self.path / f"view-{view:04}-part-{part:04}-{sha256(temporary)[:16]}.npy"
                os.replace(temporary, path)
        except OSError as error:
            reason = error.strerror or error  # numpy's has none
            raise InputError(
                f"Cannot write to the teacher cache '{self.path}': {reason}. Free some space, then start it again."
            ) from None
        self._open.pop(view, None)
        return path

    def read_rows(self, view: int, rows: np.ndarray | slice) -> np.ndarray:
        """The logits `[len(rows), classes]` of rows of a view in any order, float16 (float32 from a top-k cache)."""
        if view not in self._open:
            paths = _part_paths(self.path)
            self._open[view] = [np.load(paths[view, part], mmap_mode="r") for part in range(self.parts)]
        parts = self._open[view]
        if isinstance(rows, slice):
            first, last = rows.start // self.part_rows, (rows.stop - 1) // self.part_rows
            pieces = [
                parts[i][max(0, rows.start - i * self.part_rows) : rows.stop - i * self.part_rows]
                for i in range(first, last + 1)
            ]
            logits = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        else:
            logits = np.empty(len(rows), parts[0].dtype) if self.top_k else np.empty((len(rows), self.classes), "f2")
            for i, part in enumerate(parts):
                inside = rows // self.part_rows == i
                logits[inside] = part[rows[inside] - i * self.part_rows]
        return unpack(logits, self.classes) if self.top_k else np.ascontiguousarray(logits)


def _row_type(classes: int, top_k: int) -> np.dtype:
    number = np.uint16 if classes <= 1 << 16 else np.uint32
    return np.dtype([("rest", np.float16), ("classes", number, top_k), ("logits", np.float16, top_k)])


def bytes_per_row(classes: int, top_k: int | None) -> int:
    """Bytes of one example's outputs."""
    return _row_type(classes, top_k).itemsize if top_k else 2 * classes


def pack(logits: np.ndarray, top_k: int | None) -> np.ndarray:
    """float32 logits `[n, classes]` in the stored form. Raises `CheckFailed` for numbers beyond float16."""
    with np.errstate(over="ignore"):
        narrow = logits.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise CheckFailed(
            f"The teacher's outputs reach {np.abs(logits).max():g}; float16 ends at 65504. The teacher is broken, or "
            "its inputs are not scaled as it expects. Check its test accuracy, or use --cache off."
        )
    if not top_k:
        return narrow
    count, classes = logits.shape
    top = np.argpartition(-logits, top_k - 1, axis=1)[:, :top_k]
    rest = np.ones(logits.shape, bool)
    np.put_along_axis(rest, top, False, axis=1)
    others = logits[rest].reshape(count, classes - top_k).astype(np.float64)
    largest = others.max(axis=1, keepdims=True)
    rows = np.empty(count, _row_type(classes, top_k))
    rows["rest"] = (largest + np.log(np.exp(others - largest).sum(axis=1, keepdims=True)))[:, 0]
    rows["classes"], rows["logits"] = top, np.take_along_axis(narrow, top, axis=1)
    return rows


def unpack(rows: np.ndarray, classes: int) -> np.ndarray:
    """float32 logits `[n, classes]` of top-k rows: the other classes share the remaining mass equally.

    At temperature 1 the probabilities of the top k, and of all others together, are the teacher's. At higher
    temperatures the others get slightly more mass, because equal logits have the highest entropy.
    """
    top_k = rows.dtype["logits"].shape[0]
    logits = np.repeat(rows["rest"].astype(np.float32)[:, None] - np.log(classes - top_k), classes, axis=1)
    np.put_along_axis(logits, rows["classes"].astype(np.int64), rows["logits"].astype(np.float32), axis=1)
    return logits.astype(np.float32)


def _part_paths(folder: Path) -> dict[tuple[int, int], Path]:
    """(view, part) -> file. Links, pipes and devices are no parts."""
    paths = {}
    if folder.is_dir() and not folder.is_symlink():
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file(follow_symlinks=False))
        for name in names:
            if match := PART_NAME.fullmatch(name):
                paths[int(match[1]), int(match[2])] = folder / name
    return paths


def _damage_of(path: Path, about: dict | None) -> str | None:
    """Why a part cannot be used, or None. `about`: rows, part_rows, classes and top_k of its cache; None: unknown.

    A part can have the right checksum and the wrong content: the folder may come from elsewhere.
    """
    stored = None
    if about is not None:
        part, classes, top_k = int(PART_NAME.fullmatch(path.name)[2]), about["classes"], about["top_k"]
        rows = min(about["part_rows"], about["rows"] - part * about["part_rows"])
        shape, kind = ((rows,), _row_type(classes, top_k)) if top_k else ((rows, classes), np.dtype(np.float16))
        try:
            stored = np.lib.format.open_memmap(path, mode="r")
        except ERRORS as error:
            return f"it is no array: {error}"
        if (stored.shape, stored.dtype) != (shape, kind):  # before it is read: its size is not bounded yet
            return f"it holds {stored.dtype} of the shape {stored.shape}, expected {kind} of {shape}"
    if sha256(path)[:16] != PART_NAME.fullmatch(path.name)[3]:
        return "another checksum than in its name"
    if stored is None:
        return None
    numbers = [stored["rest"], stored["logits"]] if top_k else [stored]
    if not all(np.isfinite(values).all() for values in numbers):
        return "NaN or infinite numbers"
    if top_k and stored["classes"].max() >= classes:
        return f"the class {stored['classes'].max()} of {classes} classes"
    return None


def list_caches(root: Path) -> list[dict]:
    """Every cache under a root: key, teacher, data, views, bytes, and the time of last use.

    A cache whose `about.json` cannot be read has `damaged_about`, the reason, and no names and views.
    """
    rows = []
    for folder in sorted(root.iterdir()) if root.is_dir() else []:
        if not KEY.fullmatch(folder.name) or folder.is_symlink() or not (folder / "about.json").is_file():
            continue
        files = _part_paths(folder)
        try:
            about, damage = read_json(inside(folder, "about.json"), ABOUT, "Delete this cache.", most=1 << 20), {}
        except (InputError, OSError) as error:
            about, damage = {"rows": 1, "part_rows": 1}, {"damaged_about": str(error)}
        parts = -(-about["rows"] // about["part_rows"])
        views = {view for view, _ in files}
        rows.append(
            {
                "key": folder.name,
                "teacher": about.get("teacher_name", ""),
                "data": about.get("source", ""),
                "split": about.get("split", ""),
                "teacher_files": about.get("teacher_files", []),
                "views": 0 if damage else sum(_is_whole(files, view, parts) for view in views),
                "parts": len(files),
                "bytes": sum(path.stat().st_size for path in files.values()),
                "used": folder.stat().st_mtime,
                **damage,
            }
        )
    return rows


def _is_whole(files: dict[tuple[int, int], Path], view: int, parts: int) -> bool:
    # First the count: `parts` comes from a file, and may be any number.
    return sum(key[0] == view for key in files) >= parts and all((view, part) in files for part in range(parts))


def verify_caches(root: Path, key: str | None = None) -> list[dict]:
    """Reads every part of every cache, or of one: shape, type, checksum, numbers.

    `damaged` of a row lists the files that cannot be used, and `reasons` states why, by name.
    """
    rows = []
    for row in _selected(root, key):
        folder, whole = root / row["key"], "damaged_about" not in row
        about = read_json(inside(folder, "about.json"), ABOUT, most=1 << 20) if whole else None
        reasons = {path.name: _damage_of(path, about) for path in _part_paths(folder).values()}
        reasons |= {} if whole else {"about.json": row["damaged_about"]}
        reasons = {name: reason for name, reason in reasons.items() if reason}
        rows.append({**row, "damaged": list(reasons), "reasons": reasons})
    return rows


def prune_caches(root: Path, key: str | None = None, days: float | None = None) -> list[dict]:
    """Deletes one cache, or all that were not used for `days` days. Returns the rows of the deleted ones."""
    deleted = []
    for row in _selected(root, key):
        if days is None or time.time() - row["used"] >= 86400 * days:
            shutil.rmtree(root / row["key"])
            deleted.append(row)
    return deleted


def _selected(root: Path, key: str | None) -> list[dict]:
    rows = list_caches(root)
    if key is None:
        return rows
    matches = [row for row in rows if key and row["key"].startswith(key)]
    if len(matches) != 1:
        keys = ", ".join(row["key"] for row in rows) or "none"
        raise InputError(f"'{key}' names {len(matches)} caches in '{root}'; expected one of: {keys}.")
    return matches
