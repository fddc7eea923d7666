"""Fine-tunes a tf_keras network in tfmot's wrappers on labels and on a frozen Keras 3 teacher."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import tensorflow as tf
import tf_keras

from kdistill.data.batches import PREFETCH, without_autotuning
from kdistill.distillation import losses
from kdistill.distillation.terms import term_loss
from kdistill.errors import CheckFailed
from kdistill.recipe import Term

Predict = Callable[[tf.Tensor], tf.Tensor]
Rate = keras.optimizers.schedules.LearningRateSchedule
STEPS_PER_EXECUTION = 16


@dataclass(frozen=True)
class Batches:
    """Training batches `(float32 images, labels)` of each epoch, `steps` in every one; and those of validation."""

    of_epoch: Callable[[int], tf.data.Dataset]
    steps: int
    validation: tf.data.Dataset | None = None

    def all(self, epochs: int) -> tf.data.Dataset:
        """Every epoch's batches, one after the other."""
        joined = self.of_epoch(0)
        for epoch in range(1, epochs):
            joined = joined.concatenate(self.of_epoch(epoch))
        return without_autotuning(joined.prefetch(PREFETCH))


@dataclass(frozen=True)
class Watch:
    """What looks on while a stage is trained: Keras callbacks, TensorBoard, lines of progress; where nothing is said
    there is nothing."""

    callbacks: Sequence[keras.callbacks.Callback] = ()
    show: Callable[[], keras.Model] | None = None  # the Keras 3 model with the weights of now, for the callbacks
    logs: Path | None = None  # TensorBoard; steps count from `first_step` on
    first_step: int = 0
    say: Callable[[str], None] = field(default=lambda text: None)


class FineTuned(tf_keras.Model):
    """The Distiller's loss in tf_keras: `(1 - w) * hard + w * T^2 * KL(softmax(t/T) || softmax(s/T))`.

    The teacher is a closure: not tracked, so it is neither trained nor saved with the network.
    """

    def __init__(self, network, loss_of: Callable, masks=(), still=()):
        super().__init__()
        self.network = network
        self._loss_of = loss_of
        self._after_step = lambda: [variable.assign(variable * mask) for variable, mask in masks]
        names = {variable.name for variable in still}
        self._trained = lambda: [v for v in self.trainable_variables if v.name not in names]
        self._means = [tf_keras.metrics.Mean(name=name) for name in loss_of.names]

    @property
    def metrics(self):
        return self._means

    def call(self, images, training=None):
        return self.network(images, training=training)

    def train_step(self, data):
        images, labels = data
        with tf.GradientTape() as tape:
            outputs = self(images, training=True)
            parts, counts = self._loss_of(images, labels, outputs, self.optimizer.iterations)
            total = parts["loss"] + (tf.add_n(self.losses) if self.losses else 0.0)
        trained = self._trained()
        pairs = zip(tape.gradient(total, trained), trained, strict=True)
        # Clusters are trained in the place of their kernels, which have no gradient then.
        self.optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])
        self._after_step()
        return self._logged({**parts, "loss": total}, counts)

    def test_step(self, data):
        images, labels = data
        outputs = self(images, training=False)
        parts, counts = self._loss_of(images, labels, outputs, self.optimizer.iterations)
        return self._logged({**parts, "loss": parts["loss"] + sum(self.losses)}, counts)

    def _logged(self, parts, counts):
        for mean in self._means:
            mean.update_state(parts[mean.name], sample_weight=counts[mean.name])
        return {mean.name: mean.result() for mean in self._means}


def loss(
    teach: Predict | None, weight, temperature, probabilities: bool, terms: Mapping[str, Term] | None = None
) -> Callable:
    """(images, labels, outputs, step) -> loss, hard, kd and accuracy, each a mean, and over how many examples it is.

    A class below 0 is "unlabeled": such examples count in `hard` and `accuracy` not at all. `weight` and `temperature`
    are numbers or Keras 3 schedules. `terms` of logits are added to the loss and to what is returned; one named `kd`
    takes the place of the KL.
    """
    terms = dict(terms or {})

    def parts_of(images, labels, outputs, step):
        # log p are logits of p: the softmax of a quantized model has no logits that could be asked for.
        logits = tf.math.log(tf.maximum(tf.cast(outputs, tf.float32), 1e-7)) if probabilities else outputs
        classes = labels if labels.shape.rank == 1 else tf.argmax(labels, axis=-1)
        labeled = tf.cast(tf.cast(classes, tf.int64) >= 0, tf.float32)
        known, everything = tf.reduce_sum(labeled), tf.cast(tf.shape(labeled)[0], tf.float32)

        def mean(values):  # over the examples that have a label
            return tf.reduce_sum(values * labeled) / tf.maximum(known, 1.0)

        right = tf.cast(classes, tf.int64) == tf.argmax(logits, axis=-1)
        parts = {"hard": mean(losses.hard_cross_entropy(labels, logits)), "kd": tf.constant(0.0)}
        total = parts["hard"]
        if teach is not None:
            shown, share = teach(images), _now(weight, step)
            if "kd" not in terms:
                parts["kd"] = tf.reduce_mean(losses.kl_logits(logits, shown, _now(temperature, step)))
            for name, term in terms.items():
                options = {o: _now(v, step) if isinstance(v, Rate) else v for o, v in term.options.items()}
                parts[name] = tf.reduce_mean(term_loss(term, logits, shown, labels, options))
            total = (1 - share) * parts["hard"] + share * parts["kd"]
            total += sum(_now(term.weight, step) * parts[name] for name, term in terms.items() if name != "kd")
        counts = dict.fromkeys(("loss", *parts), everything) | {"hard": known, "accuracy": known}
        return {"loss": total, **parts, "accuracy": mean(tf.cast(right, tf.float32))}, counts

    parts_of.names = tuple(dict.fromkeys(("loss", "hard", "kd", *terms, "accuracy")))
    return parts_of


