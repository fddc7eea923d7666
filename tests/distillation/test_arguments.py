"""Labels and arguments that do not fit the student: one message before anything trains."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.dense_models import X, Y, dense

from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError

OUTSIDE = {
    "too large": (Y + 2, r"y has the classes 2 to 5, but the student has 4 outputs: expected 0 to 3"),
    "from 1": (np.arange(48) % 4 + 1, "y has the classes 1 to 4.*Number the classes from 0"),
    "column": ((Y + 4)[:, None], "classes 4 to 7"),
    "float": ((Y + 4).astype("float32"), "classes 4 to 7"),
    "tensor": (tf.constant(Y + 4), "classes 4 to 7"),
    "list of one": ([Y + 4], "classes 4 to 7"),
    "with logits": ({"labels": Y + 4, "teacher_logits": np.zeros((48, 4))}, "classes 4 to 7"),
    "halves": (Y + 0.5, "whole numbers from 0; received"),
    "NaN": (np.where(Y == 1, np.nan, Y), "whole numbers from 0; received nan"),
    "names": (np.array(["cat", "dog"] * 24), r"expects numbers, received <U3 such as \['cat'\].*np.unique"),
    "objects": (np.array(["cat", 1] * 24, dtype=object), "expects numbers, received object"),
    "narrow": (np.eye(3)[Y % 3], r"distributions \[batch, 4\].*received \[batch, 3\]"),
    "wide": (np.eye(9, dtype="int64")[Y], r"distributions \[batch, 4\].*received \[batch, 9\]"),
}


def model():
    supervised = Supervised(dense(1))
    supervised.compile("sgd", run_eagerly=True)
    return supervised


@pytest.mark.parametrize("name", OUTSIDE)
def test_labels_that_do_not_fit_are_refused_before_a_step(name):
    labels, message = OUTSIDE[name]
    for run in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
        supervised = model()
        with pytest.raises(InputError, match=message):
            getattr(supervised, run)(X, labels)
        assert int(supervised.global_step) == 0
    with pytest.raises(InputError, match="validation_data|whole numbers|numbers, received"):
        model().fit(X, Y, validation_data=(X, labels), verbose=0)


@pytest.mark.slow
def test_labels_that_fit_pass():
    for labels in (Y, Y[:, None], Y.astype("float32"), np.eye(4)[Y], np.where(Y > 1, Y, -1), [Y], Y > 1):
        model().fit(X, labels, verbose=0)
    unclear = np.full((48, 4), 0.25)
    model().fit(X, unclear, verbose=0)


def data(labels):
    return tf.data.Dataset.from_tensor_slices((X, labels)).batch(16)


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("loss", [None, keras.losses.SparseCategoricalCrossentropy(from_logits=True)])
def test_labels_of_a_data_set_are_refused_when_they_come(loss, eager):
    distiller = Distiller(dense(1), dense(2))
    distiller.compile("sgd", loss, run_eagerly=eager)
    late = np.where(np.arange(48) < 40, Y, 7)
    for run in (distiller.fit, distiller.evaluate):
        with pytest.raises(InputError, match=r"The data has the classes 7, but the student has 4 outputs"):
            run(data(late), verbose=0)
        with pytest.raises(InputError, match=r"labels expects distributions \[batch, 4\].*received \[batch, 3\]"):
            run(data(np.eye(3)[Y % 3]), verbose=0)


def test_a_loss_of_the_user_does_not_hide_another_width():
    supervised = Supervised(dense(1))
    supervised.compile("sgd", lambda labels, outputs: tf.reduce_sum(outputs, -1), run_eagerly=True)
    with pytest.raises(InputError, match=r"received \[batch, 3\]"):
        supervised.evaluate(data(np.eye(3)[Y % 3]), verbose=0)


def test_two_targets_are_refused():
    with pytest.raises(InputError, match="one array of labels, received 2"):
        model().fit(X, [Y, Y], verbose=0)
    with pytest.raises(InputError, match="keys 'labels' and 'teacher_logits', received a"):
        model().fit(X, {"a": Y}, verbose=0)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"alpha": 0.1}, "no argument 'alpha'.*distillation_weight=1 - alpha"),
        ({"temperature": 3}, "no argument 'temperature'.*to the constructor"),
        ({"student_loss_fn": "mse"}, "'student_loss_fn'.*as loss="),
        ({"distillation_loss_fn": "kld"}, "'distillation_loss_fn'.*terms="),
        ({"jitcompile": True}, "'jitcompile'. Did you mean 'jit_compile'"),
        ({"loss": {"nothing": "mse"}}, "Unknown output 'nothing'.*Fix loss"),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights expects one entry.*received 2"),
        ({"metrics": {"a": "mse", "b": "mse"}}, "metrics expects one entry.*received 2"),
    ],
)
def test_compile_names_what_it_does_not_take(options, message):
    inputs = keras.Input((6,))
    student = keras.Model(inputs, keras.layers.Dense(4)(inputs))
    with pytest.raises(InputError, match=message):
        Distiller(student, dense(2)).compile("sgd", **options)


def test_entries_by_the_name_of_the_output():
    inputs = keras.Input((6,))
    student = keras.Model(inputs, keras.layers.Dense(4, name="classes")(inputs))
    supervised, plain = Supervised(student), keras.models.clone_model(student)
    plain.set_weights(student.get_weights())
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    arguments = {"loss": {"classes": entropy}, "metrics": {"classes": ["sparse_categorical_accuracy"]}}
    for trained in (supervised, plain):
        trained.compile(keras.optimizers.SGD(0.1), **arguments, loss_weights={"classes": 2.0}, run_eagerly=True)
    found, expected = (trained.fit(X, Y, shuffle=False, verbose=0).history for trained in (supervised, plain))
    for name in ("loss", "sparse_categorical_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
