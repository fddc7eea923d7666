"""The layer that costs most is named, in the numbers, in the error message of a failed check, and by its name."""

import keras
import numpy as np
import pytest
from keras import layers
from support.small_models import corners, network

from kdistill.conversion.export import export
from kdistill.conversion.float32 import prepare
from kdistill.conversion.verify import export_checked
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe import Profile
from kdistill.tflite import quantization_error

EXAMPLES, IMAGES = corners(400, seed=7), corners(60).images
INT8 = Profile("npu", "int8", "int8", "int8", batch=1, min_agreement=0.98)


@pytest.fixture(scope="module")
def uneven():
    """A network whose layer `wide` has one channel 3,000 times as large as the others, which are all that counts."""
    base = network()
    x = base.get_layer("relu").output
    stretch = layers.Conv2D(8, 1, use_bias=False, name="wide")
    x = layers.ReLU(name="bend")(stretch(x))
    shrink = layers.Conv2D(8, 1, use_bias=False, name="back")
    x = layers.Flatten()(shrink(x))
    last = layers.Dense(4, name="end")
    model = keras.Model(base.input, last(x))
    scale = np.ones(8, np.float32)
    scale[0] = 3000
    stretch.set_weights([(np.eye(8, dtype=np.float32) * scale)[None, None]])
    shrink.set_weights([(np.eye(8, dtype=np.float32) / scale[:, None])[None, None]])
    last.set_weights(base.get_layer("last").get_weights())
    return model


@pytest.mark.slow
def test_the_layer_that_costs_most_comes_first(uneven, tmp_path):
    profiles = (INT8, Profile("plain"))
    files = [export(uneven, tmp_path / f"{each.name}.tflite", each, IMAGES)["path"] for each in profiles]
    rows = quantization_error.compare(*files, EXAMPLES.images)
    assert {row["operator"] for row in rows} >= {"CONV_2D", "FULLY_CONNECTED"}
    assert rows[0]["sqnr"] < 20 and rows == sorted(rows, key=lambda row: -row["cost"])
    assert "wide" in rows[0]["tensor"] or "bend" in rows[0]["tensor"] or "back" in rows[0]["tensor"]
    first = next(row for row in rows if "relu" in row["tensor"] or "first" in row["tensor"])
    assert first["sqnr"] > 25  # the layer before it is quantized well
    same = quantization_error.compare(files[1], files[1], EXAMPLES.images)
    assert {(row["sqnr"], row["cost"]) for row in same} == {(float("inf"), 0.0)}


@pytest.mark.slow
def test_a_failed_check_names_it(uneven, tmp_path):
    with pytest.raises(CheckFailed, match=r"npu.* Most of the loss comes from: CONV_2D '.*(back|wide|bend)"):
        export_checked(prepare(uneven), tmp_path / "npu", INT8, IMAGES, EXAMPLES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_files_of_other_models_are_refused(uneven, tmp_path):
    image = keras.Input((12, 12, 1), name="photo")
    other = keras.Model(image, layers.Dense(4, name="only")(layers.Flatten(name="f")(image)), name="other")
    files = [export(each, tmp_path / f"{each.name}.tflite", Profile("p"))["path"] for each in (uneven, other)]
    with pytest.raises(InputError, match=r"only 1 of \d tensors in common\. Either they are not files of the"):
        quantization_error.compare(*files, EXAMPLES.images)
