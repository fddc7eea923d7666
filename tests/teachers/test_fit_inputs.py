"""The first look at the data of `fit`: a warning for student and teacher, without an effect on the data."""

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.ranges import RANGES, brightness, convolution, fitted

from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.fit_inputs import looked_at, warn_of_student, warn_of_teacher


def texts(call) -> list[str]:
    """The warnings that a call gives."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in record if issubclass(warning.category, UserWarning)]


def student(*before) -> keras.Model:
    end = [layers.Flatten(), layers.Dense(4, name="first")]
    return keras.Sequential([keras.Input((4, 4, 1)), *before, *end], name="small")


TEACHER, IMAGES, LABELS = brightness(4, "unit")


def test_a_student_on_raw_pixels():
    (text,) = texts(lambda: looked_at(IMAGES, LABELS, student()))
    assert text.startswith(
        "The layer 'first' of the student 'small' receives inputs from 31 to 223: they look unscaled."
    )
    assert text.endswith("Put keras.layers.Rescaling(1 / 255) before it.")
    assert texts(lambda: looked_at(IMAGES, LABELS, student(layers.Rescaling(1 / 255)))) == []
    assert texts(lambda: looked_at(IMAGES / 255.0, LABELS, student())) == []
    rows = IMAGES.repeat(4, axis=1).reshape(120, -1)
    assert len(texts(lambda: looked_at(rows, LABELS, keras.Sequential([keras.Input((64,)), layers.Dense(4)])))) == 1


def test_a_student_that_scales_its_inputs_itself():
    (text,) = texts(lambda: looked_at(IMAGES / 255.0, LABELS, student(layers.Rescaling(1 / 255))))
    assert "the student 'small' scales them itself" in text and "Pass inputs * 255, or remove its own scaling." in text


def test_a_trained_student_that_is_right_on_raw_pixels():
    model, images, labels = brightness(4, "raw")
    assert texts(lambda: warn_of_student(model, images, labels)) == []
    assert texts(lambda: warn_of_student(model, images, np.eye(4)[labels])) == []  # one-hot
    assert len(texts(lambda: warn_of_student(model, images, None))) == 1
    assert len(texts(lambda: warn_of_student(model, images, -np.ones(120, int)))) == 1  # unlabeled


@pytest.mark.parametrize(
    "own,received,advice",
    [
        ("unit", "raw", "Put kdistill.Adapted(teacher, mean=0, std=255) in its place."),
        ("signed", "raw", "Put kdistill.Adapted(teacher, mean=127.5, std=127.5) in its place."),
        ("raw", "unit", "Put kdistill.Adapted(teacher, mean=0, std=1/255) in its place."),
    ],
)
def test_a_teacher_in_another_range(own, received, advice):
    """By its statistics without labels, by its accuracy with them; the advice is followed in the end."""
    trained = fitted(convolution(), RANGES[own])
    (text,) = texts(lambda: warn_of_teacher(trained, RANGES[received], None))
    assert "'norm' of the teacher 'net' are" in text and text.endswith(advice)
    assert texts(lambda: warn_of_teacher(trained, RANGES[own], None)) == []
    model, images, labels = brightness(4, own)
    images = {"raw": images, "unit": images / 255.0}[received]
    for teacher in (model, lambda x: model(x)):
        (text,) = texts(lambda teacher=teacher: warn_of_teacher(teacher, images, labels))
        assert "The accuracy of the teacher '" in text and text.endswith(advice)
    mean, std = {"unit": (0, 255), "signed": (127.5, 127.5), "raw": (0, 1 / 255)}[own]
    assert texts(lambda: warn_of_teacher(Adapted(model, mean=mean, std=std), images, labels)) == []


def test_each_of_several_teachers():
    right, _, _ = brightness(4, "raw")
    both = texts(lambda: warn_of_teacher([TEACHER, right, TEACHER], IMAGES, LABELS))
    assert len(both) == 2 and texts(lambda: warn_of_teacher([right], IMAGES, LABELS)) == []


def test_a_teacher_that_fails_or_is_bad_is_left_to_the_training():
    def broken(images):
        raise RuntimeError("not today")

    assert texts(lambda: warn_of_teacher(broken, IMAGES, LABELS)) == []
    right, _, _ = brightness(4, "raw")
    assert texts(lambda: warn_of_teacher(right, IMAGES, (LABELS + 1) % 4)) == []


@pytest.mark.parametrize("targets", ["classes", "column", "one-hot", "dict", "none", "weights"])
@pytest.mark.parametrize("kind", ["arrays", "tensors", "dataset"])
def test_every_form_of_data(kind, targets):
    y = {
        "classes": LABELS,
        "column": LABELS[:, None],
        "one-hot": np.eye(4)[LABELS],
        "dict": {"labels": LABELS, "teacher_logits": np.zeros((120, 4))},
        "none": None,
        "weights": LABELS,
    }[targets]
    parts = (IMAGES,) if y is None else (IMAGES, y, np.ones(120)) if targets == "weights" else (IMAGES, y)

    def fit():
        if kind == "dataset":
            data = looked_at(tf.data.Dataset.from_tensor_slices(parts).batch(40), None, student(), teacher)
            assert data.cardinality() == 3
            for _ in range(2):  # two epochs, one warning each for student and teacher
                assert sum(len(keras.tree.flatten(batch)[0]) for batch in data) == 120
        elif kind == "tensors":
            looked_at(
                tf.constant(IMAGES), y if y is None or isinstance(y, dict) else tf.constant(y), student(), teacher
            )
        else:
            looked_at(IMAGES, y, student(), teacher)

    def teacher(inputs, labels):
        warn_of_teacher(TEACHER, inputs, labels)

    first, second = texts(fit)
    assert "student 'small' receives" in first
    assert ("The accuracy of the teacher 'net'" if y is not None else "teacher 'net' receives inputs") in second


def test_a_data_set_gives_the_same_batches_in_the_same_order():
    def batches(look: bool):
        data = tf.data.Dataset.from_tensor_slices((IMAGES / 255.0, LABELS)).shuffle(120, seed=3).batch(50)
        data = looked_at(data, None, student()) if look else data
        return [[labels.numpy().tolist() for _, labels in data] for _ in range(2)]

    assert batches(look=True) == batches(look=False)


def test_sorted_arrays_show_all_classes():
    order = np.argsort(LABELS, kind="stable")
    images, labels = IMAGES[order].repeat(10, axis=0), LABELS[order].repeat(10)
    (text,) = texts(
        lambda: looked_at(
            images, labels, student(layers.Rescaling(1 / 255)), lambda x, y: warn_of_teacher(TEACHER, x, y)
        )
    )
    assert "is 25.0% on 128 images, but 100.0% with pixels / 255" in text


@pytest.mark.parametrize(
    "inputs",
    [
        np.random.default_rng(0).uniform(0, 5000, (50, 12)),  # features of a table
        np.full((50, 4, 4, 1), np.nan),
        np.array([["a"]] * 50),
        np.full((3, 4, 4, 1), 200.0),  # too few
        np.random.default_rng(0).normal(size=(50, 4, 4, 1)),
        np.zeros((50, 4, 4, 1)),
    ],
)
def test_what_is_no_image_in_a_usual_range(inputs):
    model = keras.Sequential([keras.Input(inputs.shape[1:]), layers.Flatten(), layers.Dense(4)])
    assert texts(lambda: warn_of_student(model, inputs, None)) == []
    assert texts(lambda: warn_of_teacher(TEACHER, inputs, None)) == []


def test_other_data_passes_as_it_is():
    pair = {"a": IMAGES, "b": IMAGES}
    assert looked_at(pair, LABELS, student()) is pair and looked_at(None, None, student()) is None
    generator = iter([(IMAGES, LABELS)])
    assert looked_at(generator, None, student()) is generator and len(list(generator)) == 1
    several = tf.data.Dataset.from_tensor_slices((pair, LABELS)).batch(60)
    assert texts(lambda: list(looked_at(several, None, student()))) == []


@pytest.mark.slow
def test_the_first_fit_of_a_distiller_warns_once():
    def distiller(model, teacher):
        built = Distiller(model)
        built.set_teacher(teacher)  # smaller than the student, which the constructor would name
        return built

    def fit(model, data, check=True):
        model.compile(keras.optimizers.SGD(1e-6))
        if not check:
            model.check_inputs = False
        return texts(lambda: [model.fit(*data, verbose=0, shuffle=False) for _ in range(2)])

    data_set = (tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(40),)
    for data in ((IMAGES.astype("float32"), LABELS), data_set):
        first, second = fit(distiller(student(), TEACHER), data)
        assert "student 'small' receives" in first and "Put kdistill.Adapted(teacher, mean=0, std=255)" in second
        assert len(fit(Supervised(student()), data)) == 1
        assert fit(distiller(student(), TEACHER), data, check=False) == []
        good = distiller(student(layers.Rescaling(1 / 255)), Adapted(TEACHER, std=255))
        assert fit(good, data) == []
