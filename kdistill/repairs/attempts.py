"""What repair has tried: rows of a table, and the finished steps in a folder, from which the same repair resumes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from kdistill import files
from kdistill.conversion.comparison import exceeded
from kdistill.conversion.tflite_converter import USUAL, Tuning
from kdistill.errors import FileRefused, InputError
from kdistill.report.content import ATTEMPT
from kdistill.schema import Between, Matching, Whole
from kdistill.tflite.activation_ranges import KINDS

TUNING = {
    "images": Whole(1, 1 << 20),
    "ranges": Matching(lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "equalized": bool,
    "float_tensors": [str],
    "activations": Matching(lambda value: value in ("int8", "int16"), "int8 or int16"),
}
STEP = {"key": str, "attempts": [ATTEMPT], "tuning": TUNING, "error": (Between(0), None), "digests": [str]}
STEP |= {"file": (dict, None)}


@dataclass
class Step:
    """A finished step: its attempts, the best tuning so far with its error, and the file, if that holds its limits.

    `digests`: of the contents that were chosen so far.
    """

    attempts: list[dict] = field(default_factory=list)
    tuning: Tuning = USUAL
    error: float = np.inf
    file: dict | None = None
    digests: list[str] = field(default_factory=list)


class Steps:
    """Finished steps in a folder, `ranges.json` and so on; without a folder it stores nothing."""

    def __init__(self, folder: Path | None):
        self._folder = folder
        if folder is not None:
            if folder.is_symlink():
                raise InputError(f"'{folder}' is a link, which is not followed. Use another folder.")
            folder.mkdir(parents=True, exist_ok=True)
            files.check_no_links(folder)

    def load(self, name: str, key: str, path: Path) -> Step | None:
        """A step that an earlier session finished with this key. `path`: where its file has to be, if it gave one."""
        if self._folder is None or not self._path(name).exists():
            return None
        record = files.read_json(self._path(name), STEP, f"Delete '{self._path(name)}' to try this step again.")
        if record["key"] != key:
            return None
        file = record["file"]
        if file is not None and (not path.is_file() or files.sha256(path) != file.get("sha256")):
            return None
        if file is not None:
            file = {**file, "path": str(path)}
        tuning = Tuning(**{**record["tuning"], "float_tensors": tuple(record["tuning"]["float_tensors"])})
        error = np.inf if record["error"] is None else record["error"]
        return Step(record["attempts"], tuning, error, file, record["digests"])

    def save(self, name: str, key: str, step: Step) -> None:
        """Writes a finished step, whole or not at all."""
        if self._folder is not None:
            error = step.error if np.isfinite(step.error) else None
            record = {"key": key, **asdict(step), "tuning": asdict(step.tuning), "error": error}
            files.write_text(self._path(name), json.dumps(record, indent=1) + "\n")

    def _path(self, name: str) -> Path:
        return self._folder / f"{name.replace(' ', '-')}.json"


def attempt(action: str, reason: str = "", *, skipped: bool = False, seconds: float = 0.0, **measured) -> dict:
    """A row of the table. `reason`: why the file was refused, or the step skipped; a file without one holds."""
    empty = dict.fromkeys(("bytes", "microseconds", "agreement", "accuracy", "drop"))
    holds = not reason and not skipped
    return {"action": action, "holds": holds, "skipped": skipped, "reason": reason, "seconds": seconds, **empty} | {
        name: value for name, value in measured.items() if name in empty
    }


def refused_attempt(action: str, error: Exception, **measured) -> dict:
    """The row of an attempt that ended in an error."""
    check = error.check if isinstance(error, FileRefused) else None
    reason = error.reason if isinstance(error, FileRefused) else str(error)
    limits = [text for texts in exceeded(check) for text in texts] if check else []
    if limits and limits[0] in reason:  # the limits alone: a row has no room for more
        reason = "; ".join(limits) + "."
    size = {"bytes": error.size} if isinstance(error, FileRefused) and error.size else {}
    return attempt(action, reason, **{**(check or {}), **size, **measured})


def sentence(row: dict) -> str:
    """A row in words."""
    if row["skipped"]:
        return f"{row['action']}: skipped. {row['reason']}"
    texts = [f"{row['bytes']:,} bytes"] if row["bytes"] else []
    texts += [f"{row['microseconds']:.0f} µs"] if row["microseconds"] else []
    texts += [f"agreement {row['agreement']:.2%}"] if row["agreement"] is not None else []
    texts += [f"accuracy {row['accuracy']:.2%}"] if row["accuracy"] is not None else []
    end = "holds its limits." if row["holds"] else f"refused. {row['reason']}"
    return f"{row['action']}: {', '.join(texts)}{': ' if texts else ''}{end}"


def summary(rows: Sequence[dict]) -> str:
    """All rows in one sentence, for the message that nothing helped."""

    def short(row: dict) -> str:
        if row["skipped"]:
            return f"{row['action']} (skipped)"
        if row["agreement"] is None:
            return f"{row['action']} (no file that can be used)"
        return f"{row['action']} (agreement {row['agreement']:.2%})"

    return "; ".join(short(row) for row in rows)


def digest_of(values, arrays: Sequence[np.ndarray] = ()) -> str:
    """A hash of JSON-ready values and of arrays."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()
