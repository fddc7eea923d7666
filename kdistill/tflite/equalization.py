"""Channels of equal width: numbers move from one layer into the next, and the function of the file stays the same.

int8 has one scale for all channels of an activation. Where one channel goes up to 100 and another one to 0.1, the
second one has no steps left. A layer whose channel is divided by s, and the next layer, which multiplies by s, compute
the same (Nagel et al., "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kdistill.tflite import flatbuffer
from kdistill.tflite.activation_ranges import Activation

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")  # input, kernel, bias
# What gives s * y for s * x with s > 0, by channel. Pads are zeros.
HOMOGENEOUS = ("RELU", "LEAKY_RELU", "MAX_POOL_2D", "AVERAGE_POOL_2D", "PAD", "MEAN")
NONE, RELU = 0, 1  # codes of fused activations
ROUNDS = 3  # over all pairs: a layer is the second of one and the first of the next
LEAST, MOST = 1e-6, 1e6  # of a factor


@dataclass(frozen=True)
class _Layer:
    """A layer whose kernel and bias belong to it alone, as indices of tensors."""

    kind: str
    kernel: int
    bias: int | None
    output: int


def equalize(model: schema.ModelT, activations: dict[int, Activation]) -> int:
    """Equalizes the channels between layers of a float model, in place. Returns how many pairs of layers it changed.

    Args:
        model: A float model.
        activations: Of its tensors, see `activations_of`; what changes is measured anew by whoever needs it.
    """
    arrays = _Arrays(model)
    pairs = [pair for pair in _pairs(model) if pair[0].output in activations]
    largest = {first.output: activations[first.output].largest.astype(np.float64) for first, _ in pairs}
    pairs = [(first, second) for first, second in pairs if _fits(arrays, first, second, largest[first.output])]
    for _ in range(ROUNDS):
        for first, second in pairs:
            factors = _factors(arrays, second, largest[first.output])
            _divide_outputs(arrays, first, factors)
            _multiply_inputs(arrays, second, factors)
            largest[first.output] = largest[first.output] / factors
    arrays.write()
    return len(pairs)


def _factors(arrays: "_Arrays", second: _Layer, largest: np.ndarray) -> np.ndarray:
    """By what each channel is divided. A channel that is always 0 stays."""
    if second.kind == "DEPTHWISE_CONV_2D":  # has a scale for each channel: its kernel loses nothing
        factors = largest / max(largest.max(), 1e-30)
    else:
        kernel = np.abs(arrays.of(second.kernel))
        weights = kernel.reshape(-1, kernel.shape[-1]).max(axis=0)
        factors = np.sqrt(largest / np.maximum(weights, 1e-30))
        factors[weights == 0] = 0
    used = factors > 0
    factors = factors / np.exp(np.mean(np.log(factors[used]))) if used.any() else factors
    return np.where(used, np.clip(factors, LEAST, MOST), 1.0)


def _divide_outputs(arrays: "_Arrays", layer: _Layer, factors: np.ndarray) -> None:
    kernel = arrays.of(layer.kernel)
    by_output = factors if layer.kind == "DEPTHWISE_CONV_2D" else factors.reshape(-1, *[1] * (kernel.ndim - 1))
    arrays.set(layer.kernel, kernel / by_output)
    if layer.bias is not None:
        arrays.set(layer.bias, arrays.of(layer.bias) / factors)


def _multiply_inputs(arrays: "_Arrays", layer: _Layer, factors: np.ndarray) -> None:
    kernel = arrays.of(layer.kernel)
    if layer.kind == "DEPTHWISE_CONV_2D":
        factors = np.repeat(factors, kernel.shape[-1] // len(factors))
    arrays.set(layer.kernel, kernel * factors)


def _fits(arrays: "_Arrays", first: _Layer, second: _Layer, largest: np.ndarray) -> bool:
    """Whether the outputs of the first layer are the inputs of the second, channel by channel."""
    outputs = arrays.of(first.kernel).shape[-1 if first.kind == "DEPTHWISE_CONV_2D" else 0]
    inputs = arrays.of(second.kernel).shape[-1]
    if second.kind == "DEPTHWISE_CONV_2D":
        return outputs == len(largest) and inputs % outputs == 0
    return outputs == inputs == len(largest)


def _pairs(model: schema.ModelT) -> Iterator[tuple[_Layer, _Layer]]:
    """Layers whose outputs nothing but the next layer reads, with at most homogeneous operators between them."""
    graph = model.subgraphs[0]
    operators = list(flatbuffer.named_operators(model, graph))
    readers: dict[int, list[int]] = {}
    for place, (operator, _) in enumerate(operators):
        for index in operator.inputs if operator.inputs is not None else ():
            readers.setdefault(int(index), []).append(place)
    ends = {int(index) for index in graph.outputs}
    layers = {
        place: layer
        for place, (operator, name) in enumerate(operators)
        if (layer := _layer(model, graph, operator, name, readers))
    }
    for place, layer in layers.items():
        if operators[place][0].builtinOptions.fusedActivationFunction not in (NONE, RELU):
            continue
        tensor = layer.output
        while tensor not in ends and len(readers.get(tensor, ())) == 1:
            after = readers[tensor][0]
            operator, name = operators[after]
            if after in layers and int(operator.inputs[0]) == tensor:
                yield layer, layers[after]
                break
            if not _is_homogeneous(model, graph, operator, name):
                break
            tensor = int(operator.outputs[0])


def _layer(model, graph, operator, name: str, readers) -> _Layer | None:
    if name not in LAYERS:
        return None
    kernel, *bias = (int(index) for index in operator.inputs[1:3])
    bias = bias[0] if bias and bias[0] >= 0 else None
    stored = bias is not None and flatbuffer.is_constant(model, graph.tensors[bias])
    if stored and not _data(model, graph.tensors[bias]).any():
        bias = None  # zeros stay zeros; converters share them between layers
    for index in (kernel, bias):
        if index is None:
            continue
        tensor = graph.tensors[index]
        # A kernel that several operators read belongs to a shared layer.
        constant = flatbuffer.is_constant(model, tensor) and flatbuffer.type_name(tensor) == "float32"
        if not constant or len(readers[index]) > 1:
            return None
    return _Layer(name, kernel, bias, int(operator.outputs[0]))


def _is_homogeneous(model, graph, operator, name: str) -> bool:
    if name not in HOMOGENEOUS:
        return False
    options = operator.builtinOptions
    if getattr(options, "fusedActivationFunction", NONE) not in (NONE, RELU):
        return False
    if name == "MEAN":  # over positions only: the channels stay
        axes = graph.tensors[int(operator.inputs[1])]
        rank = len(graph.tensors[int(operator.inputs[0])].shape)
        if not flatbuffer.is_constant(model, axes):
            return False
        values = np.frombuffer(_data(model, axes).tobytes(), np.int32)
        return not any(axis % rank in (0, rank - 1) for axis in values)
    if name == "PAD":
        return graph.tensors[int(operator.inputs[0])].shape[-1] == graph.tensors[int(operator.outputs[0])].shape[-1]
    return True


def _data(model: schema.ModelT, tensor: schema.TensorT) -> np.ndarray:
    """The bytes of a constant; none of another tensor."""
    data = model.buffers[tensor.buffer].data
    return np.zeros(0, np.uint8) if data is None else np.asarray(data, np.uint8)


class _Arrays:
    """The constants of a model as arrays in double precision, written back once."""

    def __init__(self, model: schema.ModelT):
        self._model, self._tensors, self._changed = model, model.subgraphs[0].tensors, {}

    def of(self, index: int) -> np.ndarray:
        if index in self._changed:
            return self._changed[index]
        tensor = self._tensors[index]
        return np.frombuffer(_data(self._model, tensor).tobytes(), np.float32).reshape(tensor.shape).astype(np.float64)

    def set(self, index: int, values: np.ndarray) -> None:
        self._changed[index] = values

    def write(self) -> None:
        for index, values in self._changed.items():
            buffer = schema.BufferT()  # its own: equal constants may share one
            buffer.data = np.frombuffer(values.astype(np.float32).tobytes(), np.uint8)
            self._model.buffers.append(buffer)
            self._tensors[index].buffer = len(self._model.buffers) - 1
