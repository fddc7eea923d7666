"""A Keras 3 model -> the equal tf_keras (Keras 2) model that tfmot needs, and its new weights back again. Verified.

tensorflow-model-optimization accepts tf_keras models only. The bridge runs the graph of the Keras 3 model on tf_keras
tensors, replaces every layer by its twin of the same name, copies the weights, and compares the outputs of both models.
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
from kdistill.networks import copying
from kdistill.networks.keras_internals import (
    calls_its_graph,
    graph_of,
    layers_of,
    operation_behind,
    run_graph,
    takes_training,
)

Handlers = dict[type, Callable]
# tfmot's wrappers; the layer inside keeps its own name.
WRAPPERS = ("PruneLowMagnitude", "ClusterWeights", "ClusterWeightsRNN", "ClusterWeightsMHA")
EXAMPLES = 4  # of noise, on which both models are compared
QUANTIZERS = ("QuantizeWrapper", "QuantizeWrapperV2", "QuantizeAnnotate")


def load_tfmot():
    """Imports tensorflow_model_optimization without a change of `tf.keras` (Keras 3) and of the environment."""
    if tf.keras.Model is not keras.Model:  # resolves the lazy `tf.keras`, which tfmot would turn into tf_keras
        raise InputError(
            "tf.keras is tf_keras (Keras 2) in this process, expected Keras 3: tensorflow_model_optimization was "
            "imported before, or TF_USE_LEGACY_KERAS is set. Unset it, and write `from kdistill import compress` "
            "before you import tensorflow_model_optimization."
        )
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

    A layer of somebody's own that holds layers is opened into these, where its call is a graph of Keras's operations.

    Args:
        model: a Functional or Sequential model.
        handlers: `{LayerClass: function(layer) -> tf_keras layer}` for your own layers with weights. The tf_keras layer
            needs weights of the same names, and its class must be registered with `tf_keras.saving`.

    Raises:
        InputError: the model has no graph, a layer has no twin, or the outputs differ.
    """
    graph = _opened(_graph_of(model), handlers or {})
    names = _names(graph)
    all_twins = {}

    def apply(operation, call, args, kwargs):
        """Calls one operation of the Keras 3 graph on tf_keras tensors."""
        name = names[id(operation)]
        if not isinstance(operation, keras.layers.Layer):
            return _operation(operation, _numbered(name, call), args, kwargs)
        if id(operation) not in all_twins:
            all_twins[id(operation)] = bridge_layers.twins(operation, name, handlers or {})
        twin, *following = all_twins[id(operation)]
        if isinstance(twin, bridge_layers.KerasOperation):
            return _operation(operation, _numbered(name, call), args, kwargs)
        outputs = twin(*args, **_accepted(twin, kwargs))
        for layer in following:
            outputs = layer(outputs)
        return outputs

    inputs = keras.tree.map_structure(_input, graph.input)
    bridged = tf_keras.Model(inputs, _walk(graph, inputs, apply), name=_legal(model.name))
    for layer in _weighted(graph):
        targets = [(bridge_layers.last_name(v.name), v) for twin in all_twins[id(layer)] for v in twin.weights]
        for variable, target in bridge_layers.matched(layer, targets):
            target.assign(bridge_layers.numbers(variable))
    _compare(graph, bridged, names)
    return bridged


