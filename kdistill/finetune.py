"""Fine-tunes a tf_keras network in tfmot's wrappers on labels and on a frozen Keras 3 teacher."""

from collections.abc import Callable

import tensorflow as tf
import tf_keras

from kdistill import losses
from kdistill.errors import CheckFailed

Predict = Callable[[tf.Tensor], tf.Tensor]


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
        self._means = [tf_keras.metrics.Mean(name=name) for name in ("loss", "hard", "kd", "accuracy")]

    @property
    def metrics(self):
        return self._means

    def call(self, images, training=None):
        return self.network(images, training=training)

    def train_step(self, data):
        images, labels = data
        with tf.GradientTape() as tape:
            parts = self._loss_of(images, labels, self(images, training=True))
            total = parts["loss"] + (tf.add_n(self.losses) if self.losses else 0.0)
        trained = self._trained()
        pairs = zip(tape.gradient(total, trained), trained, strict=True)
        # Clusters are trained in the place of their kernels, which have no gradient then.
        self.optimizer.apply_gradients([pair for pair in pairs if pair[0] is not None])
        self._after_step()
        parts["loss"] = total
        for mean in self._means:
            mean.update_state(parts[mean.name])
        return {mean.name: mean.result() for mean in self._means}


def loss(teach: Predict | None, weight: float, temperature: float, probabilities: bool) -> Callable:
    """(images, labels, outputs) -> the parts of the loss and the accuracy, each the mean over the batch."""

    def parts_of(images, labels, outputs):
        # log p are logits of p: the softmax of a quantised model has no logits that could be asked for.
        logits = tf.math.log(tf.maximum(tf.cast(outputs, tf.float32), 1e-7)) if probabilities else outputs
        hard = tf.reduce_mean(losses.hard_cross_entropy(labels, logits))
        kd = tf.constant(0.0)
        if teach is not None:
            kd = tf.reduce_mean(losses.kl_logits(logits, teach(images), temperature))
        classes = labels if labels.shape.rank == 1 else tf.argmax(labels, axis=-1)
        right = tf.cast(classes, tf.int64) == tf.argmax(logits, axis=-1)
        accuracy = tf.reduce_mean(tf.cast(right, tf.float32))
        return {"loss": (1 - weight) * hard + weight * kd, "hard": hard, "kd": kd, "accuracy": accuracy}

    return parts_of


def fit(
    network: tf_keras.Model,
    batches: tf.data.Dataset,
    loss_of: Callable,
    *,
    epochs: int,
    learning_rate: float,
    callbacks=(),
    masks=(),
    still=(),
) -> dict[str, list[float]]:
    """Trains `network` in place by Adam on a cosine from `learning_rate` to zero; returns the logs of each epoch.

    `batches`: `(float32 images, labels)`, one epoch. `loss_of`: see `loss`. `masks`: (variable, mask) pairs, multiplied
    after each step; `still`: variables that are not trained. Raises `CheckFailed` when the loss is not finite.
    """
    tuned = FineTuned(network, loss_of, masks, still)
    schedule = tf_keras.optimizers.schedules.CosineDecay(learning_rate, epochs * int(batches.cardinality()))
    optimizer = tf_keras.optimizers.Adam(schedule)
    optimizer.build(network.trainable_variables)  # else the first step creates variables, and is traced twice
    tuned.compile(optimizer)
    stop = tf_keras.callbacks.TerminateOnNaN()
    level = tf.get_logger().level
    tf.get_logger().setLevel("ERROR")  # each stage is a new function: "retracing" is what it takes
    try:
        history = tuned.fit(batches, epochs=epochs, verbose=0, callbacks=[*callbacks, stop]).history
    finally:
        tf.get_logger().setLevel(level)
    if not tf.math.is_finite(history["loss"][-1]):
        raise CheckFailed(
            f"The loss is {history['loss'][-1]} while fine-tuning. Lower learning_rate ({learning_rate})."
        )
    return {name: [float(value) for value in values] for name, values in history.items()}
