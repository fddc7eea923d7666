"""One measure for Keras models and `.tflite` files. TensorFlow is imported for Keras models only."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np

from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.evaluation.metrics import measure
from kdistill.files import sizes
from kdistill.networks.heads import are_probabilities, logits_of_probabilities
from kdistill.tflite.interpreter import File

if TYPE_CHECKING:
    import keras


ModelOrPath = Union["keras.Model", str, Path]


def evaluate(
    model_or_path: ModelOrPath,
    examples: Examples,
    teacher_logits: np.ndarray | None = None,
    batch_size: int = 256,
    logits: np.ndarray | None = None,
) -> dict:
    """Measures a `keras.Model`, a `.keras` file or a `.tflite` file on labeled images.

    `logits` are what `predict` gave for these images, where that is known: the model is not run over them again.
    Returns accuracy, top5, ece, with `teacher_logits` (`[n, classes]`) also agreement and kl (see `measure`), and
    parameters (None for a .tflite), bytes and deflated (of the file, else None) and microseconds: the median time of
    one image. For a .tflite that is a call of the interpreter on one CPU thread; for a Keras model a call of its
    `tf.function` with as many threads as TensorFlow takes, so the two do not compare as devices would.
    Raises `InputError` for a file that cannot be read or that does not fit the images, `CheckFailed` for outputs that
    are not finite.
    """
    runner = _opened(model_or_path)
    logits = _logits(runner, examples.images, batch_size) if logits is None else logits
    found = measure(logits, examples.labels, teacher_logits)
    is_file = isinstance(model_or_path, (str, Path))
    found["parameters"] = None if isinstance(runner, File) else runner.count_params()
    found["bytes"] = Path(model_or_path).stat().st_size if is_file else None
    found["deflated"] = sizes(Path(model_or_path).read_bytes())["deflated"] if is_file else None
    latency = runner.latency()["median_us"] if isinstance(runner, File) else _keras_latency(runner, examples.images)
    found["microseconds"] = latency
    return found


def predict(model_or_path: ModelOrPath, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
    """float32 logits `[n, classes]` of images `[n, h, w, c]`, raw pixels 0..255.

    A model that ends in a softmax gives the logarithms of its probabilities: logits, whose softmax is what it gave.
    """
    return _logits(_opened(model_or_path), images, batch_size)


def _opened(model_or_path: ModelOrPath) -> Union[File, "keras.Model"]:
    if not isinstance(model_or_path, (str, Path)):
        if hasattr(model_or_path, "count_params"):
            return model_or_path
        raise InputError(f"Expected a keras.Model or a .keras or .tflite file, received {model_or_path!r}.")
    kind = Path(model_or_path).suffix
    if kind == ".tflite":
        return File(model_or_path)
    if kind != ".keras":
        raise InputError(f"Expected a .keras or .tflite file, received '{model_or_path}'.")
    from kdistill.networks.saving import load_model

    return load_model(model_or_path)


def _logits(runner: Union[File, "keras.Model"], images: np.ndarray, batch_size: int) -> np.ndarray:
    if isinstance(runner, File):
        outputs = runner.predict(images, batch_size)
        return logits_of_probabilities(outputs) if runner.probabilities else outputs
    outputs = _keras_outputs(runner, images, batch_size)
    return logits_of_probabilities(outputs) if are_probabilities(outputs) else outputs


def _keras_outputs(model: "keras.Model", images: np.ndarray, batch_size: int) -> np.ndarray:
    import tensorflow as tf

    from kdistill.networks.heads import main_output

    shape = getattr(model, "input_shape", (None, *images.shape[1:]))
    if len(shape) != images.ndim or any(a not in (b, None) for a, b in zip(shape[1:], images.shape[1:], strict=True)):
        raise InputError(f"The model '{model.name}' expects images {shape}, received {images.shape}.")
    if not len(images):
        raise InputError("Received no image.")
    call = _traced(model, images.shape[1:])
    starts = range(0, len(images), batch_size)
    found = [
        main_output(call(tf.constant(images[start : start + batch_size], tf.float32)), model.name) for start in starts
    ]
    if not tf.is_tensor(found[0]) or found[0].shape.rank != 2:
        raise InputError(f"The model '{model.name}' gives no single output [batch, classes].")
    return tf.cast(tf.concat(found, 0), tf.float32).numpy()


def _keras_latency(model: "keras.Model", images: np.ndarray, warmup: int = 10, runs: int = 100) -> float:
    """Median microseconds of one image, after warm-up calls; the tensor is ready before the clock starts."""
    import tensorflow as tf

    call, image = _traced(model, images.shape[1:]), tf.constant(images[:1], tf.float32)
    times = []
    for i in range(warmup + runs):
        start = time.perf_counter_ns()
        _wait(call(image))
        if i >= warmup:
            times.append((time.perf_counter_ns() - start) / 1000)
    return float(np.median(times))


def _wait(outputs) -> None:
    """Until the numbers are there."""
    for each in outputs.values() if isinstance(outputs, dict) else (outputs,):
        each.numpy()


def _traced(model: "keras.Model", shape: tuple[int, ...]):
    import tensorflow as tf

    # The concrete function: calling many tf.functions makes TensorFlow warn of tracing too often.
    image = tf.TensorSpec([None, *shape], tf.float32)
    return tf.function(lambda batch: model(batch, training=False)).get_concrete_function(image)
