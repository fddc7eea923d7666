"""The metadata inside a `.tflite` file: labels, normalization, version, license, provenance.

The format is TFLite's own (the schema "M001", which MediaPipe and Android Studio read): a flatbuffer in the metadata
entry `TFLITE_METADATA`, and a zip archive behind the model with `labels.txt` and `model.json`. The archive is written
last, as tools that rewrite a file drop it. Its times are fixed, so that the same content gives the same bytes.
"""

import io
import json
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from kdistill import archives
from kdistill.errors import InputError
from kdistill.tflite import flatbuffer

ENTRY, IDENTIFIER = b"TFLITE_METADATA", b"M001"
LABELS, DOCUMENT = "labels.txt", "model.json"
LARGEST = 1 << 24  # bytes; larger files in the archive are not read
MOST_FILES = 16  # in the archive: labels, a document, and what other tools add
# The values of an input: a file has its normalization inside, unless the user wants the model's own range.
RAW_PIXELS, OWN_RANGE = "raw pixels 0..255", "numbers in the range on which the model was trained"
# Numbers of the schema: kinds of associated files, of content, of colors.
_DESCRIPTIONS, _AXIS_LABELS = 1, 2
_FEATURE, _IMAGE = 1, 2
_RGB, _GRAYSCALE = 1, 2


def write(content: bytes, document: dict, labels: Sequence[str] | None, deflated: bool = False) -> bytes:
    """The bytes of a `.tflite` file with this metadata instead of its own. `deflated`: `model.json` is compressed.

    `document` becomes `model.json`. The entry takes from it name, description, version, author, license, input (a dict
    with shape, values, mean, std) or inputs (dicts with name, values), and outputs (dicts with name, values, position;
    the first one has the labels).
    """
    model = flatbuffer.parse(bare(content))
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(_entry(document, labels is not None), np.uint8)
    entry = schema.MetadataT()
    entry.name, entry.buffer = ENTRY, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata = [*(model.metadata or []), entry]
    file = io.BytesIO(flatbuffer.pack(model))
    with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
        if labels is not None:
            _add(archive, LABELS, "".join(f"{label}\n" for label in labels))
        _add(archive, DOCUMENT, json.dumps(document, separators=(",", ":")) + "\n", deflated)
    return file.getvalue()


def bare(content: bytes) -> bytes:
    """The model alone, without this metadata and without an archive, as a microcontroller needs it."""
    model = flatbuffer.parse(content)
    others = [entry for entry in model.metadata or [] if entry.name != ENTRY]
    for entry in model.metadata or []:
        if entry.name == ENTRY:
            model.buffers[entry.buffer].data = None
            if entry.buffer == len(model.buffers) - 1:
                model.buffers.pop()
    model.metadata = others
    return flatbuffer.pack(model)


def read(content: bytes) -> dict | None:
    """The metadata of a file: name, description, version, author, license, inputs, outputs, labels, document.

    None for a file without metadata; labels and document are None where they are absent. The interpreter must have
    opened the file before. Raises `InputError` for damaged metadata.
    """
    model = flatbuffer.parse(content)
    entry = next((item for item in model.metadata or [] if item.name == ENTRY), None)
    if entry is None:
        return None
    try:
        values = _read_entry(bytes(model.buffers[entry.buffer].data))
        files = _files(content)
        labels = next((out["labels_file"] for out in values["outputs"] if out["labels_file"]), None)
        values["labels"] = files[labels].decode().splitlines() if labels in files else None
        values["document"] = json.loads(files[DOCUMENT]) if DOCUMENT in files else None
    except Exception as error:  # struct, zipfile and json raise anything on damaged bytes
        raise InputError(f"The metadata of the file is damaged ({type(error).__name__}: {error}).") from None
    return values


def of_file(path: str | Path) -> dict | None:
    """The metadata of the file at this path, see `read`."""
    try:
        return read(Path(path).read_bytes())
    except InputError as error:
        raise InputError(f"'{path}': {error}") from None


def _add(archive: zipfile.ZipFile, name: str, text: str, deflated: bool = False) -> None:
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    archive.writestr(info, text.encode(), zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED)


def _files(content: bytes) -> dict[str, bytes]:
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        archives.check_zip(archive, min(len(content), LARGEST))
        small = [member for member in archive.infolist() if member.file_size <= LARGEST]
        if len(small) > MOST_FILES:
            raise ValueError(f"the archive has {len(small):,} files, of at most {MOST_FILES}")
        return {member.filename: archive.read(member) for member in small}


def _image(document: dict) -> dict:
    """The table of an input that is an image."""
    height, width, channels = document["input"]["shape"][1:]
    colors = _RGB if channels == 3 else _GRAYSCALE
    image = {0: ("Int8", colors), 1: {0: ("Uint32", width), 1: ("Uint32", height)}}
    numbers = [np.asarray(document["input"][key], np.float32) for key in ("mean", "std")]
    normalization = {0: ("Uint8", 1), 1: {0: numbers[0], 1: numbers[1]}}
    range_ = [np.asarray([limit], np.float32) for limit in (255, 0)]
    return {
        0: "image",
        1: document["input"]["values"],
        3: {0: ("Uint8", _IMAGE), 1: image},
        4: [normalization],
        5: {0: range_[0], 1: range_[1]} if document["input"]["values"] == RAW_PIXELS else None,
    }


