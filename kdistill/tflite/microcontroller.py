"""A `.tflite` as C++ source for TensorFlow Lite Micro: the array, the operators it needs, an estimate of the arena."""

import math
from collections.abc import Sequence

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kdistill.errors import InputError
from kdistill.tflite import flatbuffer

# The operators of TensorFlow Lite Micro and the functions of its op resolver that add them: those that its own Python
# runtime registers (tflite-micro, python/tflite_micro/python_ops_resolver.cc, 2026-10), without custom ones.
OPERATORS = {
    "ABS": "Abs", "ADD": "Add", "ADD_N": "AddN", "ARG_MAX": "ArgMax", "ARG_MIN": "ArgMin",
    "ASSIGN_VARIABLE": "AssignVariable", "AVERAGE_POOL_2D": "AveragePool2D", "BATCH_TO_SPACE_ND": "BatchToSpaceNd",
    "BROADCAST_ARGS": "BroadcastArgs", "BROADCAST_TO": "BroadcastTo", "CALL_ONCE": "CallOnce", "CAST": "Cast",
    "CEIL": "Ceil", "CONCATENATION": "Concatenation", "CONV_2D": "Conv2D", "COS": "Cos", "CUMSUM": "CumSum",
    "DEPTH_TO_SPACE": "DepthToSpace", "DEPTHWISE_CONV_2D": "DepthwiseConv2D", "DEQUANTIZE": "Dequantize", "DIV": "Div",
    "ELU": "Elu", "EQUAL": "Equal", "EXP": "Exp", "EXPAND_DIMS": "ExpandDims", "FILL": "Fill", "FLOOR": "Floor",
    "FLOOR_DIV": "FloorDiv", "FLOOR_MOD": "FloorMod", "FULLY_CONNECTED": "FullyConnected", "GATHER": "Gather",
    "GATHER_ND": "GatherNd", "GREATER": "Greater", "GREATER_EQUAL": "GreaterEqual", "HARD_SWISH": "HardSwish",
    "IF": "If", "L2_NORMALIZATION": "L2Normalization", "L2_POOL_2D": "L2Pool2D", "LEAKY_RELU": "LeakyRelu",
    "LESS": "Less",
    "LESS_EQUAL": "LessEqual", "LOG": "Log", "LOG_SOFTMAX": "LogSoftmax", "LOGICAL_AND": "LogicalAnd",
    "LOGICAL_NOT": "LogicalNot", "LOGICAL_OR": "LogicalOr", "LOGISTIC": "Logistic", "MAX_POOL_2D": "MaxPool2D",
    "MAXIMUM": "Maximum", "MEAN": "Mean", "MINIMUM": "Minimum", "MIRROR_PAD": "MirrorPad", "MUL": "Mul", "NEG": "Neg",
    "NOT_EQUAL": "NotEqual", "PACK": "Pack", "PAD": "Pad", "PADV2": "PadV2", "PRELU": "Prelu", "QUANTIZE": "Quantize",
    "READ_VARIABLE": "ReadVariable", "REDUCE_MAX": "ReduceMax", "RELU": "Relu", "RELU6": "Relu6", "RESHAPE": "Reshape",
    "RESIZE_BILINEAR": "ResizeBilinear", "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighbor", "ROUND": "Round",
    "RSQRT": "Rsqrt", "SELECT_V2": "SelectV2", "SHAPE": "Shape", "SIN": "Sin", "SLICE": "Slice", "SOFTMAX": "Softmax",
    "SPACE_TO_BATCH_ND": "SpaceToBatchNd", "SPACE_TO_DEPTH": "SpaceToDepth", "SPLIT": "Split", "SPLIT_V": "SplitV",
    "SQRT": "Sqrt", "SQUARE": "Square", "SQUARED_DIFFERENCE": "SquaredDifference", "SQUEEZE": "Squeeze",
    "STRIDED_SLICE": "StridedSlice", "SUB": "Sub", "SUM": "Sum", "SVDF": "Svdf", "TANH": "Tanh",
    "TRANSPOSE": "Transpose", "TRANSPOSE_CONV": "TransposeConv",
    "UNIDIRECTIONAL_SEQUENCE_LSTM": "UnidirectionalSequenceLSTM", "UNPACK": "Unpack",
    "VAR_HANDLE": "VarHandle", "WHILE": "While", "ZEROS_LIKE": "ZerosLike",
}  # fmt: skip
ALIGNMENT = 16  # bytes, of the array and of the buffers in the arena
# Bookkeeping of TensorFlow Lite Micro in bytes: its structs on a 64-bit machine (on a 32-bit one about half).
_BASE, _TENSOR, _NODE, _CHANNEL = 1024, 24, 64 + 112, 8
_BYTES = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}


def check_operators(model: schema.ModelT, name: str) -> None:
    """Raises `InputError` for operators that TensorFlow Lite Micro lacks. `name`: of the profile."""
    missing = sorted({operator["name"] for operator in flatbuffer.operators(model)} - OPERATORS.keys())
    if missing:
        raise InputError(
            f"The model cannot be exported for '{name}': TensorFlow Lite Micro has no {', '.join(missing)}. "
            "Replace the layers that need it."
        )


