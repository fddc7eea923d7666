"""From a Keras model to checked `.tflite` files: for one profile in one call, or for several of them."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion import graph, worker
from kdistill.conversion.build import (
    CALIBRATION_IMAGES,
    NAME,
    Built,
    build,
    calibration_images,
    calibration_of,
    evenly_spaced,
    write,
)
from kdistill.conversion.float32 import Prepared, prepare
from kdistill.conversion.verify import (
    METRICS,
    as_examples,
    export_checked,
    logits_of,
    measured,
    outputs_to_compare,
)
from kdistill.data.splits import Examples
from kdistill.errors import FileRefused, InputError
from kdistill.evaluation.evaluate import predict
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.teachers.input_range import range_warning


def export(
    student: keras.Model | str | Path,
    path: str | Path,
    profile: str | Profile = "phone_cpu",
    calibration=None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
    *,
    examples=None,
    check: str | None = "warn",
    mean=None,
    std=None,
    head: str | Mapping | None = None,
) -> dict:
    """Writes a model as a `.tflite` file for a profile, and compares the file with the model.

    The file is complete or absent: it is written only after it has been loaded and has run in a process of its own.

    Args:
        student: A Keras model, or the path of a `.keras` file, with any inputs of a fixed size and any outputs of
            numbers; what each profile holds is in `docs/export.md`.
        path: The file, ending in `.tflite`; or a folder, for `student.tflite` in it.
        profile: The name of a profile, the path of a `.py` file with one, or a `Profile`.
        calibration: Training images `[n, height, width, channels]`, raw pixels 0..255, for int8 profiles; others use
            them for the comparison only. Up to 500 are used, evenly spaced. Of a model of anything else, its inputs in
            its own range: an array, a dict by name, a tuple, or a `tf.data.Dataset`, whose labels do not count.
        class_names: The names of the classes, one line each. With them, `labels.txt` and `model.json` are written
            beside the file; both are also inside it, see `kdistill.tflite.metadata`.
        about: More for the metadata: name, description, version, author, license (texts), recipe, data (JSON values).
        examples: What file and model are compared on: `kdistill.Examples`, `(images, labels)`, or images alone, better
            not the calibration images; other inputs and heads as for `kdistill.evaluate`. Default: the calibration
            images. The drop of accuracy needs labels.
        check: What happens if the file loses more than the limits of the profile and chance allow, see
            `kdistill.check`: "warn" writes it with a warning, "raise" does not write it, None compares nothing.
        mean, std: The model was trained on `(pixel - mean) / std`, which becomes part of the file, so that it takes raw
            pixels: numbers, or one for each channel. They replace those of the profile. With mean=0, std=1 the file
            takes the numbers on which the model was trained, and so do calibration and examples. None: those of the
            profile; then a `UserWarning` names another range if the images do not look like those of the training.
        head: What the outputs mean, `classes`, `labels` or `numbers`, or a dict by output (`docs/heads.md`); None: what
            the loss of `compile`, the last activation and the numbers tell. What nothing tells is numbers.

    Returns:
        A dict: path, profile, bytes, sha256, weights_sha256 (of the Keras model), min_runtime, input, output, outputs,
        operators, float_layers (what stayed float in a quantized file: operator, layer, reason), precision (in which
        the student computes), and with the profile's `c_array` also arena. agreement and drop are those of file and
        model, shares of 1, and `check` is the dict of `kdistill.check`; all three are None without images.

    Raises:
        InputError: The model, profile or images cannot be used. The message names the operator and layer at fault.
        CheckFailed: With `check="raise"`, the file is not good enough. For int8 the message names the layers that cost
            most.

    Example:
        kdistill.export(student, "files/npu", "npu", x_train, examples=(x_test, y_test))["agreement"]
    """
    path, profile = Path(path), graph.with_range(load_profile(profile), mean, std)
    path = path if path.suffix == ".tflite" else path / NAME
    _check_mode(check, examples, calibration)
    student = prepare(student, head)
    graph.check_suits(student.model, profile, student.heads)
    if student.classifies_images and hasattr(calibration, "element_spec"):
        calibration = as_examples(calibration, "calibration")[0]
    if profile.quantization == "int8":
        worker.start()  # in the background, while the model runs
    comparison = None if check is None else _Comparison(student, profile, examples, calibration)
    built = build(student, profile, calibration, class_names, about)
    images, labels = (comparison.images, comparison.labels) if comparison else (None, None)
    if not student.takes_images:
        images = None
    elif isinstance(images, Mapping):
        images, labels = next(iter(images.values())), None
    elif comparison is None and profile.quantization == "int8":
        images = evenly_spaced(calibration)
    warning = None if images is None else input_warning(student, profile, images, labels)
    if warning:
        warnings.warn(warning, UserWarning, stacklevel=2)
    if comparison is None or comparison.images is None:
        return {**write(built, path), "agreement": None, "drop": None, "check": None}
    report = write(built, path, lambda part: comparison.measure(built, part, strict=check == "raise"))
    metrics = comparison.metrics or {}
    if comparison.refusal:
        warnings.warn(
            f"{comparison.refusal} The file is written all the same. check='raise' refuses such a file, check=None "
            "compares nothing.",
            UserWarning,
            stacklevel=2,
        )
    return {**report, "agreement": metrics.get("agreement"), "drop": metrics.get("drop"), "check": comparison.metrics}


def export_profiles(
    student: Prepared,
    folder: Path,
    profiles: Sequence[Profile],
    calibration: np.ndarray,
    examples: Examples,
    *,
    model_logits: np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    about: dict | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, dict], dict[str, FileRefused | InputError]]:
    """Exports a student to `folder`/PROFILE/student.tflite for each profile. A refused file does not stop the others.

    The arguments are those of `verify.export_checked`; `model_logits` are used where a profile adds no normalization.

    Returns:
        By profile the files that are written, and why the others are not: they are not good enough, or the profile does
        not suit the model.
    """
    files, refused, logits = {}, {}, {((), ()): model_logits}
    if any(profile.quantization == "int8" for profile in profiles):
        worker.start()
    for profile in profiles:
        say(f"Exporting {profile.name}")
        normalization = tuple(profile.mean), tuple(profile.std)
        try:
            if logits.get(normalization) is None and student.classifies_images:
                logits[normalization] = logits_of(student, profile, examples.images)
            files[profile.name] = export_checked(
                student,
                folder / profile.name,
                profile,
                calibration,
                examples,
                model_logits=logits.get(normalization),
                class_names=class_names,
                about=about,
            )
        except (FileRefused, InputError) as error:
            refused[profile.name] = error
            say(f"Refused: {error}")
    return files, refused


def refused_row(name: str, error: Exception) -> dict:
    """Why a file is not written, for a report: name, reason, advice, check (see `kdistill.check`) and bytes or None.

    After a repair also its attempts.
    """
    refusal = error if isinstance(error, FileRefused) else FileRefused(str(error))
    row = {"name": name, "reason": refusal.reason, "advice": refusal.advice, "check": refusal.check}
    return {**row, "bytes": refusal.size, **({"attempts": refusal.attempts} if refusal.attempts else {})}


def input_warning(student: Prepared, profile: Profile, images, labels: np.ndarray | None = None) -> str | None:
    """A warning if a student gets these images, with the profile's normalization, in another range than it expects."""
    if any(len(values) not in (0, 1, images.shape[-1]) for values in (profile.mean, profile.std)):
        return None  # the export refuses such a profile, with the number of channels
    return range_warning(
        images,
        f"the model '{student.model.name}'",
        student.model,
        lambda numbers: predict(student.model, numbers),
        labels if student.classifies_images else None,
        (profile.mean or (0.0,), profile.std or (1.0,)) if profile.mean or profile.std else None,
    )


