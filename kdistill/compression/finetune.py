"""Fine-tunes a tf_keras network in tfmot's wrappers on labels and on a frozen Keras 3 teacher."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import tensorflow as tf
import tf_keras

from kdistill.data.batches import PREFETCH, without_autotuning
from kdistill.distillation.losses import hard_cross_entropy
from kdistill.distillation.step_loss import is_labeled, is_right, step_loss
from kdistill.errors import CheckFailed
from kdistill.networks.heads import SMALLEST_PROBABILITY, TINIEST
from kdistill.recipe import Term

Predict = Callable[[tf.Tensor], tf.Tensor]
KerasSchedule = keras.optimizers.schedules.LearningRateSchedule
STEPS_PER_EXECUTION = 16


@dataclass(frozen=True)
class Batches:
    """Training batches `(float32 images, labels)` by epoch, `steps` in an epoch, and those of validation.

    `taught`: the same batches with targets `{"labels": ..., "teacher_logits": ...}`, where outputs of the teacher are
    stored, and `taught_validation` likewise.
    """

    of_epoch: Callable[[int], tf.data.Dataset]
    steps: int
    validation: tf.data.Dataset | None = None
    taught: Callable[[int], tf.data.Dataset] | None = None
    taught_validation: tf.data.Dataset | None = None

    def all(self, epochs: int) -> tf.data.Dataset:
        """The batches of all epochs to train on, one after the other."""
        of_epoch = self.taught or self.of_epoch
        joined = of_epoch(0)
        for epoch in range(1, epochs):
            joined = joined.concatenate(of_epoch(epoch))
        return without_autotuning(joined.prefetch(PREFETCH))


@dataclass(frozen=True)
class Watch:
    """Who follows the training of a step: Keras callbacks, TensorBoard, lines of progress. By default nobody."""

    callbacks: Sequence[keras.callbacks.Callback] = ()
    current_model: Callable[[], keras.Model] | None = None  # the Keras 3 model with the present weights, for callbacks
    logs: Path | None = None  # a folder for TensorBoard, whose steps start at `first_step`
    first_step: int = 0
    say: Callable[[str], None] = field(default=lambda text: None)


class StudentLoss:
    """The loss of `Distiller` as (images, labels, outputs, step) -> means, and the number of examples in each.

    Labels may come with stored outputs of the teacher, see `Batches.taught`, which then does not run.

    The means are `loss`, its parts `hard`, `kd` and the terms, and `accuracy`. A class below 0 means "unlabeled":
    `hard` and `accuracy` are means over the labeled examples.

    Args:
        teacher: images -> logits `[batch, classes]`; None is the loss on labels alone.
        distillation_weight, temperature: numbers or Keras 3 schedules.
        probabilities: whether the network outputs probabilities instead of logits.
        terms: terms of logits by name; one named `kd` replaces the KL.
    """

    def __init__(
        self,
        teacher: Predict | None,
        distillation_weight,
        temperature,
        probabilities: bool,
        terms: Mapping[str, Term] | None = None,
    ):
        self._teacher, self._probabilities, self._terms = teacher, probabilities, dict(terms or {})
        self._smallest = TINIEST
        self._numbers = {"distillation_weight": distillation_weight}
        if "kd" not in self._terms:
            self._numbers["temperature"] = temperature
        for name, term in self._terms.items():
            self._numbers[f"{name}.weight"] = term.weight
            schedules = {key: value for key, value in term.options.items() if isinstance(value, KerasSchedule)}
            self._numbers |= {f"{name}.{key}": schedule for key, schedule in schedules.items()}
        self.names = tuple(dict.fromkeys(("loss", "hard", "kd", *self._terms, "accuracy")))

    def of_step(self, step: str) -> "StudentLoss":
        """The loss for a step of a scheme: in quantization-aware training small probabilities are rounded to 0."""
        loss = copy.copy(self)
        loss._smallest = SMALLEST_PROBABILITY if step == "qat" else TINIEST
        return loss

    def __call__(self, images, labels, outputs, step) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        stored = None
        if isinstance(labels, dict):
            labels, stored = labels["labels"], labels["teacher_logits"]
        # log p are logits of p: the softmax of a quantized network does not give its own.
        logits = (
            tf.math.log(tf.maximum(tf.cast(outputs, tf.float32), self._smallest)) if self._probabilities else outputs
        )
        mask = is_labeled(labels)
        labeled, examples = tf.reduce_sum(mask), tf.cast(tf.shape(mask)[0], tf.float32)
        # Scaled so that the mean over all examples is the mean over the labeled ones.
        hard = tf.math.divide_no_nan(hard_cross_entropy(labels, logits), labeled / examples)
        if self._teacher is None:
            total, parts = hard, {"hard": hard, "kd": tf.zeros_like(hard)}
        else:
            settings = {name: number_at(number, step) for name, number in self._numbers.items()}
            taught = self._teacher(images) if stored is None else tf.cast(stored, tf.float32)
            total, parts = step_loss(hard, logits, taught, labels, settings, self._terms)
        means = {name: tf.reduce_mean(values) for name, values in {"loss": total, **parts}.items()}
        means["accuracy"] = tf.math.divide_no_nan(tf.reduce_sum(is_right(labels, logits) * mask), labeled)
        return means, dict.fromkeys(means, examples) | {"hard": labeled, "accuracy": labeled}


def number_at(value, step) -> tf.Tensor:
    """A number, or a Keras 3 schedule at this step, as a tensor."""
    return tf.cast(value(step) if isinstance(value, KerasSchedule) else value, tf.float32)


class FineTuned(tf_keras.Model):
    """A network trained by a `StudentLoss`. The loss is no layer, so the teacher is neither trained nor saved."""

    def __init__(self, network, loss: StudentLoss, masks=(), frozen=()):
        super().__init__()
        self.network = network
        self._student_loss = loss
        self._apply_masks = lambda: [variable.assign(variable * mask) for variable, mask in masks]
        names = {variable.name for variable in frozen}
        self._trained = lambda: [v for v in self.trainable_variables if v.name not in names]
        self._means = [tf_keras.metrics.Mean(name=name) for name in loss.names]

    @property
    def metrics(self):
        return self._means

    def call(self, images, training=None):
        return self.network(images, training=training)

    def train_step(self, data):
        images, labels = data
        with tf.GradientTape() as tape:
            outputs = self(images, training=True)
            means, counts = self._student_loss(images, labels, outputs, self.optimizer.iterations)
            total = means["loss"] + (tf.add_n(self.losses) if self.losses else 0.0)
        trained = self._trained()
        pairs = zip(tape.gradient(total, trained), trained, strict=True)
        # Clustering trains the cluster centers instead of their kernels, which then have no gradient.
        self.optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])
        self._apply_masks()
        return self._logged({**means, "loss": total}, counts)

    def test_step(self, data):
        images, labels = data
        outputs = self(images, training=False)
        means, counts = self._student_loss(images, labels, outputs, self.optimizer.iterations)
        return self._logged({**means, "loss": means["loss"] + sum(self.losses)}, counts)

    def _logged(self, means, counts):
        for metric in self._means:
            metric.update_state(means[metric.name], sample_weight=counts[metric.name])
        return {metric.name: metric.result() for metric in self._means}


class _Scheduled(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A Keras 3 schedule as one of tf_keras."""

    def __init__(self, schedule: KerasSchedule):
        self.schedule = schedule

    def __call__(self, step):
        return tf.cast(self.schedule(step), tf.float32)

    def get_config(self):
        return {}


