"""Keras's private names: when a new Keras changes one, the test that names it fails first. They stay in one module."""

import ast
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import kdistill
from kdistill.networks import keras_internals

PACKAGE = Path(kdistill.__file__).parent
# Private names of Keras 3 that a model, a tensor, an optimizer or a metric may carry.
PRIVATE = {
    "_call_has_training_arg",
    "_flatten_layers",
    "_functional",
    "_get_variable_index",
    "_inbound_nodes",
    "_inputs_struct",
    "_keras_history",
    "_keras_logits",
    "_keras_mask",
    "_layers",
    "_loss_tracker",
    "_maybe_symbolic_build",
    "_momentums",
    "_name",
    "_nodes",
    "_operations",
    "_outbound_nodes",
    "_outputs_struct",
    "_run_through_graph",
    "_symbolic_build",
    "_tracker",
    "_velocities",
}
# tf_keras, which is Keras 2, has some of the same names: (module, name) of its objects.
TF_KERAS = {("compression.bridge", "_inbound_nodes"), ("compression.bridge_layers", "_name")}


def network() -> keras.Model:
    """An image, a nested Sequential model, a layer that holds layers, and a layer that two others use."""
    image = keras.Input((4, 4, 1), name="image")
    block = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Conv2D(2, 3, name="conv")], name="block")
    rows = keras.layers.Reshape((2, 4), name="rows")(block(image))
    state = keras.layers.Bidirectional(keras.layers.LSTM(2, name="lstm"), name="both")(rows)
    drop = keras.layers.Dropout(0.5, name="drop")(state)
    total = keras.layers.Add(name="sum")([state, drop])
    return keras.Model(image, keras.layers.Dense(3, activation="softmax", name="classes")(total))


def test_flatten_layers():
    names = {layer.name for layer in keras_internals.layers_of(network())}
    assert {"image", "block", "conv", "both", "drop", "sum", "classes"} <= names and "functional" not in names
    leaves = {layer.name for layer in keras_internals.leaf_layers(network())}
    assert {"image", "conv", "drop", "classes"} <= leaves and not {"block", "both"} & leaves


def test_functional():
    model = network()
    assert keras_internals.graph_of(model) is model
    graph = keras_internals.graph_of(model.get_layer("block"))
    assert isinstance(graph, keras.Function) and [each.name for each in graph.operations][1:] == ["conv"]
    assert keras_internals.graph_of(keras.Sequential([keras.layers.Dense(2)])) is None  # not built

    class Subclassed(keras.Model):
        pass

    assert keras_internals.graph_of(Subclassed()) is None and keras_internals.graph_of(model.layers[1]) is not None
    assert keras_internals.graph_of(model.get_layer("drop")) is None


def test_run_through_graph():
    model, names = network(), []

    def call(operation, *args, **kwargs):
        names.append(operation.name)
        return operation(*args, **kwargs)

    images = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype("float32")
    outputs = keras_internals.run_graph(model, images, call)
    np.testing.assert_array_equal(outputs, model(images))
    assert names == ["block", "rows", "both", "drop", "sum", "classes"]


def test_keras_history():
    model = network()
    assert [keras_internals.operation_behind(tensor).name for tensor in model.outputs] == ["classes"]
    assert keras_internals.operation_behind(model.inputs[0]).name == "image"


def test_inbound_nodes():
    layer, image = keras.layers.Dense(2), keras.Input((3,))
    assert keras_internals.call_count(layer) == 0
    layer(image)
    assert keras_internals.call_count(layer) == 1
    layer(image)
    assert keras_internals.call_count(layer) == 2


def test_outbound_nodes():
    model = network()
    assert [each.name for each in keras_internals.consumers_of(model.get_layer("both"))] == ["drop", "sum"]
    assert keras_internals.consumers_of(model.get_layer("classes")) == []


def test_call_signature_parameters():
    model = network()
    assert keras_internals.takes_training(model.get_layer("drop")) and keras_internals.takes_training(model)
    assert not keras_internals.takes_training(model.get_layer("sum"))
    addition = keras_internals.operation_behind(model.outputs[0] + 1)
    assert not keras_internals.takes_training(addition)


