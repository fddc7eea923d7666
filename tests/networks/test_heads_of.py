"""What the outputs of any Keras model mean: from a loss, an activation, numbers, or as the user states it."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.any_models import audio, segmentation, table, tagging, text, two_heads, two_inputs

from kdistill.errors import InputError
from kdistill.networks.heads import CLASSES, LABELS, NUMBERS, Head, meaning_of_loss
from kdistill.networks.saving import load_model, loss_of_file
from kdistill.networks.signatures import heads_of, in_structure, inputs_of, noise_inputs, takes_images

CASES = {
    "segmentation": (segmentation, Head(CLASSES, "logits", (8, 8, 3))),
    "segmentation, softmax": (lambda: segmentation(layers.Softmax()), Head(CLASSES, "probabilities", (8, 8, 3))),
    "segmentation, enlarged": (
        lambda: segmentation(layers.Softmax(), layers.UpSampling2D(2, interpolation="bilinear")),
        Head(CLASSES, "probabilities", (16, 16, 3)),
    ),
    "masks": (lambda: segmentation(layers.Activation("sigmoid")), Head(LABELS, "probabilities", (8, 8, 3))),
    "tagging": (tagging, Head(CLASSES, "logits", (6, 3))),
    "text": (text, Head(CLASSES, "logits", (4,))),
    "text of floats": (lambda: text("float32"), Head(CLASSES, "logits", (4,))),
    "audio": (audio, Head(CLASSES, "logits", (4,))),
    "table": (lambda: table(3, "softmax"), Head(CLASSES, "probabilities", (3,))),
    "binary": (lambda: table(1, "sigmoid"), Head(LABELS, "probabilities", (1,))),
    "two inputs": (two_inputs, Head(CLASSES, "logits", (4,))),
    "dict of inputs": (lambda: two_inputs(True), Head(CLASSES, "logits", (4,))),
}


@pytest.mark.parametrize("name", CASES)
def test_activation_and_numbers_tell_the_head(name):
    make, head = CASES[name]
    (received,) = heads_of(make()).values()
    assert received == head and received.positions == head.shape[:-1] and received.classes == head.shape[-1]


def compiled(model, loss):
    model.compile("sgd", loss=loss)
    return model


@pytest.mark.parametrize(
    "loss,columns,activation,head",
    [
        ("mse", 1, None, Head(NUMBERS, "numbers", (1,))),
        (keras.losses.Huber(), 3, None, Head(NUMBERS, "numbers", (3,))),
        (keras.losses.mean_absolute_error, 2, "relu", Head(NUMBERS, "numbers", (2,))),
        ("binary_crossentropy", 1, "sigmoid", Head(LABELS, "probabilities", (1,))),
        (keras.losses.BinaryCrossentropy(from_logits=True), 1, None, Head(LABELS, "logits", (1,))),
        (keras.losses.BinaryFocalCrossentropy(from_logits=True), 3, None, Head(LABELS, "logits", (3,))),
        (keras.losses.SparseCategoricalCrossentropy(from_logits=True), 3, None, Head(CLASSES, "logits", (3,))),
        ("mse", 3, "softmax", Head(CLASSES, "probabilities", (3,))),  # the Brier score is one of classes
    ],
)
def test_the_loss_of_compile_tells_the_head_and_a_file_keeps_it(loss, columns, activation, head, tmp_path):
    model = compiled(table(columns, activation), loss)
    assert heads_of(model) == {"out": head}
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    assert heads_of(loaded, loss=loss_of_file(tmp_path / "model.keras")) == {"out": head}


def test_several_outputs_have_a_head_each(tmp_path):
    expected = {"kind": Head(CLASSES, "logits", (3,)), "price": Head(NUMBERS, "numbers", (1,))}
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for as_dict in (True, False):
        model = two_heads(as_dict)
        assert heads_of(model, {"price": "numbers"}) == expected
        losses = {"kind": cross_entropy, "price": "mse"} if as_dict else [cross_entropy, "mse"]
        assert heads_of(compiled(model, losses)) == expected
        model.save(tmp_path / "model.keras")
        loaded = load_model(tmp_path / "model.keras")
        assert heads_of(loaded, loss=loss_of_file(tmp_path / "model.keras")) == expected
    with pytest.raises(InputError, match="The output 'price' of the model .* one number that no activation.*head='l"):
        heads_of(two_heads())
    with pytest.raises(InputError, match="has the outputs kind, price: head expects a dict"):
        heads_of(two_heads(), "numbers")
    with pytest.raises(InputError, match="Unknown output of the model .* in head 'prize'.*Did you mean 'price'"):
        heads_of(two_heads(), {"prize": "numbers"})


@pytest.mark.parametrize(
    "model,head,message",
    [
        (lambda: table(1), None, "gives one number that no activation bounds, and no loss .* State it: head="),
        (lambda: compiled(table(3, "sigmoid"), "mse"), None, "ends in a sigmoid, which contradicts the loss of its co"),
        (
            lambda: compiled(table(1, "sigmoid"), "sparse_categorical_crossentropy"),
            None,
            "has one column, which contra",
        ),
        (lambda: table(3, "sigmoid"), "classes", "ends in a sigmoid, which contradicts head='classes'"),
        (lambda: table(3, "softmax"), "labels", "sum of 1, as of a softmax, which contradicts head='labels'"),
        (lambda: table(3), "regression", "head expects 'classes' .* received 'regression'"),
        (lambda: keras.Sequential([keras.Input((5,)), layers.Lambda(lambda x: x[:, 0])]), "labels", r"\[batch\]"),
        (
            lambda: keras.Sequential([keras.Input((5,)), layers.Lambda(tf.strings.as_string)]),
            None,
            "The output '.*' of the model '.*' is text; expected a tensor of numbers",
        ),
    ],
)
def test_what_does_not_tell_or_contradicts_is_one_message(model, head, message):
    with pytest.raises(InputError, match=message):
        heads_of(model(), head)


def test_a_stated_head():
    assert heads_of(table(1), "labels") == {"out": Head(LABELS, "logits", (1,))}
    assert heads_of(table(1), "numbers") == {"out": Head(NUMBERS, "numbers", (1,))}
    assert heads_of(table(3, "sigmoid"), "numbers") == {"out": Head(NUMBERS, "numbers", (3,))}
    assert heads_of(table(1), strict=False) == {"out": Head(NUMBERS, "numbers", (1,))}
    assert meaning_of_loss(lambda y, p: 0.0) is None and meaning_of_loss("MSE") == NUMBERS
    model = two_heads()
    named = keras.Model(model.input, {"logits": model.output["kind"], "features": model.output["price"]})
    assert heads_of(named) == {"logits": Head(CLASSES, "logits", (3,))}
    assert list(heads_of(named, {"features": "numbers"})) == ["logits", "features"]


def test_inputs_by_name():
    assert {name: (one.shape, one.dtype) for name, one in inputs_of(two_inputs()).items()} == {
        "a": ((8,), "float32"),
        "b": ((3,), "int32"),
    }
    assert set(inputs_of(two_inputs(True))) == {"a", "b"} and list(inputs_of(text())) == ["input"]
    assert in_structure(two_inputs(True), {"a": 1, "b": 2}) == {"a": 1, "b": 2}
    assert in_structure(two_inputs(), {"b": 2, "a": 1}) == [1, 2]
    for model in (text(), text("float32"), tagging()):
        (noise,) = noise_inputs(model).values()
        assert set(np.unique(noise)) == {0, 1} and noise.shape == (4, 6)
    rows = keras.Sequential([keras.Input((8, 8)), layers.Rescaling(1 / 255), layers.GRU(4, unroll=True)])
    flat = keras.Sequential([keras.Input((8, 8)), layers.Flatten(), layers.Dense(3)])
    assert [takes_images(model) for model in (segmentation(), rows, flat)] == [True] * 3
    assert not any(takes_images(model) for model in (audio(), table(3), text(), two_inputs()))


class Pair(keras.Model):
    """A subclassed model of two inputs, and a list of outputs."""

    def __init__(self):
        super().__init__(name="pair")
        self.dense, self.score = layers.Dense(3), layers.Dense(1, activation="sigmoid")

    def call(self, inputs):
        x = keras.ops.concatenate([inputs["left"], inputs["right"]], axis=-1)
        return [self.dense(x), self.score(x)]


def test_subclassed_models():
    model = Pair()
    with pytest.raises(InputError, match="'pair' is not built"):
        heads_of(model)
    model({"left": np.zeros((1, 2), "float32"), "right": np.zeros((1, 3), "float32")})
    assert {name: one.shape for name, one in inputs_of(model).items()} == {"left": (2,), "right": (3,)}
    assert heads_of(model) == {
        "output_0": Head(CLASSES, "logits", (3,)),
        "output_1": Head(LABELS, "probabilities", (1,)),
    }
