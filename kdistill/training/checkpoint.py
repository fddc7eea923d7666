"""Exact resume: everything that a step reads or changes, in one verified file, written whole or not at all.

Saved are the student, the optimizer, the global step, dropout's seeds, the metrics of the unfinished epoch and the
history; never the teacher. Order and augmentation need no state: they are a function of (seed, epoch, position).
"""

import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.files import whole
from kdistill.training.strategy import ONE, Devices

KEPT = 2  # the newest, and the one before in case the newest is damaged
ASKED = 50  # steps; so often the workers ask the chief whether it is time for a checkpoint


def state_of(model: Supervised) -> list[keras.Variable]:
    """Every variable that training changes, each once, in a fixed order."""
    metrics = [variable for metric in model.metrics for variable in metric.variables]
    found = {id(v): v for v in [*model.variables, *model.optimizer.variables, *metrics]}
    return list(found.values())


def save(model: Supervised, folder: Path | None, history: dict, seconds: float) -> Path | None:
    """Writes `step-<global step>-<sha256>.npz`, then deletes all but the newest two.

    All of several workers have to call this, as metrics are summed over them; those without a folder write nothing.
    A disk that is full raises `InputError`; the checkpoints from before are still there then, and nothing half written.
    """
    step = int(model.global_step.numpy())
    values = {f"{i:04}": v.numpy() for i, v in enumerate(state_of(model))}
    if folder is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps({"history": history, "seconds": seconds})
    content = io.BytesIO()
    np.savez(content, about=np.array(about), **values)
    data = content.getvalue()
    path = folder / f"step-{step:09}-{hashlib.sha256(data).hexdigest()[:16]}.npz"
    write(path, data)
    for old in sorted(folder.glob("step-*.npz"))[:-KEPT]:
        old.unlink()
    return path


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all, and onto the disk."""
    try:
        with whole(path, synced=True) as part:
            part.write_bytes(data)
    except OSError as error:
        raise InputError(
            f"Cannot write '{path}' ({len(data):,} bytes): {error.strerror or error}. Nothing is lost: make room, then "
            "go on with --resume, from the checkpoint before."
        ) from None


def newest(folder: Path | None, say: Callable[[str], None]) -> bytes:
    """The content of the newest undamaged checkpoint, or nothing. A damaged file is named through `say`."""
    for path in sorted(folder.glob("step-*.npz"), reverse=True) if folder else []:
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] == path.stem.rsplit("-", 1)[1]:
            return data
        say(f"The checkpoint {path} is damaged (its content does not match its checksum); taking the one before.")
    return b""


def restore(
    model: Supervised, folder: Path | None, say: Callable[[str], None] = print, devices: Devices = ONE
) -> dict | None:
    """Puts the newest undamaged checkpoint's state on a compiled model; returns its history and seconds, or None.

    Of several workers all get what the chief has in its folder.
    """
    data = devices.share(newest(folder, say))
    if not data:
        return None
    with np.load(io.BytesIO(data), allow_pickle=False) as saved:
        about = json.loads(str(saved["about"]))
        values = [saved[name] for name in sorted(saved.files) if name != "about"]
    variables = state_of(model)
    # By position and shape: automatic names differ with what else the process has built.
    if [tuple(v.shape) for v in variables] != [value.shape for value in values]:
        raise InputError(
            f"The checkpoint in {folder} belongs to another model or optimizer: it holds {len(values)} variables, "
            f"this run has {len(variables)}, or their shapes differ. Resume with the recipe that wrote it."
        )
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return about


class Checkpoints(keras.callbacks.Callback):
    """Saves at the end of every epoch, and inside of one whenever `every` seconds have passed since the last.

    After a resume the first epoch starts with the metrics of the part that was done before. Without a folder it
    keeps the history and the time only.
    """

    def __init__(self, folder: Path | None, every: float, restored: dict | None, devices: Devices = ONE):
        super().__init__()
        self.folder, self.every, self.restored, self.devices = folder, every, restored, devices
        self.history = dict(restored["history"]) if restored else {}
        self.before = restored["seconds"] if restored else 0.0
        self.started = self.last = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Training time in all, over every session of this run."""
        return self.before + time.perf_counter() - self.started

    def on_epoch_begin(self, epoch, logs=None):
        # fit() has just reset the metrics; those of a part of this epoch that was done before come back.
        if self.restored:
            for metric, values in self.restored.pop("metrics", []):
                for variable, value in zip(metric.variables, values, strict=True):
                    variable.assign(value)

    def on_train_batch_end(self, batch, logs=None):
        # The epoch's end saves in a moment. A file of this step without the epoch's history would have the same number:
        # a resume might take that one, and count this epoch's metrics into the next.
        if batch + 1 >= (self.params.get("steps") or float("inf")):
            return
        due = time.perf_counter() - self.last >= self.every
        if self.devices.workers > 1:  # clocks differ, and all have to save at the same step
            due = (batch + 1) % ASKED == 0 and self.devices.share(b"save" if due else b"") == b"save"
        if due:
            self._save()

    def on_epoch_end(self, epoch, logs=None):
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        # What is saved here is the start of the next epoch: its metrics are empty.
        for metric in self.model.metrics:
            metric.reset_state()
        self._save()

    def _save(self):
        if self.folder is None and self.devices.workers == 1:
            return
        save(self.model, self.folder, self.history, self.seconds)
        self.last = time.perf_counter()


def remembered_metrics(model: Supervised) -> list:
    """The metrics and their values now, to be put back after `fit` has reset them."""
    return [(metric, [v.numpy() for v in metric.variables]) for metric in model.metrics]
