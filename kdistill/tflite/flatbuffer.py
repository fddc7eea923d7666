"""The content of a `.tflite` file, read from its flatbuffer: operators, kernels, precisions, the oldest runtime.

All functions take the model that `parse` returns.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from kdistill.errors import InputError

SMALL = 1024  # the converter's dynamic-range quantization leaves constants with fewer elements float
_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {code: name.lower() for name, code in vars(schema.TensorType).items() if not name.startswith("_")}
# The inputs of these that are the kernel, and the bias. The bias is float in a file without int8 activations.
_KERNEL = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1}
_BIAS = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "CONV_3D": 2, "TRANSPOSE_CONV": 3}
_MODEL = "(the model)"  # the layer of a tensor whose name tells none


def read(path: str | Path) -> schema.ModelT:
    """The content of a file. The interpreter must have opened it before: it checks the structure."""
    return parse(Path(path).read_bytes())


def parse(content: bytes) -> schema.ModelT:
    """The content of a file's bytes, with the weights that a large file stores behind its flatbuffer."""
    try:
        model = flatbuffer_utils.read_model_from_bytearray(content)
    except Exception as error:  # damaged bytes raise anything
        raise InputError(f"The flatbuffer cannot be read ({type(error).__name__}: {error}): it is damaged.") from None
    for buffer in model.buffers:
        if isinstance(buffer.data, bytes):  # from behind the flatbuffer; the writer expects arrays
            buffer.data = np.frombuffer(buffer.data, np.uint8)
    return model


def pack(model: schema.ModelT) -> bytes:
    """The bytes of a file with this content, up to 2 GB: the limit of flatbuffers and of phones."""
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def named_operators(model: schema.ModelT, graph: schema.SubGraphT) -> Iterator[tuple[schema.OperatorT, str]]:
    """The operators of a subgraph with their names, such as `CONV_2D`, in the order in which they run."""
    for operator in graph.operators or []:
        code = model.operatorCodes[operator.opcodeIndex]
        yield operator, _OPERATORS.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")


def is_constant(model: schema.ModelT, tensor: schema.TensorT) -> bool:
    """Whether the file stores the numbers of a tensor."""
    return model.buffers[tensor.buffer].data is not None


def type_name(tensor: schema.TensorT) -> str:
    """The type of a tensor, such as `int8`."""
    return _TYPES.get(tensor.type, f"type {tensor.type}")


def tensor_name(tensor: schema.TensorT) -> str:
    """The name of a tensor."""
    return (tensor.name or b"").decode(errors="replace")


def element_count(tensor: schema.TensorT) -> int:
    """The number of elements of a tensor. An open batch size counts as one."""
    return int(np.prod(np.maximum(tensor.shape, 1))) if tensor.shape is not None else 1


def dequantized_constants(model: schema.ModelT, graph: schema.SubGraphT) -> dict[int, schema.TensorT]:
    """Index of a tensor that a DEQUANTIZE computes from a constant -> that constant.

    Converters store small weights in this way: the interpreter unpacks them once, when it loads the file.
    """
    return {
        operator.outputs[0]: graph.tensors[operator.inputs[0]]
        for operator, name in named_operators(model, graph)
        if name == "DEQUANTIZE" and is_constant(model, graph.tensors[operator.inputs[0]])
    }


def operators(model: schema.ModelT) -> list[dict]:
    """All operators in their order: dicts with name, tensor (of the first output), and types of weights and result.

    `weights` is None for an operator without constant numbers. Biases and shapes do not count as weights.
    """
    return [row for graph in model.subgraphs for row in _operators_of(model, graph)]


def _operators_of(model: schema.ModelT, graph: schema.SubGraphT) -> Iterator[dict]:
    stored = dequantized_constants(model, graph)
    for operator, name in named_operators(model, graph):
        if operator.outputs[0] in stored:
            continue  # a way to store weights, not a step of the computation
        constants = {}
        for position, index in enumerate(operator.inputs):
            if index < 0 or position == _BIAS.get(name):
                continue
            tensor = stored.get(index, graph.tensors[index])
            if is_constant(model, tensor) and type_name(tensor) not in ("int32", "int64", "bool"):
                constants[element_count(tensor)] = type_name(tensor)
        output = graph.tensors[operator.outputs[0]]
        yield {
            "name": name,
            "tensor": tensor_name(output),
            "weights": constants[max(constants)] if constants else None,
            "result": type_name(output),
        }


def min_runtime(model: schema.ModelT) -> str | None:
    """The oldest TensorFlow Lite runtime that reads the file, such as `2.4.0`."""
    for entry in model.metadata or []:
        if entry.name == b"min_runtime_version":
            return bytes(model.buffers[entry.buffer].data).rstrip(b"\0").decode()
    return None


def kernels(model: schema.ModelT) -> list[np.ndarray]:
    """The kernels of all convolutions and dense layers, int8 or float32, output channels first; shared ones once."""
    by_buffer = {tensor.buffer: values for tensor, values, _, _ in _stored_kernels(model)}
    return list(by_buffer.values())


