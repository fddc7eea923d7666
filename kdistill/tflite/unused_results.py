"""Results of operators that nothing reads, such as a part of a SPLIT, as outputs of a file for the time of a change."""

from collections.abc import Callable

from ai_edge_litert import schema_py_generated as schema

from kdistill.tflite import flatbuffer


def with_outputs(content: bytes, change: Callable[[bytes], bytes]) -> bytes:
    """`change(content)`, where every result of an operator with several results is used.

    Results that nothing reads become outputs for `change`, and are no outputs of the file that is returned.
    """
    model = flatbuffer.parse(content)
    graph = model.subgraphs[0]
    unused = _unused_results(graph)
    if not unused:
        return change(content)
    graph.outputs = [*graph.outputs, *unused]
    for signature in model.signatureDefs or []:
        if signature.subgraphIndex == 0:
            signature.outputs += [_named(f"unused_{position}", tensor) for position, tensor in enumerate(unused)]
    return _without_last_outputs(change(flatbuffer.pack(model)), len(unused))


def _unused_results(graph: schema.SubGraphT) -> list[int]:
    used = _used(graph)
    several = [operator.outputs for operator in graph.operators or [] if len(operator.outputs) > 1]
    return [int(tensor) for outputs in several for tensor in outputs if tensor not in used]


def _used(graph: schema.SubGraphT) -> set[int]:
    inputs = (operator.inputs for operator in graph.operators or [] if operator.inputs is not None)
    return {int(tensor) for tensors in (graph.outputs, *inputs) for tensor in tensors}


def _named(name: str, tensor: int) -> schema.TensorMapT:
    result = schema.TensorMapT()
    result.name, result.tensorIndex = name, tensor
    return result


def _without_last_outputs(content: bytes, count: int) -> bytes:
    """The file without its last `count` outputs, and without operators and tensors that only they need."""
    model = flatbuffer.parse(content)
    graph = model.subgraphs[0]
    removed = {int(tensor) for tensor in graph.outputs[-count:]}
    graph.outputs = [int(tensor) for tensor in graph.outputs[:-count]]
    for signature in model.signatureDefs or []:
        if signature.subgraphIndex == 0:
            signature.outputs = [output for output in signature.outputs if output.tensorIndex not in removed]
    while True:
        used = _used(graph)
        operators = [operator for operator in graph.operators if not used.isdisjoint(map(int, operator.outputs))]
        if len(operators) == len(graph.operators):
            break
        graph.operators = operators
    _drop_unreferenced(model, graph)
    return flatbuffer.pack(model)


def _drop_unreferenced(model: schema.ModelT, graph: schema.SubGraphT) -> None:
    """Removes the tensors that no operator, input or output names, and numbers the others anew."""
    outputs = (int(tensor) for operator in graph.operators for tensor in operator.outputs)
    kept = sorted((_used(graph) | set(outputs) | {int(tensor) for tensor in graph.inputs}) - {-1})
    place = {-1: -1} | {tensor: position for position, tensor in enumerate(kept)}

    def moved(tensors) -> list[int]:
        return [place[int(tensor)] for tensor in tensors]

    graph.tensors = [graph.tensors[tensor] for tensor in kept]
    graph.inputs, graph.outputs = moved(graph.inputs), moved(graph.outputs)
    for operator in graph.operators:
        operator.inputs, operator.outputs = (
            moved(operator.inputs if operator.inputs is not None else []),
            moved(operator.outputs),
        )
    for signature in model.signatureDefs or []:
        if signature.subgraphIndex == 0:
            for named in [*signature.inputs, *signature.outputs]:
                named.tensorIndex = place[int(named.tensorIndex)]
