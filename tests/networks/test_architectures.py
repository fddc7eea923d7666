"""The networks of the recipes: their shapes and sizes by hand, preprocessing inside, weights on request only."""

from itertools import pairwise

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.conversion import convert
from kdistill.errors import InputError
from kdistill.networks import applications, architectures
from kdistill.recipe import Network, Profile
from kdistill.tflite.interpreter import File

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype("float32")


def built(name, shape=(32, 32, 3), classes=10, seed=0, **options):
    keras.utils.set_random_seed(seed)
    return architectures.build(Network(name, options), shape, classes)


def norms(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def test_the_networks_of_the_study_have_the_parameters_counted_by_hand():
    quick, mini = built("cifar_quick"), built("cifar_mini")
    convs = [3 * 25 * 32 + 32, 32 * 25 * 32 + 32, 32 * 25 * 64 + 64]
    dense = (4 * 4 * 64) * 64 + 64 + 64 * 10 + 10
    assert quick.count_params() == sum(convs) + dense
    assert mini.count_params() == convs[0] + convs[2] + dense
    # 32 -> 16 -> 8 -> 4, as Caffe's pools round up.
    assert [quick.get_layer(f"pool{i}").output.shape[1] for i in (1, 2, 3)] == [16, 8, 4]
    assert np.std(quick.get_layer("conv1").get_weights()[0]) == pytest.approx(1e-4, rel=0.05)
    assert quick(PIXELS).shape == mini(PIXELS).shape == (4, 10)


def test_the_full_network_of_the_study_is_caffes():
    full, mini = built("cifar_full"), built("cifar_full_mini")
    convs, logits = [3 * 25 * 32 + 32, 32 * 25 * 32 + 32, 32 * 25 * 64 + 64], 4 * 4 * 64 * 10 + 10
    assert full.count_params() == sum(convs) + logits == 89_578
    assert mini.count_params() == full.count_params() - convs[1] == 63_946
    # The gradient of the decay is 0.004 times the weight, 250 times that in the last layer; none for biases.
    kernels = {layer.name: layer.kernel for layer in full.layers if hasattr(layer, "kernel")}
    with tf.GradientTape() as tape:
        loss = tf.add_n(full.losses)
    gradients = dict(zip(kernels, tape.gradient(loss, [kernel.value for kernel in kernels.values()]), strict=True))
    for name, factor in {"conv1": 0.004, "conv2": 0.004, "conv3": 0.004, "logits": 1.0}.items():
        np.testing.assert_allclose(gradients[name], factor * kernels[name].numpy(), rtol=1e-5)
    assert len(full.losses) == 4 and len(mini.losses) == 3
    assert built("cifar_full", shape=(32, 32, 1))(PIXELS[..., :1]).shape == (4, 10)


def test_normalization_within_a_channel_by_hand(tmp_path):
    """In the middle the mean of nine squares; in a corner of four, with five zeros beyond the edge."""
    layer = architectures.NormalizeWithinChannel(alpha=0.5, beta=0.75)
    values = np.arange(9.0, dtype="float32").reshape(1, 3, 3, 1)
    result = layer(np.concatenate([values, 0 * values], -1)).numpy()
    assert result[0, 1, 1, 0] == pytest.approx(4 / (1 + 0.5 * 204 / 9) ** 0.75, rel=1e-5)
    assert result[0, 0, 0, 0] == 0 and np.all(result[..., 1] == 0)
    assert result[0, 2, 2, 0] == pytest.approx(8 / (1 + 0.5 * (16 + 25 + 49 + 64) / 9) ** 0.75, rel=1e-5)
    model = built("cifar_full", seed=3)
    model.save(tmp_path / "full.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "full.keras")(PIXELS), model(PIXELS))


def test_the_whitened_network():
    model = built("cifar_vgg")
    widths = [24, 64, 64, 128, 128, 256, 256]
    convs = sum(9 * a * b + 4 * b for a, b in pairwise(widths))
    assert model.count_params() == convs + 2 * 2 * 3 * 24 + 256 * 10 + 10 == 1_163_050
    assert [weight.path.split("/")[0] for weight in model.layers[2].weights] == ["whiten"]
    assert not model.layers[2].trainable_weights
    # Twelve filters at right angles, and their negatives; differences of colors and pixels do not see a gray image.
    kernel = model.get_layer("whiten").get_weights()[0].reshape(12, 24)
    products = kernel[:, :12].T @ kernel[:, :12]
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-7)
    np.testing.assert_array_equal(kernel[:, :12], -kernel[:, 12:])
    gray = keras.Model(model.inputs[0], model.get_layer("whiten").output)(
        np.full((1, 32, 32, 3), 223, "float32")
    ).numpy()
    np.testing.assert_allclose(gray[..., 0], 103 * 12 / (2 * np.sqrt(3) * 206), rtol=1e-5)
    np.testing.assert_allclose(gray[..., 1:12], 0, atol=1e-4)
    assert built("cifar_vgg", shape=(96, 96, 3), stride=2, widths=(8, 8, 8, 8)).get_layer("max").input.shape[1:3] == (
        3,
        3,
    )
    with pytest.raises(InputError, match="expected color images, received 1 channels"):
        built("cifar_vgg", shape=(32, 32, 1))


@pytest.mark.slow
@pytest.mark.parametrize("depth", [8, 20, 56])
def test_residual_networks_have_their_depth(depth):
    model = built("resnet", depth=depth)
    convs = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    shortcuts = [layer for layer in convs if "short" in layer.name]
    assert len(convs) - len(shortcuts) + 1 == depth and len(shortcuts) == 2
    assert all(norm.synchronized for norm in norms(model))
    assert model.get_layer("mean").input.shape == (None, 8, 8, 64)


def test_a_residual_network_of_another_depth_is_refused():
    with pytest.raises(InputError, match=r"depth expects 6n \+ 2 \(8, 14, 20, ...\), received 9"):
        built("resnet", depth=9)


@pytest.mark.exhaustive
def test_applications_resize_and_normalize_inside():
    """Of an image of one color, whatever its size, every network sees the same."""
    small, large = (np.full((1, size, size, 3), (200, 30, 90), np.float32) for size in (40, 90))
    for name in ("mobilenet_v3_small", "mobilenet_v2"):
        options = {"size": 32, "alpha": 0.35}
        one, two = (built(name, each.shape[1:], 5, **options) for each in (small, large))
        assert (two.input_shape, two.output_shape) == ((None, 90, 90, 3), (None, 5))
        two.set_weights(one.get_weights())
        np.testing.assert_allclose(one(small), two(large), atol=1e-5)
        assert [layer.name for layer in one.layers].count("resize") == 1
        assert "resize" not in [layer.name for layer in built(name, (32, 32, 3), 5, **options).layers]
        assert norms(one) and all(norm.synchronized for norm in norms(one))


@pytest.mark.slow
def test_the_preprocessing_is_that_of_keras_applications():
    """ResNet50 and VGG16: BGR less the mean; MobileNetV2: -1 to 1. The oracle is Keras' own function."""
    center = built("vgg16", size=32).get_layer("center")
    expected = keras.applications.vgg16.preprocess_input(PIXELS.copy())[..., ::-1]
    np.testing.assert_allclose(center(PIXELS), expected, atol=1e-4)
    scale = built("mobilenet_v2", size=32, alpha=0.35).get_layer("scale")
    np.testing.assert_allclose(
        scale(PIXELS), keras.applications.mobilenet_v2.preprocess_input(PIXELS.copy()), atol=1e-6
    )


@pytest.mark.slow
def test_weights_of_keras_applications_give_what_keras_gives(tmp_path):
    """From a file: ours on raw red-green-blue pixels, Keras' own on preprocessed blue-green-red ones."""
    keras.utils.set_random_seed(3)
    theirs = keras.applications.VGG16(weights=None, input_shape=(32, 32, 3), classes=7, classifier_activation=None)
    theirs.save_weights(tmp_path / "vgg.weights.h5")
    ours = built("vgg16", classes=7, size=32, weights=str(tmp_path / "vgg.weights.h5"))
    expected = theirs(keras.applications.vgg16.preprocess_input(PIXELS.copy()))
    np.testing.assert_allclose(ours(PIXELS), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())
    assert np.std(expected) > 0


def test_weights_are_fetched_on_request_only(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    for name in applications.APPLICATIONS:
        with pytest.raises(InputError, match=f"weights 'imagenet' of '{name}' are not in .*--download.*weights=FILE"):
            built(name, classes=1000, weights="imagenet")
    with pytest.raises(InputError, match="no file of weights at 'nowhere.h5'"):
        built("vgg16", weights="nowhere.h5")
    asked = []

    def network(weights, **options):
        asked.append((weights, options["include_top"] if "include_top" in options else options["classes"]))
        raise ValueError("no network here")

    monkeypatch.setattr(keras.applications, "ResNet50", network)
    for classes in (1000, 10):
        with pytest.raises(InputError, match="no network here"):
            architectures.build(Network("resnet50", {"weights": "imagenet"}), (32, 32, 3), classes, download=True)
    assert asked == [("imagenet", 1000), ("imagenet", False)]  # another number of classes: a new head


def test_what_is_trained_already():
    assert applications.is_pretrained({"weights": "imagenet"}, 1000) and applications.is_pretrained(
        {"weights": "a.h5"}, 7
    )
    assert not applications.is_pretrained({"weights": "imagenet"}, 10) and not applications.is_pretrained({}, 1000)


def test_refusals():
    with pytest.raises(InputError, match="expects color images"):
        built("mobilenet_v2", (32, 32, 1))
    with pytest.raises(InputError, match="Unknown network 'resnet5'. Did you mean 'resnet"):
        built("resnet5")
    with pytest.raises(InputError, match="cannot be built"):
        built("mobilenet_v2", size=16)


@pytest.mark.exhaustive("resnet-options1")
@pytest.mark.slow
@pytest.mark.parametrize("name,options", [("cifar_mini", {}), ("resnet", {"depth": 8, "width": 4})])
def test_they_convert_to_builtin_operators(tmp_path, name, options):
    model = built(name, **options)
    path = tmp_path / "model.tflite"
    path.write_bytes(convert.convert(model, Profile("plain", batch=1)))
    np.testing.assert_allclose(File(path).predict(PIXELS), model(PIXELS), rtol=1e-3, atol=1e-3)
