"""Many students in one step: each batch is read once, goes through the teacher once, and trains all of them.

Every member is the `Supervised` or `Distiller` that a run of its own would train, with its own optimizer, and its own
`train_step` is called: so its weights are those of the single run.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from kdistill.data import batches as data_batches
from kdistill.data.splits import Examples, Splits
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.recipe import Data, Training
from kdistill.teachers.frozen import Predict
from kdistill.teachers.replay import Replay
from kdistill.training import checkpoint
from kdistill.training import fit as training_fit

FIRST = 1000  # steps that are watched closely, as in He's study (2017)
WINDOW = 50  # steps between two looks in these
LONGEST = 500  # steps without a look or a checkpoint
LOOKED_AT = 1000  # validation images at a look
TELL_SECONDS = 20.0  # without a word about the progress


class Once:
    """A teacher that is run once for each batch, however many students ask for its outputs."""

    def __init__(self, teach: Predict):
        self.teach, self.inputs, self.outputs = teach, None, None

    def __call__(self, inputs):
        # In a traced step all students hold the same tensor, so the graph has one forward of the teacher.
        if self.inputs is not inputs:
            self.inputs, self.outputs = inputs, self.teach(inputs)
        return self.outputs


class SideBySide:
    """Compiled students by name, trained together. What `checkpoint` needs of a model it has: all students' state."""

    def __init__(self, members: dict[str, Supervised]):
        if tf.distribute.has_strategy():
            raise InputError("Students train side by side on one device. Leave --strategy out, or run each by itself.")
        self.members = members
        self.variables = [v for member in members.values() for v in member.variables]
        self.metrics = [metric for member in members.values() for metric in member.metrics]
        self.optimizer = _Variables([v for member in members.values() for v in member.optimizer.variables])
        self.global_step = next(iter(members.values())).global_step
        self._advance = tf.function(self._steps, reduce_retracing=True)
        self._outputs = tf.function(self._logits, reduce_retracing=True)

    def _steps(self, iterator, count):
        for _ in tf.range(count):
            self._step(next(iterator))

    @tf.autograph.experimental.do_not_convert
    def _step(self, data):
        for member in self.members.values():
            member.train_step(data)

    def advance(self, iterator, steps: int) -> dict[str, dict[str, float]]:
        """Takes so many steps; the means over these of what each student logs, by name."""
        for metric in self.metrics:
            metric.reset_state()
        self._advance(iterator, tf.constant(steps))
        logged = {
            name: {metric.name: float(metric.result()) for metric in member.metrics}
            for name, member in self.members.items()
        }
        for metric in self.metrics:  # so that a checkpoint holds no part of a mean
            metric.reset_state()
        return logged

    @tf.autograph.experimental.do_not_convert
    def _logits(self, images):
        return tf.stack(
            [tf.cast(member.student(images, training=False), tf.float32) for member in self.members.values()]
        )

    def predict(self, images: np.ndarray, batch_size: int = 256) -> dict[str, np.ndarray]:
        """Every student's outputs, float32 `[n, classes]`, on images `[n, h, w, c]`, raw pixels."""
        found = [
            self._outputs(tf.constant(images[start : start + batch_size], tf.float32)).numpy()
            for start in range(0, len(images), batch_size)
        ]
        return dict(zip(self.members, np.concatenate(found, axis=1), strict=True))

    def broken(self) -> dict[str, int]:
        """The first step at which a student's loss was not finite, by name, of those that have one."""
        steps = {name: member.broken_step.numpy() for name, member in self.members.items()}
        return {name: int(found[found >= 0].min()) for name, found in steps.items() if (found >= 0).any()}


class _Variables:
    def __init__(self, variables):
        self.variables = variables


def memory(members: dict[str, Supervised], batch_size: int) -> dict[str, int]:
    """Bytes that training these students takes: `state` (weights, gradients, optimizer), exact, and `activations`.

    The activations are what their layers put out for one batch, twice: forward, and the gradients of it. Operations
    keep more or less than that, so it is an estimate.
    """
    state = activations = 0
    for member in members.values():
        variables = [*member.variables, *member.trainable_variables, *member.optimizer.variables]
        state += sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)
        size = tf.as_dtype(member.student.compute_dtype).size
        for layer in member.student._flatten_layers(include_self=False):
            shape = getattr(getattr(layer, "output", None), "shape", None) or ()
            activations += 2 * size * batch_size * math.prod(side or 1 for side in shape[1:])
    return {"state": state, "activations": activations}


