"""Prunes, clusters and quantizes a Keras 3 student while its teacher still teaches; the result is a Keras 3 model.

Pruning and clustering make a file smaller once it is compressed (a zip, an app bundle), not faster. Quantization makes
it four times smaller, and faster on most phones. Every step of a scheme is fine-tuned, checked, and reported by layer.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import tf_keras

from kdistill.compression import checks, finetune, inputs, ranges, tfmot
from kdistill.compression import other_outputs as others
from kdistill.compression.bridge import Handlers, copy_back, to_tf_keras
from kdistill.compression.quantized_file import (
    CALIBRATION_IMAGES,
    INT8,
    check_runs,
    compare_with_int8,
    convert_quantized,
    first_images,
)
from kdistill.compression.resume import FinishedSteps, settings_of
from kdistill.compression.stored import stored_outputs, with_stored
from kdistill.conversion.convert import convert
from kdistill.conversion.float32 import prepare
from kdistill.conversion.graph import layer_of
from kdistill.errors import CheckFailed, InputError
from kdistill.files import byte_sizes
from kdistill.networks.copying import clone
from kdistill.networks.keras_internals import leaf_layers
from kdistill.networks.signatures import heads_of
from kdistill.recipe import SCHEMES, Data, Stage, Term
from kdistill.recipe.objective import DISTILLATION_WEIGHT, TEMPERATURE
from kdistill.teachers.input_range import normalization
from kdistill.teachers.replay import Replay
from kdistill.tflite.flatbuffer import parse, stayed_float

Number = float | keras.optimizers.schedules.LearningRateSchedule


@dataclass
class Compressed:
    """What `compress` returns.

    `model`: the Keras 3 model with the new weights. `scheme`: the name of the scheme.
    `layers`: a table, one dict for each layer: layer, kind, parameters, sparsity (share of zeros in the kernel),
    clusters (different values in the kernel), clusters_per_channel (the most of them in one output channel), and for
    each step of the scheme (pruned, clustered, quantized) "yes" or the reason why not.
    `tables`: step -> the table after it. `sizes`: bytes, raw and deflated, of the float32 weights before (`student`)
    and after each step, and of the `tflite`. `notes`: what differs from the request. `history`: step -> loss, hard, kd,
    accuracy (and val_ of each, with validation images) of every epoch. `refusal`: the `CheckFailed` about a file
    that is worse than int8 after training, if `check` did not raise it.
    """

    model: keras.Model
    scheme: str
    layers: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    history: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    refusal: CheckFailed | None = None
    _content: bytes | None = None
    _kernels: dict[str, np.ndarray] = field(default_factory=dict)
    _clustered: frozenset[str] = frozenset()

    @property
    def quantized(self) -> bool:
        """Whether the scheme produces a `.tflite` of its own."""
        return self._content is not None

    def tflite(self) -> bytes:
        """The `.tflite` of a quantizing scheme: float32 in and out, int8 in between, with the ranges of the training.

        Raises `InputError` for a scheme that does not quantize.
        """
        if self._content is None:
            raise InputError(
                f"The scheme '{self.scheme}' quantizes nothing. Write a file with kdistill.export(result.model, ...), "
                "or use a scheme that quantizes: qat, pqat, cqat, pcqat, int8."
            )
        return self._content

    def check_file(self, content: bytes) -> dict[str, dict]:
        """Checks that a `.tflite` of the model, from `tflite()` or an export, has the model's zeros and clusters.

        Returns what it counts in the file, layer -> sparsity, clusters_per_channel, and two_of_four (the share of
        groups with the pattern) where that was pruned. Raises `CheckFailed` where the file has lost some.
        """
        return checks.check_file(content, self._kernels, self._clustered)


def compress(
    student: keras.Model,
    stage: Stage | str,
    teacher=None,
    data=None,
    *,
    distillation_weight: Number = DISTILLATION_WEIGHT,
    temperature: Number | None = None,
    terms: Mapping[str, Term] | None = None,
    handlers: Handlers | None = None,
    augment: Data | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    logs: str | Path | None = None,
    keep: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
    check: str | None = "raise",
    mean=None,
    std=None,
    cache: str | Path | Replay | None = None,
    head: str | Mapping[str, str] | None = None,
    **settings,
) -> Compressed:
    """Compresses a trained student; the student itself does not change.

    Args:
        student: a Functional or Sequential Keras 3 model: one image in, logits or probabilities out; or see `head`.
        stage: a `Stage`, or the name of a scheme (then `settings` are fields of `Stage`). The schemes are prune,
            prune_2_4, cluster, prune_cluster, qat, pqat, cqat, pcqat (each step is fine-tuned for `stage.epochs`),
            and int8 (quantization after training: no step trains). `qat` preserves the zeros and clusters of a student
            that is already pruned or clustered. `stage.learning_rate` may also be a Keras schedule.
        teacher: as for the `Distiller`; None is fine-tuning on labels alone.
        data: training examples, raw pixels 0..255: `kdistill.Examples`, `Splits` (whose validation images are then
            measured after every epoch), `(images, labels)`, or a batched `tf.data.Dataset` of one epoch. Labels
            below 0 mean "unlabeled": the student learns these examples from the teacher alone.
        distillation_weight: the teacher's share of the loss, from 0 to 1.
        temperature: of the KL, above 0, by default 4. Like the weight it may be a Keras schedule, over the steps of
            training in each step of the scheme.
        terms: more losses of logits, as for the `Distiller`; one named `kd` replaces the KL.
        handlers: for your own layers with weights; see `kdistill.compression.bridge.to_tf_keras`.
        augment: the `Data` of a recipe, whose shift and flip change the training images.
        callbacks: Keras callbacks. Their `model` is a Keras 3 model with the weights at the end of the epoch. A
            callback that sets `model.stop_training` ends the step, whose check may then fail.
        logs: a folder for TensorBoard, with `<step>/train` and `<step>/validation` and one axis of training steps.
        keep: a folder for the model after each finished step, `1-prune.keras` and so on. After an interruption, the
            same call resumes behind the last finished step and ends with the same weights. Schemes that begin with the
            same steps share them.
        seed: of the order of the data, augmentation, and the first cluster centers.
        say: receives lines of progress.
        check: what happens if quantization-aware training gives a file that is worse on the validation examples (else
            the training examples) than int8 after training, by more than 0.5 points and chance allow: "raise", "warn",
            or None; `refusal` of the result states it.
        mean, std: student and teacher were trained on `(pixel - mean) / std`: numbers, or one for each channel. The new
            model computes this in its first layer, so that it and its file take raw pixels. None: both get the images
            as they are; a `UserWarning` names another range if accuracy or layers show that they expect it.
        cache: a folder of teacher caches, or "auto" for the default one where it pays: each step trains on the stored
            outputs of the teacher, which runs once for the images of an epoch, or not at all if a run has stored them.
            `data` is then `Splits`, and the teachers are Keras models. None: the teacher runs in every step.
        head: what the student's outputs mean, as for the `Distiller`: `classes`, `labels` or `numbers`, by name of
            several. None: loss, last activation and numbers show it. Students of other inputs than images, or of other
            outputs than exclusive classes, are pruned and clustered; `data` is then as for `kdistill.evaluate`.
        settings: fields of `Stage`, such as `epochs=3` or `final_sparsity=0.5`, where `stage` is a name.

    Returns:
        A `Compressed`, with the new model and a table by layer.

    Raises:
        InputError: a value is out of range or has no effect, or the student or the data cannot be used.
        CheckFailed: a step did not do what it should, the loss is not finite, or see `check`.

    Example:
        result = kdistill.compress(student, "pqat", teacher, (images, labels), epochs=1)
        result.model.save("small.keras")
        Path("small.tflite").write_bytes(result.tflite())
    """
    stage, terms, stated = inputs.checked_stage(stage, settings), dict(terms or {}), normalization(mean, std)
    inputs.check_mode(check)
    softening = TEMPERATURE if temperature is None and "kd" not in terms else temperature
    inputs.check_objective(distillation_weight, softening, terms, teacher)
    prepared = prepare(student, head)
    if others.are_needed(prepared, data):
        others.check_stage_of_others(stage, mean, std, cache, prepared)
        others.check_temperature(temperature, prepared.heads)
        heads_of(student, head)  # asks for head= where nothing tells what an output means
        start, kind = others.plain_model(prepared), None
        batches = others.batches_of_others(start, data, stage.batch_size, seed, augment)
        network = to_tf_keras(start, handlers)
        inputs.check_layers(stage, network)
        loss = others.HeadLoss(start, prepared.heads, teacher, distillation_weight, softening, terms)
        loss.try_on(start, batches)
        more = [[name, one.meaning, one.kind] for name, one in prepared.heads.items()]
    else:
        inputs.check_head(prepared)
        shape, kind = prepared.image_shape, prepared.head.kind
        batches = inputs.batches_of(data, stage.batch_size, seed, (None, *shape), augment)
        inputs.warn_of_range(prepared, teacher, data, stated)
        if stated is not None:
            prepared, teacher = inputs.with_range(prepared, teacher, *stated)
        if stage.scheme == "int8":
            return _quantize_after_training(prepared.model, batches, say)
        start = prepared.model
        network = to_tf_keras(start, handlers)
        inputs.check_layers(stage, network)
        inputs.check_quantizable(start, stage, network, lambda: to_tf_keras(start, handlers))
        predict = None if teacher is None else inputs.checked_teacher(teacher, shape, prepared.head.classes)
        stored = stored_outputs(cache, teacher, data, stage, seed, augment, say)
        if stored is not None:
            batches = with_stored(batches, stored, data)
        loss = finetune.StudentLoss(predict, distillation_weight, softening, kind == "probabilities", terms)
        more = [*(stated or ()), *(() if stored is None else ("cache", stored.train.key))]
    goals = tfmot.Goals.of_stage(stage)
    numbers = distillation_weight, softening, terms, seed
    settings = settings_of(start, stage, *numbers, teacher is not None, batches.steps, *more)
    finished = FinishedSteps(keep, settings, goals, say)
    model = clone(start)
    result = Compressed(model, stage.scheme, sizes={"student": _weight_sizes(model)})
    trainer = _Trainer(model, stage, batches, loss, goals, callbacks, logs, seed, say, handlers)
    preserved, kernels, decisions = checks.applied(network), checks.kernels(network), {}
    _note_preserved(SCHEMES[stage.scheme][0], preserved, result, say)
    for place, step in enumerate(SCHEMES[stage.scheme]):
        before, steps = kernels, SCHEMES[stage.scheme][: place + 1]
        # The file of qat needs the trained ranges, which a Keras 3 model does not contain: qat always trains.
        record = None if step == "qat" else finished.load(steps, model)
        resumed = record is not None
        model_before = clone(model) if step == "qat" else None
        if not resumed:
            wrapped, record = trainer.train(place, step, network, preserved)
        network = to_tf_keras(model, handlers)
        kernels = checks.kernels(network)
        result.history[step], decisions[step] = record["history"], record["decisions"]
        checks.check_step(step, decisions[step], before, kernels, preserved, goals)
        preserved = preserved | ({checks.COLUMNS[step]} - {"quantized"})
        result.layers = result.tables[step] = checks.table(network.layers, decisions)
        result.sizes[step] = _weight_sizes(model)
        if not resumed:
            finished.save(steps, model, record)
        say(f"{stage.scheme}: {step} {'finished before' if resumed else 'done'}, {checks.summary(result.layers)}")
    result._kernels = {name: kernel for name, kernel in kernels.items() if name in checks.in_files(network)}
    result._clustered = frozenset(checks.clustered(before if "qat" in decisions else kernels))
    if "qat" in decisions:
        result._content = convert_quantized(wrapped, kind)
        check_runs(result._content)
        checks.mark_float(result._content, result.layers)
        result.check_file(result._content)
        result.sizes["tflite"] = byte_sizes(result._content)
        _compare_with_int8(result, model_before, batches, check, say)
    return result


def _compare_with_int8(result: Compressed, before: keras.Model, batches: finetune.Batches, check, say) -> None:
    """What `check` of `compress` states."""
    lines = f"{result.scheme}: qat, {{}}".format
    result.refusal, note = compare_with_int8(result.tflite(), before, batches, lambda text: say(lines(text)))
    if note:
        result.notes.append(note)
        say(lines(note))
    if result.refusal and check == "raise":
        raise result.refusal
    if result.refusal and check == "warn":
        warnings.warn(f"{result.refusal} check='raise' refuses such a file.", UserWarning, stacklevel=3)


@dataclass(frozen=True)
class _Trainer:
    """Fine-tunes one step of a scheme after the other."""

    model: keras.Model  # receives the new weights
    stage: Stage
    batches: finetune.Batches
    loss: finetune.StudentLoss | others.HeadLoss
    goals: tfmot.Goals
    callbacks: Sequence[keras.callbacks.Callback]
    logs: str | Path | None
    seed: int
    say: Callable[[str], None]
    handlers: Handlers | None = None

    def train(self, place: int, step: str, network, preserved: set[str]) -> tuple[tf_keras.Model, dict]:
        """The trained network in tfmot's wrappers, and a record: history, and the decision for each layer."""
        tf_keras.utils.set_random_seed(self.seed + place)  # before wrapping: clusters start at random
        kernels, total = checks.kernels(network), self.stage.epochs * self.batches.steps
        wrapped, decisions = tfmot.wrap(step, network, total, preserved, self.goals, self.stage.skip)
        masks, frozen = tfmot.protected(wrapped, step, decisions, checks.pruned(kernels), checks.clustered(kernels))
        watch = finetune.Watch(
            self.callbacks,
            current_model=lambda: copy_back(wrapped, self.model, check=False, handlers=self.handlers),
            logs=None if self.logs is None else Path(self.logs, step),
            first_step=place * total,
            say=lambda text: self.say(f"{self.stage.scheme}: {step}, {text}"),
        )
        if step == "qat":
            ranges.measure(wrapped, self.batches)
        history = finetune.fit(
            wrapped,
            self.batches,
            self.loss.of_step(step),
            epochs=self.stage.epochs,
            learning_rate=self.stage.learning_rate,
            callbacks=tfmot.callbacks(step),
            masks=masks,
            frozen=frozen,
            watch=watch,
        )
        if step == "qat":
            ranges.measure(wrapped, self.batches)  # they follow the weights slowly
        copy_back(wrapped, self.model, handlers=self.handlers)
        return wrapped, {"history": history, "decisions": decisions}


