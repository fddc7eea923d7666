"""What a file says of itself: written, read again, the same bytes, and damage that is told."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from support.small_models import CLASSES, corners, network

from kdistill.conversion import convert
from kdistill.conversion.export import export
from kdistill.errors import InputError
from kdistill.recipe import Profile
from kdistill.tflite import flatbuffer, metadata
from kdistill.tflite.interpreter import File

ABOUT = {"version": "1.2", "license": "CC0-1.0", "author": "Ada", "recipe": {"name": "mnist"}, "data": "0123abcd"}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "corner.tflite"
    names = (*CLASSES[:3], "Süd-Ost 東南")
    return export(network(), path, "reference", class_names=names, about=ABOUT), names


@pytest.mark.slow
def test_what_was_written_is_read(file):
    made, names = file
    found = metadata.of_file(made["path"])
    assert (found["version"], found["license"], found["author"]) == ("1.2", "CC0-1.0", "Ada")
    assert found["name"] == "small" and "reference" in found["description"]
    assert found["labels"] == list(names)
    assert [(each["name"], each["mean"], each["std"], each["colors"]) for each in found["inputs"]] == [
        ("image", [0.0], [1.0], "gray")
    ]
    assert [(each["name"], each["labels_file"]) for each in found["outputs"]] == [("logits", "labels.txt")]
    origin = found["document"]["provenance"]
    assert (origin["recipe"], origin["data"]) == ({"name": "mnist"}, "0123abcd")
    assert origin["weights_sha256"] == made["weights_sha256"] and len(made["weights_sha256"]) == 64


def test_the_archive_has_no_times_and_can_be_read_by_zip(file):
    content = Path(file[0]["path"]).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.namelist() == ["labels.txt", "model.json"] and archive.testzip() is None
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}  # others cannot be mapped
        assert json.loads(archive.read("model.json"))["signature"] == "serving_default"


def test_writing_again_replaces_and_gives_the_same_bytes(file):
    content = Path(file[0]["path"]).read_bytes()
    found = metadata.read(content)
    assert metadata.write(content, found["document"], found["labels"]) == content
    other = metadata.write(content, {**found["document"], "version": "2"}, ["a", "b", "c", "d"])
    assert metadata.read(other)["version"] == "2" and metadata.read(other)["labels"] == ["a", "b", "c", "d"]
    assert metadata.bare(other) == metadata.bare(content)
    assert metadata.read(metadata.bare(content)) is None
    assert b"labels.txt" not in metadata.bare(content)


def test_metadata_changes_no_number(file, tmp_path):
    content = Path(file[0]["path"]).read_bytes()
    (tmp_path / "bare.tflite").write_bytes(metadata.bare(content))
    images = corners(5).images
    np.testing.assert_array_equal(File(file[0]["path"]).predict(images), File(tmp_path / "bare.tflite").predict(images))


@pytest.mark.slow
def test_a_file_of_another_origin_has_none():
    assert metadata.read(convert.convert(network(), Profile("p"))) is None


def test_damaged_metadata_is_an_input_error(file):
    """The entry's own bytes, each overwritten in turn: an answer or an InputError, never anything else."""
    content = Path(file[0]["path"]).read_bytes()
    model = flatbuffer.parse(content)
    entry = next(each for each in model.metadata if each.name == metadata.ENTRY)
    whole = bytes(model.buffers[entry.buffer].data)
    refused = 0
    for place in range(0, len(whole), 3):
        for byte in (0, 127, 255):
            model.buffers[entry.buffer].data = np.frombuffer(
                whole[:place] + bytes([byte]) + whole[place + 1 :], np.uint8
            )
            try:
                metadata._read_entry(bytes(model.buffers[entry.buffer].data))
            except (ValueError, metadata.struct.error):
                refused += 1
    assert refused > 20
    start = content.index(b"M001") - 4
    broken = content[:start] + b"\xff" * 4 + content[start + 4 :]
    with pytest.raises(InputError, match="metadata of the file is damaged"):
        metadata.read(broken)


@pytest.mark.slow
def test_weights_outside_the_flatbuffer_are_read(tmp_path):
    """Large files keep buffers behind the flatbuffer, at an offset; here a small one is written so by hand."""
    content = convert.convert(network(), Profile("p"))
    model = flatbuffer.parse(content)
    index = max(
        range(len(model.buffers)), key=lambda i: 0 if model.buffers[i].data is None else len(model.buffers[i].data)
    )
    weights = bytes(model.buffers[index].data)
    buffer = schema.BufferT()
    buffer.offset, buffer.size = 1 << 40, len(weights)  # takes its eight bytes; the true place is known afterwards
    model.buffers[index] = buffer
    packed = flatbuffer.pack(model)
    packed += bytes(-len(packed) % 16)
    outside = packed.replace((1 << 40).to_bytes(8, "little"), len(packed).to_bytes(8, "little")) + weights
    inside = flatbuffer.parse(outside)
    assert bytes(inside.buffers[index].data) == weights and inside.buffers[index].offset == 0
    document = {"name": "n", "description": "d", "version": "1", "author": None, "license": None}
    ends = {"input": {"shape": [None, 12, 12, 1], "values": "v", "mean": [0.0], "std": [1.0]}}
    ends["outputs"] = [{"name": "logits", "values": "logits", "position": 0}]
    (tmp_path / "a.tflite").write_bytes(content)
    (tmp_path / "b.tflite").write_bytes(metadata.write(outside, document | ends, CLASSES))
    images = corners(3).images
    np.testing.assert_array_equal(
        File(tmp_path / "a.tflite").predict(images), File(tmp_path / "b.tflite").predict(images)
    )
