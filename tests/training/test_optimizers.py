"""The fused optimizers compute what Keras's own do."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.recipe import Training
from kdistill.training import optimizers

RATE = keras.optimizers.schedules.CosineDecay(0.0, 20, warmup_target=0.05, warmup_steps=5)


def weights_after(made, steps=25, dtype="float32"):
    random = np.random.default_rng(0)
    variables = [keras.Variable(random.normal(size=shape), dtype=dtype, name="w") for shape in ((3, 4), (5,))]
    made.build(variables)

    @tf.function
    def step(gradients):
        made.apply(gradients, variables)

    for _ in range(steps):
        step([tf.constant(random.normal(size=v.shape), dtype) for v in variables])
    return [v.numpy() for v in variables], [v.numpy() for v in made.variables]


@pytest.mark.parametrize("kind", ["Adam", "SGD"])
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.1, "global_clipnorm": 1.0}, {"more": True}])
def test_they_agree_with_keras(kind, options):
    options = dict(options)
    if options.pop("more", False):
        options = {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-3} if kind == "Adam" else {"momentum": 0.9}
    mine = weights_after(getattr(optimizers, kind)(RATE, **options))
    keras_own = weights_after(getattr(keras.optimizers, kind)(RATE, **options))
    for a, b in zip(mine[0] + mine[1], keras_own[0] + keras_own[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_nesterov_amsgrad_and_other_precisions():
    pairs = [
        (optimizers.SGD(0.1, momentum=0.9, nesterov=True), keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)),
        (optimizers.Adam(0.1, amsgrad=True), keras.optimizers.Adam(0.1, amsgrad=True)),
    ]
    for mine, other in pairs:
        for a, b in zip(weights_after(mine)[0], weights_after(other)[0], strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    for a, b in zip(
        weights_after(optimizers.Adam(0.1), dtype="bfloat16")[0],
        weights_after(keras.optimizers.Adam(0.1), dtype="bfloat16")[0],
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_one_operation_for_each_weight():
    made, variables = optimizers.Adam(0.1), [keras.Variable(np.ones(3), dtype="float32")]
    made.build(variables)
    traced = tf.function(lambda g: made.apply([g], variables)).get_concrete_function(tf.TensorSpec([3]))
    names = [op.type for op in traced.graph.get_operations()]
    assert names.count("ResourceApplyAdam") == 1 and "Sqrt" not in names


def test_recipes_train_with_them_and_they_are_saved(tmp_path):
    adam = optimizers.scheduled_optimizer(Training(weight_decay=0.01), 10)
    assert isinstance(adam, optimizers.Adam) and adam.weight_decay == 0.01
    sgd = optimizers.scheduled_optimizer(Training(optimizer="sgd", momentum=0.9), 10)
    assert isinstance(sgd, optimizers.SGD) and sgd.momentum == 0.9
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(adam))
    assert type(again) is optimizers.Adam and again.get_config() == adam.get_config()