def fit(
    network: tf_keras.Model,
    batches: Batches,
    loss: StudentLoss,
    *,
    epochs: int,
    learning_rate: float | KerasSchedule,
    callbacks=(),
    masks=(),
    frozen=(),
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    """Trains `network` in place with Adam; returns the metrics of every epoch.

    Args:
        learning_rate: a number, from which a cosine leads to zero, or a Keras 3 schedule over the steps of this call.
        callbacks: those of tf_keras that tfmot needs.
        masks: (variable, mask) pairs, multiplied after every step.
        frozen: variables that are not trained.

    Raises:
        CheckFailed: the loss is not finite.
    """
    tuned, watch = FineTuned(network, loss, masks, frozen), watch or Watch()
    if isinstance(learning_rate, KerasSchedule):
        schedule = _Scheduled(learning_rate)
    else:
        schedule = tf_keras.optimizers.schedules.CosineDecay(learning_rate, epochs * batches.steps)
    optimizer = tf_keras.optimizers.Adam(schedule)
    optimizer.build(network.trainable_variables)  # else the first step creates variables, and is traced twice
    tuned.compile(optimizer, steps_per_execution=min(STEPS_PER_EXECUTION, batches.steps))
    watchers = [*callbacks, tf_keras.callbacks.TerminateOnNaN(), _Progress(watch, epochs, batches.steps, schedule)]
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # every step of a scheme is a new function, and TensorFlow warns of retracing
    try:
        history = tuned.fit(
            batches.all(epochs),
            epochs=epochs,
            steps_per_epoch=batches.steps,
            validation_data=batches.validation if batches.taught is None else batches.taught_validation,
            verbose=0,
            callbacks=watchers,
        ).history
    finally:
        tf.get_logger().setLevel(level)
    if not tf.math.is_finite(history["loss"][-1]):
        raise CheckFailed(
            f"The loss is {history['loss'][-1]} while fine-tuning. Lower learning_rate ({learning_rate})."
        )
    return {name: [float(value) for value in values] for name, values in history.items()}


class _Progress(tf_keras.callbacks.Callback):
    """Prints the metrics of every epoch, writes them to TensorBoard, and passes events on to Keras 3 callbacks.

    Those see a Keras 3 model, which has the present weights at the end of every epoch.
    """

    def __init__(self, watch: Watch, epochs: int, steps: int, schedule):
        super().__init__()
        self._watch, self._epochs, self._steps, self._schedule = watch, epochs, steps, schedule
        self._writers = {}
        self._keras_callbacks = None
        if watch.callbacks:
            params = {"epochs": epochs, "steps": steps, "verbose": 0}
            model = watch.current_model()
            model.stop_training = False
            self._keras_callbacks = keras.callbacks.CallbackList(watch.callbacks, model=model, **params)

    def _pass_on(self, event: str, *arguments):
        if self._keras_callbacks is not None:
            getattr(self._keras_callbacks, event)(*arguments)
            self.model.stop_training = self.model.stop_training or self._keras_callbacks.model.stop_training

    def on_train_begin(self, logs=None):
        if self._watch.logs is not None:
            self._writers = {
                name: tf.summary.create_file_writer(str(self._watch.logs / name)) for name in ("train", "validation")
            }
        self._pass_on("on_train_begin", logs)

    def on_train_end(self, logs=None):
        for writer in self._writers.values():
            writer.close()
        self._pass_on("on_train_end", logs)

    def on_epoch_begin(self, epoch, logs=None):
        self._start, self._end = time.perf_counter(), None
        self._pass_on("on_epoch_begin", epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        self._pass_on("on_train_batch_begin", batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._pass_on("on_train_batch_end", batch, logs)

    def on_test_begin(self, logs=None):
        self._end = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        seconds = (self._end or time.perf_counter()) - self._start
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
        self._watch.say(f"epoch {epoch + 1}/{self._epochs}: {metrics}, {seconds:.1f} s")
        if self._writers:
            self._write_summaries(logs, seconds)
        if self._keras_callbacks is not None:
            self._watch.current_model()
            self._pass_on("on_epoch_end", epoch, logs)

    def _write_summaries(self, logs: dict, seconds: float) -> None:
        step = int(self.model.optimizer.iterations)
        scalars = {
            "train": {f"epoch_{name}": value for name, value in logs.items() if not name.startswith("val_")},
            "validation": {f"epoch_{name[4:]}": value for name, value in logs.items() if name.startswith("val_")},
        }
        scalars["train"] |= {"learning_rate": self._schedule(step), "steps_per_second": self._steps / seconds}
        for name, writer in self._writers.items():
            with writer.as_default(step=self._watch.first_step + step):
                for key, value in scalars[name].items():
                    tf.summary.scalar(key, value)
            writer.flush()
