"""Running .tflite files: the numbers in and out, and files that are damaged."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.small_models import corners, network

import kdistill
from kdistill.conversion.convert import convert
from kdistill.errors import InputError
from kdistill.recipe import Profile
from kdistill.tflite import interpreter
from kdistill.tflite.interpreter import File, predict_isolated

PROFILES = {
    "float": Profile("float"),
    "int8": Profile("int8", "int8", "int8", "int8"),
    "uint8": Profile("uint8", "int8", "uint8", "float32"),
    "three": Profile("three", "int8", "int8", "int8", batch=3),
}


@pytest.fixture(scope="module")
def model():
    return network()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, profile in PROFILES.items():
        (folder / f"{name}.tflite").write_bytes(convert(model, profile, corners(60).images))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", PROFILES)
def test_every_kind_of_file_gives_the_models_logits(model, files, name):
    images = corners(10, seed=5).images  # no multiple of 3
    file = File(files / f"{name}.tflite")
    expected = np.asarray(model(images.astype("float32")))
    found = file.predict(images, batch_size=4)
    assert found.dtype == np.float32 and found.shape == (10, 4)
    np.testing.assert_allclose(found, expected, atol=1e-4 if name == "float" else 0.35)
    np.testing.assert_array_equal(file.predict(images.astype("float32")), found)
    np.testing.assert_array_equal(np.concatenate([file.predict(images[i : i + 1]) for i in range(10)]), found)
    assert file.predict(images[:0]).shape == (0, 4)


def test_a_file_says_what_it_takes_and_gives(files):
    file = File(files / "int8.tflite")
    assert file.input == {"name": "image", "shape": [None, 12, 12, 1], "type": "int8", "scale": 1.0, "zero_point": -128}
    assert (file.output["name"], file.output["type"], file.output["shape"]) == ("logits", "int8", [None, 4])
    assert file.output["scale"] > 0 and not file.probabilities and file.batch is None
    assert file.bytes == (files / "int8.tflite").stat().st_size
    assert file.operators()[0] == "CONV_2D" and "FULLY_CONNECTED" in file.operators()
    fixed = File(files / "three.tflite")
    assert (fixed.batch, fixed.input["shape"]) == (3, [3, 12, 12, 1])
    plain = File(files / "float.tflite")
    assert (plain.input["type"], plain.input["scale"], plain.input["zero_point"]) == ("float32", None, None)


def test_pixels_are_rounded_to_the_nearest_step_and_kept_in_range():
    end = {"type": "int8", "scale": 0.5, "zero_point": -10}
    found = interpreter.quantize(np.array([0.0, 1.0, 1.3, 255.0, -200.0]), end)
    assert found.tolist() == [-10, -8, -7, 127, -128] and found.dtype == np.int8


def test_latency_is_the_fastest_of_the_series(files, monkeypatch):
    found = File(files / "float.tflite").latency(warmup=2, runs=9, repeats=2)
    assert 0 < found["median_us"] <= found["p90_us"] < 1e6
    clock = iter([0, 9000, 0, 9000, 0, 9000, 0, 2000, 0, 4000, 0, 3000])
    monkeypatch.setattr(interpreter.time, "perf_counter_ns", lambda: next(clock))
    found = File(files / "three.tflite").latency(warmup=0, runs=3, repeats=2)
    assert found == {"median_us": 3.0, "p90_us": pytest.approx(3.8)}


def test_other_images_are_refused(files):
    file = File(files / "float.tflite")
    with pytest.raises(InputError, match=r"expects images \[n, 12, 12, 1\], received \[5, 9, 9, 1\]"):
        file.predict(np.zeros((5, 9, 9, 1), np.uint8))
    with pytest.raises(InputError, match="expects images"):
        file.predict(np.zeros((12, 12, 1), np.uint8))


def test_no_file_and_no_tflite_are_refused(tmp_path):
    with pytest.raises(InputError, match="no file"):
        File(tmp_path / "absent.tflite")
    for content in (b"", b"PK\3\4 a zip file", b"1234TFL3" + b"\xff" * 100):
        (tmp_path / "bad.tflite").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.tflite"):
            File(tmp_path / "bad.tflite")


@pytest.mark.slow
def test_damaged_files_are_an_input_error_or_run(files, tmp_path):
    """20 files cut off at random places, 20 with 4 bytes overwritten: none stops this process."""
    whole, rng, path = (files / "int8.tflite").read_bytes(), np.random.default_rng(0), tmp_path / "damaged.tflite"
    images, refused = corners(2).images, 0
    for i in range(40):
        content = bytearray(whole)
        place = int(rng.integers(8, len(whole) - 4))
        content[place:] = b"" if i < 20 else rng.bytes(4) + whole[place + 4 :]
        path.write_bytes(content)
        try:
            File(path).predict(images)
        except InputError as error:
            assert "damaged.tflite" in str(error) and "Traceback" not in str(error)
            refused += 1
        else:
            assert i >= 20, "a file that was cut off ran"
    assert refused > 20


@pytest.mark.slow
def test_a_crash_or_a_hang_stays_in_its_own_process(files, tmp_path, monkeypatch):
    """A stand-in for the module that the other process runs: LiteRT crashes on rare files of its own version only."""
    package = tmp_path / "kdistill"
    (package / "tflite").mkdir(parents=True)
    for folder in (package, package / "tflite"):
        (folder / "__init__.py").touch()
    monkeypatch.setattr(interpreter, "__file__", str(package / "tflite" / "interpreter.py"))
    monkeypatch.setattr(interpreter, "PASSED", set())
    (package / "tflite" / "interpreter.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(InputError, match="stopped the process that runs it \\(signal 11\\)"):
        File(files / "float.tflite")
    (package / "tflite" / "interpreter.py").write_text("import time; time.sleep(60)")
    with pytest.raises(InputError, match=r"did not finish within 1 s: it is damaged, or too slow"):
        predict_isolated(files / "float.tflite", corners(2).images, 1)
    (package / "tflite" / "interpreter.py").write_text("raise RuntimeError('out of luck')")
    with pytest.raises(InputError, match=r"float\.tflite' cannot be used: .*out of luck"):
        File(files / "float.tflite")
    (package / "tflite" / "interpreter.py").write_text("import os; os._exit(7)")
    with pytest.raises(InputError, match="exit status 7"):
        File(files / "float.tflite")


def test_the_same_bytes_are_tried_once(files, tmp_path, monkeypatch):
    tried, path = [], tmp_path / "one.tflite"
    monkeypatch.setattr(interpreter, "PASSED", set())
    monkeypatch.setattr(interpreter, "run_isolated", lambda module, path, seconds: tried.append(path.name))
    content = (files / "float.tflite").read_bytes()
    for name in ("one.tflite", "two.tflite"):
        (tmp_path / name).write_bytes(content)
        File(tmp_path / name)
    assert tried == ["one.tflite"]
    path.write_bytes(content + b"\0")
    File(path)
    assert tried == ["one.tflite"] * 2, "other bytes at the same place"


def test_private_names_of_litert(files):
    """A LiteRT that renames what the package uses fails here first."""
    opened = interpreter.open_interpreter(files / "float.tflite", delegates=False, keep_tensors=True)
    first = interpreter.operator_details(opened)[0]
    assert first["op_name"] == "CONV_2D" and len(first["inputs"]) == 3 and len(first["outputs"]) == 1
    names = interpreter.signatures(opened)
    assert names.keys() == {"serving_default"} and names["serving_default"]["outputs"].keys() == {"logits"}
    assert interpreter.signature_names(opened)[opened.get_input_details()[0]["index"]] == "image"


def test_another_process_gives_the_same_numbers(files):
    images = corners(9, seed=3).images
    path = files / "int8.tflite"
    np.testing.assert_array_equal(predict_isolated(path, images, 60), File(path).predict(images))


def test_nothing_of_tensorflow_is_imported(files, tmp_path):
    np.save(tmp_path / "images.npy", corners(3).images)
    paths = [str(path) for path in (files / "int8.tflite", tmp_path / "images.npy", tmp_path / "outputs.npy")]
    code = (
        "import sys\nfrom kdistill.tflite import interpreter\n"
        f"interpreter._main(*{paths})\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'tensorflow', 'keras', 'tf_keras'}))"
    )
    root = str(Path(kdistill.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert np.load(tmp_path / "outputs.npy").shape == (3, 4)
