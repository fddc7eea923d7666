"""Models that lose too much in int8, each for another reason: each ends in a file within its limits, or a message."""

import re

import keras
import numpy as np
import pytest
from keras import layers
from support.hard_models import dim, outliers, recurrent, shifted, wide_channels
from support.small_models import corners, network

import kdistill
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import Profile, Stage
from kdistill.recipe.loading import load_profile
from kdistill.repairs.ladder import int8_throughout
from kdistill.report.content import ATTEMPT
from kdistill.schema import check
from kdistill.tflite import flatbuffer

pytestmark = pytest.mark.slow
FREE = Profile("free", quantization="int8", min_agreement=0.98)  # float ends: layers may stay float
TRAIN, TEST = corners(300, seed=1), corners(200, seed=2)


def repair(model, folder, profile="npu", train=TRAIN, test=TEST, **options):
    """The result of `kdistill.repair`, or its error; and the lines that it has printed."""
    lines = []
    options = {"say": lines.append, **options}
    try:
        return kdistill.repair(model, folder, profile, train.images, examples=test, **options), lines
    except (InputError, CheckFailed) as error:
        return error, lines


def actions(result) -> list[tuple[str, str]]:
    """What was tried, and how it ended."""
    ends = [
        "skipped" if row["skipped"] else "holds" if row["holds"] else "refused"
        for row in (result["attempts"] if isinstance(result, dict) else result.attempts)
    ]
    rows = result["attempts"] if isinstance(result, dict) else result.attempts
    return [(row["action"].partition(":")[0], end) for row, end in zip(rows, ends, strict=True)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Channels of very different widths, repaired by making them equal; stopped and resumed on the way."""
    folder, model = tmp_path_factory.mktemp("wide"), wide_channels()
    whole, lines = repair(model, folder / "whole", keep=folder / "keep_whole")

    def interrupt(text):
        if "better calibration" in text:
            raise KeyboardInterrupt

    options = {"keep": folder / "keep"}
    with pytest.raises(KeyboardInterrupt):  # before the step is stored: it is repeated
        repair(model, folder / "parts", **options, say=interrupt)
    steps = [sorted(path.name for path in (folder / "keep").iterdir())]
    stopped = []

    def interrupt_later(text):
        stopped.append(text)
        if "channels of equal width" in text:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        repair(model, folder / "parts", **options, say=interrupt_later)
    steps.append(sorted(path.name for path in (folder / "keep").iterdir()))
    resumed, more = repair(model, folder / "parts", **options)
    again, last = repair(model, folder / "parts", **options)
    return {"whole": whole, "lines": lines, "steps": steps, "resumed": resumed, "more": more, "again": again} | {
        "last": last,
        "model": model,
        "folder": folder,
    }


@pytest.mark.exhaustive
def test_channels_of_very_different_widths(wide):
    result = wide["whole"]
    assert actions(result) == [
        ("as it is", "refused"),
        ("better calibration", "refused"),
        ("channels of equal width", "holds"),
    ]
    assert result["float_layers"] == [] and result["check"]["agreement"] >= 0.98
    content = flatbuffer.read(result["path"])
    assert {row["result"] for row in flatbuffer.operators(content)} == {"int8"}
    for row in result["attempts"]:
        check(row, ATTEMPT)
    last = result["attempts"][-1]
    assert last["bytes"] == result["bytes"] and last["microseconds"] > 0 and last["agreement"] >= 0.98
    assert len(wide["lines"]) == 3
    assert all(line.startswith("Repair for 'npu': ") for line in wide["lines"])
    assert re.search(r"as it is: .*refused\. .*cannot be used", wide["lines"][0])
    assert re.search(r"equal width: .* [\d,]+ bytes, \d+ µs, agreement 9\d|100.*holds its limits\.$", wide["lines"][2])


@pytest.mark.exhaustive
def test_an_interrupted_repair_resumes_behind_the_last_finished_step(wide):
    assert wide["steps"] == [[], ["ranges.json"]]
    assert wide["resumed"]["sha256"] == wide["whole"]["sha256"] == wide["again"]["sha256"]
    for result in (wide["resumed"], wide["again"]):
        assert actions(result) == actions(wide["whole"])
    assert [line.endswith("(finished before)") for line in wide["more"]] == [False, True, False]
    assert [line.endswith("(finished before)") for line in wide["last"]] == [False, True, True]


@pytest.mark.exhaustive
def test_finished_steps_are_of_one_model_and_data(wide):
    folder = wide["folder"]
    other, lines = repair(wide["model"], folder / "parts", keep=folder / "keep", test=corners(200, seed=3))
    assert not any("finished before" in line for line in lines)
    assert actions(other)[-1][1] == "holds"
    (folder / "keep" / "ranges.json").write_text('{"key": 1}')
    error, _ = repair(wide["model"], folder / "parts", keep=folder / "keep")
    assert isinstance(error, InputError) and "ranges.json" in str(error) and "Delete" in str(error)


@pytest.mark.exhaustive
def test_rare_outliers(tmp_path):
    result, _ = repair(outliers(), tmp_path, "npu", dim(400, seed=1, bright=2), dim(200, seed=2))
    assert actions(result) == [("as it is", "refused"), ("better calibration", "holds")]
    assert " % of the numbers at each end" in result["attempts"][1]["action"]


@pytest.mark.exhaustive
def test_layers_in_float_where_the_profile_permits_them(tmp_path):
    model = shifted()
    result, _ = repair(model, tmp_path / "free", FREE)
    assert actions(result)[-1] == ("layers in float", "holds")
    assert "first" in result["attempts"][-1]["action"]
    assert {row["reason"] for row in result["float_layers"]} == {"kept in float by repair: in int8 it loses too much"}

    error, _ = repair(model, tmp_path / "npu", "npu")
    assert isinstance(error, CheckFailed)
    assert dict(actions(error))["layers in float"] == dict(actions(error))["activations in int16"] == "skipped"
    assert "Repair tried: as it is (agreement" in str(error) and "layers in float (skipped)" in str(error)
    assert [row["reason"] for row in error.attempts if row["action"] == "layers in float"] == [
        "The profile 'npu' has integer inputs and outputs: it is for hardware that computes in int8."
    ]
    assert not (tmp_path / "npu").exists()


def test_which_profiles_permit_float():
    assert "for microcontrollers, in int8 throughout" in int8_throughout(load_profile("microcontroller"))
    assert "has integer inputs" in int8_throughout(Profile("ends", "int8", input_type="uint8"))
    assert "has integer outputs" in int8_throughout(Profile("ends", "int8", output_type="int8"))
    assert int8_throughout(FREE) == int8_throughout(load_profile("phone_cpu")) == ""


@pytest.mark.exhaustive
def test_recurrent_layers(tmp_path):
    result, _ = repair(recurrent(layers.Bidirectional(layers.LSTM(8))), tmp_path / "lstm")
    assert actions(result) == [("as it is", "refused"), ("recurrent layers unrolled", "holds")]
    assert "crashed" in result["attempts"][0]["reason"] and "WHILE" not in result["operators"]


def test_what_no_repair_changes_is_said_at_once(tmp_path):
    image = keras.Input((12, 12, 1))
    x = keras.ops.erf(layers.Flatten()(image))
    unsupported = keras.Model(image, layers.Dense(4)(keras.ops.linalg.qr(keras.ops.reshape(x, (-1, 12, 12)))[1][:, 0]))
    error, lines = repair(unsupported, tmp_path)
    assert isinstance(error, InputError) and "Repair cannot help" in str(error)
    assert len(lines) == 1

    fine = network()  # what tells the classes apart is smaller than the steps of float16
    kernel, bias = fine.get_layer("last").get_weights()
    fine.get_layer("last").set_weights([1 + 1e-4 * kernel, 1e-4 * bias])
    result, lines = repair(fine, tmp_path / "float16", "phone_gpu")
    assert isinstance(result, CheckFailed) and "Repair cannot help: with quantization 'float16'" in str(result)
    assert len(lines) == 1


def test_a_file_that_needs_no_repair(tmp_path):
    model = network()
    result, lines = repair(model, tmp_path, "phone_gpu")
    assert actions(result) == [("as it is", "holds")] and len(lines) == 1
    plain = kdistill.export(model, tmp_path / "plain", "phone_gpu", TRAIN.images, examples=TEST)
    assert result["sha256"] == plain["sha256"]  # the same bytes as export writes


def test_bytes_are_a_limit(tmp_path):
    error, _ = repair(network(), tmp_path / "small", "phone_gpu", max_bytes=1000)
    assert isinstance(error, CheckFailed) and re.search(r"has [\d,]+ bytes; the limit is 1,000", str(error))
    assert not (tmp_path / "small" / "student.tflite").exists()


def test_arguments_are_refused_before_anything_runs(tmp_path):
    for options, text in (
        ({"max_bytes": 0}, "max_bytes expects"),
        ({"teacher": network()}, "teacher does nothing without data"),
        ({"stage": Stage("qat")}, "stage does nothing without data"),
        ({"stage": Stage("prune"), "data": (TRAIN.images, TRAIN.labels)}, "quantization-aware training"),
    ):
        error, lines = repair(network(), tmp_path, **options)
        assert isinstance(error, InputError) and text in str(error) and not lines
    with pytest.raises(InputError, match="expects calibration"):
        kdistill.repair(network(), tmp_path, "npu", examples=TEST)


@pytest.mark.exhaustive
def test_training_with_the_teacher(tmp_path):
    """ReLU6 keeps channels from being made equal: what is left is training, which is tried last and only once."""
    model = wide_channels("relu6", span=3.0)
    profile = Profile("int8", "int8", "int8", "int8", batch=1, min_agreement=0.98)
    options = {"data": (TRAIN.images, TRAIN.labels), "teacher": model, "keep": tmp_path / "keep"}
    stage = Stage("qat", epochs=2, batch_size=32)
    result, lines = repair(model, tmp_path, profile, stage=stage, **options)
    assert actions(result)[-1][0] == "quantization-aware training" and actions(result)[-1][1] != "skipped"
    assert any("qat, epoch 2/2" in line for line in lines)
    assert keras.models.load_model(tmp_path / "keep" / "trained.keras").count_params() > 0
    attempts = result["attempts"] if isinstance(result, dict) else result.attempts
    assert attempts[-1]["bytes"] > 0 and attempts[-1]["agreement"] is not None

    again, lines = repair(model, tmp_path, profile, stage=stage, **options)
    assert actions(again) == actions(result) and not any("epoch" in line for line in lines)


@pytest.mark.exhaustive
def test_numbers_and_several_inputs(tmp_path):
    """Files of other heads are compared as theirs; where costs of layers cannot be measured, the table says so."""
    keras.utils.set_random_seed(0)
    inputs = [keras.Input((6,), name="left"), keras.Input((6,), name="right")]
    x = layers.Dense(16, activation="swish", name="first")(layers.Concatenate()(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="numbers")(x))
    kernel, bias = model.get_layer("first").get_weights()
    model.get_layer("first").set_weights([kernel, bias + 3000 * (np.arange(16) == 0)])
    kernel, bias = model.get_layer("numbers").get_weights()
    model.get_layer("numbers").set_weights([kernel * (np.arange(16) > 0)[:, None], bias])
    values = {name: np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32) for name in ("left", "right")}
    lines = []
    options = {"examples": (values, None), "head": "numbers", "say": lines.append}
    result = kdistill.repair(model, tmp_path, FREE, values, **options)
    rows = dict(actions(result))
    assert rows["layers in float"] == "skipped" and rows["activations in int16"] == "holds"
    assert "several inputs" in next(row["reason"] for row in result["attempts"] if row["skipped"])


def test_a_recurrent_layer_with_an_open_batch_size(tmp_path):
    result, _ = repair(recurrent(layers.LSTM(6)), tmp_path, "phone_cpu")
    assert actions(result) == [("as it is", "refused"), ("recurrent layers unrolled", "holds")]
    assert "TensorListReserve" in result["attempts"][0]["reason"]