def copy_back(
    bridged: tf_keras.Model, model: keras.Model, check: bool = True, handlers: Handlers | None = None
) -> keras.Model:
    """Copies the weights of a tf_keras model, with or without tfmot's wrappers, into its Keras 3 model.

    It matches layers by name and variables by the last part of theirs, and copies clustered and masked weights as such.
    With `check` it compares the outputs again, unless there are quantizers: it copies the float weights, so the outputs
    differ by the rounding. `handlers`: those of `to_tf_keras`. Returns `model`. Raises `InputError` if a layer or
    weight is missing.
    """
    graph = _opened(_graph_of(model), handlers or {})
    names = _names(graph)
    by_name = {}
    for layer in bridged.layers:
        wrapped = type(layer).__name__ in WRAPPERS + QUANTIZERS
        by_name[layer.layer.name if wrapped else layer.name] = layer
    pairs = []
    for layer in _weighted(graph):
        name = names[id(layer)]
        if name not in by_name:
            raise InputError(f"The tf_keras model has no layer '{name}' with the weights of '{layer.name}'.")
        parts = [by_name[part] for part in (name, name + bridge_layers.POINTWISE) if part in by_name]
        pairs += bridge_layers.matched(layer, [weight for part in parts for weight in _effective(part)])
    for variable, value in pairs:
        variable.assign(value)
    for layer in _weighted(graph):
        if not isinstance(layer, keras.layers.Normalization):  # it received nothing
            copying.derive_state(layer)
    if check and not any(type(layer).__name__ in (*QUANTIZERS, "QuantizeLayer") for layer in bridged.layers):
        _compare(graph, bridged, names)
    return model


def _graph_of(model) -> keras.Function:
    """The graph of a Functional or Sequential model. Raises `InputError` for any other."""
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
    if graph_of(model) is None or not calls_its_graph(model):
        raise InputError(
            f"'{model.name}' is a subclassed model ({type(model).__name__}): its layers cannot be read from a graph. "
            "Pass a Functional or Sequential model (for a Distiller: distiller.student), or rewrite it as one: "
            "keras.Model(inputs, outputs)."
        )
    return model


def _opened(graph: keras.Function, handlers: Handlers, name: str | None = None) -> keras.Function:
    """The graph with a nested model of the same weights in the place of each layer that holds other layers.

    A layer of somebody's own whose call uses layers and operations of Keras is a graph of these: calling it on symbolic
    tensors gives it. The graph itself where there are none. Raises `InputError` for a layer that has no such graph.
    """
    if not _is_closed(graph, handlers):
        return graph
    models: dict[tuple, keras.Model] = {}

    def call(operation, *args, **kwargs):
        if _is_nested(operation) and _is_closed(_graph_of(operation), handlers):
            if (id(operation),) not in models:
                models[(id(operation),)] = _opened(_graph_of(operation), handlers, operation.name)
            inner = models[(id(operation),)]
            return inner(_arranged(inner, args[0] if args else kwargs["inputs"]))
        if _is_nested(operation) or not _holds_layers(operation, handlers):
            return operation(*args, **kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key not in ("training", "mask") and value is not None}
        if kwargs or len(args) != 1 or not isinstance(args[0], keras.KerasTensor):
            raise _closed(operation, "it is called with more than one tensor")
        key = id(operation), args[0].shape
        if key not in models:
            models[key] = _as_model(operation, args[0])
        return models[key](args[0])

    inputs = keras.tree.map_structure(
        lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=operation_behind(tensor).name),
        graph.input,
    )
    name = name or graph.name
    opened = keras.Model(inputs, run_graph(graph, inputs, call), name=name)
    return _opened(opened, handlers, name)  # a layer that was inside of one may hold layers, too


def _is_closed(graph: keras.Function, handlers: Handlers) -> bool:
    """Whether the graph, or a model nested in it, has a layer to open."""
    return any(
        _is_closed(_graph_of(operation), handlers) if _is_nested(operation) else _holds_layers(operation, handlers)
        for operation in graph.operations
    )


def _holds_layers(operation, handlers: Handlers) -> bool:
    """Whether this is a layer of somebody's own with layers inside that have all of its weights."""
    kind = type(operation)
    if not isinstance(operation, keras.layers.Layer) or _is_nested(operation) or not operation.weights:
        return False
    if kind is getattr(keras.layers, kind.__name__, None) or any(base in handlers for base in kind.__mro__):
        return False
    held = {id(weight) for layer in layers_of(operation) for weight in layer.weights}
    return {id(weight) for weight in operation.weights} <= held


