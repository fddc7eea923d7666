"""`Distiller(keras.Model)`: a student that learns from labels and from the outputs of a frozen teacher, by terms."""

import dataclasses
import math
from collections.abc import Sequence

import keras
import tensorflow as tf

from kdistill.distillation import losses
from kdistill.distillation.supervised import Supervised
from kdistill.distillation.terms import in_steps, term_in_steps, term_loss
from kdistill.errors import InputError, unknown
from kdistill.networks.heads import as_logits
from kdistill.networks.taps import tapped
from kdistill.recipe import Term
from kdistill.recipe import values as recipe_values
from kdistill.recipe.objective import check_term, teacher_taps
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.frozen import classes_of, frozen

Schedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="kdistill")
class Distiller(Supervised):
    """Distills `teacher` into `student` (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    The loss is `(1 - w) * hard + w * T^2 * KL(softmax(t/T) || softmax(s/T)) + sum of weight * term`: `w = 0` is labels
    only, `w = 1` the teacher only. `hard` is the loss given to `compile`, by default cross-entropy with the labels.

    Args:
        student: the model to train, `distiller.student` afterwards. It may end in logits or in softmax.
        teacher: a model, a list of models (blended in probability space), or a function images -> logits
            `[batch, classes]`. It is run with `training=False`, never trained, and never saved. It gets the same
            inputs as the student; `Adapted(teacher, size=..., ...)` sees them in another way. None where the data
            carries its logits: targets that are a dict `{"labels": ..., "teacher_logits": [batch, classes]}` are used
            in its place.
        distillation_weight: `w`, a number from 0 to 1 or a Keras `LearningRateSchedule` over training steps.
        temperature: `T`, a number above 0 or a `LearningRateSchedule`, by default 4.
        terms: a dict of named `Term`s, each added to the loss and logged under its name. A term named `kd` takes the
            place of the KL (`w` weighs it, and there is no `temperature`).
        teacher_weights: one positive number per teacher of a list.

    `distiller.temperature = 2.0`, `distiller.distillation_weight = 0.5` and `distiller.set_term("hint", weight=0.5)`
    take effect at the next step, without a new trace. Student and teacher run once in a step, whatever the number of
    terms. Projectors are trained and saved with the Distiller, and are no part of `distiller.student`. Logs `loss`,
    `hard`, `kd` (the KL term with T^2), each term, `accuracy`, `agreement` (same class as the teacher).
    A saved Distiller holds no teacher: after loading, call `distiller.set_teacher(teacher)` and go on.
    """

    _rates = ("accuracy", "agreement")

    def __init__(
        self,
        student: keras.Model,
        teacher=None,
        *,
        distillation_weight: float | Schedule = 0.9,
        temperature: float | Schedule | None = None,
        terms: dict[str, Term] | None = None,
        teacher_weights: Sequence[float] | None = None,
        **kwargs,
    ):
        terms = dict(terms or {})
        for name, term in terms.items():
            check_term(name, term, (Schedule,))
        super().__init__(student, ("hard", "kd", *(name for name in terms if name != "kd")), **kwargs)
        self._schedules, self._numbers = {}, {}
        self._terms = terms
        self._teacher_weights = teacher_weights
        self._teach = None
        self._add("distillation_weight", distillation_weight)
        if "kd" not in terms:
            self._add("temperature", 4.0 if temperature is None else temperature)
        elif temperature is not None:
            raise InputError(
                f"temperature={temperature!r} would do nothing: the term 'kd' takes the place of the KL. "
                "Leave it out, or give the term its own: options={'temperature': ...}."
            )
        for name, term in terms.items():
            if name != "kd":
                self._add(f"{name}.weight", term.weight)
            for option, value in term.options.items():
                if isinstance(value, (float, Schedule)) or isinstance(term.loss, str):
                    self._add(f"{name}.{option}", value)
        self._projectors = {}
        taps = {t.student_tap: f"distill.terms.{n}.student_tap" for n, t in terms.items() if t.student_tap}
        if taps:
            model = tapped(student, taps, "student")
            self._taken = keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), model.input)
            self._tap_shapes = {name: tuple(tensor.shape) for name, tensor in model.output.items()}
            # A function, so that Keras does not take the student's layers for another model's and save them twice.
            self._tapped = lambda inputs, training: model(inputs, training=training)
        if not any(isinstance(term.projector, str) for term in terms.values()):
            self._add_projectors({})
        if teacher is not None:
            self.set_teacher(teacher)

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by name, as they were given."""
        return dict(self._terms)

    def set_teacher(self, teacher) -> None:
        """Another teacher (also the way to go on with a Distiller that was loaded from a file)."""
        given = teacher if isinstance(teacher, (list, tuple)) else [teacher]
        if any(each is self.student or getattr(each, "teacher", None) is self.student for each in given):
            raise InputError("teacher and student are the same model. Give the student a network of its own.")
        expected = classes_of(self.student)
        for each in given:
            received = classes_of(each) if isinstance(each, (keras.Model, Adapted)) else None
            if expected is not None and received is not None and expected != received:
                raise _other_classes(expected, received)
        # A function is not tracked by Keras, a model assigned here would be, and would be saved with the student.
        self._teach = frozen(teacher, self._teacher_weights, teacher_taps(self._terms))
        if len(self._projectors) < sum(term.projector is not None for term in self._terms.values()):
            outputs = tf.function(self._teach).get_concrete_function(self._taken).structured_outputs
            with self.distribute_strategy.scope():
                self._add_projectors({name: tuple(tensor.shape) for name, tensor in outputs.items()})
        self.train_function = self.test_function = None

    def set_term(self, name: str, **values) -> None:
        """Changes the `weight` or options of a term, such as `set_term("hint", weight=0.5)`, from the next step on."""
        if name not in self.terms:
            raise unknown("term", name, self.terms)
        for option, value in values.items():
            key = f"{name}.{option}"
            if key not in self._numbers:
                known = [each.partition(".")[2] for each in self._numbers if each.startswith(f"{name}.")]
                raise unknown(f"setting of the term '{name}'", option, known)
            self._set(key, value)

    @property
    def settings(self) -> dict[str, float]:
        """Every weight and option at the current step: `distillation_weight`, `temperature`, `hint.weight`, ..."""
        return {name: float(self._value(name)) for name in self._numbers}

    @property
    def distillation_weight(self) -> float:
        """The weight of the teacher's term at the current step."""
        return float(self._value("distillation_weight"))

    @distillation_weight.setter
    def distillation_weight(self, value):
        self._set("distillation_weight", value)

    @property
    def temperature(self) -> float:
        """The temperature at the current step."""
        if "temperature" not in self._numbers:
            raise AttributeError("This Distiller has no temperature: the term 'kd' takes the place of the KL.")
        return float(self._value("temperature"))

    @temperature.setter
    def temperature(self, value):
        self._set("temperature", value)

    def _add(self, name: str, value):
        """A number of the loss: a variable, so that it can change without a new trace, or a schedule."""
        variable = self.add_weight(name=name.replace(".", "_"), shape=(), dtype="float32", trainable=False)
        self._numbers[name] = variable
        self._set(name, value)

    def _add_projectors(self, teacher_shapes: dict):
        """All at once, in the order of the terms: in this order they are saved, and loaded, with their slots."""
        for name, term in self._terms.items():
            if term.projector is not None:
                layer, shape = term.projector, self._tap_shapes[term.student_tap]
                if isinstance(layer, str):
                    layer = _projector(name, layer, shape, teacher_shapes[term.teacher_tap], self.dtype_policy)
                if not layer.built:
                    layer.build(shape)
                self._projectors[name] = layer

    def _set(self, name, value):
        if name not in self._numbers:
            raise InputError(f"There is no {name}: the term 'kd' takes the place of the softened KL. See set_term().")
        term, _, option = name.rpartition(".")
        lowest, highest, expected = _limits(term and self._terms[term], option)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not isinstance(value, Schedule) and not (is_number and lowest <= value <= highest):
            raise InputError(f"{name} expects {expected} or a LearningRateSchedule, received {value!r}.")
        had_schedule = self._schedules.pop(name, None) is not None
        if isinstance(value, Schedule):
            self._schedules[name] = value
        else:
            self._numbers[name].assign(value)
        if had_schedule or isinstance(value, Schedule):
            self.train_function = self.test_function = None  # the schedule is part of the traced step

    def _value(self, name) -> tf.Tensor:
        if name in self._schedules:
            return tf.cast(self._schedules[name](tf.convert_to_tensor(self.global_step)), tf.float32)
        return tf.convert_to_tensor(self._numbers[name])

    def get_config(self):
        own = ("distillation_weight", "temperature")
        schedules = {n: keras.saving.serialize_keras_object(s) for n, s in self._schedules.items() if n in own}
        terms = [[name, self._term_config(name, term)] for name, term in self._terms.items()]
        return {**super().get_config(), **schedules, "terms": terms, "teacher_weights": self._teacher_weights}

    def _term_config(self, name: str, term: Term) -> dict:
        def now(key, given):
            return self._schedules.get(key, float(self._numbers[key])) if key in self._numbers else given

        config = {f.name: getattr(term, f.name) for f in dataclasses.fields(term)}
        config["weight"] = now(f"{name}.weight", term.weight)
        config["options"] = {option: now(f"{name}.{option}", each) for option, each in term.options.items()}
        config["projector"] = self._projectors.get(name, term.projector)
        return keras.saving.serialize_keras_object(config)

    @classmethod
    def from_config(cls, config):
        # Numbers are among the saved variables; only schedules have to be rebuilt.
        config = dict(config)
        for name in ("distillation_weight", "temperature"):
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(config[name])
        terms = config.pop("terms", [])
        config["terms"] = {name: Term(**keras.saving.deserialize_keras_object(each)) for name, each in terms}
        return super().from_config(config)

    def _forward(self, inputs, training):
        if not any(term.student_tap for term in self._terms.values()):
            return super()._forward(inputs, training)
        given = self._tapped(inputs, training)
        features = {}
        for name, term in self._terms.items():
            if term.student_tap:
                tap = as_logits(given["logits"]) if term.student_tap == "logits" else given[term.student_tap]
                projector = self._projectors.get(name)
                features[name] = tap if projector is None else projector(tap, training=training)
        return given["logits"], features

    def _given(self, inputs, stored):
        if stored is not None:
            tapping = [name for name, term in self._terms.items() if term.teacher_tap]
            if tapping:
                raise InputError(
                    f"Stored teacher logits hold no layers, which the terms {', '.join(tapping)} need. Give labels "
                    "alone, so that the teacher runs, or leave these terms out."
                )
            return tf.cast(stored, tf.float32)
        if self._teach is None:
            raise InputError(
                "This Distiller has no teacher (a saved one holds none). Call distiller.set_teacher(teacher) and "
                "compile again, fit on targets that hold its logits, {'labels': ..., 'teacher_logits': ...}, or take "
                "distiller.student to predict."
            )
        return self._teach(inputs)

    def _losses_of(self, batch, outputs, features):
        student_logits, given = as_logits(outputs), batch.given
        teacher_logits = given["logits"] if isinstance(given, dict) else given
        if student_logits.shape[-1] != teacher_logits.shape[-1]:
            raise _other_classes(student_logits.shape[-1], teacher_logits.shape[-1])
        hard, parts, rates = super()._losses_of(batch, outputs, features)
        same = tf.argmax(student_logits, axis=-1) == tf.argmax(teacher_logits, axis=-1)
        rates["agreement"] = tf.cast(same, tf.float32)
        if "kd" not in self._terms:
            parts["kd"] = losses.kl_logits(student_logits, teacher_logits, self._value("temperature"))
        for name, term in self._terms.items():
            pair = (features[name], given[term.teacher_tap]) if name in features else (student_logits, teacher_logits)
            keys = {option: f"{name}.{option}" for option in term.options}
            options = {o: self._value(k) if k in self._numbers else term.options[o] for o, k in keys.items()}
            try:
                parts[name] = term_loss(term, *pair, batch.labels, options)
            except InputError as error:
                raise InputError(f"The term '{name}': {error} Fix distill.terms.{name}.") from error
        weight = self._value("distillation_weight")
        total = (1.0 - weight) * hard + weight * parts["kd"]
        for name in self._terms:
            if name != "kd":
                total += self._value(f"{name}.weight") * parts[name]
        return total, parts, rates