@pytest.mark.parametrize("graph", [False, True], ids=["eager", "tf.function"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_keras_logits(activation, graph):
    layer, inputs = keras.layers.Dense(3, activation=activation), tf.constant([[1.0, 2.0]])

    def both(inputs):
        outputs = layer(inputs)
        return outputs, keras_internals.logits_before_softmax(outputs)

    outputs, logits = (tf.function(both) if graph else both)(inputs)
    np.testing.assert_allclose(getattr(tf.nn, activation)(logits), outputs, rtol=1e-6)
    assert keras_internals.logits_before_softmax(keras.layers.Dense(3, activation="relu")(inputs)) is None


def test_momentums_and_velocities():
    first, second = (keras.Variable([value], name=name) for value, name in ((1.0, "first"), (2.0, "second")))
    adam = keras.optimizers.Adam(0.1, beta_1=0.9, beta_2=0.99)
    adam.apply([tf.constant([1.0]), tf.constant([3.0])], [first, second])
    momentum, velocity = keras_internals.moments_of(adam, second)
    np.testing.assert_allclose([momentum.numpy(), velocity.numpy()], [[0.3], [0.09]], rtol=1e-5)
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    sgd.apply([tf.constant([1.0]), tf.constant([3.0])], [first, second])
    np.testing.assert_allclose(keras_internals.momentum_of(sgd, second).numpy(), [-0.3], rtol=1e-5)


def test_loss_tracker():
    model = network()
    assert keras_internals.loss_tracker(model) is None
    model.compile("sgd", "mse")
    assert keras_internals.loss_tracker(model) is model.metrics[0]


def test_value():
    """Eagerly and in a graph, a step reads and writes other variables, and the model's own ones afterwards."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, kernel_initializer="ones")])
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build(model.trainable_variables)
    others = [tf.Variable([[2.0], [3.0]]), tf.Variable([0.0])]

    def step(values):
        with keras_internals.stand_in(model.variables, values), tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.constant([[1.0, 10.0]])))
            optimizer.apply(tape.gradient(loss, model.trainable_variables))
        return loss

    assert step(others).numpy() == 32.0 and tf.function(step)(others).numpy() == 1.5 - 20 - 0.5
    np.testing.assert_array_equal(others[0], [[1.0], [-7.0]])
    np.testing.assert_array_equal(model.get_weights()[0], [[1.0], [1.0]])


@pytest.mark.parametrize("builds", [True, False])
def test_maybe_symbolic_build(builds):
    calls = []

    class Built(keras_internals.OwnBuild, keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(1)

        def build_before_fit(self):
            calls.append(self.dense.built)
            return builds

        def call(self, inputs):
            return self.dense(inputs)

    model = Built()
    model.compile("sgd", "mse")
    model.fit(np.ones((2, 1)), np.ones((2, 1)), verbose=0)
    model.evaluate(np.ones((2, 1)), np.ones((2, 1)), verbose=0)
    assert calls == [False, True]


@pytest.mark.slow
def test_no_other_module_uses_private_names_of_keras():
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module == "networks.keras_internals":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = set()
            if isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # getattr(model, "_functional")
                names = {node.value}
            elif isinstance(node, ast.FunctionDef):  # an override
                names = {node.name}
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                places = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
                assert not any(place.startswith("keras.src") for place in places), f"{module} imports from keras.src"
            private = {name for name in names & PRIVATE if (module, name) not in TF_KERAS}
            where = f"{module}, line {getattr(node, 'lineno', 0)}"
            assert not private, f"{where}: {private} belongs into networks.keras_internals"


@pytest.mark.slow
def test_no_other_module_uses_any_private_attribute_of_a_keras_object():
    """Names that are not on the list above: what Keras objects have and no class of kdistill defines."""
    model = network()
    model.compile("adam", "mse", metrics=["mae"])
    objects = [model, model.get_layer("block"), model.layers[-1], model.outputs[0], model.optimizer, *model.metrics]
    objects += [*model.weights, *keras_internals.layers_of(model), keras.Variable(1.0)]
    of_keras = {name for each in objects for name in dir(each) if name.startswith("_") and not name.startswith("__")}
    assert len(of_keras) > 100
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module == "networks.keras_internals":
            continue
        tree = ast.parse(path.read_text())
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        own |= {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
        }
        private = of_keras - own
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in private and (module, node.attr) not in TF_KERAS:
                raise AssertionError(f"{module}, line {node.lineno}: '{node.attr}' is private in Keras")
