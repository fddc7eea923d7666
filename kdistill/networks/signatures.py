"""What a whole model takes and gives: the shape of its images, its outputs, and what the main one means."""

from typing import TYPE_CHECKING

import numpy as np

from kdistill.errors import InputError
from kdistill.networks.heads import MAIN_OUTPUTS, Head, kind_of
from kdistill.networks.outputs import end_of_call

if TYPE_CHECKING:
    import keras


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


def image_shape(model: "keras.Model") -> tuple[int, int, int]:
    """(height, width, channels) of the images for a model; 1 channel for a model that takes (height, width)."""
    shape = input_shape(model)
    return shape if len(shape) == 3 else (*shape, 1)


def input_shape(model: "keras.Model") -> tuple[int, ...]:
    """(height, width, channels) or (height, width), which a model takes."""
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
    if len(shape) not in (3, 4) or None in shape[1:]:
        raise InputError(
            f"The model '{model.name}' takes {tuple(shape)}; export expects images [batch, height, width, channels] "
            "of a fixed size. Build it with keras.Input((height, width, channels))."
        )
    _check_channels_last(model, tuple(shape[1:]))
    return tuple(shape[1:])


def _check_channels_last(model: "keras.Model", shape: tuple[int, ...]) -> None:
    """Raises `InputError` for a model that takes (channels, height, width)."""
    from kdistill.networks.keras_internals import layers_of

    if len(shape) != 3 or shape[0] not in (1, 3) or shape[2] in (1, 3):
        return
    for layer in layers_of(model):
        moves = getattr(layer, "dims", None) == (2, 3, 1)  # a Permute
        if moves or getattr(layer, "data_format", None) == "channels_first":
            reason = "moves the channels to the end" if moves else "has data_format='channels_first'"
            raise InputError(
                f"The model '{model.name}' takes images channels first, {shape}: its layer '{layer.name}' {reason}. "
                "kdistill takes [batch, height, width, channels]. Build it with data_format='channels_last', or put "
                f"keras.layers.Permute((3, 1, 2)) before it: image = keras.Input({(*shape[1:], shape[0])}); "
                "keras.Model(image, model(keras.layers.Permute((3, 1, 2))(image)))."
            )


def subject_of(model, role: str) -> str:
    """Names the output of a model or function for messages: "The output 'scores' of the teacher 'net'"."""
    name = getattr(model, "name", None)
    if not isinstance(name, str):
        return f"The output of the {role}"
    from kdistill.networks.keras_internals import graph_of

    names = getattr(graph_of(model), "output_names", None) or ()
    return f"The output {f'{names[0]!r} ' if len(names) == 1 else ''}of the {role} {name!r}"


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

    def call(images):
        return main_output(model(images, training=False), model.name)

    images = noise_images(model)
    outputs = numpy_outputs(model, images)
    main = main_output(outputs, model.name)
    if not isinstance(main, np.ndarray) or main.ndim != 2:
        shape = getattr(main, "shape", type(main).__name__)
        raise InputError(
            f"The model '{model.name}' gives {shape}; export expects one output [batch, classes], or a dict with one "
            "such, named 'logits' or 'probabilities'. Wrap it: keras.Model(model.input, <the output to export>)."
        )
    if isinstance(outputs, dict):
        return Head(next(name for name in outputs if outputs[name] is main), main.shape[1])
    return Head(kind_of(main, lambda: end_of_call(call, images)), main.shape[1])


def noise_images(model: "keras.Model") -> np.ndarray:
    """Four images of random pixels, 0 to 255, float32, in the shape that a model takes; always the same."""
    return np.random.default_rng(0).integers(0, 256, (4, *input_shape(model))).astype(np.float32)


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
