"""Inputs in the wrong range are recognized by accuracy, by batch normalization, and by the first layer's inputs."""

import keras
import numpy as np
import pytest
from keras import layers
from support.ranges import PIXELS, RANGES, brightness, convolution, fitted

from kdistill.errors import InputError
from kdistill.teachers.gain import better
from kdistill.teachers.input_range import (
    RAW,
    SIGNED,
    UNIT,
    Normalized,
    compare_accuracies,
    look_into,
    normalization,
    normalized,
    other_scales,
    range_warning,
)

RANDOM = np.random.default_rng(1)
FITTING = {  # what a model was trained on, and what it gets -> the change that fits
    ("unit", "raw"): RAW[0],
    ("signed", "raw"): RAW[1],
    ("raw", "unit"): UNIT[0],
    ("raw", "signed"): SIGNED[0],
}


def subclassed(inner: keras.Model) -> keras.Model:
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def call(self, x, training=False):
            return self.inner(x, training=training)

    model = Subclassed()
    model(np.zeros((1, 10, 10, 3)))
    return model


def nested() -> keras.Model:
    image = keras.Input((10, 10, 3))
    return keras.Model(image, convolution()(image))


def dead_channels() -> keras.Model:
    """ReLU before the normalization, and filters that never see anything above 0."""
    model = convolution(bias=True, relu=True)
    kernel, bias = model.layers[0].get_weights()
    kernel[..., :5], bias[:5] = -np.abs(kernel[..., :5]), -1.0
    model.layers[0].set_weights([kernel, bias])
    return model


def norm_first() -> keras.Model:
    norm = layers.BatchNormalization(name="norm")
    return keras.Sequential([keras.Input((10, 10, 3)), norm, layers.Flatten(), layers.Dense(3)])


@pytest.mark.parametrize("own,received", [(own, received) for own in RANGES for received in RANGES])
@pytest.mark.parametrize("network", [convolution, nested, norm_first, dead_channels])
def test_the_statistics_of_batch_normalization(network, own, received):
    if network is dead_channels and "signed" in (own, received):
        pytest.skip("its filters are dead for pixels from 0 up only")
    finding = look_into(fitted(network(), RANGES[own]), RANGES[received], "the model 'net'")
    expected = FITTING.get((own, received))
    assert (finding and finding.scale) == expected
    if finding:
        assert (
            "'norm' of the model 'net' are " in finding.sentence
            and f"but fit with {expected.words}" in finding.sentence
        )


def test_untrained_statistics_tell_nothing():
    for images in RANGES.values():
        assert look_into(norm_first(), images, "it") is None


def adapted() -> layers.Layer:
    layer = layers.Normalization()
    layer.adapt(RANGES["raw"])
    return layer


@pytest.mark.parametrize(
    "before",
    [
        lambda: layers.Rescaling(1 / 255),
        lambda: layers.Rescaling(1 / 127.5, -1),
        lambda: layers.Rescaling(1.0, [-103.9, -116.8, -123.7]),
        adapted,
    ],
    ids=["unit", "signed", "mean subtracted", "adapted"],
)
def test_scaled_images_for_a_model_that_scales_itself(before):
    """Without batch normalization, whatever its own scaling is."""
    middle = [layers.Conv2D(4, 3, name="first"), layers.Flatten(), layers.Dense(3)]
    model = keras.Sequential([keras.Input((10, 10, 3)), before(), *middle])
    assert look_into(model, RANGES["raw"], "it") is None
    for name, scales in (("unit", UNIT), ("signed", SIGNED)):
        finding = look_into(model, RANGES[name], "the model 'net'")
        assert finding.scale == scales[0] and "scales them itself: its layer 'first' receives" in finding.sentence
    assert look_into(model, np.zeros((8, 10, 10, 3)), "it") is None  # black images show nothing


def test_raw_pixels_in_front_of_the_first_layer_with_weights():
    def model(*before):
        return keras.Sequential([keras.Input((10, 10, 3)), *before, layers.Flatten(), layers.Dense(3, name="first")])

    finding = look_into(model(), PIXELS, "'net'")
    assert finding.sentence == "The layer 'first' of 'net' receives inputs from 0 to 255: they look unscaled."
    assert finding.scale == RAW[0]
    image = keras.Input((10, 10, 3))
    assert "'first'" in look_into(keras.Model(image, model()(image)), PIXELS, "it").sentence  # nested
    for layer in (layers.LayerNormalization(), layers.GroupNormalization(3), layers.BatchNormalization()):
        assert look_into(model(layer), PIXELS, "it") is None
    assert look_into(model(), PIXELS - 120.0, "it") is None and look_into(model(), PIXELS / 12, "it") is None


