"""`Supervised(keras.Model)`: the training step that teacher, control and student share.

One place holds what is easy to get wrong: division by the global batch, loss scaling, overflow on any replica,
regularization losses, sample weights, and a step counter that advances when a scaled step is skipped.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from kdistill.distillation import losses
from kdistill.errors import InputError
from kdistill.networks.heads import as_logits


class Batch(NamedTuple):
    """What a step is given, and what it counts: `count` and `labeled` on this replica, `share` over all of them."""

    inputs: object
    labels: tf.Tensor
    weights: tf.Tensor  # [batch], ones without sample weights
    given: object  # what comes from elsewhere than the student, such as the teacher's outputs; no gradient
    count: tf.Tensor  # examples; padding is none
    labeled: tf.Tensor  # examples with a label
    share: tf.Tensor  # labeled examples of all examples, over all replicas


@keras.saving.register_keras_serializable(package="kdistill")
class Supervised(keras.Model):
    """A student trained on labels: `compile`, `fit`, `evaluate`, `predict` and callbacks as for any Keras model.

    Inputs, outputs and weights are the student's. Logs `loss` (with regularization), `hard` (the loss on labels) and
    `accuracy`. Labels are classes `[batch]` or distributions `[batch, classes]`; a class below 0 is "unlabeled": such
    examples count neither in `hard`, which is the mean over those with a label, nor in `accuracy`. Targets may also be
    `{"labels": ..., "teacher_logits": ...}`, as a `Distiller` takes them: the logits are then left aside.
    """

    _rates = ("accuracy",)

    def __init__(self, student: keras.Model, parts: tuple[str, ...] = ("hard",), **kwargs):
        if not isinstance(student, keras.Model):
            raise InputError(f"student expects a keras.Model, received {student!r}.")
        kwargs.setdefault("dtype", student.dtype_policy)  # compile() adds loss scaling by this model's own policy
        super().__init__(**kwargs)
        self.student = student
        self._parts = tuple(parts)
        self.global_step = self.add_weight(name="global_step", shape=(), dtype="int64", trainable=False)
        # The first step whose loss was not finite, by part; -1 while all is well. See callbacks.StopWhenNotFinite.
        shape = (len(self._parts) + 1,)
        self.broken_step = self.add_weight(
            name="broken_step",
            shape=shape,
            dtype="int64",
            initializer=lambda shape, dtype: -tf.ones(shape, dtype),
            trainable=False,
        )
        self._trackers = [keras.metrics.Mean(name=name) for name in ("loss", *self._parts, *self._rates)]
        self.hard_loss = None
        if student.built:
            self.built = True

    def call(self, inputs, training=False):
        return self.student(inputs, training=training)

    def build(self, input_shape=None):
        if not self.student.built:
            self.student.build(input_shape)
        self.built = True

    def compile(self, optimizer="rmsprop", loss=None, **kwargs):
        """As `keras.Model.compile`. `loss`: a Keras loss on (labels, outputs); None is cross-entropy on logits."""
        self.hard_loss = keras.losses.get(loss) if loss is not None else None
        super().compile(optimizer=optimizer, loss=loss, **kwargs)

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)  # so that its slots are loaded from the file

    @property
    def metrics(self):
        own = list(self._trackers)
        extra = [m for m in super().metrics if m is not self._loss_tracker and all(m is not t for t in own)]
        return own + extra

    def get_config(self):
        return {"name": self.name, "student": keras.saving.serialize_keras_object(self.student)}

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        student = keras.saving.deserialize_keras_object(config.pop("student"))
        return cls(student=student, **config)

    # -- the step ---------------------------------------------------------------------------------------------------

    def _hard(self, batch: Batch, outputs) -> tf.Tensor:
        """The loss on labels, `[batch]`, scaled so that its mean over all examples is that over the labeled ones."""
        if self.hard_loss is None:
            per_example = losses.hard_cross_entropy(batch.labels, as_logits(outputs))
        else:
            labels, labeled = batch.labels, _labeled(batch.labels, batch.weights)
            if _is_classes(labels):  # a Keras loss knows no class below 0
                labels = tf.maximum(labels, tf.zeros_like(labels))
            per_example = getattr(self.hard_loss, "call", self.hard_loss)(labels, outputs)
            per_example = tf.where(labeled > 0, tf.cast(per_example, tf.float32), tf.zeros_like(labeled))
        return tf.math.divide_no_nan(tf.cast(per_example, tf.float32), batch.share)

    def _forward(self, inputs, training: bool) -> tuple:
        """The student's outputs, and what it gives besides: features by the names of their taps."""
        return self.student(inputs, training=training), {}

    def _losses_of(self, batch: Batch, outputs, features: dict) -> tuple[tf.Tensor, dict, dict]:
        """The total and its named parts, each `[batch]`, and named rates (0 or 1 for each example)."""
        hard = self._hard(batch, outputs)
        return hard, {"hard": hard}, {"accuracy": _hits(batch.labels, as_logits(outputs))}

    def _given(self, inputs, stored):
        """What the step needs besides the student's outputs, computed outside of the gradient tape; `stored` is what
        came with the data, the teacher's logits or None."""
        return None

    def _batch(self, data) -> Batch:
        inputs, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
        labels, stored = _apart(labels)
        weights = weights["labels"] if isinstance(weights, dict) else weights  # Keras copies them to every target
        weights = _weights(weights, labels)
        count, labeled = _count(labels, weights), tf.reduce_sum(_labeled(labels, weights))
        share = tf.math.divide_no_nan(_sum_over_replicas(labeled), _sum_over_replicas(count))
        return Batch(inputs, labels, weights, self._given(inputs, stored), count, labeled, share)

    def train_step(self, data):
        batch = self._batch(data)
        with tf.GradientTape() as tape:
            outputs, features = self._forward(batch.inputs, training=True)
            total, parts, rates = self._losses_of(batch, outputs, features)
            loss = tf.reduce_sum(total * batch.weights) / _sum_over_replicas(batch.count)
            penalty = self._penalty()
            scaled = self.optimizer.scale_loss(loss + penalty / _replicas())
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, variables)
        self.optimizer.apply(self._agreed(gradients), variables)
        self._note_broken(total * batch.weights, parts)
        self.global_step.assign_add(1)
        return self._logged(batch, outputs, total, parts, rates, penalty)

    def test_step(self, data):
        batch = self._batch(data)
        outputs, features = self._forward(batch.inputs, training=False)
        total, parts, rates = self._losses_of(batch, outputs, features)
        return self._logged(batch, outputs, total, parts, rates, self._penalty())

    def _penalty(self) -> tf.Tensor:
        return tf.add_n([tf.cast(loss, tf.float32) for loss in self.losses] or [tf.constant(0.0)])

    def _agreed(self, gradients):
        """The gradients, or NaN on every replica if any replica overflowed.

        LossScaleOptimizer decides by its own replica's gradients, under MirroredStrategy by the first one's: an
        overflow on another replica would be summed into all weights.
        """
        scaling = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        if _replicas() == 1 or not scaling:
            return gradients
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients if g is not None])
        broken = _sum_over_replicas(1.0 - tf.cast(finite, tf.float32))
        factor = tf.where(broken > 0, float("nan"), 1.0)
        return [None if g is None else g * tf.cast(factor, g.dtype) for g in gradients]

    def _note_broken(self, total, parts):
        sums = tf.stack([tf.reduce_sum(total), *(tf.reduce_sum(parts[name]) for name in self._parts)])
        bad = ~tf.math.is_finite(_sum_over_replicas(sums))
        before = tf.convert_to_tensor(self.broken_step)
        self.broken_step.assign(tf.where(bad & (before < 0), tf.convert_to_tensor(self.global_step), before))

    def _logged(self, batch: Batch, outputs, total, parts, rates, penalty) -> dict:
        labels, weights, count = batch.labels, batch.weights, batch.count
        safe = tf.maximum(count, 1.0)
        values = {"loss": tf.reduce_sum(total * weights) / safe + penalty}
        values |= {name: tf.reduce_sum(part * weights) / safe for name, part in parts.items()}
        # The scale of `hard` goes with the whole batch; what this replica logs is the mean over its own labels.
        values["hard"] = values["hard"] * batch.share * safe / tf.maximum(batch.labeled, 1.0)
        for tracker in self._trackers:
            if tracker.name in values:
                examples = batch.labeled if tracker.name == "hard" else count
                total = values[tracker.name] * examples
            else:
                mask = _labeled(labels, weights) if tracker.name == "accuracy" else _real(labels, weights)
                total, examples = tf.reduce_sum(rates[tracker.name] * mask), tf.reduce_sum(mask)
            # What update_state does, in a fifth of the operations: for a small student these are felt.
            tracker.total.assign(tracker.total + total)
            tracker.count.assign(tracker.count + examples)
        for metric in super().metrics:
            if metric is not self._loss_tracker and all(metric is not tracker for tracker in self._trackers):
                metric.update_state(labels, outputs, sample_weight=weights)
        logs = self.get_metrics_result()
        if _several_workers():  # Keras reduces logs over workers along their first axis, which a scalar does not have
            return {name: tf.reshape(value, (1,)) for name, value in logs.items()}
        return logs

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        """Creates what `fit` needs inside the strategy's scope.

        Keras' own version reduces a batch over the replicas, which fails on several workers.
        """
        if self.distribute_strategy.num_replicas_in_sync == 1 and not _several_workers(self.distribute_strategy):
            return super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
        self._check_distributed()
        with self.distribute_strategy.scope():
            self.optimizer.build(self.trainable_variables)
        return None

    def _check_distributed(self):
        if self.steps_per_execution != 1 or self.jit_compile is True:
            raise InputError(
                "On several replicas TensorFlow crashes with steps_per_execution above 1 or jit_compile=True. "
                f"Leave out steps_per_execution={self.steps_per_execution}, jit_compile={self.jit_compile}."
            )
        if self._compile_metrics is not None and self._compile_metrics._user_metrics:
            raise InputError(
                "On several replicas a Distiller logs its own metrics only (loss, hard, kd, accuracy, agreement). "
                "Leave metrics= out of compile()."
            )


