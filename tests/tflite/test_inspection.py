"""What `inspect` and `benchmark` say of files whose content is known, and of damaged ones."""

from pathlib import Path

import keras
import pytest
from keras import layers
from support.scripts import call
from support.small_models import CLASSES, corners, network

from kdistill.conversion.convert import convert
from kdistill.conversion.export import export
from kdistill.errors import InputError
from kdistill.recipe import Profile
from kdistill.tflite import benchmark as tflite_benchmark
from kdistill.tflite import flatbuffer, inspection
from kdistill.tflite.benchmark import benchmark

IMAGES = corners(60).images


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp("files"), network()
    int8 = Profile("npu", "int8", "int8", "int8", batch=1)
    kinds = {"plain": Profile("plain"), "half": Profile("half", "float16"), "npu": int8}
    about = {"license": "CC0-1.0", "version": "3"}
    return {
        name: export(net, folder / f"{name}.tflite", each, IMAGES, CLASSES, about)["path"]
        for name, each in kinds.items()
    }


@pytest.mark.slow
def test_operators_and_precision_by_layer(files):
    found = {name: inspection.inspect(path) for name, path in files.items()}
    assert {name: each["quantization"] for name, each in found.items()} == {
        **{"plain": "none", "half": "float16", "npu": "int8"}
    }
    for name, weights in (("plain", "float32"), ("half", "float16"), ("npu", "int8")):
        layers_ = {each["name"]: each for each in found[name]["layers"]}
        assert (layers_["CONV_2D"]["weights"], layers_["FULLY_CONNECTED"]["weights"]) == (weights, weights)
        assert layers_["RESHAPE"]["weights"] is None and "relu" in layers_["CONV_2D"]["tensor"]
        assert layers_["CONV_2D"]["result"] == ("int8" if name == "npu" else "float32")
        assert "DEQUANTIZE" not in layers_  # float16 weights are told as weights
    assert found["npu"]["operators"]["CONV_2D"] == 1 and found["npu"]["missing_in_micro"] == []
    assert found["npu"]["bytes_deflated"] < found["npu"]["bytes"] and found["npu"]["min_runtime"]


def test_the_text_says_it_all(files):
    text = "\n".join(inspection.lines(inspection.inspect(files["npu"], files["plain"], IMAGES)))
    for words in (
        "Stayed float: nothing",
        "license CC0-1.0",
        "version 3",
        "4 labels: north west",
        "'image': int8 [1, 12",
    ):
        assert words in text, text
    assert "int8 weights and activations" in text and "quantization costs most" in text and " dB " in f" {text} "


def test_a_file_of_another_origin(tmp_path):
    net = keras.Sequential([keras.Input((12, 12, 1)), layers.Conv2D(4, 3), layers.ELU(name="bend"), layers.Flatten()])
    path = tmp_path / "bare.tflite"
    path.write_bytes(convert(net, Profile("p", "int8", "int8", "int8"), IMAGES))
    found = inspection.inspect(path)
    assert found["metadata"] is None and [each["operator"] for each in found["float_layers"]] == ["ELU"]
    text = "\n".join(inspection.lines(found))
    assert "Metadata: none" in text and "no int8 version" in text


def test_damaged_files_are_refused(files, tmp_path):
    whole = Path(files["npu"]).read_bytes()
    for name, content in (("short", whole[:3000]), ("empty", b""), ("other", whole[:4] + b"TFL2" + whole[8:])):
        path = tmp_path / f"{name}.tflite"
        path.write_bytes(content)
        for look in (inspection.inspect, benchmark):
            with pytest.raises(InputError, match=f"{name}.tflite"):
                look(path)


def test_what_a_file_costs(files):
    found = benchmark(files["npu"], threads=(1,), baseline=files["plain"])
    assert [each["threads"] for each in found["latency"]] == [1]
    assert 0 < found["latency"][0]["median_us"] <= found["latency"][0]["p90_us"]
    assert {(each["operator"], each["count"]) for each in found["operators"]} == {
        *(("CONV_2D", 1), ("RESHAPE", 1), ("FULLY_CONNECTED", 1))
    }
    assert sum(each["share"] for each in found["operators"]) == pytest.approx(1) and found["not_timed"] == []
    assert found["accelerated"] in (True, False, None) and 0 <= found["peak_memory"] < 1e9 and found["load_ms"] > 0
    ratio = found["ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"] and ratio["baseline"] == files["plain"]
    text = "\n".join(tflite_benchmark.lines(found))
    assert "times as long" in text and "CONV_2D" in text and "deflated" in text


def test_two_files_are_measured_by_turns(monkeypatch):
    """One takes 10 µs, the other 30 µs an image: the ratio is 3 whatever the order of the turns."""

    class Fake:
        def __init__(self, batch):
            self.batch = batch

        def interpreter_on_noise(self):
            return self

        def invoke(self):
            pass

    monkeypatch.setattr(
        tflite_benchmark, "call_times", lambda file, runs: [10.0 if file.batch is None else 60.0] * runs
    )
    found = tflite_benchmark._side_by_side(Fake(None), Fake(2))
    assert found == {"median": 3.0, "low": 3.0, "high": 3.0, "this_us": 10.0, "baseline_us": 30.0}


def test_names_from_a_file_are_escaped_on_the_terminal(files, tmp_path):
    model = flatbuffer.parse(Path(files["npu"]).read_bytes())
    for tensor in model.subgraphs[0].tensors:
        tensor.name = b"a\x1b[2Jb\xc2\x9bc\nOperators: 9 SAFE"
    path = tmp_path / "hostile.tflite"
    path.write_bytes(bytes(flatbuffer.pack(model)))
    ended = call("inspect", path)
    assert ended.exit_code == 0 and r"a\x1b[2Jb\x9bc" in ended.output, ended.output
    assert not {"\x1b", "\x9b"} & set(ended.output) and "\nOperators: 9" not in ended.output