def test_models_that_cannot_be_looked_into():
    tokens = keras.Sequential([keras.Input((7,)), layers.Embedding(300, 4), layers.Flatten(), layers.Dense(2)])
    assert look_into(tokens, RANDOM.integers(0, 300, (5, 7)), "it") is None
    assert look_into(subclassed(convolution()), PIXELS, "it") is None
    image = keras.Input((10, 10, 3))  # a subclassed model inside may scale its inputs, too
    around = keras.Model(image, layers.Dense(2)(subclassed(convolution())(image)))
    assert look_into(around, PIXELS, "it") is None
    assert look_into(convolution(), PIXELS[:, :2, :2], "it") is None  # images that the model does not take
    two = [keras.Input((4,)), keras.Input((4,))]
    assert look_into(keras.Model(two, layers.Dense(2)(layers.add(two))), PIXELS, "it") is None


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("own,received", [(own, received) for own in RANGES for received in RANGES])
def test_accuracy_decides_where_there_are_labels(classes, own, received):
    model, images, labels = brightness(classes, own)
    images = {"raw": images, "unit": images / 255.0, "signed": images / 127.5 - 1}[received]
    accuracy, finding = compare_accuracies(model, images, labels, "the model 'net'")
    expected = {**FITTING, ("unit", "signed"): SIGNED[1], ("signed", "unit"): UNIT[1]}.get((own, received))
    if own == received:
        assert accuracy == 1 and finding is None
    elif finding or (classes, own) != (2, "signed"):  # two classes, dark and bright, are the same in many ranges
        assert finding.scale == expected
        assert f"but 100.0% with {expected.words}: its inputs look unnormalized." in finding.sentence


def test_few_labels_do_not_decide():
    model, images, labels = brightness(2, "unit")
    assert compare_accuracies(model, images[:6], labels[:6], "it")[1] is None
    assert compare_accuracies(model, images[:60], labels[:60], "it")[1].scale == RAW[0]


@pytest.mark.parametrize("gained,lost,decides", [(10, 0, False), (11, 0, True), (14, 1, True), (13, 1, False)])
def test_a_gain_that_chance_explains_does_not_decide(gained, lost, decides):
    """A sign test, twice because the best of two changes counts: 2 / 2^11 < 0.001, and 2 (1 + 15) / 2^15 < 0.001."""
    labels = np.arange(40) % 2
    own, changed = np.arange(40) < lost, (np.arange(40) >= lost) & (np.arange(40) < lost + gained)
    changed[lost + gained :] = own[lost + gained :] = True  # both get the rest right
    assert (better(own, {"a": changed, "b": own}, labels, 2) == "a") == decides


def test_one_class_does_not_decide():
    """Images sorted by class: a network that names this class always would be perfect."""
    assert better(np.zeros(50, bool), {"a": np.ones(50, bool)}, np.full(50, 3), 10) is None


