"""Compares an exported file with its model, in a process of its own, and keeps the file only if it is good enough.

A file is refused where it loses more than its profile allows and chance does not explain that, see
`evaluation.chance`: of 300 images, a loss of two is no loss of 0.67 points.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion import graph
from kdistill.conversion.build import NAME, Built, build, inputs_by_name, write
from kdistill.conversion.comparison import (
    NEAR,
    as_in_file,
    check_model_outputs,
    compare_classes,
    compare_heads,
    exceeded,
)
from kdistill.conversion.float32 import Prepared, prepare
from kdistill.data.few_labels import without
from kdistill.data.lazy_images import EncodedImages
from kdistill.data.splits import Examples
from kdistill.errors import FileRefused, InputError
from kdistill.evaluation.evaluate import predict, predict_numbers
from kdistill.evaluation.examples import Gathered, gather, rows_of
from kdistill.evaluation.metrics import log_softmax
from kdistill.evaluation.outputs import by_head, heads_of_runner, inputs_of_runner, outputs_of
from kdistill.networks.heads import SUPPORTED, Head, are_probabilities, logits_of_probabilities
from kdistill.networks.signatures import Input, inputs_of
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.tflite import quantization_error
from kdistill.tflite.interpreter import File, predict_isolated

SECONDS = 3600  # for all test images
METRICS = ("accuracy", "model_accuracy", "agreement", "max_difference", "images")  # of a check, written into the file
ADVICE = {  # by quantization: what loses less
    "int8": "Try a profile that keeps activations in float (phone_cpu, phone_gpu), quantization-aware training "
    "(kdistill compress --scheme qat), or calibration images like those that the file will see.",
    "int4": "Try a profile with less quantization (phone_cpu, phone_gpu).",
    "dynamic": "Try a profile with less quantization (phone_gpu).",
}


def check(
    path: str | Path,
    model: keras.Model | str | Path | np.ndarray,
    examples,
    profile: str | Profile,
    *,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    seconds: float = SECONDS,
    mean=None,
    std=None,
    head: str | Mapping | None = None,
) -> dict:
    """Compares a `.tflite` with its model on images; the file runs in a process of its own, without TensorFlow.

    Args:
        path: The file.
        model: The Keras model, the path of its `.keras` file, or its logits `[n, classes]` on the same images; of other
            heads its outputs by name.
        examples: `kdistill.Examples`, `(images, labels)`, or images alone: `[n, height, width, channels]`, raw pixels
            0..255. Of other models as for `kdistill.evaluate`, or `(inputs, None)`. Without labels the agreement is
            measured, but no accuracy.
        profile: The name of a profile, the path of a `.py` file with one, or a `Profile`, for its limits.
        max_drop: The accuracy that the file may lose, a share of 1. Default: the profile's.
        min_agreement: The share of images on which file and model must predict the same class. Default: the profile's.
            For classes at positions the share of positions. Labels and numbers agree on an example (or position) if
            every probability is as near as 0.05, and every number as near as 5 % of its range.
        seconds: The time limit for all images.
        mean, std, head: As they were passed to `kdistill.export`; None: those of the profile, and what the model tells.

    Returns:
        A dict: accuracy, model_accuracy, drop, lost and gained (the images that only the model and only the file
        classifies correctly), per_class (dicts of class, images, accuracy and model_accuracy, for the classes that
        occur), all None without labels; agreement, same (images), max_difference (of logits, or of probabilities if
        the file gives those), images, max_drop, min_agreement, p_drop and p_agreement (the probability of such a loss
        if the true one were exactly the limit), note (a limit that was exceeded as far as chance allows, or None), and
        resolution (a sentence: what so many images can show). Of several outputs, of classes at positions, labels and
        numbers also heads: by output the metric ("accuracy", of numbers "r2"), its values for file and model, drop,
        agreement, max_difference, of labels same_side (of 0.5), of numbers the correlation. Then agreement is the
        lowest and drop the largest.

    Raises:
        CheckFailed: The file does not run, crashes, takes too long, gives NaN or infinite numbers, or exceeds a limit
            by more than chance allows (one-sided tests at 5 %).
        InputError: The profile, the images, or the number of logits is wrong.

    Example:
        kdistill.check("files/npu/student.tflite", student, (x_test, y_test), "npu")["agreement"]
    """
    profile = graph.with_range(with_limits(load_profile(profile), max_drop, min_agreement), mean, std)
    if isinstance(model, Mapping):
        heads = heads_of_runner(File(path), head)
        sample = gather(examples, inputs_of_runner(File(path)))
        return check_heads(
            path, rows_of(model, heads), sample.inputs, labels_of(sample, heads), heads, profile, seconds
        )
    student = None if isinstance(model, np.ndarray) else prepare(model, head)
    if student is not None and not student.classifies_images:
        heads = graph.heads_in_file(student.heads, profile)
        return check_heads(path, *outputs_to_compare(student, profile, examples), heads, profile, seconds)
    images, labels = as_examples(examples)
    if student is not None:
        model = logits_of(student, profile, images)
    elif model.ndim == 2 and are_probabilities(model):
        model = logits_of_probabilities(model)
    return check_against(path, model, images, labels, profile, seconds)


def as_examples(examples, name: str = "examples") -> tuple[np.ndarray | EncodedImages, np.ndarray | None]:
    """Images and labels `[n]`, or None, of `Examples`, a pair or images alone. Labels below 0 mean "unlabeled".

    Labels may also be `[n, 1]`, one-hot or distributions `[n, classes]`. `name`: of the argument, for messages.
    """
    if hasattr(examples, "element_spec"):
        sample = gather(examples, {"image": Input("image", (None, None, None), "float32")}, name)
        images, labels = sample.inputs["image"], sample.labels
    elif isinstance(examples, Examples):
        images, labels = examples.images, examples.labels
    elif name == "examples" and isinstance(examples, (tuple, list)) and len(examples) == 2:
        images, labels = examples
    else:
        images, labels = examples, None
    if isinstance(images, np.ndarray) and images.ndim == 3:  # gray images without a channel
        images = images[..., None]
    if not isinstance(images, (np.ndarray, EncodedImages)) or images.ndim != 4 or not len(images):
        received = f"{type(images).__name__} {getattr(images, 'shape', '')}".rstrip()
        raise InputError(
            f"{name} expects {'kdistill.Examples, (images, labels) or ' if name == 'examples' else ''}images: an array "
            f"[n, height, width, channels] with 1 image or more; received {received}."
        )
    if labels is None:
        return images, None
    labels = np.asarray(labels)
    if labels.ndim == 2:
        labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(axis=1)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.number):
        raise InputError(
            f"{name} expects a label for each of {len(images)} images, whole numbers [n] or one-hot [n, classes]; "
            f"received {labels.dtype} {labels.shape}."
        )
    return images, labels.astype(np.int64)


def logits_of(student: Prepared, profile: Profile, images) -> np.ndarray:
    """The logits `[n, classes]` of a student, with the profile's normalization before it.

    Of a student without exclusive classes, its outputs as they are.
    """
    model = graph.with_normalization(student.model, profile)
    return predict(model, images) if student.head.exclusive else predict_numbers(model, images)


def outputs_to_compare(student: Prepared, profile: Profile, examples, what: str = "examples", limit=None) -> tuple:
    """What `check_heads` compares a file on: the model's outputs as the file gives them, its inputs, and its labels.

    Each a dict by name. `what`: the argument; of `calibration` the labels do not count. `limit`: the most examples.
    """
    sample = None
    if isinstance(examples, (np.ndarray, EncodedImages)) or what == "calibration":
        inputs = inputs_by_name(examples, student, what, limit)
    else:
        sample = gather(examples, None if student.text else student.inputs, what)
        inputs = inputs_by_name(sample.inputs if student.text is None else sample.inputs["input"], student, what, limit)
    model = graph.with_normalization(student.model, profile)
    outputs = by_head(outputs_of(model, dict(zip(inputs_of(model), inputs.values(), strict=True))), student.heads)
    check_model_outputs(outputs)
    outputs = as_in_file(outputs, student.heads, graph.heads_in_file(student.heads, profile))
    labels = {} if sample is None else labels_of(sample, student.heads)
    return (
        outputs,
        inputs,
        dict(zip(outputs, labels.values(), strict=True)) if len(student.heads) == 1 and labels else labels,
    )


def labels_of(sample: Gathered, heads: Mapping[str, Head]) -> dict[str, np.ndarray]:
    """The labels by output; those with the weight 0 are missing."""
    if sample.labels is None:
        return {}
    labels = rows_of(sample.labels, heads)
    for name, weights in rows_of(sample.weights, heads, "sample_weight").items():
        hidden = weights == 0
        if name in labels and hidden.any():
            labels[name] = without(labels[name].astype(np.float64), hidden, np.nan)
    return labels


def check_heads(path, expected: Mapping, inputs: Mapping, labels: Mapping, heads, profile: Profile, seconds=SECONDS):
    """`check` for outputs of any heads; the arguments as of `outputs_to_compare`, `heads` as of the file's outputs."""
    file = File(path, trusted=True)
    if len(inputs) == 1:
        (array,) = inputs.values()
        inputs = {file.input["name"]: array[:] if isinstance(array, EncodedImages) else array}
    try:
        outputs = by_head(predict_isolated(path, inputs, seconds), heads)
    except InputError as error:
        raise FileRefused(f"The file for '{profile.name}' cannot be used: {error}") from None
    expected = dict(zip(heads, expected.values(), strict=True))
    for name, numbers in outputs.items():
        if numbers.shape != expected[name].shape:
            raise FileRefused(
                f"The file for '{profile.name}' gives {numbers.shape} for '{name}', its model {expected[name].shape}."
            )
        if not np.isfinite(numbers).all():
            raise FileRefused(f"The file for '{profile.name}' gives numbers that are NaN or infinite for '{name}'.")
    return _within_limits(compare_heads(outputs, expected, heads, labels, profile), profile)