def _as_model(layer: keras.layers.Layer, tensor) -> keras.Model:
    """The graph of a layer's call, as a model with the layers that it holds. Raises `InputError` if it has none."""
    inputs = keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype)
    try:
        model = keras.Model(inputs, layer.call(inputs), name=layer.name.replace("/", "_"))
    except Exception as error:  # of code of somebody's own
        text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise _closed(layer, f"its call is no graph of layers and operations of Keras ({text})") from None
    used = {id(weight) for weight in model.weights}
    unused = [weight.path for weight in layer.weights if id(weight) not in used]
    if unused:
        raise _closed(layer, f"its call uses the weights {', '.join(unused)} outside of a layer")
    return model


def _closed(layer: keras.layers.Layer, reason: str) -> InputError:
    kind = type(layer).__name__
    return InputError(
        f"Layer '{layer.name}' ({kind}) has weights and no twin in tf_keras, which pruning, clustering and "
        f"quantization-aware training need, and it cannot be opened into the layers that it holds: {reason}. Pass "
        f"handlers={{{kind}: function(layer) -> tf_keras layer}}, or replace the layer."
    )


def _is_nested(operation) -> bool:
    return isinstance(operation, keras.Model)


def _legal(name: str) -> str:
    """The name, changed to one that TensorFlow accepts as a scope."""
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", name)
    return name if re.match(r"[A-Za-z0-9.]", name) else f"layer{name}"


def _names(graph: keras.Function) -> dict[int, str]:
    """id of an operation, those in nested models too -> its unique tf_keras name: `layer`, `nested.layer`."""
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
    """The layers with weights, those of nested models included, without repetition."""
    layers = {}
    for operation in graph.operations:
        if _is_nested(operation):
            layers |= {id(layer): layer for layer in _weighted(_graph_of(operation))}
        elif getattr(operation, "weights", None):
            layers[id(operation)] = operation
    return list(layers.values())


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
    """The arguments without a mask that the tf_keras layer has no parameter for: Keras 3 records it for every layer."""
    if "mask" in kwargs and "mask" not in twin._call_spec.arg_names:
        return {key: value for key, value in kwargs.items() if key != "mask"}
    return kwargs


def _effective(layer) -> list[tuple[str, np.ndarray]]:
    """(last part of the name, value) of the weights of a layer as its forward pass uses them."""
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


def _compare(graph: keras.Function, bridged: tf_keras.Model, names: dict[int, str]) -> None:
    """Raises `InputError`, which names the first layer that differs, unless both models have equal outputs."""
    steps = {}

    def apply(operation, call, args, kwargs):
        if takes_training(operation):
            kwargs["training"] = False
        steps[_numbered(names[id(operation)], call)] = operation, operation(*args, **kwargs)
        return steps[_numbered(names[id(operation)], call)][1]

    def both(inputs):
        return _walk(graph, inputs, apply), bridged(inputs, training=False)

    inputs, outputs = copying.outputs_on_noise(graph, both, EXAMPLES)
    if inputs is not None and not copying.same(*outputs):
        raise InputError(_first_difference(bridged, inputs, steps, names))


def _first_difference(bridged, inputs, steps: dict, names: dict[int, str]) -> str:
    """The message about the first difference, in the order of the Keras 3 graph."""
    for name, (operation, value) in steps.items():
        own = names[id(operation)]
        split = isinstance(operation, keras.layers.Layer)  # a layer may have several twins: `own`, `own.activation`
        parts = [twin for twin in bridged.layers if twin.name == name or (split and twin.name.startswith(f"{own}."))]
        twin = parts[-1] if parts else None
        values = keras.tree.flatten(value)
        if twin is None or len(twin._inbound_nodes) != 1 or len(values) != len(tf.nest.flatten(twin.output)):
            continue  # a difference in a shared layer shows at the layer behind it
        received = tf.nest.flatten(tf_keras.Model(bridged.inputs, twin.output)(tf.nest.flatten(inputs), training=False))
        if not copying.same(values, received):
            return (
                f"Layer '{operation.name}' ({type(operation).__name__}) has other outputs in tf_keras (largest "
                f"difference {copying.distance(values, received):.2g}). Pass a handler for it, or replace the layer."
            )
    return (
        f"The tf_keras model has other outputs than '{bridged.name}' in Keras 3, though no single layer differs: "
        "a layer keeps state, or draws random numbers in prediction."
    )