@pytest.mark.parametrize("outputs", [4, 7])
def test_no_untrained_network_gets_another_range(outputs):
    """All images of a class are alike, so that many change sides at once: 5 images more are no evidence."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 24)
    images = np.clip(random.uniform(0, 255, (4, 100))[labels] + random.normal(0, 30, (24, 100)), 0, 255)
    for _ in range(100):
        kernel, bias = random.normal(size=(100, outputs)) / 10, random.normal(size=outputs)
        assert compare_accuracies(lambda x, k=kernel, b=bias: x @ k + b, images, labels, "it")[1] is None


def test_the_warning_says_how_to_fix_it():
    model, images, labels = brightness(4, "unit")
    text = range_warning(images, "the model 'net'", model, model, labels)
    assert text.startswith("The accuracy of the model 'net' is 25.0% on 120 images, but 100.0% with pixels / 255")
    assert "Pass mean=0 and std=255 (--mean and --std of a command)" in text and "pass mean=0 and std=1." in text
    assert range_warning(images, "it", model, model, labels, stated=((0.0,), (255.0,))) is None
    text = range_warning(images / 255.0, "it", model, model, labels, stated=((0.0,), (255.0,)))
    assert text.endswith("Leave out mean and std.")
    text = range_warning(images, "it", model, model, labels, stated=((0.0,), (1.0,)))
    assert text.endswith("Pass mean=0 and std=255 instead.")
    raw, images, labels = brightness(4, "raw")
    text = range_warning(images / 255.0, "it", raw, raw, labels)
    assert "Pass mean=0 and std=1/255 (" in text


def test_a_model_on_raw_pixels_without_scaling_is_left_in_peace_where_it_is_right():
    model, images, labels = brightness(4, "raw")
    assert range_warning(images, "it", model, model, labels) is None
    assert "they look unscaled" in range_warning(images, "it", model)  # without labels nothing shows it
    assert range_warning(images, "it", model, stated=((0.0,), (1.0,))) is None  # the user says so


@pytest.mark.parametrize("change", ["function", "subclassed", "unlabeled", "one-hot"])
def test_what_is_no_plain_model_with_labels(change):
    model, images, labels = brightness(4, "unit")
    if change == "function":
        assert "100.0% with pixels / 255" in range_warning(images, "it", None, model, labels)
    elif change == "subclassed":
        other = subclassed_of(model)
        assert "100.0% with pixels / 255" in range_warning(images, "it", other, other, labels)
        assert range_warning(images, "it", other) is None
    elif change == "unlabeled":
        some = np.where(np.arange(120) < 40, labels, -1)
        assert "on 40 images, but 100.0%" in range_warning(images, "it", model, model, some)
        assert "they look unscaled" in range_warning(images, "it", model, model, np.full(120, -1))
    else:
        assert "they look unscaled" in range_warning(images, "it", model, model, np.eye(4)[labels])


def subclassed_of(model: keras.Model) -> keras.Model:
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner = model

        def call(self, x):
            return self.inner(x)

    return Subclassed()


def test_a_model_with_its_scaling_inside_is_not_run_again():
    model, images, labels = brightness(4, "unit")
    image = keras.Input((4, 4, 1))
    inside, calls = keras.Model(image, model(layers.Rescaling(1 / 255)(image))), []

    def predict(numbers):
        calls.append(len(numbers))
        return inside(numbers)

    assert range_warning(images, "it", inside, predict, (labels + 1) % 4) is None and not calls


@pytest.mark.parametrize(
    "images,scales",
    [
        (PIXELS, RAW),
        (PIXELS / 255, UNIT),
        (PIXELS / 127.5 - 1, SIGNED),
        (PIXELS / 20, ()),
        (PIXELS - 120.0, ()),
        (RANDOM.normal(size=(9, 9)), ()),
    ],
)
def test_ranges(images, scales):
    assert other_scales(images) == scales


def test_mean_and_std_are_numbers():
    assert normalization(None, None) is None
    assert normalization(None, 255) == ((0.0,), (255.0,)) and normalization((1, 2, 3), None) == (
        (1.0, 2.0, 3.0),
        (1.0,),
    )
    assert normalization(0, 1) == ((0.0,), (1.0,))
    for mean, std, expected in (
        ("a", 1, "mean expects a number, or one for each of three channels, received 'a'"),
        ((1, 2), 1, "mean expects a number"),
        (0, float("nan"), "std expects a number"),
        (0, 0, "std expects numbers above 0, received 0"),
        (0, (1, -1, 1), "std expects numbers above 0"),
        ([[0.0]], 1, "mean expects a number"),
    ):
        with pytest.raises(InputError, match=expected):
            normalization(mean, std)


def test_images_normalized_on_access():
    images = Normalized(PIXELS, (100.0, 110.0, 120.0), (60.0,))
    assert images.shape == PIXELS.shape and images.ndim == 4 and len(images) == 80
    expected = (PIXELS[3:5].astype(np.float64) - [100, 110, 120]) / 60
    np.testing.assert_allclose(images[3:5], expected, rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(images), normalized(PIXELS, (100, 110, 120), 60))
    with pytest.raises(InputError, match="mean and std expect 1 or 1 numbers, received 3, 1"):
        Normalized(PIXELS[..., :1], (1.0, 2.0, 3.0), (1.0,))
