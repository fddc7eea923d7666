"""What is inside a `.tflite` file: the oldest runtime that reads it, and what stayed float, with the reason."""

from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

SMALL = 1024  # the converter's dynamic-range quantisation leaves constants with fewer elements float
_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
# Inputs at which these take their bias, which is float in a file without int8 activations.
_BIAS = {"CONV_2D": 2, "DEPTHWISE_CONV_2D": 2, "FULLY_CONNECTED": 2, "CONV_3D": 2, "TRANSPOSE_CONV": 3}
_FLOAT32 = schema.TensorType.FLOAT32


def read(path: str | Path) -> schema.ModelT:
    """The content of a file that has been opened by the interpreter before (which checks its structure)."""
    return schema.ModelT.InitFromPackedBuf(Path(path).read_bytes())


def min_runtime(model: schema.ModelT) -> str | None:
    """The oldest TensorFlow Lite runtime that reads the file, such as `2.4.0`."""
    for entry in model.metadata or []:
        if entry.name == b"min_runtime_version":
            return bytes(model.buffers[entry.buffer].data).rstrip(b"\0").decode()
    return None


def stayed_float(model: schema.ModelT, quantization: str) -> list[dict]:
    """Operators of a quantised file that kept float numbers: dicts with operator, tensor (a name) and reason.

    In an int8 file those that compute in float; in a float16 or dynamic file those with float32 constants, biases
    left aside. Nothing for `none`.
    """
    if quantization == "none":
        return []
    find = _float_computations if quantization == "int8" else _float_constants
    return [entry for graph in model.subgraphs for entry in find(model, graph, quantization)]


def _float_computations(model: schema.ModelT, graph: schema.SubGraphT, _: str):
    for operator, name in _operators(model, graph):
        ends = [i for i in (*operator.inputs, *operator.outputs) if i >= 0]
        if name in ("QUANTIZE", "DEQUANTIZE") or all(graph.tensors[i].type != _FLOAT32 for i in ends):
            continue
        reason = "the converter has no int8 version of this operator: it computes in float, between conversions"
        yield _entry(name, graph.tensors[operator.outputs[0]], reason)


def _float_constants(model: schema.ModelT, graph: schema.SubGraphT, quantization: str):
    stored = {}  # outputs of DEQUANTIZE -> the constant that is stored
    for operator, name in _operators(model, graph):
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
    if size < SMALL:
        return f"{size:,} elements: dynamic-range quantisation leaves constants of fewer than {SMALL:,} float"
    return f"{size:,} elements: dynamic-range quantisation does not know the operator {name}"


def _entry(name: str, tensor: schema.TensorT, reason: str) -> dict:
    return {"operator": name, "tensor": tensor.name.decode(errors="replace"), "reason": reason}


def _operators(model: schema.ModelT, graph: schema.SubGraphT):
    for operator in graph.operators or []:
        code = model.operatorCodes[operator.opcodeIndex]
        yield operator, _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]