def kernels_by_layer(model: schema.ModelT) -> dict[str, np.ndarray]:
    """Layer -> its kernel, int8 or float32, output channels first.

    Only for files of quantization-aware trained networks: their quantized layers stand in the names of tensors.
    """
    layers = {}
    for tensor, values, name, output in _stored_kernels(model):
        values = np.moveaxis(values, -1, 0) if name == "DEPTHWISE_CONV_2D" else values
        for layer in (*_quantized_layers(output), *_quantized_layers(tensor)):
            layers.setdefault(layer, values)
    return layers


def float_operators_by_layer(model: schema.ModelT) -> dict[str, list[str]]:
    """Layer -> its operators that compute in float. For the same files as `kernels_by_layer`."""
    layers = {}
    for graph in model.subgraphs:
        for operator, name in named_operators(model, graph):
            output = graph.tensors[operator.outputs[0]]
            if type_name(output) != "float32" or name in ("DEQUANTIZE", "QUANTIZE"):
                continue
            of_kernel = _quantized_layers(graph.tensors[operator.inputs[_KERNEL[name]]]) if name in _KERNEL else []
            for layer in (_quantized_layers(output) + of_kernel) or [_MODEL]:
                layers.setdefault(layer, []).append(name)
    return layers


def _stored_kernels(model: schema.ModelT) -> Iterator[tuple[schema.TensorT, np.ndarray, str, schema.TensorT]]:
    """Tuples of a stored kernel's tensor, its numbers, the name of its operator, and that operator's output."""
    for graph in model.subgraphs:
        for operator, name in named_operators(model, graph):
            if name not in _KERNEL:
                continue
            tensor = graph.tensors[operator.inputs[_KERNEL[name]]]
            if is_constant(model, tensor) and type_name(tensor) in ("int8", "float32"):
                data = bytes(model.buffers[tensor.buffer].data)
                values = np.frombuffer(data, type_name(tensor)).reshape(tensor.shape)
                yield tensor, values, name, graph.tensors[operator.outputs[0]]


def _quantized_layers(tensor: schema.TensorT) -> list[str]:
    """`net/quant_conv/Relu;net/quant_norm/Fused` -> [conv, norm]: the layers that the converter fused into a tensor."""
    return list(dict.fromkeys(re.findall(r"/quant_([^/;]+)/", tensor_name(tensor))))


def stayed_float(model: schema.ModelT, quantization: str) -> list[dict]:
    """Operators of a quantized file with float numbers: dicts with operator, tensor (a name) and reason.

    In an int8 file these are the operators that compute in float; in a float16, dynamic or int4 file those with float32
    constants, except biases. Empty for `none`.
    """
    if quantization == "none":
        return []
    rows_of = _float_computations if quantization == "int8" else _float_constants
    return [row for graph in model.subgraphs for row in rows_of(model, graph, quantization)]


def _float_computations(model: schema.ModelT, graph: schema.SubGraphT, _: str) -> Iterator[dict]:
    for operator, name in named_operators(model, graph):
        tensors = [graph.tensors[i] for i in (*operator.inputs, *operator.outputs) if i >= 0]
        if name in ("QUANTIZE", "DEQUANTIZE") or all(type_name(tensor) != "float32" for tensor in tensors):
            continue
        reason = "the converter has no int8 version of this operator: it computes in float, between conversions"
        yield _float_row(name, graph.tensors[operator.outputs[0]], reason)


def _float_constants(model: schema.ModelT, graph: schema.SubGraphT, quantization: str) -> Iterator[dict]:
    stored = dequantized_constants(model, graph)
    for operator, name in named_operators(model, graph):
        if name == "DEQUANTIZE":
            continue
        for position, index in enumerate(operator.inputs):
            if index < 0 or position == _BIAS.get(name):
                continue
            tensor = graph.tensors[index]
            size = element_count(tensor)
            if size == 1:
                continue
            if index in stored and quantization == "dynamic" and type_name(stored[index]) == "int8":
                reason = "stored as int8, computed in float: the operator has no dynamic-range kernel"
                yield _float_row(name, stored[index], reason)
            elif type_name(tensor) == "float32" and is_constant(model, tensor):
                yield _float_row(name, tensor, _reason(name, size, quantization))


def _reason(name: str, size: int, quantization: str) -> str:
    if quantization == "float16":
        return f"the converter left these {size:,} elements in float32"
    if quantization == "int4":
        return f"{size:,} elements: litert-quantizer has no int4 version of {name}"
    if size < SMALL:
        return f"{size:,} elements: dynamic-range quantization leaves constants of fewer than {SMALL:,} float"
    return f"{size:,} elements: dynamic-range quantization does not support the operator {name}"


def _float_row(operator: str, tensor: schema.TensorT, reason: str) -> dict:
    return {"operator": operator, "tensor": tensor_name(tensor), "reason": reason}