def with_limits(profile: Profile, max_drop: float | None = None, min_agreement: float | None = None) -> Profile:
    """The profile with these limits instead of its own; None keeps its own."""
    limits = {"max_drop": max_drop, "min_agreement": min_agreement}
    return dataclasses.replace(profile, **{name: limit for name, limit in limits.items() if limit is not None})


def check_against(
    path: str | Path, model_logits: np.ndarray, images, labels: np.ndarray | None, profile: Profile, seconds=SECONDS
) -> dict:
    """`check` on images and labels that `as_examples` returns, with the limits of a checked profile."""
    model_logits = np.asarray(model_logits)
    if len(model_logits) != len(images) or not len(images):
        raise InputError(
            f"model_logits expects a row for each of {len(images)} test images (1 or more), received "
            f"{len(model_logits)} rows."
        )
    broken = int((~np.isfinite(model_logits)).any(axis=tuple(range(1, model_logits.ndim))).sum())
    if broken:
        raise InputError(
            f"The Keras model gives NaN or infinite numbers for {broken:,} of {len(images):,} images, so that no file "
            "can be compared with it. Look for log, sqrt or a division in it that receives 0 or less."
        )
    try:
        outputs = predict_isolated(path, images, seconds)
    except InputError as error:
        raise FileRefused(f"The file for '{profile.name}' cannot be used: {error}") from None
    if outputs.shape != model_logits.shape:
        raise FileRefused(f"The file for '{profile.name}' gives {outputs.shape}, its model {model_logits.shape}.")
    if not np.isfinite(outputs).all():
        raise FileRefused(f"The file for '{profile.name}' gives numbers that are NaN or infinite.")
    file = File(path, trusted=True)
    if file.probabilities:
        model_logits = np.exp(log_softmax(model_logits))
    if file.exclusive:
        same = outputs.argmax(axis=1) == model_logits.argmax(axis=1)
    elif labels is not None:
        raise InputError(
            f"The file for '{profile.name}' does not give exclusive classes, so labels cannot be compared with its "
            f"output '{file.output['name']}'. {SUPPORTED} Give images without labels, or the Keras model."
        )
    else:
        size = 1.0 if file.sigmoid else np.ptp(model_logits)
        same = (abs(outputs - model_logits) <= NEAR * size).all(axis=1)
    return _within_limits(compare_classes(outputs, model_logits, same, labels, profile), profile)


