"""Weights under other names: every kind of file, several into one model, and what is told of mistakes."""

import dataclasses
import hashlib
import types

import keras
import numpy as np
import pytest

from kdistill.errors import InputError
from kdistill.networks import architectures, weights
from kdistill.recipe import Network
from kdistill.recipe.loading import load_recipe
from kdistill.runs import arms

X = np.random.default_rng(0).normal(size=(3, 6, 6, 1)).astype("float32")


def net(names=("conv", "norm", "last"), seed=0, filters=4):
    keras.utils.set_random_seed(seed)
    conv = keras.layers.Conv2D(filters, 3, name=names[0], bias_initializer="uniform")
    inner = keras.Sequential(
        [keras.Input((6, 6, 1)), conv, keras.layers.BatchNormalization(name=names[1])], name="block"
    )
    rows = keras.layers.LSTM(3, name="rows")
    tail = [keras.layers.Dropout(0.5), keras.layers.Reshape((4, -1)), rows, keras.layers.Dense(2, name=names[2])]
    model = keras.Sequential([keras.Input((6, 6, 1)), inner, *tail], name="net")
    for weight in model.weights:
        if "moving" in weight.path:
            weight.assign(np.random.default_rng(seed).uniform(1, 2, weight.shape))
    return model


@pytest.mark.slow
def test_a_recipes_teacher_has_the_weights_of_files_and_is_not_trained(tmp_path, digits):
    """Two files, of which each holds some layers under other names; what is random of it is told."""
    recipe = load_recipe("mnist", "smoke")
    small = {"filters": (2, 3), "units": 4}
    source = architectures.build(Network("lenet", small), (28, 28, 1), 10)
    layers = {name: [w.numpy() + 0.1 for w in source.get_layer(name).weights] for name in ("conv1", "conv2", "fc1")}
    first, second = str(tmp_path / "first.npz"), str(tmp_path / "second.npz")
    np.savez(first, **{f"{name}_of_theirs/{i}": a for name in ("conv1", "conv2") for i, a in enumerate(layers[name])})
    np.savez(second, **{f"fc1/{i}": array for i, array in enumerate(layers["fc1"])})
    mapping = {first: {"conv1_of_theirs": "conv1", "conv2_of_theirs": "conv2"}}
    given = Network("lenet", small, weights=(first, second), mapping=mapping)
    said = []
    arm = arms.Arms(dataclasses.replace(recipe, teacher=given), digits, None, said.append)
    teacher = arm.fit_teacher()
    for name, arrays in layers.items():
        for weight, array in zip(teacher.get_layer(name).weights, arrays, strict=True):
            np.testing.assert_array_equal(weight, array)
    assert arm.fits == {} and arm.models["teacher"] is teacher
    assert f"from '{first}' conv1_of_theirs -> conv1, conv2_of_theirs -> conv2; from '{second}' fc1" in said[0]
    assert said[0].endswith("layers without loaded weights: logits.")
    assert "The layers logits of teacher ('lenet') received no weights" in arm.warnings[0]
    assert f"Warning: {arm.warnings[0]}" in said

    # Out of a strategy it is a copy, as it is in no file.
    arm.devices = types.SimpleNamespace(strategy="some")
    arm.folder = types.SimpleNamespace(path=tmp_path)
    plain = arm.plain_models()["teacher"]
    x = digits.test.images[:2].astype("float32")
    assert plain is not teacher and np.array_equal(plain(x), teacher(x))

    nothing = Network("lenet", small, weights=(first,))
    with pytest.raises(InputError, match="No layer of 'lenet' has the name of a layer of .*first.npz. Give .* mapping"):
        arms.Arms(dataclasses.replace(recipe, teacher=nothing), digits, None, said.append).fit_teacher()
    start = Network("lenet", small, weights=(second,))  # a student's: where its training begins
    network = arms.Arms(recipe, digits, None, said.append).network(start, 0)
    np.testing.assert_array_equal(network.get_layer("fc1").kernel, layers["fc1"][0])


MAPPING = {"block/conv": "block/c", "block/norm": "block/n", "rows": "rows", "last": "out"}


@pytest.mark.parametrize("kind", ["keras", "weights.h5", "npz"])
def test_a_file_of_each_kind_into_layers_of_other_names(tmp_path, kind):
    source, target = net(seed=1), net(("c", "n", "out"), seed=2)
    path = tmp_path / f"file.{kind}"
    if kind == "keras":
        source.save(path)
    elif kind == "weights.h5":
        source.save_weights(path)
    else:
        arrays = {f"{n}/{w.name}{i}": w.numpy() for n, a in _named(source) for i, w in enumerate(a)}
        np.savez(path, **arrays)
    assert np.abs(source(X) - target(X)).max() > 1e-3
    report = weights.load(target, [(path, MAPPING)])
    np.testing.assert_allclose(target(X), source(X), atol=1e-6)
    assert [row[1:3] for row in report["loaded"]] == [list(pair) for pair in MAPPING.items()]
    assert report["unused"] == [] and report["not_loaded"] == []


