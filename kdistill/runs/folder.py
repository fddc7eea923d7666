"""The folder of one run: created or resumed, locked while in use, and what has been finished in it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from kdistill import files
from kdistill.errors import InputError
from kdistill.formats.kinds import file_fingerprint
from kdistill.networks import saving
from kdistill.recipe import Recipe
from kdistill.recipe.values import as_dict
from kdistill.report.content import COMPRESSED, FIT
from kdistill.schema import Whole, plain
from kdistill.training.strategy import Devices

SETTINGS = {"seeds?": (Whole(), None), "max_seeds?": (Whole(), None), "margin?": (float, None)}  # of recipe.json
SETTINGS_BYTES = 4 << 20


class RunFolder:
    """A run's folder, locked by this process until it ends, `close` is called, or a `with` block is left.

    Args:
        path: the folder.
        resume: whether it has to hold a run to continue.
        temporary: whether `close` deletes it.
        lock: whether this process locks it. False: a process that works for the one that does.

    Raises:
        InputError: the folder holds another run, cannot be written, or is in use.
    """

    def __init__(self, path: Path, resume: bool = False, temporary: bool = False, lock: bool = True):
        self.path, self.temporary, self._lock = path, temporary, None
        if path.exists() and not path.is_dir():
            raise InputError(f"'{path}' is a file; --out expects a folder.")
        recipe_file = path / "recipe.json"
        # All that a run leaves that is killed at its very start: the lock, and an unfinished file.
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
        if not resume and any(name != ".lock" and not name.startswith(files.PART) for name in names):
            content = "another run" if recipe_file.exists() else "other files"
            raise InputError(
                f"The folder '{path}' holds {content}. Give --out a new folder, or --resume to continue that run."
            )
        if resume and not recipe_file.exists():
            raise InputError(f"'{path}' holds no run to resume (no recipe.json). Leave out --resume to start one.")
        files.check_no_links(path)  # before anything in it is opened: it may come from elsewhere
        message = f"The folder '{path}' is in use by another run. Wait until it ends, or give --out another folder."
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = files.exclusive_lock(path / ".lock", message) if lock else None
        except OSError as error:
            raise InputError(
                f"Cannot write to the run folder '{path}': {error.strerror}. Give --out another folder."
            ) from None
        self._lock_number = os.stat(path / ".lock").st_ino
        for part in [*path.rglob(f"{files.PART}*")] if lock else []:  # left by a session that was killed while writing
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error is None or isinstance(error, Exception):  # an error may only follow from the deletion
                self.check_exists()
        finally:
            self.close()

    def close(self) -> None:
        """Unlocks the folder for other runs; deletes a temporary one."""
        if self._lock:
            self._lock.release()
        if self.temporary:
            shutil.rmtree(self.path, ignore_errors=True)

    def check_exists(self) -> None:
        """Raises `InputError` if the folder was deleted or replaced while this run used it.

        Otherwise what is written next would create it again, with some files only.
        """
        try:
            exists = os.stat(self.path / ".lock").st_ino == self._lock_number
        except OSError:
            exists = False
        if not exists:
            raise InputError(
                f"The run folder '{self.path}' was deleted, or its file .lock, while the run used it: the run stops. "
                "Start it again in a new folder."
            ) from None

    def settle(
        self, recipe: Recipe, data: str, force: bool, say: Callable[[str], None], strategy: str = "none"
    ) -> None:
        """Writes recipe, fingerprints of data and teachers, strategy and threads, or compares them with those of the
        run's start.

        Raises `InputError` if they differ, unless `force`.
        """
        path = self.path / "recipe.json"
        values = {**as_dict(recipe), "data_fingerprint": data, "strategy": strategy, "threads": threads()}
        names = [network.file for network in (recipe.teacher, *recipe.more_teachers) if network.file]
        values["teacher_fingerprints"] = {name: file_fingerprint(name) for name in names}
        if path.exists():
            before = files.read_json(path, SETTINGS, most=SETTINGS_BYTES)
            for name in ("threads", "teacher_fingerprints"):  # of an earlier version: none
                before.setdefault(name, values[name])
            changes = _differences(before, values)
            if changes and not force and not _only_adds_seeds(before, values):
                raise InputError(
                    f"The run in '{self.path}' was started with another recipe or other data: {'; '.join(changes)}. "
                    "Give the same, or --force to continue with the new ones."
                )
            for change in changes:
                say(f"Changed since the run was started: {change}")
        files.write_text(path, json.dumps(values, indent=1) + "\n")

    def fetch(self, stage: str, devices: Devices) -> None:
        """Copies a finished stage from the chief's folder into the folders of the other workers."""
        if devices.workers == 1:
            return
        record, model = self.checkpoints(stage) / "finished.json", self.path / f"{stage}.keras"
        has_it = devices.chief and record.exists()
        record_bytes, model_bytes = (devices.share(path.read_bytes() if has_it else b"") for path in (record, model))
        if record_bytes and not devices.chief:
            record.parent.mkdir(parents=True, exist_ok=True)
            model.write_bytes(model_bytes)
            record.write_bytes(record_bytes)

    def is_finished(self, stage: str) -> bool:
        """Whether an earlier session has finished a stage."""
        return (self.checkpoints(stage) / "finished.json").exists()

    def finished(self, stage: str) -> tuple[keras.Model, dict] | None:
        """The model and the record of a stage that an earlier session finished, or None.

        Raises `InputError` if the record is damaged, or the model is not the one that the stage ended with.
        """
        if not self.is_finished(stage):
            return None
        record, path = self.record(stage, {"sha256?": str}), self.path / f"{stage}.keras"
        self.record(stage, COMPRESSED if "scheme" in record else FIT)
        if record.get("file"):
            files.inside(self.path, record["file"]["path"])
        digest = record.pop("sha256", None)  # of an earlier version: none
        if digest is not None and files.existing_file(path, (".keras",)) and files.sha256(path) != digest:
            raise InputError(
                f"'{path}' is not the model with which the stage '{stage}' ended (another SHA-256): it is damaged, or "
                f"was replaced. Put the file back, or delete '{self.checkpoints(stage)}' to train the stage again."
            )
        return saving.load_model(path), record

    def record(self, stage: str, shape=object):
        """The record of a finished stage, which fits the schema `shape`."""
        advice = f"Delete '{self.checkpoints(stage)}' to train the stage again, or start a new run in another folder."
        return files.read_json(self.checkpoints(stage) / "finished.json", shape, advice)

    def finish(self, stage: str, model: keras.Model, record: dict) -> None:
        """Keeps a stage's model and record, with the model's digest, and deletes its checkpoints."""
        self.check_exists()
        path = self.path / f"{stage}.keras"
        saving.save_model(model, path)
        self.finish_record(stage, {**record, "sha256": files.sha256(path)})

    def finish_record(self, stage: str, record: dict) -> None:
        """Keeps the record of a stage whose models are elsewhere, and deletes its checkpoints."""
        folder = self.checkpoints(stage)
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "finished.json", json.dumps(record) + "\n")
        for checkpoint in folder.glob("step-*.npz"):
            os.unlink(checkpoint)

    def choice(self, stage: str, name: str, choose: Callable[[], str | None]) -> str | None:
        """A choice made when the stage was started, or now: a resumed stage must not choose differently.

        What it returns comes from a file: it is a text or None, and may be anything.
        """
        path = self.checkpoints(stage) / f"{name}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_text(path, json.dumps(choose()) + "\n")
        return files.read_json(path, (str, None), f"Delete '{path.parent}' to train the stage again.", most=1 << 16)

    def checkpoints(self, stage: str) -> Path:
        """The folder of a stage's checkpoints. Raises `InputError` if the run folder was deleted."""
        self.check_exists()
        return self.path / "checkpoints" / stage