def _within_limits(metrics: dict, profile: Profile) -> dict:
    """The metrics, with a note on a limit that chance explains. Raises `FileRefused` for a limit exceeded beyond it."""
    significant, others = exceeded(metrics)
    if significant:
        raise FileRefused(
            f"The file for '{profile.name}' is not good enough on {metrics['images']:,} images: "
            f"{'; '.join([*significant, *others])}.",
            ADVICE.get(profile.quantization, "Export again with wider limits, or compare more images."),
            metrics,
        )
    if others:
        metrics["note"] = f"{'; '.join(others)}. Chance allows this on {metrics['images']:,} images."
    return metrics


def export_checked(
    student: Prepared,
    folder: Path,
    profile: Profile,
    calibration: np.ndarray | None,
    examples: Examples,
    model_logits: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
) -> dict:
    """Exports to `folder`/student.tflite, but only if the file passes `check`.

    Args:
        student: The student; prepare it once for all profiles.
        folder: A folder, which is created. If the check fails, it stays as it was.
        profile: A checked profile, such as `load_profile` returns.
        calibration: Training images, see `export`.
        examples: Test images with labels.
        model_logits: Of the student on the test images; by default the float32 model computes them.
        class_names, about: See `export`.

    Returns:
        The dict of `export`, with the dict of `check` as `check`. Its metrics are also in the file.

    Raises:
        FileRefused: The file is not good enough. For int8 the message names the layers that cost most.
        InputError: As for `export`.
    """
    if model_logits is None and student.classifies_images:
        model_logits = logits_of(student, profile, examples.images)
    built = build(student, profile, calibration, class_names, about)
    return write_checked(built, folder / NAME, student, model_logits, examples)