def _named(model):
    block = [(f"block/{layer.name}", layer.weights) for layer in model.get_layer("block").layers]
    return [*block, *((layer.name, layer.weights) for layer in model.layers if layer.name in ("rows", "last"))]


@pytest.mark.slow
def test_two_files_into_one_model_and_what_is_left(tmp_path):
    first, second, target = net(seed=1), net(seed=2), net(("c", "n", "out"), seed=3)
    first.save(tmp_path / "a.keras")
    second.save_weights(tmp_path / "b.weights.h5")
    files = [(tmp_path / "a.keras", {"block/conv": "block/c"}), (tmp_path / "b.weights.h5", {"last": "out"})]
    report = weights.load(target, files)
    np.testing.assert_array_equal(
        target.get_layer("block").get_layer("c").kernel, first.get_layer("block").layers[0].kernel
    )
    np.testing.assert_array_equal(target.get_layer("out").kernel, second.get_layer("last").kernel)
    assert report["not_loaded"] == ["block/n", "rows"]
    assert [str(tmp_path / "b.weights.h5"), "block/conv"] in report["unused"] and len(report["unused"]) == 6
    again = weights.load(net(), [(tmp_path / "a.keras", None)])
    assert len(again["loaded"]) == 4 and again["not_loaded"] == []


@pytest.mark.slow
def test_mistakes_are_named_and_change_nothing(tmp_path):
    net(filters=8).save(tmp_path / "wide.keras")
    net().save(tmp_path / "a.keras")
    target = net(seed=5)
    before = [w.numpy() for w in target.weights]
    wide, same = tmp_path / "wide.keras", tmp_path / "a.keras"
    np.savez(tmp_path / "objects.npz", **{"last/0": np.array([{}], object)})
    np.savez(tmp_path / "flat.npz", last=np.zeros(3))
    (tmp_path / "text.weights.h5").write_text("no HDF5")
    for files, message in (
        (
            [(same, {"last": "last"}), (wide, {"block/conv": "block/conv"})],
            r"expects .*\(3, 3, 1, 4\).*received .*\(3, 3, 1, 8\)",
        ),
        ([(same, {"lost": "last"})], "Unknown layer of .*a.keras' 'lost'. Did you mean 'last'"),
        ([(same, {"last": "lost"})], "Unknown layer of the model 'net' 'lost'. Did you mean 'last'"),
        ([(same, {"last": "last"}), (same, {"last": "last"})], "Two layers of the files go to 'last'"),
        ([(tmp_path / "none.npz", None)], "There is no file"),
        ([(tmp_path / "objects.npz", None)], "cannot be read as plain arrays"),
        ([(tmp_path / "flat.npz", None)], "'last' is not named <layer>/<weight>"),
        ([(tmp_path / "text.weights.h5", None)], "cannot be read as plain arrays"),
        ([(__file__, None)], "Expected weights in a .keras, .weights.h5 or .npz file"),
    ):
        with pytest.raises(InputError, match=message):
            weights.load(target, files)
    for a, b in zip(before, target.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_teacher_that_ships_with_kdistill(digits):
    model = architectures.small_cnn((28, 28, 1), 10, widths=(32, 64, 128))
    report = weights.load(model, [("shipped:mnist_cnn", None)])
    assert not report["unused"] and not report["not_loaded"]
    logits = model.predict(digits.test.images, batch_size=500, verbose=0)
    assert np.mean(logits.argmax(axis=1) == digits.test.labels) > 0.99  # images that it has not seen
    file = weights.SHIPPED / "mnist_cnn.npz"
    note = (weights.SHIPPED / "README.md").read_text()
    assert file.stat().st_size < 500_000 and hashlib.sha256(file.read_bytes()).hexdigest() in note
    with pytest.raises(InputError, match="Unknown shipped weights 'mnist_cn'. Did you mean 'mnist_cnn'"):
        weights.load(model, [("shipped:mnist_cn", None)])
    with pytest.raises(InputError, match="shape"):
        weights.load(architectures.small_cnn((32, 32, 3), 10, widths=(32, 64, 128)), [("shipped:mnist_cnn", None)])