def compiled(member: Supervised, training: Training, steps: int) -> Supervised:
    """The member with the optimizer of its own settings, scheduled over `steps` steps in all."""
    member.compile(training_fit.optimizer(training, steps))
    member.optimizer.build(member.trainable_variables)
    return member


def fit(
    group: SideBySide,
    splits: Splits,
    data: Data,
    training: Training,
    seed: int,
    checkpoints: Path | None = None,
    say: Callable[[str], None] = print,
    repeat: int | None = None,
    stored: Replay | None = None,
) -> dict:
    """Trains all students of a group; `training` gives the epochs and the batch size that they share. `repeat` and
    `stored` as in `train.fit`.

    Returns seconds and curves: by student, lists over the looks: `step`, what it logged since the look before, and
    `validation` (accuracy, None where it was not measured). With a `checkpoints` folder it goes on from the newest one
    there, exactly. A student whose loss is no longer finite is named and trains on: the others are not its fault.
    """
    per_epoch = data_batches.steps_per_epoch(splits.train, training.batch_size)
    total, started = per_epoch * training.epochs, time.perf_counter()
    restored = checkpoint.restore(group, checkpoints, say) if checkpoints else None
    curves = restored["history"] if restored else {name: {"step": [], "validation": []} for name in group.members}
    before, saved = restored["seconds"] if restored else 0.0, time.perf_counter()
    told = saved
    done = int(group.global_step.numpy())
    if done:
        say(f"Going on at step {done:,} of {total:,}")
    sample = Examples(splits.validation.images[:LOOKED_AT], splits.validation.labels[:LOOKED_AT])
    known_broken, iterator = set(), None
    for look in looks(per_epoch, training.epochs):
        if look <= done:
            continue
        epoch, first = divmod(done, per_epoch)
        if iterator is None or not first:
            view = epoch % repeat if repeat else epoch
            if stored:
                batches = stored.training_batches(view, first)
            else:
                batches = data_batches.training_batches(splits.train, data, training.batch_size, seed, view, first)
            iterator = iter(batches)
        logged = group.advance(iterator, look - done)
        done = look
        accuracy = _accuracy(group, sample) if done <= FIRST or done % per_epoch == 0 else {}
        for name, values in logged.items():
            curve = curves[name]
            curve["step"].append(done)
            curve["validation"].append(accuracy.get(name))
            for key, value in values.items():
                curve.setdefault(key, []).append(value if math.isfinite(value) else None)
        for name, step in group.broken().items():
            if name not in known_broken:
                known_broken.add(name)
                say(f"{name}: the loss is not finite from step {step} on. It trains on, but its weights are useless.")
        if done % per_epoch and time.perf_counter() - told >= TELL_SECONDS:
            say(f"Step {done:,} of {total:,}")
            told = time.perf_counter()
        if done % per_epoch == 0:
            told = time.perf_counter()
            say(f"Epoch {done // per_epoch} of {training.epochs}: " + _line(accuracy))
        seconds = before + time.perf_counter() - started
        if checkpoints and (done == total or time.perf_counter() - saved >= training_fit.CHECKPOINT_SECONDS):
            checkpoint.save(group, checkpoints, curves, seconds)
            saved = time.perf_counter()
    return {"seconds": before + time.perf_counter() - started, "steps": total, "curves": curves}


def looks(per_epoch: int, epochs: int) -> list[int]:
    """The steps after which curves are written: often in the first 1,000, at every epoch's end, and between."""
    total = per_epoch * epochs
    often = max(1, min(WINDOW, total // 20))
    found = {*range(often, min(FIRST, total) + 1, often)}
    for epoch in range(epochs):
        found |= {*range(epoch * per_epoch + LONGEST, (epoch + 1) * per_epoch, LONGEST), (epoch + 1) * per_epoch}
    return sorted(found)


def _accuracy(group: SideBySide, sample: Examples) -> dict[str, float]:
    outputs = group.predict(sample.images)
    return {name: float(np.mean(logits.argmax(axis=1) == sample.labels)) for name, logits in outputs.items()}


def _line(accuracy: dict[str, float]) -> str:
    best = max(accuracy, key=accuracy.get)
    low = min(accuracy.values())
    return f"validation accuracy {low:.2%} to {accuracy[best]:.2%} ({best})"