def threads() -> str:
    """How many threads of TensorFlow work on one operation and on several: sums over threads have other last bits."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    counts = (
        tf.config.threading.get_intra_op_parallelism_threads(),
        tf.config.threading.get_inter_op_parallelism_threads(),
    )
    return " and ".join(str(count or cores) for count in counts)


def open_folder(recipe: Recipe, out: str | Path | None, resume: bool, devices: Devices) -> RunFolder:
    """The folder `out`, by default a new one under `runs/`. Workers other than the chief get a temporary one."""
    if not devices.chief:
        return RunFolder(Path(tempfile.mkdtemp(prefix="kdistill-worker-")), temporary=True)
    return RunFolder(Path(out) if out else new_path(recipe), resume)


def new_path(recipe: Recipe, kind: str = "") -> Path:
    """The next free folder under `runs/`, named by recipe, variant and `kind`, such as `sweep`."""
    number = 1
    words = "-".join(word for word in (recipe.name, recipe.variant, kind) if word)
    while (path := Path("runs") / f"{words}-{number}").exists():
        number += 1
    return path


def _only_adds_seeds(before: dict, now: dict) -> bool:
    """Whether a run differs in nothing but more seeds, the margin of its verdict, or the repair of its files.

    What is finished stays valid then.
    """
    free = {"seeds": None, "max_seeds": None, "margin": None, "repair": None}
    fewer = (now.get("seeds") or 0) < (before.get("seeds") or 0)
    return not fewer and {**before, **free} == {**now, **free}


def _differences(before: dict, now: dict, path: str = "") -> list[str]:
    """What differs, such as `training.epochs: 8 -> 9`."""
    differences = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            differences += _differences(old, new, f"{path}{key}.")
        elif old != new:
            differences.append(f"{path}{key}: {plain(old)} -> {plain(new)}")
    return differences
