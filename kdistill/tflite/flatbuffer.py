"""What is inside a `.tflite` file: operators, the precision of each, the oldest runtime, what stayed float and why."""

import re
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

from kdistill.errors import InputError

SMALL = 1024  # the converter's dynamic-range quantization leaves constants with fewer elements float
_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
# Inputs at which these take their bias, which is float in a file without int8 activations.
_BIAS = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "CONV_3D": 2, "TRANSPOSE_CONV": 3}
_TYPES = {code: name for name, code in vars(schema.TensorType).items() if not name.startswith("_")}
_FLOAT32 = schema.TensorType.FLOAT32


def read(path: str | Path) -> schema.ModelT:
    """The content of a file that has been opened by the interpreter before (which checks its structure)."""
    return parsed(Path(path).read_bytes())


def parsed(content: bytes) -> schema.ModelT:
    """The same of its bytes. Weights that a large file keeps outside the flatbuffer are read into it."""
    try:
        model = flatbuffer_utils.read_model_from_bytearray(content)
    except Exception as error:  # whatever damaged bytes make of it
        raise InputError(f"The flatbuffer cannot be read ({type(error).__name__}: {error}): it is damaged.") from None
    for buffer in model.buffers:
        if isinstance(buffer.data, bytes):  # those from outside; the writer wants arrays
            buffer.data = np.frombuffer(buffer.data, np.uint8)
    return model


def packed(model: schema.ModelT) -> bytes:
    """The bytes of a file with this content; up to 2 GB, the limit of flatbuffers and of phones."""
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def operators(model: schema.ModelT) -> list[dict]:
    """Each operator in its order: dicts with name, tensor (of its first output), and the types of weights and result.

    `weights` is None for an operator without constant numbers; biases and shapes do not count as such.
    """
    return [entry for graph in model.subgraphs for entry in _described(model, graph)]


def _described(model: schema.ModelT, graph: schema.SubGraphT):
    stored = _dequantized(model, graph)
    for operator, name in steps(model, graph):
        if name == "DEQUANTIZE" and operator.outputs[0] in stored:
            continue  # the way in which weights are kept, no step of the computation
        constants = {}
        for position, index in enumerate(operator.inputs):
            if index < 0 or position == _BIAS.get(name):
                continue
            tensor = stored.get(index, graph.tensors[index])
            kind = type_name(tensor.type)
            if model.buffers[tensor.buffer].data is not None and kind not in ("int32", "int64", "bool"):
                constants[size_of(tensor)] = kind
        output = graph.tensors[operator.outputs[0]]
        yield {
            "name": name,
            "tensor": _text(output.name),
            "weights": constants[max(constants)] if constants else None,
            "result": type_name(output.type),
        }


def _dequantized(model: schema.ModelT, graph: schema.SubGraphT) -> dict[int, schema.TensorT]:
    """Outputs of DEQUANTIZE -> the constant that is stored."""
    return {
        operator.outputs[0]: graph.tensors[operator.inputs[0]]
        for operator, name in steps(model, graph)
        if name == "DEQUANTIZE" and model.buffers[graph.tensors[operator.inputs[0]].buffer].data is not None
    }


def type_name(kind: int) -> str:
    """The name of a tensor's type, such as `int8`."""
    return _TYPES.get(kind, f"type {kind}").lower()


def size_of(tensor: schema.TensorT) -> int:
    """The number of elements, an open batch counted as one."""
    return int(np.prod(np.maximum(tensor.shape, 1))) if tensor.shape is not None else 1


def _text(name: bytes | None) -> str:
    return (name or b"").decode(errors="replace")


def min_runtime(model: schema.ModelT) -> str | None:
    """The oldest TensorFlow Lite runtime that reads the file, such as `2.4.0`."""
    for entry in model.metadata or []:
        if entry.name == b"min_runtime_version":
            return bytes(model.buffers[entry.buffer].data).rstrip(b"\0").decode()
    return None


def stayed_float(model: schema.ModelT, quantization: str) -> list[dict]:
    """Operators of a quantized file that kept float numbers: dicts with operator, tensor (a name) and reason.

    In an int8 file those that compute in float; in a float16, dynamic or int4 file those with float32 constants, biases
    left aside. Nothing for `none`.
    """
    if quantization == "none":
        return []
    find = _float_computations if quantization == "int8" else _float_constants
    return [entry for graph in model.subgraphs for entry in find(model, graph, quantization)]


