"""Teachers of other kinds: blended, recurrent, adapted, and in chains of a recipe."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.distillation.distiller import Distiller
from kdistill.errors import InputError
from kdistill.networks.architectures import build
from kdistill.recipe import Distill, Network, Schedule, Term
from kdistill.recipe.checks import check_recipe
from kdistill.recipe.loading import load_recipe
from kdistill.runs.run import run
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.frozen import blend_models

SHAPE = (28, 28, 1)


def softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


@pytest.mark.slow
def test_a_recurrent_and_a_convolutional_teacher_blend_for_a_convolutional_student(digits):
    """Geras et al. 2016: the student learns from the weighted mean of both models' probabilities."""
    keras.utils.set_random_seed(0)
    pair = [build(Network("lstm_rows", {"units": 8}), SHAPE, 10), build(Network("lenet", {"units": 16}), SHAPE, 10)]
    student = build(Network("small_cnn", {"widths": (4, 4, 4)}), SHAPE, 10)
    images, labels = digits.train.images.astype("float32"), digits.train.labels
    distiller = Distiller(student, pair, teacher_weights=[1, 3], temperature=2.0)
    distiller.compile(keras.optimizers.Adam(1e-2))
    p = 0.25 * softmax(pair[0](images).numpy()) + 0.75 * softmax(pair[1](images).numpy())
    hot, s = np.log(softmax(np.log(p) / 2)), np.log(softmax(student(images).numpy() / 2))
    logs = distiller.evaluate(images, labels, batch_size=256, verbose=0, return_dict=True)
    assert logs["kd"] == pytest.approx(4 * np.mean((np.exp(hot) * (hot - s)).sum(-1)), abs=1e-5)
    history = distiller.fit(images, labels, batch_size=64, epochs=3, verbose=0).history
    assert history["kd"][-1] < history["kd"][0]


@pytest.mark.parametrize("ending", [None, "softmax"])
def test_a_blend_is_a_model_that_can_be_saved(tmp_path, ending):
    keras.utils.set_random_seed(1)
    pair = [keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, ending)]) for _ in range(2)]
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    mean = sum(w * (p(x).numpy() if ending else softmax(p(x).numpy())) for w, p in zip((0.25, 0.75), pair, strict=True))
    blend = blend_models(pair, (1, 3))
    np.testing.assert_allclose(tf.exp(blend(x)), mean, atol=1e-6)
    np.testing.assert_allclose(np.exp(blend.predict(x, verbose=0)), mean, atol=1e-6)
    blend.save(tmp_path / "blend.keras")
    np.testing.assert_allclose(tf.exp(keras.models.load_model(tmp_path / "blend.keras")(x)), mean, atol=1e-6)
    with tf.GradientTape() as tape:
        value = blend(x)
    assert tape.gradient(value, blend.weights[0].value) is None


def test_an_adapted_teacher_sees_its_own_size_channels_and_range():
    received = []

    def teacher(images):
        received.append(images)
        return tf.reduce_mean(images, axis=[1, 2])

    gray = tf.constant(np.full((2, 8, 8, 1), 100.0, np.float32))
    adapted = Adapted(teacher, size=(4, 6), channels=3, scale=0.01, mean=(0.0, 0.5, 1.0), std=(1.0, 2.0, 0.5))
    np.testing.assert_allclose(adapted(gray), [[1.0, 0.25, 0.0]] * 2, atol=1e-6)
    assert received[0].shape == (2, 4, 6, 3)
    color = tf.constant(np.broadcast_to(np.float32([10, 20, 30]), (1, 2, 2, 3)))
    np.testing.assert_allclose(Adapted(teacher, bgr=True)(color), [[30.0, 20.0, 10.0]])
    np.testing.assert_allclose(
        Adapted(teacher, channels=1)(color), [[0.2989 * 10 + 0.587 * 20 + 0.114 * 30]], rtol=1e-3
    )
    for options in ({"channels": 2}, {"channels": 1, "bgr": True}, {"std": 0.0}):
        with pytest.raises(InputError, match="Adapted expects"):
            Adapted(teacher, **options)


@pytest.mark.slow
def test_an_adapted_model_teaches_and_has_taps():
    keras.utils.set_random_seed(2)
    image = keras.Input((4, 4, 3))
    x = keras.layers.Conv2D(5, 3, name="conv")(image)
    large = keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(x)), name="large")
    image = keras.Input((8, 8, 1))
    x = keras.layers.Conv2D(5, 3, strides=4, name="conv")(image)
    small = keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(x)), name="small")
    terms = {"hint": Term("hint", student_tap="conv", teacher_tap="conv")}
    distiller = Distiller(small, Adapted(large, size=(4, 4), channels=3, scale=1 / 255), terms=terms)
    distiller.compile("sgd")
    pixels = np.random.default_rng(0).uniform(0, 255, (6, 8, 8, 1)).astype("float32")
    logs = distiller.evaluate(pixels, np.zeros(6, "int32"), verbose=0, return_dict=True)
    adapted = tf.image.grayscale_to_rgb(tf.image.resize(pixels, (4, 4), antialias=True)) / 255
    expected = np.mean((small.get_layer("conv")(pixels) - large.get_layer("conv")(adapted)) ** 2)
    assert logs["hint"] == pytest.approx(expected, rel=1e-4)


def test_variants_of_the_recipe():
    late, blend, assistant, again = (load_recipe("mnist", v) for v in ("late", "blend", "assistant", "born_again"))
    assert late.distill.distillation_weight == Schedule(0.9, 0.1, 0.5)
    assert [n.name for n in (blend.teacher, *blend.more_teachers)] == ["small_cnn", "lstm_rows"]
    assert assistant.assistants[0].options == {"widths": (16, 32, 48)}
    assert again.student == again.teacher == again.assistants[0]
    check_recipe(dataclasses.replace(blend, distill=Distill(teacher_weights=(1.0, 3.0))))
    with pytest.raises(InputError, match="2 numbers above 0, one for each teacher"):
        check_recipe(dataclasses.replace(blend, distill=Distill(teacher_weights=(1.0,))))
    hint = Distill(terms={"hint": Term("hint", student_tap="flat", teacher_tap="fc1", projector="dense")})
    for many in (blend, assistant):
        with pytest.raises(InputError, match="expects none, because the terms hint use layers of the one teacher"):
            check_recipe(dataclasses.replace(many, distill=hint))


@pytest.mark.exhaustive
def test_a_run_of_two_teachers_and_an_assistant(tmp_path):
    recipe = dataclasses.replace(
        load_recipe("mnist", "smoke", ["train_limit=320"]),
        more_teachers=(Network("lstm_rows", {"units": 8}),),
        assistants=(Network("small_cnn", {"widths": (8, 8, 8)}),),
        exports=(),
        distill=Distill(Schedule(0.9, 0.1, 0.5), teacher_weights=(3.0, 1.0)),
    )
    messages = []
    run(recipe, tmp_path / "out", say=messages.append)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    assert list(rows) == ["teacher_0", "teacher_1", "teacher", "assistant_0", "control", "student"]
    assert rows["teacher"]["parameters"] == rows["teacher_0"]["parameters"] + rows["teacher_1"]["parameters"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values()) and rows["teacher"]["agreement"] == 1.0
    assert "kd" in report["training"]["assistant_0"] and "kd" not in report["training"]["teacher_1"]
    again = run(recipe, tmp_path / "out", resume=True, say=messages.append)
    assert [row["accuracy"] for row in again["models"]] == [row["accuracy"] for row in report["models"]]
