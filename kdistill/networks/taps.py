"""Taps: the outputs of layers inside of a model, from the same forward pass as its own outputs."""

import difflib

import keras

from kdistill.errors import InputError
from kdistill.networks.keras_internals import graph_of, run_graph

MOST_NAMES = 40  # names in a message; of more layers, the nearest ones


def tapped(model: keras.Model, taps: dict[str, str], role: str) -> keras.Model:
    """The same layers as one model with a dict of outputs: `logits`, and each tap by its name.

    Args:
        taps: names of layers (`block/conv` is `conv` inside of the nested model `block`), with the settings that name
            them, for messages. The tap `logits` is the model's own output.
        role: `student` or `teacher`, for messages.

    Raises:
        InputError: for an unknown name, a layer that is called more than once or returns several tensors, and a
            subclassed model, which has no graph.
    """
    settings = {name: setting for name, setting in taps.items() if name != "logits"}
    graph = _graph(model, role, next(iter(taps.values())))
    layers = _layer_names(graph)
    for name, setting in settings.items():
        if name not in layers:
            raise _unknown(name, layers, f"{role} '{model.name}'", setting)
    tensors: dict[str, list] = {name: [] for name in settings}
    inputs = _new_inputs(graph)
    outputs = _run(graph, inputs, tensors, "")
    for name, calls in tensors.items():
        where = f"The tap '{name}' in {role} '{model.name}'"
        if len(calls) != 1:
            raise InputError(
                f"{where} is called {len(calls)} times in one forward. Name a layer that is called once, or give "
                f"each call a layer of its own. Fix {settings[name]}."
            )
        if not isinstance(calls[0], keras.KerasTensor):
            raise InputError(f"{where} gives {len(calls[0])} tensors, expected one. Fix {settings[name]}.")
    return keras.Model(inputs, {"logits": outputs, **{name: calls[0] for name, calls in tensors.items()}})


def _graph(model: keras.Model, role: str, setting: str) -> keras.Function:
    """The graph of a model. Raises `InputError` for a model without one."""
    graph = graph_of(model)
    if graph is None:
        raise InputError(
            f"Taps need the graph of the {role} '{model.name}', which is "
            f"{'not built' if isinstance(model, keras.Sequential) else 'a subclassed model'}. Build it from "
            "keras.Input and layers (functional or Sequential), or let the teacher be a function "
            "images -> {'logits': ..., '<tap>': ...}. Or use a loss on logits. "
            f"Fix {setting}."
        )
    return graph


def _new_inputs(graph: keras.Function):
    return keras.tree.map_structure(
        lambda tensor: keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name), graph.input
    )


def _run(graph: keras.Function, inputs, tensors: dict[str, list], prefix: str):
    """The outputs of `graph` on new inputs. Appends what every tap gives to its list in `tensors`."""

    def call(layer, *args, **kwargs):
        name = f"{prefix}{tap_name(layer)}"
        if graph_of(layer) is not None and any(tap.startswith(f"{name}/") for tap in tensors):
            outputs = call_nested(layer, name, *args, **kwargs)
        else:
            outputs = layer(*args, **kwargs)
        if name in tensors:
            tensors[name].append(outputs)
        return outputs

    def call_nested(layer, name, *args, **kwargs):
        """Calls a model that gives the outputs of the nested model and of the taps inside of it."""
        inner = {tap: [] for tap in tensors if tap.startswith(f"{name}/")}
        graph = graph_of(layer)
        inputs = _new_inputs(graph)
        outputs = _run(graph, inputs, inner, f"{name}/")
        once = {tap: calls[0] for tap, calls in inner.items() if len(calls) == 1}
        values = keras.Model(inputs, {"": outputs, **once}, name=layer.name)(*args, **kwargs)
        outputs = values.pop("")
        for tap, calls in inner.items():
            tensors[tap] += [values[tap]] if tap in values else calls
        return outputs

    return run_graph(graph, inputs, call)


def tap_name(layer) -> str:
    """The name by which a term taps a layer: its own, or that of a tensor of another format, which it states."""
    return getattr(layer, "tap_name", None) or layer.name


def _layer_names(graph: keras.Function, prefix: str = "") -> list[str]:
    names = []
    for layer in graph.operations:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        names.append(f"{prefix}{tap_name(layer)}")
        nested = graph_of(layer)
        if nested is not None:
            names += _layer_names(nested, f"{prefix}{layer.name}/")
    return names


def _unknown(name: str, layers: list[str], where: str, setting: str) -> InputError:
    near = difflib.get_close_matches(name, layers, n=1, cutoff=0.5)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    shown = layers if len(layers) <= MOST_NAMES else difflib.get_close_matches(name, layers, n=MOST_NAMES, cutoff=0.0)
    rest = f" and {len(layers) - len(shown)} more" if len(layers) > len(shown) else ""
    return InputError(f"Unknown tap '{name}' in {where}.{guess} Available: {', '.join(shown)}{rest}. Fix {setting}.")
