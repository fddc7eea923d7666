"""`Supervised(keras.Model)`: the training step that teacher, control and student share.

It handles what is easy to get wrong: division by the global batch, loss scaling, overflow on any replica,
regularization losses, sample weights, and a step counter that also counts the scaled steps that are skipped.
"""

import functools
import inspect

import keras
import tensorflow as tf

from kdistill.distillation import arguments
from kdistill.distillation.batch import (
    Batch,
    ClassWeights,
    Given,
    as_tensors,
    by_output,
    check_distributed,
    replica_count,
    several_workers,
    split_targets,
    sum_over_replicas,
    unless_overflow,
)
from kdistill.distillation.hard_loss import HardLoss
from kdistill.distillation.head_steps import HeadStep, are_finite, compiled_values, log_sums, loss_of, rows_of
from kdistill.distillation.output_heads import (
    OF_OUTPUTS,
    OutputHead,
    check_head,
    heads_of,
    meaning_of,
    outputs_by_name,
)
from kdistill.distillation.step_loss import are_classes
from kdistill.errors import InputError
from kdistill.networks.heads import CLASSES, check_stated
from kdistill.networks.keras_internals import OwnBuild, fused_normalization, loss_tracker
from kdistill.networks.precision import check_not_quantized
from kdistill.networks.signatures import class_count
from kdistill.teachers.fit_inputs import look_once


