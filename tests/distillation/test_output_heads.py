"""Students of every head learn as a plain Keras loop does, from teachers that run or were stored."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from support.headed_models import BATCH, CASES, EXAMPLES

from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.recipe import Term
from kdistill.training.strategy import choose_devices

WEIGHT, T = 0.7, 3.0


def distilled(case, teacher, data=None, epochs=7, **options):
    """The weights of a student after `epochs` passes over 3 batches in order, and its logs."""
    case = CASES[case]() if isinstance(case, str) else case
    options = {"head": case.meaning, "distillation_weight": WEIGHT} | options
    if case.meaning != "numbers":
        options.setdefault("temperature", T)
    distiller = Distiller(case.model, teacher, **options)
    distiller.compile(keras.optimizers.SGD(0.05))
    x, y = (case.inputs, case.labels) if data is None else data
    history = distiller.fit(x, y, batch_size=BATCH, epochs=epochs, shuffle=False, verbose=0).history
    return case.model.get_weights(), history


def plain(case, teacher, epochs=7):
    """The same training by hand: one output, every position with a mask of Keras counts once."""
    case = CASES[case]()
    optimizer = keras.optimizers.SGD(0.05)

    def kd(meaning, s, t):
        if meaning == "numbers":
            return ops.mean((s - t) ** 2, axis=-1)
        if meaning == "labels":
            p, q = ops.sigmoid(t / T), ops.log_sigmoid(s / T)
            other = ops.log_sigmoid(-s / T)
            entropy = p * ops.log_sigmoid(t / T) + (1 - p) * ops.log_sigmoid(-t / T)
            return T**2 * ops.sum(entropy - p * q - (1 - p) * other, axis=-1)
        p = ops.softmax(t / T)
        return T**2 * ops.sum(p * (ops.log_softmax(t / T) - ops.log_softmax(s / T)), axis=-1)

    for _ in range(epochs):
        for start in range(0, EXAMPLES, BATCH):
            batch = slice(start, start + BATCH)
            x, y = tf.nest.map_structure(lambda a, batch=batch: a[batch], (case.inputs, case.labels))
            t = teacher(x, training=False)
            with tf.GradientTape() as tape:
                s, loss = case.model(x, training=True), 0.0
                heads = case.meaning if isinstance(case.meaning, dict) else {None: case.meaning}
                for name, meaning in heads.items():
                    of, labels, taught = (s, y, t) if name is None else (s[name], y[name], t[name])
                    hard = (case.loss if name is None else case.loss[name])(labels, of)
                    rows = (1 - WEIGHT) * hard + WEIGHT * kd(meaning, of, taught)
                    mask = tf.cast(x != 0, tf.float32) if case.has_mask else tf.ones_like(rows)
                    loss += ops.sum(rows * mask) / ops.sum(mask)
            variables = case.model.trainable_variables
            optimizer.apply(tape.gradient(loss, variables), variables)
    return case.model.get_weights()


@pytest.mark.exhaustive(but=("binary", "multilabel", "two_inputs"))
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_those_of_a_plain_loop_and_of_stored_outputs(name):
    teacher = CASES[name](width=8).model
    weights, history = distilled(name, teacher)
    for ours, theirs in zip(weights, plain(name, teacher), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    case = CASES[name]()
    stored = tf.nest.map_structure(np.asarray, teacher(case.inputs, training=False))
    again, _ = distilled(case, None, (case.inputs, {"labels": case.labels, "teacher_logits": stored}))
    for ours, theirs in zip(weights, again, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert all(np.isfinite(values).all() for values in history.values())
    assert history["loss"][-1] < history["loss"][0]
    prefixes = [f"{output}_" for output in case.meaning] if isinstance(case.meaning, dict) else [""]
    expected = {"loss", *(f"{prefix}{part}" for prefix in prefixes for part in ("hard", "kd"))}
    assert expected < set(history)


@pytest.mark.exhaustive(but=("binary",))
@pytest.mark.slow
@pytest.mark.parametrize("name", ["binary", "segmentation", "multilabel", "two_heads"])
def test_two_replicas_are_one_device(name):
    teacher = CASES[name](width=8).model
    weights, _ = distilled(name, teacher, epochs=2)
    with choose_devices("mirrored").strategy.scope():
        case = CASES[name]()
        distiller = Distiller(case.model, teacher, head=case.meaning, distillation_weight=WEIGHT, temperature=T)
        distiller.compile(keras.optimizers.SGD(0.05))
    distiller.fit(case.inputs, case.labels, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(weights, case.model.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def evaluated(case, teacher=None, weights=None, labels=None, loss=None, **options):
    model = Supervised(case.model, head=case.meaning) if teacher is None else Distiller(case.model, teacher, **options)
    model.compile("sgd", loss)
    labels = case.labels if labels is None else labels
    return model.evaluate(case.inputs, labels, sample_weight=weights, batch_size=16, verbose=0, return_dict=True)


@pytest.mark.slow
def test_positions_that_are_masked_weighted_away_or_unlabeled_do_not_count():
    case = CASES["segmentation"]()
    outputs = np.asarray(case.model(case.inputs), np.float64)
    logs = outputs - np.log(np.exp(outputs).sum(-1, keepdims=True))
    losses = -np.take_along_axis(logs, case.labels[..., None], -1)[..., 0]
    right = outputs.argmax(-1) == case.labels
    kept = np.zeros((EXAMPLES, 6, 6), bool)
    kept[:, :3] = True  # equally many in every batch, so that the logs are exact means
    labels = np.where(kept, case.labels, -1)
    for given in ({"labels": labels}, {"weights": kept.astype("float32")}):
        found = evaluated(case, **given)
        assert found["hard"] == pytest.approx(losses[kept].mean(), rel=1e-5)
        assert found["accuracy"] == pytest.approx(right[kept].mean())
    one_hot = np.eye(4, dtype="float32")[case.labels]
    assert evaluated(case, labels=one_hot)["hard"] == pytest.approx(losses.mean(), rel=1e-5)
    by_keras = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert evaluated(case, labels=labels, loss=by_keras)["hard"] == pytest.approx(losses[kept].mean(), rel=1e-5)
    per_example = np.linspace(0.5, 1.5, EXAMPLES).astype("float32")
    weighted = (losses.mean((1, 2)) * per_example).mean()
    assert evaluated(case, weights=per_example)["hard"] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.slow
def test_labels_and_numbers_that_are_missing_do_not_count():
    case = CASES["multilabel"]()
    labels = case.labels.copy()
    labels[::2, 1], labels[1::2, 4] = -1, np.nan
    present = labels >= 0
    z = np.asarray(case.model(case.inputs), np.float64)
    losses = np.log1p(np.exp(z)) - np.where(present, labels, 0) * z
    found = evaluated(case, labels=labels)
    assert found["hard"] == pytest.approx(np.where(present, losses, 0).sum(-1).mean(), rel=1e-5)
    hits = ((z > 0) == (labels > 0.5)) & present
    assert found["accuracy"] == pytest.approx((hits.sum(-1) / present.sum(-1)).mean(), rel=1e-5)
    by_keras = keras.losses.BinaryCrossentropy(from_logits=True)
    mean = (np.where(present, losses, 0).sum(-1) / present.sum(-1)).mean()
    assert evaluated(case, labels=labels, loss=by_keras)["hard"] == pytest.approx(mean, rel=1e-5)

    case = CASES["regression"]()
    labels = case.labels.copy()
    labels[::4, 1], labels[1::4] = np.nan, np.nan
    outputs = np.asarray(case.model(case.inputs))
    rows = ~np.isnan(labels).all(-1)
    with np.errstate(invalid="ignore"):
        expected = np.nanmean(((outputs - labels) ** 2)[rows], axis=-1).mean()
        absolute = np.nanmean(abs(outputs - labels)[rows], axis=-1).mean()
    for loss in (None, "mse"):
        found = evaluated(case, labels=labels, loss=loss)
        assert found["hard"] == pytest.approx(expected, rel=1e-5)
        assert found["mae"] == pytest.approx(absolute, rel=1e-5)


@pytest.mark.slow
def test_without_labels_the_teacher_teaches_every_head():
    for name in ("segmentation", "multilabel", "regression", "two_heads"):
        case, teacher = CASES[name](), CASES[name](width=8).model
        distiller = Distiller(case.model, teacher, head=case.meaning, distillation_weight=1.0)
        distiller.compile("sgd")
        logs = distiller.fit(case.inputs, verbose=0).history
        assert not any("hard" in key or "accuracy" in key for key in logs), name
        assert any("kd" in key for key in logs)


@pytest.mark.slow
def test_what_keras_computes_is_the_loss_and_metrics_of_compile_see_every_row():
    case = CASES["tagging"]()
    model = Supervised(case.model)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    ours = model.evaluate(case.inputs, case.labels, batch_size=EXAMPLES, verbose=0, return_dict=True)
    case.model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    theirs = case.model.evaluate(case.inputs, case.labels, batch_size=EXAMPLES, verbose=0, return_dict=True)
    assert ours["hard"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], rel=1e-5)

    case = CASES["two_heads"]()
    losses = {"kind": keras.losses.SparseCategoricalCrossentropy(from_logits=True), "place": "mse"}
    extra = {"kind": [keras.metrics.SparseTopKCategoricalAccuracy(2, name="top2")], "place": ["mse"]}
    model = Supervised(case.model)
    model.compile("sgd", losses, loss_weights={"kind": 1.0, "place": 0.25}, metrics=extra)
    assert model.heads == case.meaning
    ours = model.evaluate(case.inputs, case.labels, batch_size=EXAMPLES, verbose=0, return_dict=True)
    case.model.compile("sgd", losses, loss_weights={"kind": 1.0, "place": 0.25}, metrics=extra)
    theirs = case.model.evaluate(case.inputs, case.labels, batch_size=EXAMPLES, verbose=0, return_dict=True)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["kind_top2"] == pytest.approx(theirs["kind_top2"]) and ours["place_mse"] == pytest.approx(
        theirs["place_mse"], rel=1e-5
    )


def test_the_meaning_follows_from_the_activation_and_the_loss():
    image = keras.Input((4,))
    ends = {
        "classes": [layers.Dense(3), layers.Dense(3, "softmax"), layers.Dense(2, "relu")],
        "labels": [layers.Dense(1, "sigmoid"), layers.Dense(3, "sigmoid"), layers.Lambda(ops.sigmoid)],
    }
    for meaning, members in ends.items():
        for end in members:
            model = Supervised(keras.Model(image, end(image)))
            model.compile("sgd")
            assert model.heads == {"": meaning}, end
    for loss, meaning in (("mse", "numbers"), ("mae", "numbers"), (keras.losses.BinaryCrossentropy(True), "labels")):
        model = Supervised(keras.Model(image, layers.Dense(3)(image)))
        model.compile("sgd", loss)
        assert model.heads == {"": meaning}
        model.compile("sgd")
        assert model.heads == {"": "classes"}  # another loss, another meaning
    # A sigmoid that learns numbers may be either, in training as in `evaluate`.
    for loss in ("mse", keras.losses.Huber()):
        model = Supervised(keras.Model(image, layers.Dense(3, "sigmoid")(image)))
        with pytest.raises(InputError, match="State what it means"):
            model.compile("sgd", loss)
        for meaning in ("labels", "numbers"):
            model = Supervised(keras.Model(image, layers.Dense(3, "sigmoid")(image)), head=meaning)
            model.compile("sgd", loss)
            assert model.heads == {"": meaning}


@pytest.mark.slow
def test_mistakes_are_named():
    case, teacher = CASES["segmentation"](), CASES["segmentation"](width=8).model
    with pytest.raises(InputError, match=r"labels are classes \[batch, 6, 6\], or .* received \[batch\]"):
        evaluated(case, labels=np.zeros(EXAMPLES, int))
    with pytest.raises(InputError, match="head expects 'classes' .*received 'regression'"):
        Distiller(case.model, teacher, head="regression")
    with pytest.raises(InputError, match="squared_error compares numbers, but the output of the student is of classes"):
        distilled(case, teacher, terms={"x": Term("squared_error")})
    with pytest.raises(InputError, match=r"sample_weight expects .* \[batch, 6, 6\]; received \[batch, 6\]"):
        evaluated(case, weights=np.ones((EXAMPLES, 6), "float32"))
    with pytest.raises(InputError, match="one shape"):
        other = keras.Sequential([keras.Input((6, 6, 1)), layers.Conv2D(4, 3)])
        distilled(CASES["segmentation"](), other)
    case = CASES["regression"]()
    with pytest.raises(InputError, match="temperature would do nothing"):
        Distiller(case.model, CASES["regression"](width=8).model, temperature=3.0, head="numbers").compile("sgd")
    with pytest.raises(InputError, match="is of numbers, but the loss .* is one of exclusive classes"):
        evaluated(case, loss="sparse_categorical_crossentropy", labels=np.zeros(EXAMPLES, int))
    with pytest.raises(InputError, match="class_weight expects exclusive classes or one label"):
        model = Supervised(case.model, head="numbers")
        model.compile("sgd")
        model.fit(case.inputs, case.labels, class_weight={0: 2.0}, verbose=0)
    case, teacher = CASES["two_heads"](), CASES["two_heads"](width=8).model
    with pytest.raises(InputError, match="Unknown output 'kinds'.*Did you mean 'kind'"):
        Distiller(case.model, teacher, head={"kinds": "classes"})
    with pytest.raises(InputError, match="The student has the outputs kind, place; expected labels for each"):
        evaluated(case, labels=case.labels["kind"])
    with pytest.raises(InputError, match="A term of dkd needs output=, one of kind, place"):
        distilled(case, teacher, terms={"x": Term("dkd")})
    renamed = keras.Model(teacher.input, {"a": teacher.output["kind"], "b": teacher.output["place"]})
    with pytest.raises(InputError, match="The student has the outputs kind, place, the teacher a, b"):
        distilled(CASES["two_heads"](), renamed)
    dkd = {"x": Term("dkd", 0.1, output="kind")}
    assert distilled(CASES["two_heads"](), teacher, epochs=1, terms=dkd)[1]["x"][0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["multilabel", "two_heads"])
def test_a_distiller_of_any_head_is_saved_with_its_meaning(name, tmp_path):
    case, teacher = CASES[name](), CASES[name](width=8).model
    distiller = Distiller(case.model, teacher, head=case.meaning)
    distiller.compile("adam")
    distiller.fit(case.inputs, case.labels, verbose=0)
    distiller.save(tmp_path / "distiller.keras")
    again = keras.models.load_model(tmp_path / "distiller.keras")
    again.set_teacher(teacher)
    assert again.heads == distiller.heads
    both = [m.fit(case.inputs, case.labels, shuffle=False, verbose=0).history["loss"] for m in (distiller, again)]
    assert both[0] == both[1]


@pytest.mark.slow
def test_several_teachers_are_blended_by_what_the_output_means():
    for name in ("multilabel", "regression"):
        case, teachers = CASES[name](), [CASES[name](width=width).model for width in (6, 8)]
        a, b = (np.asarray(teacher(case.inputs), np.float64) for teacher in teachers)
        if name == "regression":
            blend = 0.25 * a + 0.75 * b
        else:
            p = 0.25 / (1 + np.exp(-a)) + 0.75 / (1 + np.exp(-b))
            blend = np.log(p / (1 - p))
        options = {"head": case.meaning, "distillation_weight": 1.0, "temperature": None}
        logs = evaluated(case, teachers, teacher_weights=[1, 3], **options)
        data = {"labels": case.labels, "teacher_logits": blend.astype("float32")}
        stored = evaluated(case, lambda x: x, labels=data, **options)
        assert logs["kd"] == pytest.approx(stored["kd"], rel=1e-4), name
