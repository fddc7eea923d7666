"""Every scheme on a small student: what it promises is in the weights, in the table and in the file."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers as L

from kdistill import finetune, losses, schemes, stages
from kdistill.bridge import to_tf_keras
from kdistill.compress import SCHEMES, compress
from kdistill.data import Examples
from kdistill.errors import CheckFailed, InputError
from kdistill.litert import File
from kdistill.qat_file import converted, look_inside
from kdistill.teacher import frozen

CLASSES = 4


def examples(count=96, seed=0):
    """Noisy copies of one pattern for each class."""
    patterns = np.random.default_rng(9).uniform(0, 255, (CLASSES, 10, 10, 4))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, CLASSES, count).astype("int32")
    images = patterns[labels] + generator.normal(0, 30, (count, 10, 10, 4))
    return Examples(np.clip(images, 0, 255).astype("uint8"), labels)


def network(activation=None):
    return keras.Sequential(
        [
            *[keras.Input((10, 10, 4)), L.Rescaling(1 / 127.5, -1.0, name="scale")],
            *[L.Conv2D(8, 3, use_bias=False, name="first"), L.BatchNormalization(momentum=0.8), L.ReLU()],
            *[L.DepthwiseConv2D(3, activation="relu6", name="depth"), L.Conv2D(8, 3, name="plain"), L.ReLU()],
            *[L.GlobalAveragePooling2D(), L.Dropout(0.1), L.Dense(CLASSES, activation=activation, name="top")],
        ],
        name="student",
    )


def flat(activation=None):
    """A student that is compressed in a second."""
    layers = [L.Rescaling(1 / 255), L.Flatten(), L.Dense(8, activation="relu", name="plain")]
    return keras.Sequential([keras.Input((10, 10, 4)), *layers, L.Dense(CLASSES, activation=activation, name="top")])


def accuracy(model, data):
    return np.mean(model.predict(data.images.astype("float32"), verbose=0).argmax(-1) == data.labels)


@pytest.fixture(scope="module")
def student():
    keras.utils.set_random_seed(1)
    model, data = network(), examples(384)
    model.compile(keras.optimizers.Adam(1e-2), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(data.images.astype("float32"), data.labels, epochs=8, verbose=0)
    assert accuracy(model, examples(200, seed=5)) > 0.95
    return model


@pytest.fixture(scope="module")
def compressed(student):
    """Each scheme once."""
    done = {}

    def get(scheme):
        if scheme not in done:
            options = {"epochs": 2, "learning_rate": 2e-3, "batch_size": 24, "final_sparsity": 0.6, "clusters": 7}
            done[scheme] = compress(student, scheme, student, examples(), **options, say=lambda text: None)
        return done[scheme]

    return get


def kernel(result, name):
    return np.asarray(result.model.get_layer(name).kernel)


def row(result, name):
    return next(row for row in result.stages if row["layer"] == name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_keep_their_promises(scheme, compressed, student, tmp_path):
    before = [w.copy() for w in student.get_weights()]
    result, test = compressed(scheme), examples(200, seed=5)
    for a, b in zip(before, student.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert type(result.model) is keras.Sequential and result.scheme == scheme
    assert accuracy(result.model, test) > 0.85
    parts, names = SCHEMES[scheme], ("first", "plain", "top")
    assert list(result.history) == list(parts)
    for name in names:
        share, values = np.mean(kernel(result, name) == 0), len(np.unique(kernel(result, name)))
        assert row(result, name)["sparsity"] == pytest.approx(share) and row(result, name)["clusters"] == values
        assert share == pytest.approx(0.6 if "prune" in parts else 0.5 if "prune_2_4" in parts else 0, abs=0.01)
        if "cluster" in parts and row(result, name)["clustered"] == "yes":
            assert stages.per_channel(kernel(result, name)) <= 7
    if "cluster" in parts and "prune" in parts:
        assert row(result, "top")["clustered"].startswith("too small: ")
    if "qat" in parts or scheme == "int8":
        assert {row["quantised"] for row in result.stages} == {"yes"}
        path = tmp_path / "student.tflite"
        path.write_bytes(result.tflite())
        file = File(path)
        assert (file.input["type"], file.output["type"], file.output["name"]) == ("float32", "float32", "logits")
        assert np.mean(file.predict(test.images).argmax(-1) == test.labels) > 0.85
        operators = set(file.operators())
        assert not operators & {"DELEGATE"} and {"CONV_2D", "DEPTHWISE_CONV_2D", "QUANTIZE"} <= operators
    else:
        with pytest.raises(InputError, match=f"'{scheme}' quantises nothing.*qat, pqat"):
            result.tflite()


def test_two_of_four_lies_along_the_input_channels(compressed):
    rows = kernel(compressed("prune_2_4"), "plain").transpose(0, 1, 3, 2).reshape(-1, 4)
    assert (np.count_nonzero(rows, axis=1) == 2).all()


def test_zeros_and_clusters_are_in_the_file(compressed):
    weights, floats = look_inside(compressed("pcqat").tflite())
    assert floats == {} and weights["plain"].dtype == np.int8
    assert np.mean(weights["plain"] == 0) >= 0.59
    assert stages.per_channel(weights["plain"], axis=0) <= 7
    loose, _ = look_inside(compressed("qat").tflite())
    assert np.mean(loose["plain"] == 0) < 0.2


def test_plain_qat_keeps_what_was_done_and_says_so(compressed):
    told = []
    before = compressed("prune_cluster").model
    options = {"epochs": 1, "batch_size": 24, "say": told.append}
    after = compress(before, "qat", None, examples(), **options)
    assert after.notes == ["The student is clustered and pruned already: qat keeps that."] and told[0] == after.notes[0]
    for name in ("first", "plain", "top"):
        assert np.mean(kernel(after, name) == 0) == pytest.approx(0.6, abs=0.01)
    assert stages.per_channel(kernel(after, "plain")) <= 7
    assert np.abs(kernel(after, "plain") - np.asarray(before.get_layer("plain").kernel)).max() > 0


def test_the_teacher_teaches():
    """With weight 1 labels play no part: random ones change nothing, another teacher does."""
    data, student = examples(48), flat()
    wrong = Examples(data.images, np.roll(data.labels, 7))
    other = flat()
    options = {
        "epochs": 1,
        "batch_size": 24,
        "learning_rate": 1e-2,
        "distillation_weight": 1.0,
        "say": lambda text: None,
    }
    a, b, c = (
        compress(student, "prune", teacher, given, **options)
        for teacher, given in ((student, data), (student, wrong), (other, data))
    )
    np.testing.assert_array_equal(kernel(a, "plain"), kernel(b, "plain"))
    assert np.abs(kernel(a, "plain") - kernel(c, "plain")).max() > 1e-3
    assert a.history["prune"]["loss"] == pytest.approx(a.history["prune"]["kd"])


def test_the_step_mixes_both_losses():
    keras.utils.set_random_seed(0)
    model, teacher = (keras.Sequential([keras.Input((3,)), L.Dense(4)]) for _ in range(2))
    tuned = finetune.FineTuned(to_tf_keras(model), finetune.loss(frozen(teacher), 0.3, 5.0, False))
    tuned.compile(tf_keras.optimizers.SGD(0.0))
    x, y = tf.random.normal((8, 3)), tf.range(8) % 4
    logs = tuned.train_on_batch(x, y, return_dict=True)
    hard = np.mean(losses.hard_cross_entropy(y, model(x)))
    kd = np.mean(losses.kl_logits(model(x), teacher(x), 5.0))
    assert logs["hard"] == pytest.approx(hard, rel=1e-5) and logs["kd"] == pytest.approx(kd, rel=1e-5)
    assert logs["loss"] == pytest.approx(0.7 * hard + 0.3 * kd, rel=1e-5)
    assert len(tuned.variables) == len(tuned.network.variables) + 2 * 4, "the teacher is not tracked"


def test_probabilities_are_trained_as_such():
    model, data = flat("softmax"), examples(48)
    result = compress(model, "qat", model, data, batch_size=24, say=lambda text: None)
    expected = -np.mean(np.log(model.predict(data.images.astype("float32"), verbose=0)[np.arange(48), data.labels]))
    assert result.history["qat"]["hard"][0] == pytest.approx(expected, abs=0.4)
    assert result.history["qat"]["kd"][0] < 0.4, "the teacher is the student itself"
    assert b"probabilities" in result.tflite()


def odd():
    x = keras.Input((10, 10, 4))
    y = L.Conv2D(8, 3, activation="hard_swish", name="swish")(L.Rescaling(1 / 255)(x))
    y = L.Conv2D(8, 1, activation="hard_sigmoid", name="gate")(L.GlobalAveragePooling2D(keepdims=True)(y)) * y
    y = L.SeparableConv2D(8, 3, name="sep")(L.BatchNormalization(name="lonely")(y))
    y = L.PReLU(shared_axes=[1, 2], name="prelu")(y) + y
    return keras.Model(x, L.Dense(CLASSES, name="top")(L.Flatten()(y)), name="odd")


def test_nothing_is_lost_quietly():
    result = compress(odd(), "pqat", None, examples(48), batch_size=24, final_sparsity=0.5, say=lambda text: None)
    assert row(result, "swish")["quantised"] == "yes" and row(result, "gate")["quantised"] == "yes"
    assert row(result, "sep.pointwise")["pruned"] == "yes" and row(result, "sep.pointwise")["sparsity"] == 0.5
    assert row(result, "sep")["pruned"] == "DepthwiseConv2D layers are not pruned"
    assert row(result, "prelu")["quantised"] == "tfmot has no 8-bit scheme for PReLU layers"
    assert "computes in float" in row(result, "lonely")["quantised"]
    assert np.mean(np.asarray(result.model.get_layer("sep").pointwise_kernel) == 0) == 0.5


def test_layers_left_alone():
    student = flat()
    result = compress(student, "prune", None, examples(48), batch_size=24, skip=("top",), say=lambda text: None)
    assert row(result, "top")["pruned"] == "left alone as asked (skip)" and row(result, "top")["sparsity"] == 0
    result = compress(student, "cluster", None, examples(48), batch_size=24, clusters=32, say=lambda text: None)
    assert row(result, "top")["clustered"].startswith("too small: 32 weights for 32 clusters")
    assert row(result, "plain")["clusters"] <= 32 and row(result, "top")["clusters"] == 32


def test_a_layer_outside_a_stage_keeps_its_zeros_and_clusters():
    options = {"batch_size": 24, "learning_rate": 1e-2, "say": lambda text: None}
    first = compress(flat(), "prune_cluster", None, examples(48), final_sparsity=0.5, clusters=4, **options)
    assert row(first, "top")["clustered"] == "yes" and np.mean(kernel(first, "top") == 0) == 0.5
    second = compress(first.model, "qat", None, examples(48), skip=("top",), **options)
    np.testing.assert_array_equal(kernel(first, "top"), kernel(second, "top"))
    assert np.mean(kernel(second, "plain") == 0) >= 0.5 and len(np.unique(kernel(second, "plain"))) <= 4


def test_the_check_of_a_stage_fails_where_it_should(compressed):
    kernels = stages.kernels(to_tf_keras(compressed("prune_cluster").model))
    full = {name: np.random.default_rng(0).normal(size=kernel.shape) for name, kernel in kernels.items()}
    kernels.pop("top")  # was too small to cluster
    done, goals = dict.fromkeys(kernels, ""), {"final_sparsity": 0.6, "clusters": 7}
    stages.check("prune", done, full, kernels, set(), goals)
    for stage, message in (
        ("prune", "0.0% of its weights are zero, 60.0% were asked for"),
        ("prune_2_4", "more than two that are not zero"),
        ("cluster", "share of zeros fell|different values, 7 were asked for"),
        ("qat", "its share of zeros fell from 60.*% to 0.0%"),
    ):
        with pytest.raises(CheckFailed, match=message):
            stages.check(stage, done, kernels, full, {"pruned", "clustered"}, goals)
    with pytest.raises(CheckFailed, match="different values became"):
        stages.check("qat", done, kernels, full, {"clustered"}, goals)


def test_the_check_of_the_file_fails_where_it_should(compressed):
    rows = [dict(row) for row in compressed("pqat").stages]
    with pytest.raises(CheckFailed, match=r"is 60.*% zeros in the model, .*% in the .tflite"):
        stages.check_file(compressed("qat").tflite(), rows, {})
    with pytest.raises(CheckFailed, match="'plain' had 6 different values; in the .tflite"):
        stages.check_file(compressed("qat").tflite(), [dict(r) for r in compressed("qat").stages], {"plain": 6})


def test_kernels_before_a_relu_are_quantised_in_training(student):
    """tfmot alone would quantise no weights of a convolution with a ReLU layer behind it."""
    wrapped, _ = schemes.quantize(to_tf_keras(student), False, False)
    names = [v.name for v in wrapped.get_layer("quant_plain").weights]
    assert any("kernel_min" in name for name in names) and not any("post_activation" in name for name in names)
    assert look_inside(converted(wrapped, "logits"))[0]["plain"].dtype == np.int8


class Subclassed(keras.Model):
    """A model without a graph."""

    def call(self, x):
        return x[:, 0, 0]


def subclassed():
    model = Subclassed()
    model.build((None, 10, 10, 4))
    return model


@pytest.mark.parametrize(
    "change,message",
    [
        ({"scheme": "pruned"}, "Unknown scheme 'pruned'. Did you mean 'prune'"),
        ({"data": None}, "compress needs training examples"),
        ({"data": (np.zeros((4, 10, 10, 4)), np.zeros(3))}, "as many images as labels, received 4 and 3"),
        ({"data": (np.zeros((4, 9, 9, 4)), np.zeros(4))}, "expects batches of"),
        ({"data": tf.data.Dataset.from_tensors(0).repeat()}, "unknown, infinite or no length"),
        ({"epochs": 0}, "epochs expects 1 or more, received 0"),
        ({"distillation_weight": 1.5}, "distillation_weight expects a number from 0 to 1"),
        ({"final_sparsity": 80}, "final_sparsity expects a share between 0 and 1, received 80"),
        ({"clusters": 2}, "clusters expects 3 to 256"),
        ({"skip": ("frist",)}, "Unknown layer in skip 'frist'. Available: .*plain"),
        ({"skip": ("plain", "top")}, "The stage 'prune' can do nothing with this model. plain: left alone"),
        ({"student": subclassed()}, "is a subclassed model"),
        (
            {"teacher": keras.Sequential([keras.Input((10, 10, 4)), L.Flatten(), L.Dense(7)])},
            "4 classes, the teacher 7",
        ),
    ],
)
def test_bad_input(change, message):
    given = {"student": flat(), "scheme": "prune", "data": examples(24), "say": lambda text: None, **change}
    with pytest.raises(InputError, match=message):
        compress(**given)


def test_a_student_with_shared_and_nested_layers():
    shared = L.Dense(8, activation="relu", name="shared")
    inner = keras.Sequential([keras.Input((8,)), shared, L.Dense(8, name="own")], name="inner")
    x = keras.Input((10, 10, 4))
    y = L.Dense(8, name="in")(L.Flatten()(x))
    student = keras.Model(x, L.Dense(CLASSES, name="top")(inner(y) + shared(y)))
    result = compress(student, "prune", None, examples(48), batch_size=24, final_sparsity=0.5, say=lambda text: None)
    assert [row["layer"] for row in result.stages] == ["in", "inner.shared", "inner.own", "top"]
    assert len(result.model.weights) == len(student.weights) == 8
    assert {row["sparsity"] for row in result.stages} == {0.5}


def test_a_loss_that_is_not_finite_stops():
    with pytest.raises(CheckFailed, match="Lower learning_rate"):
        compress(flat(), "prune", None, examples(24), learning_rate=1e30, epochs=3, say=lambda text: None)
