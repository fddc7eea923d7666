"""Weights of layers that contain layers: each array goes where Keras puts it, under other names too."""

import h5py
import keras
import numpy as np
import pytest
from keras import layers, ops

from kdistill.errors import InputError
from kdistill.networks import saving, weights

ROWS = np.random.default_rng(0).normal(size=(4, 6, 8)).astype("float32")


@keras.saving.register_keras_serializable("test")
class Block(layers.Layer):
    """A layer with a weight of its own, and with layers in a list and in a dict, in no order of the alphabet."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = [layers.Dense(8, name="z"), layers.Dense(8, name="a")]
        self.ends = {"y": layers.Dense(8, name="y"), "b": layers.Dense(8, name="b")}

    def build(self, shape):
        self.gain = self.add_weight(name="gain", shape=(8,))
        for layer in (*self.steps, *self.ends.values()):
            layer.build(shape)

    def call(self, x):
        for layer in self.steps:
            x = ops.tanh(layer(x))
        return self.ends["y"](x) - 2 * self.ends["b"](x) + x * self.gain

    def get_config(self):
        return super().get_config()


@keras.saving.register_keras_serializable("test_weights_structure")
class Subclassed(keras.Model):
    """A model with a weight of its own and a `Block`; `end` ends the names of its layers."""

    def __init__(self, end="", **kwargs):
        super().__init__(**kwargs)
        self.end = end
        self.tail, self.blocks = layers.Dense(8, name=f"tail{end}"), {"first": Block(name=f"block{end}")}
        self.heads = [layers.Dense(8, name=f"z{end}"), layers.Dense(8, name=f"a{end}")]
        self.scale = self.add_weight(name="scale", shape=(8,))

    def call(self, x):
        for layer in self.heads:
            x = ops.tanh(layer(x))
        return self.tail(self.blocks["first"](x)) * self.scale

    def get_config(self):
        return {**super().get_config(), "end": self.end}


def functional(body):
    """A function: the end of names -> a model of rows around `body(rows, end)`."""

    def build(end=""):
        rows = keras.Input((6, 8))
        return keras.Model(rows, layers.Dense(3, name="d")(layers.Flatten()(body(rows, end))), name=f"net{end}")

    return build


def attention(x, end):
    return layers.MultiHeadAttention(2, 4, name=f"part{end}")(x, x)


def grouped_attention(x, end):
    return layers.GroupQueryAttention(4, 4, 2, name=f"part{end}")(x, x)


def two_directions(x, end):
    backward = layers.SimpleRNN(4, go_backwards=True)
    return layers.Bidirectional(layers.GRU(4), backward_layer=backward, name=f"part{end}")(x)


def rows_of_a_model(x, end):
    inner = keras.Sequential([keras.Input((8,)), layers.Dense(8), layers.Dense(8)])
    return layers.TimeDistributed(inner, name=f"part{end}")(x)


def cells(x, end):
    return layers.RNN([layers.LSTMCell(3), layers.GRUCell(3), layers.SimpleRNNCell(3)], name=f"part{end}")(x)


def nested(x, end):
    inner = keras.Sequential([layers.Dense(8, name=f"q{end}"), layers.Dense(8, name=f"p{end}")], name=f"inner{end}")
    outer = [keras.Input((6, 8)), *(layers.Dense(8, name=f"{number}{end}") for number in range(11)), inner]
    return keras.Sequential(outer, name=f"outer{end}")(x)


def subclassed(end=""):
    model = Subclassed(end, name=f"net{end}")
    model(ROWS)
    return model


MODELS = {
    "Bidirectional of two kinds": functional(two_directions),
    "MultiHeadAttention": functional(attention),
    "GroupQueryAttention": functional(grouped_attention),
    "TimeDistributed model": functional(rows_of_a_model),
    "RNN of cells": functional(cells),
    "SpectralNormalization": functional(
        lambda x, end: layers.SpectralNormalization(layers.Dense(4), name=f"s{end}")(x)
    ),
    "ConvLSTM1D": functional(lambda x, end: layers.ConvLSTM1D(2, 2, name=f"s{end}")(layers.Reshape((6, 4, 2))(x))),
    "nested models": functional(nested),
    "layer with lists and dicts": functional(lambda x, end: Block(name=f"block{end}")(x)),
    "nested subclassed model": functional(lambda x, end: Subclassed(end, name=f"sub{end}")(x)),
    "subclassed model": subclassed,
}


def shaken(model, seed=1):
    random = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(random.uniform(0.1, 0.6, weight.shape))
    return model


def units(model, folder):
    """The names that `load` reports for the layers of a model."""
    return weights.load(model, [(empty(folder), {})])["not_loaded"]


def empty(folder):
    np.savez(folder / "empty.npz", **{"none/0": np.zeros(1)})
    return folder / "empty.npz"


@pytest.mark.exhaustive(
    but=(
        "nested models-keras-other names",
        "nested models-npz-equal names",
        "nested subclassed model-weights.h5-other names",
        "RNN of cells-weights.h5-other names",
        "Bidirectional of two kinds-npz-other names",
        "MultiHeadAttention-weights.h5-equal names",
        "GroupQueryAttention-npz-equal names",
        "TimeDistributed model-keras-equal names",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "2"], ids=["equal names", "other names"])
@pytest.mark.parametrize(
    "kind", ["weights.h5", pytest.param("keras", marks=pytest.mark.slow), pytest.param("npz", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MODELS)
def test_every_array_finds_its_place(tmp_path, name, kind, end):
    model, target, path = shaken(MODELS[name]()), MODELS[name](end), tmp_path / f"file.{kind}"
    names = units(model, tmp_path)
    mapping = dict(zip(names, units(target, tmp_path), strict=True)) if end else None
    if kind == "keras":
        model.save(path)
    elif kind == "weights.h5":
        model.save_weights(path)
        if not end:  # the same as Keras
            reference = MODELS[name]()
            reference.load_weights(path)
            np.testing.assert_array_equal(reference(ROWS), model(ROWS))
    else:
        arrays = {}
        for unit in names:
            arrays |= {f"{unit}/{place}": array for place, array in enumerate(arrays_of(model, unit))}
        np.savez(path, **arrays)
    assert np.abs(target(ROWS) - model(ROWS)).max() > 1e-2
    report = weights.load(target, [(path, mapping)])
    assert report["not_loaded"] == report["unused"] == [] and len(report["loaded"]) == len(names)
    np.testing.assert_allclose(target(ROWS), model(ROWS), rtol=1e-5)


def arrays_of(model, unit):
    part = model
    for name in unit.split("/"):
        if name == weights.OWN:
            inside = {id(weight) for layer in part.layers for weight in layer.weights}
            return [weight.numpy() for weight in part.weights if id(weight) not in inside]
        part = part.get_layer(name)
    return part.get_weights()


def test_layers_inside_of_layers_have_names_too(tmp_path):
    model, target = shaken(MODELS["MultiHeadAttention"]()), shaken(MODELS["MultiHeadAttention"]("2"), seed=2)
    model.save_weights(tmp_path / "a.weights.h5")
    report = weights.load(target, [(tmp_path / "a.weights.h5", {"part/query": "part2/value"})])
    value, query = target.get_layer("part2").value_dense, model.get_layer("part").query_dense
    np.testing.assert_array_equal(value.kernel, query.kernel)
    assert sorted(report["not_loaded"]) == ["d", "part2/attention_output", "part2/key", "part2/query"]
    with pytest.raises(InputError, match="Two layers of the files go to 'part2/value'"):
        weights.load(target, [(tmp_path / "a.weights.h5", {"part": "part2", "part/query": "part2/value"})])


def test_one_layer_may_be_inside_of_a_wrapper_and_the_other_not(tmp_path):
    plain = functional(lambda x, end: layers.Dense(4, name="part")(x))()
    wrapped = functional(lambda x, end: layers.TimeDistributed(layers.Dense(4), name="part")(x))()
    shaken(plain).save_weights(tmp_path / "plain.weights.h5")
    assert weights.load(wrapped, [(tmp_path / "plain.weights.h5", None)])["not_loaded"] == []
    np.testing.assert_allclose(wrapped(ROWS), plain(ROWS), rtol=1e-5)


def test_a_shared_layer_has_one_set_of_weights(tmp_path):
    def build(end=""):
        dense = layers.Dense(8, name="dense")
        inner = keras.Sequential([keras.Input((8,)), dense], name="inner")
        x = keras.Input((8,))
        return keras.Model(x, layers.Dense(2, name="out")(dense(inner(x))))

    model, target = shaken(build()), build()
    model.save_weights(tmp_path / "a.weights.h5")
    report = weights.load(target, [(tmp_path / "a.weights.h5", None)])
    assert report["not_loaded"] == [] and len(report["loaded"]) == 2
    np.testing.assert_allclose(target(ROWS[0]), model(ROWS[0]), rtol=1e-5)
    model.save(tmp_path / "a.keras")  # Keras loads two layers, and gives one of them random weights
    with pytest.raises(InputError, match="Keras would give layers random weights. It saves a layer once that a nested"):
        saving.load_model(tmp_path / "a.keras")
    other = build()
    other.load_weights(tmp_path / "a.keras")  # the advice
    np.testing.assert_allclose(other(ROWS[0]), model(ROWS[0]), rtol=1e-5)


def test_other_structures_and_equal_names_are_named(tmp_path):
    shaken(MODELS["MultiHeadAttention"]()).save_weights(tmp_path / "a.weights.h5")
    target = MODELS["Bidirectional of two kinds"]()
    message = (
        r"expects weights of the shapes forward_layer/cell/0 .*received attention_output|expects weights of the sha"
    )
    with pytest.raises(InputError, match=message):
        weights.load(target, [(tmp_path / "a.weights.h5", {"part": "part"})])

    class Twice(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [layers.Dense(8, name="same"), layers.Dense(8, name="same")]

        def call(self, x):
            return self.parts[1](self.parts[0](x))

    model = Twice()
    model(ROWS)
    model.save_weights(tmp_path / "twice.weights.h5")
    with pytest.raises(InputError, match="2 layers of .* have the name 'same'. Give each its own name"):
        weights.load(model, [(tmp_path / "twice.weights.h5", None)])
    with pytest.raises(InputError, match="'net' is not built"):
        weights.load(Subclassed(name="net"), [(tmp_path / "twice.weights.h5", None)])


def test_damaged_files_are_refused_and_change_nothing(tmp_path):
    model = shaken(MODELS["nested models"]())
    before, path = model.get_weights(), tmp_path / "a.weights.h5"

    def refuse(change, message):
        model.save_weights(path)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(InputError, match=message):
            weights.load(model, [(path, None)])
        for one, two in zip(before, model.get_weights(), strict=True):
            np.testing.assert_array_equal(one, two)

    def link(file):
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = h5py.ExternalLink("other.h5", "/kernel")

    def circle(file):
        file["layers/sequential/layers/again"] = file["layers"]

    def text(file):
        shape = file["layers/dense/vars/0"].shape
        del file["layers/dense/vars/0"]
        file["layers/dense/vars/0"] = np.full(shape, b"kernel")

    def huge(file):
        del file["layers/dense/vars/0"]
        file["layers/dense/vars"].create_dataset("0", (10**9, 10**9), chunks=(64, 64), compression="gzip")

    refuse(link, "cannot be read as plain arrays: .* is a link to another place")
    refuse(circle, "cannot be read as plain arrays: its group .* is in several places, or the groups are too many")
    refuse(text, "contains .* instead of numbers")
    refuse(huge, "cannot be read as plain arrays: its arrays claim over")


def test_layers_that_keras_does_not_build_are_not_left_out_silently(tmp_path):
    @keras.saving.register_keras_serializable("test")
    class Unbuilt(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(3, name="lost")

        def build(self, shape):
            self.scale = self.add_weight(name="scale", shape=(3,))

        def call(self, x):
            return self.dense(x) * self.scale

    model = Unbuilt(name="net")
    model(ROWS)
    model.save(tmp_path / "a.keras")
    message = "2 weights in the file are not loaded, because Keras does not build the layers 'lost' .Dense. of 'net'"
    with pytest.raises(InputError, match=message):
        saving.load_model(tmp_path / "a.keras")


def test_weights_of_16_bits(tmp_path):
    def build(dtype):
        parts = [layers.Dense(5, dtype=dtype, name="a"), layers.Dense(3, dtype=dtype, name="b")]
        return shaken(keras.Sequential([keras.Input((8,)), *parts]), seed=len(dtype))

    for first, second in (("bfloat16", "float32"), ("float32", "bfloat16"), ("mixed_bfloat16", "float16")):
        model, target = build(first), build(second)
        model.save_weights(tmp_path / "a.weights.h5")
        weights.load(target, [(tmp_path / "a.weights.h5", None)])
        for one, two in zip(model.weights, target.weights, strict=True):
            np.testing.assert_allclose(ops.cast(one, "float32"), ops.cast(two, "float32"), rtol=5e-3)
