"""Prunes, clusters and quantizes a Keras 3 student while its teacher goes on teaching; a Keras 3 model comes out.

Pruning and clustering make a file smaller once it is compressed (a zip, an app bundle), not faster. Quantization makes
it four times smaller and faster on most phones. Each stage is fine-tuned, checked, and told layer by layer.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import keras
import numpy as np
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from kdistill import files
from kdistill.compression import checks, finetune, tfmot
from kdistill.compression.bridge import Handlers, copy_back, to_tf_keras
from kdistill.compression.inputs import batches_of, check_names, check_numbers, check_terms, checked_teacher, goals_of
from kdistill.compression.quantized_file import converted
from kdistill.conversion.convert import convert, image_shape
from kdistill.conversion.float32 import ready
from kdistill.conversion.graph import layer_of
from kdistill.errors import InputError, unknown
from kdistill.files import sizes
from kdistill.networks import saving
from kdistill.networks.heads import output_of
from kdistill.recipe import SCHEMES, Data, Profile, Term
from kdistill.tflite.flatbuffer import stayed_float

CALIBRATION_IMAGES = 500
Number = float | keras.optimizers.schedules.LearningRateSchedule


@dataclass
class Compressed:
    """What `compress` gives.

    `model`: the Keras 3 model with the new weights.
    `stages`: a table, one dict for each layer: layer, kind, parameters, sparsity (share of zeros in the kernel),
    clusters (different values in the kernel), clusters_per_channel (the most of them in one output channel), and for
    each stage of the scheme (pruned, clustered, quantized) "yes" or the reason why not.
    `tables`: the table as it was after each stage. `sizes`: bytes, raw and deflated, of the float32 weights before
    (`student`) and after each stage, and of the `tflite`. `notes`: what was done otherwise than asked. `history`:
    stage -> loss, hard, kd, accuracy (and val_ of each, with validation images) of each epoch.
    """

    model: keras.Model
    scheme: str
    stages: list[dict]
    notes: list[str] = field(default_factory=list)
    history: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    tables: dict[str, list[dict]] = field(default_factory=dict)
    sizes: dict[str, dict[str, int]] = field(default_factory=dict)
    _content: bytes | None = None
    _kernels: dict[str, np.ndarray] = field(default_factory=dict)
    _clustered: frozenset[str] = frozenset()

    @property
    def quantized(self) -> bool:
        """Whether the scheme gives a `.tflite` of its own."""
        return self._content is not None

    def tflite(self) -> bytes:
        """The `.tflite` of a quantizing scheme: float32 in and out, int8 between, with the ranges of the training."""
        if self._content is None:
            raise InputError(
                f"The scheme '{self.scheme}' quantizes nothing. Write a file with kdistill.export(result.model, ...), "
                "or take a scheme that quantizes: qat, pqat, cqat, pcqat, int8."
            )
        return self._content

    def check_file(self, content: bytes) -> dict[str, dict]:
        """Looks for the zeros and clusters of the model in any `.tflite` made of it, by `tflite()` or by an export.

        Returns what it has counted in the file, layer by layer: sparsity, clusters_per_channel, and two_of_four (the
        share of groups with the pattern) where that was pruned. Raises `CheckFailed` where some have been lost.
        """
        return checks.check_file(content, self._kernels, self._clustered)


def compress(
    student: keras.Model,
    scheme: str,
    teacher=None,
    data=None,
    epochs: int = 1,
    learning_rate: Number = 1e-4,
    *,
    batch_size: int = 128,
    distillation_weight: Number = 0.9,
    temperature: Number = 4.0,
    terms: Mapping[str, Term] | None = None,
    final_sparsity: float | None = None,
    clusters: int | None = None,
    layer_sparsity: Mapping[str, float] | None = None,
    layer_clusters: Mapping[str, int] | None = None,
    skip: Sequence[str] = (),
    handlers: Handlers | None = None,
    augment: Data | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    logs: str | Path | None = None,
    keep: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Compressed:
    """Compresses a trained student; the student itself is left as it is.

    Args:
        student: a Functional or Sequential Keras 3 model, one image in, logits or probabilities out.
        scheme: prune, prune_2_4, cluster, prune_cluster, qat, pqat, cqat, pcqat (stages, each fine-tuned for `epochs`),
            or int8 (post-training quantization: no training). `qat` of a student that is pruned or clustered already
            keeps that.
        teacher: as for the Distiller; None is fine-tuning on labels alone.
        data: training examples, raw pixels 0..255: `kdistill.data.Examples`, `Splits` (whose validation images are
            then measured after every epoch), `(images, labels)`, or a batched `tf.data.Dataset` of one epoch. Labels
            below 0 mean "unlabeled": those learn from the teacher alone.
        learning_rate: of Adam; from a number a cosine leads to zero in each stage. `learning_rate`,
            `distillation_weight` (the teacher's share of the loss, 0 to 1) and `temperature` also take Keras
            schedules, over the steps of each stage.
        terms: more losses of logits, as for the Distiller; one named `kd` takes the place of the KL.
        final_sparsity: the share of zeros that pruning ends with (0.8). clusters: values that each kernel keeps (16).
        layer_sparsity, layer_clusters: other ones for single layers, by the names in the table of stages.
        skip: names of layers to leave alone. handlers: for layers of your own that have weights; see
            `kdistill.bridge.to_tf_keras`.
        augment: shift and flip the training images as a recipe's `Data` says.
        callbacks: Keras callbacks. Their `model` is a Keras 3 model with the weights of the epoch's end; one that sets
            `model.stop_training` ends the stage, whose promise may fail its check then.
        logs: folder for TensorBoard, `<stage>/train` and `<stage>/validation` in it; steps go on over the stages.
        keep: folder for what each finished stage has made, `1-prune.keras` and so on. A compression that was
            interrupted, called again with the same student, arguments and folder, goes on behind the last finished
            stage, and ends with the same weights; schemes that begin with the same stages share them.

    Raises `InputError`, or `CheckFailed` if a stage did not do what it should, or the loss is not finite.
    """
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    goals = goals_of(scheme, final_sparsity, clusters, layer_sparsity, layer_clusters)
    check_numbers(epochs, learning_rate, batch_size, distillation_weight, temperature)
    terms = dict(terms or {})
    check_terms(terms, teacher)
    prepared = ready(student)
    shape = image_shape(prepared)
    batches = batches_of(data, batch_size, seed, (None, *shape), augment)
    output, classes = output_of(prepared)
    if scheme == "int8":
        return _post_training(prepared, batches, say)
    network = to_tf_keras(prepared, handlers)
    # `recursive` keeps a layer one that a nested model shares with the model around it.
    model = keras.models.clone_model(
        prepared, clone_function=lambda layer: type(layer).from_config(layer.get_config()), recursive=True
    )
    model.set_weights(prepared.get_weights())
    result = Compressed(model, scheme, [], sizes={"student": _weights_size(model)})
    teach = None if teacher is None else checked_teacher(teacher, shape, classes)
    loss_of = finetune.loss(teach, distillation_weight, temperature, output == "probabilities", terms)
    check_names({"skip": skip, "layer_sparsity": goals.layer_sparsity, "layer_clusters": goals.layer_clusters}, network)
    numbers = [_plain(number) for number in (learning_rate, distillation_weight, temperature)]
    more = [
        [name, str(t.loss), _plain(t.weight), {k: _plain(v) for k, v in t.options.items()}] for name, t in terms.items()
    ]
    settings = [epochs, batch_size, *numbers, more, list(skip), seed, teach is not None, batches.steps]
    settings.append(_digest(prepared))
    keeper = _Keeper(None if keep is None else Path(keep), settings, goals, say)
    decided, kept, kernels = {}, checks.kept(network), checks.kernels(network)
    for place, stage in enumerate(SCHEMES[scheme]):
        _tell_kept(stage, kept, result, say)
        before = kernels
        so_far = SCHEMES[scheme][: place + 1]
        done = keeper.restored(so_far, model) if stage != "qat" else None  # whose file needs the trained ranges
        if done:
            result.history[stage], decided[stage] = done["history"], done["decided"]
        else:
            tf_keras.utils.set_random_seed(seed + place)  # before wrapping: clusters start at random
            wrapped, decided[stage] = _wrapped(stage, network, epochs * batches.steps, kept, goals, skip)
            masks, still = tfmot.holds(wrapped, stage, decided[stage], checks.sparse(before), checks.shared(before))
            watch = finetune.Watch(
                callbacks=callbacks,
                show=lambda wrapped=wrapped: copy_back(wrapped, model, check=False),
                logs=None if logs is None else Path(logs, stage),
                first_step=place * epochs * batches.steps,
                say=lambda text, stage=stage: say(f"{scheme}: {stage}, {text}"),
            )
            options = {"callbacks": tfmot.callbacks(stage), "masks": masks, "still": still, "watch": watch}
            result.history[stage] = finetune.fit(
                wrapped, batches, loss_of, epochs=epochs, learning_rate=learning_rate, **options
            )
            copy_back(wrapped, model)
        network = to_tf_keras(model, handlers)
        kernels = checks.kernels(network)
        checks.check(stage, decided[stage], before, kernels, kept, goals)
        kept = kept | ({checks.WORDS[stage]} - {"quantized"})
        result.stages = result.tables[stage] = checks.table(network.layers, decided)
        result.sizes[stage] = _weights_size(model)
        if not done:
            keeper.keep(so_far, model, {"history": result.history[stage], "decided": decided[stage]})
        say(f"{scheme}: {stage} {'finished before' if done else 'done'}, {checks.summary(result.tables[stage])}")
    result._kernels, result._clustered = kernels, frozenset(checks.shared(before if "qat" in decided else kernels))
    if "qat" in decided:
        result._content = converted(wrapped, output)
        checks.mark_float(result._content, result.stages)
        result.check_file(result._content)
        result.sizes["tflite"] = sizes(result._content)
    return result


class _Keeper:
    """The finished stages of a compression in a folder, for as long as the same compression goes on.

    Schemes that begin with the same stages share them.
    """

    def __init__(self, folder: Path | None, settings: list, goals: tfmot.Goals, say: Callable[[str], None]):
        self._folder, self._settings, self._goals, self._say = folder, settings, goals, say
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def _record(self, so_far: Sequence[str]) -> tuple[Path, list]:
        """Where the last of these stages is kept, and everything that decides what it gives."""
        goals = {"prune": self._goals.of_pruning(), "cluster": self._goals.of_clustering()}
        settings = [*so_far, *(goals[stage] for stage in so_far if stage in goals), *self._settings]
        return self._folder / f"{len(so_far)}-{so_far[-1]}.json", json.loads(json.dumps(settings))

    def restored(self, so_far: Sequence[str], model: keras.Model) -> dict | None:
        """The record of a stage that an earlier session finished, its weights put into `model`; or None."""
        record, settings = (None, []) if self._folder is None else self._record(so_far)
        if record is None or not record.exists():
            return None
        held = json.loads(record.read_text())
        if held["settings"] != settings:
            self._say(f"'{record}' is of another student, or of other settings: the stage is trained anew.")
            return None
        model.load_weights(record.with_suffix(".keras"))
        return held

    def keep(self, so_far: Sequence[str], model: keras.Model, made: dict) -> None:
        """Writes model and record, each whole or not at all, the record last: it says that the model is there."""
        if self._folder is not None:
            record, settings = self._record(so_far)
            record.unlink(missing_ok=True)
            saving.save_model(model, record.with_suffix(".keras"))
            files.write(record, json.dumps({**made, "settings": settings}) + "\n")


def _plain(number: Number):
    return [type(number).__name__, number.get_config()] if isinstance(number, finetune.Rate) else number


def _digest(model: keras.Model) -> str:
    return hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest()


def _weights_size(model: keras.Model) -> dict[str, int]:
    return sizes(b"".join(weight.astype("float32").tobytes() for weight in model.get_weights()))


def _wrapped(stage: str, network, steps: int, kept: set, goals: tfmot.Goals, skip):
    """The network in tfmot's wrappers for a stage, and what was decided for each layer."""
    if stage == "qat":
        wrapped, decisions = tfmot.quantize(network, "pruned" in kept, "clustered" in kept, skip)
    elif stage == "cluster":
        wrapped, decisions = tfmot.cluster(network, goals, "pruned" in kept, skip)
    else:
        wrapped, decisions = tfmot.prune(network, steps, goals, stage == "prune_2_4", skip)
    if all(decisions.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in decisions.items())
        raise InputError(f"The stage '{stage}' can do nothing with this model. {reasons}.")
    return wrapped, decisions


def _post_training(model, batches: finetune.Batches, say) -> Compressed:
    images, held = [], 0
    for some, _ in batches.of_epoch(0):
        images.append(some.numpy())
        held += len(images[-1])
        if held >= CALIBRATION_IMAGES:
            break
    images = np.concatenate(images)[:CALIBRATION_IMAGES]
    content = convert(model, Profile("int8", quantization="int8"), images)
    leaves = [layer for layer in model._flatten_layers(include_self=False) if not layer._layers]
    rows = [{**row, "quantized": "yes"} for row in checks.table(leaves, {})]
    notes, names = [], {row["layer"] for row in rows}
    for each in stayed_float(schema.ModelT.InitFromPackedBuf(content), "int8"):
        layer = layer_of(each["tensor"], names)
        notes.append(f"{each['operator']} of '{layer or each['tensor']}': {each['reason']}")
        for row in rows:
            row["quantized"] = f"{each['operator']} computes in float" if row["layer"] == layer else row["quantized"]
    told = {"student": _weights_size(model), "tflite": sizes(content)}
    result = Compressed(model, "int8", rows, notes, tables={"int8": rows}, sizes=told, _content=content)
    try:
        found = checks.kernels(to_tf_keras(model))
    except InputError as error:  # a model that cannot be bridged can be quantized all the same
        result.notes.append(f"Zeros and clusters were not looked for in the file: {error}")
    else:
        result._kernels, result._clustered = found, frozenset(checks.shared(found))
        result.check_file(content)
    say(f"int8: quantized after the training, calibrated on {len(images)} images")
    return result


def _tell_kept(stage, kept, result, say) -> None:
    """Says what a stage keeps, or loses, of what was done to the student before this call."""
    if not kept or result.history:
        return
    keeps = {"qat": kept, "cluster": kept & {"pruned"}}.get(stage, set())
    loses = kept - keeps - ({"pruned"} if stage.startswith("prune") else set())
    for which, verb in ((keeps, "keeps"), (loses, "does not keep")):
        if which:
            result.notes.append(f"The student is {' and '.join(sorted(which))} already: {stage} {verb} that.")
            say(result.notes[-1])
