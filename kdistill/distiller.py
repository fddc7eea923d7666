"""`Distiller(keras.Model)`: a student that learns from labels and from the softened outputs of a frozen teacher."""

from collections.abc import Sequence

import keras
import tensorflow as tf

from kdistill import losses
from kdistill.errors import InputError
from kdistill.supervised import Supervised
from kdistill.teacher import as_logits, classes_of, frozen

Schedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="kdistill")
class Distiller(Supervised):
    """Distils `teacher` into `student` (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    The loss is `(1 - w) * hard + w * T^2 * KL(softmax(t/T) || softmax(s/T))`: `w = 0` is labels only, `w = 1` the
    teacher only. `hard` is the loss given to `compile`, by default cross-entropy with the labels.

    Args:
        student: the model to train, `distiller.student` afterwards. It may end in logits or in softmax.
        teacher: a model, a list of models (blended in probability space), or a function images -> logits
            `[batch, classes]`. It is run with `training=False`, never trained, and never saved. It gets the same
            inputs as the student. None where the data carries its logits: targets that are a dict
            `{"labels": ..., "teacher_logits": [batch, classes]}` are used in its place.
        distillation_weight: `w`, a number from 0 to 1 or a Keras `LearningRateSchedule` over training steps.
        temperature: `T`, a number above 0 or a `LearningRateSchedule`.
        teacher_weights: one positive number per teacher of a list.

    `distiller.temperature = 2.0` and `distiller.distillation_weight = 0.5` take effect at the next step, without a
    new trace. Logs `loss`, `hard`, `kd` (the KL term with T^2), `accuracy`, `agreement` (same class as the teacher).
    A saved Distiller holds no teacher: after loading, call `distiller.set_teacher(teacher)` and go on.
    """

    _rates = ("accuracy", "agreement")

    def __init__(
        self,
        student: keras.Model,
        teacher=None,
        *,
        distillation_weight: float | Schedule = 0.9,
        temperature: float | Schedule = 4.0,
        teacher_weights: Sequence[float] | None = None,
        **kwargs,
    ):
        super().__init__(student, ("hard", "kd"), **kwargs)
        self._schedules = {}
        self._numbers = {
            name: self.add_weight(name=name, shape=(), dtype="float32", trainable=False)
            for name in ("distillation_weight", "temperature")
        }
        self._teacher_weights = teacher_weights
        self._teach = None
        self.distillation_weight = distillation_weight
        self.temperature = temperature
        if teacher is not None:
            self.set_teacher(teacher)

    def set_teacher(self, teacher) -> None:
        """Another teacher (also the way to go on with a Distiller that was loaded from a file)."""
        given = teacher if isinstance(teacher, (list, tuple)) else [teacher]
        if any(each is self.student for each in given):
            raise InputError("teacher and student are the same model. Give the student a network of its own.")
        expected = classes_of(self.student)
        for each in given:
            received = classes_of(each) if isinstance(each, keras.Model) else None
            if expected is not None and received is not None and expected != received:
                raise _other_classes(expected, received)
        # A function is not tracked by Keras, a model assigned here would be, and would be saved with the student.
        self._teach = frozen(teacher, self._teacher_weights)
        self.train_function = self.test_function = None

    @property
    def distillation_weight(self) -> float:
        """The weight of the teacher's term at the current step."""
        return float(self._value("distillation_weight"))

    @distillation_weight.setter
    def distillation_weight(self, value):
        self._set("distillation_weight", value, lambda v: 0 <= v <= 1, "a number from 0 to 1")

    @property
    def temperature(self) -> float:
        """The temperature at the current step."""
        return float(self._value("temperature"))

    @temperature.setter
    def temperature(self, value):
        self._set("temperature", value, lambda v: 0 < v < float("inf"), "a number above 0")

    def _set(self, name, value, allowed, expected):
        had_schedule = self._schedules.pop(name, None) is not None
        if isinstance(value, Schedule):
            self._schedules[name] = value
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and allowed(value):
            self._numbers[name].assign(value)
        else:
            raise InputError(f"{name} expects {expected} or a LearningRateSchedule, received {value!r}.")
        if had_schedule or isinstance(value, Schedule):
            self.train_function = self.test_function = None  # the schedule is part of the traced step

    def _value(self, name) -> tf.Tensor:
        if name in self._schedules:
            return tf.cast(self._schedules[name](tf.convert_to_tensor(self.global_step)), tf.float32)
        return tf.convert_to_tensor(self._numbers[name])

    def get_config(self):
        schedules = {n: keras.saving.serialize_keras_object(s) for n, s in self._schedules.items()}
        return {**super().get_config(), **schedules, "teacher_weights": self._teacher_weights}

    @classmethod
    def from_config(cls, config):
        # Numbers are among the saved variables; only a schedule has to be rebuilt.
        config = dict(config)
        for name in ("distillation_weight", "temperature"):
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(config[name])
        return super().from_config(config)

    def _given(self, inputs, stored):
        if stored is not None:
            return tf.cast(stored, tf.float32)
        if self._teach is None:
            raise InputError(
                "This Distiller has no teacher (a saved one holds none). Call distiller.set_teacher(teacher) and "
                "compile again, fit on targets that hold its logits, {'labels': ..., 'teacher_logits': ...}, or take "
                "distiller.student to predict."
            )
        return self._teach(inputs)

    def _losses_of(self, batch, outputs, features):
        student_logits, teacher_logits = as_logits(outputs), batch.given
        if student_logits.shape[-1] != teacher_logits.shape[-1]:
            raise _other_classes(student_logits.shape[-1], teacher_logits.shape[-1])
        kd = losses.kl_logits(student_logits, teacher_logits, self._value("temperature"))
        weight = self._value("distillation_weight")
        hard, _, rates = super()._losses_of(batch, outputs, features)
        same = tf.argmax(student_logits, axis=-1) == tf.argmax(teacher_logits, axis=-1)
        rates["agreement"] = tf.cast(same, tf.float32)
        return (1.0 - weight) * hard + weight * kd, {"hard": hard, "kd": kd}, rates


def _other_classes(student: int, teacher: int) -> InputError:
    return InputError(
        f"The student has {student} classes, the teacher {teacher}. Give both models one output for each class, "
        "in the same order."
    )
