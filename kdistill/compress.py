"""Prunes, clusters and quantises a Keras 3 student while its teacher goes on teaching; a Keras 3 model comes out.

Pruning and clustering make a file smaller once it is compressed (a zip, an app bundle), not faster. Quantisation makes
it four times smaller and faster on most phones. Each stage is fine-tuned, checked, and told layer by layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema

from kdistill import finetune, schemes, stages
from kdistill.bridge import Handlers, copy_back, to_tf_keras
from kdistill.convert import convert, image_shape, output_of, ready
from kdistill.errors import InputError, unknown
from kdistill.flatbuffer import stayed_float
from kdistill.qat_file import converted
from kdistill.recipe import Profile
from kdistill.teacher import frozen

SCHEMES = {
    "prune": ("prune",),
    "prune_2_4": ("prune_2_4",),
    "cluster": ("cluster",),
    "prune_cluster": ("prune", "cluster"),
    "qat": ("qat",),
    "pqat": ("prune", "qat"),
    "cqat": ("cluster", "qat"),
    "pcqat": ("prune", "cluster", "qat"),
    "int8": (),
}
CALIBRATION_IMAGES = 500


@dataclass
class Compressed:
    """What `compress` gives.

    `model`: the Keras 3 model with the new weights.
    `stages`: a table, one dict for each layer: layer, kind, parameters, sparsity (share of zeros in the kernel),
    clusters (different values in the kernel), clusters_per_channel (the most of them in one output channel), and for
    each stage of the scheme (pruned, clustered, quantised) "yes" or the reason why not.
    `notes`: what was done otherwise than asked. `history`: stage -> loss, hard, kd, accuracy of each epoch.
    """

    model: keras.Model
    scheme: str
    stages: list[dict]
    notes: list[str] = field(default_factory=list)
    history: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _content: bytes | None = None

    def tflite(self) -> bytes:
        """The `.tflite` of a quantising scheme: float32 in and out, int8 between, with the ranges of the training."""
        if self._content is None:
            raise InputError(
                f"The scheme '{self.scheme}' quantises nothing. Write a file with kdistill.export(result.model, ...), "
                "or take a scheme that quantises: qat, pqat, cqat, pcqat, int8."
            )
        return self._content


def compress(
    student: keras.Model,
    scheme: str,
    teacher=None,
    data=None,
    epochs: int = 1,
    learning_rate: float = 1e-4,
    *,
    batch_size: int = 128,
    distillation_weight: float = 0.9,
    temperature: float = 4.0,
    final_sparsity: float = 0.8,
    clusters: int = 16,
    skip: tuple[str, ...] = (),
    handlers: Handlers | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Compressed:
    """Compresses a trained student; the student itself is left as it is.

    Args:
        student: a Functional or Sequential Keras 3 model, one image in, logits or probabilities out.
        scheme: prune, prune_2_4, cluster, prune_cluster, qat, pqat, cqat, pcqat (stages, each fine-tuned for `epochs`),
            or int8 (post-training quantisation: no training). `qat` of a student that is pruned or clustered already
            keeps that.
        teacher: as for the Distiller; None is fine-tuning on labels alone.
        data: training examples, raw pixels 0..255: `kdistill.data.Examples`, `Splits`, `(images, labels)`, or a
            batched `tf.data.Dataset` of one epoch.
        distillation_weight, temperature: the teacher's share of the loss (0 to 1) and T.
        final_sparsity: the share of zeros that pruning ends with. clusters: values that each kernel keeps.
        skip: names of layers to leave alone, as in the table of stages.
        handlers: for layers of your own that have weights; see `kdistill.bridge.to_tf_keras`.

    Raises `InputError`, or `CheckFailed` if a stage did not do what it should, or the loss is not finite.
    """
    if scheme not in SCHEMES:
        raise unknown("scheme", scheme, SCHEMES)
    _check_numbers(epochs, learning_rate, batch_size, distillation_weight, temperature, final_sparsity, clusters)
    prepared = ready(student)
    shape = image_shape(prepared)
    batches = _batches(data, batch_size, seed, (None, *shape))
    output, classes = output_of(prepared)
    if scheme == "int8":
        return _post_training(prepared, batches, say)
    network = to_tf_keras(prepared, handlers)
    # `recursive` keeps a layer one that a nested model shares with the model around it.
    model = keras.models.clone_model(
        prepared, clone_function=lambda layer: type(layer).from_config(layer.get_config()), recursive=True
    )
    model.set_weights(prepared.get_weights())
    result = Compressed(model, scheme, [])
    teach = None if teacher is None else _checked_teacher(teacher, shape, classes)
    loss_of = finetune.loss(teach, distillation_weight if teach else 0.0, temperature, output == "probabilities")
    goals = {"final_sparsity": final_sparsity, "clusters": clusters}
    _check_skip(skip, network)
    decided, kept, kernels = {}, stages.kept(network), stages.kernels(network)
    for stage in SCHEMES[scheme]:
        _tell_kept(stage, kept, result, say)
        steps = epochs * int(batches.cardinality())
        wrapped, decisions = _wrapped(stage, network, steps, kept, goals, skip)
        tf_keras.utils.set_random_seed(seed)
        masks, still = schemes.holds(wrapped, stage, decisions, stages.sparse(kernels), stages.shared(kernels))
        result.history[stage] = finetune.fit(
            wrapped,
            batches,
            loss_of,
            epochs=epochs,
            learning_rate=learning_rate,
            callbacks=schemes.callbacks(stage),
            masks=masks,
            still=still,
        )
        copy_back(wrapped, model)
        network = to_tf_keras(model, handlers)
        before, kernels, decided[stage] = kernels, stages.kernels(network), decisions
        stages.check(stage, decisions, before, kernels, kept, goals)
        kept = kept | ({stages.WORDS[stage]} - {"quantised"})
        say(f"{scheme}: {stage} done, accuracy {result.history[stage]['accuracy'][-1]:.4f} on the training images")
    result.stages = stages.table(network.layers, decided)
    if "qat" in decided:
        result._content = converted(wrapped, output)
        stages.check_file(result._content, result.stages, stages.shared(before))
    return result


def _wrapped(stage: str, network, steps: int, kept: set, goals: dict, skip):
    """The network in tfmot's wrappers for a stage, and what was decided for each layer."""
    if stage == "qat":
        wrapped, decisions = schemes.quantize(network, "pruned" in kept, "clustered" in kept, skip)
    elif stage == "cluster":
        wrapped, decisions = schemes.cluster(network, goals["clusters"], "pruned" in kept, skip)
    else:
        wrapped, decisions = schemes.prune(network, steps, goals["final_sparsity"], stage == "prune_2_4", skip)
    if all(decisions.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in decisions.items())
        raise InputError(f"The stage '{stage}' can do nothing with this model. {reasons}.")
    return wrapped, decisions


