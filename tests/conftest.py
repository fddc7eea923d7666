"""All tests share this: quiet logs, no GPU, two logical CPUs for the strategies, small real data."""

import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# No test may use data that TensorFlow Datasets has prepared on this machine: this folder does not exist.
os.environ["TFDS_DATA_DIR"] = os.path.join(os.path.dirname(__file__), "no-datasets")
# No test may read or write the user's own teacher cache.
os.environ["KDISTILL_CACHE"] = tempfile.mkdtemp(prefix="kdistill-test-cache-")

import pytest
import tensorflow as tf

from kdistill.data.splits import Splits, load
from kdistill.recipe import Data

# TensorFlow creates logical devices only before it starts; a run without a strategy uses the first one.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def digits() -> Splits:
    """256 training, 256 validation and 256 test images of the sample that ships with kdistill."""
    return load(Data(train_limit=256))
