"""A `.tflite` with short names of its tensors: the same numbers in fewer bytes.

TensorFlow names a tensor by all operations that were fused into it. In a file of a few kilobytes these names take more
than the weights. A short name is that of the layer, `conv1`, with a number behind it where the layer has several.
"""

from ai_edge_litert import schema_py_generated as schema

from kdistill.tflite import flatbuffer


def with_short_names(content: bytes) -> bytes:
    """The file with short names of all tensors but its inputs and outputs."""
    model = flatbuffer.parse(content)
    for graph in model.subgraphs:
        ends = {*graph.inputs, *graph.outputs}
        results = [index for operator in graph.operators for index in operator.outputs]
        # Results first: they keep the plain name of the layer, in a float file and in a quantized one.
        order = dict.fromkeys([*results, *range(len(graph.tensors))])
        taken = {flatbuffer.tensor_name(graph.tensors[index]) for index in ends}
        for index in order:
            if index >= 0 and index not in ends:
                _shorten(graph.tensors[index], taken)
    return flatbuffer.pack(model)


def _shorten(tensor: schema.TensorT, taken: set[str]) -> None:
    short = plain = _layer(flatbuffer.tensor_name(tensor))
    number = 1
    while short in taken:
        short, number = f"{plain}/{number}", number + 1
    taken.add(short)
    tensor.name = short.encode()


def _layer(name: str) -> str:
    """`conv1` for `net_1/conv1_1/convolution;net_1/norm1_1/add`: the part behind the model's name."""
    parts = name.split(";")[0].split("/")
    part = parts[1] if len(parts) > 1 else parts[0]
    head, _, tail = part.rpartition("_")
    return head if head and tail.isdigit() else part  # TensorFlow adds a number where a layer is traced again
