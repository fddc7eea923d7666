"""`evaluate` warns of pixels in another range than the model expects, and `mean` and `std` give it the right one."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from support.image_files import content

from kdistill.conversion.convert import convert
from kdistill.data.image_files import header_of
from kdistill.data.lazy_images import Damage, EncodedImages, Files
from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.evaluation.evaluate import evaluate, predict, takes_raw_pixels
from kdistill.recipe import Profile

CLASSES = 4
LABELS = (np.arange(80) % CLASSES).astype(np.int32)
LEVELS = (np.arange(CLASSES) + 0.5) / CLASSES * 255
SHAPE = (80, 4, 4, 1)
IMAGES = np.broadcast_to(LEVELS[LABELS][:, None, None, None], SHAPE).astype(np.uint8)
RAW = Examples(IMAGES, LABELS)


def brightness(centers=LEVELS / 255) -> keras.Model:
    """Tells the classes apart by their brightness, in the range of `centers`."""
    image = keras.Input(SHAPE[1:])
    model = keras.Model(image, layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(image)), name="net")
    model.layers[-1].set_weights([2 * centers[None], -(centers**2)])
    return model


def test_raw_pixels_for_a_model_of_0_to_1():
    model = brightness()
    with pytest.warns(
        UserWarning, match="'net' is 25.0% on 80 images, but 100.0% with pixels / 255.*Pass mean=0 and std"
    ):
        assert evaluate(model, RAW)["accuracy"] == 0.25
    assert evaluate(model, RAW, mean=0, std=255)["accuracy"] == 1.0
    assert evaluate(model, Examples(IMAGES / 255.0, LABELS))["accuracy"] == 1.0


def test_scaled_pixels_for_a_model_of_raw_ones():
    model = brightness(LEVELS)
    with pytest.warns(UserWarning, match=r"but 100.0% with inputs \* 255.*Pass mean=0 and std=1/255"):
        evaluate(model, Examples(IMAGES / 255.0, LABELS))
    assert evaluate(model, Examples(IMAGES / 255.0, LABELS), std=1 / 255)["accuracy"] == 1.0
    with pytest.warns(UserWarning, match=r"with \(inputs \+ 1\) \* 127.5"):
        evaluate(model, Examples(IMAGES / 127.5 - 1, LABELS))


def test_a_wrong_mean_and_std_is_named_too():
    with pytest.warns(UserWarning, match="Leave out mean and std"):
        evaluate(brightness(LEVELS), RAW, std=255)
    with pytest.warns(UserWarning, match="Pass mean=127.5 and std=127.5 instead"):
        evaluate(brightness(LEVELS / 127.5 - 1), RAW, mean=0, std=1)


def test_a_model_that_cannot_be_looked_into():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__(name="own")
            self.inner = brightness()

        def call(self, x):
            return self.inner(x)

    model = Subclassed()
    model(IMAGES[:1].astype("float32"))
    with pytest.warns(UserWarning, match="'own' is 25.0% on 80 images, but 100.0% with pixels / 255"):
        evaluate(model, RAW)


def test_a_bad_model_in_the_right_range_gets_no_warning():
    other = Examples(IMAGES, (LABELS + 1) % CLASSES)
    assert evaluate(brightness(LEVELS), other)["accuracy"] == 0
    image = keras.Input(SHAPE[1:])
    assert evaluate(keras.Model(image, brightness()(layers.Rescaling(1 / 255)(image))), other)["accuracy"] == 0


@pytest.mark.parametrize(
    "mean,std", [(100, 60), ((123.7, 116.3, 103.5), (58.4, 57.1, 57.4)), ((1, 2, 3), 255), (None, 2)]
)
def test_predictions_are_those_of_normalized_pixels(mean, std):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (30, 6, 5, 3), np.uint8)
    model = keras.Sequential([keras.Input((6, 5, 3)), layers.Flatten(), layers.Dense(3)])
    expected = model.predict((images - np.array(mean or 0.0)) / np.array(std), verbose=0)
    np.testing.assert_allclose(predict(model, images, 7, mean=mean, std=std), expected, rtol=1e-3, atol=1e-4)


def test_a_keras_file_and_images_in_files(tmp_path):
    from PIL import Image

    model = brightness(np.stack([LEVELS / 255] * 1)[0])
    image = keras.Input((4, 4, 3))
    color = keras.Model(image, model(layers.Lambda(lambda x: x[..., :1], output_shape=(4, 4, 1))(image)))
    names = []
    for place, pixels in enumerate(IMAGES[:40]):
        names.append(f"{place:02}".encode())
        (tmp_path / f"{place:02}").write_bytes(content(Image.fromarray(pixels[..., 0]), "PNG"))
    headers = np.array([header_of((tmp_path / name.decode()).read_bytes()) for name in names])
    images = EncodedImages(Files(tmp_path, np.array(names), headers), 4, Damage(40, 0))
    examples = Examples(images, LABELS[:40])
    with pytest.warns(UserWarning, match="100.0% with pixels / 255"):
        evaluate(color, examples)
    assert evaluate(color, examples, std=255.0)["accuracy"] == 1.0
    model.save(tmp_path / "net.keras")
    assert evaluate(tmp_path / "net.keras", RAW, std=255.0)["accuracy"] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_file_of_another_converter(tmp_path, quantization):
    """Of a model of 0 to 1, without metadata: its numbers show the range, or its accuracy does."""
    profile = Profile("own", quantization=quantization, batch=None if quantization == "none" else 1)
    path = tmp_path / "net.tflite"
    path.write_bytes(convert(brightness(), profile, (IMAGES / 255).astype(np.float32)))
    with pytest.warns(UserWarning, match="accuracy of 'net.tflite' is .*100.0% with pixels / 255"):
        evaluate(path, RAW)
    assert evaluate(path, RAW, std=255)["accuracy"] == 1.0 and not takes_raw_pixels(path)
    raw = tmp_path / "raw.tflite"
    raw.write_bytes(convert(brightness(LEVELS), profile, IMAGES))
    assert evaluate(raw, RAW)["accuracy"] == 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(raw, Examples(IMAGES, (LABELS + 1) % CLASSES))


@pytest.mark.slow
def test_a_file_with_its_normalization_inside_refuses_another(tmp_path):
    path = tmp_path / "net.tflite"
    path.write_bytes(convert(brightness(LEVELS), Profile("camera", input_type="uint8")))
    assert takes_raw_pixels(path) and not takes_raw_pixels("net.keras")
    with pytest.raises(InputError, match="net.tflite' takes raw pixels: its normalization is inside. Leave out mean"):
        evaluate(path, RAW, std=255)


def test_mean_and_std_are_checked():
    with pytest.raises(InputError, match="std expects numbers above 0"):
        evaluate(brightness(), RAW, std=0)
    with pytest.raises(InputError, match="mean and std expect 1 or 1 numbers"):
        predict(brightness(), IMAGES, mean=(1, 2, 3))
