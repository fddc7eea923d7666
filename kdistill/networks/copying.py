"""Copies of models: the weights and the state of one model in another, and the proof that both compute the same.

A layer may compute from more than its weights: `Normalization` from constants that it derives from them, a lookup from
its vocabulary. Such state goes the way on which Keras saves and loads it, and is derived again from the new weights.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import NamedTuple

import keras
import numpy as np

from kdistill.errors import InputError
from kdistill.files import temporary_folder
from kdistill.networks.keras_internals import calls_its_graph, graph_of, layers_of, run_graph, takes_training

EXAMPLES = 2  # of noise, on which a copy is compared: one like standardized data, one like pixels
UNKNOWN_SIZE = 64  # stands for a size of an input that its model leaves open
TOLERANCE = 1e-4  # largest difference of equal outputs, as a share of the largest of them
TOLERANCE_16_BITS = 5e-2
# The layers whose `load_own_variables` differs from that of all layers for the sake of quantization and LoRA only.
_ORDINARY = {
    kind.load_own_variables
    for kind in (keras.Layer, keras.layers.Dense, keras.layers.EinsumDense, keras.layers.Embedding, keras.layers.Conv2D)
}
Change = Callable[[keras.layers.Layer, dict], None]


class Call(NamedTuple):
    """One call of an operation in the graph of a model."""

    name: str  # `layer`, or `nested/layer`
    operation: keras.Operation
    args: tuple
    kwargs: dict
    outputs: object


# -- copies -----------------------------------------------------------------------------------------------------------


def clone(model: keras.Model, change: Change | None = None) -> keras.Model:
    """An equal model with weights of its own; both are compared on noise.

    Args:
        model: a built model. Its layers need `get_config`.
        change: `change(layer, config)` changes the config of the copy of a layer, without effect on its outputs.

    Raises:
        InputError: for a layer that cannot be copied, or whose copy computes something else.
    """

    def copy(layer: keras.layers.Layer) -> keras.layers.Layer:
        if type(layer) is keras.layers.Lambda:  # it has no weights, and its function may not be in its config
            return layer
        config = layer.get_config()
        if change is not None:
            change(layer, config)
        return type(layer).from_config(config)

    try:
        with own_classes(model):
            if graph_of(model) is None:
                copied = type(model).from_config(model.get_config())
                build(copied, model)
            else:  # `recursive` keeps a layer one that a nested model shares with the model around it
                copied = keras.models.clone_model(model, clone_function=copy, recursive=True)
    except Exception as error:  # a user's own layers may raise anything
        raise InputError(f"The model '{model.name}' cannot be copied: {cause_of(model, error)}") from error
    copy_weights(model, copied)
    return copied


def own_classes(model: keras.Model) -> AbstractContextManager:
    """Lets Keras create the layers of a model from configs, those of a user's classes that are not registered too."""
    classes = {type(layer).__name__: type(layer) for layer in [model, *layers_of(model)]}
    own = {name: kind for name, kind in classes.items() if not kind.__module__.startswith("keras.")}
    return keras.saving.custom_object_scope(own)


def build(copied: keras.Model, model: keras.Model) -> None:
    """Builds a model like another one, which has the same layers."""
    parts = zip(model.layers, copied.layers, strict=False)  # first the layers: `Normalization` needs to be eager
    for built, unbuilt in [*parts, (model, copied)]:
        config = built.get_build_config()
        if not unbuilt.built and config:
            unbuilt.build_from_config(config)
    if not copied.built or len(copied.weights) < len(model.weights):
        inputs = noise(model)
        if inputs is not None:
            copied(inputs)


def copy_weights(source: keras.layers.Layer, target: keras.layers.Layer, compare: bool = True) -> None:
    """Copies the weights of a model, or a layer, into one with the same layers, and the state that is not in weights.

    Args:
        compare: whether to compare the outputs of both models on noise.

    Raises:
        InputError: the layers differ, or a layer of the target computes something else in the end.
    """
    sources, targets = ([model, *layers_of(model)] for model in (source, target))
    shapes = [[tuple(weight.shape) for weight in model.weights] for model in (source, target)]
    if len(sources) != len(targets) or shapes[0] != shapes[1]:
        raise InputError(
            f"The model '{source.name}' cannot be copied: its copy has {len(targets) - 1} layers and "
            f"{len(shapes[1])} weights instead of {len(sources) - 1} and {len(shapes[0])}, or weights of other shapes. "
            "A layer gets other sublayers or weights from its config than it has: correct its get_config()."
        )
    for layer, copied in zip(sources, targets, strict=True):
        _copy_state(layer, copied)
    target.set_weights([_numbers(weight) for weight in source.get_weights()])
    derive_state(target)
    if compare:
        check_equal(source, target)


