"""The examples for those who consume a file: what can run here runs, the rest is compiled or read."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.small_models import CLASSES, corners, network

from kdistill.conversion.export import export
from kdistill.recipe import Profile
from kdistill.tflite.interpreter import File

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = corners(60).images
# What of TensorFlow Lite Micro main.cc uses; an interpreter that says the number of the largest pixel's quarter.
STUBS = {
    "tensorflow/lite/micro/micro_mutable_op_resolver.h": """
#pragma once
namespace tflite {
template <int N> struct MicroMutableOpResolver {
  int added = 0;
  int AddConv2D() { return ++added; }
  int AddFullyConnected() { return ++added; }
  int AddReshape() { return ++added; }
};
}
""",
    "tensorflow/lite/schema/schema_generated.h": """
#pragma once
namespace tflite { struct Model; inline const Model* GetModel(const void* data) { return (const Model*)data; } }
""",
    "tensorflow/lite/micro/micro_interpreter.h": """
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include "tensorflow/lite/schema/schema_generated.h"
enum TfLiteStatus { kTfLiteOk, kTfLiteError };
struct TfLiteTensor { union { std::int8_t* int8; } data; };
namespace tflite {
struct MicroInterpreter {
  TfLiteTensor in, out;
  std::int8_t pixels[144], scores[4] = {-5, 7, 3, -1};
  template <typename R> MicroInterpreter(const Model*, const R& r, std::uint8_t*, std::size_t size) {
    if (r.added != 3 || size < 1000) std::abort();
    in.data.int8 = pixels; out.data.int8 = scores;
  }
  TfLiteStatus AllocateTensors() { return kTfLiteOk; }
  std::size_t arena_used_bytes() const { return 1; }
  TfLiteTensor* input(int) { return &in; }
  TfLiteTensor* output(int) { return &out; }
  TfLiteStatus Invoke() { return pixels[0] == -128 && pixels[1] == 127 ? kTfLiteOk : kTfLiteError; }
};
}
""",
}


@pytest.mark.parametrize(
    "profile",
    [
        Profile("float"),
        Profile("pixels", input_type="uint8", output="probabilities"),
        Profile("int8", "int8", "int8", "int8", batch=1),
        Profile("uint8", "int8", "uint8", "uint8", batch=1),
    ],
    ids=lambda profile: profile.name,
)
def test_the_python_example_gives_what_kdistill_gives(profile, tmp_path):
    made = export(network(), tmp_path, profile, IMAGES, CLASSES)
    np.save(tmp_path / "image.npy", IMAGES[3])
    command = [sys.executable, EXAMPLES / "classify.py", made["path"], tmp_path / "image.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    expected = File(made["path"]).predict(IMAGES[3:4])[0]
    order = np.argsort(-expected)[:3]
    assert [name for name, _ in rows] == [CLASSES[i] for i in order]
    np.testing.assert_allclose([float(score) for _, score in rows], expected[order], atol=1e-4)


def test_the_python_example_takes_any_model(tmp_path):
    import keras
    from keras import layers

    words, sizes = keras.Input((6,), dtype="int32", name="words"), keras.Input((4,), name="sizes")
    x = layers.Concatenate()([layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(words)), sizes])
    ends = {"kind": (3, "softmax"), "price": (2, None), "tags": (2, "sigmoid"), "parts": (6, None)}
    outputs = {name: layers.Dense(*end, name=name)(x) for name, end in ends.items()}
    outputs["parts"] = layers.Reshape((3, 2), name="rows")(outputs["parts"])
    model = keras.Model([words, sizes], outputs)
    inputs = {"words": np.arange(6), "sizes": np.linspace(-1, 1, 4)}
    many = {name: np.stack([np.roll(part, place) for place in range(6)]) for name, part in inputs.items()}
    made = export(model, tmp_path, "npu", many, head={"price": "numbers"}, check=None)
    np.savez(tmp_path / "inputs.npz", **inputs)
    command = [sys.executable, EXAMPLES / "classify.py", made["path"], tmp_path / "inputs.npz"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    expected = {name: part[0] for name, part in File(made["path"]).run({n: p[:1] for n, p in many.items()}).items()}
    kind, tags = expected["kind"], expected["tags"]
    assert f"kind (classes)\n{kind.argmax()}\t{kind.max():.4f}\n" in text
    assert f"tags (labels)\n0\t{tags[0]:.4f}\t{'yes' if tags[0] > 0.5 else 'no'}\n" in text
    assert f"price (numbers)\n{np.array2string(expected['price'], precision=4)}\n" in text
    counts = np.bincount(expected["parts"].argmax(-1), minlength=2)
    assert all(f"{place}\t{count} positions" in text for place, count in enumerate(counts) if count)


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")
def test_the_microcontrollers_example_compiles_and_runs(tmp_path):
    """Against stand-ins for the headers of TensorFlow Lite Micro, which no package here has."""
    export(network(), tmp_path, "microcontroller", IMAGES, CLASSES)
    for name, text in STUBS.items():
        path = tmp_path / "stubs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "try.cc").write_text(
        "#include <cstdint>\n#include <cstdio>\nint Classify(const std::uint8_t*, float*);\nint main() {\n"
        "  std::uint8_t pixels[144] = {0, 255}; float score = 0;\n  int found = Classify(pixels, &score);\n"
        '  std::printf("%d %.6f\\n", found, score);\n}\n'
    )
    folder = EXAMPLES / "microcontroller"
    sources = [folder / "main.cc", tmp_path / "student.cc", tmp_path / "try.cc"]
    paths = [f"-I{each}" for each in (tmp_path, folder, tmp_path / "stubs")]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", *paths, *sources, "-o", tmp_path / "program"]
    subprocess.run(command, check=True, env={**os.environ, "LC_ALL": "C"})
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True, check=True)
    end = File(tmp_path / "student.tflite").output
    assert done.stdout.splitlines()[-1] == f"1 {(7 - end['zero_point']) * end['scale']:.6f}"


@pytest.mark.parametrize("name", ["Classifier.kt", "Classifier.swift"])
def test_the_phones_examples_read_what_is_there(name, tmp_path):
    """No Kotlin and no Swift compiler here: the names that they look for are those of a file, the brackets balance."""
    text = (EXAMPLES / name).read_text()
    made = export(network(), tmp_path, "npu", IMAGES, CLASSES)
    with zipfile.ZipFile(made["path"]) as archive:
        assert set(re.findall(r'"(\w+\.\w+)"', text)) <= {*archive.namelist(), "serving_default"}
    if name.endswith(".kt"):
        assert {'"image"', '"serving_default"', '"logits"', '"probabilities"'} <= set(re.findall(r'"\w+"', text))
    code = re.sub(r"//.*|\"[^\"\n]*\"", "", text)
    assert all(code.count(a) == code.count(b) for a, b in ("()", "[]", "{}"))
