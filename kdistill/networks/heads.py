"""What a model takes and what its output means: the one place that says so."""

import keras
import numpy as np
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.networks.keras_internals import logits_before_softmax


def as_logits(outputs) -> tf.Tensor:
    """The logits of a model's outputs: what stood before a final softmax, or the outputs themselves.

    Keras keeps the tensor before a softmax activation on the tensor behind it, as its own cross-entropies use it.
    """
    if isinstance(outputs, (dict, list, tuple)):
        raise InputError(
            f"The model gives {len(outputs)} outputs; kdistill distills one tensor of logits [batch, classes]. "
            "Wrap it: keras.Model(model.inputs, <the output to distill>)."
        )
    logits = logits_before_softmax(outputs)
    logits = outputs if logits is None else logits
    if logits.shape.rank != 2 or logits.shape[-1] == 1:
        raise InputError(
            f"The model's output has shape {tuple(outputs.shape)}; expected logits [batch, classes] with 2 classes or "
            "more. For a binary problem give the model two outputs, one for each class."
        )
    return logits


SMALLEST = 1e-7  # a probability below this counts as this: int8 files round to exactly 0


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether every row is a distribution, as behind a softmax. Logits practically never are."""
    return bool(len(outputs) and (outputs >= 0).all() and (abs(outputs.sum(axis=1) - 1) < 1e-3).all())


def logits_of_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Logits `[n, classes]` whose softmax gives these probabilities."""
    return np.log(np.maximum(probabilities, SMALLEST))


MAIN = ("logits", "probabilities")  # of several outputs, the one that classifies


def image_shape(model: keras.Model) -> tuple[int, int, int]:
    """(height, width, channels) of the images that a model takes."""
    if not model.built:
        raise InputError(f"The model '{model.name}' is not built. Call it once on a batch of images before export.")
    try:
        shape = model.input_shape
    except AttributeError:  # a subclassed model; what it was built with is what it takes
        shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise InputError(
            f"The input shape of the subclassed model '{model.name}' is not known. "
            "Call model.build((None, height, width, channels)) before export."
        )
    if isinstance(shape, dict) or not all(size is None or isinstance(size, int) for size in shape):
        raise InputError(f"The model '{model.name}' has several inputs: {shape}. Export takes models with one image.")
    if len(shape) != 4 or None in shape[1:]:
        raise InputError(
            f"The model '{model.name}' takes {tuple(shape)}; export expects images [batch, height, width, channels] "
            "of a fixed size. Build it with keras.Input((height, width, channels))."
        )
    return tuple(shape[1:])


def main_output(outputs, model: str = "the model"):
    """The output that classifies: the only one, or of a dict the one named `logits` or `probabilities`."""
    if not isinstance(outputs, dict):
        return outputs
    found = [name for name in MAIN if name in outputs]
    if len(found) != 1:
        raise InputError(
            f"The model '{model}' has the outputs {', '.join(sorted(outputs))}. Of several, exactly one has to be "
            "named 'logits' or 'probabilities'. Build it with keras.Model(image, {'logits': ..., ...})."
        )
    return outputs[found[0]]


def kind_of(outputs: np.ndarray) -> str:
    """`logits` or `probabilities`, judged by the numbers."""
    return "probabilities" if are_probabilities(outputs) else "logits"


def output_of(model: keras.Model) -> tuple[str, int]:
    """`logits` or `probabilities`, whichever the model gives, and the number of classes; tried on noise.

    A model with several outputs gives a dict, in which one is named so; its name is believed.
    """
    outputs = outputs_on(model, noise_images(model))
    main = main_output(outputs, model.name)
    if not isinstance(main, np.ndarray) or main.ndim != 2:
        shape = getattr(main, "shape", type(main).__name__)
        raise InputError(
            f"The model '{model.name}' gives {shape}; export expects one output [batch, classes], or a dict with one "
            "such, named 'logits' or 'probabilities'. Wrap it: keras.Model(model.input, <the output to export>)."
        )
    if isinstance(outputs, dict):
        return next(name for name in outputs if outputs[name] is main), main.shape[1]
    return kind_of(main), main.shape[1]


def noise_images(model: keras.Model) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (4, *image_shape(model))).astype(np.float32)


def outputs_on(model: keras.Model, images: np.ndarray):
    try:
        outputs = model(images, training=False)
    except Exception as error:  # whatever a user's own layers may raise
        raise InputError(f"The model '{model.name}' does not run on images {images.shape}: {error}") from error
    if isinstance(outputs, dict):
        return {name: np.asarray(each, np.float32) for name, each in outputs.items()}
    return np.asarray(outputs, np.float32) if tf.is_tensor(outputs) else outputs
