"""The numbers of a run stay what they are, bit by bit, whatever is renamed or moved: weights, and bytes of files.

`digests.json` was written by `python tests/end_to_end/test_digests.py`. Bits depend on the processor's instructions and
the number of cores, so they are compared on machines like the one in the file. On others the norms of the weights are,
to within what other instructions change.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import keras
import numpy as np
import pytest

import kdistill
from kdistill.data.splits import load
from kdistill.networks import saving
from kdistill.recipe import Data
from kdistill.runs.sweep import sweep
from kdistill.tflite import metadata

pytestmark = pytest.mark.slow

STORED = Path(__file__).parent / "digests.json"
SETTINGS = ["exports=reference,phone_gpu,phone_cpu,npu,microcontroller,mediapipe"]
GRID = ["distillation_weight=0.5,1", "temperature=2,8"]
TOLERANCE = 0.02  # relative, of a norm, on another processor


def processor() -> list[str]:
    """What decides how TensorFlow's kernels round: vector instructions and number of cores."""
    flags = set(Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    vector = [flag for flag in flags if flag.startswith(("avx", "fma", "amx"))]
    return [*sorted(vector), f"{len(os.sched_getaffinity(0))} cores"]


def of_weights(weights: list[np.ndarray]) -> dict:
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(repr((weight.shape, weight.dtype.str)).encode())
        digest.update(np.ascontiguousarray(weight))
    return {"sha256": digest.hexdigest(), "norms": [float(np.linalg.norm(weight)) for weight in weights]}


def of_model(path: Path) -> dict:
    return of_weights(saving.load_model(path).get_weights())


def of_file(content: bytes) -> dict:
    """A `.tflite` without its metadata, which states versions."""
    return {"sha256": hashlib.sha256(metadata.bare(content)).hexdigest()}


def of_all(folder: Path) -> dict[str, dict]:
    """Everything that is compared, by name."""
    quiet = {"say": lambda text: None}
    run = folder / "run"
    kdistill.run(kdistill.load_recipe("mnist", "smoke", SETTINGS), run, cache="off", **quiet)
    digests = {f"run/{name}": of_model(run / f"{name}.keras") for name in ("teacher", "control", "student")}
    digests |= {f"run/{file.parent.name}": of_file(file.read_bytes()) for file in sorted(run.glob("*/student.tflite"))}
    more = kdistill.load_recipe("mnist", "smoke", [*SETTINGS, "seeds=2"])
    kdistill.run(more, run, cache="off", resume=True, force=True, **quiet)
    digests |= {f"resumed/{name}": of_model(run / f"{name}.keras") for name in ("student", "control-1", "student-1")}
    swept = folder / "sweep"
    sweep(kdistill.load_recipe("mnist", "smoke"), GRID, swept, cache="off", **quiet)
    for path in sorted(swept.rglob("*.keras")):
        digests[f"sweep/{path.relative_to(swept)}"] = of_model(path)
    return digests | of_compressed(run)


def of_compressed(run: Path) -> dict[str, dict]:
    teacher, student = (
        keras.saving.load_model(run / f"{name}.keras", compile=False) for name in ("teacher", "student")
    )
    splits = load(Data("mnist", train_limit=640))
    stage = kdistill.Stage("pqat", epochs=1, learning_rate=1e-3)
    result = kdistill.compress(student, stage, teacher, splits, say=lambda text: None)
    return {"compress": of_weights(result.model.get_weights()), "compress/tflite": of_file(result.tflite())}


@pytest.fixture(scope="module")
def digests(tmp_path_factory) -> dict[str, dict]:
    return of_all(tmp_path_factory.mktemp("digests"))


@pytest.mark.exhaustive
def test_the_same_bits_as_before(digests):
    stored = json.loads(STORED.read_text())
    assert digests.keys() == stored["digests"].keys()
    same_processor = processor() == stored["processor"]
    for name, expected in stored["digests"].items():
        if same_processor:
            assert digests[name]["sha256"] == expected["sha256"], name
        for a, b in zip(digests[name].get("norms", []), expected.get("norms", []), strict=True):
            assert math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE), name


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        values = {"processor": processor(), "digests": of_all(Path(folder))}
    STORED.write_text(json.dumps(values, indent=1) + "\n")
