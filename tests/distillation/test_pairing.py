"""A teacher that would be trained, of another input, in the place of the student, or no function of tensors."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.dense_models import X, Y, compiled, dense, values_of

from kdistill.distillation.distiller import Distiller, from_recipe
from kdistill.errors import InputError
from kdistill.recipe import Distill, Term
from kdistill.teachers.adapted import Adapted

L = keras.layers


def pair_on(shared, *, ending=4):
    """A student and a teacher, both behind `shared`, which is a layer or a model."""
    inputs = keras.Input((6,))
    features = shared(inputs)
    teacher = keras.Model(inputs, L.Dense(4, name="t")(L.Dense(9, "relu", name="wide")(features)), name="teacher")
    return keras.Model(inputs, L.Dense(ending, name="s")(features), name="student"), teacher


SHARED = {
    "dense": (lambda: L.Dense(5, name="base"), "'base'"),
    "batch normalization": (lambda: L.BatchNormalization(scale=False, center=False, name="norm"), "'norm'"),
    "nested": (
        lambda: keras.Sequential([keras.Input((6,)), L.Dense(5, name="one"), L.Dense(3, name="two")], name="block"),
        "s 'one', 'two'",
    ),
    "many": (
        lambda: keras.Sequential([keras.Input((6,)), *(L.Dense(6, name=f"d{i}") for i in range(7))]),
        "'d0', 'd1', 'd2', 'd3', 'd4' and 2 more",
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_layer_is_refused_by_name(name):
    make, layers = SHARED[name]
    student, teacher = pair_on(make())
    with pytest.raises(InputError, match=rf"share the layer{'' if layers[0] == 's' else '.*'}{layers}: .*clone_model"):
        Distiller(student, teacher)


def test_a_shared_layer_is_found_behind_every_kind_of_teacher():
    student, teacher = pair_on(L.Dense(5, name="base"))

    class Doubled:
        def __init__(self, model):
            self.models = [model]

        def __call__(self, x):
            return 2 * self.models[0](x, training=False)

    def helper(x):
        return teacher(x)

    teachers = [
        [dense(2), teacher],
        Adapted(teacher),
        teacher.call,
        lambda x: teacher(x, training=False),
        lambda x: helper(x),
        functools.partial(teacher, training=False),
        tf.function(lambda x: teacher(x)),
        Doubled(teacher),
        keras.Sequential([teacher]),
    ]
    for item in teachers:
        with pytest.raises(InputError, match="share the layer 'base'"):
            Distiller(student, item)
    with pytest.raises(InputError, match="share the layers 'base', 's'"):
        Distiller(student, lambda x: student(x))
    distiller = Distiller(student)
    with pytest.raises(InputError, match="share the layer 'base'"):
        distiller.set_teacher(teacher)


def test_a_projector_of_the_teacher_is_refused_before_it_trains():
    teacher = dense(2)
    teacher.layers[0].name = "hidden"
    student = dense(1, width=6)
    student.layers[0].name = "hidden"
    hint = Term("hint", student_tap="hidden", teacher_tap="hidden", projector=teacher.layers[0])
    distiller = compiled(student, teacher, terms={"hint": hint})
    before = values_of(teacher)
    with pytest.raises(InputError, match="share the layer 'hidden'"):
        distiller.fit(X, Y, verbose=0)
    for old, new in zip(before, values_of(teacher), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "batch normalization"])
def test_a_frozen_layer_may_be_shared_as_long_as_it_is_frozen(name):
    shared = SHARED[name][0]()
    student, teacher = pair_on(shared)
    shared.trainable = False
    distiller = Distiller(student, teacher)
    distiller.compile(keras.optimizers.Adam(0.05), run_eagerly=True)
    before = teacher(X).numpy()
    distiller.fit(X, Y, epochs=2, verbose=0)
    np.testing.assert_array_equal(teacher(X).numpy(), before)
    shared.trainable = True
    for run in (distiller.fit, distiller.train_on_batch):
        with pytest.raises(InputError, match=f"share the layer '{shared.name}'"):
            run(X, Y)


def test_layers_without_weights_may_be_shared():
    student, teacher = pair_on(L.Dropout(0.5))
    Distiller(student, teacher)


def test_a_student_in_which_nothing_can_be_trained():
    student = dense(1)
    student.trainable = False
    with pytest.raises(InputError, match="no trainable weights.*trainable = True"):
        compiled(student, dense(2)).fit(X, Y, verbose=0)


# -- the order --------------------------------------------------------------------------------------------------------


def test_a_student_larger_than_its_teacher_is_a_warning_with_the_order():
    with pytest.warns(
        UserWarning, match=r"has 224 weights, its teacher 59\. .*\(student, teacher\).*Swap them"
    ) as caught:
        Distiller(dense(1, width=20), dense(2))
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="Swap them"):
        Distiller(dense(1, width=20), [Adapted(dense(2)), lambda x: x[:, :4]])


def test_no_warning_where_the_order_is_plausible():
    Distiller(dense(1), dense(2))  # born again
    Distiller(dense(1, width=6), dense(2))
    Distiller(dense(1, width=20), [dense(2), dense(3, width=30)])
    Distiller(dense(1, width=20), lambda x: x[:, :4])
    from_recipe(Distill(), dense(1, width=20), dense(2), steps=5)  # a recipe names the roles


@pytest.mark.parametrize(
    "argument,advice",
    [
        ("distillation_losses", "the KL with T\\^2 is the default"),
        ("distillation_loss_weights", "kdistill.Term"),
        ("student_loss_weight", "distillation_weight=1 - student_loss_weight"),
        ("alpha", "distillation_weight=1 - alpha"),
        ("temprature", "Did you mean 'temperature'"),
    ],
)
def test_arguments_of_other_distillers_and_slips(argument, advice):
    with pytest.raises(InputError, match=f"'{argument}'.*{advice}"):
        Distiller(teacher=dense(2), student=dense(1), **{argument: 0.5})


# -- inputs and methods -----------------------------------------------------------------------------------------------


def images(*shape):
    return keras.Sequential([keras.Input(shape), L.Flatten(), L.Dense(4)])


@pytest.mark.parametrize(
    "student,teacher,advice",
    [
        ((8, 8, 1), (16, 16, 3), r"kdistill\.Adapted\(teacher, size=\(16, 16\), channels=3\)"),
        ((8, 8, 3), (8, 8, 1), r"kdistill\.Adapted\(teacher, channels=1\)"),
        ((8, 8, 3), (4, 8, 3), r"kdistill\.Adapted\(teacher, size=\(4, 8\)\)"),
        ((8, 8, 3), (8, 8, 4), "lambda x: teacher"),
        ((64,), (8, 8, 1), "lambda x: teacher"),
        ((6,), (7,), "lambda x: teacher"),
    ],
)
def test_a_teacher_of_another_input_is_told_how_to_get_it(student, teacher, advice):
    with pytest.raises(InputError, match=rf"takes inputs of the shape .* but receives the student's.*{advice}"):
        Distiller(images(*student), images(*teacher))
    with pytest.raises(InputError, match="takes inputs of the shape"):
        Distiller(images(*student), [images(*student), Adapted(images(*teacher))])


def test_inputs_that_fit_are_not_refused():
    Distiller(images(8, 8, 1), Adapted(images(16, 16, 3), size=(16, 16), channels=3))
    Distiller(images(8, 8, 1), images(8, 8))  # Keras adds and removes a last axis of 1
    Distiller(images(8, 8), images(8, 8, 1))
    for first, second in (((None, None, 3), (4, 4, 3)), ((4, 4, 3), (4, None, 3))):
        Distiller(
            *(
                keras.Sequential([keras.Input(shape), L.Conv2D(4, 3), L.GlobalMaxPooling2D()])
                for shape in (first, second)
            )
        )


def test_the_method_predict_is_no_teacher():
    teacher = dense(2)
    for method in (teacher.predict, teacher.predict_on_batch):
        with pytest.raises(InputError, match="returns NumPy arrays.*Pass the model itself"):
            Distiller(dense(1), method)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x: model.predict(x, verbose=0),
        lambda model, x: tf.constant(x.numpy()[:, :4]),
        lambda model, x: np.dot(np.asarray(x), np.ones((6, 4))),
        lambda model, x: model(x)[:, :, 0],
    ],
)
def test_a_function_that_cannot_be_traced_says_what_a_teacher_may_do(call):
    model = dense(2)
    distiller = compiled(dense(1), lambda x: call(model, x))
    with pytest.raises(InputError, match="The teacher failed in the training step.*not model.predict.*teacher_logits"):
        distiller.fit(X, Y, verbose=0)