def arena(model: schema.ModelT) -> dict[str, int]:
    """The memory that the file needs at run time, in bytes: activations, bookkeeping (an estimate) and total.

    Activations are placed as by TensorFlow Lite Micro's greedy planner: the largest first, at the lowest offset that no
    buffer alive at the same time covers. Add the scratch memory of optimized kernels (CMSIS-NN).
    """
    graph = model.subgraphs[0]
    alive = {index: [0, 0] for index in graph.inputs}
    for step, operator in enumerate(graph.operators):
        for index in operator.outputs:
            alive[index] = [step, step]
        for index in operator.inputs:
            if index in alive:
                alive[index][1] = max(alive[index][1], step)
    for index in graph.outputs:
        alive[index][1] = len(graph.operators)
    sizes = {index: _padded(_bytes_of(graph.tensors[index])) for index in alive}
    placed = []  # (offset, end, first, last)
    for index in sorted(alive, key=lambda index: (-sizes[index], -index)):
        first, last = alive[index]
        offset = 0
        for start, end, other_first, other_last in sorted(placed):
            if other_first <= last and first <= other_last and start < offset + sizes[index] and offset < end:
                offset = end
        placed.append((offset, offset + sizes[index], first, last))
    activations = max(end for _, end, _, _ in placed)
    channels = sum(
        _channels(graph.tensors[operator.inputs[1]]) for operator in graph.operators if len(operator.inputs) > 2
    )
    bookkeeping = _BASE + _TENSOR * len(graph.tensors) + _NODE * len(graph.operators) + _CHANNEL * channels
    return {
        "activations": activations,
        "bookkeeping": _padded(bookkeeping),
        "total": activations + _padded(bookkeeping),
    }


def source(content: bytes, file: dict, labels: Sequence[str] | None, name: str) -> tuple[str, str]:
    """The text of `NAME.h` and of `NAME.cc`. `content`: the model without metadata; `file`: its input and output."""
    model = flatbuffer.parse(content)
    memory = arena(model)
    used = sorted({operator["name"] for operator in flatbuffer.operators(model)})
    sizes, numbers = _sizes(file), "pixel" if len(file["input"]["shape"]) == 4 else "number"
    pixels = ", for pixels 0..255" if numbers == "pixel" else ""
    labels = [str(label) for label in labels or ()]
    guard = f"{name.upper()}_H_"
    header = f"""// Written by kdistill. The model of {name}.tflite without its metadata, for TensorFlow Lite Micro.
#ifndef {guard}
#define {guard}

#include <cstddef>
#include <cstdint>

namespace {name} {{

alignas({ALIGNMENT}) extern const unsigned char kModel[];
constexpr std::size_t kModelSize = {len(content)};

// An estimate for a 64-bit machine: activations {memory["activations"]:,}, bookkeeping {memory["bookkeeping"]:,}. Add
// the scratch memory of optimized kernels. Measure the size: interpreter.arena_used_bytes().
constexpr std::size_t kArenaSize = {memory["total"]};

{sizes}
// input = round({numbers} / kInputScale) + kInputZeroPoint{pixels}; output = (number - zero point) * scale.
{_end("Input", file["input"])}
{_end("Output", file["output"])}
extern const char* const kLabels[{max(len(labels), 1)}];
constexpr int kLabelCount = {len(labels)};

// For a tflite::MicroMutableOpResolver<kOperatorCount>.
constexpr int kOperatorCount = {len(used)};
template <typename Resolver>
void AddOperators(Resolver& resolver) {{
{chr(10).join(f"  resolver.Add{OPERATORS[operator]}();" for operator in used)}
}}

}}  // namespace {name}

#endif  // {guard}
"""
    rows = [content[start : start + 16] for start in range(0, len(content), 16)]
    numbers = ",\n".join("    " + ", ".join(f"0x{byte:02x}" for byte in row) for row in rows)
    texts = ", ".join(_c_string(label) for label in labels) or "nullptr"
    body = f"""// Written by kdistill.
#include "{name}.h"

namespace {name} {{

const char* const kLabels[] = {{{texts}}};

alignas({ALIGNMENT}) const unsigned char kModel[] = {{
{numbers}
}};

static_assert(sizeof(kModel) == kModelSize, "the array is incomplete");

}}  // namespace {name}
"""
    return header, body


def _sizes(file: dict) -> str:
    """The sizes of input and output: of an image height, width and channels, else the numbers of an example."""
    inputs, outputs = (file[end]["shape"][1:] for end in ("input", "output"))
    classes = f"kClasses = {outputs[-1] if outputs else 1}"
    if len(inputs) == 3 and len(outputs) == 1:
        return f"constexpr int kHeight = {inputs[0]}, kWidth = {inputs[1]}, kChannels = {inputs[2]}, {classes};"
    counts = f"kInputSize = {math.prod(inputs)}, kOutputSize = {math.prod(outputs)}"
    if len(inputs) == 3:
        counts = f"kHeight = {inputs[0]}, kWidth = {inputs[1]}, kChannels = {inputs[2]}, {counts}"
    return f"constexpr int {counts}, {classes};"


def _end(which: str, end: dict) -> str:
    scale, zero_point = end["scale"] or 1.0, end["zero_point"] or 0
    return f"constexpr float k{which}Scale = {scale:.9e}f; constexpr int k{which}ZeroPoint = {zero_point};"


def _c_string(text: str) -> str:
    """A C string literal. Everything but plain ASCII is written as octal bytes."""
    safe = [chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}" for byte in text.encode()]
    return f'"{"".join(safe)}"'


def _channels(tensor: schema.TensorT) -> int:
    """The number of scales of a weight tensor: the kernels store a multiplier and a shift per scale."""
    scales = tensor.quantization.scale if tensor.quantization is not None else None
    return 0 if scales is None else len(scales)


def _bytes_of(tensor: schema.TensorT) -> int:
    return _BYTES.get(flatbuffer.type_name(tensor), 4) * flatbuffer.element_count(tensor)


def _padded(size: int) -> int:
    return int(np.ceil(size / ALIGNMENT)) * ALIGNMENT
