"""What `compress` is given, checked before anything is trained: goals, numbers, names, examples, teacher."""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from kdistill.compression import finetune, tfmot
from kdistill.data import batches
from kdistill.data.splits import Examples
from kdistill.errors import InputError, unknown
from kdistill.recipe import SCHEMES, Data, Term
from kdistill.recipe.objective import check_term
from kdistill.teachers.frozen import frozen


def goals_of(scheme: str, final_sparsity, clusters, layer_sparsity, layer_clusters) -> tfmot.Goals:
    """The goals of a scheme. Raises InputError for one that is out of range, or that would do nothing."""
    shares = {"final_sparsity": final_sparsity} | {
        f"layer_sparsity of '{k}'": v for k, v in (layer_sparsity or {}).items()
    }
    counts = {"clusters": clusters} | {f"layer_clusters of '{k}'": v for k, v in (layer_clusters or {}).items()}
    for stage, numbers in (("prune", shares), ("cluster", counts)):
        given = [name for name, value in numbers.items() if value is not None]
        if given and stage not in SCHEMES[scheme]:
            with_it = ", ".join(name for name, parts in SCHEMES.items() if stage in parts)
            raise InputError(
                f"{given[0]} does nothing in the scheme '{scheme}'. Leave it out, or take one of {with_it}."
            )
    for name, value in shares.items():
        _check(value is None or (_is_number(value) and 0 < value < 1), name, "a share between 0 and 1", value)
    for name, value in counts.items():
        _check(value is None or (type(value) is int and 3 <= value <= 256), name, "3 to 256", value)
    plain = tfmot.Goals()
    return tfmot.Goals(
        plain.final_sparsity if final_sparsity is None else final_sparsity,
        plain.clusters if clusters is None else clusters,
        dict(layer_sparsity or {}),
        dict(layer_clusters or {}),
    )


def _check(holds: bool, name: str, expected: str, received) -> None:
    if not holds:
        raise InputError(f"{name} expects {expected}, received {received!r}.")


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_numbers(epochs, learning_rate, batch_size, weight, temperature) -> None:
    """Raises InputError for a number out of its range."""
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        _check(type(value) is int and value >= 1, name, "1 or more", value)
    for name, value, holds, expected in (
        ("learning_rate", learning_rate, lambda v: 0 < v < float("inf"), "a number above 0"),
        ("distillation_weight", weight, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
        ("temperature", temperature, lambda v: 0 < v < float("inf"), "a number above 0"),
    ):
        allowed = isinstance(value, finetune.Rate) or (_is_number(value) and holds(value))
        _check(allowed, name, f"{expected} or a LearningRateSchedule", value)


def batches_of(data, batch_size: int, seed: int, input_shape, augment: Data | None) -> finetune.Batches:
    """The epochs of `(float32 images, labels)`, of whatever the user gave."""
    validation = getattr(data, "validation", None)
    data = getattr(data, "train", data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        data = Examples(*(np.asarray(each) for each in data))
    if isinstance(data, tf.data.Dataset):
        if data.cardinality() < 1:
            raise InputError(
                "data is a tf.data.Dataset of unknown, infinite or no length. Batch it, and take one epoch."
            )
        if augment is not None:
            raise InputError("augment does nothing with a tf.data.Dataset. Augment in the data set, or give arrays.")
        spec, steps = data.element_spec, int(data.cardinality())
    elif hasattr(data, "images"):
        images, labels = data.images, data.labels
        if len(images) == 0 or len(images) != len(labels):
            raise InputError(f"data expects as many images as labels, received {len(images)} and {len(labels)}.")
        spec, steps = (images[:1], labels[:1]), batches.steps_per_epoch(data, batch_size)
    else:
        raise InputError(
            "compress needs training examples. Give data=Examples or Splits of kdistill.data, (images, labels), or a "
            f"batched tf.data.Dataset; received {type(data).__name__}."
        )
    given = tf.TensorShape(spec[0].shape) if isinstance(spec, tuple) and len(spec) == 2 else None
    if given is None or given.rank != len(input_shape) or not given[1:].is_compatible_with(input_shape[1:]):
        raise InputError(f"data expects batches of (images {input_shape}, labels), received {spec}.")

    def of_epoch(epoch: int) -> tf.data.Dataset:
        if isinstance(data, tf.data.Dataset):
            return data.map(lambda images, labels: (tf.cast(images, tf.float32), labels))
        return batches.training_batches(data, augment or Data(), batch_size, seed, epoch)

    if validation is not None:
        images = tf.data.Dataset.from_tensor_slices((validation.images, validation.labels)).batch(256)
        validation = batches.without_autotuning(
            images.map(lambda images, labels: (tf.cast(images, tf.float32), labels))
        )
    return finetune.Batches(of_epoch, steps, validation)


def checked_teacher(teacher, shape, classes: int):
    """The frozen teacher, tried on one image."""
    teach = frozen(teacher)
    received = teach(tf.zeros((1, *shape))).shape[-1]
    if received != classes:
        raise InputError(
            f"The student has {classes} classes, the teacher {received}. Both need the same, in one order."
        )
    return teach


def check_terms(terms: Mapping[str, Term], teacher) -> None:
    """Raises InputError for a term that cannot be kept on while a student is compressed."""
    for name, term in terms.items():
        if teacher is None:
            raise InputError(f"The term '{name}' does nothing without a teacher. Give one, or leave it out.")
        check_term(name, term, (finetune.Rate,))
        if term.student_tap or term.teacher_tap:
            raise InputError(
                f"The term '{name}' compares layers, which are wrapped and split while a student is compressed. Leave "
                "it out; terms of logits are kept on."
            )


def check_names(given: dict, network) -> None:
    """Raises InputError for a layer, among those that an option names, that the network does not have."""
    layers = {layer.name for layer in network.layers}
    for option, names in given.items():
        for name in names:
            if name not in layers:
                raise unknown(f"layer in {option}", name, layers)
