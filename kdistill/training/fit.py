"""One `fit` for teacher, control and student: all three train on the same data, optimizer, schedule and callbacks."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill.data.batches import WHOLE_BATCH, evaluation_batches, steps_per_epoch, training_batches
from kdistill.data.splits import Splits
from kdistill.distillation.supervised import Supervised
from kdistill.networks.keras_internals import layers_of
from kdistill.recipe import Data, Training
from kdistill.teachers.replay import Replay
from kdistill.training import callbacks, checkpoint
from kdistill.training.optimizers import scheduled_optimizer
from kdistill.training.strategy import SINGLE_DEVICE, Devices

UNSETTLED = 0.05  # share of their start that the moving statistics of batch normalization may have at the end
STEPS_PER_EXECUTION = 16  # a small model needs a third of the seconds per step that it needs with 1; more gains nothing


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
    devices: Devices = SINGLE_DEVICE,
    profile: bool = False,
) -> dict:
    """Trains a `Supervised` or `Distiller` with the settings of a recipe.

    The weights are those of the last epoch: the schedule ends there, and to pick the best epoch would be one more
    choice made on the validation images.

    Args:
        model: was created in the scope of `devices`; is compiled here.
        seed: determines the order of the images and their augmentation.
        logs: folder for TensorBoard. None, as for all workers but the chief: no logs.
        checkpoints: folder. Training resumes from the newest checkpoint in it and ends with the same bits as an
            uninterrupted training. None, as for all workers but the chief: no checkpoints.
        repeat: after this number of epochs, order and augmentation start over. None: they never repeat.
        stored: the teacher's stored outputs, of the same seed and batch size, which replace its forward pass.
        devices: each batch is split among their replicas.
        profile: records a trace of some steps in `logs/profile`.

    Returns:
        Seconds, steps, the metrics of the last epoch by name, and `history`, the metrics of all epochs; `warning`, if
        there is one (see `unsettled_warning`).

    Raises:
        CheckFailed: at the first loss that is not finite.
        InputError: the batch has fewer images than there are replicas; the checkpoint belongs to another model.
    """
    batch_size = min(training.batch_size, len(splits.train))
    devices.check_batch(batch_size, "batch_size")
    steps = steps_per_epoch(splits.train, training.batch_size)
    part = devices.part(batch_size)
    model.check_inputs = False  # a run checks them before, and states it in the report
    validation = _validation_batches(splits, training.batch_size, devices, stored)
    warning = unsettled_warning(model.student, steps * training.epochs)
    if warning:
        say(f"Warning: {warning}")
    _compile(model, training, steps, devices)
    restored = checkpoint.restore(model, checkpoints, say, devices)
    done = int(model.global_step.numpy())
    if restored:
        say(f"Resuming at step {done} of {steps * training.epochs}")
        restored["metrics"] = checkpoint.metric_values(model)
    checkpointing = checkpoint.Checkpoints(checkpoints, restored, devices)
    # Checkpointing comes last: what it saves, the others have written.
    all_callbacks = [*_callbacks(logs, done, training.batch_size, profile), checkpointing]
    for epoch in range(done // steps, training.epochs):
        first = done % steps if epoch == done // steps else 0
        view = epoch % repeat if repeat else epoch
        if stored:
            batches = stored.training_batches(view, first, part)
        else:
            batches = training_batches(splits.train, data, training.batch_size, seed, view, first, part)
        whole = part == WHOLE_BATCH
        model.fit(
            _sharded(batches) if whole else devices.parts(batches),
            # Keras cannot count the steps of a distributed data set: it has an element for each replica.
            steps_per_epoch=None if whole else steps - first,
            initial_epoch=epoch,
            epochs=training.epochs,
            validation_data=_sharded(validation),
            shuffle=False,
            callbacks=all_callbacks,
            verbose=(1 if sys.stdout.isatty() else 2) if devices.chief else 0,
        )
    history = checkpointing.history
    last = {name: float(values[-1]) for name, values in history.items()}
    record = {"seconds": checkpointing.seconds, "steps": steps * training.epochs, **last, "history": history}
    return record | ({"warning": warning} if warning else {})


def unsettled_warning(model: keras.Model, steps: int) -> str | None:
    """A warning if `steps` steps are too few for the moving statistics of batch normalization, or None.

    They start at 0 and 1, and after n steps with momentum m a share of m^n is still that. A network with the usual
    momentum of 0.99 or 0.999 validates at chance after some hundred steps, however well it has learned. Statistics
    that come trained are no matter.
    """
    norms = [layer for layer in layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)]
    norms = [layer for layer in norms if layer.built and layer.trainable and _is_new(layer)]
    momentum = max((layer.momentum for layer in norms), default=0.0)
    if momentum**steps <= UNSETTLED:
        return None
    slow = sum(layer.momentum**steps > UNSETTLED for layer in norms)
    longer = f", or train {math.ceil(math.log(UNSETTLED) / math.log(momentum)):,} steps" if momentum < 1 else ""
    return (
        f"Batch normalization of '{model.name}' ({slow} of its layers) has a momentum of {momentum:g}: after all "
        f"{steps:,} steps {momentum**steps:.0%} of its moving mean and variance are still those of the start. In "
        "validation and in its files the network will look worse than it is, down to chance. Set a momentum of at most "
        f"{math.floor(1000 * UNSETTLED ** (1 / steps)) / 1000:g}{longer}."
    )


def _is_new(norm: keras.layers.BatchNormalization) -> bool:
    return not np.any(norm.moving_mean) and bool(np.all(np.asarray(norm.moving_variance) == 1))


def _validation_batches(splits: Splits, batch_size: int, devices: Devices, stored: Replay | None) -> tf.data.Dataset:
    # At least one image for each replica; a batch is padded where the images are fewer.
    size = max(devices.replicas, min(batch_size, len(splits.validation)))
    return stored.evaluation_batches(size) if stored else evaluation_batches(splits.validation, size)


def _compile(model: Supervised, training: Training, steps: int, devices: Devices) -> None:
    with devices.scope():
        # TensorFlow crashes with several replicas and more than one step per execution.
        per_execution = 1 if devices.strategy else min(STEPS_PER_EXECUTION, steps)
        model.compile(scheduled_optimizer(training, steps * training.epochs), steps_per_execution=per_execution)
        model.optimizer.build(model.trainable_variables)


def _callbacks(logs: Path | None, done: int, batch_size: int, profile: bool) -> list:
    always = [callbacks.StopWhenNotFinite(), callbacks.OneEpoch()]
    if logs is None:
        return always
    callbacks.drop_events_after(logs, done)
    trace = [callbacks.Profile(logs / "profile")] if profile else []
    return [*always, callbacks.Scalars(logs, batch_size), *trace]


def _sharded(batches: tf.data.Dataset) -> tf.data.Dataset:
    """Global batches; each replica takes its part of every batch, as there are no files to distribute."""
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return batches.with_options(options)