@keras.saving.register_keras_serializable(package="kdistill")
class Supervised(OwnBuild, keras.Model):
    """A student trained on labels: `compile`, `fit`, `evaluate`, `predict` and callbacks as for any Keras model.

    Inputs, outputs and weights are the student's. Logs `loss` (with regularization), `hard` (the loss on labels) and
    `accuracy`. Labels are classes `[batch]` or distributions `[batch, classes]`. A class below 0 means "unlabeled":
    `hard` and `accuracy` are means over the labeled examples. Targets may also be
    `{"labels": ..., "teacher_logits": ...}`, as for a `Distiller`; the logits are then ignored.

    An output may also be of independent labels or of numbers, have positions (`[batch, ..., n]`), and be one of
    several: see `docs/heads.md`. Then `hard` and the metrics of each output have its name before theirs.

    Args:
        student: the model to train, `supervised.student` afterwards. It may end in logits or in an activation.
        parts: the names of the parts of the loss that are logged.
        outputs: what the student gives, `logits` or `probabilities`. None: its first outputs show it.
        head: what its output means: `classes` (exclusive), `labels` or `numbers`, or a dict of these by the names of
            outputs. None: the last activation, else the loss of `compile` shows it, else it is `classes`.

    Example:
        model = Supervised(student)
        model.compile(keras.optimizers.Adam(1e-3))
        model.fit(images, labels, epochs=8)
    """

    _uses_teacher = False

    def __init__(
        self,
        student: keras.Model,
        parts: tuple[str, ...] = ("hard",),
        *,
        outputs: str | None = None,
        head: str | dict[str, str] | None = None,
        **kwargs,
    ):
        own = [name for name in inspect.signature(type(self)).parameters if name != "kwargs"]
        arguments.check_names(type(self).__name__, kwargs, [*own, *arguments.LAYER_ARGUMENTS])
        if not isinstance(student, keras.Model):
            raise InputError(f"student expects a keras.Model, received {student!r}.")
        check_not_quantized(student, allowed=("float8",))  # which Keras trains in; integers do not train
        check_stated(outputs)
        check_head(head)
        kwargs.setdefault("dtype", student.dtype_policy)  # compile() adds loss scaling by this model's own policy
        super().__init__(**kwargs)
        self.student, self._stated, self._stated_head = student, outputs, head
        self._heads = heads_of(student, head, outputs)
        of_outputs = [head.named(part) for part in parts if part in OF_OUTPUTS for head in self._heads.values()]
        self.part_names = (*of_outputs, *(part for part in parts if part not in OF_OUTPUTS))
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
        self._trackers, self._class_weights = [], None
        self._add_trackers()
        if student.built:
            self.built = True

    @property
    def heads(self) -> dict[str, str]:
        """What each output means, by its name (empty for the only one): `classes`, `labels` or `numbers`."""
        return {name: head.meaning for name, head in self._heads.items()}

    @property
    def hard_losses(self) -> list[HardLoss | None]:
        """The losses of `compile` of the outputs; None for the default."""
        return [head.hard_loss for head in self._heads.values()]

    def _add_trackers(self):
        """Adds a mean for each number that a step logs; the meaning of the outputs decides on the rates."""
        self._rates = {
            head.named(rate): head.name
            for head in self._heads.values()
            for rate in head.rates[: 1 + self._uses_teacher]
        }
        names = ["loss", *self.part_names, *self._rates]
        if [tracker.name for tracker in self._trackers] != names:
            self._trackers.clear()  # Keras tracks the entries of this list
            self._trackers.extend(keras.metrics.Mean(name=name) for name in names)

    def call(self, inputs, training=False):
        return self.student(inputs, training=training)

    def build(self, input_shape=None):
        if not self.student.built:
            self.student.build(input_shape)
        self.built = True

    def compile(self, optimizer="rmsprop", loss=None, loss_weights=None, metrics=None, weighted_metrics=None, **kwargs):
        """As `keras.Model.compile`.

        Args:
            loss: a Keras loss on (labels, outputs), `hard` in the logs. None is cross-entropy on logits of classes or
                of labels (the sum over these), and squared error of numbers. Several outputs: a dict or list of these.
            loss_weights: a factor of `hard`. Several outputs: a dict or list of factors, each of all that an output
                adds to the loss.
            metrics, weighted_metrics: metrics of (labels, outputs) over the labeled rows.

        Raises:
            InputError: an argument that Keras does not have, more than one loss for an output, a loss that contradicts
                what the output means, a metric with a name that is logged already.
        """
        arguments.check_names("compile", kwargs, inspect.signature(super().compile).parameters)
        names, known = tuple(self._heads), getattr(self.student, "output_names", ())
        losses = arguments.for_outputs("loss", loss, names, known)
        weights = arguments.for_outputs("loss_weights", loss_weights, names, known)
        if names == ("",):
            loss, loss_weights = losses[""], weights[""]
        for name, head in self._heads.items():
            head.hard_loss = None if losses[name] is None else HardLoss(losses[name])
            head.weight = arguments.loss_weight(weights[name])
            head.meaning = meaning_of(self.student, name, head.stated, head.hard_loss, self._stated is not None)
            head.first_look.kind = None  # of numbers that tell nothing, the loss decides
        self._add_trackers()
        logged = [tracker.name for tracker in self._trackers]
        metrics, weighted_metrics = (
            arguments.own_metrics(argument, known, logged, names) for argument in (metrics, weighted_metrics)
        )
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
        directions = {tracker.name: self._direction(tracker.name) for tracker in self._trackers}
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
        if self.heads != {"": CLASSES} or classes == 1 or len(self.student.output_shape if classes else ()) > 2:
            return  # the step looks at the shapes
        arguments.check_labels(given.get("y"), classes)
        validation = given.get("validation_data")
        if isinstance(validation, (list, tuple)) and len(validation) > 1:
            arguments.check_labels(validation[1], classes, "validation_data")

    def _direction(self, name: str) -> str:
        """Whether more of what is logged under a name is better, `max`, or less, `min`."""
        return "max" if name in self._rates and not name.endswith("mae") else "min"

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
            "outputs": self._stated,
            "head": self._stated_head,
            "student": keras.saving.serialize_keras_object(self.student),
        }

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        student = keras.saving.deserialize_keras_object(config.pop("student"))
        return cls(student=student, **config)

    def _hard(self, head: OutputHead, batch: Batch, outputs, scores) -> tf.Tensor:
        """The loss on labels, `[rows]`, scaled so that its mean over all rows is its reduction over the labeled ones.

        The reduction is the mean, or what the loss passed to `compile` says.
        """
        width, distributions = scores.shape[-1], head.meaning == CLASSES and not are_classes(batch.labels)
        if distributions and width is not None and batch.labels.shape[-1] != width:
            raise arguments.other_width(batch.labels.shape[-1], width)
        per_row = head.hard(batch.given, batch.labels, batch.is_labeled, outputs, scores)
        if head.is_mean:
            hard = tf.math.divide_no_nan(tf.cast(per_row, tf.float32), batch.share)
        else:
            hard = per_row * sum_over_replicas(batch.count)
            if head.hard_loss.reduction == "weighted mean":
                weights = tf.reduce_sum(batch.weights * batch.is_labeled)
                hard = tf.math.divide_no_nan(hard, sum_over_replicas(weights))
        return hard if head.weight is None or head.name else head.weight * hard

    def _forward(self, inputs, training: bool) -> tuple:
        """The student's outputs, and its features by the name of the term that compares them."""
        return self.student(inputs, training=training), {}

    def _loss_parts(self, head: OutputHead, batch: Batch, outputs, scores, features: dict) -> tuple[tf.Tensor, dict]:
        """The total of the loss of an output and its parts by name, each `[rows]`."""
        hard = self._hard(head, batch, outputs, scores)
        return hard, {"hard": hard}

    def _hits(self, head: OutputHead, batch: Batch, scores) -> dict:
        """What is logged of each row, `[rows]`, of which the rates are the means."""
        return head.hits(batch.labels, scores)

    def _targets(self, inputs, teacher_logits) -> dict:
        """What each output learns from besides labels, by its name, computed outside of the gradient tape.

        `teacher_logits` are those that came with the data, or None.
        """
        return {}

    def _given(self, data) -> Given:
        inputs, labels, weights = keras.utils.unpack_x_y_sample_weight(as_tensors(data))
        names = tuple(self._heads)
        labels, teacher_logits = split_targets(labels, names)
        if all(value is None for value in labels.values()):
            self._check_without_labels()
        if isinstance(weights, dict) and "labels" in weights:  # Keras copies them to every target
            weights = weights["labels"]
        if names == ("",) or isinstance(weights, (dict, list, tuple)):
            weights = by_output(weights, names, "sample_weight")
        else:
            weights = dict.fromkeys(names, weights)
        return Given(inputs, labels, weights, self._targets(inputs, teacher_logits))

    def _steps(self, given: Given, outputs, features, class_weights=None) -> list[HeadStep]:
        """The outputs of the student with their losses."""
        steps = []
        for name, output in outputs_by_name(outputs, tuple(self._heads)).items():
            head = self._heads[name]
            scores = head.scores(given.inputs, output)
            batch = rows_of(head, given, output, class_weights)
            total, parts = self._loss_parts(head, batch, output, scores, features)
            if head.name and head.weight is not None:
                total = head.weight * total
            steps.append(HeadStep(head, batch, output, scores, total, parts))
        return steps

    def train_step(self, data):
        given = self._given(data)
        with tf.GradientTape() as tape:
            with fused_normalization(self.student):
                outputs, features = self._forward(given.inputs, training=True)
            steps = self._steps(given, outputs, features, self._class_weights)
            loss, penalty = loss_of(steps), self._penalty()
            scaled = self.optimizer.scale_loss(loss + penalty / replica_count())
        variables = self.trainable_variables
        gradients = tape.gradient(scaled, variables)
        self.optimizer.apply(unless_overflow(gradients, self.optimizer), variables)
        finite, before = are_finite(steps, self.part_names), tf.convert_to_tensor(self.broken_step)
        self.broken_step.assign(tf.where(~finite & (before < 0), tf.convert_to_tensor(self.global_step), before))
        self.global_step.assign_add(1)
        return self._logged(steps, penalty)

    def test_step(self, data):
        given = self._given(data)
        outputs, features = self._forward(given.inputs, training=False)
        return self._logged(self._steps(given, outputs, features), self._penalty())

    def _penalty(self) -> tf.Tensor:
        return tf.add_n([tf.cast(loss, tf.float32) for loss in self.losses] or [tf.constant(0.0)])

    def _logged(self, steps: list[HeadStep], penalty) -> dict:
        """Updates all metrics with this step; returns them."""
        sums = log_sums(steps, lambda step: self._hits(step.head, step.batch, step.scores), penalty)
        for tracker in self._trackers:
            total, count = sums[tracker.name]
            # update_state in a fifth of the operations, which makes training a small student measurably faster.
            tracker.total.assign(tracker.total + total)
            tracker.count.assign(tracker.count + count)
        has_labels = any(step.batch.has_labels for step in steps)
        user_metrics = self._compiled_metrics()
        if has_labels and user_metrics:
            labels, outputs, weights = compiled_values(steps)
            for metric in user_metrics:
                metric.update_state(labels, outputs, sample_weight=weights)
        logs = self.get_metrics_result()
        if not has_labels:  # what needs labels would be 0, which looks like a result
            of_labels = {head.named(name) for head in self._heads.values() for name in ("hard", head.rates[0])}
            names = {tracker.name for tracker in self._trackers} - of_labels
            logs = {name: value for name, value in logs.items() if name in names}
        if several_workers():  # Keras reduces logs over workers along their first axis: a scalar has none
            return {name: tf.reshape(value, (1,)) for name, value in logs.items()}
        return logs

    def build_before_fit(self) -> bool:
        """On several replicas or workers, creates the optimizer's variables inside the strategy's scope."""
        if self.distribute_strategy.num_replicas_in_sync == 1 and not several_workers(self.distribute_strategy):
            return False
        check_distributed(self.steps_per_execution, self.jit_compile, self._compiled_metrics())
        with self.distribute_strategy.scope():
            self.optimizer.build(self.trainable_variables)
        return True
