"""The C++ source of a file: compiled, its bytes compared; the operators of TensorFlow Lite Micro; the arena."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import keras
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from keras import layers
from support.small_models import CLASSES, corners, network

from kdistill.conversion.export import export
from kdistill.errors import InputError
from kdistill.recipe.loading import load_profile
from kdistill.tflite import flatbuffer, metadata, microcontroller
from kdistill.tflite.interpreter import File, quantize

TFLM = os.environ.get("KDISTILL_TFLM_PYTHON")
LABELS = (*CLASSES[:3], 'Süd "Ost"?')
IMAGES = corners(60).images
PROGRAM = """
#include <cstdio>
#include <set>
#include <string>
#include "student.h"
struct Resolver {
  std::set<std::string> added;
  void AddConv2D() { added.insert("CONV_2D"); }
  void AddFullyConnected() { added.insert("FULLY_CONNECTED"); }
  void AddReshape() { added.insert("RESHAPE"); }
};
int main() {
  Resolver resolver;
  student::AddOperators(resolver);
  std::fprintf(stderr, "%d %d %zu %d\\n", (int)((std::size_t)student::kModel % 16), (int)resolver.added.size() ==
      student::kOperatorCount, student::kArenaSize, student::kInputZeroPoint);
  for (int i = 0; i < student::kLabelCount; ++i) std::fprintf(stderr, "%s\\n", student::kLabels[i]);
  std::fwrite(student::kModel, 1, student::kModelSize, stdout);
}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    return export(network(), folder, "microcontroller", IMAGES, LABELS), folder


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++ here")
def test_the_compiled_array_is_the_model(made, tmp_path):
    found, folder = made
    names = ["labels.txt", "model.json", "student.cc", "student.h", "student.tflite"]
    assert sorted(path.name for path in folder.iterdir()) == names
    (tmp_path / "main.cc").write_text(PROGRAM)
    sources = [tmp_path / "main.cc", folder / "student.cc"]
    command = ["g++", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", folder, *sources, "-o", tmp_path / "program"]
    subprocess.run(command, check=True)
    done = subprocess.run([tmp_path / "program"], capture_output=True, check=True)
    assert done.stdout == metadata.bare(Path(found["path"]).read_bytes())
    first, *labels = done.stderr.decode().splitlines()
    assert first == f"0 1 {found['arena']['total']} -128" and labels == list(LABELS)
    (tmp_path / "again.tflite").write_bytes(done.stdout)
    expected = File(found["path"]).predict(IMAGES[:9])
    np.testing.assert_array_equal(File(tmp_path / "again.tflite").predict(IMAGES[:9]), expected)


def test_the_names_are_those_of_the_schema():
    known = vars(schema.BuiltinOperator)
    assert microcontroller.OPERATORS.keys() <= known.keys()
    for builtin, name in microcontroller.OPERATORS.items():
        assert builtin.replace("_", "").lower() == name.lower()


def test_the_arena_by_hand(made):
    """12x12x1 in, convolution 5x5x8, its copy reshaped to 200, dense 4: the largest pair that is alive together."""
    inside = flatbuffer.parse(metadata.bare(Path(made[0]["path"]).read_bytes()))
    names = [each["name"] for each in flatbuffer.operators(inside)]
    assert names == ["CONV_2D", "RESHAPE", "FULLY_CONNECTED"]
    found = microcontroller.arena(inside)
    assert found["activations"] == 208 + 208  # 5 * 5 * 8 = 200, to a multiple of 16, twice; 144 and 4 fit beside
    assert found["total"] == found["activations"] + found["bookkeeping"] == made[0]["arena"]["total"]


def test_an_operator_that_micro_lacks_is_refused(tmp_path):
    image = keras.Input((12, 12, 1))
    x = layers.Conv2D(4, 3)(image)
    model = keras.Model(image, layers.Dense(4)(layers.Flatten()(keras.ops.cumsum(keras.ops.flip(x, 1), 1))))
    with pytest.raises(InputError, match="TensorFlow Lite Micro has no REVERSE_V2"):
        export(model, tmp_path, "microcontroller", IMAGES)
    assert list(tmp_path.iterdir()) == []
    assert load_profile("microcontroller").batch == 1


@pytest.mark.skipif(not TFLM, reason="KDISTILL_TFLM_PYTHON names no Python that has tflite-micro")
def test_tensorflow_lite_micro_runs_it_in_the_arena(made, tmp_path):
    found, _ = made
    file = File(found["path"])
    np.save(tmp_path / "numbers.npy", quantize(IMAGES[:8], file.input))
    script = Path(__file__).parents[2] / "benchmarks" / "tflite_micro_check.py"
    done = subprocess.run(
        [TFLM, script, found["path"], tmp_path / "numbers.npy"], capture_output=True, text=True, check=True
    )
    end = file.output
    outputs = (np.array(json.loads(done.stdout.splitlines()[0])) - end["zero_point"]) * end["scale"]
    np.testing.assert_allclose(outputs, file.predict(IMAGES[:8]), atol=1.01 * end["scale"])  # a step of rounding
    used = {kind: int(size) for kind, size in re.findall(r"allocation (total|head) (\d+)", done.stdout + done.stderr)}
    assert found["arena"]["activations"] == used["head"]
    assert used["total"] <= found["arena"]["total"] <= 1.3 * used["total"]
