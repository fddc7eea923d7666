"""A copy of a trained teacher that computes the same in less time, for inference only.

Batch normalization after a convolution or a dense layer becomes part of its weights. On request all layers but the last
compute in bfloat16. The copy is a snapshot: it does not follow later changes of the model's weights.
"""

import time
from collections.abc import Collection

import keras
import numpy as np
import tensorflow as tf

from kdistill.errors import CheckFailed, InputError
from kdistill.networks.copying import clone, copy_weights, difference
from kdistill.networks.keras_internals import call_count, consumers_of, graph_of, layers_of, operation_behind
from kdistill.networks.outputs import as_logits

FOLDABLE = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
MOST_CHANGE = 0.1  # largest mean difference of the logits in another precision, as a share of their spread
LEAST_AGREEMENT = 0.95  # smallest share of images with the same predicted class in another precision
TIMED_IMAGES, COMPARED_AT_ONCE = 64, 32
TOLERANCE = 1e-3  # largest mean difference of the logits through folding in float32, as a share of their spread


def inference_copy(model: keras.Model, precision: str | None = None, taps: Collection[str] = ()) -> keras.Model:
    """A copy of a model for inference.

    Args:
        precision: a dtype policy such as `mixed_bfloat16` for all layers but the last. None keeps the model's own.
        taps: names of layers that keep their outputs: no normalization is folded into them.

    Returns:
        The copy. The model itself where no copy is possible (subclassed and nested models), and where nothing can be
        folded and no precision is requested.
    """
    if type(model) is not keras.Sequential and not is_functional(model):
        return model
    layers = layers_of(model)
    if any(isinstance(layer, keras.Model) for layer in layers):
        return model
    norm_after = _foldable_norms(model, taps)
    if not norm_after and precision is None:
        return model
    norms, last = set(norm_after.values()), {operation_behind(tensor) for tensor in model.outputs}

    def copy(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if precision is not None and layer not in last:
            config["dtype"] = precision
        if layer in norms:
            return keras.layers.Identity(name=layer.name, dtype=config["dtype"])
        if layer in norm_after:
            config["use_bias"] = True
        return type(layer).from_config(config)

    def call(layer, *args, **kwargs):
        if isinstance(layer, keras.layers.Identity):  # it does not take the options of the normalization it replaces
            return layer(*args)
        return layer(*args, **kwargs)

    twin = keras.models.clone_model(graph_of(model), clone_function=copy, call_function=call)
    for layer in model.layers:
        if layer in norm_after:
            twin.get_layer(layer.name).set_weights(_folded_weights(layer, norm_after[layer]))
        elif layer not in norms and not isinstance(layer, keras.layers.InputLayer):
            copy_weights(layer, twin.get_layer(layer.name), compare=False)
    return twin


def is_functional(model: keras.Model) -> bool:
    """Whether a model is a graph of layers, `keras.Model(inputs, outputs)`, and no subclass."""
    return type(model).__module__.startswith("keras.") and hasattr(model, "operations")


def _foldable_norms(model: keras.Model, taps: Collection[str]) -> dict:
    """The layers with a batch normalization that can be folded into them, and these normalizations."""
    return {layer: norm for layer in layers_of(model) if layer.name not in taps and (norm := _foldable_norm(layer))}


def _foldable_norm(layer) -> keras.layers.BatchNormalization | None:
    """The batch normalization of the layer's channels that is the only consumer of a linear layer, if there is one."""
    if type(layer) not in FOLDABLE or getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    if layer.activation is not keras.activations.linear or call_count(layer) != 1:
        return None
    consumers = consumers_of(layer)
    if len(consumers) != 1 or type(consumers[0]) is not keras.layers.BatchNormalization:
        return None
    norm = consumers[0]
    return norm if call_count(norm) == 1 and norm.axis in (-1, len(layer.output.shape) - 1) else None


def _folded_weights(layer, norm) -> list[np.ndarray]:
    """Kernel and bias of a layer that computes what layer and normalization compute together."""
    kernel = layer.kernel.numpy().astype(np.float64)
    bias = layer.bias.numpy().astype(np.float64) if layer.use_bias else 0.0
    scale = 1.0 / np.sqrt(norm.moving_variance.numpy().astype(np.float64) + norm.epsilon)
    if norm.scale:
        scale = scale * norm.gamma.numpy()
    shift = norm.beta.numpy() if norm.center else 0.0
    bias = (bias - norm.moving_mean.numpy()) * scale + shift
    if isinstance(layer, keras.layers.DepthwiseConv2D):
        scale = scale.reshape(kernel.shape[2:])
    return [(kernel * scale).astype(np.float32), bias.astype(np.float32)]


def logit_difference(model: keras.Model, twin: keras.Model, images: np.ndarray) -> tuple[float, float]:
    """The mean difference of two models' logits as a share of their spread, and the share of images for which both
    predict the same class."""
    images = np.asarray(images, np.float32)
    # Some at a time: outside of a graph all layers of a model keep their outputs until the last has run.
    parts = [images[start : start + COMPARED_AT_ONCE] for start in range(0, len(images), COMPARED_AT_ONCE)]
    one, two = (
        np.concatenate([np.asarray(as_logits(network(part, training=False)), np.float64) for part in parts])
        for network in (model, twin)
    )
    return float(np.abs(one - two).mean() / (one.std() + 1e-12)), float(np.mean(one.argmax(-1) == two.argmax(-1)))


def checked_inference_copy(
    model: keras.Model,
    images: np.ndarray,
    precision: str | None = None,
    say=print,
    taps: Collection[str] = (),
) -> keras.Model:
    """`inference_copy`, compared with the model on images. Reports through `say` how another precision changes logits.

    Raises:
        CheckFailed: if folding alone changes the logits, or another precision by too much, see `state_change`.
        InputError: if the model cannot be copied in `precision`.
    """
    folded = inference_copy(model, taps=taps)
    change, _ = logit_difference(model, folded, images) if folded is not model else (0.0, 1.0)
    if change > TOLERANCE and any(layer.compute_dtype != "float32" for layer in model.layers):
        folded = model  # the copy rounds in other places: no mistake, but not the same teacher
    elif change > TOLERANCE:
        inside = [layer.name for layer in _foldable_norms(model, taps)]  # they change, and the next layer does not
        cause = difference(model, folded, np.asarray(images[:2], np.float32), TOLERANCE, inside)
        raise CheckFailed(
            f"Folding batch normalization changes the teacher's logits by {change:.2g} of their spread: {cause} If it "
            "is a layer of Keras, this is a mistake in kdistill."
        )
    if precision is None:
        return folded
    if folded is model and inference_copy(model, precision, taps) is not model:
        clone(model)  # raises where a copy is another teacher already in the model's own precision
    twin = inference_copy(model, precision, taps)
    if twin is model:
        raise InputError(
            f"The teacher '{model.name}' cannot be copied in {precision}: it is a subclassed model, or contains "
            "another model. Omit teacher_precision."
        )
    state_change(model, folded, twin, images, precision, say)
    return twin


def state_change(
    model: keras.Model, folded: keras.Model, twin: keras.Model, images: np.ndarray, precision: str, say=print
) -> None:
    """States how a teacher in another precision changes its logits, its classes on images, and its speed here.

    `folded` is what runs without another precision. Raises `CheckFailed` where the logits or classes change too much.
    """
    change, agreement = logit_difference(model, twin, images)
    effect = (
        f"its logits change by {change:.2%} of their spread on average; it predicts the same class for "
        f"{agreement:.1%} of {len(images)} images"
    )
    if not change <= MOST_CHANGE or agreement < LEAST_AGREEMENT:
        raise CheckFailed(
            f"The teacher in {precision} is another teacher: {effect}. At most {MOST_CHANGE:.0%} and at least "
            f"{LEAST_AGREEMENT:.0%} are accepted. Use another teacher_precision, or omit it."
        )
    weighted = [layer for layer in layers_of(model) if layer.weights]
    if all(layer.dtype_policy.name == precision for layer in weighted):  # to omit it would change nothing here
        say(f"The teacher runs in {precision}, its own precision, with its normalization folded: {effect}.")
        return
    few = np.asarray(images[:TIMED_IMAGES], np.float32)
    times = _seconds(folded, few) / _seconds(twin, few)
    slower = "" if times >= 0.95 else " Omit teacher_precision: without it the teacher is faster here."
    say(
        f"The teacher runs in {precision}: {effect}. Its forward pass is {times:.2g} times as fast as without, on "
        f"{len(few)} images at a time.{slower}"
    )


def _seconds(model: keras.Model, images: np.ndarray) -> float:
    """The time of a compiled forward pass, the shortest of three."""
    call, batch, times = tf.function(lambda batch: model(batch, training=False)), tf.constant(images), []
    for _ in range(4):  # the first compiles
        start = time.perf_counter()
        np.asarray(call(batch))
        times.append(time.perf_counter() - start)
    return min(times[1:])
