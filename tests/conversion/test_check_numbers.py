"""The check of files whose outputs are no classes: their numbers are compared, not the place of the largest."""

import keras
import numpy as np
import pytest
from keras import layers

import kdistill
from kdistill.conversion.export import export
from kdistill.errors import CheckFailed, InputError

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(3)
IMAGES = RNG.integers(0, 256, (64, 8, 8, 3)).astype("uint8")
WEIGHTS = RNG.normal(size=(3, 3)).astype("float32") * 4


def model(columns: int, end: str | None, shift: float = 0.0, scale: float = 1.0) -> keras.Model:
    """The mean color of an image, a dense layer and an activation."""
    image = keras.Input((8, 8, 3), name="image")
    dense = layers.Dense(columns, name="dense")
    x = dense(layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 127.5, -1.0)(image)))
    dense.set_weights([WEIGHTS[:, :columns] * scale, np.full(columns, shift, "float32")])
    return keras.Model(image, layers.Activation(end, name="end")(x), name="tagger")


HEADS = {"three labels": (3, "sigmoid"), "one label": (1, "sigmoid"), "a number": (1, None)}


@pytest.mark.exhaustive(
    but=(
        "three labels-npu",
        "one label-npu",
        "a number-npu",
    )
)
@pytest.mark.parametrize(
    "name,profile",
    [
        *(("three labels", profile) for profile in ("reference", "phone_cpu", "npu", "mediapipe")),
        *(("one label", profile) for profile in ("npu", "mediapipe")),
        *(("a number", profile) for profile in ("reference", "npu")),
    ],
)
def test_a_file_that_gives_its_models_numbers_passes(name, profile, tmp_path):
    student = model(*HEADS[name])
    found = export(student, tmp_path, profile, IMAGES, check="raise")
    assert found["agreement"] == 1.0 and found["drop"] is None
    again = kdistill.check(found["path"], student, IMAGES, profile)
    assert again["agreement"] == 1.0 and again["accuracy"] is None
    outputs = np.asarray(student(IMAGES.astype("float32")))
    assert again["max_difference"] <= 0.05 * (1.0 if HEADS[name][1] else np.ptp(outputs))
    if profile == "reference":
        assert kdistill.check(found["path"], outputs, IMAGES, profile)["max_difference"] < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_a_file_with_the_same_largest_number_but_other_numbers_is_refused(name, tmp_path):
    """Argmax says that they agree on every image: both changes leave the order of the numbers as it is."""
    student = model(*HEADS[name])
    path = export(student, tmp_path, "reference")["path"]
    for change in ({"shift": 2.0}, {"scale": 3.0}):
        other = model(*HEADS[name], **change)
        outputs, others = (np.asarray(network(IMAGES.astype("float32"))) for network in (student, other))
        assert (outputs.argmax(1) == others.argmax(1)).all()
        with pytest.raises(CheckFailed, match="agrees with its model on 0|agrees with its model on [1-5]"):
            kdistill.check(path, other, IMAGES, "reference")


def test_the_labels_of_such_a_file(tmp_path):
    student = model(3, "sigmoid")
    path = export(student, tmp_path, "reference")["path"]
    outputs = np.asarray(student(IMAGES.astype("float32")))
    labels = (outputs > 0.5).astype("int64")
    found = kdistill.check(path, student, (IMAGES, labels), "reference")
    assert found["drop"] == 0 and found["accuracy"] == found["model_accuracy"] == 1
    assert found["heads"]["end"]["same_side"] == 1
    with pytest.raises(InputError, match="expects labels of its shape"):
        kdistill.check(path, student, (IMAGES, labels[:, 0]), "reference")
    with pytest.raises(InputError, match="not give exclusive classes.*output 'labels'.*or the Keras model"):
        kdistill.check(path, outputs, (IMAGES, labels), "reference")


def test_probabilities_of_the_model_are_compared_with_those_of_the_file(tmp_path):
    student = model(3, "softmax")
    path = export(student, tmp_path, "reference")["path"]
    found = kdistill.check(path, student.predict(IMAGES.astype("float32"), verbose=0), IMAGES, "reference")
    assert found["agreement"] == 1.0 and found["max_difference"] < 1e-5