def _weight_sizes(model: keras.Model) -> dict[str, int]:
    return byte_sizes(b"".join(weight.astype("float32").tobytes() for weight in model.get_weights()))


def _note_preserved(step: str, applied: set[str], result: Compressed, say) -> None:
    """Notes what the first step preserves, or loses, of an earlier compression of the student."""
    preserved = {"qat": applied, "cluster": applied & {"pruned"}}.get(step, set())
    lost = applied - preserved - ({"pruned"} if step.startswith("prune") else set())
    for words, verb in ((preserved, "preserves"), (lost, "does not preserve")):
        if words:
            result.notes.append(f"The student is already {' and '.join(sorted(words))}: {step} {verb} that.")
            say(result.notes[-1])


def _quantize_after_training(model: keras.Model, batches: finetune.Batches, say) -> Compressed:
    images = first_images(batches, CALIBRATION_IMAGES)
    content = convert(model, INT8, images)
    check_runs(content)
    rows = [{**row, "quantized": "yes"} for row in checks.table(leaf_layers(model), {})]
    sizes = {"student": _weight_sizes(model), "tflite": byte_sizes(content)}
    result = Compressed(model, "int8", rows, tables={"int8": rows}, sizes=sizes, _content=content)
    names = {row["layer"] for row in rows}
    for operation in stayed_float(parse(content), "int8"):
        layer = layer_of(operation["tensor"], names)
        result.notes.append(f"{operation['operator']} of '{layer or operation['tensor']}': {operation['reason']}")
        for row in rows:
            if row["layer"] == layer:
                row["quantized"] = f"{operation['operator']} computes in float"
    try:
        kernels = checks.kernels(to_tf_keras(model))
    except InputError as error:  # a model that cannot be bridged can be quantized all the same
        result.notes.append(f"The zeros and clusters in the file were not checked: {error}")
    else:
        result._kernels, result._clustered = kernels, frozenset(checks.clustered(kernels))
        result.check_file(content)
    say(f"int8: quantized after training, calibrated on {len(images)} images")
    return result
