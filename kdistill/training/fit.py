"""One `fit` for teacher, control and student: the same data, optimizer, schedule and callbacks for all three."""

import sys
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from kdistill.data import batches as data_batches
from kdistill.data.splits import Splits
from kdistill.distillation.supervised import Supervised
from kdistill.recipe import Data, Training
from kdistill.teachers.replay import Replay
from kdistill.training import callbacks, checkpoint, optimizers
from kdistill.training.strategy import ONE, Devices

STEPS_PER_EXECUTION = 16  # small models: a third of the seconds per step of 1; more gains nothing
CHECKPOINT_SECONDS = 20.0


def optimizer(training: Training, steps: int) -> keras.Optimizer:
    """The optimizer that a recipe names, its rate scheduled over `steps` steps in all."""
    rate = learning_rate(training, steps)
    if training.optimizer == "sgd":
        made = optimizers.SGD(rate, momentum=training.momentum, weight_decay=training.weight_decay or None)
    else:
        made = optimizers.Adam(rate, weight_decay=training.weight_decay or None)
    if training.weight_decay:
        made.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return made


def learning_rate(training: Training, steps: int):
    """A number, or a Keras schedule: linear warm-up over a share of the steps, then a cosine to zero, no change, or one
    drop (`step`)."""
    rate, warmup = training.learning_rate, round(training.warmup * steps)
    if training.schedule == "step":
        last = max(0, round(training.drop_at * steps) - 1)  # the last step at the first rate
        return keras.optimizers.schedules.PiecewiseConstantDecay([last], [rate, rate * training.drop_factor])
    constant = training.schedule == "constant"
    if constant and not warmup:
        return rate
    start, target = (0.0, rate) if warmup else (rate, None)
    return keras.optimizers.schedules.CosineDecay(
        start, max(1, steps - warmup), alpha=1.0 if constant else 0.0, warmup_target=target, warmup_steps=warmup
    )


def fit(
    model: Supervised,
    splits: Splits,
    data: Data,
    training: Training,
    seed: int,
    logs: Path | None = None,
    checkpoints: Path | None = None,
    say: Callable[[str], None] = print,
    repeat: int | None = None,
    stored: Replay | None = None,
    devices: Devices = ONE,
    profile: bool = False,
) -> dict:
    """Trains a `Supervised` or `Distiller` as the recipe says; returns seconds, steps, the last epoch's metrics and the
    history of all epochs.

    With a `checkpoints` folder it goes on from the newest one there, and ends with the same bits as if it had never
    been interrupted. Order and augmentation are drawn with `seed`; after `repeat` epochs they come again. With
    `stored` (of the same seed and batch size) the teacher's outputs come with the images. The last epoch's weights are
    kept: the schedule ends there, and picking the best epoch would add a choice made on the validation images. Raises
    `CheckFailed` at the first loss that is not finite.

    Under a strategy `model` was made in the scope of `devices`, and the batch is split among the replicas. Of several
    workers only the chief has a folder for `logs` and `checkpoints`. With `profile` a trace of some steps is in
    `logs/profile`.
    """
    devices.check_batch(min(training.batch_size, len(splits.train)), "batch_size")
    steps = data_batches.steps_per_epoch(splits.train, training.batch_size)
    part = devices.part(min(training.batch_size, len(splits.train)))
    checking = max(devices.replicas, min(training.batch_size, len(splits.validation)))  # padded: no replica has none
    checks = (
        stored.evaluation_batches(checking) if stored else data_batches.evaluation_batches(splits.validation, checking)
    )
    with devices.scope():
        each = 1 if devices.strategy else min(STEPS_PER_EXECUTION, steps)  # replicas crash with more than 1
        model.compile(optimizer(training, steps * training.epochs), steps_per_execution=each)
        model.optimizer.build(model.trainable_variables)
    restored = checkpoint.restore(model, checkpoints, say, devices)
    done = int(model.global_step.numpy())
    if restored:
        say(f"Going on at step {done} of {steps * training.epochs}")
        restored["metrics"] = checkpoint.remembered_metrics(model)
    keeper = checkpoint.Checkpoints(checkpoints, CHECKPOINT_SECONDS, restored, devices)
    watchers = [callbacks.StopWhenNotFinite(), callbacks.OneEpoch()]
    if logs is not None:
        callbacks.forget_after(logs, done)
        watchers.append(callbacks.Scalars(logs, training.batch_size))
        watchers += [callbacks.Profile(logs / "profile")] if profile else []
    watchers.append(keeper)  # last: what it saves, the others have seen
    for epoch in range(done // steps, training.epochs):
        first, view = done % steps if epoch == done // steps else 0, epoch % repeat if repeat else epoch
        if stored:
            batches = stored.training_batches(view, first)
        else:
            batches = data_batches.training_batches(splits.train, data, training.batch_size, seed, view, first, part)
        model.fit(
            _sharded(batches) if part == data_batches.WHOLE else devices.parts(batches),
            steps_per_epoch=steps - first
            if part != data_batches.WHOLE
            else None,  # of replicas, TensorFlow counts each
            initial_epoch=epoch,
            epochs=training.epochs,
            validation_data=_sharded(checks),
            shuffle=False,
            callbacks=watchers,
            verbose=(1 if sys.stdout.isatty() else 2) if devices.chief else 0,
        )
    last = {name: float(values[-1]) for name, values in keeper.history.items()}
    return {"seconds": keeper.seconds, "steps": steps * training.epochs, **last, "history": keeper.history}


def _sharded(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Global batches, of which each of several replicas takes its part: there are no files to share out."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.with_options(options)
