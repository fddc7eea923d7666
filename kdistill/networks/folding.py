"""A copy of a trained model that computes the same in less time: for teachers, which are only ever asked.

Batch normalization behind a convolution or a dense layer becomes part of its weights; on request all but the last layer
computes in bfloat16. The copy is a snapshot: it does not follow later changes of the model's weights.
"""

from collections.abc import Collection

import keras
import numpy as np

from kdistill.errors import CheckFailed, InputError
from kdistill.networks.heads import as_logits
from kdistill.networks.keras_internals import call_count, consumers_of, graph_of, layers_of, operation_behind

FOLDED = (keras.layers.Conv2D, keras.layers.DepthwiseConv2D, keras.layers.Dense)
SAME = 1e-3  # largest difference of logits that folding may make, as a share of their spread, in float32


def compiled(model: keras.Model, precision: str | None = None, taps: Collection[str] = ()) -> keras.Model:
    """The model for inference; `precision` is a dtype policy such as `mixed_bfloat16`, None keeps the model's own.

    Layers named in `taps` give what they give in the model: a normalization is not folded into one of them.

    What cannot be copied so (subclassed and nested models) is returned as it is, and so is a model in which there is
    nothing to fold if no precision is asked for.
    """
    if type(model) is not keras.Sequential and not is_functional(model):
        return model
    layers = layers_of(model)
    if any(isinstance(layer, keras.Model) for layer in layers):
        return model
    before = {layer: norm for layer in layers if layer.name not in taps and (norm := _norm_behind(layer))}
    if not before and precision is None:
        return model
    norms, last = set(before.values()), {operation_behind(tensor) for tensor in model.outputs}

    def copy(layer: keras.layers.Layer) -> keras.layers.Layer:
        config = layer.get_config()
        if precision is not None and layer not in last:
            config["dtype"] = precision
        if layer in norms:
            return keras.layers.Identity(name=layer.name, dtype=config["dtype"])
        if layer in before:
            config["use_bias"] = True
        return type(layer).from_config(config)

    def call(layer, *args, **kwargs):
        if isinstance(layer, keras.layers.Identity):  # in the place of a normalization, whose options it does not know
            return layer(*args)
        return layer(*args, **kwargs)

    twin = keras.models.clone_model(graph_of(model), clone_function=copy, call_function=call)
    for layer in layers:
        if layer.weights and layer not in norms:
            weights = _with_norm(layer, before[layer]) if layer in before else layer.get_weights()
            twin.get_layer(layer.name).set_weights(weights)
    return twin


def is_functional(model: keras.Model) -> bool:
    """Whether a model is a graph of layers, `keras.Model(inputs, outputs)`, and not a class of its own."""
    return type(model).__module__.startswith("keras.") and hasattr(model, "operations")


def _norm_behind(layer) -> keras.layers.BatchNormalization | None:
    """The batch normalization that is the only thing behind a linear layer, if it normalizes the layer's channels."""
    if type(layer) not in FOLDED or getattr(layer, "data_format", "channels_last") != "channels_last":
        return None
    if layer.activation is not keras.activations.linear or call_count(layer) != 1:
        return None
    users = consumers_of(layer)
    if len(users) != 1 or type(users[0]) is not keras.layers.BatchNormalization or call_count(users[0]) != 1:
        return None
    axis = users[0].axis
    return users[0] if axis in (-1, len(layer.output.shape) - 1) else None


def _with_norm(layer, norm) -> list[np.ndarray]:
    """Kernel and bias of the layer with the normalization in them."""
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


def difference(model: keras.Model, twin: keras.Model, images: np.ndarray) -> tuple[float, float]:
    """Mean difference of the logits of two models as a share of their spread, and the share of images on which they
    name the same class."""
    images = np.asarray(images, np.float32)
    one, two = (np.asarray(as_logits(each(images, training=False)), np.float64) for each in (model, twin))
    return float(np.abs(one - two).mean() / (one.std() + 1e-12)), float(np.mean(one.argmax(-1) == two.argmax(-1)))


def checked(
    model: keras.Model,
    images: np.ndarray,
    precision: str | None = None,
    say=print,
    taps: Collection[str] = (),
) -> keras.Model:
    """The compiled model, compared with the model itself on images; says what another precision does to the logits.

    Raises `CheckFailed` where folding alone changes them.
    """
    folded = compiled(model, taps=taps)
    off, _ = difference(model, folded, images) if folded is not model else (0.0, 1.0)
    if off > SAME and any(layer.compute_dtype != "float32" for layer in model.layers):
        folded = model  # it rounds in other places; no mistake, but no longer the same teacher
    elif off > SAME:
        raise CheckFailed(f"The teacher with its batch normalization folded is {off:.2g} off: a mistake in kdistill.")
    if precision is None:
        return folded
    twin = compiled(model, precision, taps)
    if twin is model:
        raise InputError(
            f"The teacher '{model.name}' cannot be copied in {precision}: it is a class of its own, or holds another "
            "model. Leave teacher_precision out."
        )
    off, same = difference(model, twin, images)
    say(
        f"The teacher runs in {precision}: its logits are {off:.2%} of their spread off on average, its class is the "
        f"same for {same:.1%} of {len(images)} images."
    )
    return twin
