"""Exact resume: everything that a training step reads or changes, in one verified file.

A checkpoint holds the student, the optimizer, the global step, the seeds of dropout, the metrics of the unfinished
epoch and the history; never the teacher. Order and augmentation need no state: they are a function of (seed, epoch,
position).
"""

import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from kdistill import archives, schema
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.files import atomic_file
from kdistill.schema import Between, Mapping, Matching
from kdistill.training.strategy import SINGLE_DEVICE, Devices

CHECKPOINT_SECONDS = 20.0  # from one checkpoint to the next, inside an epoch
CHECKPOINTS = 2  # the newest, and the one before in case the newest is damaged
# The history has a list by metric, or by student and metric.
NUMBERS = [Matching(lambda value: value is None or type(value) in (int, float), "a number or null")]
ABOUT = {"history": Mapping((NUMBERS, Mapping(NUMBERS))), "seconds": Between(0, 1e12)}
POLL_STEPS = 50  # several workers learn from the chief every so many steps whether a checkpoint is due


def state_of(model: Supervised) -> list[keras.Variable]:
    """All variables that training changes, without repetition, in a fixed order."""
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    unique = {id(v): v for v in [*model.variables, *model.optimizer.variables, *metrics]}
    return list(unique.values())


def save(model: Supervised, folder: Path | None, history: dict, seconds: float) -> Path | None:
    """Writes `step-<global step>-<sha256>.npz`, then deletes all checkpoints but the newest two.

    All workers must call this, because metrics are summed over them; a worker without a folder writes nothing.
    Raises `InputError` if the disk is full (the earlier checkpoints stay, and no partial file does), or the run folder
    was deleted.
    """
    step = int(model.global_step.numpy())
    values = {f"{i:04}": v.numpy() for i, v in enumerate(state_of(model))}
    if folder is None:
        return None
    if not folder.parent.parent.is_dir():  # that of the run; it was there when the stage began
        raise InputError(
            f"The folder '{folder.parent.parent}' was deleted while the run used it: the run stops. Start it again in "
            "a new folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps({"history": history, "seconds": seconds})
    content = io.BytesIO()
    np.savez(content, about=np.array(about), **values)
    data = content.getvalue()
    path = folder / f"step-{step:09}-{hashlib.sha256(data).hexdigest()[:16]}.npz"
    write(path, data)
    for old in sorted(folder.glob("step-*.npz"))[:-CHECKPOINTS]:
        old.unlink()
    return path


def write(path: Path, data: bytes) -> None:
    """Writes a whole file, synchronized to the disk, or none at all."""
    try:
        with atomic_file(path, synced=True) as part:
            part.write_bytes(data)
    except OSError as error:
        raise InputError(
            f"Cannot write '{path}' ({len(data):,} bytes): {error.strerror or error}. Free some space, then continue "
            "from the checkpoint before with --resume. Nothing is lost."
        ) from None


def newest(folder: Path | None, say: Callable[[str], None]) -> bytes:
    """The content of the newest undamaged checkpoint, or nothing. Names damaged files through `say`."""
    for path in sorted(folder.glob("step-*.npz"), reverse=True) if folder else []:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] == path.stem.rsplit("-", 1)[1]:
            return data
        say(f"The checkpoint {path} is damaged (its content does not match its checksum); using the one before.")
    return b""


def restore(
    model: Supervised, folder: Path | None, say: Callable[[str], None] = print, devices: Devices = SINGLE_DEVICE
) -> dict | None:
    """Loads the newest undamaged checkpoint into a compiled model; returns its history and seconds, or None.

    All workers get the checkpoint of the chief. Raises `InputError` if it belongs to another model or optimizer.
    """
    data = devices.share(newest(folder, say))
    if not data:
        return None
    variables = state_of(model)
    try:
        with archives.Arrays(data) as saved:
            names = sorted(name for name in saved.shapes if name != "about")
            about = json.loads(str(saved.read("about")))
            schema.check(about, ABOUT)
            # By position and shape: automatic names depend on what else the process has built.
            fits = [tuple(v.shape) for v in variables] == [saved.shapes[name] for name in names]
            values = [saved.read(name) for name in names] if fits else []
    except (*archives.ERRORS, KeyError) as error:
        raise InputError(
            f"The checkpoint in {folder} is damaged ({error}). Delete it to train this stage from its start."
        ) from None
    if not fits:
        raise InputError(
            f"The checkpoint in {folder} belongs to another model or optimizer: it has {len(names)} variables, "
            f"this run has {len(variables)}, or their shapes differ. Resume with the recipe that wrote it."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return about


def metric_values(model: Supervised) -> list:
    """The metrics with their current values, for `Checkpoints` to restore after `fit` has reset them."""
    return [(metric, [v.numpy() for v in metric.variables]) for metric in model.metrics]


class Checkpoints(keras.callbacks.Callback):
    """Saves at the end of every epoch, and inside an epoch every `CHECKPOINT_SECONDS`.

    After a resume the first epoch starts with the metrics of its part that was finished before. Without a folder the
    callback records history and time only.
    """

    def __init__(self, folder: Path | None, restored: dict | None, devices: Devices = SINGLE_DEVICE):
        super().__init__()
        self.folder, self.restored, self.devices = folder, restored, devices
        self.history = dict(restored["history"]) if restored else {}
        self.before = restored["seconds"] if restored else 0.0
        self.started = self.last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time, summed over all sessions of this run."""
        return self.before + time.perf_counter() - self.started

    def on_epoch_begin(self, epoch, logs=None):
        # fit() has just reset the metrics; restore those of the part of this epoch that was finished before.
        if self.restored:
            for metric, values in self.restored.pop("metrics", []):
                for variable, value in zip(metric.variables, values, strict=True):
                    variable.assign(value)

    def on_train_batch_end(self, batch, logs=None):
        # The epoch's end saves in a moment. A file of this step without the epoch's history would have the same number:
        # a resume might use that one, and count this epoch's metrics into the next.
        if batch + 1 >= (self.params.get("steps") or float("inf")):
            return
        due = time.perf_counter() - self.last >= CHECKPOINT_SECONDS
        if self.devices.workers > 1:  # clocks differ, and all workers must save at the same step
            due = (batch + 1) % POLL_STEPS == 0 and self.devices.share(b"save" if due else b"") == b"save"
        if due:
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        # The checkpoint is the start of the next epoch: its metrics are empty.
        for metric in self.model.metrics:
            metric.reset_state()
        self._save()

    def _save(self):
        if self.folder is None and self.devices.workers == 1:
            return
        save(self.model, self.folder, self.history, self.seconds)
        self.last = time.perf_counter()
