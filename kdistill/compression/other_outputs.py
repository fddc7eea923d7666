"""Students of other inputs than images, or of other outputs than exclusive classes: their batches, teacher and loss.

Rows, losses and metrics are those of a `Distiller` (`distillation.output_heads`). Pruning and clustering know nothing
of them; quantization-aware training is for images with a class.
"""

import copy
from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf

from kdistill.compression.bridge import to_tf_keras
from kdistill.compression.finetune import Batches, KerasSchedule, number_at
from kdistill.compression.inputs import check_layers
from kdistill.conversion.float32 import Prepared, prepare
from kdistill.data.batches import steps_per_epoch, training_batches, without_autotuning
from kdistill.data.splits import Examples
from kdistill.distillation.batch import Given, split_targets
from kdistill.distillation.head_steps import HeadStep, log_sums, loss_of, rows_of
from kdistill.distillation.output_heads import KD, OutputHead, as_rows, output_names, outputs_by_name
from kdistill.distillation.step_loss import step_loss
from kdistill.errors import InputError
from kdistill.evaluation.examples import gather
from kdistill.networks.heads import NUMBERS, Head
from kdistill.networks.outputs import as_logits
from kdistill.networks.signatures import in_structure, inputs_of, noise_inputs
from kdistill.recipe import SCHEMES, Data, Stage, Term
from kdistill.recipe.objective import OUTPUTS_OF_LOSSES
from kdistill.teachers.first_look import FirstLook
from kdistill.teachers.frozen import frozen
from kdistill.teachers.replay import augmentation_settings

VALIDATION_BATCH = 256
ONE = ("",)  # the names of the outputs of a student with one


def are_needed(student: Prepared, data) -> bool:
    """Whether a student with these training examples is other than one of images with a class each."""
    return not student.classifies_images or (_rank_of(data) == 3 and plain_model(student) is not student.model)


def plain_model(student: Prepared) -> keras.Model:
    """The student in float32 as it takes its inputs: a series `[time, features]` is no image of one channel."""
    model = student.model
    if any(layer.name == "without_channel" for layer in model.layers):  # see `graph.with_channel`
        return next(layer for layer in model.layers if isinstance(layer, keras.Model))
    return model


def _rank_of(data) -> int | None:
    """The rank of the training inputs, where there is one array of them."""
    data = getattr(data, "train", data)
    if isinstance(data, tf.data.Dataset):
        spec = data.element_spec
        first = spec[0] if isinstance(spec, tuple) else spec
        return getattr(getattr(first, "shape", None), "rank", None)
    first = data.images if hasattr(data, "images") else data[0] if isinstance(data, (tuple, list)) and data else data
    return getattr(first, "ndim", None) if not isinstance(first, (Mapping, tuple, list)) else None


def check_stage_of_others(stage: Stage, mean, std, cache, student: Prepared) -> None:
    """Raises `InputError` for what works with images that have a class each only."""
    steps = SCHEMES[stage.scheme]
    outputs = ", ".join(f"{name} {head.shape} of {head.meaning}".strip() for name, head in student.heads.items())
    subject = f"The student '{student.model.name}' (outputs: {outputs})"
    if not steps or "qat" in steps:
        raise InputError(
            f"{subject} is not one of images with a class each, for which the scheme '{stage.scheme}' is. Use prune, "
            "prune_2_4, cluster or prune_cluster, and quantize the result with kdistill.export and the profile 'npu' "
            "or 'phone_cpu'."
        )
    given = {"mean": mean, "std": std, "cache": cache}
    given = [name for name, value in given.items() if value is not None and value != "off"]
    if given:
        raise InputError(f"{subject} is not one of images with a class each: leave out {', '.join(given)}.")


def check_student_of_others(student: keras.Model, stage: Stage, head) -> None:
    """Raises `InputError` for a student, trained or not, that a stage cannot compress, and for an unknown layer."""
    prepared = prepare(student, head)
    check_stage_of_others(stage, None, None, None, prepared)
    check_layers(stage, to_tf_keras(plain_model(prepared)))