def derive_state(model: keras.layers.Layer) -> None:
    """Derives again what the layers of a model, or of a layer, once derived from their weights.

    Keras does it where it loads weights itself, by `load_own_variables`, and not in `set_weights` and `assign`.
    """
    derived = False
    for layer in [model, *layers_of(model)]:
        if not layer.weights:
            continue
        if _saves_its_own_way(layer):
            layer.load_own_variables(_own_variables(layer))
            derived = True
        if hasattr(layer, "finalize_state"):
            layer.finalize_state()
            derived = True
    if derived:  # functions that are traced already have the former state as constants
        for part in [model, *layers_of(model)]:
            if isinstance(part, keras.Model):
                part.train_function = part.test_function = part.predict_function = None


def _copy_state(layer: keras.layers.Layer, copied: keras.layers.Layer) -> None:
    """Copies the state of one layer as Keras saves and loads it: its files (a vocabulary) and own variables."""
    if hasattr(layer, "save_assets") and hasattr(copied, "load_assets"):
        with temporary_folder() as folder:
            layer.save_assets(folder)
            copied.load_assets(folder)
    if _saves_its_own_way(layer):
        copied.load_own_variables(_own_variables(layer))


def _saves_its_own_way(layer: keras.layers.Layer) -> bool:
    return type(layer).load_own_variables not in _ORDINARY


def _own_variables(layer: keras.layers.Layer) -> dict[str, np.ndarray]:
    store: dict = {}
    layer.save_own_variables(store)
    return {name: _numbers(keras.ops.convert_to_numpy(value)) for name, value in store.items()}


def _numbers(values: np.ndarray) -> np.ndarray:
    """The values in a type that NumPy itself has; bfloat16 is none."""
    return np.asarray(values, np.float32) if values.dtype.kind == "V" else np.asarray(values)


def cause_of(model: keras.Model, error: Exception) -> str:
    """Why a model cannot be copied: its first layer that cannot be created from its config, and the error."""
    for layer in layers_of(model):
        try:
            with own_classes(model):
                type(layer).from_config(layer.get_config())
        except Exception as own_error:  # a user's own layers may raise anything
            return (
                f"layer '{layer.name}' ({type(layer).__name__}) cannot be created from its config "
                f"({_first_line(own_error)}). Give it a get_config() with all arguments of its constructor."
            )
    return f"{_first_line(error)}."


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# -- comparison -------------------------------------------------------------------------------------------------------


def noise(model: keras.Model, examples: int = EXAMPLES, small: bool = False):
    """Inputs of a model, always the same: by turns an example like standardized data and one like pixels.

    Inputs of integers are 0 and 1, those of type uint8 pixels; all are 0 and 1 if `small`. None where the model does
    not state what it takes, and for one with state that every call changes (`stateful=True`).
    """
    if any(getattr(layer, "stateful", False) for layer in layers_of(model)):
        return None
    graph = graph_of(model)
    if graph is None:
        shape = (model.get_build_config() or {}).get("input_shape")
        if not isinstance(shape, (tuple, list)) or not all(size is None or isinstance(size, int) for size in shape):
            return None
        specs = keras.KerasTensor(tuple(shape), "float32")
    else:
        specs = graph.input
    specified = keras.tree.flatten(specs)
    if any(spec.sparse or getattr(spec, "ragged", False) or spec.dtype == "string" for spec in specified):
        return None
    generator = np.random.default_rng(0)
    return keras.tree.map_structure(lambda spec: _noise(spec, examples, generator, small), specs)


def _noise(spec: keras.KerasTensor, examples: int, generator: np.random.Generator, small: bool):
    batch, *sizes = spec.shape
    shape = [examples if batch is None else batch, *(UNKNOWN_SIZE if size is None else size for size in sizes)]
    if small or ("float" not in spec.dtype and spec.dtype != "uint8"):
        return keras.ops.cast(keras.ops.convert_to_tensor(generator.integers(0, 2, shape)), spec.dtype)
    values = generator.uniform(0, 255, shape)
    if spec.dtype != "uint8":
        values[::2] = generator.normal(size=values[::2].shape)
    return keras.ops.cast(keras.ops.convert_to_tensor(values.astype("float32")), spec.dtype)


def check_equal(model: keras.Model, copied: keras.Model) -> None:
    """Raises `InputError`, which names the first layer that differs, unless both models have equal outputs on noise."""
    try:
        inputs, expected = outputs_on_noise(model, lambda inputs: model(inputs, training=False))
    except Exception:  # the model accepts no noise, such as a lookup without a place for unknown values
        return
    if inputs is None:
        return
    received = copied(inputs, training=False)
    if same(expected, received) or not same(expected, model(inputs, training=False)):  # the model draws at random
        return
    raise InputError(
        f"The copy of the model '{model.name}' computes something else: {difference(model, copied, inputs)}"
    )


