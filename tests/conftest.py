"""All tests share this: quiet logs, no GPU, two logical CPUs for the strategies, small real data."""

import os
import random
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# No test may use data that TensorFlow Datasets has prepared on this machine: this folder does not exist.
os.environ["TFDS_DATA_DIR"] = os.path.join(os.path.dirname(__file__), "no-datasets")
# No test may read or write the user's own teacher cache.
os.environ["KDISTILL_CACHE"] = tempfile.mkdtemp(prefix="kdistill-test-cache-")

import numpy as np
import pytest
import tensorflow as tf
from support.isolated import Forks

from kdistill.data.splits import Splits, load
from kdistill.recipe import Data
from kdistill.tflite import interpreter

# TensorFlow creates logical devices only before it starts; a run without a strategy uses the first one.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)

# The files that take longest, begun first: with `--dist loadfile`, one that begins last ends alone.
LONGEST = [
    "end_to_end/test_digests.py",
    "training/test_strategy.py",
    "compression/test_ranges.py",
    "end_to_end/test_variants.py",
    "tests/test_code_blocks.py",
    "tests/test_notebooks.py",
    "end_to_end/test_recipes_images.py",
    "end_to_end/test_examples.py",
    "runs/test_run.py",
    "runs/test_sweep.py",
    "compression/test_compress.py",
    "conversion/test_worker.py",
    "training/test_fit.py",
    "teachers/test_replay.py",
    "conversion/test_range.py",
    "conversion/test_float32.py",
    "conversion/test_export_check.py",
    "distillation/test_keras_contracts.py",
    "distillation/test_hard_loss.py",
    "distillation/test_distiller.py",
    "runs/test_compressions.py",
    "conversion/test_check_numbers.py",
]


def pytest_collection_modifyitems(items):
    for item in items:
        # `exhaustive("a", "b")` means the members of these names alone, `exhaustive(but=("a", "b"))` all others; the
        # rest runs in `make test`.
        marker = item.get_closest_marker("exhaustive")
        names = marker and (marker.args or marker.kwargs.get("but"))
        if names and (item.callspec.id in names) != bool(marker.args):
            item.own_markers.remove(marker)
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get("/".join(item.path.parts[-2:]), len(LONGEST)))


@pytest.fixture(autouse=True)
def _seed():
    """Each test starts from the same weights and numbers, whichever tests ran before it.

    Keras draws the seeds of its layers from Python's. Setting TensorFlow's, too, would drop its compiled operations.
    """
    random.seed(0)
    np.random.seed(0)


@pytest.fixture(scope="session")
def digits() -> Splits:
    """256 training, 256 validation and 256 test images of the sample that ships with kdistill."""
    return load(Data(train_limit=256))


@pytest.fixture(scope="session", autouse=True)
def _forks():
    """The processes in which `.tflite` files run are forks here: most of a new Python's time is imports."""
    forks = Forks()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "subprocess", forks.as_subprocess())
        yield
    forks.close()
