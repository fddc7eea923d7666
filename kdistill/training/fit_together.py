"""The `fit` of a run for several models at a time: what `training.fit.fit` does for one, in one step for all.

Every model has the batches of its own seed, and ends with the weights of its own `fit`: it has the same step, the same
batches in the same order, and nothing in common with the others but the forward passes of the teacher. Where TensorFlow
optimizes the graph of a step in another way, such as for ResNet-8, they differ by rounding.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tensorflow as tf

from kdistill.data.batches import evaluation_batches, steps_per_epoch, training_batches
from kdistill.data.splits import Splits
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed
from kdistill.recipe import Data, Training
from kdistill.teachers.replay import Replay
from kdistill.training import callbacks, checkpoint
from kdistill.training.fit import STEPS_PER_EXECUTION, unsettled_warning
from kdistill.training.side_by_side import OncePerBatch, Progress, SideBySide, compiled

Batches = Callable[[int, int], tf.data.Dataset]  # epoch, first step -> the batches of the rest of this epoch


@dataclass(frozen=True)
class Member:
    """A model and its data, as the arguments of `training.fit.fit`."""

    model: Supervised
    splits: Splits
    seed: int
    repeat: int | None = None
    stored: Replay | None = None


def fit_together(
    members: dict[str, Member],
    teacher: OncePerBatch,
    data: Data,
    training: Training,
    logs: Path,
    checkpoints: Path,
    say: Callable[[str], None] = print,
) -> dict[str, dict]:
    """Trains models side by side, each as `training.fit.fit` would alone.

    Args:
        members: by name; they have the same number of training images, and the same validation images.
        teacher: the teacher that the Distillers among them call. It runs where batches have no stored logits.
        data, training: as for `training.fit.fit`.
        logs: folder for TensorBoard; each model has a folder in it.
        checkpoints: folder. Training resumes from the newest checkpoint in it and ends with the same bits.

    Returns:
        By name, the record of `training.fit.fit`. `seconds` is the time of all models, divided by their number;
        `together` is this number.

    Raises:
        CheckFailed: at the first loss that is not finite; the message names the model.
    """
    first_splits = next(iter(members.values())).splits
    steps = steps_per_epoch(first_splits.train, training.batch_size)
    warnings = {
        name: unsettled_warning(member.model.student, steps * training.epochs) for name, member in members.items()
    }
    for warning in sorted({*filter(None, warnings.values())}):
        say(f"Warning: {warning}")
    models = {name: compiled(member.model, training, steps * training.epochs) for name, member in members.items()}
    sources, places = _sources(members, data, training.batch_size)
    group, names = SideBySide(models, teacher, places), list(members)
    validation = _validation(members, min(training.batch_size, len(first_splits.validation)))
    started = saved = time.perf_counter()
    restored = checkpoint.restore(group, checkpoints, say)
    histories = restored["history"] if restored else {name: {} for name in names}
    before, total = restored["seconds"] if restored else 0.0, steps * training.epochs
    done = int(group.global_step.numpy())
    if restored:
        say(f"Resuming at step {done} of {total}")
    observers = [_Observer(name, model, logs / name, done, training.batch_size) for name, model in models.items()]
    progress = Progress(steps, training.epochs, say)
    while done < total:
        epoch, first = divmod(done, steps)
        if not first:  # inside an epoch, the metrics of its first part are those of the checkpoint
            group.reset_metrics()
        iterator = iter(tf.data.Dataset.zip(tuple(source(epoch, first) for source in sources)))
        for observer in observers:
            observer.scalars.on_epoch_begin(epoch)
        end = done - first + steps
        while done < end:
            count = min(STEPS_PER_EXECUTION, end - done)
            group.train(iterator, count)
            done += count
            for observer in observers:
                observer.stop_when_not_finite()
            if done < end and time.perf_counter() - saved >= checkpoint.CHECKPOINT_SECONDS:
                progress.report(done, {}, {})
                checkpoint.save(group, checkpoints, histories, before + time.perf_counter() - started)
                saved = time.perf_counter()
        metrics = group.results()
        group.reset_metrics()
        for observer in observers:
            observer.scalars.on_test_begin()
        for batches, of_these in validation:
            group.evaluate(batches, of_these)
        validated = group.results()
        group.reset_metrics()  # the checkpoint is the start of the next epoch
        for observer, name in zip(observers, names, strict=True):
            values = dict(sorted(metrics[name].items()))
            values |= {f"val_{key}": value for key, value in sorted(validated[name].items())}
            observer.scalars.on_epoch_end(epoch, values)
            for key, value in values.items():
                histories[name].setdefault(key, []).append(value)
        progress.report(done, {name: validated[name]["accuracy"] for name in names}, {})
        checkpoint.save(group, checkpoints, histories, before + time.perf_counter() - started)
        saved = time.perf_counter()
    seconds = (before + time.perf_counter() - started) / len(names)
    return {
        name: {
            "seconds": seconds,
            "together": len(names),
            "steps": total,
            **{key: float(values[-1]) for key, values in history.items()},
            "history": history,
            **({"warning": warnings[name]} if warnings[name] else {}),
        }
        for name, history in histories.items()
    }


def _sources(members: dict[str, Member], data: Data, batch_size: int) -> tuple[list[Batches], dict[str, int]]:
    """The different batches that these models train on, and by name the place of its own in this list.

    A control has the batches of the student of its seed, with stored logits or without: it ignores them.
    """
    keys = {name: (id(member.splits), member.seed, member.repeat) for name, member in members.items()}
    stored = {keys[name]: member.stored for name, member in members.items() if member.stored}

    def source(member: Member, replay: Replay | None) -> Batches:
        def batches(epoch: int, first: int) -> tf.data.Dataset:
            view = epoch % member.repeat if member.repeat else epoch
            if replay:
                return replay.training_batches(view, first)
            return training_batches(member.splits.train, data, batch_size, member.seed, view, first)

        return batches

    sources = {key: source(members[name], stored.get(key)) for name, key in keys.items()}
    places = {key: place for place, key in enumerate(sources)}
    return list(sources.values()), {name: places[key] for name, key in keys.items()}


def _validation(members: dict[str, Member], batch_size: int) -> list[tuple[tf.data.Dataset, list[str]]]:
    """Validation batches, with stored logits or without, and the models to evaluate on them."""
    # All caches hold the same logits of the validation images, which do not depend on the seed.
    with_logits = [name for name, member in members.items() if member.stored]
    others = [name for name in members if name not in with_logits]
    passes = []
    if with_logits:
        passes.append((members[with_logits[0]].stored.evaluation_batches(batch_size), with_logits))
    if others:
        passes.append((evaluation_batches(members[others[0]].splits.validation, batch_size), others))
    return passes


class _Observer:
    """What the callbacks of `training.fit.fit` do, for one of the models."""

    def __init__(self, name: str, model: Supervised, logs: Path, done: int, batch_size: int):
        self.name = name
        callbacks.drop_events_after(logs, done)
        self.scalars, self.stop = callbacks.Scalars(logs, batch_size), callbacks.StopWhenNotFinite()
        self.scalars.set_model(model)
        self.stop.set_model(model)

    def stop_when_not_finite(self) -> None:
        try:
            self.stop.on_train_batch_end(0)
        except CheckFailed as error:
            raise CheckFailed(f"{self.name}: {error}") from None
