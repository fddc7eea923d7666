"""`Distiller(keras.Model)`: a student that learns from labels and from the outputs of a frozen teacher."""

import dataclasses
from collections.abc import Sequence

import keras
import tensorflow as tf

from kdistill.distillation.batch import Batch, by_output
from kdistill.distillation.output_heads import KD, OutputHead, as_rows
from kdistill.distillation.pairing import (
    check_pair,
    check_shared_layers,
    other_classes,
    stored_features,
    teacher_failed,
    warn_if_swapped,
)
from kdistill.distillation.step_loss import step_loss
from kdistill.distillation.supervised import Supervised
from kdistill.distillation.terms import in_steps, limits, projector_layer, term_in_steps
from kdistill.errors import InputError, unknown
from kdistill.networks.heads import NUMBERS
from kdistill.networks.outputs import as_logits, check_shape
from kdistill.networks.taps import tapped
from kdistill.recipe import Distill, Term
from kdistill.recipe.objective import DISTILLATION_WEIGHT, OUTPUTS_OF_LOSSES, TEMPERATURE, check_term, teacher_taps
from kdistill.teachers.fit_inputs import warn_of_teacher
from kdistill.teachers.frozen import frozen

Schedule = keras.optimizers.schedules.LearningRateSchedule


@keras.saving.register_keras_serializable(package="kdistill")
class Distiller(Supervised):
    """Distills `teacher` into `student` (Hinton, Vinyals, Dean 2015, arXiv 1503.02531).

    The loss is `(1 - w) * hard + w * T^2 * KL(softmax(t/T) || softmax(s/T)) + sum of weight * term`: `w = 0` is labels
    only, `w = 1` the teacher only. `hard` is the loss passed to `compile`, by default cross-entropy with the labels.

    Args:
        student: the model to train, `distiller.student` afterwards. It may end in logits or in softmax.
        teacher: a model, a list of models (blended in probability space), or a function images -> logits
            `[batch, classes]`. It runs with `training=False`, and is neither trained nor saved. It receives the same
            inputs as the student; `Adapted(teacher, size=..., ...)` changes them for it. None if the data contains
            its logits: targets `{"labels": ..., "teacher_logits": [batch, classes]}` replace it; with terms of layers
            `{"logits": ..., "<teacher_tap>": ...}` in the place of the logits.
        distillation_weight: `w`, a number from 0 to 1 or a Keras `LearningRateSchedule` over training steps.
        temperature: `T`, a number above 0 or a `LearningRateSchedule`, by default 4.
        terms: a dict of named `Term`s. Each is added to the loss and logged under its name. A term named `kd` replaces
            the KL: `w` weighs it, and there is no `temperature`.
        teacher_weights: one positive number per teacher of a list.
        outputs: what the student gives: `logits`, or `probabilities` (whose rows are normalized). None: its first
            outputs show it. For a teacher: `Adapted(teacher, outputs=...)`.
        head: what the outputs mean: `classes` (exclusive), `labels` (each 0 or 1) or `numbers`, or a dict of these by
            the names of the student's outputs. None: its last activation shows it, else the loss of `compile`, else it
            is `classes`.

    Of `labels`, `kd` is the KL of their Bernoulli distributions, the sum over the labels; of `numbers` it is the
    squared error, without a temperature. Outputs with positions, `[batch, ..., n]`, are compared at each position that
    a mask of Keras and `sample_weight` leave. Several outputs each have a teacher's output of the same name, labels, a
    loss and metrics. `docs/heads.md` has an example of each.

    Raises:
        InputError: a setting is out of range or has no effect, a term names an unknown loss or layer, student and
            teacher have different numbers of classes or different inputs, or share a layer that is trained.

    Warns (`UserWarning`) of a student that is larger than its teacher, as after (teacher, student).

    Example:
        distiller = Distiller(student, teacher, distillation_weight=0.9, temperature=4.0)
        distiller.compile(keras.optimizers.Adam(1e-3))
        distiller.fit(images, labels, validation_data=(more_images, more_labels), epochs=8)
        distiller.student.save("student.keras")

    `distiller.temperature = 2.0`, `distiller.distillation_weight = 0.5` and `distiller.set_term("hint", weight=0.5)`
    take effect at the next step, without a new trace. Student and teacher run once in a step, whatever the number of
    terms. Projectors are trained and saved with the Distiller, and are not part of `distiller.student`. Logs `loss`,
    `hard`, `kd` (the KL term with T^2), each term, `accuracy`, `agreement` (same class as the teacher).
    A saved Distiller contains no teacher: after loading, call `distiller.set_teacher(teacher)`.
    """

    _uses_teacher = True

    def __init__(
        self,
        student: keras.Model,
        teacher=None,
        *,
        distillation_weight: float | Schedule = DISTILLATION_WEIGHT,
        temperature: float | Schedule | None = None,
        terms: dict[str, Term] | None = None,
        teacher_weights: Sequence[float] | None = None,
        outputs: str | None = None,
        head: str | dict[str, str] | None = None,
        **kwargs,
    ):
        terms = dict(terms or {})
        for name, term in terms.items():
            check_term(name, term, (Schedule,))
        parts = ("hard", "kd", *(name for name in terms if name != "kd"))
        super().__init__(student, parts, outputs=outputs, head=head, **kwargs)
        self._schedules, self._numbers = {}, {}
        self._terms, self._has_temperature = terms, temperature is not None
        self._teacher_weights = teacher_weights
        self._teach = None
        self._add("distillation_weight", distillation_weight)
        if "kd" not in terms:
            self._add("temperature", TEMPERATURE if temperature is None else temperature)
        elif temperature is not None:
            raise InputError(
                f"temperature={temperature!r} would do nothing: the term 'kd' replaces the KL. "
                "Remove it, or set that of the term: options={'temperature': ...}."
            )
        for name, term in terms.items():
            if name != "kd":
                self._add(f"{name}.weight", term.weight)
            for option, value in term.options.items():
                if isinstance(value, (float, Schedule)) or isinstance(term.loss, str):
                    self._add(f"{name}.{option}", value)
        self._projectors = {}
        taps = {t.student_tap: f"distill.terms.{n}.student_tap" for n, t in terms.items() if t.student_tap}
        if taps and tuple(self._heads) != ("",):
            raise InputError("A term of layers needs a student with one output. Leave the term out.")
        if taps:
            model = tapped(student, taps, "student")
            self._input_spec = keras.tree.map_structure(lambda x: tf.TensorSpec(x.shape, x.dtype), model.input)
            self._tap_shapes = {name: tuple(tensor.shape) for name, tensor in model.output.items()}
            # A function, so that Keras does not take the student's layers for another model's and save them twice.
            self._tapped = lambda inputs, training: model(inputs, training=training)
        if not any(isinstance(term.projector, str) for term in terms.values()):
            self._add_projectors({})
        self._check_teacher = None
        if teacher is not None:
            self.set_teacher(teacher)
            warn_if_swapped(student, teacher)

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by name, as passed to the constructor."""
        return dict(self._terms)

    def set_teacher(self, teacher) -> None:
        """Replaces the teacher. A Distiller that was loaded from a file needs this before it can train.

        Raises `InputError` if the teacher is the student itself, shares a trained layer with it, or has another number
        of classes or other inputs.
        """
        check_pair(self.student, teacher)
        # Functions: Keras would track a model that is an attribute, and save it with the student.
        self._teach = frozen(teacher, self._teacher_weights, teacher_taps(self._terms), lambda: self.heads)
        self._check_teacher = lambda: check_shared_layers(self, teacher)
        self.look_at_teacher = lambda inputs, labels: warn_of_teacher(teacher, inputs, labels)
        if len(self._projectors) < sum(term.projector is not None for term in self._terms.values()):
            outputs = tf.function(self._teach).get_concrete_function(self._input_spec).structured_outputs
            with self.distribute_strategy.scope():
                self._add_projectors({name: tuple(tensor.shape) for name, tensor in outputs.items()})
        self.train_function = self.test_function = None

    def set_term(self, name: str, **values) -> None:
        """Changes the weight or options of a term from the next step on: `set_term("hint", weight=0.5)`.

        Raises `InputError` for an unknown term or option, or a number out of range.
        """
        if name not in self.terms:
            raise unknown("term", name, self.terms)
        for option, value in values.items():
            key = f"{name}.{option}"
            if key not in self._numbers:
                settings = [key.partition(".")[2] for key in self._numbers if key.startswith(f"{name}.")]
                raise unknown(f"setting of the term '{name}'", option, settings)
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
            raise AttributeError("This Distiller has no temperature: the term 'kd' replaces the KL.")
        return float(self._value("temperature"))

    @temperature.setter
    def temperature(self, value):
        self._set("temperature", value)

    def _add(self, name: str, value):
        """Adds a number of the loss: a variable, so that it can change without a new trace, or a schedule."""
        variable = self.add_weight(name=name.replace(".", "_"), shape=(), dtype="float32", trainable=False)
        self._numbers[name] = variable
        self._set(name, value)

    def _add_projectors(self, teacher_shapes: dict):
        """Adds all at once, in the order of the terms: files contain them and their slots in this order."""
        for name, term in self._terms.items():
            if term.projector is not None:
                layer, shape = term.projector, self._tap_shapes[term.student_tap]
                if isinstance(layer, str):
                    layer = projector_layer(name, layer, shape, teacher_shapes[term.teacher_tap], self.dtype_policy)
                if not layer.built:
                    layer.build(shape)
                self._projectors[name] = layer

    def _set(self, name, value):
        if name not in self._numbers:
            raise InputError(f"There is no {name}: the term 'kd' replaces the KL. Use set_term('kd', ...).")
        term, _, option = name.rpartition(".")
        lowest, highest, expected = limits(term and self._terms[term], option)
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
        own = [name for name in ("distillation_weight", "temperature") if name in self._numbers]
        numbers = {name: self._schedules.get(name, float(self._numbers[name])) for name in own}
        numbers = {name: keras.saving.serialize_keras_object(value) for name, value in numbers.items()}
        terms = [[name, self._term_config(name, term)] for name, term in self._terms.items()]
        return {**super().get_config(), **numbers, "terms": terms, "teacher_weights": self._teacher_weights}

    def _term_config(self, name: str, term: Term) -> dict:
        def current(key, default):
            return self._schedules.get(key, float(self._numbers[key])) if key in self._numbers else default

        config = {f.name: getattr(term, f.name) for f in dataclasses.fields(term)}
        config["weight"] = current(f"{name}.weight", term.weight)
        config["options"] = {option: current(f"{name}.{option}", value) for option, value in term.options.items()}
        config["projector"] = self._projectors.get(name, term.projector)
        return keras.saving.serialize_keras_object(config)

    @classmethod
    def from_config(cls, config):
        config = dict(config)
        for name in ("distillation_weight", "temperature"):
            if name in config:
                config[name] = keras.saving.deserialize_keras_object(config[name])
        terms = config.pop("terms", [])
        config["terms"] = {name: Term(**keras.saving.deserialize_keras_object(item)) for name, item in terms}
        return super().from_config(config)

    def _check_models(self):
        super()._check_models()
        if self._check_teacher is not None:  # again, because a shared layer that was frozen may be trainable by now
            self._check_teacher()

    def _check_without_labels(self):
        with tf.init_scope():  # the number itself, also while a step is traced
            weight = "a schedule" if "distillation_weight" in self._schedules else f"{self.distillation_weight:g}"
        if weight != "1":
            raise InputError(
                f"The data has no labels, but the distillation weight is {weight}: the student learns from labels too. "
                "Call fit(x, y), or learn from the teacher alone: Distiller(..., distillation_weight=1.0)."
            )

    def _forward(self, inputs, training):
        if not any(term.student_tap for term in self._terms.values()):
            return super()._forward(inputs, training)
        outputs = self._tapped(inputs, training)
        features = {}
        for name, term in self._terms.items():
            if term.student_tap:
                tap = outputs[term.student_tap]
                tap = self._heads[""].scores(inputs, tap) if term.student_tap == "logits" else tap
                projector = self._projectors.get(name)
                features[name] = tap if projector is None else projector(tap, training=training)
        return outputs["logits"], features

    def compile(self, *args, **kwargs):
        super().compile(*args, **kwargs)
        self._check_terms()

    compile.__doc__ = Supervised.compile.__doc__

    def _check_terms(self):
        """Raises `InputError` for a term, or a temperature, that the outputs have no use for."""
        for name, term in self._terms.items():
            meanings = {head.name: head.meaning for head in self._heads_of(term)}
            allowed = OUTPUTS_OF_LOSSES.get(term.loss, ()) if isinstance(term.loss, str) else ()
            for output, meaning in meanings.items() if allowed else ():
                if meaning not in allowed:
                    fitting = [loss for loss, of in OUTPUTS_OF_LOSSES.items() if meaning in of]
                    raise InputError(
                        f"The term '{name}': {term.loss} compares {' or '.join(allowed)}, but the output "
                        f"{f'{output!r} ' if output else ''}of the student is of {meaning}. Use {', '.join(fitting)}."
                    )
        if self._has_temperature and set(self.heads.values()) == {NUMBERS}:
            raise InputError("temperature would do nothing: numbers are compared as they are. Remove it.")

    def _heads_of(self, term: Term) -> list[OutputHead]:
        """The outputs whose scores a term compares."""
        if term.output is None and tuple(self._heads) != ("",) and isinstance(term.loss, str):
            raise InputError(
                f"A term of {term.loss} needs output=, one of {', '.join(self._heads)}: the student has several."
            )
        if term.output is not None and term.output not in self._heads:
            raise unknown("output", term.output, [name for name in self._heads if name], "Fix output of the term.")
        return [self._heads[term.output]] if term.output else list(self._heads.values())

    def _targets(self, inputs, teacher_logits):
        if teacher_logits is not None:
            if tuple(self._heads) == ("",):
                logits, features = stored_features(teacher_logits, self._terms)
                logits = self._stored("", by_output(logits, ("",), "teacher_logits")[""])
                return {"": {"logits": logits, **features} if teacher_taps(self._terms) else logits}
            stored = by_output(teacher_logits, tuple(self._heads), "teacher_logits")
            return {name: self._stored(name, logits) for name, logits in stored.items() if logits is not None}
        if self._teach is None:
            raise InputError(
                "This Distiller has no teacher (a saved one contains none). Call distiller.set_teacher(teacher) and "
                "compile again, fit on targets with its logits, {'labels': ..., 'teacher_logits': ...}, or use "
                "distiller.student to predict."
            )
        try:
            taught = self._teach(inputs)
        except InputError:
            raise
        except Exception as error:  # a user's function may raise anything
            if tf.executing_eagerly():
                raise
            raise teacher_failed(error) from error
        return {"": taught} if tuple(self._heads) == ("",) else taught

    def _stored(self, name: str, logits) -> tf.Tensor:
        """The teacher's logits of the data. They may be probabilities after all."""
        meaning = self.heads[name]
        check_shape(logits, "'teacher_logits' of the data", meaning)
        return as_logits(tf.cast(logits, tf.float32), meaning=meaning)

    def _teacher_scores(self, head: OutputHead, batch: Batch, scores) -> tf.Tensor:
        """The rows `[rows, n]` of the teacher for an output."""
        if batch.targets is None:
            raise InputError(f"The data has no teacher_logits for the output '{head.name}'.")
        teacher = as_rows(_logits(batch.targets))
        if scores.shape[-1] != teacher.shape[-1]:
            raise other_classes(scores.shape[-1], teacher.shape[-1])
        return teacher

    def _loss_parts(self, head, batch, outputs, scores, features):
        teacher = self._teacher_scores(head, batch, scores)
        if outputs.shape.rank > 1 and not outputs.shape.is_compatible_with(_logits(batch.targets).shape):
            raise InputError(
                f"The student gives {tuple(outputs.shape)}, the teacher {tuple(_logits(batch.targets).shape)}. "
                "Both need one shape."
            )
        pairs = {name: (tap, batch.targets[self._terms[name].teacher_tap]) for name, tap in features.items()}
        settings = {name: self._value(name) for name in self._numbers}
        hard = self._hard(head, batch, outputs, scores)
        terms = {name: term for name, term in self._terms.items() if head in self._heads_of(term)}
        return step_loss(hard, scores, teacher, batch.labels, settings, terms, pairs, KD[head.meaning])

    def _hits(self, head, batch, scores):
        teacher = self._teacher_scores(head, batch, scores)
        return {**super()._hits(head, batch, scores), **head.teacher_hits(scores, teacher)}


def from_recipe(distill: Distill, student: keras.Model, teacher, steps: int, head=None) -> Distiller:
    """The Distiller of a recipe, with schedules over a training of `steps` steps. `head`: as for `Distiller`."""
    numbers_alone = {NUMBERS} == set(head.values() if isinstance(head, dict) else [head])
    unused = numbers_alone and distill.temperature == TEMPERATURE  # the default does nothing there
    distiller = Distiller(
        student,
        distillation_weight=in_steps(distill.distillation_weight, steps),
        temperature=None if unused else in_steps(distill.temperature, steps),
        terms={name: term_in_steps(term, steps) for name, term in distill.terms.items()},
        head=head,
    )
    distiller.set_teacher(teacher)  # not in the constructor: a recipe names the roles, and a student may be large
    return distiller


def _logits(targets) -> tf.Tensor:
    """The teacher's logits, of outputs with or without taps."""
    return targets["logits"] if isinstance(targets, dict) else targets
