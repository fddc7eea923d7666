"""Taps: what layers inside of a model give, from the same forward as its outputs."""

import difflib

import keras

from kdistill.errors import InputError
from kdistill.networks.keras_internals import graph_of, run_graph

SHOWN = 40  # names in a message; of more, the nearest


def tapped(model: keras.Model, taps: dict[str, str], who: str) -> keras.Model:
    """The same layers as one model with a dict of outputs: `logits`, and each tap by its name.

    `taps`: names of layers (`block/conv` is `conv` inside of the nested model `block`) with the setting that named
    them, for the message. The tap `logits` is the model's own output. `who` is `student` or `teacher`. Raises
    `InputError` for a name that is not there, a layer that is called more than once or gives no single tensor, and
    for subclassed models, which have no graph.
    """
    names = {name: setting for name, setting in taps.items() if name != "logits"}
    graph = _graph(model, who, next(iter(taps.values())))
    known = _names(graph)
    for name, setting in names.items():
        if name not in known:
            raise _unknown(name, known, f"{who} '{model.name}'", setting)
    found: dict[str, list] = {name: [] for name in names}
    inputs = keras.tree.map_structure(
        lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name), graph.input
    )
    outputs = _run(graph, inputs, found, "")
    for name, tensors in found.items():
        where = f"The tap '{name}' in {who} '{model.name}'"
        if len(tensors) != 1:
            raise InputError(
                f"{where} is called {len(tensors)} times in one forward. Name a layer that is called once, or give "
                f"each call a layer of its own. Fix {names[name]}."
            )
        if not isinstance(tensors[0], keras.KerasTensor):
            raise InputError(f"{where} gives {len(tensors[0])} tensors, expected one. Fix {names[name]}.")
    return keras.Model(inputs, {"logits": outputs, **{name: tensors[0] for name, tensors in found.items()}})


def _graph(model: keras.Model, who: str, setting: str):
    """The functional graph of a model: its own, or that inside of a built Sequential."""
    graph = graph_of(model)
    if graph is None:
        raise InputError(
            f"Taps need the graph of the {who} '{model.name}', which is "
            f"{'not built' if isinstance(model, keras.Sequential) else 'a subclassed model'}. Make it of keras.Input "
            "and layers (functional or Sequential), or let a teacher be a function images -> {'logits': ..., '<tap>': "
            f"...}}. Or take a loss of logits. Fix {setting}."
        )
    return graph


def _run(graph, inputs, found: dict[str, list], prefix: str):
    """The outputs of `graph` on new inputs; the tensors of every tap are put into `found` on the way."""

    def call(layer, *args, **kwargs):
        name = f"{prefix}{layer.name}"
        if not any(tap.startswith(f"{name}/") for tap in found):
            given = layer(*args, **kwargs)
        else:
            inner = {tap: [] for tap in found if tap.startswith(f"{name}/")}
            nested = graph_of(layer)
            inputs = keras.tree.map_structure(
                lambda x: keras.Input(batch_shape=x.shape, dtype=x.dtype, name=x.name), nested.input
            )
            outputs = _run(nested, inputs, inner, f"{name}/")
            once = {tap: tensors[0] for tap, tensors in inner.items() if len(tensors) == 1}
            several = keras.Model(inputs, {"": outputs, **once}, name=layer.name)(*args, **kwargs)
            given = several.pop("")
            for tap, tensors in inner.items():
                found[tap] += [several[tap]] if tap in several else tensors
        if name in found:
            found[name].append(given)
        return given

    return run_graph(graph, inputs, call)


def _names(graph, prefix: str = "") -> list[str]:
    found = []
    for layer in graph.operations:
        if isinstance(layer, keras.layers.InputLayer):
            continue
        found.append(f"{prefix}{layer.name}")
        nested = graph_of(layer)
        if nested is not None:
            found += _names(nested, f"{prefix}{layer.name}/")
    return found


def _unknown(name: str, known: list[str], where: str, setting: str) -> InputError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    shown = known if len(known) <= SHOWN else difflib.get_close_matches(name, known, n=SHOWN, cutoff=0.0)
    rest = f" and {len(known) - len(shown)} more" if len(known) > len(shown) else ""
    return InputError(f"Unknown tap '{name}' in {where}.{guess} Available: {', '.join(shown)}{rest}. Fix {setting}.")
