"""What a model takes and what its output means: images in, logits or probabilities of exclusive classes out.

This is the one place that answers: are these numbers logits, how many classes are there, and which of several outputs
classifies. The teacher, the losses, the evaluation and the export ask here. The numbers answer, and where they leave
the question open, the operation that gives them.

The functions of arrays need NumPy only, so that a `.tflite` is evaluated without TensorFlow.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kdistill.errors import InputError

if TYPE_CHECKING:
    import keras
    import tensorflow as tf

MAIN_OUTPUTS = ("logits", "probabilities")  # of several outputs, the one of these names classifies
SMALLEST_PROBABILITY = 1e-7  # int8 files round small probabilities to exactly 0
TINIEST = 1e-30  # of a probability in a loss: large enough that the gradient 1 / p stays finite in float32
ROUNDING = 1e-3  # of the sum of a row of probabilities
BFLOAT16_ROUNDING = 1e-2
STEPS = (1 / 256, 1 / 32768)  # between quantized probabilities: LiteRT's scales for int8 and int16
LARGEST_ROUNDING = 0.1
SUPPORTED = (
    "kdistill supports exclusive classes: one output [batch, classes] of logits, or of probabilities after a softmax, "
    "with 2 classes or more."
)


class Head(NamedTuple):
    """What a model gives for an image: the kind of its numbers, and how many.

    `kind`: `logits` or `probabilities` of exclusive classes; else a name that `kind_of` returns.
    """

    kind: str
    classes: int

    @property
    def exclusive(self) -> bool:
        """Whether the numbers are logits or probabilities of exclusive classes."""
        return self.kind in MAIN_OUTPUTS

    @property
    def name(self) -> str:
        """The name of the output in a file. What is neither logits nor a distribution is called `outputs`."""
        return self.kind if self.exclusive else "outputs"


# -- numbers ----------------------------------------------------------------------------------------------------------


def are_probabilities(outputs: np.ndarray) -> bool:
    """Whether every row of `[n, classes]` is a distribution, as after a softmax. Logits practically never are."""
    outputs = np.asarray(outputs)
    if not len(outputs) or not (outputs >= 0).all():
        return False
    return bool((abs(outputs.sum(axis=1, dtype=np.float64) - 1) < _rounding(outputs)).all())


def _rounding(outputs: np.ndarray) -> float:
    """How far the sum of a row of probabilities may be from 1, in the precision in which they were computed."""
    numbers = np.ascontiguousarray(outputs, np.float32)
    for step in STEPS:
        if (numbers / step == np.round(numbers / step)).all():  # each number is rounded by up to half a step
            return max(BFLOAT16_ROUNDING, min(LARGEST_ROUNDING, outputs.shape[1] * step / 2))
    is_bfloat16 = not (numbers.view(np.uint32) & 0xFFFF).any()  # also after a cast to float32
    return BFLOAT16_ROUNDING if is_bfloat16 else ROUNDING


def kind_of(outputs: np.ndarray, end: Callable[[], str]) -> str:
    """What the numbers `[n, columns]` are.

    `logits` or `probabilities` of exclusive classes; `labels`, the sigmoids of independent labels; `numbers`, one for
    each example; or `unclear`, from 0 to 1 without a sum of 1.

    `end`: returns what `end_of` says of the operation that gives them. It is called only where it matters: numbers from
    0 to 1 are from a softmax, from sigmoids, or logits that happen to be small.
    """
    single = outputs.shape[1] == 1
    finite = outputs[np.isfinite(outputs).all(axis=1)]
    if len(finite) and ((finite < 0).any() or (finite > 1 + _rounding(finite)).any()):
        return "numbers" if single else "logits"
    operation = end()
    if operation == "sigmoid":
        return "labels"
    if single:
        return "numbers"
    if are_probabilities(finite) or (operation == "softmax" and not len(finite)):
        return "probabilities"
    # Zeros alone are a layer of logits that starts at zero: sigmoids and parts of a softmax are never all zero.
    return "logits" if operation == "scores" or not finite.any() else "unclear"


def logits_of_probabilities(probabilities: np.ndarray) -> np.ndarray:
    """Logits `[n, classes]` whose softmax gives these probabilities."""
    return np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))


def check_stated(kind: str | None) -> None:
    """Raises `InputError` for a value of an argument `outputs=` that is neither a kind of outputs nor None."""
    if kind not in (None, *MAIN_OUTPUTS):
        raise InputError(f"outputs expects 'logits', 'probabilities' or None, received {kind!r}.")


def exclusive_kind(kind: str, subject: str, advice: str = "") -> str:
    """The kind, if it is `logits` or `probabilities`; raises `InputError` for every other one.

    Args:
        subject: names the output, such as "The output 'scores' of the teacher 'net'".
        advice: a sentence on how to state the kind, for numbers that are unclear.
    """
    if kind in MAIN_OUTPUTS:
        return kind
    if kind == "labels":
        reason = (
            "ends in a sigmoid: each number is the probability of a label of its own, and such labels do not exclude "
            "each other"
        )
        advice = (
            "If every example has exactly one label, end the model in logits or a softmax (a binary problem: in two "
            "outputs, one for each class)."
        )
    elif kind == "numbers":
        reason = "gives one number for each example"
        advice = "For a binary problem give the model two outputs, one for each class."
    else:
        reason = "gives numbers from 0 to 1 that do not sum to 1, like sigmoids, or like some classes of a softmax"
    raise InputError(f"{subject} {reason}. {SUPPORTED} {advice}".rstrip())


# -- tensors, inside of a training step -------------------------------------------------------------------------------


def as_logits(outputs, kind: str | None = None) -> "tf.Tensor":
    """The logits `[batch, classes]` of the outputs of a model or function.

    Args:
        outputs: eager, or of a graph.
        kind: `logits` are the outputs themselves. `probabilities` become the tensor before their softmax, and where
            that is unknown their logarithm. None: the numbers of this batch decide.

    Raises `InputError` for several outputs, for other shapes, and for a single class.
    """
    import tensorflow as tf

    check_shape(outputs)
    if kind == "logits":
        return outputs
    logits = _before_softmax(outputs)
    if logits is not None:
        return logits
    numbers = tf.cast(outputs, tf.float32)
    logits = tf.math.log(tf.maximum(numbers, TINIEST))
    if kind == "probabilities":
        return logits
    rounding = BFLOAT16_ROUNDING if outputs.dtype == tf.bfloat16 else ROUNDING
    sums = tf.reduce_sum(numbers, axis=-1)
    distributions = tf.reduce_all(numbers >= 0) & tf.reduce_all(tf.abs(sums - 1.0) < rounding)
    return tf.where(distributions, logits, numbers)


def _before_softmax(outputs) -> "tf.Tensor | None":
    """The tensor before the softmax that gives the outputs, where Keras or the graph has it."""
    import tensorflow as tf

    from kdistill.networks.keras_internals import logits_before_softmax

    logits = logits_before_softmax(outputs)
    if tf.is_symbolic_tensor(outputs):
        if outputs.op.type != "Softmax":  # such as a sigmoid, for which Keras has logits too
            return None
        return outputs.op.inputs[0] if logits is None else logits
    return logits if kept_end(outputs) == "softmax" else None


def kept_end(outputs: "tf.Tensor") -> str | None:
    """`softmax` or `sigmoid`, where Keras kept the numbers before it with an eager tensor; else None."""
    import tensorflow as tf

    from kdistill.networks.keras_internals import logits_before_softmax

    logits = logits_before_softmax(outputs)
    if logits is None:
        return None
    ends = {"softmax": tf.nn.softmax(logits), "sigmoid": tf.nn.sigmoid(logits)}
    same = [name for name, numbers in ends.items() if bool(tf.reduce_all(numbers == outputs))]
    return same[0] if len(same) == 1 else None


def check_shape(outputs, subject: str = "The model's output") -> None:
    """Raises `InputError` for anything but one tensor `[batch, classes]` with 2 classes or more."""
    if isinstance(outputs, (dict, list, tuple)):
        raise InputError(
            f"The model gives {len(outputs)} outputs; kdistill distills one tensor of logits [batch, classes]. "
            "Wrap it: keras.Model(model.inputs, <the output to distill>)."
        )
    if outputs.shape.rank != 2 or outputs.shape[-1] == 1:
        raise InputError(
            f"{subject} has shape {tuple(outputs.shape)}; expected logits [batch, classes] with 2 classes or more. "
            "For a binary problem give the model two outputs, one for each class."
        )


# -- tensors, of a graph: how their numbers come about -----------------------------------------------------------------


# TensorFlow's graph has the operations of Keras's layers, lambdas, subclassed models and functions alike.
SAME = {"Identity", "StopGradient", "EnsureShape", "Cast", "Reshape", "Squeeze", "ClipByValue"}  # their first input
SCORES = {"MatMul", "BatchMatMulV2", "Einsum", "Conv2D", "FusedBatchNormV3", "LogSoftmax", "Relu", "LeakyRelu", "Tanh"}
MIXED = {"AddV2", "BiasAdd", "Sub", "Mul", "RealDiv", "Mean", "Max", "ConcatV2", "StridedSlice", "GatherV2"}
CLIPS = {"Maximum", "Minimum"}
CONSTANT = {"Const", "ReadVariableOp"}
DEEPEST = 12  # operations behind the output


def end_of(tensor: "tf.Tensor") -> str:
    """How the numbers of a tensor in a graph come about: `softmax`, `sigmoid`, `scores` or `unknown`.

    Scores are what a layer without activation gives. A reshape, a cast or a clip changes nothing; behind any other
    operation on a softmax or a sigmoid the end is unknown.
    """
    return _end(tensor.op, DEEPEST) or "unknown"


def _end(operation: "tf.Operation", depth: int) -> str | None:
    """As `end_of`; None for constants and weights."""
    if operation.type in ("Softmax", "Sigmoid"):
        return operation.type.lower()
    if operation.type in CONSTANT:
        return None
    if operation.type in SAME and depth:
        return _end(operation.inputs[0].op, depth - 1)
    if operation.type in SCORES:
        source = operation.inputs[0].op
        while source.type in SAME:
            source = source.inputs[0].op
        return "unknown" if source.type in ("Softmax", "Sigmoid") else "scores"
    if operation.type not in MIXED | CLIPS or not depth:
        return "unknown"
    ends = [end for tensor in operation.inputs if (end := _end(tensor.op, depth - 1))]
    if not ends:
        return None
    if operation.type in CLIPS and len(ends) == 1:
        return ends[0]
    linear = operation.type not in ("Mul", "RealDiv") or len(ends) == 1  # no exp(x) / sum(exp(x))
    return "scores" if linear and set(ends) == {"scores"} else "unknown"


def end_of_call(call: Callable, inputs) -> str:
    """`end_of` the output of a model or function for inputs like these; `unknown` where it cannot be traced."""
    import tensorflow as tf

    specs = tf.nest.map_structure(lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), inputs)
    try:
        return end_of(tf.function(call, autograph=False).get_concrete_function(specs).outputs[0])
    except Exception:  # a function of NumPy arrays, or what a user's function may raise
        return "unknown"


# -- arrays, of models and files --------------------------------------------------------------------------------------


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
