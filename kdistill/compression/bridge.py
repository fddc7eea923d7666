"""A Keras 3 model -> the equal tf_keras (Keras 2) model that tfmot needs, and its new weights back again. Verified.

tensorflow-model-optimization accepts tf_keras models only. The graph of the Keras 3 model is walked with tf_keras
tensors, each layer becomes its twin of the same name, weights are copied, and the outputs of both are compared.
"""

import os
import re
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras.src.engine.keras_tensor import KerasTensor

from kdistill.compression import bridge_layers
from kdistill.errors import InputError
from kdistill.networks.keras_internals import graph_of, operation_behind, run_graph, takes_training

Handlers = dict[type, Callable]
# tfmot's wrappers, which carry the layer inside under its own name.
WRAPPERS = ("PruneLowMagnitude", "ClusterWeights", "ClusterWeightsRNN", "ClusterWeightsMHA")
QUANTIZERS = ("QuantizeWrapper", "QuantizeWrapperV2", "QuantizeAnnotate")


def load_tfmot():
    """tensorflow_model_optimization, imported so that `tf.keras` stays Keras 3 and the environment as it was."""
    assert tf.keras.Model is keras.Model  # resolves the lazy `tf.keras`, which tfmot would turn into tf_keras
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # it compares versions with distutils
            import tensorflow_model_optimization as tfmot
    finally:
        if before is None:
            os.environ.pop("TF_USE_LEGACY_KERAS", None)
        else:
            os.environ["TF_USE_LEGACY_KERAS"] = before
    return tfmot


def to_tf_keras(model: keras.Model, handlers: Handlers | None = None) -> tf_keras.Model:
    """The equal tf_keras model: nested models inlined, weights copied, outputs compared on random input.

    `handlers`: `{LayerClass: function(layer) -> tf_keras layer}` for layers of your own that have weights; give the
    tf_keras layer weights of the same names, and register its class with `tf_keras.saving`.
    Raises `InputError` for a model without a graph, a layer that has no twin, or outputs that differ.
    """
    graph = _graph_of(model)
    names = _names(graph)
    made = {}

    def apply(operation, call, args, kwargs):
        """One node of the Keras 3 graph on tf_keras tensors."""
        name = names[id(operation)]
        if not isinstance(operation, keras.layers.Layer):
            return _operation(operation, _numbered(name, call), args, kwargs)
        if id(operation) not in made:
            made[id(operation)] = bridge_layers.twins(operation, name, handlers or {})
        twin, *behind = made[id(operation)]
        if isinstance(twin, bridge_layers.KerasOperation):
            return _operation(operation, _numbered(name, call), args, kwargs)
        outputs = twin(*args, **_accepted(twin, kwargs))
        for each in behind:
            outputs = each(outputs)
        return outputs

    inputs = keras.tree.map_structure(_input, graph.input)
    bridged = tf_keras.Model(inputs, _walk(graph, inputs, apply), name=_legal(model.name))
    for layer in _weighted(graph):
        found = [(bridge_layers.last_name(v.name), v) for twin in made[id(layer)] for v in twin.weights]
        for variable, target in bridge_layers.matched(layer, found):
            target.assign(bridge_layers.numbers(variable))
    _compare(graph, bridged, names)
    return bridged


def copy_back(bridged: tf_keras.Model, model: keras.Model, check: bool = True) -> keras.Model:
    """Puts the weights of a tf_keras model, bare or in tfmot's wrappers, into the Keras 3 model it was made from.

    Layers are found by name, variables by the last part of theirs; clustered and masked weights arrive as such.
    Then (with `check`) the outputs are compared again, except where quantizers stand in between: there the float
    weights arrive, and the outputs differ by the rounding. Returns `model`. Raises `InputError` if a layer or weight
    is missing.
    """
    graph = _graph_of(model)
    names = _names(graph)
    there = {}
    for layer in bridged.layers:
        wrapped = type(layer).__name__ in WRAPPERS + QUANTIZERS
        there[layer.layer.name if wrapped else layer.name] = layer
    pairs = []
    for layer in _weighted(graph):
        name = names[id(layer)]
        if name not in there:
            raise InputError(f"The tf_keras model has no layer '{name}' to take the weights of '{layer.name}' from.")
        parts = [there[part] for part in (name, name + bridge_layers.POINTWISE) if part in there]
        pairs += bridge_layers.matched(layer, [found for part in parts for found in _effective(part)])
    for variable, value in pairs:
        variable.assign(value)
    if check and not any(type(layer).__name__ in (*QUANTIZERS, "QuantizeLayer") for layer in bridged.layers):
        _compare(graph, bridged, names)
    return model


