"""Keras 3's private names: the only module that uses them. Each function says what the public Keras lacks.

`tests/networks/test_keras_internals.py` fails first, and with the name, when a new Keras changes one of them.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import keras
import tensorflow as tf

LEAST_EPSILON = 1.001e-5  # of a normalization, for cuDNN
FAST_CHANNELS = 16  # oneDNN's kernel for 16-bit numbers is fast for multiples of this, and slow for others


def layers_of(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """All layers inside of a model or layer, at every depth, without itself.

    `keras.Model.layers` is one level deep, and a layer that holds layers, such as `Bidirectional`, has no public list.
    """
    return model._flatten_layers(include_self=False)


def leaf_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """The layers inside of a model, at every depth, that hold no other layers."""
    return [layer for layer in layers_of(model) if not layers_of(layer)]


def graph_of(model) -> keras.Function | None:
    """The graph of operations of a functional or a built Sequential model; None for anything else.

    A functional model is a `keras.Function`. A Sequential model keeps its own in `_functional`: `keras.Model(inputs,
    outputs)` on its tensors would lose the structure of its outputs.
    """
    graph = model._functional if isinstance(model, keras.Sequential) else model
    return graph if isinstance(graph, keras.Function) else None


def calls_its_graph(model: keras.Model) -> bool:
    """Whether the `call` of a functional or Sequential model is Keras's own, which runs its graph."""
    return type(model).call.__module__.partition(".")[0] == "keras"


def run_graph(graph: keras.Function, inputs, call: Callable):
    """The outputs of a graph on new inputs, where `call(operation, *args, **kwargs)` stands for each operation.

    `keras.models.clone_model` offers this for symbolic tensors only, and always builds a new model.
    """
    return graph._run_through_graph(inputs, operation_fn=lambda operation: operation, call_fn=call)


def operation_behind(tensor: keras.KerasTensor) -> keras.Operation:
    """The operation (often a layer) that computes a symbolic tensor.

    Keras has the public way from an operation to its tensors (`.output`), but none back.
    """
    return tensor._keras_history.operation


def call_count(operation: keras.Operation) -> int:
    """How often an operation is called in all graphs that it is part of.

    `operation.input` and `.output` show the first call and do not tell whether there are others.
    """
    return len(operation._inbound_nodes)


def consumers_of(operation: keras.Operation) -> list[keras.Operation]:
    """The operations that take the outputs of an operation, one entry per call. Keras has no public list of them."""
    return [node.operation for node in operation._outbound_nodes]


def takes_training(operation: keras.Operation) -> bool:
    """Whether an operation is a layer whose `call` has the argument `training`."""
    return "training" in getattr(operation, "call_signature_parameters", ())


def logits_before_softmax(tensor):
    """The tensor before the softmax or sigmoid activation that gave `tensor`, or None.

    Keras attaches it to the activation's output, for its own cross-entropies; no public function returns it.
    """
    return getattr(tensor, "_keras_logits", None)


def with_last_axis(tensor):
    """`tensor[..., None]`, with the numbers before its softmax or sigmoid, which Keras's losses look for."""
    logits, expanded = logits_before_softmax(tensor), tensor[..., None]
    if logits is not None:
        expanded._keras_logits = logits[..., None]
    return expanded


def mask_of(tensor):
    """The mask of the positions of `tensor`, such as of an Embedding with `mask_zero`, or None.

    Keras passes it from layer to layer and to its losses; no public function returns it.
    """
    return getattr(tensor, "_keras_mask", None)


def moments_of(optimizer: keras.optimizers.Adam, variable) -> tuple:
    """Adam's mean and mean square of the gradients of a variable: `(momentum, velocity)`.

    The public `optimizer.variables` is one flat list, with no link to the model's variables.
    """
    index = optimizer._get_variable_index(variable)
    return optimizer._momentums[index], optimizer._velocities[index]


def momentum_of(optimizer: keras.optimizers.SGD, variable):
    """SGD's momentum of a variable. `optimizer.momentums` is public, the index of a variable in it is not."""
    return optimizer.momentums[optimizer._get_variable_index(variable)]


