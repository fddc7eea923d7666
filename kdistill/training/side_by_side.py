"""Many students in one step: a batch is read once, passes through the teacher once, and trains all students.

Every member is the `Supervised` or `Distiller` of a single run, with its own optimizer and its own `train_step`:
therefore it ends with the weights of the single run.
"""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from kdistill.data.batches import steps_per_epoch, training_batches
from kdistill.data.splits import Examples, Splits
from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.networks.keras_internals import layers_of
from kdistill.recipe import Data, Training
from kdistill.teachers.frozen import Predict
from kdistill.teachers.replay import Replay
from kdistill.training import checkpoint
from kdistill.training.optimizers import NO_INLINE, scheduled_optimizer
from kdistill.training.shared_step import SharedStep

FIRST_STEPS = 1000  # measured often, as in He's study (2017)
FIRST_INTERVAL = 50  # steps between two measurements among the first
LONGEST_INTERVAL = 500  # steps between two measurements, and between two checkpoints
MEASURED_IMAGES = 1000  # validation images of a measurement
PROGRESS_SECONDS = 20.0  # between two messages about the progress


class OncePerBatch:
    """A teacher that runs once per batch, whatever the number of students."""

    def __init__(self, teach: Predict):
        self.teach, self.inputs, self.outputs = teach, None, None

    def show(self, inputs, outputs) -> None:
        """Outputs that are computed already: students get them for these inputs, the same tensor."""
        self.inputs, self.outputs = inputs, outputs

    def __call__(self, inputs):
        if not tf.is_symbolic_tensor(inputs):  # the first look of a student at its teacher, in between
            return self.teach(inputs)
        # In a traced step all students get the same tensor, so the graph has one forward pass of the teacher.
        if self.inputs is not inputs:
            self.show(inputs, self.teach(inputs))
        return self.outputs


class SideBySide:
    """Compiled students by name, trained together. It offers what `checkpoint` needs of a model: the state of all.

    Students of one architecture share one trace of the step, see `SharedStep`: the first step of many students takes
    little longer than that of one.

    Args:
        members: the students by name.
        teacher: the teacher that the Distillers among them call. None: data with stored logits, or no Distiller.
        sources: by name, the place of a student's batch in the data, a tuple of batches. None: all get one batch.
    """

    def __init__(
        self,
        members: dict[str, Supervised],
        teacher: OncePerBatch | None = None,
        sources: dict[str, int] | None = None,
    ):
        if tf.distribute.has_strategy():
            raise InputError(
                "Students train side by side on one device only. Remove --strategy, or train them one by one."
            )
        self.members, self.teacher, self.sources = members, teacher, sources
        self.variables = [v for member in members.values() for v in member.variables]
        self.metrics = [metric for member in members.values() for metric in member.metrics]
        self.optimizer = _Variables([v for member in members.values() for v in member.optimizer.variables])
        self.global_step = next(iter(members.values())).global_step
        self._teach = teacher and tf.function(teacher.teach, autograph=False, **NO_INLINE)
        self._train = SharedStep(self._shown("train_step"))
        self._test = SharedStep(self._shown("test_step"))
        self._predict = SharedStep(lambda member, images: tf.cast(member.student(images, training=False), tf.float32))
        self._advance = tf.function(self._steps, reduce_retracing=True)
        self._evaluate = tf.function(self._test_steps, reduce_retracing=True)
        self._outputs = tf.function(self._logits, reduce_retracing=True)

    def _shown(self, method: str) -> Callable:
        """The step of a member on a batch, for which the teacher has computed its outputs (None: stored, or unused)."""

        def step(member: Supervised, batch, taught) -> None:
            if taught is not None:
                self.teacher.show(batch[0], taught)
            getattr(member, method)(batch)

        return step

    def _taught(self, batch, members):
        """The teacher's outputs for a batch, or None where these members do not need them."""
        is_stored = isinstance(batch[1], dict)
        if self.teacher is None or is_stored or not any(isinstance(member, Distiller) for member in members):
            return None
        return self._teach(batch[0])

    def _steps(self, iterator, count):
        for _ in tf.range(count):
            self._step(next(iterator))

    @tf.autograph.experimental.do_not_convert
    def _step(self, data):
        batches = data if self.sources else (data,)
        places = self.sources or dict.fromkeys(self.members, 0)
        for place, batch in enumerate(batches):
            members = [member for name, member in self.members.items() if places[name] == place]
            taught = self._taught(batch, members)
            for member in members:
                self._train(member, batch, taught if isinstance(member, Distiller) else None)

    def _test_steps(self, iterator, count, names: tuple[str, ...]):
        for _ in tf.range(count):
            self._test_step(next(iterator), names)

    @tf.autograph.experimental.do_not_convert
    def _test_step(self, batch, names: tuple[str, ...]):
        members = [self.members[name] for name in names]
        taught = self._taught(batch, members)
        for member in members:
            self._test(member, batch, taught if isinstance(member, Distiller) else None)

    def train(self, iterator, steps: int) -> None:
        """Trains for `steps` steps, and adds them to the metrics."""
        self._advance(iterator, tf.constant(steps))

    def advance(self, iterator, steps: int) -> dict[str, dict[str, float]]:
        """Trains for `steps` steps; returns the mean metrics of these steps: by student, by metric."""
        self.reset_metrics()
        self.train(iterator, steps)
        metrics = self.results()
        self.reset_metrics()  # so that a checkpoint contains no unfinished mean
        return metrics

    def evaluate(self, batches: tf.data.Dataset, names: Iterable[str]) -> None:
        """Adds the batches `(inputs, targets, weights)` to the metrics of these students. The teacher runs once."""
        self._evaluate(iter(batches), tf.constant(int(batches.cardinality())), tuple(names))

    def results(self) -> dict[str, dict[str, float]]:
        """The means since the last reset: by student, by metric."""
        return {
            name: {metric.name: float(metric.result()) for metric in member.metrics}
            for name, member in self.members.items()
        }

    def reset_metrics(self) -> None:
        """Starts new means."""
        for metric in self.metrics:
            metric.reset_state()

    @tf.autograph.experimental.do_not_convert
    def _logits(self, images):
        return tf.stack([self._predict(member, images) for member in self.members.values()])

    def predict(self, images: np.ndarray, batch_size: int = 256) -> dict[str, np.ndarray]:
        """The students' outputs by name, float32 `[n, classes]`, for images `[n, h, w, c]` of raw pixels."""
        outputs = [
            self._outputs(tf.constant(images[start : start + batch_size], tf.float32)).numpy()
            for start in range(0, len(images), batch_size)
        ]
        return dict(zip(self.members, np.concatenate(outputs, axis=1), strict=True))

    def broken(self) -> dict[str, int]:
        """By student, the first step whose loss was not finite; students without such a step are missing."""
        broken = {name: member.broken_step.numpy() for name, member in self.members.items()}
        return {name: int(steps[steps >= 0].min()) for name, steps in broken.items() if (steps >= 0).any()}


