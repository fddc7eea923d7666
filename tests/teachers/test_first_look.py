"""What a teacher gives, decided once: logits, probabilities in whatever way they come about, or a refusal."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.ends import DISTRIBUTIONS, SCORES, SIGMOIDS, UNCLEAR, Subclassed, W, X, model

from kdistill.errors import InputError
from kdistill.networks.outputs import as_logits
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.frozen import frozen

Z = X.astype("float64") @ W.astype("float64")


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def in_graph(predict):
    return tf.function(predict, input_signature=[tf.TensorSpec([None, 8], tf.float32)], autograph=False)


def teach(teacher, graph=True):
    """The teacher's log-probabilities on `X`, of its logits, float64."""
    predict = frozen(teacher)
    return log_softmax(np.asarray((in_graph(predict) if graph else predict)(X), np.float64))


@pytest.mark.slow
@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_probabilities_become_logits_however_they_come_about(name, graph, tmp_path):
    np.testing.assert_allclose(teach(DISTRIBUTIONS[name](tmp_path), graph), log_softmax(Z), atol=1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_logits_whatever_their_range(name):
    teacher = SCORES[name]()
    for predict in (frozen(teacher), in_graph(frozen(teacher))):
        np.testing.assert_allclose(predict(X), teacher(X), rtol=1e-6, atol=1e-7)


def test_scores_are_recognized_without_another_pass():
    calls = []

    def teacher(x):
        calls.append(1)
        return x @ W

    in_graph(frozen(teacher))(X)
    assert len(calls) == 1


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("name", SIGMOIDS)
def test_sigmoids_are_refused_by_the_name_of_their_output(name, graph):
    teacher = SIGMOIDS[name]()
    output = f"'{teacher.output_names[0]}' " if hasattr(teacher, "output_names") else ""
    with pytest.raises(
        InputError, match=f"^The output {output}of the teacher '{teacher.name}' ends in a sigmoid.*exclu"
    ):
        teach(teacher, graph)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
@pytest.mark.parametrize("name", UNCLEAR)
def test_numbers_from_0_to_1_that_tell_nothing_are_refused_until_the_user_states_what_they_are(name, graph):
    teacher = UNCLEAR[name]()
    with pytest.raises(InputError, match="do not sum to 1.*outputs='probabilities'"):
        teach(teacher, graph)
    np.testing.assert_allclose(
        teach(Adapted(teacher, outputs="probabilities"), graph),
        log_softmax(np.log(np.maximum(np.asarray(teacher(X), np.float64), 1e-30))),
        atol=1e-5,
    )
    np.testing.assert_allclose(
        teach(Adapted(teacher, outputs="logits"), graph), log_softmax(np.asarray(teacher(X), np.float64)), atol=1e-5
    )


def test_a_statement_wins_over_numbers_and_graph():
    sigmoids = model(layers.Activation("sigmoid"))
    expected = log_softmax(np.log(1 / (1 + np.exp(-Z))))
    for graph in (True, False):
        np.testing.assert_allclose(teach(Adapted(sigmoids, outputs="probabilities"), graph), expected, atol=1e-5)
    softmax = model(layers.Softmax())
    np.testing.assert_allclose(teach(Adapted(softmax, outputs="logits")), log_softmax(softmax(X).numpy()), atol=1e-6)


@pytest.mark.parametrize("graph", [True, False], ids=["graph", "eager"])
def test_a_statement_that_cannot_be_true_is_refused(graph):
    with pytest.raises(InputError, match="of the teacher 'net' gives numbers down to -.*, which are no probabilities"):
        teach(Adapted(model(), outputs="probabilities"), graph)
    with pytest.raises(InputError, match="outputs expects 'logits', 'probabilities' or None, received 'softmax'"):
        Adapted(model(), outputs="softmax")


def test_a_single_number_and_several_outputs_are_refused():
    for end in ([layers.Dense(1)], [layers.Dense(1, activation="sigmoid")]):
        with pytest.raises(InputError, match=r"^The output 'dense.*' of the teacher 'net' has shape .*head='labels'"):
            teach(model(*end))
    with pytest.raises(InputError, match="gives 2 outputs"):
        teach(lambda x: (x, x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_probabilities_of_half_precision(dtype):
    """Rounded to half precision, rows no longer sum to 1 exactly, also after a cast to float32."""
    expected = log_softmax(Z)
    for end in (lambda z: tf.nn.softmax(tf.cast(z, dtype)), lambda z: tf.cast(tf.nn.softmax(z), dtype)):
        for last in (lambda p: p, lambda p: tf.cast(p, tf.float32)):
            result = np.exp(teach(Subclassed(lambda z, end=end, last=last: last(end(z)))))
            np.testing.assert_allclose(result, np.exp(expected), atol=2e-2)
            assert abs(result - np.exp(expected)).max() > 1e-6


@pytest.mark.parametrize("steps", [256, 32768])
def test_quantized_probabilities(steps):
    """As an int8 or int16 file gives them: each rounded by up to half a step, so that the sums differ from 1."""

    def teacher(x):
        return tf.round(tf.nn.softmax(x @ W) * steps) / steps

    rounded = np.round(np.exp(log_softmax(Z)) * steps) / steps
    if steps == 256:
        assert abs(rounded.sum(1) - 1).max() > 2e-3
    for graph in (True, False):
        np.testing.assert_allclose(np.exp(teach(teacher, graph)), rounded / rounded.sum(1, keepdims=True), atol=1e-5)


def test_a_blend_of_all_kinds():
    teachers = [
        model(),
        model(layers.Activation(tf.nn.softmax)),
        model(layers.Softmax(), layers.Reshape((5,)), scale=0.5),
    ]
    p = np.exp(log_softmax(Z))
    expected = np.log(0.25 * p + 0.25 * p + 0.5 * np.exp(log_softmax(0.5 * Z)))
    predict = in_graph(frozen(teachers, [1, 1, 2]))
    np.testing.assert_allclose(predict(X), expected, atol=1e-5)


def test_a_teacher_that_does_not_run_on_noise_is_judged_by_each_batch():
    table = {row.tobytes(): number for number, row in enumerate(X)}
    p = np.exp(log_softmax(Z)).astype("float32")

    def looked_up(x):
        places = tf.numpy_function(lambda rows: np.array([table[row.tobytes()] for row in rows]), [x], tf.int64)
        return tf.ensure_shape(tf.gather(tf.constant(p), places), (None, 5))

    np.testing.assert_allclose(teach(looked_up), log_softmax(Z), atol=1e-5)


def test_inputs_of_any_structure():
    """Token ids in a dict: the noise is zeros, which are always valid."""
    tokens, numbers = keras.Input((6,), dtype="int32", name="tokens"), keras.Input((3,), name="numbers")
    x = layers.Concatenate()([layers.Flatten()(layers.Embedding(20, 2)(tokens)), numbers])
    x = layers.Activation(tf.nn.softmax)(layers.Dense(4)(x))
    teacher = keras.Model({"tokens": tokens, "numbers": numbers}, x)
    data = {"tokens": np.arange(18).reshape(3, 6).astype("int32"), "numbers": np.ones((3, 3), "float32")}
    for predict in (
        frozen(teacher),
        *(tf.function(frozen(item), autograph=False) for item in (teacher, Adapted(teacher))),
    ):
        logits = np.asarray(predict({name: tf.constant(value) for name, value in data.items()}), np.float64)
        np.testing.assert_allclose(np.exp(log_softmax(logits)), teacher(data), atol=1e-6)


def test_logits_of_a_graph_keep_what_a_softmax_rounds_to_zero():
    """`tf.nn.softmax` has no logits that Keras knows; the graph has them."""
    steep = model(layers.Activation(tf.nn.softmax), scale=60.0)
    assert (steep(X).numpy() == 0).any()
    np.testing.assert_allclose(in_graph(frozen(steep))(X), 60 * Z, rtol=1e-5, atol=1e-4)


def test_undecided_numbers_are_judged_in_the_graph():
    z, p = tf.constant(Z[:4], tf.float32), tf.nn.softmax(tf.constant(Z[:4], tf.float32))
    np.testing.assert_array_equal(as_logits(z), z)
    np.testing.assert_allclose(tf.nn.softmax(as_logits(tf.identity(p))), p, atol=1e-6)
