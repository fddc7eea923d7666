"""Terms that are wrong, or would do nothing: one message that names the setting."""

import keras
import pytest
import tensorflow as tf
from support.tapped_models import TAPS, X, Y, compiled, student, teacher

from kdistill.distillation import losses
from kdistill.distillation.distiller import Distiller
from kdistill.errors import InputError
from kdistill.recipe import Schedule, Term


def hint(**changes):
    return {"hint": Term("hint", **{**TAPS, **changes})}


@pytest.mark.parametrize(
    "terms,message",
    [
        (
            hint(student_tap="conw"),
            "Unknown tap 'conw' in student 'small'. Did you mean 'conv'. Available: conv, pool, ",
        ),
        (hint(student_tap="r9"), "Available: conv, pool, logits. Fix distill.terms.hint.student_tap"),
        (hint(teacher_tap="r9"), "in teacher 'large'.*block, block/conv.*Fix distill.terms.hint.teacher_tap"),
        (hint(teacher_tap=None), "hint compares layers of student and teacher; give teacher_tap too"),
        (hint(projector="conv"), "Unknown projector 'conv'. Did you mean 'conv1x1'"),
        (hint(student_tap="pool", projector="conv1x1"), "conv1x1 needs features"),
        ({"kl": Term("kl_logits", **TAPS)}, "compares logits; student_tap, teacher_tap and projector would do nothing"),
        ({"kl": Term("kl_logits", projector="dense")}, "would do nothing"),
        ({"kl": Term(losses.kl_logits, projector="dense")}, "give student_tap and teacher_tap too"),
        ({"kl": Term("kl")}, "Unknown loss 'kl'.*Fix distill.terms.kl.loss"),
        ({"kl": Term(3)}, "expects the name of a method or a function"),
        ({"loss": Term("cosine")}, "cannot be named 'loss'"),
        ({"val_x": Term("cosine")}, "cannot be named 'val_x'"),
        ({"a b": Term("cosine")}, "cannot be named 'a b'"),
        ({"kd": Term("cosine", 0.5)}, "distillation_weight weighs the term 'kd'"),
        ({"x": Term("cosine", -1)}, "distill.terms.x.weight' expects a number 0 or more"),
        ({"x": Term("cosine", options={"temperature": 2})}, "Unknown option of cosine 'temperature'. Available: none"),
        ({"x": Term("dkd", options={"temperature": 0})}, "options.temperature' expects a number above 0"),
        ({"x": Term("dkd", options={"alpha": -1})}, "options.alpha' expects a number 0 or more"),
        ({"x": Term("cosine", Schedule(1, 0))}, "expects a number 0 or more, or a schedule"),
        ({"x": "cosine"}, "expects a kdistill.Term, received 'cosine'"),
    ],
)
def test_a_setting_that_is_wrong_or_does_nothing_is_refused(terms, message):
    with pytest.raises(InputError, match=message):
        Distiller(student(), teacher(), terms=terms)


def test_a_temperature_that_does_nothing_is_refused():
    with pytest.raises(InputError, match="temperature=3.0 would do nothing"):
        Distiller(student(), teacher(), temperature=3.0, terms={"kd": Term("mse_logits")})


def test_shapes_that_cannot_be_compared_name_the_term():
    made = compiled(student(), teacher(filters=7), terms=hint())
    with pytest.raises(InputError, match=r"The term 'hint': hint expects.*one shape.*Fix distill.terms.hint"):
        made.fit(X, Y, verbose=0)
    made = compiled(student(), teacher(), terms={"own": Term(lambda s, t: tf.reduce_mean(s - t))})
    with pytest.raises(InputError, match=r"The term 'own': A loss returns one number for each example"):
        made.fit(X, Y, verbose=0)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.conv = keras.layers.Conv2D(5, 3, name="conv")
        self.last = keras.layers.Dense(4)

    def call(self, x):
        return self.last(tf.reduce_mean(self.conv(x), axis=[1, 2]))


def test_models_without_a_graph_are_refused_by_name():
    model = Subclassed()
    model(X)
    with pytest.raises(InputError, match=r"student 'subclassed.*', which is a subclassed model.*keras.Input"):
        Distiller(model, teacher(), terms=hint())
    with pytest.raises(InputError, match="teacher 'subclassed.*Fix distill.terms.hint.teacher_tap"):
        Distiller(student(), model, terms=hint(teacher_tap="conv"))
    with pytest.raises(InputError, match="which is not built"):
        Distiller(keras.Sequential([keras.layers.Dense(4)]), teacher(), terms=hint())


def test_a_layer_that_is_called_twice_is_refused():
    image, shared = keras.Input((8, 8, 2)), keras.layers.Conv2D(2, 1, name="shared")
    x = keras.layers.Flatten()(shared(shared(image)))
    with pytest.raises(InputError, match="'shared' in student 'twice' is called 2 times in one forward"):
        Distiller(
            keras.Model(image, keras.layers.Dense(4)(x), name="twice"), teacher(), terms=hint(student_tap="shared")
        )


def test_a_layer_of_several_outputs_is_refused():
    image = keras.Input((8, 8, 2))
    x, *_ = keras.layers.LSTM(3, return_state=True, name="rows")(keras.layers.Reshape((8, 16))(image))
    with pytest.raises(InputError, match="'rows' in student 'states' gives 3 tensors"):
        Distiller(
            keras.Model(image, keras.layers.Dense(4)(x), name="states"), teacher(), terms=hint(student_tap="rows")
        )
