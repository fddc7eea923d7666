"""`Supervised(keras.Model)`: the training step that teacher, control and student share.

It handles what is easy to get wrong: division by the global batch, loss scaling, overflow on any replica,
regularization losses, sample weights, and a step counter that also counts the scaled steps that are skipped.
"""

import functools
import inspect

import keras
import tensorflow as tf

from kdistill.distillation import arguments, losses
from kdistill.distillation.batch import Batch, ClassWeights, as_tensors, example_weights, is_real, split_targets
from kdistill.distillation.hard_loss import HardLoss
from kdistill.distillation.replicas import replica_count, several_workers, sum_over_replicas
from kdistill.distillation.step_loss import are_classes, is_labeled, is_right
from kdistill.errors import InputError
from kdistill.networks.heads import check_stated
from kdistill.networks.keras_internals import OwnBuild, loss_tracker
from kdistill.networks.precision import check_not_quantized
from kdistill.networks.signatures import class_count, subject_of
from kdistill.teachers.first_look import FirstLook
from kdistill.teachers.fit_inputs import look_once


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
        outputs: what the student gives, `logits` or `probabilities`. None: its first outputs show it.

    Example:
        model = Supervised(student)
        model.compile(keras.optimizers.Adam(1e-3))
        model.fit(images, labels, epochs=8)
    """

    _rates = ("accuracy",)

    def __init__(
        self, student: keras.Model, parts: tuple[str, ...] = ("hard",), *, outputs: str | None = None, **kwargs
    ):
        own = [name for name in inspect.signature(type(self)).parameters if name != "kwargs"]
        arguments.check_names(type(self).__name__, kwargs, [*own, *arguments.LAYER_ARGUMENTS])
        if not isinstance(student, keras.Model):
            raise InputError(f"student expects a keras.Model, received {student!r}.")
        check_not_quantized(student, allowed=("float8",))  # which Keras trains in; integers do not train
        check_stated(outputs)
        kwargs.setdefault("dtype", student.dtype_policy)  # compile() adds loss scaling by this model's own policy
        super().__init__(**kwargs)
        self.student = student
        self._first_look = FirstLook(lambda x: student(x, training=False), subject_of(student, "student"), outputs)
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
        self.hard_loss = self._loss_weight = self._class_weights = None
        if student.built:
            self.built = True

    def call(self, inputs, training=False):
        return self.student(inputs, training=training)

    def build(self, input_shape=None):
        if not self.student.built:
            self.student.build(input_shape)
        self.built = True

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, metrics=None, weighted_metrics=None, **kwargs):
        """As `keras.Model.compile`.

        Args:
            loss: a Keras loss on (labels, outputs), `hard` in the logs; None is cross-entropy on logits.
            loss_weights: a factor of `hard`.
            metrics, weighted_metrics: metrics of (labels, outputs) over the labeled examples.

        Raises:
            InputError: an argument that Keras does not have, more than one loss, a metric with a name that is logged
                already.
        """
        arguments.check_names("compile", kwargs, inspect.signature(super().compile).parameters)
        outputs = getattr(self.student, "output_names", ())
        loss = arguments.only("loss", loss, outputs)
        loss_weights = arguments.loss_weight(arguments.only("loss_weights", loss_weights, outputs))
        metrics, weighted_metrics = (
            arguments.own_metrics(argument, outputs, [tracker.name for tracker in self._trackers])
            for argument in (metrics, weighted_metrics)
        )
        if metrics:  # `accuracy` is logged in any case, with the values that Keras would give
            metrics = [metric for metric in metrics if metric != "accuracy"] or None
        self.hard_loss = None if loss is None else HardLoss(loss)
        self._loss_weight = loss_weights
        self._first_look.kind = None  # of numbers that tell nothing, the loss decides
        super().compile(
            optimizer=optimizer,
            loss=loss,
            loss_weights=loss_weights,
            metrics=metrics,
            weighted_metrics=weighted_metrics,
            **kwargs,
        )

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)  # so that its slots are loaded from the file

    @functools.wraps(keras.Model.fit)
    def fit(self, *args, **kwargs):
        given = inspect.signature(super().fit).bind(*args, **kwargs).arguments
        self._check_models()
        self._check_targets(given)
        look_once(self, given)
        self._set_class_weights(given.pop("class_weight", None))
        directions = {tracker.name: "max" if tracker.name in self._rates else "min" for tracker in self._trackers}
        arguments.set_directions(given.get("callbacks"), directions)
        with arguments.readable_errors():
            return super().fit(**given)

    @functools.wraps(keras.Model.evaluate)
    def evaluate(self, *args, **kwargs):
        given = inspect.signature(super().evaluate).bind(*args, **kwargs).arguments
        if not given.get("kwargs"):  # in `fit`, which has checked its validation data
            self._check_targets(given)
        with arguments.readable_errors():
            return super().evaluate(*args, **kwargs)

    @functools.wraps(keras.Model.train_on_batch)
    def train_on_batch(self, *args, **kwargs):
        given = inspect.signature(super().train_on_batch).bind(*args, **kwargs).arguments
        self._check_models()
        self._check_targets(given)
        self._set_class_weights(given.pop("class_weight", None))
        with arguments.readable_errors():
            return super().train_on_batch(**given)

    @functools.wraps(keras.Model.test_on_batch)
    def test_on_batch(self, *args, **kwargs):
        self._check_targets(inspect.signature(super().test_on_batch).bind(*args, **kwargs).arguments)
        with arguments.readable_errors():
            return super().test_on_batch(*args, **kwargs)

    def export(self, filepath, *args, **kwargs):
        """As `keras.Model.export`, of the student: a file contains no teacher and nothing of the training."""
        self.student.export(filepath, *args, **kwargs)

    def _check_models(self):
        """Raises `InputError` for a student that cannot be trained."""
        if self.student.built and not self.trainable_variables:
            raise InputError(
                f"The student '{self.student.name}' has no trainable weights. Set student.trainable = True, or that of "
                "some of its layers, and compile again."
            )

    def _check_targets(self, given: dict):
        """Checks the labels that `fit` and the like receive, as far as they are arrays."""
        classes = class_count(self.student)
        if classes == 1:  # the step explains what to do with a single output
            return
        arguments.check_labels(given.get("y"), classes)
        validation = given.get("validation_data")
        if isinstance(validation, (list, tuple)) and len(validation) > 1:
            arguments.check_labels(validation[1], classes, "validation_data")

    def _set_class_weights(self, class_weight):
        """Weighs the examples by their class in the step: Keras's own way takes neither dicts nor class -1."""
        class_weights = ClassWeights.of(class_weight)
        if class_weights != self._class_weights:
            self._class_weights, self.train_function = class_weights, None

    def _check_without_labels(self):
        """Raises `InputError` if the data needs labels; called when a step without labels is traced."""
        raise InputError("The student learns from labels, but the data has none. Call fit(x, y).")

    @property
    def metrics(self):
        # Those of `compile` have no result before the first batch with labels.
        return [*self._trackers, *(metric for metric in self._compiled_metrics() if getattr(metric, "built", True))]

    def _compiled_metrics(self) -> list:
        own = [loss_tracker(self), *self._trackers]
        return [metric for metric in super().metrics if all(metric is not other for other in own)]

    def get_config(self):
        return {
            "name": self.name,
            "dtype": keras.dtype_policies.serialize(self.dtype_policy),
            "trainable": self.trainable,
            "outputs": self._first_look.stated,
            "student": keras.saving.serialize_keras_object(self.student),
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        student = keras.saving.deserialize_keras_object(config.pop("student"))
        return cls(student=student, **config)

    def _hard(self, batch: Batch, outputs) -> tf.Tensor:
        """The loss on labels, `[batch]`, scaled so that its mean over all examples is its reduction over the labeled.

        The reduction is the mean, or what the loss passed to `compile` says.
        """
        logits = self._logits(batch.inputs, outputs)
        width = getattr(outputs, "shape", (None,))[-1]
        if width is not None and not are_classes(batch.labels) and batch.labels.shape[-1] != width:
            raise arguments.other_width(batch.labels.shape[-1], width)
        if self.hard_loss is None:
            per_example = losses.hard_cross_entropy(batch.labels, logits)
        else:
            per_example = self.hard_loss(batch.labels, outputs)
        if self._is_mean:
            hard = tf.math.divide_no_nan(tf.cast(per_example, tf.float32), batch.share)
        else:
            hard = per_example * sum_over_replicas(batch.count)
            if self.hard_loss.reduction == "weighted mean":
                weights = tf.reduce_sum(batch.weights * is_labeled(batch.labels))
                hard = tf.math.divide_no_nan(hard, sum_over_replicas(weights))
        return hard if self._loss_weight is None else self._loss_weight * hard

    @property
    def _is_mean(self) -> bool:
        """Whether `hard` is a mean over the labeled examples, each with its sample weight."""
        return self.hard_loss is None or self.hard_loss.reduction == "mean"

    def _logits(self, inputs, outputs) -> tf.Tensor:
        """The logits `[batch, classes]` of the student's outputs for these inputs."""
        logits = self._first_look.logits(outputs, inputs, otherwise=self.hard_loss and self.hard_loss.takes)
        if self.hard_loss is not None:
            self.hard_loss.check_outputs(outputs, self._first_look)
        return logits

    def _forward(self, inputs, training: bool) -> tuple:
        """The student's outputs, and its features by the name of the term that compares them."""
        return self.student(inputs, training=training), {}

    def _loss_parts(self, batch: Batch, outputs, features: dict) -> tuple[tf.Tensor, dict]:
        """The total of the loss and its parts by name, each `[batch]`."""
        hard = self._hard(batch, outputs)
        return hard, {"hard": hard}

    def _hits(self, batch: Batch, outputs) -> dict:
        """0 or 1 for each example, `[batch]`, of which the rates are the means."""
        return {"accuracy": is_right(batch.labels, self._logits(batch.inputs, outputs))}

    def _targets(self, inputs, teacher_logits):
        """What the student learns from besides labels, computed outside of the gradient tape.

        `teacher_logits` are those that came with the data, or None.
        """
        return None

    def _batch(self, data, class_weights: ClassWeights | None = None) -> Batch:
        inputs, labels, weights = keras.utils.unpack_x_y_sample_weight(as_tensors(data))
        labels, teacher_logits = split_targets(labels)
        has_labels = labels is not None
        if not has_labels:
            self._check_without_labels()
            labels = -tf.ones(tf.shape(keras.tree.flatten(inputs)[0])[:1], tf.int32)
        weights = weights["labels"] if isinstance(weights, dict) else weights  # Keras copies them to every target
        if class_weights is not None:
            if weights is not None or not has_labels:
                raise InputError(
                    f"class_weight expects labels without sample weights, received {'' if has_labels else 'no '}labels"
                    f"{' with sample_weight' if weights is not None else ''}. Leave out one of them."
                )
            weights = class_weights.of_labels(labels)
        weights = example_weights(weights, labels)
        count, labeled = tf.reduce_sum(is_real(labels, weights)), tf.reduce_sum(is_labeled(labels))
        share = tf.math.divide_no_nan(sum_over_replicas(labeled), sum_over_replicas(count))
        targets = self._targets(inputs, teacher_logits)
        return Batch(inputs, labels, weights, targets, count, labeled, share, has_labels)

    def train_step(self, data):
        batch = self._batch(data, self._class_weights)
        with tf.GradientTape() as tape:
            outputs, features = self._forward(batch.inputs, training=True)
            total, parts = self._loss_parts(batch, outputs, features)
            loss = tf.reduce_sum(total * batch.weights) / sum_over_replicas(batch.count)
            penalty = self._penalty()
            scaled = self.optimizer.scale_loss(loss + penalty / replica_count())
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
        if replica_count() == 1 or not scaling:
            return gradients
        finite = tf.reduce_all([tf.reduce_all(tf.math.is_finite(g)) for g in gradients if g is not None])
        overflows = sum_over_replicas(1.0 - tf.cast(finite, tf.float32))
        factor = tf.where(overflows > 0, float("nan"), 1.0)
        return [None if g is None else g * tf.cast(factor, g.dtype) for g in gradients]

    def _record_not_finite(self, total, parts):
        sums = tf.stack([tf.reduce_sum(total), *(tf.reduce_sum(parts[name]) for name in self.part_names)])
        finite = tf.math.is_finite(sum_over_replicas(sums))
        before = tf.convert_to_tensor(self.broken_step)
        self.broken_step.assign(tf.where(~finite & (before < 0), tf.convert_to_tensor(self.global_step), before))

    def _logged(self, batch: Batch, outputs, total, parts, penalty) -> dict:
        """Updates all metrics with this step; returns them."""
        labels, weights, count = batch.labels, batch.weights, batch.count
        hits = self._hits(batch, outputs)
        safe = tf.maximum(count, 1.0)
        values = {"loss": tf.reduce_sum(total * weights) / safe + penalty}
        values |= {name: tf.reduce_sum(part * weights) / safe for name, part in parts.items()}
        if self._is_mean:
            # `hard` is scaled by the share over all replicas; this replica logs the mean over its own labels.
            values["hard"] = values["hard"] * batch.share * safe / tf.maximum(batch.labeled, 1.0)
        for tracker in self._trackers:
            if tracker.name in values:
                examples = batch.labeled if tracker.name == "hard" and self._is_mean else count
                total = values[tracker.name] * examples
            else:
                mask = is_labeled(labels) if tracker.name == "accuracy" else is_real(labels, weights)
                total, examples = tf.reduce_sum(hits[tracker.name] * mask), tf.reduce_sum(mask)
            # update_state in a fifth of the operations, which makes training a small student measurably faster.
            tracker.total.assign(tracker.total + total)
            tracker.count.assign(tracker.count + examples)
        user_metrics = self._compiled_metrics()
        if user_metrics and batch.has_labels:
            if are_classes(labels):
                labeled = is_labeled(labels) > 0
                labels, outputs, weights = (tf.boolean_mask(value, labeled) for value in (labels, outputs, weights))
            for metric in user_metrics:
                metric.update_state(labels, outputs, sample_weight=weights)
        logs = self.get_metrics_result()
        if not batch.has_labels:  # what needs labels would be 0, which looks like a result
            names = {tracker.name for tracker in self._trackers} - {"hard", "accuracy"}
            logs = {name: value for name, value in logs.items() if name in names}
        if several_workers():  # Keras reduces logs over workers along their first axis, which a scalar does not have
            return {name: tf.reshape(value, (1,)) for name, value in logs.items()}
        return logs

    def build_before_fit(self) -> bool:
        """On several replicas or workers, creates the optimizer's variables inside the strategy's scope."""
        if self.distribute_strategy.num_replicas_in_sync == 1 and not several_workers(self.distribute_strategy):
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
        if self._compiled_metrics():
            raise InputError(
                "On several replicas a Distiller logs its own metrics only (loss, hard, kd, accuracy, agreement). "
                "Leave metrics= and weighted_metrics= out of compile()."
            )