def batches_of_others(student: keras.Model, data, batch_size: int, seed: int, augment: Data | None) -> Batches:
    """The batches `(inputs, labels)` of any epoch, inputs and labels in the structure of the student's.

    Raises `InputError` for data that is missing or does not fit the inputs.
    """
    validation = getattr(data, "validation", None)
    data = getattr(data, "train", data)
    if data is None:
        raise InputError(
            "compress needs training examples. Pass data=(inputs, labels), Examples, Splits or a data set."
        )
    changes = augmentation_settings(augment) if augment else {}
    if changes:
        raise InputError(
            f"augment changes images ({', '.join(changes)}); this student's inputs are others. Leave it out."
        )
    training = _examples(student, data)

    def of_epoch(epoch: int) -> tf.data.Dataset:
        return training_batches(training, Data(), batch_size, seed, epoch)

    if validation is not None:
        own = _examples(student, validation)
        pairs = tf.data.Dataset.from_tensor_slices((own.inputs, own.labels)).batch(VALIDATION_BATCH)
        validation = without_autotuning(pairs)
    return Batches(of_epoch, steps_per_epoch(training, batch_size), validation)


def _examples(student: keras.Model, data) -> Examples:
    inputs = inputs_of(student)
    gathered = gather(data, inputs, "data")
    if gathered.labels is None:
        raise InputError("compress needs labels, also where all are missing (-1, NaN). Pass data=(inputs, labels).")
    if gathered.weights is not None:
        raise InputError("compress takes no sample weights. Pass data=(inputs, labels).")
    arrays = {name: array.astype(inputs[name].dtype, copy=False) for name, array in gathered.inputs.items()}
    labels, names = gathered.labels, output_names(student)
    if isinstance(labels, (tuple, list)):
        labels = dict(zip(names, labels, strict=True)) if len(labels) == len(names) > 1 else np.asarray(labels)
    for part in labels.values() if isinstance(labels, Mapping) else [labels]:
        if len(part) != len(gathered):
            raise InputError(f"data expects as many labels as inputs, received {len(part)} and {len(gathered)}.")
    return Examples(arrays if len(arrays) > 1 else next(iter(arrays.values())), labels)