class _Variables:
    def __init__(self, variables):
        self.variables = variables


def memory(members: dict[str, Supervised], batch_size: int) -> dict[str, int]:
    """Bytes that the training of these students takes: `state` (weights, gradients, optimizer) and `activations`.

    `state` is exact. `activations` is an estimate: the outputs of all layers for one batch, and as many gradients.
    """
    state = activations = 0
    for member in members.values():
        variables = [*member.variables, *member.trainable_variables, *member.optimizer.variables]
        state += sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size for v in variables)
        size = tf.as_dtype(member.student.compute_dtype).size
        for layer in layers_of(member.student):
            shape = getattr(getattr(layer, "output", None), "shape", None) or ()
            activations += 2 * size * batch_size * math.prod(side or 1 for side in shape[1:])
    return {"state": state, "activations": activations}


def models_that_fit(members: dict[str, Supervised], batch_size: int) -> int:
    """The number of models that fit into half of the free memory at a time, if they are like the largest of these."""
    largest = max(sum(memory({name: member}, batch_size).values()) for name, member in members.items())
    return max(1, free_memory() // 2 // max(1, largest))


def free_memory() -> int:
    """Bytes of memory that this process may take: of the machine, or of its container. Of a GPU, 4 GB are assumed."""
    if tf.config.list_physical_devices("GPU"):
        return 4 << 30  # TensorFlow does not tell
    lines = _text("/proc/meminfo").splitlines()
    free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        free.append(max(0, int(limit) - int(used)))
    return min(free, default=4 << 30)


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def compiled(member: Supervised, training: Training, steps: int) -> Supervised:
    """Compiles a student with the optimizer of its own settings, scheduled over `steps` steps in total."""
    member.compile(scheduled_optimizer(training, steps, apart=True))
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
    """Trains all students of a group. Arguments as for `kdistill.training.fit.fit`.

    The students share the epochs and the batch size of `training`. With a `checkpoints` folder, training resumes
    exactly from the newest checkpoint in it. A student whose loss is no longer finite is named and continues, because
    the other students are not affected.

    Returns:
        Seconds, steps, and `curves`: by student, lists with one entry per measurement: `step`, `validation` (accuracy,
        or None where it was not measured), and the mean of each metric since the measurement before.
    """
    per_epoch = steps_per_epoch(splits.train, training.batch_size)
    total, started = per_epoch * training.epochs, time.perf_counter()
    restored = checkpoint.restore(group, checkpoints, say) if checkpoints else None
    curves = restored["history"] if restored else {name: {"step": [], "validation": []} for name in group.members}
    before, saved = restored["seconds"] if restored else 0.0, time.perf_counter()
    done = int(group.global_step.numpy())
    if done:
        say(f"Resuming at step {done:,} of {total:,}")
    sample = Examples(splits.validation.images[:MEASURED_IMAGES], splits.validation.labels[:MEASURED_IMAGES])
    progress, iterator = Progress(per_epoch, training.epochs, say), None
    for step in measured_steps(per_epoch, training.epochs):
        if step <= done:
            continue
        epoch, first = divmod(done, per_epoch)
        if iterator is None or not first:
            view = epoch % repeat if repeat else epoch
            if stored:
                batches = stored.training_batches(view, first)
            else:
                batches = training_batches(splits.train, data, training.batch_size, seed, view, first)
            iterator = iter(batches)
        metrics = group.advance(iterator, step - done)
        done = step
        accuracy = _accuracy(group, sample) if done <= FIRST_STEPS or done % per_epoch == 0 else {}
        _extend(curves, done, metrics, accuracy)
        progress.report(done, accuracy, group.broken())
        seconds = before + time.perf_counter() - started
        if checkpoints and (done == total or time.perf_counter() - saved >= checkpoint.CHECKPOINT_SECONDS):
            checkpoint.save(group, checkpoints, curves, seconds)
            saved = time.perf_counter()
    return {"seconds": before + time.perf_counter() - started, "steps": total, "curves": curves}


def measured_steps(per_epoch: int, epochs: int) -> list[int]:
    """The steps after which the curves get a point: often among the first 1,000, at the end of every epoch, and
    between, at least every `LONGEST_INTERVAL` steps."""
    total = per_epoch * epochs
    interval = max(1, min(FIRST_INTERVAL, total // 20))
    steps = {*range(interval, min(FIRST_STEPS, total) + 1, interval)}
    for start in range(0, total, per_epoch):
        steps |= {*range(start + LONGEST_INTERVAL, start + per_epoch, LONGEST_INTERVAL), start + per_epoch}
    return sorted(steps)


def _extend(curves: dict, step: int, metrics: dict[str, dict[str, float]], accuracy: dict[str, float]) -> None:
    for name, values in metrics.items():
        curve = curves[name]
        curve["step"].append(step)
        curve["validation"].append(accuracy.get(name))
        for key, value in values.items():
            curve.setdefault(key, []).append(value if math.isfinite(value) else None)


class Progress:
    """Messages: every epoch, every `PROGRESS_SECONDS` inside one, and once for each student that diverges."""

    def __init__(self, per_epoch: int, epochs: int, say: Callable[[str], None]):
        self.per_epoch, self.epochs, self.say = per_epoch, epochs, say
        self.last, self.diverged = time.perf_counter(), set()

    def report(self, step: int, accuracy: dict[str, float], broken: dict[str, int]) -> None:
        for name, first in broken.items():
            if name not in self.diverged:
                self.diverged.add(name)
                self.say(
                    f"{name}: the loss is not finite from step {first} on. Training continues, but the weights of "
                    "this student are useless."
                )
        epoch, inside = divmod(step, self.per_epoch)
        if not inside:
            self.say(f"Epoch {epoch} of {self.epochs}: {_line(accuracy)}")
        elif time.perf_counter() - self.last >= PROGRESS_SECONDS:
            self.say(f"Step {step:,} of {self.per_epoch * self.epochs:,}")
        else:
            return
        self.last = time.perf_counter()


def _accuracy(group: SideBySide, sample: Examples) -> dict[str, float]:
    outputs = group.predict(sample.images)
    return {name: float(np.mean(logits.argmax(axis=1) == sample.labels)) for name, logits in outputs.items()}


def _line(accuracy: dict[str, float]) -> str:
    best = max(accuracy, key=accuracy.get)
    low = min(accuracy.values())
    return f"validation accuracy {low:.2%} to {accuracy[best]:.2%} ({best})"
