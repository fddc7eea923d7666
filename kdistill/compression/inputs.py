"""The inputs of `compress`: values pass the recipe's checks; data, teacher and names of layers must fit the model."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from kdistill.compression import tfmot
from kdistill.compression.bridge import to_tf_keras
from kdistill.compression.finetune import Batches
from kdistill.compression.quantized_file import check_runs, convert_quantized
from kdistill.conversion.export import input_warning
from kdistill.conversion.float32 import Prepared, prepare
from kdistill.conversion.graph import with_normalization
from kdistill.conversion.refusals import recurrent_layers
from kdistill.data.batches import steps_per_epoch, training_batches, without_autotuning
from kdistill.data.splits import Examples
from kdistill.errors import InputError, unknown
from kdistill.networks.heads import exclusive_kind
from kdistill.networks.signatures import subject_of
from kdistill.recipe import SCHEMES, Data, Profile, Stage, Term
from kdistill.recipe.checks import check_stage
from kdistill.recipe.objective import check_mix, check_term
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.fit_inputs import first_examples, warn_of_teacher
from kdistill.teachers.frozen import frozen
from kdistill.teachers.input_range import normalized

NOISE_IMAGES = 4
SCHEDULES = (keras.optimizers.schedules.LearningRateSchedule,)


def checked_stage(stage: Stage | str, settings: Mapping[str, object]) -> Stage:
    """The stage, or the stage of a scheme by its name and settings such as `epochs`.

    Raises `InputError` for an unknown setting, and for a value out of range or without effect.
    """
    fields = [field.name for field in dataclasses.fields(Stage) if field.name != "scheme"]
    for name in settings:
        if name not in fields:
            raise unknown("argument of compress", name, fields)
    if isinstance(stage, str):
        stage = Stage(stage, **settings)
    elif not isinstance(stage, Stage):
        raise InputError(f"stage expects a kdistill.Stage or the name of a scheme, received {stage!r}.")
    elif settings:
        raise InputError(f"{', '.join(settings)} belongs into the Stage. Write kdistill.Stage('{stage.scheme}', ...).")
    check_stage(stage, "stage", SCHEDULES)
    return stage


def check_objective(distillation_weight, temperature, terms: Mapping[str, Term], teacher) -> None:
    """Raises `InputError` for a weight, temperature or term that cannot be used, or has no effect."""
    check_mix(distillation_weight, temperature, terms, schedules=SCHEDULES)
    for name, term in terms.items():
        if teacher is None:
            raise InputError(f"The term '{name}' does nothing without a teacher. Pass a teacher, or remove the term.")
        check_term(name, term, SCHEDULES)
        if term.student_tap or term.teacher_tap:
            raise InputError(
                f"The term '{name}' compares layers, but compression wraps and splits the student's layers. Remove "
                "it; terms of logits can stay."
            )


def batches_of(data, batch_size: int, seed: int, input_shape, augment: Data | None) -> Batches:
    """The batches `(float32 images, labels)` of any epoch, from arrays, `Examples`, `Splits` or a data set.

    Raises `InputError` for data that is missing, has another shape than `input_shape`, or has no length.
    """
    validation = getattr(data, "validation", None)
    data = getattr(data, "train", data)
    if isinstance(data, (tuple, list)) and len(data) == 2:
        data = Examples(*(np.asarray(array) for array in data))
    if isinstance(data, tf.data.Dataset):
        if data.cardinality() < 1:
            raise InputError(
                "data is a tf.data.Dataset of unknown, infinite or no length. Batch it, and end it after one epoch."
            )
        if augment is not None:
            raise InputError("augment does nothing with a tf.data.Dataset. Augment in the data set, or pass arrays.")
        spec, steps = data.element_spec, int(data.cardinality())
    elif hasattr(data, "images"):
        images, labels = data.images, data.labels
        if len(images) == 0 or len(images) != len(labels):
            raise InputError(f"data expects as many images as labels, received {len(images)} and {len(labels)}.")
        spec, steps = (images[:1], labels[:1]), steps_per_epoch(data, batch_size)
    else:
        raise InputError(
            "compress needs training examples. Pass data=Examples or Splits of kdistill.data, (images, labels), or a "
            f"batched tf.data.Dataset; received {type(data).__name__}."
        )
    shape = tf.TensorShape(spec[0].shape) if isinstance(spec, tuple) and len(spec) == 2 else None
    if shape is None or shape.rank != len(input_shape) or not shape[1:].is_compatible_with(input_shape[1:]):
        raise InputError(f"data expects batches of (images {input_shape}, labels), received {spec}.")

    def of_epoch(epoch: int) -> tf.data.Dataset:
        if isinstance(data, tf.data.Dataset):
            return data.map(_with_float_images)
        return training_batches(data, augment or Data(), batch_size, seed, epoch)

    if validation is not None:
        images = tf.data.Dataset.from_tensor_slices((validation.images, validation.labels)).batch(256)
        validation = without_autotuning(images.map(_with_float_images))
    return Batches(of_epoch, steps, validation)


def warn_of_range(student: Prepared, teacher, data, stated) -> None:
    """Warns if student or teacher get these images in another range than they expect.

    `stated`: mean and std, see `teachers.input_range.normalization`. A `tf.data.Dataset` is not looked at: that would
    change the order of what it shuffles.
    """
    data = getattr(data, "train", data)
    if isinstance(data, tf.data.Dataset):
        return
    images, labels = (data.images, data.labels) if hasattr(data, "images") else map(np.asarray, data)
    profile = Profile("compress") if stated is None else Profile("compress", mean=stated[0], std=stated[1])
    warning = input_warning(student, profile, images, labels)
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=3)
    if teacher is not None:
        examples, labels = first_examples(images, labels)
        warn_of_teacher(teacher, examples if stated is None else normalized(examples, *stated), labels)


def with_range(student: Prepared, teacher, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Prepared, object]:
    """Student and teacher with `(pixel - mean) / std` before them, so that both take raw pixels."""
    model = with_normalization(student.model, Profile("compress", mean=mean, std=std))
    student = dataclasses.replace(student, model=model)
    if isinstance(teacher, (list, tuple)):
        return student, [Adapted(item, mean=mean, std=std) for item in teacher]
    return student, None if teacher is None else Adapted(teacher, mean=mean, std=std)


def _with_float_images(images, labels):
    return tf.cast(images, tf.float32), labels


def checked_teacher(teacher, shape, classes: int):
    """The frozen teacher, tested on images of noise, which also show whether it gives logits or probabilities.

    Raises `InputError` if it has another number of classes, or no exclusive classes.
    """
    predict = frozen(teacher)
    noise = np.random.default_rng(0).integers(0, 256, (NOISE_IMAGES, *shape))
    received = predict(tf.constant(noise, tf.float32)).shape[-1]
    if received != classes:
        raise InputError(
            f"The student has {classes} classes, the teacher {received}. Both need the same, in one order."
        )
    return predict


def check_student(student: keras.Model, stage: Stage) -> None:
    """Raises `InputError` for a student, trained or not, that a stage cannot compress, and for an unknown layer."""
    prepared = prepare(student)
    check_head(prepared)
    network = to_tf_keras(prepared.model)
    check_layers(stage, network)
    check_quantizable(prepared.model, stage, network, lambda: to_tf_keras(prepared.model))


def check_head(student: Prepared) -> None:
    """Raises `InputError` for a student whose outputs are not those of exclusive classes."""
    try:
        exclusive_kind(student.head, subject_of(student.model, "student"))
    except InputError as error:
        raise InputError(
            f"{error} To quantize this model without training, use kdistill.export with the profile 'npu' or "
            "'phone_cpu'."
        ) from None


def check_mode(check: str | None) -> None:
    """Raises `InputError` for a `check` that `compress` does not have."""
    if check not in ("raise", "warn", None):
        raise InputError(f"check expects 'raise', 'warn' or None, received {check!r}.")


def check_quantizable(student: keras.Model, stage: Stage, network, rebuild: Callable[[], tf_keras.Model]) -> None:
    """Raises `InputError` if the file of a student would not run after quantization-aware training.

    With layers that tfmot does not quantize, the converter is tried on the untrained network.

    Args:
        student: the Keras 3 model.
        stage: the stage; one without quantization-aware training passes.
        network: the student, bridged to tf_keras.
        rebuild: returns an equal network, which is consumed.
    """
    if "qat" not in SCHEMES[stage.scheme]:
        return
    loops = recurrent_layers(student)
    if loops:
        raise InputError(
            f"The scheme '{stage.scheme}' cannot quantize the loop over time steps in {', '.join(map(repr, loops))}. "
            "Build a model whose recurrent layers have unroll=True, and give it the same weights "
            "(new.set_weights(model.get_weights())); or use 'prune' or 'cluster', which do not quantize."
        )
    unusual = tfmot.unusual(network)
    if not unusual:
        return
    wrapped, _ = tfmot.quantize(rebuild(), False, False, stage.skip)
    try:
        check_runs(convert_quantized(wrapped, "logits"))
    except InputError as error:
        names = ", ".join(f"'{layer.name}' ({type(layer).__name__})" for layer in unusual)
        raise InputError(
            f"The file of '{student.name}' would not run after quantization-aware training: {error} It has layers that "
            f"compute in float between int8 layers: {names}. Replace them, or "
            "use the scheme 'int8', which quantizes after training."
        ) from error


def check_layers(stage: Stage, network) -> None:
    """Raises `InputError` for a layer that the stage names and the network does not have."""
    layers = {layer.name for layer in network.layers}
    for option in ("skip", "layer_sparsity", "layer_clusters"):
        for name in getattr(stage, option):
            if name not in layers:
                raise unknown(f"layer in {option}", name, layers)
