"""Terms of the Distiller: every method by its name, taps, projectors, weights and schedules, one forward per model."""

import inspect
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_models import Counted
from support.tapped_models import RNG, TAPS, X, Y, compiled, student, teacher

from kdistill.distillation import feature_losses, losses
from kdistill.distillation.distiller import Distiller, from_recipe
from kdistill.distillation.terms import LOSSES, in_steps, term_loss
from kdistill.errors import InputError
from kdistill.networks.taps import tapped
from kdistill.recipe import Distill, Schedule, Term
from kdistill.recipe.objective import FEATURE_LOSSES, LOGIT_LOSSES, OUTPUTS_OF_LOSSES
from kdistill.training import checkpoint


def evaluated(distiller, labels=Y):
    return distiller.evaluate(X, labels, batch_size=24, verbose=0, return_dict=True)


HARD_LOSSES = ("hard_cross_entropy", "binary_cross_entropy", "masked_squared_error")
OF_CLASSES = [name for name in LOSSES if "classes" in OUTPUTS_OF_LOSSES.get(name, ["classes"])]
OPTIONS = {"dkd": {"alpha": 2.0, "beta": 3.0, "temperature": 2.0}, "dist": {"temperature": 3.0, "gamma": 2.0}}


def term(name, weight=1.0):
    taps = TAPS if name in FEATURE_LOSSES else {}
    return Term(name, weight, options=OPTIONS.get(name, {}), **taps)


def test_every_method_is_a_term_and_its_options_are_its_arguments():
    public = {n for m in (losses, feature_losses) for n, f in vars(m).items() if inspect.isfunction(f)}
    public = {n for n in public if not n.startswith("_")} - {"unit", "wide", "narrow"}
    assert set(LOSSES) == public - set(HARD_LOSSES)
    for name, options in LOGIT_LOSSES.items():
        outputs = {"student_logits", "teacher_logits", "student", "teacher", "labels"}
        known = set(inspect.signature(LOSSES[name]).parameters) - outputs
        assert known == set(options), name