def _now(value, step) -> tf.Tensor:
    """A number, or a Keras 3 schedule at this step, as a tensor."""
    return tf.cast(value(step) if isinstance(value, Rate) else value, tf.float32)


class _Scheduled(tf_keras.optimizers.schedules.LearningRateSchedule):
    """A Keras 3 schedule as one of tf_keras."""

    def __init__(self, schedule: Rate):
        self.schedule = schedule

    def __call__(self, step):
        return tf.cast(self.schedule(step), tf.float32)

    def get_config(self):
        return {}


def fit(
    network: tf_keras.Model,
    batches: Batches,
    loss_of: Callable,
    *,
    epochs: int,
    learning_rate: float | Rate,
    callbacks=(),
    masks=(),
    still=(),
    watch: Watch | None = None,
) -> dict[str, list[float]]:
    """Trains `network` in place by Adam; returns the logs of each epoch.

    `learning_rate`: a number, from which a cosine leads to zero, or a Keras 3 schedule over the steps of this call.
    `loss_of`: see `loss`. `masks`: (variable, mask) pairs, multiplied after each step; `still`: variables that are not
    trained. Raises `CheckFailed` when the loss is not finite.
    """
    tuned, watch = FineTuned(network, loss_of, masks, still), watch or Watch()
    if isinstance(learning_rate, Rate):
        schedule = _Scheduled(learning_rate)
    else:
        schedule = tf_keras.optimizers.schedules.CosineDecay(learning_rate, epochs * batches.steps)
    optimizer = tf_keras.optimizers.Adam(schedule)
    optimizer.build(network.trainable_variables)  # else the first step creates variables, and is traced twice
    tuned.compile(optimizer, steps_per_execution=min(STEPS_PER_EXECUTION, batches.steps))
    watchers = [*callbacks, tf_keras.callbacks.TerminateOnNaN(), _Progress(watch, epochs, batches.steps, schedule)]
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # each stage is a new function: "retracing" is what it takes
    try:
        history = tuned.fit(
            batches.all(epochs),
            epochs=epochs,
            steps_per_epoch=batches.steps,
            validation_data=batches.validation,
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
    """Says each epoch's numbers, writes them to TensorBoard, and passes everything on to the user's Keras 3 callbacks.

    Those see a Keras 3 model, which has the weights of now at the end of every epoch.
    """

    def __init__(self, watch: Watch, epochs: int, steps: int, schedule):
        super().__init__()
        self._watch, self._epochs, self._steps, self._rate = watch, epochs, steps, schedule
        self._writers = {}
        self._passed_on = None
        if watch.callbacks:
            params = {"epochs": epochs, "steps": steps, "verbose": 0}
            model = watch.show()
            model.stop_training = False
            self._passed_on = keras.callbacks.CallbackList(watch.callbacks, model=model, **params)

    def _tell(self, event: str, *arguments):
        if self._passed_on is not None:
            getattr(self._passed_on, event)(*arguments)
            self.model.stop_training = self.model.stop_training or self._passed_on.model.stop_training

    def on_train_begin(self, logs=None):
        if self._watch.logs is not None:
            self._writers = {
                name: tf.summary.create_file_writer(str(self._watch.logs / name)) for name in ("train", "validation")
            }
        self._tell("on_train_begin", logs)

    def on_train_end(self, logs=None):
        for writer in self._writers.values():
            writer.close()
        self._tell("on_train_end", logs)

    def on_epoch_begin(self, epoch, logs=None):
        self._started, self._trained = time.perf_counter(), None
        self._tell("on_epoch_begin", epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        self._tell("on_train_batch_begin", batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._tell("on_train_batch_end", batch, logs)

    def on_test_begin(self, logs=None):
        self._trained = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        seconds = (self._trained or time.perf_counter()) - self._started
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in logs.items())
        self._watch.say(f"epoch {epoch + 1}/{self._epochs}: {numbers}, {seconds:.1f} s")
        done = int(self.model.optimizer.iterations)
        written = {
            "train": {f"epoch_{name}": value for name, value in logs.items() if not name.startswith("val_")},
            "validation": {f"epoch_{name[4:]}": value for name, value in logs.items() if name.startswith("val_")},
        }
        written["train"] |= {"learning_rate": self._rate(done), "steps_per_second": self._steps / seconds}
        for name, writer in self._writers.items():
            with writer.as_default(step=self._watch.first_step + done):
                for key, value in written[name].items():
                    tf.summary.scalar(key, value)
            writer.flush()
        if self._passed_on is not None:
            self._watch.show()
            self._tell("on_epoch_end", epoch, logs)
