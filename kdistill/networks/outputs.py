"""The outputs of a model as tensors: their logits inside of a training step, and the operation that computes them."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from kdistill.errors import InputError
from kdistill.networks.heads import BFLOAT16_ROUNDING, CLASSES, LABELS, NUMBERS, ROUNDING, TINIEST

if TYPE_CHECKING:
    import tensorflow as tf


def as_logits(outputs, kind: str | None = None, meaning: str = CLASSES) -> "tf.Tensor":
    """The logits `[batch, ..., n]` of the outputs of a model or function, or numbers as they are.

    Args:
        outputs: eager, or of a graph.
        kind: `logits` and `numbers` are the outputs themselves. `probabilities` become the tensor before their softmax
            or sigmoid, and where that is unknown their logarithm or log-odds. None: the numbers of this batch decide.
        meaning: `classes`, `labels` or `numbers`.

    Raises `InputError` for several outputs, for other shapes, and for a single class.
    """
    import tensorflow as tf

    check_shape(outputs, meaning=meaning)
    if kind == "logits" or meaning == NUMBERS:
        return outputs
    logits = _before("Softmax" if meaning == CLASSES else "Sigmoid", outputs)
    if logits is not None:
        return logits
    numbers = tf.cast(outputs, tf.float32)
    if meaning == LABELS:
        log_odds = tf.math.log(tf.maximum(numbers, TINIEST)) - tf.math.log(tf.maximum(1.0 - numbers, TINIEST))
        if kind == "probabilities":
            return log_odds
        return tf.where(tf.reduce_all((numbers >= 0) & (numbers <= 1)), log_odds, numbers)
    logits = tf.math.log(tf.maximum(numbers, TINIEST))
    if kind == "probabilities":
        return logits
    rounding = BFLOAT16_ROUNDING if outputs.dtype == tf.bfloat16 else ROUNDING
    sums = tf.reduce_sum(numbers, axis=-1)
    distributions = tf.reduce_all(numbers >= 0) & tf.reduce_all(tf.abs(sums - 1.0) < rounding)
    return tf.where(distributions, logits, numbers)


def _before(activation: str, outputs) -> "tf.Tensor | None":
    """The tensor before the activation (`Softmax`, `Sigmoid`) of the outputs, where Keras or the graph has it."""
    import tensorflow as tf

    from kdistill.networks.keras_internals import logits_before_softmax

    logits = logits_before_softmax(outputs)
    if tf.is_symbolic_tensor(outputs):
        if outputs.op.type != activation:  # such as a sigmoid, for which Keras has logits too
            return None
        return outputs.op.inputs[0] if logits is None else logits
    return logits if kept_end(outputs) == activation.lower() else None


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


def check_shape(outputs, subject: str = "The model's output", meaning: str = CLASSES) -> None:
    """Raises `InputError` for anything but one tensor `[batch, ..., n]`, of exclusive classes with n of 2 or more."""
    if isinstance(outputs, (dict, list, tuple)):
        raise InputError(
            f"The model gives {len(outputs)} outputs; kdistill distills one tensor of logits [batch, classes]. "
            "Wrap it: keras.Model(model.inputs, <the output to distill>)."
        )
    if not outputs.dtype.is_floating:
        raise InputError(f"{subject} has the type {outputs.dtype.name}; expected floating-point numbers.")
    rank, width = outputs.shape.rank, outputs.shape[-1] if outputs.shape.rank else None
    if meaning == NUMBERS and rank:
        return
    if rank is None or rank < 2 or (meaning == CLASSES and width == 1):
        raise InputError(
            f"{subject} has shape {tuple(outputs.shape)}; expected logits [batch, ..., classes] with 2 classes or "
            "more. State what one number for each example means: head='labels' (a binary problem) or head='numbers'."
        )


# TensorFlow's graph has the operations of Keras's layers, lambdas, subclassed models and functions alike.
# Their first input; what is interpolated between distributions is a distribution.
SAME = {"Identity", "StopGradient", "EnsureShape", "Cast", "Reshape", "Squeeze", "ExpandDims", "ClipByValue"}
SAME |= {"ResizeBilinear", "ResizeNearestNeighbor"}
SCORES = {"MatMul", "BatchMatMulV2", "Einsum", "Conv2D", "FusedBatchNormV3", "LogSoftmax", "Relu", "LeakyRelu", "Tanh"}
SCORES |= {"Conv2DBackpropInput", "Conv3D", "DepthwiseConv2dNative"}
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
    # Without an assignment expression, which AutoGraph cannot read: it would warn in the middle of a training.
    ends = [end for end in [_end(tensor.op, depth - 1) for tensor in operation.inputs] if end]
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


def ends_of_call(call: Callable, inputs) -> list[str]:
    """As `end_of_call`, for each of the outputs, in the order of `tf.nest.flatten`."""
    import tensorflow as tf

    specs = tf.nest.map_structure(lambda tensor: tf.TensorSpec(tensor.shape, tensor.dtype), inputs)
    try:
        outputs = tf.function(call, autograph=False).get_concrete_function(specs).structured_outputs
        return [end_of(output) for output in tf.nest.flatten(outputs)]
    except Exception:  # what a user's function may raise
        return []