@pytest.mark.slow
@pytest.mark.parametrize("ending", [None, "softmax"])
def test_each_term_is_logged_as_its_function_gives_it_and_the_total_is_their_weighted_sum(ending):
    """All twelve at once, with unlabeled examples; models that end in softmax have the same logits and features."""
    labels = np.where(np.arange(24) % 4 == 0, -1, Y).astype("int32")
    small, large = student(ending=ending), teacher(ending=ending)
    weights = {name: 0.1 + 0.05 * index for index, name in enumerate(OF_CLASSES)}
    distiller = compiled(small, large, terms={name: term(name, weight) for name, weight in weights.items()})
    logs = evaluated(distiller, labels)
    s, t = student()(X), teacher()(X)
    pair = student().get_layer("conv")(X), teacher().get_layer("block").get_layer("conv")(X)
    expected = 0.1 * logs["hard"] + 0.9 * float(tf.reduce_mean(losses.kl_logits(s, t, 4.0)))
    for name in OF_CLASSES:
        function = LOSSES[name]
        given = pair if name in FEATURE_LOSSES else (s, t)
        extra = {"labels": labels} if name == "dkd" else {}
        value = float(tf.reduce_mean(function(*given, **extra, **OPTIONS.get(name, {}))))
        assert value > 0.001 and logs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        expected += weights[name] * value
    assert logs["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(logs) == {"loss", "hard", "kd", "accuracy", "agreement", *OF_CLASSES}


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_CLASSES)
def test_the_gradient_of_each_goes_to_the_student_alone(name):
    """One SGD step on the term alone moves the student by the gradient of the pure function, and nothing else."""
    small, large, again = student(), teacher(), student()
    before = [w.copy() for w in large.get_weights()]
    model = tapped(again, {"conv": ""}, "student")
    frozen = tapped(large, {"block/conv": ""}, "teacher")(X, training=False)
    distiller = compiled(small, large, terms={"kd": term(name)}, distillation_weight=1.0)
    with tf.GradientTape() as tape:
        given = model(X)
        pair = (given["conv"], frozen["block/conv"]) if name in FEATURE_LOSSES else (given["logits"], frozen["logits"])
        extra = {"labels": Y} if name == "dkd" else {}
        loss = tf.reduce_mean(LOSSES[name](*pair, **extra, **OPTIONS.get(name, {})))
    variables = [v.value for v in again.trainable_variables]
    slopes = tape.gradient(loss, variables, unconnected_gradients=tf.UnconnectedGradients.ZERO)
    assert max(float(tf.reduce_max(tf.abs(slope))) for slope in slopes) > 1e-5
    distiller.train_step((X, Y))
    for variable, start, slope in zip(small.trainable_variables, variables, slopes, strict=True):
        np.testing.assert_allclose(variable, start - 0.1 * slope, atol=1e-6)
    for a, b in zip(before, large.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_term_named_kd_takes_the_place_of_the_kl():
    """Ba and Caruana 2013: squared difference of logits alone."""
    small, large = student(), teacher()
    distiller = compiled(small, large, terms={"kd": Term("mse_logits")}, distillation_weight=1.0)
    logs = evaluated(distiller)
    expected = np.mean((small(X).numpy() - large(X).numpy()) ** 2)
    assert logs["kd"] == pytest.approx(expected, rel=1e-5) and logs["loss"] == pytest.approx(expected, rel=1e-5)
    assert set(logs) == {"loss", "hard", "kd", "accuracy", "agreement"}
    assert distiller.settings == {"distillation_weight": 1.0}
    with pytest.raises(InputError, match="the term 'kd' replaces the KL"):
        distiller.temperature = 3.0


@pytest.mark.exhaustive
def test_one_forward_of_each_layer_per_step_whatever_the_number_of_terms():
    counts = {"student": 0, "teacher": 0}

    def net(who):
        counted, conv = Counted(who, counts, name="count"), keras.layers.Conv2D(5, 3, name="conv")
        layers = [counted, keras.layers.Reshape((8, 8, 2)), conv]
        inner = keras.Sequential([keras.Input((8, 8, 2)), *layers], name="block")
        return keras.Sequential([keras.Input((8, 8, 2)), inner, keras.layers.Flatten(), keras.layers.Dense(4)])

    taps = {"student_tap": "block/conv", "teacher_tap": "block/conv"}
    terms = {name: Term(name, **(taps if name in FEATURE_LOSSES else {})) for name in OF_CLASSES}
    terms["block"] = Term("hint", student_tap="block", teacher_tap="block", projector="conv1x1")
    distiller = compiled(net("student"), net("teacher"), terms=terms)
    distiller.fit(X, Y, batch_size=8, epochs=1, verbose=0)
    assert counts == {"student": 3, "teacher": 3}


@pytest.mark.exhaustive
def test_projectors_are_trained_saved_with_the_distiller_and_no_part_of_the_student(tmp_path):
    def fresh():
        keras.utils.set_random_seed(9)
        given = keras.Sequential(
            [keras.layers.Conv2D(7, 3, padding="same", use_bias=False), keras.layers.BatchNormalization()]
        )
        terms = {
            "hint": Term("hint", 2.0, projector="conv1x1", **TAPS),
            "deep": Term("hint", student_tap="pool", teacher_tap="pool", projector="dense"),
            "own": Term("hint", projector=given, **TAPS),
        }
        made = Distiller(student(), teacher(filters=7), terms=terms)
        made.compile(keras.optimizers.SGD(0.1, momentum=0.9))
        return made

    straight, first, plain = fresh(), fresh(), student()
    sizes = {"hint": 5 * 7 + 7, "deep": 5 * 7 + 7, "own": 5 * 7 * 9 + 4 * 7}
    assert {name: layer.count_params() for name, layer in straight._projectors.items()} == sizes
    assert len(straight.trainable_variables) == len(plain.trainable_variables) + 7
    start = [v.numpy() for layer in straight._projectors.values() for v in layer.weights]
    straight.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    moved = [v.numpy() for layer in straight._projectors.values() for v in layer.weights]
    assert all(np.abs(a - b).max() > 1e-5 for a, b in zip(start, moved, strict=True))
    assert [v.shape for v in straight.student.weights] == [v.shape for v in plain.weights]
    straight.student.save(tmp_path / "student.keras")
    assert keras.models.load_model(tmp_path / "student.keras").count_params() == plain.count_params()

    first.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    first.save(tmp_path / "half.keras")
    loaded = keras.models.load_model(tmp_path / "half.keras")
    loaded.set_teacher(teacher(filters=7))
    loaded.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(straight.variables, loaded.variables, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=a.path)


@pytest.mark.slow
def test_a_checkpoint_resumes_a_training_with_terms_to_the_same_bits(tmp_path):
    def fresh():
        terms = {"hint": Term("hint", in_steps(Schedule(1.0, 0.1), 6), projector="conv1x1", **TAPS)}
        made = compiled(student(), teacher(filters=7), terms=terms)
        made.optimizer.build(made.trainable_variables)
        return made

    straight, first, second = fresh(), fresh(), fresh()
    straight.fit(X, Y, batch_size=8, epochs=2, shuffle=False, verbose=0)
    first.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    checkpoint.save(first, tmp_path, {}, 0.0)
    assert checkpoint.restore(second, tmp_path) is not None
    second.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    for a, b in zip(straight.variables, second.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


@pytest.mark.slow
def test_weights_and_options_change_without_a_new_trace():
    traces = []

    def measured(student, teacher, scale):
        traces.append(1)
        return scale * tf.reduce_mean((student - teacher) ** 2, axis=-1)

    terms = {"own": Term(measured, 0.5, options={"scale": 2.0}), "dkd": term("dkd", 0.0)}
    small, large = student(), teacher()
    distiller = compiled(small, large, terms=terms, distillation_weight=0.0, rate=1e-9)
    mse = np.mean((small(X).numpy() - large(X).numpy()) ** 2)
    first = {k: v[0] for k, v in distiller.fit(X, Y, batch_size=24, verbose=0).history.items()}
    traced = len(traces)
    distiller.set_term("own", weight=3.0, scale=5.0)
    distiller.set_term("dkd", temperature=1.0)
    second = {k: v[0] for k, v in distiller.fit(X, Y, batch_size=24, verbose=0).history.items()}
    assert len(traces) == traced
    assert first["own"] == pytest.approx(2 * mse, rel=1e-4) and second["own"] == pytest.approx(5 * mse, rel=1e-4)
    assert first["loss"] == pytest.approx(first["hard"] + 0.5 * 2 * mse, rel=1e-4)
    assert second["loss"] == pytest.approx(second["hard"] + 3 * 5 * mse, rel=1e-4)
    assert distiller.settings["dkd.temperature"] == 1.0 and distiller.settings["own.weight"] == 3.0
    with pytest.raises(InputError, match="Unknown setting of the term 'dkd' 'temprature'. Did you mean 'temperature'"):
        distiller.set_term("dkd", temprature=1.0)
    with pytest.raises(InputError, match="dkd.temperature expects a number above 0"):
        distiller.set_term("dkd", temperature=0)


def test_schedules_of_a_recipe_go_over_its_steps():
    made = from_recipe(
        Distill(
            distillation_weight=Schedule(0.8, 0.2, 0.5, 1.0),
            temperature=Schedule(4.0, 2.0, shape="cosine"),
            terms={"mse_logits": Term("mse_logits", Schedule(1.0, 0.0, 0.25, shape="step"))},
        ),
        student(),
        teacher(),
        steps=100,
    )
    expected = {0: (0.8, 4.0, 1.0), 24: (0.8, None, 1.0), 25: (0.8, None, 0.0), 50: (0.8, 3.0, 0.0), 75: (0.5, None, 0)}
    expected |= {100: (0.2, 2.0, 0.0), 1000: (0.2, 2.0, 0.0)}
    for step, (weight, temperature, mse) in expected.items():
        made.global_step.assign(step)
        assert made.distillation_weight == pytest.approx(weight, abs=1e-6)
        assert temperature is None or made.temperature == pytest.approx(temperature, abs=1e-6)
        assert made.settings["mse_logits.weight"] == pytest.approx(mse, abs=1e-6)


@pytest.mark.slow
def test_a_student_in_half_precision_learns_by_every_term():
    terms = {name: term(name, 0.1) for name in OF_CLASSES} | {"wide": Term("hint", projector="conv1x1", **TAPS)}
    distiller = Distiller(student(dtype="mixed_bfloat16"), teacher(), terms=terms, dtype="mixed_bfloat16")
    distiller.compile(keras.optimizers.SGD(0.05))
    history = distiller.fit(X, Y, batch_size=24, epochs=4, verbose=0).history
    assert distiller._projectors["wide"].compute_dtype == "bfloat16"
    assert history["loss"][-1] < history["loss"][0]


def test_several_teachers_name_theirs_by_number():
    first, second = teacher(2), teacher(3)
    terms = {"hint": Term("hint", student_tap="conv", teacher_tap="1/block/conv")}
    logs = evaluated(compiled(student(), [first, second], terms=terms))
    expected = np.mean((student().get_layer("conv")(X) - second.get_layer("block").get_layer("conv")(X)) ** 2)
    assert logs["hint"] == pytest.approx(expected, rel=1e-5)
    for wrong in ("block/conv", "2/block/conv", "1/"):
        with pytest.raises(InputError, match="a number from 0 to 1.*Fix distill.terms.hint.teacher_tap"):
            Distiller(student(), [first, second], terms={"hint": Term("hint", student_tap="conv", teacher_tap=wrong)})


@pytest.mark.slow
def test_a_function_as_teacher_gives_taps_of_its_own():
    def function(images):
        return {"logits": images[:, 0, 0, :1] * tf.ones((1, 4)), "map": images[..., :1] * tf.ones((1, 1, 1, 5))}

    taps = {"student_tap": "conv", "teacher_tap": "map"}
    made = compiled(student(), function, terms={"hint": Term("hint", projector="conv1x1", **taps)})
    assert made.fit(X, Y, verbose=0).history["hint"][0] > 0
    with pytest.raises(InputError, match="Unknown tap 'mat'. Did you mean 'map'.*Fix distill.terms.hint.teacher_tap"):
        taps["teacher_tap"] = "mat"
        compiled(student(), function, terms={"hint": Term("hint", **taps)}).fit(X, Y, verbose=0)


def test_the_tap_logits_is_the_models_output_before_a_softmax():
    taps = {"student_tap": "logits", "teacher_tap": "logits"}
    logs = evaluated(compiled(student(ending="softmax"), teacher(), terms={"rkd": Term("rkd_distance", **taps)}))
    expected = float(tf.reduce_mean(feature_losses.rkd_distance(student()(X), teacher()(X))))
    assert logs["rkd"] == pytest.approx(expected, rel=1e-4)


def test_a_layer_shared_with_another_model_gives_what_it_gives_in_this_one():
    """The first call of a layer may belong to another model: the tap is that of the model's own graph."""
    shared = keras.layers.Conv2D(5, 1, name="conv")
    other = keras.Input((8, 8, 2))
    keras.Model(other, shared(keras.layers.ReLU()(other)))
    image = keras.Input((8, 8, 2))
    model = keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(shared(image))))
    np.testing.assert_allclose(tapped(model, {"conv": ""}, "student")(X)["conv"], shared(X), atol=1e-6)


