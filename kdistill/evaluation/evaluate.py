"""The same metrics for Keras models and `.tflite` files. TensorFlow is imported for Keras models only."""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from kdistill.data.lazy_images import EncodedImages
from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.evaluation.examples import gather, rows_of
from kdistill.evaluation.head_metrics import measure_output, without_hidden
from kdistill.evaluation.metrics import measure
from kdistill.evaluation.outputs import (
    by_head,
    constants,
    gives_one_row,
    heads_of_runner,
    inputs_of_runner,
    masks_of,
    outputs_of,
    traced,
)
from kdistill.files import byte_sizes
from kdistill.networks.heads import (
    CLASSES,
    MAIN_OUTPUTS,
    exclusive_kind,
    kind_of,
    logits_of_probabilities,
    meaning_of_loss,
)
from kdistill.networks.outputs import end_of
from kdistill.networks.signatures import main_output, subject_of
from kdistill.teachers.gain import MIN_GAIN
from kdistill.teachers.input_range import LABELED, UNSCALED, Normalized, normalization, range_warning
from kdistill.tflite import metadata
from kdistill.tflite.interpreter import WHOLE, File

if TYPE_CHECKING:
    import keras


ModelOrPath = Union["keras.Model", str, Path]
LABELED_FILE = 128  # images on which a .tflite, which runs on one thread, is compared with pixels of other ranges


def evaluate(
    model_or_path: ModelOrPath,
    examples,
    teacher_logits: np.ndarray | Mapping | None = None,
    batch_size: int = 256,
    logits: np.ndarray | None = None,
    *,
    mean=None,
    std=None,
    head: str | Mapping | None = None,
) -> dict:
    """Measures a `keras.Model`, a `.keras` file or a `.tflite` file on labeled examples, all with the same numbers.

    Args:
        model_or_path: the model, or the path of a `.keras` or `.tflite` file.
        examples: `Examples` or a pair: images `[n, h, w, c]`, raw pixels 0..255, and labels `[n]` (`[n, 1]`, one-hot).
            Of other models `Examples(inputs, labels)`, `(x, y)`, `(x, y, sample_weight)` or a finite
            `tf.data.Dataset` of these, with arrays, or dicts or tuples of them for several inputs or outputs.
        teacher_logits: `[n, classes]`, such as `predict(teacher, examples.images)`; of several outputs a dict.
        batch_size: images per call.
        logits: what `predict` returned for these images, if you have it: the model does not run over them again.
        mean, std: the model gets `(pixel - mean) / std`: numbers, or one for each channel. None: it gets the images as
            they are. A `UserWarning` names another range if the accuracy is 10 points higher with it.
        head: what the outputs mean, `classes`, `labels` or `numbers`, or a dict by output; None: what the loss of
            `compile`, the last activation or the file tells (`docs/heads.md`).

    Returns a dict, of several outputs with the metrics of each as a dict under its name:
        accuracy, top5, ece: of exclusive classes, shares of 1; of classes at positions accuracy and mean_iou; of
            independent labels accuracy, auc, f1; of numbers mse and mae, see `head_metrics.measure_head`.
        agreement, kl: with `teacher_logits` only; a share of 1 (of numbers the correlation), and nats (of one row of
            classes).
        parameters: the number of weights, None for a `.tflite`.
        bytes, deflated: the size of the file and its size when compressed, None for a `keras.Model`.
        microseconds: the median time of one image. For a `.tflite` that is one call of the interpreter on one CPU
            thread, for a Keras model one call of its `tf.function` on all threads: compare files with files.

    Raises `InputError` for a file that cannot be read, a model that does not fit the examples, and outputs of which
    nothing tells what they mean; `CheckFailed` for outputs that are not finite.

    Example:
        >>> from kdistill.evaluation.evaluate import evaluate, predict
        >>> metrics = evaluate("student.tflite", Examples(x_test, y_test), predict(teacher, x_test))
        >>> metrics["accuracy"], metrics["agreement"], metrics["bytes"]
        (0.9912, 0.9949, 15707)
    """
    runner, stated = _open(model_or_path), normalization(mean, std)
    loss = _loss_of(model_or_path, runner)
    if hasattr(examples, "element_spec"):
        collected = gather(examples, inputs_of_runner(runner))
        inputs = collected.inputs if len(collected.inputs) > 1 else next(iter(collected.inputs.values()))
        examples = (inputs, collected.labels) + (() if collected.weights is None else (collected.weights,))
    rows = logits
    if rows is None and head is None and _one_row(examples) and meaning_of_loss(loss) in (None, CLASSES):
        rows = _rows_of_classes(runner, _prepared(runner, _labeled(examples).images, stated), batch_size)
    if rows is None:
        metrics, inputs = _measure_heads(runner, examples, teacher_logits, batch_size, stated, head, loss)
        return {**metrics, **cost_of(model_or_path, runner, inputs)}
    examples = _labeled(examples)
    images = _prepared(runner, examples.images, stated)
    metrics = measure(rows, examples.labels, teacher_logits)
    if metrics["accuracy"] + MIN_GAIN <= 1:
        warning = _range_warning(runner, examples, stated, batch_size)
        if warning:
            warnings.warn(warning, UserWarning, stacklevel=2)
    return {**metrics, **cost_of(model_or_path, runner, images)}


