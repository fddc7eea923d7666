"""Kernels of a dynamic-range file back in float, where int8 loses too much."""

from collections.abc import Collection

from ai_edge_litert import schema_py_generated as schema

from kdistill.tflite import flatbuffer


def with_float_kernels(content: bytes, reference: bytes, tensors: Collection[str]) -> bytes:
    """A dynamic-range file in which some operators have their float32 weights again, and compute in float.

    Args:
        content: The dynamic-range file.
        reference: The float32 file of the same model.
        tensors: The names of what these operators give.

    Names that are in one of both files only, and operators without int8 weights, change nothing.
    """
    model, plain = flatbuffer.parse(content), flatbuffer.parse(reference)
    graph, plain_graph = model.subgraphs[0], plain.subgraphs[0]
    kernels = {
        flatbuffer.tensor_name(plain_graph.tensors[operator.outputs[0]]): operator.inputs
        for operator, _ in flatbuffer.named_operators(plain, plain_graph)
    }
    changed = set()
    for operator, _ in flatbuffer.named_operators(model, graph):
        name = flatbuffer.tensor_name(graph.tensors[operator.outputs[0]])
        if name not in tensors or name not in kernels:
            continue
        for place, index in enumerate(operator.inputs):
            tensor = graph.tensors[index]
            if index < 0 or index in changed or flatbuffer.type_name(tensor) != "int8":
                continue
            float_tensor = plain_graph.tensors[kernels[name][place]]
            if flatbuffer.is_constant(model, tensor) and list(float_tensor.shape) == list(tensor.shape):
                tensor.type, tensor.quantization = float_tensor.type, None
                buffer = schema.BufferT()
                buffer.data = plain.buffers[float_tensor.buffer].data
                model.buffers.append(buffer)
                tensor.buffer = len(model.buffers) - 1
                changed.add(index)
    return flatbuffer.pack(model)