@pytest.mark.parametrize("name", OF_CLASSES)
def test_two_classes_work_or_are_refused_by_name(name):
    if name in FEATURE_LOSSES:
        return  # no classes in them
    s, t = (tf.constant(RNG.normal(size=(6, 2)).astype("float32")) for _ in range(2))
    if name in ("standardized_kl", "dist"):
        with pytest.raises(InputError, match=f"{name} learns nothing from 2 classes"):
            term_loss(Term(name), s, t)
        return
    with tf.GradientTape() as tape:
        tape.watch(s)
        loss = term_loss(Term(name), s, t, np.array([0, 1, 0, 1, 1, -1]))
    assert np.abs(tape.gradient(loss, s)).max() > 1e-4


@pytest.mark.slow
def test_a_saved_distiller_with_schedules_options_and_a_registered_function_is_rebuilt(tmp_path):
    terms = {
        "dkd": Term("dkd", in_steps(Schedule(1.0, 0.0), 10), options={"beta": in_steps(Schedule(4.0, 2.0), 10)}),
        "own": Term(losses.mse_logits, 0.25),
    }
    made = compiled(student(), teacher(), terms=terms)
    made.set_term("own", weight=0.5)
    made.global_step.assign(5)
    made.save(tmp_path / "d.keras")
    loaded = keras.models.load_model(tmp_path / "d.keras", custom_objects={"mse_logits": losses.mse_logits})
    assert loaded.settings == pytest.approx(made.settings) and loaded.settings["dkd.weight"] == 0.5
    assert loaded.settings["dkd.beta"] == 3.0 and loaded.settings["own.weight"] == 0.5
    loaded.set_teacher(teacher())
    assert evaluated(loaded) == pytest.approx(evaluated(made), abs=1e-5)


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(digits):
    from kdistill.networks.architectures import build
    from kdistill.recipe import Network

    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    code = text.split("```python")[1].split("```")[0]
    images, labels = digits.train.images.astype("float32"), digits.train.labels
    given = {"x_train": images, "y_train": labels, "x_val": images[:64], "y_val": labels[:64]}
    shape = images.shape[1:]
    given |= {"student": build(Network("small_cnn"), shape, 10), "teacher": build(Network("lenet"), shape, 10)}
    exec(code, given)
    logged = set(given["distiller"].history.history)
    assert {"hint", "val_hint", "attention", "dkd", "kd", "hard"} <= logged
    assert given["distiller"].settings["hint.weight"] == pytest.approx(0.1)
