"""Callbacks of a run: TensorBoard by the global step, and a stop at the first loss that is not finite."""

import time
from pathlib import Path

import keras
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event

from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed
from kdistill.files import whole


class StopWhenNotFinite(keras.callbacks.Callback):
    """Stops with `CheckFailed` at the first loss that is NaN or infinite, and names the step and the term."""

    def on_train_batch_end(self, batch, logs=None):
        model: Supervised = self.model
        steps = model.broken_step.numpy()
        if (steps < 0).all() or isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
            return  # a scaled step that overflows is skipped by design
        names = ("loss", *model._parts)
        first = min(step for step in steps if step >= 0)
        terms = [name for name, step in zip(names, steps, strict=True) if step == first and name != "loss"]
        raise CheckFailed(
            f"The loss is not finite at step {first} (term: {', '.join(terms) or 'loss'}). The weights are useless. "
            "Lower the learning rate (--set training.learning_rate=...), or look for NaN or unscaled inputs."
        )


class OneEpoch(keras.callbacks.Callback):
    """Ends `fit` after one epoch, though it was told of all: the next one has a data set of its own."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


class Profile(keras.callbacks.Callback):
    """Records one trace with TensorFlow's profiler under `folder`: up to three calls of the compiled steps.

    It starts with the second call, as the first one compiles. What ran is not changed by it.
    """

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.calls, self.running = folder, 0, False

    def on_train_batch_begin(self, batch, logs=None):
        if self.calls == 1:
            tf.profiler.experimental.start(str(self.folder))
            self.running = True
        self.calls += 1

    def on_train_batch_end(self, batch, logs=None):
        if self.calls == 4:
            self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()

    def on_train_end(self, logs=None):
        self._stop()

    def _stop(self):
        if self.running:
            tf.profiler.experimental.stop()
            self.running = False


class Scalars(keras.callbacks.Callback):
    """Writes every epoch's metrics to TensorBoard under the global step, which goes on from run to run.

    Besides the logs: learning rate, weights and temperatures of the loss, images per second. Training goes to
    `folder/train`, validation to `folder/validation`, as with Keras' own callback. Weights are written as histograms.
    """

    def __init__(self, folder, batch_size: int):
        super().__init__()
        self.batch_size = batch_size
        self.writers = {name: tf.summary.create_file_writer(f"{folder}/{name}") for name in ("train", "validation")}

    def on_epoch_begin(self, epoch, logs=None):
        self.started, self.first = time.perf_counter(), int(self.model.global_step.numpy())

    def on_test_begin(self, logs=None):
        self.trained = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        model, step = self.model, int(self.model.global_step.numpy())
        seconds = self.trained - self.started
        values = {"epoch_" + name: value for name, value in (logs or {}).items() if not name.startswith("val_")}
        values["learning_rate"] = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        values["images_per_second"] = (step - self.first) * self.batch_size / seconds
        values |= getattr(model, "settings", {})  # weights and temperatures, of a Distiller
        with self.writers["train"].as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
            for weight in model.student.trainable_weights:
                tf.summary.histogram(weight.path, weight.numpy())
        with self.writers["validation"].as_default(step=step):
            for name, value in (logs or {}).items():
                if name.startswith("val_"):
                    tf.summary.scalar("epoch_" + name[4:], value)

        for writer in self.writers.values():
            writer.flush()


def forget_after(folder: Path, step: int) -> None:
    """Drops TensorBoard events later than `step` (0: all), so that a resumed run neither repeats nor rewinds.

    A run killed between an epoch's events and its checkpoint has written that epoch; it will write it again.
    """
    for path in folder.rglob("events.out.tfevents.*"):
        if step == 0:
            path.unlink()
            continue
        kept = []
        try:
            for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                if Event.FromString(record).step <= step:
                    kept.append(record)
        except tf.errors.DataLossError:
            pass  # the record that was being written when the run was killed
        with whole(path) as part, tf.io.TFRecordWriter(str(part)) as writer:
            for record in kept:
                writer.write(record)
