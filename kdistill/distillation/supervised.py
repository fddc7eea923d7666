"""`Supervised(keras.Model)`: the training step that teacher, control and student share.

It handles what is easy to get wrong: division by the global batch, loss scaling, overflow on any replica,
regularization losses, sample weights, and a step counter that also counts the scaled steps that are skipped.
"""

from typing import NamedTuple

import keras
import tensorflow as tf

from kdistill.distillation import losses
from kdistill.distillation.step_loss import are_classes, is_labeled, is_right
from kdistill.errors import InputError
from kdistill.networks.heads import as_logits
from kdistill.networks.keras_internals import OwnBuild, loss_tracker, user_metrics


class Batch(NamedTuple):
    """The data of a step and its counts: `count` and `labeled` on this replica, `share` over all of them."""

    inputs: object
    labels: tf.Tensor
    weights: tf.Tensor  # [batch], ones without sample weights
    targets: object  # what the student learns from besides labels: the teacher's outputs; no gradient flows into them
    count: tf.Tensor  # the examples, without padding
    labeled: tf.Tensor  # the examples with a label
    share: tf.Tensor  # labeled examples of all examples, over all replicas


@keras.saving.register_keras_serializable(package="kdistill")
class Supervised(OwnBuild, keras.Model):
    """A student trained on labels: `compile`, `fit`, `evaluate`, `predict` and callbacks as for any Keras model.

    Inputs, outputs and weights are the student's. Logs `loss` (with regularization), `hard` (the loss on labels) and
    `accuracy`. Labels are classes `[batch]` or distributions `[batch, classes]`. A class below 0 means "unlabeled":
    `hard` and `accuracy` are means over the labeled examples. Targets may also be
    `{"labels": ..., "teacher_logits": ...}`, as for a `Distiller`; the logits are then ignored.

    Args:
        student: the model to train, `supervised.student` afterwards. It may end in logits or in softmax.
        parts: the names of the parts of the loss that are logged.

    Example:
        model = Supervised(student)
        model.compile(keras.optimizers.Adam(1e-3))
        model.fit(images, labels, epochs=8)
    """

    _rates = ("accuracy",)

    def __init__(self, student: keras.Model, parts: tuple[str, ...] = ("hard",), **kwargs):
        if not isinstance(student, keras.Model):
            raise InputError(f"student expects a keras.Model, received {student!r}.")
        kwargs.setdefault("dtype", student.dtype_policy)  # compile() adds loss scaling by this model's own policy
        super().__init__(**kwargs)
        self.student = student
        self.part_names = tuple(parts)
        self.global_step = self.add_weight(name="global_step", shape=(), dtype="int64", trainable=False)
        # The first step at which the loss and each part was not finite, else -1. See callbacks.StopWhenNotFinite.
        shape = (len(self.part_names) + 1,)
        self.broken_step = self.add_weight(
            name="broken_step",
            shape=shape,
            dtype="int64",
            initializer=lambda shape, dtype: -tf.ones(shape, dtype),
            trainable=False,
        )
        self._trackers = [keras.metrics.Mean(name=name) for name in ("loss", *self.part_names, *self._rates)]
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
        extra = [m for m in super().metrics if m is not loss_tracker(self) and all(m is not t for t in own)]
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
        """The loss on labels, `[batch]`, scaled so that its mean over all examples is the mean over the labeled."""
        if self.hard_loss is None:
            per_example = losses.hard_cross_entropy(batch.labels, as_logits(outputs))
        else:
            labels, labeled = batch.labels, is_labeled(batch.labels)
            if are_classes(labels):  # a Keras loss accepts no class below 0
                labels = tf.maximum(labels, tf.zeros_like(labels))
            per_example = getattr(self.hard_loss, "call", self.hard_loss)(labels, outputs)
            per_example = tf.where(labeled > 0, tf.cast(per_example, tf.float32), tf.zeros_like(labeled))
        return tf.math.divide_no_nan(tf.cast(per_example, tf.float32), batch.share)

    def _forward(self, inputs, training: bool) -> tuple:
        """The student's outputs, and its features by the name of the term that compares them."""
        return self.student(inputs, training=training), {}

    def _loss_parts(self, batch: Batch, outputs, features: dict) -> tuple[tf.Tensor, dict]:
        """The total of the loss and its parts by name, each `[batch]`."""
        hard = self._hard(batch, outputs)
        return hard, {"hard": hard}

    def _hits(self, batch: Batch, outputs) -> dict:
        """0 or 1 for each example, `[batch]`, of which the rates are the means."""
        return {"accuracy": is_right(batch.labels, as_logits(outputs))}

    def _targets(self, inputs, teacher_logits):
        """What the student learns from besides labels, computed outside of the gradient tape.

        `teacher_logits` are those that came with the data, or None.
        """
        return None

    def _batch(self, data) -> Batch:
        inputs, labels, weights = keras.utils.unpack_x_y_sample_weight(data)
        labels, teacher_logits = _split_targets(labels)
        weights = weights["labels"] if isinstance(weights, dict) else weights  # Keras copies them to every target
        weights = _weights(weights, labels)
        count, labeled = tf.reduce_sum(_is_real(labels, weights)), tf.reduce_sum(is_labeled(labels))
        share = tf.math.divide_no_nan(_sum_over_replicas(labeled), _sum_over_replicas(count))
        return Batch(inputs, labels, weights, self._targets(inputs, teacher_logits), count, labeled, share)

    def train_step(self, data):
        batch = self._batch(data)
        with tf.GradientTape() as tape:
            outputs, features = self._forward(batch.inputs, training=True)
            total, parts = self._loss_parts(batch, outputs, features)
            loss = tf.reduce_sum(total * batch.weights) / _sum_over_replicas(batch.count)
            penalty = self._penalty()
            scaled = self.optimizer.scale_loss(loss + penalty / _replicas())
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, variables)
        self.optimizer.apply(self._unless_overflow(gradients), variables)
        self._record_not_finite(total * batch.weights, parts)
        self.global_step.assign_add(1)
        return self._logged(batch, outputs, total, parts, penalty)

    def test_step(self, data):
        batch = self._batch(data)
        outputs, features = self._forward(batch.inputs, training=False)
        total, parts = self._loss_parts(batch, outputs, features)
        return self._logged(batch, outputs, total, parts, self._penalty())

    def _penalty(self) -> tf.Tensor:
        return tf.add_n([tf.cast(loss, tf.float32) for loss in self.losses] or [tf.constant(0.0)])

    def _unless_overflow(self, gradients):
        """The gradients, or NaN on every replica if they overflowed on any.

        LossScaleOptimizer checks the gradients of one replica only, under MirroredStrategy those of the first. It would
        add an overflow on another replica to all weights.
        """
        scaling = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer)
        if _replicas() == 1 or not scaling:
            return gradients
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients if g is not None])
        overflows = _sum_over_replicas(1.0 - tf.cast(finite, tf.float32))
        factor = tf.where(overflows > 0, float("nan"), 1.0)
        return [None if g is None else g * tf.cast(factor, g.dtype) for g in gradients]

    def _record_not_finite(self, total, parts):
        sums = tf.stack([tf.reduce_sum(total), *(tf.reduce_sum(parts[name]) for name in self.part_names)])
        finite = tf.math.is_finite(_sum_over_replicas(sums))
        before = tf.convert_to_tensor(self.broken_step)
        self.broken_step.assign(tf.where(~finite & (before < 0), tf.convert_to_tensor(self.global_step), before))

    def _logged(self, batch: Batch, outputs, total, parts, penalty) -> dict:
        """Updates all metrics with this step; returns them."""
        labels, weights, count = batch.labels, batch.weights, batch.count
        hits = self._hits(batch, outputs)
        safe = tf.maximum(count, 1.0)
        values = {"loss": tf.reduce_sum(total * weights) / safe + penalty}
        values |= {name: tf.reduce_sum(part * weights) / safe for name, part in parts.items()}
        # `hard` is scaled by the share over all replicas; this replica logs the mean over its own labels.
        values["hard"] = values["hard"] * batch.share * safe / tf.maximum(batch.labeled, 1.0)
        for tracker in self._trackers:
            if tracker.name in values:
                examples = batch.labeled if tracker.name == "hard" else count
                total = values[tracker.name] * examples
            else:
                mask = is_labeled(labels) if tracker.name == "accuracy" else _is_real(labels, weights)
                total, examples = tf.reduce_sum(hits[tracker.name] * mask), tf.reduce_sum(mask)
            # update_state in a fifth of the operations, which makes training a small student measurably faster.
            tracker.total.assign(tracker.total + total)
            tracker.count.assign(tracker.count + examples)
        for metric in super().metrics:
            if metric is not loss_tracker(self) and all(metric is not tracker for tracker in self._trackers):
                metric.update_state(labels, outputs, sample_weight=weights)
        logs = self.get_metrics_result()
        if _several_workers():  # Keras reduces logs over workers along their first axis, which a scalar does not have
            return {name: tf.reshape(value, (1,)) for name, value in logs.items()}
        return logs

    def build_before_fit(self) -> bool:
        """On several replicas or workers, creates the optimizer's variables inside the strategy's scope."""
        if self.distribute_strategy.num_replicas_in_sync == 1 and not _several_workers(self.distribute_strategy):
            return False
        self._check_distributed()
        with self.distribute_strategy.scope():
            self.optimizer.build(self.trainable_variables)
        return True

    def _check_distributed(self):
        if self.steps_per_execution != 1 or self.jit_compile is True:
            raise InputError(
                "On several replicas TensorFlow crashes with steps_per_execution above 1 or jit_compile=True. "
                f"Leave out steps_per_execution={self.steps_per_execution}, jit_compile={self.jit_compile}."
            )
        if user_metrics(self):
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


def _split_targets(targets) -> tuple:
    """Labels, and the teacher's logits or None, of targets that may be `{"labels": ..., "teacher_logits": ...}`."""
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


def _is_real(labels, weights) -> tf.Tensor:
    """1 for every example, 0 for padding, which has neither a label nor a weight, `[batch]`."""
    return tf.maximum(is_labeled(labels), tf.cast(weights != 0, tf.float32))