def _float_computations(model: schema.ModelT, graph: schema.SubGraphT, _: str):
    for operator, name in steps(model, graph):
        ends = [i for i in (*operator.inputs, *operator.outputs) if i >= 0]
        if name in ("QUANTIZE", "DEQUANTIZE") or all(graph.tensors[i].type != _FLOAT32 for i in ends):
            continue
        reason = "the converter has no int8 version of this operator: it computes in float, between conversions"
        yield _entry(name, graph.tensors[operator.outputs[0]], reason)


def _float_constants(model: schema.ModelT, graph: schema.SubGraphT, quantization: str):
    stored = {}  # outputs of DEQUANTIZE -> the constant that is stored
    for operator, name in steps(model, graph):
        if name == "DEQUANTIZE":
            stored[operator.outputs[0]] = graph.tensors[operator.inputs[0]]
            continue
        for position, index in enumerate(operator.inputs):
            tensor = graph.tensors[index]
            size = int(np.prod(tensor.shape)) if tensor.shape is not None else 1
            if index < 0 or position == _BIAS.get(name) or size == 1:
                continue
            if index in stored and quantization == "dynamic" and stored[index].type == schema.TensorType.INT8:
                reason = "stored as int8, computed in float: the operator has no dynamic-range kernel"
                yield _entry(name, stored[index], reason)
            elif tensor.type == _FLOAT32 and model.buffers[tensor.buffer].data is not None:
                yield _entry(name, tensor, _reason(name, size, quantization))


def _reason(name: str, size: int, quantization: str) -> str:
    if quantization == "float16":
        return f"the converter left these {size:,} elements in float32"
    if quantization == "int4":
        return f"{size:,} elements: litert-quantizer has no int4 version of {name}"
    if size < SMALL:
        return f"{size:,} elements: dynamic-range quantization leaves constants of fewer than {SMALL:,} float"
    return f"{size:,} elements: dynamic-range quantization does not know the operator {name}"


def _entry(name: str, tensor: schema.TensorT, reason: str) -> dict:
    return {"operator": name, "tensor": _text(tensor.name), "reason": reason}


def steps(model: schema.ModelT, graph: schema.SubGraphT):
    """Pairs of an operator and its name, in their order."""
    for operator in graph.operators or []:
        code = model.operatorCodes[operator.opcodeIndex]
        yield operator, _OPERATORS.get(max(code.builtinCode, code.deprecatedBuiltinCode), "UNKNOWN")


_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {code: name for name, code in vars(schema.TensorType).items() if not name.startswith("_")}
_KERNEL_OPERATORS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV")


def look_inside(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """(layer -> its int8 or float weights, output channels first, layer -> operators of it that compute in float).

    Of a file made by `converted`: there quantized layers name themselves.
    """
    model = schema.ModelT.InitFromPackedBuf(content)
    weights, floats = {}, {}
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            name = _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
            output = graph.tensors[operator.outputs[0]]
            layers = _layers(output.name.decode())
            if name in _KERNEL_OPERATORS:
                kernel = graph.tensors[operator.inputs[1]]
                values = _values(model, kernel)
                layers += _layers(kernel.name.decode())
                if values is not None:
                    if name == "DEPTHWISE_CONV_2D":
                        values = np.moveaxis(values, -1, 0)
                    weights |= {layer: values for layer in layers if layer not in weights}
            if output.type == schema.TensorType.FLOAT32 and name not in ("DEQUANTIZE", "QUANTIZE"):
                for layer in layers or ["(the model)"]:
                    floats.setdefault(layer, []).append(name)
    return weights, floats


def weights_of(content: bytes) -> list[np.ndarray]:
    """The int8 or float weights of every convolution and dense layer of any `.tflite`, output channels first."""
    model = schema.ModelT.InitFromPackedBuf(content)
    found = {}
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            if _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)] in _KERNEL_OPERATORS:
                tensor = graph.tensors[operator.inputs[1]]
                found[tensor.buffer] = _values(model, tensor)
    return [values for values in found.values() if values is not None]


def _layers(name: str) -> list[str]:
    """`net/quant_conv/Relu;net/quant_norm/Fused` -> [conv, norm]: the layers of which the converter made a tensor."""
    found = re.findall(r"/quant_([^/;]+)/", name)
    return list(dict.fromkeys(found))


def _values(model, tensor) -> np.ndarray | None:
    data = model.buffers[tensor.buffer].data
    if data is None:
        return None
    kind = {"INT8": np.int8, "FLOAT32": np.float32}.get(_TYPES[tensor.type])
    return None if kind is None else np.frombuffer(bytes(data), kind).reshape(tensor.shape)