def write_checked(built: Built, path: Path, student: Prepared, model_logits: np.ndarray, examples) -> dict:
    """Writes what was built of a student to `path` if it passes `check` on these examples; see `export_checked`.

    `model_logits`: unused for a student of other inputs or heads than images with a class.
    """
    if not student.classifies_images:
        return _write_measured(built, path, student, *outputs_to_compare(student, built.profile, examples))
    return _write_measured(built, path, student, model_logits, *as_examples(examples))


def _write_measured(built: Built, path: Path, student: Prepared, model_logits, images, labels) -> dict:
    metrics = {}

    def measure(part: Path) -> dict:
        metrics.update(measured(built, part, student, model_logits, images, labels))
        return {name: metrics[name] for name in METRICS}

    return {**write(built, path, measure), "check": metrics}


def measured(built: Built, path: Path, student: Prepared, model_logits, images, labels) -> dict:
    """`check_against` of a file that was built of a student; a refusal names the layers that cost most.

    Of other heads than one row of classes for an image, the last three are those of `check_heads`.
    """
    try:
        return compare_built(built, path, model_logits, images, labels, built.profile)
    except FileRefused as error:
        costly = ""
        if error.check and built.profile.quantization in ("int8", "dynamic"):
            costly = _costly_layers(student, built, path, images)
        raise FileRefused(error.reason + costly, error.advice, error.check, len(built.content)) from None


def compare_built(built: Built, path: Path, model_logits, images, labels, profile: Profile) -> dict:
    """`check_against`, or of other heads `check_heads`, of a built file at `path`, with the limits of `profile`."""
    if isinstance(model_logits, Mapping):
        return check_heads(path, model_logits, images, labels, built.heads, profile)
    return check_against(path, model_logits, images, labels, profile)


def _costly_layers(student: Prepared, built: Built, path: Path, images) -> str:
    """A sentence with the layers whose quantization costs most; empty if the file does not even run."""
    rows = layer_costs(student, built, path, images)
    return f" Most of the loss comes from: {quantization_error.sentence(rows)}." if rows else ""


def layer_costs(student: Prepared, built: Built, path: Path, images) -> list[dict]:
    """The operators of a built file at `path`, those that cost most first, see `quantization_error.compare`.

    Empty for a file that does not run, or that has several inputs.
    """
    plain = dataclasses.replace(
        built.profile,
        quantization="none",
        input_type="float32",
        output_type="float32",
        operators="builtin",
        c_array=False,
    )
    if isinstance(images, Mapping):
        if len(images) > 1:
            return []
        images = next(iter(images.values()))
    reference = path.with_name("reference.tflite")
    try:
        reference.write_bytes(build(student, plain).content)
        return quantization_error.compare(path, reference, images)
    except InputError:
        return []
    finally:
        reference.unlink(missing_ok=True)