def _graph_of(model) -> keras.Function:
    """The graph of a Functional or Sequential model; InputError for any other."""
    if isinstance(model, keras.Sequential):
        graph = graph_of(model)
        if graph is None:
            raise InputError(
                f"The Sequential model '{model.name}' is not built. Give it a keras.Input first, or call "
                "model.build(input_shape)."
            )
        return graph
    if not isinstance(model, keras.Model):
        raise InputError(f"Expected a Keras 3 model, received {type(model).__module__}.{type(model).__name__}.")
    if graph_of(model) is None or not _calls_its_graph(model):
        raise InputError(
            f"'{model.name}' is a subclassed model ({type(model).__name__}): its layers cannot be read from a graph. "
            "Give a Functional or Sequential model (for a Distiller: distiller.student), or rewrite it as one: "
            "keras.Model(inputs, outputs)."
        )
    return model


def _calls_its_graph(model: keras.Model) -> bool:
    """Whether the `call` of a functional model is Keras's own."""
    return type(model).call.__module__.partition(".")[0] == "keras"


def _is_nested(operation) -> bool:
    return isinstance(operation, keras.Model)


def _legal(name: str) -> str:
    """A name that TensorFlow accepts as a scope."""
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    return name if re.match(r"[A-Za-z0-9.]", name) else f"layer{name}"


def _names(graph: keras.Function) -> dict[int, str]:
    """id of each operation, those in nested models too -> its tf_keras name: `layer`, `nested.layer`; all differ."""
    names, used = {}, set()

    def visit(graph, prefix):
        for operation in graph.operations:
            if id(operation) in names:
                continue
            if _is_nested(operation):
                visit(_graph_of(operation), f"{prefix}{_legal(operation.name)}.")
                continue
            name = base = prefix + _legal(operation.name) if prefix else _legal(operation.name)
            count = 0
            while name.lower() in used:
                count += 1
                name = f"{base}_{count}"
            used.add(name.lower())
            names[id(operation)] = name

    visit(graph, "")
    return names


def _weighted(graph: keras.Function) -> list:
    """The layers with weights, those of nested models included, each once."""
    found = {}
    for operation in graph.operations:
        if _is_nested(operation):
            found |= {id(layer): layer for layer in _weighted(_graph_of(operation))}
        elif getattr(operation, "weights", None):
            found[id(operation)] = operation
    return list(found.values())


def _numbered(name: str, call: int) -> str:
    return name if call == 0 else f"{name}.{call}"


def _walk(graph: keras.Function, inputs, apply: Callable):
    """Runs the graph by `apply(operation, call, args, kwargs)`, nested models inlined; `call` counts its calls."""
    calls = {}

    def step(operation, *args, **kwargs):
        if _is_nested(operation):
            inner = _graph_of(operation)
            return run_graph(inner, _arranged(inner, args[0] if args else kwargs["inputs"]), step)
        # The nodes record `training`, which Keras overrules at every call; here it would switch dropout off.
        kwargs = {key: value for key, value in kwargs.items() if key != "training" and value is not None}
        call = calls[id(operation)] = calls.get(id(operation), -1) + 1
        return apply(operation, call, args, kwargs)

    return run_graph(graph, inputs, step)


def _arranged(graph: keras.Function, inputs) -> list:
    """The inputs of a nested model in the order of its graph."""
    if isinstance(inputs, dict):
        inputs = [inputs[tensor.name] for tensor in graph.inputs]
    flat = keras.tree.flatten(inputs)
    if [len(a.shape) for a in flat] != [len(b.shape) for b in graph.inputs]:
        raise InputError(
            f"The nested model '{graph.name}' expects inputs of shapes {[b.shape for b in graph.inputs]}, but is "
            f"called with {[tuple(a.shape) for a in flat]}. Reshape them explicitly."
        )
    return flat


def _input(tensor):
    if tensor.sparse or getattr(tensor, "ragged", False):
        raise InputError(f"Input '{tensor.name}' is sparse or ragged, which cannot be bridged. Make it dense.")
    name = _legal(operation_behind(tensor).name)
    return tf_keras.Input(tensor.shape[1:], batch_size=tensor.shape[0], dtype=tensor.dtype, name=name)


def _operation(operation, name: str, args, kwargs):
    """Calls a Keras 3 operation inside the tf_keras graph."""
    leaves = keras.tree.flatten((args, kwargs))
    slots = [isinstance(leaf, KerasTensor) for leaf in leaves]
    tensors = [leaf for leaf, slot in zip(leaves, slots, strict=True) if slot]
    if any(isinstance(leaf, keras.Variable) for leaf in leaves):
        raise InputError(
            f"The operation '{name}' uses a variable of a layer directly, which training in tf_keras would lose. "
            "Call the layer instead."
        )
    merge = bridge_layers.merge_layer(operation, tensors, name) if len(leaves) == 2 and len(tensors) == 2 else None
    if merge is not None:
        return merge(tensors)
    constants = [None if slot else leaf for leaf, slot in zip(leaves, slots, strict=True)]
    structure = keras.tree.pack_sequence_as((args, kwargs), constants)
    call = bridge_layers.Call(operation, structure, slots)
    return bridge_layers.operation_layer(call, name)(tensors[0] if len(tensors) == 1 else tensors)


