"""The tensors inside of an `.onnx` file, and the same file with some of them as outputs. Standard library only.

`server.py` loads this file by its path, in any Python from 3.8 on. ONNX is protobuf: a message is a list of fields, and
a message that comes in two pieces is merged. So a few bytes behind the file add outputs to its graph.
"""

import difflib

GRAPH = 7  # the fields of a model,
NODE, OUTPUT = 1, 12  # of a graph,
NODE_OUTPUT, NAME = 2, 1  # of a node, and of the description of a tensor
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # kinds of fields


class Unusable(ValueError):
    """What is wrong with the file, or with a name, in a sentence."""


def with_taps(path, taps):
    """The bytes of an `.onnx` file in which these tensors are outputs. Raises `Unusable`."""
    with open(path, "rb") as file:
        content = file.read()
    tensors, outputs = tensors_of(content)
    for name in taps:
        if name not in tensors:
            near = difflib.get_close_matches(name, tensors, n=20, cutoff=0.0)
            names = ", ".join(near) + " and others" * (len(near) < len(tensors))
            raise Unusable(f"it has no tensor '{name}'. It computes {len(tensors)}: {names}. Fix the teacher_tap.")
    return with_outputs(content, [name for name in taps if name not in outputs])


def tensors_of(content):
    """The names of the tensors that the nodes of the graph compute, in the order of the nodes, and of its outputs."""
    names, outputs = [], []
    for graph in fields(content, GRAPH):
        for node in fields(graph, NODE):
            names += [text(name) for name in fields(node, NODE_OUTPUT) if len(name)]
        for value in fields(graph, OUTPUT):
            outputs += [text(name) for name in fields(value, NAME)]
    return names, outputs


def with_outputs(content, names):
    """The file with these tensors as outputs too, behind those that it has."""
    more = b"".join(field(OUTPUT, field(NAME, name.encode())) for name in names)
    return bytes(content) + field(GRAPH, more)


def fields(message, number):
    """The contents of the fields of a number whose kind is bytes: texts and messages. Raises `Unusable`."""
    message = memoryview(message)
    place, contents = 0, []
    while place < len(message):
        key, place = varint(message, place)
        kind = key & 7
        if kind == VARINT:
            _, place = varint(message, place)
            continue
        if kind == BYTES:
            size, place = varint(message, place)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise Unusable(f"its file is damaged (there is no kind {kind} of fields).")
        if place + size > len(message):
            raise Unusable("its file is damaged (it ends inside of a field).")
        if kind == BYTES and key >> 3 == number:
            contents.append(message[place : place + size])
        place += size
    return contents


def varint(message, place):
    """A number of seven bits in each byte, the lowest first, and the place behind it. Raises `Unusable`."""
    number, shift = 0, 0
    while place < len(message) and shift < 70:
        byte = message[place]
        number, place, shift = number | (byte & 127) << shift, place + 1, shift + 7
        if byte < 128:
            return number, place
    raise Unusable("its file is damaged (it ends inside of a number).")


def field(number, content):
    """A field of bytes."""
    return as_varint(number << 3 | BYTES) + as_varint(len(content)) + content


def as_varint(number):
    """The bytes of `varint`."""
    part = bytearray()
    while number > 127:
        part.append(number & 127 | 128)
        number >>= 7
    part.append(number)
    return bytes(part)


def text(content):
    """The name in a field."""
    return bytes(content).decode("utf-8", "replace")
