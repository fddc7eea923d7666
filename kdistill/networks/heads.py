"""What a model takes and what its output means: images in, logits or probabilities of classes out.

This is the one place that answers: are these numbers logits, how many classes are there, and which of several outputs
classifies. The teacher, the losses, the evaluation and the export ask here.

The functions of arrays need NumPy only, so that a `.tflite` is evaluated without TensorFlow.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kdistill.errors import InputError

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

MAIN_OUTPUTS = ("logits", "probabilities")  # of several outputs, the one of these names classifies
SMALLEST_PROBABILITY = 1e-7  # int8 files round small probabilities to exactly 0


class Head(NamedTuple):
    """What a classifier gives: the kind of its numbers, `logits` or `probabilities`, and the number of classes."""

    kind: str
    classes: int


# -- tensors, inside of a training step -------------------------------------------------------------------------------


def as_logits(outputs) -> "tf.Tensor":
    """The logits `[batch, classes]` of a model's outputs: the tensor before a final softmax, or the outputs themselves.

    Raises `InputError` for several outputs, for other shapes, and for a single class.
    """
    from kdistill.networks.keras_internals import logits_before_softmax

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


# -- arrays, of models and files --------------------------------------------------------------------------------------


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether every row of `[n, classes]` is a distribution, as after a softmax. Logits practically never are."""
    return bool(len(outputs) and (outputs >= 0).all() and (abs(outputs.sum(axis=1) - 1) < 1e-3).all())


def output_kind(outputs: np.ndarray) -> str:
    """`logits` or `probabilities`, judged by the numbers `[n, classes]`."""
    return "probabilities" if are_probabilities(outputs) else "logits"


def logits_of_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Logits `[n, classes]` whose softmax gives these probabilities."""
    return np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))


def main_output(outputs, model: str = "the model"):
    """The output that classifies: the only one, or in a dict the one named `logits` or `probabilities`."""
    if not isinstance(outputs, dict):
        return outputs
    names = [name for name in MAIN_OUTPUTS if name in outputs]
    if len(names) != 1:
        raise InputError(
            f"The model '{model}' has the outputs {', '.join(sorted(outputs))}; expected exactly one named 'logits' or "
            "'probabilities'. Build it with keras.Model(image, {'logits': ..., ...})."
        )
    return outputs[names[0]]


# -- models -----------------------------------------------------------------------------------------------------------


def image_shape(model: "keras.Model") -> tuple[int, int, int]:
    """(height, width, channels) of the images that a model takes."""
    if not model.built:
        raise InputError(f"The model '{model.name}' is not built. Call it once on a batch of images before export.")
    try:
        shape = model.input_shape
    except AttributeError:  # a subclassed model takes the shape that it was built with
        shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise InputError(
            f"The subclassed model '{model.name}' does not state its input shape. "
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


def class_count(model) -> int | None:
    """The number of classes of a Keras model with one output, where its graph states it; else None. Nothing is run."""
    try:
        shape = model.output_shape
    except (AttributeError, ValueError):
        return None
    return shape[-1] if isinstance(shape, tuple) and shape and isinstance(shape[-1], int) else None


def head_of(model: "keras.Model") -> Head:
    """What a model gives, from its outputs on four images of noise.

    In a dict of outputs, the name `logits` or `probabilities` decides the kind, not the numbers.
    """
    outputs = numpy_outputs(model, noise_images(model))
    main = main_output(outputs, model.name)
    if not isinstance(main, np.ndarray) or main.ndim != 2:
        shape = getattr(main, "shape", type(main).__name__)
        raise InputError(
            f"The model '{model.name}' gives {shape}; export expects one output [batch, classes], or a dict with one "
            "such, named 'logits' or 'probabilities'. Wrap it: keras.Model(model.input, <the output to export>)."
        )
    if isinstance(outputs, dict):
        return Head(next(name for name in outputs if outputs[name] is main), main.shape[1])
    return Head(output_kind(main), main.shape[1])


def noise_images(model: "keras.Model") -> np.ndarray:
    """Four images of random pixels, 0 to 255, float32, in the shape that a model takes; always the same."""
    return np.random.default_rng(0).integers(0, 256, (4, *image_shape(model))).astype(np.float32)


def numpy_outputs(model: "keras.Model", images: np.ndarray):
    """The outputs of a model on images, as float32 arrays. Raises `InputError` where the model does not run."""
    import tensorflow as tf

    try:
        outputs = model(images, training=False)
    except Exception as error:  # a user's own layers may raise anything
        raise InputError(f"The model '{model.name}' does not run on images {images.shape}: {error}") from error
    if isinstance(outputs, dict):
        return {name: np.asarray(output, np.float32) for name, output in outputs.items()}
    return np.asarray(outputs, np.float32) if tf.is_tensor(outputs) else outputs
