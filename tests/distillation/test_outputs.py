"""What student and teacher give, in a Distiller: the right KL for probabilities of any origin, and early refusals."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.ends import DISTRIBUTIONS, SIGMOIDS, UNCLEAR, Subclassed, W, X, Y, model

from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.teachers.adapted import Adapted
from kdistill.training.strategy import choose_devices

STUDENTS = ("clip", "identity", "ops.softmax", "lambda", "average", "merged", "subclassed", "traced")
SPARSE = keras.losses.SparseCategoricalCrossentropy


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def logits(scale=1.0):
    return scale * (X.astype("float64") @ W.astype("float64"))


def kl(student, teacher, temperature):
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1).mean()


def evaluated(student, teacher, temperature=1.0, loss=None, labels=Y, **options):
    distiller = Distiller(student, teacher, distillation_weight=1.0, temperature=temperature, **options)
    distiller.compile("sgd", loss)
    return distiller.evaluate(X, labels, verbose=0, return_dict=True)


@pytest.mark.exhaustive(
    but=(
        "tflite-4.0",
        "function-4.0",
        "merged-4.0",
        "subclassed-1.0",
        "average-1.0",
        "identity-1.0",
        "clip-4.0",
        "lambda-4.0",
        "ops.softmax-1.0",
        "serve-1.0",
        "traced-4.0",
        "dropout-1.0",
    )
)
@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_teacher_of_probabilities_is_not_softened_twice(name, temperature, tmp_path):
    expected = kl(logits(0.3), logits(), temperature)
    logs = evaluated(model(scale=0.3), DISTRIBUTIONS[name](tmp_path), temperature)
    assert logs["kd"] == pytest.approx(expected, abs=1e-5)
    assert abs(kl(logits(0.3), np.exp(log_softmax(logits())), temperature) - expected) > 0.1


@pytest.mark.exhaustive(
    but=(
        "traced",
        "average",
        "merged",
    )
)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The student")  # that it is larger than its teacher
@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_of_probabilities_trains_like_one_of_logits(name, tmp_path):
    teacher, plain, student = model(scale=0.5), model(), DISTRIBUTIONS[name](tmp_path)
    logs = evaluated(student, teacher, 2.0)
    assert logs["kd"] == pytest.approx(kl(logits(), logits(0.5), 2.0), abs=1e-5)
    assert logs["hard"] == pytest.approx(-log_softmax(logits())[np.arange(32), Y].mean(), abs=1e-5)
    assert logs["accuracy"] == pytest.approx(np.mean(logits().argmax(-1) == Y)) and logs["agreement"] == 1
    if name in ("average", "merged"):  # other weights: only their first step is that of the plain student
        return
    for network in (plain, student):
        distiller = Distiller(network, teacher, distillation_weight=0.7, temperature=2.0)
        distiller.compile(keras.optimizers.SGD(0.05))
        distiller.fit(X, Y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    np.testing.assert_allclose(student.weights[0], plain.weights[0], atol=1e-5)
    assert abs(plain.weights[0].numpy() - W).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graph"])
def test_dropout_behind_a_softmax_in_training(eager):
    """The numbers of the step itself do not sum to 1; those in inference mode do."""
    student = model(layers.Softmax(), layers.Dropout(0.5))
    distiller = Distiller(student, model())
    distiller.compile("sgd", run_eagerly=eager)
    distiller.fit(X, Y, verbose=0)
    assert distiller.evaluate(X, Y, verbose=0, return_dict=True)["accuracy"] > 0


@pytest.mark.exhaustive
def test_every_way_into_a_step():
    """`fit` of arrays, of a data set and of a generator that gives each batch once, `train_on_batch`, and by hand."""
    expected = kl(logits(0.3), logits(), 4.0)

    def distiller():
        made = Distiller(model(scale=0.3), model(layers.Activation(tf.nn.softmax)), distillation_weight=1.0)
        made.compile(keras.optimizers.SGD(0.0))
        return made

    batches, seen = [(X[:16], Y[:16]), (X[16:], Y[16:])], []

    def once():
        for batch in batches:
            seen.append(len(batch[0]))
            yield batch

    ways = {
        "data set": lambda d: d.fit(tf.data.Dataset.from_tensor_slices((X, Y)).batch(16), verbose=0).history["kd"][0],
        "generator": lambda d: d.fit(once(), verbose=0, steps_per_epoch=2).history["kd"][0],
        "train_on_batch": lambda d: d.train_on_batch(X, Y, return_dict=True)["kd"],
        "train_step": lambda d: float(d.train_step((tf.constant(X), tf.constant(Y)))["kd"]),
        "traced": lambda d: float(tf.function(d.test_step)((tf.constant(X), tf.constant(Y)))["kd"]),
    }
    for name, way in ways.items():
        assert way(distiller()) == pytest.approx(expected, abs=1e-5), name
    assert seen == [16, 16]


@pytest.mark.slow
def test_stored_outputs_may_be_probabilities():
    expected = kl(logits(0.3), logits(), 4.0)
    for stored in (logits(), np.exp(log_softmax(logits()))):
        distiller = Distiller(model(scale=0.3), distillation_weight=1.0)
        distiller.compile("sgd")
        targets = {"labels": Y, "teacher_logits": stored.astype("float32")}
        assert distiller.evaluate(X, targets, verbose=0, return_dict=True)["kd"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGMOIDS)
def test_sigmoids_do_not_teach_exclusive_classes(name):
    network = SIGMOIDS[name]()
    classes = network(X[:1]).shape[-1]
    student = model(weights=np.ones((8, max(classes, 2)), "float32"))
    distiller = Distiller(student, network if classes > 1 else lambda x: tf.concat([network(x)] * 2, 1))
    distiller.compile("sgd")
    message = r"^The output .*of the teacher .*(ends in a sigmoid|from 0 to 1 that do not sum to 1).*exclusive"
    for run in (distiller.fit, distiller.evaluate):
        with pytest.raises(InputError, match=message):
            run(X, Y % classes, verbose=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIGMOIDS)
def test_sigmoids_of_a_student_are_labels(name):
    network = SIGMOIDS[name]()
    numbers = np.asarray(network(X), np.float64)
    z = (X.astype("float64") @ W)[:, : numbers.shape[1]]
    teacher = model(weights=W[:, : numbers.shape[1]])
    labels = (z > 0).astype("float32")
    logs = evaluated(network, teacher, labels=labels, head="labels")  # a subclassed model does not show its end
    p, q = 1 / (1 + np.exp(-z)), np.clip(numbers, 1e-12, 1 - 1e-12)
    assert logs["kd"] == pytest.approx(
        (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).sum(-1).mean(), abs=1e-4
    )
    assert logs["hard"] == pytest.approx(-np.log(np.where(labels > 0, q, 1 - q)).sum(-1).mean(), rel=1e-4)
    assert logs["accuracy"] == pytest.approx(np.mean((numbers > 0.5) == labels))


def test_one_number_needs_a_head():
    for network, loss in ((model(layers.Dense(1)), None), (model(layers.Dense(1)), lambda y, p: (y - p) ** 2)):
        with pytest.raises(InputError, match=r"one number for each example.*head='labels'.*head='numbers'"):
            Supervised(network).compile("sgd", loss)
    student = model(layers.Dense(1, name="score"))
    student.layers[-1].set_weights([np.ones((5, 1)), np.zeros(1)])
    logs = evaluated(student, student_copy(student), labels=Y % 2, loss=keras.losses.BinaryCrossentropy(True))
    assert logs["kd"] == pytest.approx(0, abs=1e-6) and 0 <= logs["accuracy"] <= 1 and logs["agreement"] == 1


def student_copy(student):
    copy = keras.models.clone_model(student)
    copy.set_weights(student.get_weights())
    return copy


LOSSES_OF_OTHER_HEADS = [
    "mse",
    "mae",
    keras.losses.Huber(),
    keras.losses.MeanSquaredLogarithmicError(),
    keras.losses.log_cosh,
    "binary_crossentropy",
    keras.losses.BinaryCrossentropy(from_logits=True),
    keras.losses.BinaryFocalCrossentropy(from_logits=True),
]


def loss_name(loss) -> str:
    """A name for the test's id: the text of a loss holds an address, which differs from process to process."""
    return loss if isinstance(loss, str) else getattr(loss, "name", None) or loss.__name__


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES_OF_OTHER_HEADS, ids=loss_name)
def test_of_scores_a_loss_of_numbers_or_labels_tells_what_they_mean(loss):
    labels = np.eye(5, dtype="float32")[Y]
    distiller = Distiller(model(scale=0.3), model(), distillation_weight=1.0)
    if loss == "binary_crossentropy":
        distiller.compile("sgd", loss)
        with pytest.raises(InputError, match="gives logits, but the loss .* takes probabilities"):
            distiller.evaluate(X, labels, verbose=0)
        return
    distiller.compile("sgd", loss)
    is_of_labels = "binary" in loss_name(loss)
    logs = distiller.evaluate(X, labels, verbose=0, return_dict=True)
    assert distiller.heads == {"": "labels" if is_of_labels else "numbers"}
    assert logs["hard"] == pytest.approx(float(tf.reduce_mean(keras.losses.get(loss)(labels, logits(0.3)))), rel=1e-4)
    if not is_of_labels:
        assert logs["kd"] == pytest.approx(np.mean((logits(0.3) - logits()) ** 2), rel=1e-5)
    with pytest.raises(InputError, match="of exclusive classes, but the loss .* is one of"):
        evaluated(model(), model(), loss=loss, labels=labels, head="classes")
    if loss == "mse":  # squared differences from one-hot labels can train a classifier
        logs = evaluated(model(scale=0.3), model(), loss=loss, labels=labels, outputs="logits")
        assert logs["kd"] == pytest.approx(kl(logits(0.3), logits(), 1.0), abs=1e-5)
        assert logs["hard"] == pytest.approx(((logits(0.3) - np.eye(5)[Y]) ** 2).mean(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["mse", "binary_crossentropy", keras.losses.CategoricalCrossentropy()], ids=loss_name)
def test_these_losses_train_a_softmax(loss):
    """The Brier score, and the cross-entropy of each class: probabilities of exclusive classes, in either case."""
    for student in (model(layers.Softmax(), scale=0.3), model(layers.Lambda(tf.nn.softmax), scale=0.3)):
        logs = evaluated(student, model(), loss=loss, labels=np.eye(5, dtype="float32")[Y])
        assert logs["kd"] == pytest.approx(kl(logits(0.3), logits(), 1.0), abs=1e-5)


@pytest.mark.slow
def test_from_logits_has_to_be_that_of_the_outputs():
    for loss in (SPARSE(), "sparse_categorical_crossentropy", "ce"):
        with pytest.raises(InputError, match=r"gives logits, but the loss .* takes prob.*Set from_logits=True"):
            evaluated(model(), model(), loss=loss)
    unknown = model(layers.Activation(tf.nn.softmax))
    with pytest.raises(InputError, match=r"gives probabilities, but the loss .* takes logits .*from_logits=False"):
        evaluated(unknown, model(), loss=SPARSE(from_logits=True))
    own = -log_softmax(logits())[np.arange(32), Y].mean()
    assert evaluated(unknown, model(), loss=SPARSE())["hard"] == pytest.approx(own, abs=1e-5)
    assert evaluated(model(), model(), loss=SPARSE(True))["hard"] == pytest.approx(own, abs=1e-5)
    with pytest.warns(UserWarning, match="from_logits=True"):  # Keras takes the logits that it keeps
        logs = evaluated(model(layers.Softmax()), model(), loss=SPARSE(True))
    assert logs["hard"] == pytest.approx(own, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The student")
@pytest.mark.filterwarnings("ignore:.*from_logits=True")  # a softmax over the batch is a softmax for Keras
@pytest.mark.parametrize("name", UNCLEAR)
def test_of_numbers_that_tell_nothing_the_loss_or_the_argument_decides(name):
    student = UNCLEAR[name]()
    numbers = np.asarray(student(X), np.float64)
    classes = numbers.shape[1]
    teacher = model(weights=W[:, :classes])
    z = X.astype("float64") @ W[:, :classes]
    with pytest.raises(InputError, match="of the student 'net' gives numbers from 0 to 1 that do not sum to 1"):
        evaluated(student, teacher, labels=Y % classes)
    p = kl(np.log(np.maximum(numbers, 1e-30)), z, 1.0)
    assert evaluated(student, teacher, labels=Y % classes, outputs="probabilities")["kd"] == pytest.approx(p, rel=1e-5)
    as_logits = evaluated(student, teacher, labels=Y % classes, outputs="logits")
    assert as_logits["kd"] == pytest.approx(kl(numbers, z, 1.0), abs=1e-5)
    by_loss = evaluated(student, teacher, labels=Y % classes, loss=SPARSE(True))
    assert by_loss["kd"] == pytest.approx(as_logits["kd"], abs=1e-6)


@pytest.mark.slow
def test_outputs_are_an_argument_that_is_checked_saved_and_cloned(tmp_path):
    with pytest.raises(InputError, match="outputs expects 'logits', 'probabilities' or None, received 'softmax'"):
        Distiller(model(), model(), outputs="softmax")
    with pytest.raises(InputError, match="of the student 'net' gives numbers down to -.*, which are no probabilities"):
        evaluated(model(), model(), outputs="probabilities")
    network = model(layers.Softmax(), layers.Reshape((5,)), scale=0.3)
    distiller = Distiller(network, model(), outputs="logits", distillation_weight=1.0, temperature=1.0)
    distiller.compile("sgd")
    p = np.exp(log_softmax(logits(0.3)))
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.set_teacher(model())
    for made in (distiller, loaded):
        assert made.evaluate(X, Y, verbose=0, return_dict=True)["kd"] == pytest.approx(kl(p, logits(), 1.0), abs=1e-5)
    assert keras.models.clone_model(distiller).get_config()["outputs"] == "logits"


@pytest.mark.slow
def test_a_saved_distiller_decides_the_same_again(tmp_path):
    distiller = Distiller(model(keras.ops.softmax, scale=0.3), model(layers.Lambda(tf.nn.softmax)))
    distiller.compile(keras.optimizers.SGD(0.05))
    distiller.fit(X, Y, batch_size=16, verbose=0)
    distiller.save(tmp_path / "distiller.keras")
    loaded = keras.saving.load_model(tmp_path / "distiller.keras")
    loaded.set_teacher(model(layers.Lambda(tf.nn.softmax)))
    for made in (distiller, loaded):
        made.fit(X, Y, batch_size=16, shuffle=False, verbose=0)
    np.testing.assert_array_equal(distiller.student.weights[0], loaded.student.weights[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(dtype):
    def net(end):
        dense = layers.Dense(5, use_bias=False, dtype=dtype)
        network = keras.Sequential([keras.Input((8,)), dense, layers.Activation(end, dtype=dtype)])
        dense.set_weights([W])
        return network

    expected = kl(logits(0.3), logits(), 1.0)
    for end in ("softmax", tf.nn.softmax):
        assert evaluated(model(scale=0.3), net(end))["kd"] == pytest.approx(expected, abs=0.05)
        assert evaluated(net(end), model(scale=0.3))["kd"] == pytest.approx(kl(logits(), logits(0.3), 1.0), abs=0.05)


@pytest.mark.slow
def test_terms_and_blends_get_the_same_logits():
    from kdistill.recipe import Term

    terms = {"again": Term("kl_logits")}
    student = model(layers.Softmax(), layers.Reshape((5,)), scale=0.3)
    logs = evaluated(student, model(layers.Activation(tf.nn.softmax)), terms=terms)
    expected = kl(logits(0.3), logits(), 1.0)
    for name in ("kd", "again"):
        assert logs[name] == pytest.approx(expected, abs=1e-5), name
    teachers = [model(), Adapted(model(layers.Lambda(tf.nn.softmax), scale=0.5)), Subclassed(tf.nn.softmax)]
    p = np.exp(log_softmax(logits()))
    blend = np.log(0.5 * p + 0.5 * np.exp(log_softmax(logits(0.5))))
    logs = evaluated(model(scale=0.3), teachers, teacher_weights=[1, 2, 1])
    assert logs["kd"] == pytest.approx(kl(logits(0.3), blend, 1.0), abs=1e-5)


@pytest.mark.slow
def test_two_replicas_decide_the_same():
    strategy = choose_devices("mirrored").strategy  # one per process
    with strategy.scope():
        student, teacher = model(layers.Lambda(tf.nn.softmax), scale=0.3), Subclassed(tf.nn.softmax)
        distiller = Distiller(student, teacher, distillation_weight=1.0, temperature=1.0)
        distiller.compile(keras.optimizers.SGD(0.05))
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(32)
    assert distiller.evaluate(data, verbose=0, return_dict=True)["kd"] == pytest.approx(
        kl(logits(0.3), logits(), 1.0), abs=1e-5
    )
    distiller.fit(data, verbose=0)
    alone = Distiller(model(scale=0.3), model(), distillation_weight=1.0, temperature=1.0)
    alone.compile(keras.optimizers.SGD(0.05))
    alone.fit(X, Y, batch_size=32, shuffle=False, verbose=0)
    np.testing.assert_allclose(student.weights[0].numpy(), alone.student.weights[0].numpy(), atol=1e-6)