def _several_workers(strategy: tf.distribute.Strategy | None = None) -> bool:
    return isinstance(strategy or tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy)


def _replicas() -> int:
    return tf.distribute.get_strategy().num_replicas_in_sync


def _sum_over_replicas(value: tf.Tensor) -> tf.Tensor:
    if _replicas() == 1:
        return value
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, value)


def _apart(targets) -> tuple:
    """Labels, and the teacher's logits where the targets are `{"labels": ..., "teacher_logits": ...}`, else None."""
    if not isinstance(targets, dict):
        return targets, None
    if targets.keys() != {"labels", "teacher_logits"}:
        raise InputError(
            f"A dict of targets expects the keys 'labels' and 'teacher_logits', received {', '.join(targets)}."
        )
    return targets["labels"], targets["teacher_logits"]


def _weights(weights, labels) -> tf.Tensor:
    examples = tf.shape(labels)[:1]
    return tf.ones(examples) if weights is None else tf.reshape(tf.cast(weights, tf.float32), examples)


def _is_classes(labels) -> bool:
    return len(labels.shape) == 1 or labels.shape[-1] == 1


def _labeled(labels, weights) -> tf.Tensor:
    """1 for examples with a label, 0 for the others, `[batch]`."""
    if not _is_classes(labels):
        return tf.ones_like(weights)
    return tf.reshape(tf.cast(tf.cast(labels, tf.float32) >= 0, tf.float32), tf.shape(weights))


def _real(labels, weights) -> tf.Tensor:
    """0 for padding, which has neither a label nor a weight; 1 for every example, `[batch]`."""
    return tf.maximum(_labeled(labels, weights), tf.cast(weights != 0, tf.float32))


def _count(labels, weights) -> tf.Tensor:
    return tf.reduce_sum(_real(labels, weights))


def _hits(labels, logits) -> tf.Tensor:
    """1 where the largest logit is the label's class, `[batch]`."""
    classes = tf.reshape(labels, [-1]) if _is_classes(labels) else tf.argmax(labels, axis=-1)
    return tf.cast(tf.cast(classes, tf.int64) == tf.argmax(logits, axis=-1), tf.float32)
