"""What all tests share: quiet logs, no GPU, two logical CPUs for the strategies, small real data."""

import os
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# What TensorFlow Datasets has prepared on this machine is not what the tests are about: there is no such folder.
os.environ["TFDS_DATA_DIR"] = os.path.join(os.path.dirname(__file__), "no-datasets")
# Nor may a test find, or leave, a teacher cache in the user's own folder.
os.environ["KDISTILL_CACHE"] = tempfile.mkdtemp(prefix="kdistill-test-cache-")

import pytest
import tensorflow as tf

from kdistill.data import splits
from kdistill.recipe import Data

# Logical devices can only be made before TensorFlow starts; a run without a strategy uses the first one.
_CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(_CPU, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(scope="session")
def digits() -> splits.Splits:
    """256 training, 256 validation and 256 test images of the sample that ships with kdistill."""
    return splits.load(Data(train_limit=256))