def outputs_on_noise(model: keras.Model, call: Callable, examples: int = EXAMPLES) -> tuple:
    """Noise for a model, and what `call` gives for it; None and None where the model does not state what it takes.

    If `call` refuses the noise, as an `Embedding` does beyond its last row, numbers are 0 and 1.
    """
    inputs = noise(model, examples)
    if inputs is None:
        return None, None
    try:
        return inputs, call(inputs)
    except Exception:  # of the operations of a model: many types
        inputs = noise(model, examples, small=True)
        return inputs, call(inputs)


def difference(
    model: keras.Model, copied: keras.Model, inputs, tolerance: float | None = None, ignored: Collection[str] = ()
) -> str:
    """A sentence about the first layer of which two models with the same graph have different outputs.

    `ignored`: the names of layers whose outputs may differ.
    """
    if graph_of(model) is not None and graph_of(copied) is not None:
        for call, other in zip(calls_of(model, inputs), calls_of(copied, inputs), strict=False):
            if call.name not in ignored and not same(call.outputs, other.outputs, tolerance):
                return (
                    f"its layer '{call.name}' ({type(call.operation).__name__}) differs by "
                    f"{distance(call.outputs, other.outputs):.3g}. {ADVICE}"
                )
    return f"a layer of it differs. {ADVICE}"


ADVICE = (
    "If the layer has state that is not in its weights, let save_own_variables() and load_own_variables() save, load "
    "and derive it."
)


def calls_of(model: keras.Model, inputs, prefix: str = "") -> Iterator[Call]:
    """The calls of all operations of a model's graph for inference, in their order, those in nested models first.

    A nested model that takes a dict, or is subclassed, counts as one operation.
    """
    calls = []

    def call(operation, *args, **kwargs):
        name = f"{prefix}{operation.name}"
        if takes_training(operation):
            kwargs = {**kwargs, "training": False}
        if graph_of(operation) is not None and calls_its_graph(operation) and args and not isinstance(args[0], dict):
            calls.extend(calls_of(operation, args[0], f"{name}/"))
        calls.append(Call(name, operation, args, kwargs, operation(*args, **kwargs)))
        return calls[-1].outputs

    run_graph(graph_of(model), inputs, call)
    return iter(calls)


def noise_calls(model: keras.Model) -> Iterator[Call]:
    """`calls_of` a model on noise; none where it has no graph, or accepts no noise."""
    if graph_of(model) is not None:
        with contextlib.suppress(Exception):  # such as a lookup without a place for unknown values
            _, calls = outputs_on_noise(model, lambda inputs: calls_of(model, inputs))
            yield from calls or ()


def same(expected, received, tolerance: float | None = None) -> bool:
    """Whether outputs, of any structure, are equal but for rounding, which is coarser for numbers of 16 bits."""
    pairs = zip(keras.tree.flatten(expected), keras.tree.flatten(received), strict=True)
    return all(_same(one, two, tolerance) for one, two in pairs)


def _same(expected, received, tolerance: float | None) -> bool:
    one, two = (np.asarray(values) for values in (expected, received))
    if one.dtype.kind in "OSU":
        return bool(np.array_equal(one, two))
    if tolerance is None:
        tolerance = TOLERANCE_16_BITS if {one.dtype.itemsize, two.dtype.itemsize} & {1, 2} else TOLERANCE
    one = one.astype(np.float64)
    return distance(one, two) <= tolerance * np.max(np.abs(one[np.isfinite(one)]), initial=1e-6)


def distance(expected, received) -> float:
    """The largest difference of the numbers in two structures; NaN equals NaN, and another shape is infinitely far."""
    pairs = zip(keras.tree.flatten(expected), keras.tree.flatten(received), strict=True)
    return max((_distance(np.asarray(one), np.asarray(two)) for one, two in pairs), default=0.0)


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    if one.shape != two.shape:
        return float("inf")
    one, two = one.astype(np.float64), two.astype(np.float64)
    gaps = np.abs(np.where(one == two, 0.0, one - two)[~(np.isnan(one) & np.isnan(two))])
    return float("inf") if np.isnan(gaps).any() else float(np.max(gaps, initial=0.0))


def architecture_of(model: keras.Model) -> dict:
    """The config of a model with its layers' names replaced by their places: equal for equal architectures.

    Names count up with all that a process has built. Raises `NotImplementedError` for a subclassed model without a
    config.
    """
    names = {layer.name: f"#{i}" for i, layer in enumerate([model, *layers_of(model)])}
    return _without_names(model.get_config(), names)


def _without_names(config, names: dict[str, str]):
    if isinstance(config, dict):
        return {str(key): _without_names(value, names) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_without_names(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config