def cost_of(model_or_path: ModelOrPath, runner: Union[File, "keras.Model"], inputs) -> dict:
    """parameters, bytes, deflated and microseconds, as of `evaluate`. `inputs`: images, or arrays by name."""
    is_file = isinstance(model_or_path, (str, Path))
    return {
        "parameters": None if isinstance(runner, File) else runner.count_params(),
        "bytes": Path(model_or_path).stat().st_size if is_file else None,
        "deflated": byte_sizes(Path(model_or_path).read_bytes())["deflated"] if is_file else None,
        "microseconds": runner.latency()["median_us"] if isinstance(runner, File) else _keras_latency(runner, inputs),
    }


def _loss_of(model_or_path: ModelOrPath, runner):
    """The loss of `compile` of a Keras model, or the one that its file states; None for others."""
    if isinstance(runner, File):
        return None
    if isinstance(model_or_path, (str, Path)):
        from kdistill.networks.saving import loss_of_file

        return loss_of_file(model_or_path)
    return getattr(runner, "loss", None)


def _one_row(examples) -> bool:
    """Whether examples may be images, or one array of other inputs, with one class for each."""
    if isinstance(examples, (tuple, list)):
        parts = list(examples)
    elif hasattr(examples, "images") and hasattr(examples, "labels"):
        parts = [examples.images, examples.labels]
    else:
        return True  # `_labeled` says what is expected
    several = [
        isinstance(part, Mapping) or (isinstance(part, (tuple, list)) and any(not np.isscalar(one) for one in part))
        for part in parts
    ]
    return len(parts) == 2 and not any(several)


def _measure_heads(runner, examples, teacher, batch_size: int, stated, head, loss) -> tuple[dict, dict]:
    """The metrics of outputs of any head, and the inputs."""
    examples = gather(examples, inputs_of_runner(runner))
    heads = heads_of_runner(runner, head, loss)
    inputs = _all_prepared(runner, examples.inputs, stated)
    outputs = by_head(outputs_of(runner, inputs, batch_size), heads)
    labels = rows_of(examples.labels, heads)
    if not labels:
        raise InputError("evaluate expects labels: Examples(inputs, labels) or (inputs, labels). None were received.")
    for name, mask in {} if isinstance(runner, File) else masks_of(runner, inputs).items():
        if name in labels:
            labels[name] = without_hidden(labels[name], mask)
    weights, teacher = rows_of(examples.weights, heads, "sample_weight"), rows_of(teacher, heads, "teacher_logits")
    metrics = {
        name: measure_output(heads[name], outputs[name], labels[name], weights.get(name), teacher.get(name), name)
        for name in heads
        if name in labels
    }
    return (next(iter(metrics.values())) if len(heads) == 1 else metrics), inputs


def predict(model_or_path: ModelOrPath, images, batch_size: int = 256, *, mean=None, std=None):
    """The logits of a `keras.Model`, a `.keras` file or a `.tflite` file, or what else it gives.

    Args:
        model_or_path: the model, or the path of a `.keras` or `.tflite` file.
        images: `[n, h, w, c]`, raw pixels 0..255; or the inputs of another model: an array, a dict by name, or a tuple.
        batch_size: images per call.
        mean, std: as for `evaluate`.

    Returns float32 logits `[n, classes]`. A model that ends in a softmax yields the logarithms of its probabilities,
    whose softmax gives the same probabilities. Other outputs `[n, ...]` are returned as they are (labels, numbers,
    classes at positions); several in a dict by name.

    Raises `InputError` for a file that cannot be read, and a model that does not fit the inputs.

    Example:
        >>> predict("student.tflite", x_test).argmax(axis=1)
        array([7, 2, 1, ..., 4, 5, 6])
    """
    runner, stated = _open(model_or_path), normalization(mean, std)
    if not isinstance(images, (Mapping, tuple, list)) and not hasattr(images, "element_spec"):
        rows = _rows_of_classes(runner, _prepared(runner, images, stated), batch_size)
        if rows is not None:
            return rows
    inputs = gather(images, inputs_of_runner(runner), "inputs", with_labels=False).inputs
    outputs = outputs_of(runner, _all_prepared(runner, inputs, stated), batch_size)
    return next(iter(outputs.values())) if len(outputs) == 1 else outputs


