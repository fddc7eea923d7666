"""The folder of one run: made new or resumed, locked while in use, and what has been finished in it."""

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras

from kdistill import files
from kdistill.errors import InputError
from kdistill.networks import saving
from kdistill.recipe import values as recipe_values
from kdistill.training.strategy import Devices


class RunFolder:
    """A run's folder, locked by this process until it ends or `close` is called.

    Raises `InputError` for a folder that holds another run, cannot be written, or is in use.
    """

    def __init__(self, path: Path, resume: bool = False, temporary: bool = False):
        self.path, self.temporary = path, temporary
        if path.exists() and not path.is_dir():
            raise InputError(f"'{path}' is a file; --out expects a folder.")
        known = path / "recipe.json"
        begun = {".lock", ".part-recipe.json"}  # all that there is of a run which was killed at its very start
        if path.is_dir() and {each.name for each in path.iterdir()} - begun and not resume:
            held = "another run" if known.exists() else "other files"
            raise InputError(
                f"The folder '{path}' holds {held}. Give --out a new folder, or --resume to go on with it."
            )
        if resume and not known.exists():
            raise InputError(
                f"There is no run to resume in '{path}' (no recipe.json). Leave --resume out to start one."
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")
        except OSError as error:
            raise InputError(
                f"Cannot write to the run folder '{path}': {error.strerror}. Give --out another."
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise InputError(
                f"The folder '{path}' is in use by another run. Wait for it, or give --out another."
            ) from None

        for left in path.glob(f"{files.PART}*"):  # a file that was being made when an earlier session was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def close(self) -> None:
        """Gives the folder free for another run; a temporary one is deleted."""
        self._lock.close()
        if self.temporary:
            shutil.rmtree(self.path)

    def settle(
        self, chosen: recipe_values.Recipe, data: str, force: bool, say: Callable[[str], None], strategy: str = "none"
    ) -> None:
        """Writes recipe, the data's fingerprint and strategy, or compares them with those of the run's start."""
        path = self.path / "recipe.json"
        values = {**recipe_values.as_dict(chosen), "data_fingerprint": data, "strategy": strategy}
        if path.exists():
            before = files.read(path)
            if not isinstance(before, dict):
                raise InputError(f"'{path}' holds no recipe. Start the run anew in another folder.")
            changes = _differences(before, values)
            if changes and not force:
                raise InputError(
                    f"The run in '{self.path}' was started with another recipe or other data: {'; '.join(changes)}. "
                    "Give the same, or --force to go on with the new one."
                )
            for change in changes:
                say(f"Changed since the run was started: {change}")
        files.write(path, json.dumps(values, indent=1) + "\n")

    def fetch(self, stage: str, devices: Devices) -> None:
        """Gets what the chief's folder has of a finished stage into the folders of the other workers."""
        if devices.workers == 1:
            return
        record, model = self.checkpoints(stage) / "finished.json", self.path / f"{stage}.keras"
        has = devices.chief and record.exists()
        told, content = (devices.share(path.read_bytes() if has else b"") for path in (record, model))
        if told and not devices.chief:
            record.parent.mkdir(parents=True, exist_ok=True)
            model.write_bytes(content)
            record.write_bytes(told)

    def finished(self, stage: str) -> tuple[keras.Model, dict] | None:
        """The model and the record of a stage that an earlier session finished, or None."""
        record = self.checkpoints(stage) / "finished.json"
        if not record.exists():
            return None
        model = saving.load_model(self.path / f"{stage}.keras")
        return model, files.read(record)

    def finish(self, stage: str, model: keras.Model, record: dict) -> None:
        """Keeps a stage's model and record; its checkpoints are of no more use."""
        saving.save_model(model, self.path / f"{stage}.keras")
        folder = self.checkpoints(stage)
        folder.mkdir(parents=True, exist_ok=True)
        files.write(folder / "finished.json", json.dumps(record) + "\n")
        for old in folder.glob("step-*.npz"):
            os.unlink(old)

    def settled(self, stage: str, name: str, value: Callable[[], str | None]) -> str | None:
        """A choice made when the stage was started, or else made now: a resumed stage must not choose otherwise."""
        path = self.checkpoints(stage) / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, json.dumps(value()) + "\n")
        return files.read(path)

    def checkpoints(self, stage: str) -> Path:
        """Where a stage keeps its checkpoints."""
        return self.path / "checkpoints" / stage


def open_folder(chosen: recipe_values.Recipe, out: str | Path | None, resume: bool, devices: Devices) -> RunFolder:
    """The folder `out`, by default a new one under `runs/`; of several workers the chief's alone: others forget."""
    if not devices.chief:
        return RunFolder(Path(tempfile.mkdtemp(prefix="kdistill-worker-")), temporary=True)
    return RunFolder(Path(out) if out else new_path(chosen), resume)


def new_path(chosen: recipe_values.Recipe, kind: str = "") -> Path:
    """The next free folder under `runs/`; `kind` is a further word in its name, such as sweep."""
    number = 1
    words = "-".join(word for word in (chosen.name, chosen.variant, kind) if word)
    while (path := Path("runs") / f"{words}-{number}").exists():
        number += 1
    return path


def _differences(before: dict, now: dict, path: str = "") -> list[str]:
    """What differs, as `training.epochs: 8 -> 9`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{path}{key}.")
        elif old != new:
            found.append(f"{path}{key}: {old} -> {new}")
    return found