def _accepted(twin, kwargs: dict) -> dict:
    """Without the mask, where the tf_keras layer takes none: Keras 3 records it for every layer behind."""
    if "mask" in kwargs and "mask" not in twin._call_spec.arg_names:
        return {key: value for key, value in kwargs.items() if key != "mask"}
    return kwargs


def _effective(layer) -> list[tuple[str, np.ndarray]]:
    """(last part of the name, value) of a layer's weights as the forward pass uses them."""
    kind = type(layer).__name__
    if kind.startswith("ClusterWeights"):
        layer.update_clustered_weights_associations()
        replaced = {id(v): layer.get_weight_from_layer(n) for n, v in layer.original_clusterable_weights.items()}
    elif kind == "PruneLowMagnitude":
        replaced = {id(weight): weight * mask for weight, mask, _ in layer.pruning_vars}
    else:
        replaced = {}
    variables = {id(v): v for v in layer.weights}
    return [
        (bridge_layers.last_name(v.name), bridge_layers.numbers(replaced.get(key, v)))
        for key, v in variables.items()
        if v.name
    ]


def _random_inputs(graph: keras.Function):
    """Two examples like standardized data and two like pixels, or small integers, for each input."""
    generator = np.random.default_rng(0)

    def make(tensor):
        shape = [4 if tensor.shape[0] is None else tensor.shape[0], *(64 if n is None else n for n in tensor.shape[1:])]
        kind = np.dtype("float32" if "float" in tensor.dtype else tensor.dtype)
        if kind.kind in "biu" and tensor.dtype != "uint8":
            values = generator.integers(0, 2, shape)
        else:
            values = generator.uniform(0, 255, shape)
            if tensor.dtype != "uint8":
                values[::2] = generator.normal(size=values[::2].shape)
        return tf.cast(values.astype(kind), tensor.dtype)

    return keras.tree.map_structure(make, graph.input)


def _compare(graph: keras.Function, bridged: tf_keras.Model, names: dict[int, str]) -> None:
    """Raises InputError, naming the first layer that differs, unless both models give the same outputs."""
    inputs = _random_inputs(graph)
    steps = {}

    def apply(operation, call, args, kwargs):
        if takes_training(operation):
            kwargs["training"] = False
        steps[_numbered(names[id(operation)], call)] = operation, operation(*args, **kwargs)
        return steps[_numbered(names[id(operation)], call)][1]

    expected = _walk(graph, inputs, apply)
    received = bridged(inputs, training=False)
    if all(_equal(a, b) for a, b in zip(keras.tree.flatten(expected), tf.nest.flatten(received), strict=True)):
        return
    raise InputError(_first_difference(bridged, inputs, steps, names))


def _first_difference(bridged, inputs, steps: dict, names: dict[int, str]) -> str:
    """What differs first, in the order of the Keras 3 graph."""
    for name, (operation, value) in steps.items():
        own = names[id(operation)]
        split = isinstance(operation, keras.layers.Layer)  # a layer may have become several: `own`, `own.activation`
        parts = [each for each in bridged.layers if each.name == name or (split and each.name.startswith(f"{own}."))]
        twin = parts[-1] if parts else None
        values = keras.tree.flatten(value)
        if twin is None or len(twin._inbound_nodes) != 1 or len(values) != len(tf.nest.flatten(twin.output)):
            continue  # shared layers are seen at the layer behind them
        received = tf.nest.flatten(tf_keras.Model(bridged.inputs, twin.output)(tf.nest.flatten(inputs), training=False))
        if not all(_equal(a, b) for a, b in zip(values, received, strict=True)):
            distance = max(_distance(a, b) for a, b in zip(values, received, strict=True))
            return (
                f"Layer '{operation.name}' ({type(operation).__name__}) gives other outputs in tf_keras (greatest "
                f"difference {distance:.2g}). Pass a handler for it, or replace the layer."
            )
    return (
        f"The tf_keras model gives other outputs than '{bridged.name}' in Keras 3, though no single layer does: "
        "a layer keeps state of its own, or draws random numbers when it predicts."
    )


def _distance(a, b) -> float:
    a, b = (np.asarray(tf.cast(x, tf.float64)) for x in (a, b))
    if a.shape != b.shape:
        return float("inf")
    gap = np.abs(np.where(a == b, 0.0, a - b)[~(np.isnan(a) & np.isnan(b))])
    return float(np.max(gap, initial=0.0))


def _equal(a, b) -> bool:
    """Equal but for the rounding, which is that of the narrower type where a model computes in 16 bits."""
    if a.dtype in (tf.string,):
        return bool(tf.reduce_all(a == b))
    a_values = np.asarray(tf.cast(a, tf.float64))
    scale = np.max(np.abs(a_values[np.isfinite(a_values)]), initial=1e-6)
    return _distance(a, b) <= (1e-4 if a.dtype.size >= 4 else 5e-2) * scale