class _Comparison:
    """File against model on the examples, or on the calibration images.

    Attributes:
        images: None where there is nothing to compare on.
        metrics: The dict of `kdistill.check`, after `measure`; None if the file does not run.
        refusal: The error, if the file is not good enough.
    """

    def __init__(self, student: Prepared, profile: Profile, examples, calibration):
        self.student, self.metrics, self.refusal = student, None, None
        if not student.classifies_images:
            what, limit = ("examples", None) if examples is not None else ("calibration", CALIBRATION_IMAGES)
            examples = calibration if examples is None else examples
            if what == "calibration" and profile.quantization == "int8":
                examples = calibration_of(student, profile, calibration)
            self.logits, self.images, self.labels = None, None, None
            if examples is not None:
                compared = outputs_to_compare(student, profile, examples, what, limit)
                self.logits, self.images, self.labels = compared
            return
        self.images, self.labels = (None, None) if examples is None else as_examples(examples)
        if examples is None and profile.quantization == "int8":
            self.images = calibration_images(calibration, student.image_shape, graph.keeps_range(profile))
        elif examples is None and calibration is not None:
            self.images = evenly_spaced(as_examples(calibration, "calibration")[0])
        # The model first: images that it does not take are refused before the conversion.
        self.logits = None if self.images is None else logits_of(student, profile, self.images)

    def measure(self, built: Built, path: Path, strict: bool) -> dict | None:
        """Measures the file. Returns what goes into its metadata: what is measured on labeled examples."""
        try:
            self.metrics = measured(built, path, self.student, self.logits, self.images, self.labels)
        except FileRefused as error:
            if strict:
                raise
            self.metrics, self.refusal = error.check, error
        if not self.labels if isinstance(self.labels, dict) else self.labels is None:
            return None
        return {name: self.metrics[name] for name in METRICS} if self.metrics else None


def _check_mode(check: str | None, examples, calibration) -> None:
    if check not in ("raise", "warn", None):
        raise InputError(f"check expects 'raise', 'warn' or None, received {check!r}.")
    if check == "raise" and examples is None and calibration is None:
        raise InputError("check='raise' needs images to compare on. Give examples=(images, labels), or calibration.")
    if check is None and examples is not None:
        raise InputError("examples does nothing with check=None. Remove one of them.")
