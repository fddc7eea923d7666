"""`mean` and `std` of `compress`: a student and a teacher of scaled pixels, and a new model that takes raw ones."""

import keras
import numpy as np
import pytest
from keras import layers
from support.compressing import CLASSES, QUIET, examples, stage
from support.ranges import RANGES, convolution, fitted

import kdistill
from kdistill.compression.compress import compress
from kdistill.errors import InputError
from kdistill.evaluation.evaluate import evaluate, predict

DATA = examples(200)


@pytest.fixture(scope="module")
def models():
    """A student and a teacher that were trained on pixels / 255."""

    def trained(seed: int) -> keras.Model:
        keras.utils.set_random_seed(seed)
        middle = [
            layers.Conv2D(8, 3, use_bias=False, name="first"),
            layers.BatchNormalization(momentum=0.8),
            layers.ReLU(),
        ]
        end = [layers.Flatten(), layers.Dense(CLASSES, name="top")]
        model = keras.Sequential([keras.Input((10, 10, 4)), *middle, *end], name="net")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-2), loss)
        model.fit(DATA.images / 255.0, DATA.labels, epochs=8, verbose=0)
        return model

    return trained(0), trained(1)


@pytest.mark.exhaustive("prune", "qat")
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["prune", "qat", "int8"])
def test_what_is_new_takes_raw_pixels(models, scheme, tmp_path):
    student, teacher = models
    options = {} if scheme == "int8" else {"teacher": [teacher, teacher]}
    result = compress(student, stage(scheme), data=DATA, mean=0, std=255, **options, **QUIET)
    assert evaluate(student, DATA, mean=0, std=255)["accuracy"] == 1.0
    assert evaluate(result.model, DATA)["accuracy"] == 1.0
    if scheme == "int8":  # the same weights behind the normalization
        expected = predict(student, DATA.images, std=255)
        np.testing.assert_allclose(predict(result.model, DATA.images), expected, rtol=1e-3, atol=1e-3)
    if result.quantized:
        (tmp_path / "net.tflite").write_bytes(result.tflite())
        assert evaluate(tmp_path / "net.tflite", DATA)["accuracy"] > 0.95


@pytest.mark.slow
def test_images_in_another_range_give_a_warning(models):
    student, teacher = models
    with pytest.warns(UserWarning) as record:
        compress(student, stage("prune"), teacher, DATA, **QUIET)
    texts = [str(warning.message) for warning in record]
    assert any("the model 'net'" in text and "Pass mean=0 and std=255" in text for text in texts)
    assert any("the teacher 'net'" in text and "kdistill.Adapted(teacher, mean=0, std=255)" in text for text in texts)


def test_wrong_numbers_are_refused():
    student = fitted(convolution(), RANGES["unit"])
    with pytest.raises(InputError, match="std expects numbers above 0"):
        kdistill.compress(student, "prune", data=(RANGES["raw"], np.arange(80) % 3), std=0, **QUIET)