def loss_tracker(model: keras.Model) -> keras.metrics.Metric | None:
    """The metric `loss` that `compile` creates; None before. `model.metrics` contains it, but does not mark it."""
    return model._loss_tracker


@contextlib.contextmanager
def stand_in(variables: Sequence[keras.Variable], values: Sequence) -> Iterator[None]:
    """Inside of the block, each Keras variable reads and writes the TensorFlow variable of `values` in its place.

    So a whole training step, with its optimizer and metrics, is traced with variables that are arguments. The public
    `stateless_call` and `stateless_apply` return new values instead, which would have to be copied back.
    """
    before = [variable._value for variable in variables]
    try:
        for variable, value in zip(variables, values, strict=True):
            variable._value = value
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable._value = value


@contextlib.contextmanager
def fused_normalization(model: keras.Model) -> Iterator[None]:
    """Inside of the block, each `BatchNormalization` of the model trains with TensorFlow's one operation for it.

    Keras's own call takes a dozen operations (https://github.com/keras-team/keras-core/issues/225), a quarter of the
    time that a small convolutional network trains on a CPU. The results are the same up to rounding, and the layers
    are as before after the block. What the operation does not compute stays with Keras: masks, renormalization, an
    axis that is not the last, float64, and several replicas, whose batches the operation does not see.
    """
    alone = tf.distribute.get_strategy().num_replicas_in_sync == 1
    norms = {id(layer): layer for layer in layers_of(model) if alone and _has_one_operation(layer)}.values()
    try:
        for norm in norms:
            norm.call = functools.partial(_normalize, norm)  # found before the method of the class
        yield
    finally:
        for norm in norms:
            vars(norm).pop("call", None)


def _has_one_operation(layer: keras.layers.Layer) -> bool:
    """Whether TensorFlow has one operation for what this layer computes in training."""
    if getattr(type(layer), "call", None) is not keras.layers.BatchNormalization.call or not layer.built:
        return False
    is_last = layer.axis in (-1, layer.input_spec.ndim - 1)
    return is_last and layer.trainable and not layer.renorm and layer.epsilon >= LEAST_EPSILON


def _normalize(layer: keras.layers.BatchNormalization, inputs, training=None, mask=None):
    """The outputs of a `BatchNormalization`, and its new moving statistics, as its own `call` gives them."""
    if not training or mask is not None or inputs.dtype == tf.float64:
        return type(layer).call(layer, inputs, training=training, mask=mask)
    channels = inputs.shape[-1]
    # Keras computes in float32 what comes in 16 bits, and so does the operation, which saves the copy in float32.
    given = inputs if channels % FAST_CHANNELS == 0 else tf.cast(inputs, tf.float32)
    pixels = given if len(given.shape) == 4 else tf.reshape(given, (-1, 1, 1, channels))
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=pixels,
        scale=tf.cast(layer.gamma, tf.float32) if layer.scale else tf.ones(channels),
        offset=tf.cast(layer.beta, tf.float32) if layer.center else tf.zeros(channels),
        mean=tf.zeros(0),
        variance=tf.zeros(0),
        epsilon=layer.epsilon,
        is_training=True,
    )
    count = tf.cast(tf.size(pixels) // channels, tf.float32)
    variance *= (count - 1) / count  # the operation divides by count - 1, Keras by count
    for moving, value in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        moving.assign(tf.cast(moving, tf.float32) * layer.momentum + value * (1 - layer.momentum))
    outputs = outputs if pixels is given else tf.reshape(outputs, tf.shape(inputs))
    # A ReLU that follows would become part of oneDNN's operation, in which it makes 0 of NaN: a student that diverges
    # would have a finite loss.
    return tf.cast(tf.ensure_shape(outputs, inputs.shape), layer.compute_dtype)


class OwnBuild:
    """A base class beside `keras.Model`: `fit` and `evaluate` call `build_before_fit` before the first batch.

    Keras builds a model and its optimizer with a batch reduced over the replicas, which fails on several workers, and
    offers no public method to replace that.
    """

    def build_before_fit(self) -> bool:
        """Builds what training needs. False leaves it to Keras."""
        return False

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if not self.build_before_fit():
            super()._maybe_symbolic_build(iterator=iterator, data_batch=data_batch)
