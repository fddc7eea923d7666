"""Callbacks of a run: TensorBoard by global step, a profile, and a stop at the first loss that is not finite."""

import time
from pathlib import Path

import keras
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event

from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed
from kdistill.files import atomic_file


class StopWhenNotFinite(keras.callbacks.Callback):
    """Stops with `CheckFailed` at the first loss that is NaN or infinite, and names the step and the term."""

    def on_train_batch_end(self, batch, logs=None):
        model: Supervised = self.model
        steps = model.broken_step.numpy()
        if (steps < 0).all() or isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer):
            return  # a scaled step that overflows is skipped by design
        names = ("loss", *model.part_names)
        first = min(step for step in steps if step >= 0)
        terms = [name for name, step in zip(names, steps, strict=True) if step == first and name != "loss"]
        raise CheckFailed(
            f"The loss is not finite at step {first} (term: {', '.join(terms) or 'loss'}). The weights are useless. "
            "Lower the learning rate (--set training.learning_rate=...), or check the inputs for NaN and unscaled "
            "pixels."
        )


class OneEpoch(keras.callbacks.Callback):
    """Ends `fit` after one epoch, whatever its `epochs`: the next epoch has a data set of its own."""

    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


class Profile(keras.callbacks.Callback):
    """Records one trace with TensorFlow's profiler under `folder`: up to three calls of the compiled steps.

    It starts with the second call, because the first one compiles. It changes no result.
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
    """Writes every epoch's metrics to TensorBoard by global step, which continues after a resume.

    Also writes the learning rate, the weights and temperatures of the loss, images per second, and the weights as
    histograms. Training metrics are in `folder/train`, validation metrics in `folder/validation`, as Keras writes them.
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
        values |= getattr(model, "settings", {})  # the weights and temperatures of a Distiller
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


def drop_events_after(folder: Path, step: int) -> None:
    """Deletes TensorBoard events after `step` (0: all events), so that a resumed run writes no step twice.

    A run that was killed between the events of an epoch and its checkpoint writes that epoch again.
    """
    for path in folder.rglob("events.out.tfevents.*"):
        if step == 0:
            path.unlink()
            continue
        records = []
        try:
            for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
                if Event.FromString(record).step <= step:
                    records.append(record)
        except tf.errors.DataLossError:
            pass  # the record that was being written when the run was killed
        with atomic_file(path) as part, tf.io.TFRecordWriter(str(part)) as writer:
            for record in records:
                writer.write(record)
