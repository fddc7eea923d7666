"""The source experiments as recipes: what they are made of, and the tutorial's row from one command, on few images."""

import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation import losses
from kdistill.networks import architectures
from kdistill.recipe import grid
from kdistill.recipe.loading import load_recipe
from kdistill.report.sweep import student_table
from kdistill.runs.sweep import sweep

pytestmark = pytest.mark.slow


def test_the_tutorial_is_six_students_of_one_layer_and_a_benchmark(tmp_path):
    said = []
    recipe = load_recipe("mnist_linear", "smoke", ["train_limit=60"])
    result = sweep(recipe, None, tmp_path / "linear", say=said.append)
    titles, cells = student_table(result)
    assert [cell[0] for cell in cells] == ["teacher", "control", "0.001", "0.003", "0.01", "0.03", "0.1", "0.3"]
    published = [cell[titles.index("published %")] for cell in cells]
    assert published == ["86.69", "90.00", "82.00", "82.72", "82.62", "82.29", "69.40", "36.55"]
    assert result["cost"]["passes"][0]["students"] == 7 and result["cost"]["passes"][0]["steps"] == 60
    assert {row["parameters"] for row in result["students"]} == {7850}
    assert not any("unscaled" in text for text in said)


def test_raw_pixels_are_named(tmp_path):
    said = []
    recipe = load_recipe("mnist_linear", "unscaled", ["train_limit=20"])
    sweep(recipe, ["training.learning_rate=0.001"], tmp_path / "raw", say=said.append)
    assert any("look unscaled" in text and "'fc1'" in text for text in said)


def test_one_step_is_the_tutorials():
    """The squared error's gradient is 2/10 of the difference, through a LeakyReLU of slope 0.1."""
    recipe = load_recipe("mnist_linear")
    model = architectures.build(recipe.student, (28, 28, 1), 10)
    image = np.random.default_rng(0).integers(0, 256, (1, 28, 28, 1)).astype("float32")
    target = np.linspace(-1, 1, 10, dtype="float32")[None]
    kernel, bias = (w.numpy() for w in model.trainable_weights)
    x = image.reshape(1, 784) / 255
    z = x @ kernel + bias
    expected = (2 / 10) * (np.where(z > 0, z, 0.1 * z) - target) * np.where(z > 0, 1, 0.1)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(losses.mse_logits(model(image), target))
    found = tape.gradient(loss, model.trainable_weights)
    np.testing.assert_allclose(found[0], x.T @ expected, atol=1e-6)
    np.testing.assert_allclose(found[1], expected[0], atol=1e-6)
    assert kernel.std() == pytest.approx(1 / 7840, rel=0.1)


def test_the_study_goes_through_lambda_with_the_teachers_own_network():
    recipe = load_recipe("mnist", "lenet_lambda")
    assert recipe.student == recipe.teacher and recipe.distill.terms["kd"].loss == "soft_cross_entropy"
    made = grid.students(grid.settings(recipe, grid.axes(recipe, list(recipe.grid))))
    assert [each[0].recipe.distill.distillation_weight for each in made.values()] == pytest.approx(
        [i / 10 for i in range(11)]
    )
    assert 8 * (9000 // 64) >= 1000  # the first 1,000 steps, on the sample