class HeadLoss:
    """As `finetune.StudentLoss`, for each output by its meaning; several outputs add up.

    Args:
        student: the Keras 3 model.
        heads: what its outputs mean, by name.
        teacher: as for the `Distiller`, or None.
        distillation_weight, temperature, terms: as for `StudentLoss`; terms for a student with one output.

    Raises `InputError` for a teacher with other outputs, and a term that cannot compare them.
    """

    def __init__(
        self,
        student: keras.Model,
        heads: Mapping[str, Head],
        teacher,
        distillation_weight,
        temperature,
        terms: Mapping[str, Term],
    ):
        self.outputs = output_names(student)
        own = dict(zip(ONE, heads.values(), strict=False)) if self.outputs == ONE else dict(heads)
        if set(own) != set(self.outputs):
            raise InputError(
                f"The student has the outputs {', '.join(self.outputs)}; of {', '.join(own)} it is clear what they "
                "mean. State it of each: head={'name': 'classes', 'labels' or 'numbers', ...}."
            )
        self._kinds = {name: own[name].kind for name in self.outputs}
        meanings = {name: own[name].meaning for name in self.outputs}
        self._heads = {}
        for name, meaning in meanings.items():
            subject = (
                f"The output {name!r} of the student '{student.name}'" if name else f"The student '{student.name}'"
            )
            self._heads[name] = OutputHead(name, meaning, FirstLook(student, subject), stated=meaning)
        self._check_terms(terms, meanings)
        self._terms, self._numbers = dict(terms), {"distillation_weight": distillation_weight}
        if "kd" not in terms:
            self._numbers["temperature"] = temperature
        for name, term in terms.items():
            self._numbers[f"{name}.weight"] = term.weight
            numbers = {key: value for key, value in term.options.items() if isinstance(value, KerasSchedule)}
            self._numbers |= {f"{name}.{key}": value for key, value in numbers.items()}
        self._teacher: Callable | None = None
        if teacher is not None:
            self._teacher = frozen(teacher, heads=lambda: meanings)
            self._check_teacher(student)
        names = ["loss"]
        for head in self._heads.values():
            rates = head.rates if teacher is not None else head.rates[:1]
            parts = dict.fromkeys(("hard", "kd", *terms))
            names += [*(head.named_part(part) for part in parts), *(head.named(rate) for rate in rates)]
        self.names = tuple(dict.fromkeys(names))

    def try_on(self, student: keras.Model, batches: Batches) -> None:
        """Computes the loss of one batch, so that labels of another shape are refused before anything trains."""
        inputs, labels = next(iter(batches.of_epoch(0)))
        self(inputs, labels, student(inputs, training=False), 0)

    def of_step(self, step: str) -> "HeadLoss":
        """The loss for a step of a scheme: the same in each."""
        return copy.copy(self)

    def __call__(self, inputs, labels, outputs, step) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
        labels, _ = split_targets(labels, self.outputs)
        taught = {} if self._teacher is None else self._taught(inputs)
        given = Given(inputs, labels, dict.fromkeys(self.outputs), taught)
        settings = {name: number_at(number, step) for name, number in self._numbers.items()}
        steps = [
            self._step(self._heads[name], given, output, settings)
            for name, output in outputs_by_name(outputs, self.outputs).items()
        ]
        sums = log_sums(steps, self._hits, tf.constant(0.0))
        means = {name: tf.math.divide_no_nan(total, count) for name, (total, count) in sums.items()}
        return means | {"loss": loss_of(steps)}, {name: count for name, (_, count) in sums.items()}

    def _taught(self, inputs) -> dict:
        taught = self._teacher(inputs)
        return {"": taught} if self.outputs == ONE else taught

    def _step(self, head: OutputHead, given: Given, output, settings: dict) -> HeadStep:
        kind = self._kinds[head.name]
        scores = as_rows(as_logits(output, None if kind == "unclear" else kind, head.meaning))
        batch = rows_of(head, given, output)
        hard = head.hard(batch.given, batch.labels, batch.is_labeled, output, scores)
        hard = tf.math.divide_no_nan(tf.cast(hard, tf.float32), batch.share)
        if batch.targets is None:
            return HeadStep(head, batch, output, scores, hard, {"hard": hard, "kd": tf.zeros_like(hard)})
        rows = as_rows(batch.targets)
        total, parts = step_loss(hard, scores, rows, batch.labels, settings, self._terms, None, KD[head.meaning])
        return HeadStep(head, batch, output, scores, total, parts)

    def _hits(self, step: HeadStep) -> dict[str, tf.Tensor]:
        hits = step.head.hits(step.batch.labels, step.scores)
        if step.batch.targets is not None:
            hits |= step.head.teacher_hits(step.scores, as_rows(step.batch.targets))
        return hits

    def _check_terms(self, terms: Mapping[str, Term], meanings: dict[str, str]) -> None:
        if terms and self.outputs != ONE:
            raise InputError(f"The terms {', '.join(terms)} need a student with one output. Leave them out.")
        for name, term in terms.items():
            allowed = OUTPUTS_OF_LOSSES.get(term.loss, ()) if isinstance(term.loss, str) else ()
            if allowed and meanings[""] not in allowed:
                raise InputError(
                    f"The term '{name}': {term.loss} compares {' or '.join(allowed)}, but the output of the student is "
                    f"of {meanings['']}. Leave it out."
                )

    def _check_teacher(self, student: keras.Model) -> None:
        """Compares the shapes of both models on noise, which also shows what the teacher gives."""
        inputs = tf.nest.map_structure(tf.constant, in_structure(student, noise_inputs(student)))
        own = outputs_by_name(student(inputs, training=False), self.outputs)
        try:
            taught_by_name = self._taught(inputs)
        except InputError:
            raise
        except Exception as error:  # a teacher may be any function
            text = (str(error).strip().splitlines() or [""])[0]
            received = ", ".join(f"{one.name} {one.shape}" for one in inputs_of(student).values())
            raise InputError(
                f"The teacher cannot take the inputs of the student, {received} ({type(error).__name__}: {text}). Pass "
                "a teacher for the same inputs, or a function that changes them."
            ) from None
        for name, taught in taught_by_name.items():
            if not own[name].shape[1:].is_compatible_with(taught.shape[1:]):
                raise InputError(
                    f"The student gives {tuple(own[name].shape[1:])}{f' as {name!r}' if name else ''}, the teacher "
                    f"{tuple(taught.shape[1:])}. Both need the same, in one order."
                )


def check_temperature(temperature, heads: Mapping[str, Head]) -> None:
    """Raises `InputError` for a temperature that the user gives where all outputs are numbers."""
    if temperature is not None and {head.meaning for head in heads.values()} == {NUMBERS}:
        raise InputError("temperature would do nothing: numbers are compared as they are. Remove it.")