def _check_numbers(epochs, learning_rate, batch_size, weight, temperature, final_sparsity, clusters):
    for name, holds, expected, value in (
        ("epochs", isinstance(epochs, int) and epochs >= 1, "1 or more", epochs),
        ("learning_rate", 0 < learning_rate < float("inf"), "a number above 0", learning_rate),
        ("batch_size", isinstance(batch_size, int) and batch_size >= 1, "1 or more", batch_size),
        ("distillation_weight", 0 <= weight <= 1, "a number from 0 to 1", weight),
        ("temperature", 0 < temperature < float("inf"), "a number above 0", temperature),
        ("final_sparsity", 0 < final_sparsity < 1, "a share between 0 and 1", final_sparsity),
        ("clusters", isinstance(clusters, int) and 3 <= clusters <= 256, "3 to 256", clusters),
    ):
        if not holds:
            raise InputError(f"{name} expects {expected}, received {value!r}.")


def _batches(data, batch_size: int, seed: int, input_shape) -> tf.data.Dataset:
    """One epoch of `(float32 images, labels)`, of whatever the user gave."""
    data = getattr(data, "train", data)
    if hasattr(data, "images"):
        data = data.images, data.labels
    if isinstance(data, tf.data.Dataset):
        if data.cardinality() < 1:
            raise InputError(
                "data is a tf.data.Dataset of unknown, infinite or no length. Batch it, and take one epoch."
            )
    elif isinstance(data, (tuple, list)) and len(data) == 2:
        images, labels = (np.asarray(each) for each in data)
        if len(images) == 0 or len(images) != len(labels):
            raise InputError(f"data expects as many images as labels, received {len(images)} and {len(labels)}.")
        data = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images), seed).batch(batch_size)
    else:
        raise InputError(
            "compress needs training examples. Give data=Examples or Splits of kdistill.data, (images, labels), or a "
            f"batched tf.data.Dataset; received {type(data).__name__}."
        )
    given = data.element_spec[0].shape if isinstance(data.element_spec, tuple) and len(data.element_spec) == 2 else None
    if given is None or given.rank != len(input_shape) or not given[1:].is_compatible_with(input_shape[1:]):
        raise InputError(f"data expects batches of (images {input_shape}, labels), received {data.element_spec}.")
    return data.map(lambda images, labels: (tf.cast(images, tf.float32), labels)).prefetch(tf.data.AUTOTUNE)


def _checked_teacher(teacher, shape, classes: int):
    """The frozen teacher, tried on one image."""
    teach = frozen(teacher)
    received = teach(tf.zeros((1, *shape))).shape[-1]
    if received != classes:
        raise InputError(
            f"The student has {classes} classes, the teacher {received}. Both need the same, in one order."
        )
    return teach


def _check_skip(skip, network) -> None:
    known = {layer.name for layer in network.layers}
    for name in skip:
        if name not in known:
            raise unknown("layer in skip", name, known)


def _post_training(model, batches, say) -> Compressed:
    images = np.concatenate([x for x, _ in batches.take(CALIBRATION_IMAGES)])[:CALIBRATION_IMAGES]
    content = convert(model, Profile("int8", quantization="int8"), images)
    say(f"int8: quantised after the training, calibrated on {len(images)} images")
    leaves = [layer for layer in model._flatten_layers(include_self=False) if not layer._layers]
    rows = [{**row, "quantised": "yes"} for row in stages.table(leaves, {})]
    floats = stayed_float(schema.ModelT.InitFromPackedBuf(content), "int8")
    notes = [f"{each['operator']} '{each['tensor']}': {each['reason']}" for each in floats]
    return Compressed(model, "int8", rows, notes, _content=content)


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