def _all_prepared(runner, inputs: dict, stated) -> dict:
    if stated is None:
        return inputs
    if len(inputs) != 1 or next(iter(inputs.values())).ndim != 4:
        raise InputError("mean and std are for models of one image. Leave them out, and scale the inputs yourself.")
    return {name: _prepared(runner, images, stated) for name, images in inputs.items()}


def takes_raw_pixels(path: str | Path) -> bool:
    """Whether a `.tflite` has its normalization inside: its metadata state it, or its input can be nothing else."""
    return Path(path).suffix == ".tflite" and _has_own_normalization(File(path))


def _has_own_normalization(runner: Union[File, "keras.Model"]) -> bool:
    if not isinstance(runner, File):
        return False
    if runner.input["type"] == "uint8" and not runner.input["scale"]:
        return True
    document = (metadata.of_file(runner.path) or {}).get("document")
    values = document.get("input", {}).get("values") if isinstance(document, dict) else None
    return values == metadata.RAW_PIXELS


def _prepared(runner: Union[File, "keras.Model"], images, stated):
    """The images as the model gets them; `stated` as `normalization` returns it."""
    if stated is None:
        return images
    if _has_own_normalization(runner):
        raise InputError(f"'{runner.path}' takes raw pixels: its normalization is inside. Leave out mean and std.")
    return Normalized(images, *stated)


def _range_warning(runner: Union[File, "keras.Model"], examples: Examples, stated, batch_size: int) -> str | None:
    """Whether the accuracy is much higher with pixels of another range."""
    is_file = isinstance(runner, File)
    if is_file and runner.input["type"] != "float32":
        scale = runner.input["scale"]
        highest = (np.iinfo(runner.input["type"]).max - (runner.input["zero_point"] or 0)) * (scale or 1)
        if highest >= UNSCALED:  # the file was quantized for raw pixels
            return None
    return range_warning(
        examples.images,
        f"'{runner.path.name}'" if is_file else f"the model '{runner.name}'",
        None if is_file else runner,
        lambda images: _predict(runner, images, batch_size),
        examples.labels,
        stated,
        LABELED_FILE if is_file else LABELED,
    )