def from_recipe(distill: recipe_values.Distill, student: keras.Model, teacher, steps: int) -> Distiller:
    """The Distiller that a recipe asks for; its schedules go over a training of so many steps."""
    return Distiller(
        student,
        teacher,
        distillation_weight=in_steps(distill.distillation_weight, steps),
        temperature=in_steps(distill.temperature, steps),
        terms={name: term_in_steps(term, steps) for name, term in distill.terms.items()},
    )


def _limits(term: Term | None, option: str) -> tuple[float, float, str]:
    """Lowest and highest number of a setting, and both in words."""
    largest = 3.4e38  # float32's, and above it infinity
    if option == "distillation_weight":
        return 0.0, 1.0, "a number from 0 to 1"
    if option == "temperature":
        return math.ulp(0.0), largest, "a number above 0"
    if option == "weight" or isinstance(term.loss, str):
        return 0.0, largest, "a number, 0 or more,"
    return -largest, largest, "a finite number"


def _projector(name: str, kind: str, student: tuple, teacher: tuple, policy) -> keras.layers.Layer:
    """The layer from the student's channels to the teacher's: shapes with the batch first, channels last."""
    path = f"distill.terms.{name}.projector"
    if kind == "conv1x1" and (len(student), len(teacher)) != (4, 4):
        raise InputError(
            f"{path}: conv1x1 needs features [batch, height, width, channels] of both models, received {student} and "
            f"{teacher}. Take dense, or other taps."
        )
    if teacher[-1] is None or student[-1] is None:
        raise InputError(f"{path}: the channels of {student} or {teacher} are not known. Give a Keras layer.")
    if kind == "conv1x1":
        return keras.layers.Conv2D(teacher[-1], 1, dtype=policy, name=f"{name}_projector")
    return keras.layers.Dense(teacher[-1], dtype=policy, name=f"{name}_projector")


def _other_classes(student: int, teacher: int) -> InputError:
    return InputError(
        f"The student has {student} classes, the teacher {teacher}. Give both models one output for each class, "
        "in the same order."
    )