def _entry(document: dict, labeled: bool) -> bytes:
    feature = {0: ("Uint8", _FEATURE), 1: {}}
    if "input" in document:
        inputs = [_image(document)]
    else:  # of tensors that are no images
        inputs = [{0: one["name"], 1: one["values"], 3: feature} for one in document["inputs"]]
    tables = []
    for index, output in enumerate(document["outputs"]):
        table = {0: output["name"], 1: output["values"], 3: {0: ("Uint8", _FEATURE), 1: {}}}
        if index == 0 and output["values"].startswith("probabilities"):
            table[5] = {0: np.asarray([1], np.float32), 1: np.asarray([0], np.float32)}
        if index == 0 and labeled:
            table[6] = [
                {0: LABELS, 1: "The classes, one a line, in the order of the output.", 2: ("Int8", _AXIS_LABELS)}
            ]
        tables.append(table)
    # The schema wants the tables in the order of the graph's outputs.
    pairs = sorted(zip(document["outputs"], tables, strict=True), key=lambda pair: pair[0]["position"])
    model = {
        0: document["name"],
        1: document["description"],
        2: document["version"],
        3: [{0: "main", 2: inputs, 3: [table for _, table in pairs]}],
        4: document["author"],
        5: document["license"],
        6: [{0: DOCUMENT, 1: "Input, output, provenance and figures, as JSON.", 2: ("Int8", _DESCRIPTIONS)}],
        7: "1.0.0",
    }
    builder = flatbuffers.Builder(1024)
    builder.Finish(_put(builder, model), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _put(builder: flatbuffers.Builder, value) -> int:
    """Writes a string, a vector, a list of tables, or a table (a dict of slot -> value); returns its offset.

    Single numbers in a table are pairs of a type and the number.
    """
    if isinstance(value, str):
        return builder.CreateString(value)
    if isinstance(value, np.ndarray):
        return builder.CreateNumpyVector(value)
    if isinstance(value, list):
        places = [_put(builder, item) for item in value]
        builder.StartVector(4, len(places), 4)
        for place in reversed(places):
            builder.PrependUOffsetTRelative(place)
        return builder.EndVector()
    value = {slot: item for slot, item in value.items() if item is not None}
    places = {slot: _put(builder, item) for slot, item in value.items() if not isinstance(item, tuple)}
    builder.StartObject(max(value, default=-1) + 1)
    for slot, item in value.items():
        if isinstance(item, tuple):
            getattr(builder, f"Prepend{item[0]}Slot")(slot, item[1], 0)
        else:
            builder.PrependUOffsetTRelativeSlot(slot, places[slot], 0)
    return builder.EndObject()


class _Table:
    """A table of a flatbuffer. Offsets are checked, as the bytes may be damaged."""

    def __init__(self, data: bytes, place: int):
        self.data, self.place = data, place
        self.slots = place - self._number("<i", place)
        self.size = self._number("<H", self.slots)

    def _number(self, kind: str, place: int):
        if place < 0:
            raise ValueError("an offset points before the data")
        return struct.unpack_from(kind, self.data, place)[0]

    def _field(self, slot: int) -> int | None:
        at = 4 + 2 * slot
        offset = self._number("<H", self.slots + at) if at < self.size else 0
        return self.place + offset if offset else None

    def _target(self, slot: int) -> int | None:
        field = self._field(slot)
        return None if field is None else field + self._number("<I", field)

    def number(self, slot: int, kind: str = "<b") -> int:
        field = self._field(slot)
        return 0 if field is None else self._number(kind, field)

    def _vector(self, slot: int, size: int) -> tuple[int, int]:
        target = self._target(slot)
        if target is None:
            return 0, 0
        count = self._number("<I", target)
        if target + 4 + count * size > len(self.data):
            raise ValueError("a list goes beyond the data")
        return target + 4, count

    def text(self, slot: int) -> str | None:
        start, count = self._vector(slot, 1)
        return self.data[start : start + count].decode() if start else None

    def floats(self, slot: int) -> list[float]:
        start, count = self._vector(slot, 4)
        return list(struct.unpack_from(f"<{count}f", self.data, start))

    def table(self, slot: int) -> "_Table | None":
        target = self._target(slot)
        return None if target is None else _Table(self.data, target)

    def tables(self, slot: int) -> "list[_Table]":
        start, count = self._vector(slot, 4)
        places = [start + 4 * i for i in range(count)]
        return [_Table(self.data, place + self._number("<I", place)) for place in places]


def _read_entry(data: bytes) -> dict:
    if data[4:8] != IDENTIFIER:
        raise ValueError(f"bytes 4 to 7 are {data[4:8]!r}, expected {IDENTIFIER!r}")
    model = _Table(data, struct.unpack_from("<I", data)[0])
    graphs = model.tables(3)
    graph = graphs[0] if graphs else None
    return {
        "name": model.text(0),
        "description": model.text(1),
        "version": model.text(2),
        "author": model.text(4),
        "license": model.text(5),
        "inputs": [_read_input(table) for table in graph.tables(2)] if graph else [],
        "outputs": [_read_output(table) for table in graph.tables(3)] if graph else [],
    }


def _read_input(tensor: _Table) -> dict:
    values = {"name": tensor.text(0), "description": tensor.text(1), "mean": None, "std": None, "colors": None}
    for unit in tensor.tables(4):
        if unit.number(0, "<B") == 1 and (options := unit.table(1)):
            values |= {"mean": options.floats(0), "std": options.floats(1)}
    content = tensor.table(3)
    if content and content.number(0, "<B") == _IMAGE and (image := content.table(1)):
        values["colors"] = {_RGB: "rgb", _GRAYSCALE: "gray"}.get(image.number(0))
    return values


def _read_output(tensor: _Table) -> dict:
    files = {file.number(2): file.text(0) for file in tensor.tables(6)}
    return {"name": tensor.text(0), "description": tensor.text(1), "labels_file": files.get(_AXIS_LABELS)}