def predict_numbers(model_or_path: ModelOrPath, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """The outputs `[n, columns]` as they are, float32, whatever they mean; else as `predict`."""
    return _numbers(_open(model_or_path), images, batch_size)[0]


def _labeled(examples) -> Examples:
    """The examples of a pair (images, labels), or as they are."""
    if isinstance(examples, (tuple, list)) and len(examples) == 2:
        images, labels = (part if isinstance(part, EncodedImages) else np.asarray(part) for part in examples)
        if labels.ndim == 2:
            labels = labels[:, 0] if labels.shape[1] == 1 else labels.argmax(axis=1)
        if labels.dtype.kind == "f" and (labels == np.floor(labels)).all():
            labels = labels.astype(np.int64)
        examples = Examples(images, labels)
    if not hasattr(examples, "images") or not hasattr(examples, "labels"):
        raise InputError(
            f"evaluate expects kdistill.Examples or a pair (images, labels), received {type(examples).__name__}. "
            "Collect the batches of a data set in two arrays."
        )
    if len(examples.images) != len(examples.labels):
        counts = f"{len(examples.images)} and {len(examples.labels)}"
        raise InputError(f"evaluate expects as many images as labels, received {counts}.")
    return examples


def _open(model_or_path: ModelOrPath) -> Union[File, "keras.Model"]:
    if not isinstance(model_or_path, (str, Path)):
        if hasattr(model_or_path, "count_params"):
            # Of a Distiller, the student: the rest is of the training.
            return getattr(model_or_path, "student", model_or_path)
        raise InputError(f"Expected a keras.Model or a .keras or .tflite file, received {model_or_path!r}.")
    suffix = Path(model_or_path).suffix
    if suffix == ".tflite":
        return File(model_or_path)
    if suffix != ".keras":
        raise InputError(f"Expected a .keras or .tflite file, received '{model_or_path}'.")
    from kdistill.networks.saving import load_model

    return load_model(model_or_path)


def _rows_of_classes(runner: Union[File, "keras.Model"], images, batch_size: int) -> np.ndarray | None:
    """The logits `[n, classes]` of a model with one input and one row of exclusive classes; None for others."""
    if isinstance(runner, File):
        if len(runner.inputs) > 1 or not runner.exclusive or runner.input["type"] in WHOLE:
            return None
    elif not gives_one_row(runner):
        return None
    numbers, kind = _numbers(runner, images, batch_size)
    if kind not in MAIN_OUTPUTS:
        return None
    return logits_of_probabilities(numbers) if kind == "probabilities" else numbers


def _predict(runner: Union[File, "keras.Model"], images: np.ndarray, batch_size: int) -> np.ndarray:
    numbers, kind = _numbers(runner, images, batch_size)
    if isinstance(runner, File):
        subject = f"The output '{runner.output['name']}' of '{runner.path}'"
    else:
        subject = subject_of(runner, "model")
    exclusive_kind(kind, subject, "Name the output of exclusive classes: keras.Model(image, {'logits': ...}).")
    return logits_of_probabilities(numbers) if kind == "probabilities" else numbers


def _numbers(runner: Union[File, "keras.Model"], images: np.ndarray, batch_size: int) -> tuple[np.ndarray, str]:
    """The outputs `[n, columns]` as they are, and what they are, see `kind_of`."""
    if not isinstance(runner, File):
        return _keras_numbers(runner, images, batch_size)
    numbers = runner.predict(images, batch_size)
    if not runner.exclusive:
        return numbers, "labels" if runner.sigmoid else "numbers" if numbers.shape[1] == 1 else "unclear"
    if runner.probabilities or runner.output["name"] == "logits":
        return numbers, "probabilities" if runner.probabilities else "logits"
    return numbers, kind_of(numbers, lambda: "unknown")


def _keras_numbers(model: "keras.Model", images: np.ndarray, batch_size: int) -> tuple[np.ndarray, str]:
    import tensorflow as tf

    shape = getattr(model, "input_shape", (None, *images.shape[1:]))
    if len(shape) != images.ndim or any(a not in (b, None) for a, b in zip(shape[1:], images.shape[1:], strict=True)):
        raise InputError(f"The model '{model.name}' expects images {shape}, received {images.shape}.")
    if not len(images):
        raise InputError("Expected at least one image, received none.")
    call = _traced(model, images.shape[1:])
    batches = (images[start : start + batch_size] for start in range(0, len(images), batch_size))
    outputs = [main_output(call(tf.constant(batch, tf.float32)), model.name) for batch in batches]
    if not tf.is_tensor(outputs[0]) or outputs[0].shape.rank != 2:
        raise InputError(f"The model '{model.name}' has no single output [batch, classes].")
    numbers, structure = tf.cast(tf.concat(outputs, 0), tf.float32).numpy(), call.structured_outputs
    if isinstance(structure, dict):  # the name states the kind
        return numbers, next(name for name in MAIN_OUTPUTS if name in structure)
    return numbers, kind_of(numbers, lambda: end_of(call.outputs[0]))


def _keras_latency(model: "keras.Model", images: np.ndarray, warmup: int = 10, runs: int = 100) -> float:
    """Median microseconds of one image, after warm-up calls; the tensor is ready before the clock starts."""
    import tensorflow as tf

    if isinstance(images, Mapping):
        call = traced(model, images)
        image = constants(model, {name: array[:1] for name, array in images.items()})
    else:
        call, image = _traced(model, images.shape[1:]), tf.constant(images[:1], tf.float32)
    times = []
    for i in range(warmup + runs):
        start = time.perf_counter_ns()
        _wait(call(image))
        if i >= warmup:
            times.append((time.perf_counter_ns() - start) / 1000)
    return float(np.median(times))


def _wait(outputs) -> None:
    """Returns when the numbers are computed."""
    import tensorflow as tf

    for output in tf.nest.flatten(outputs):
        output.numpy()


def _traced(model: "keras.Model", shape: tuple[int, ...]):
    import tensorflow as tf

    # The concrete function: TensorFlow warns of retracing when many tf.functions are called.
    image = tf.TensorSpec([None, *shape], tf.float32)
    return tf.function(lambda batch: model(batch, training=False)).get_concrete_function(image)
