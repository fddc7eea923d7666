"""Every scheme on a small student: its promises are in the weights, in the table and in the file."""

import zlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers as L
from support.compressing import CLASSES, QUIET, examples, flat, kernel, network, row, stage

from kdistill.compression import checks, tfmot
from kdistill.compression.bridge import to_tf_keras
from kdistill.compression.compress import compress
from kdistill.compression.quantized_file import convert_quantized
from kdistill.conversion.export import export
from kdistill.errors import CheckFailed, InputError
from kdistill.networks import architectures
from kdistill.recipe import SCHEMES, Data, Network, Stage, Term
from kdistill.tflite.flatbuffer import float_operators_by_layer, kernels_by_layer, parse, stayed_float
from kdistill.tflite.interpreter import File

pytestmark = pytest.mark.slow


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
    results = {}

    def get(scheme):
        if scheme not in results:
            goals = {"final_sparsity": 0.6} if "prune" in SCHEMES[scheme] else {}
            goals |= {"clusters": 7} if "cluster" in SCHEMES[scheme] else {}
            values = stage(scheme, epochs=2, learning_rate=2e-3, **goals)
            results[scheme] = compress(student, values, student, examples(), **QUIET)
        return results[scheme]

    return get


@pytest.mark.exhaustive("cqat", "pcqat", "pqat", "prune", "prune_2_4", "prune_cluster", "qat")
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
            assert checks.values_per_channel(kernel(result, name)) <= 7
    if "cluster" in parts and "prune" in parts:
        assert row(result, "top")["clustered"].startswith("too small: ")
    if "qat" in parts or scheme == "int8":
        assert {row["quantized"] for row in result.layers} == {"yes"}
        path = tmp_path / "student.tflite"
        path.write_bytes(result.tflite())
        file = File(path)
        assert (file.input["type"], file.output["type"], file.output["name"]) == ("float32", "float32", "logits")
        assert np.mean(file.predict(test.images).argmax(-1) == test.labels) > 0.85
        operators = set(file.operators())
        assert not operators & {"DELEGATE"} and {"CONV_2D", "DEPTHWISE_CONV_2D", "QUANTIZE"} <= operators
    else:
        with pytest.raises(InputError, match=f"'{scheme}' quantizes nothing.*qat, pqat"):
            result.tflite()


@pytest.mark.exhaustive
def test_two_of_four_lies_along_the_input_channels(compressed):
    rows = kernel(compressed("prune_2_4"), "plain").transpose(0, 1, 3, 2).reshape(-1, 4)
    assert (np.count_nonzero(rows, axis=1) == 2).all()


@pytest.mark.exhaustive
def test_zeros_and_clusters_are_in_the_file(compressed):
    file = parse(compressed("pcqat").tflite())
    weights, floats = kernels_by_layer(file), float_operators_by_layer(file)
    assert floats == {} and weights["plain"].dtype == np.int8
    assert np.mean(weights["plain"] == 0) >= 0.59
    assert checks.values_per_channel(weights["plain"], axis=0) <= 7
    loose = kernels_by_layer(parse(compressed("qat").tflite()))
    assert np.mean(loose["plain"] == 0) < 0.2


@pytest.mark.exhaustive
def test_qat_alone_preserves_an_earlier_compression_and_says_so(compressed):
    lines = []
    before = compressed("prune_cluster").model
    after = compress(before, stage("qat"), None, examples(), say=lines.append)
    assert after.notes == ["The student is already clustered and pruned: qat preserves that."]
    assert lines[0] == after.notes[0]
    for name in ("first", "plain", "top"):
        assert np.mean(kernel(after, name) == 0) == pytest.approx(0.6, abs=0.01)
    assert checks.values_per_channel(kernel(after, "plain")) <= 7
    assert np.abs(kernel(after, "plain") - np.asarray(before.get_layer("plain").kernel)).max() > 0


def odd():
    x = keras.Input((10, 10, 4))
    y = L.Conv2D(8, 3, activation="hard_swish", name="swish")(L.Rescaling(1 / 255)(x))
    y = L.Conv2D(8, 1, activation="hard_sigmoid", name="gate")(L.GlobalAveragePooling2D(keepdims=True)(y)) * y
    y = L.SeparableConv2D(8, 3, name="sep")(L.BatchNormalization(name="lonely")(y))
    y = L.PReLU(shared_axes=[1, 2], name="prelu")(y) + y
    return keras.Model(x, L.Dense(CLASSES, name="top")(L.Flatten()(y)), name="odd")


@pytest.mark.exhaustive
def test_nothing_is_lost_quietly():
    result = compress(odd(), stage("pqat", final_sparsity=0.5), None, examples(48), **QUIET)
    assert row(result, "swish")["quantized"] == "yes" and row(result, "gate")["quantized"] == "yes"
    assert row(result, "sep.pointwise")["pruned"] == "yes" and row(result, "sep.pointwise")["sparsity"] == 0.5
    assert row(result, "sep")["pruned"] == "DepthwiseConv2D layers are not pruned"
    assert row(result, "prelu")["quantized"] == "tfmot has no 8-bit scheme for PReLU layers"
    assert "computes in float" in row(result, "lonely")["quantized"]
    assert np.mean(np.asarray(result.model.get_layer("sep").pointwise_kernel) == 0) == 0.5


@pytest.mark.exhaustive
def test_a_residual_network_is_all_int8():
    """Other architectures, which take minutes: benchmarks/architectures.py."""
    model = architectures.build(Network("resnet", {"depth": 8}), (32, 32, 3), CLASSES)
    images = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype("uint8")
    result = compress(model, stage("qat", batch_size=8), model, (images, np.arange(16) % CLASSES), **QUIET)
    assert {row["quantized"] for row in result.layers} == {"yes"} and len(result.layers) == 19
    assert stayed_float(parse(result.tflite()), "int8") == []


def test_skipped_layers():
    student = flat()
    result = compress(student, stage("prune", skip=("top",)), None, examples(48), **QUIET)
    assert row(result, "top")["pruned"] == "skipped (skip)" and row(result, "top")["sparsity"] == 0
    result = compress(student, stage("cluster", clusters=32), None, examples(48), **QUIET)
    assert row(result, "top")["clustered"].startswith("too small: 32 weights for 32 clusters")
    assert row(result, "plain")["clusters"] <= 32 and row(result, "top")["clusters"] == 32


@pytest.mark.exhaustive
def test_a_layer_outside_a_step_keeps_its_zeros_and_clusters():
    both = stage("prune_cluster", learning_rate=1e-2, final_sparsity=0.5, clusters=4)
    first = compress(flat(), both, None, examples(48), **QUIET)
    assert row(first, "top")["clustered"] == "yes" and np.mean(kernel(first, "top") == 0) == 0.5
    second = compress(first.model, stage("qat", learning_rate=1e-2, skip=("top",)), None, examples(48), **QUIET)
    np.testing.assert_array_equal(kernel(first, "top"), kernel(second, "top"))
    assert np.mean(kernel(second, "plain") == 0) >= 0.5 and len(np.unique(kernel(second, "plain"))) <= 4


def test_the_check_of_a_step_fails_where_it_should(compressed):
    kernels = checks.kernels(to_tf_keras(compressed("prune_cluster").model))
    full = {name: np.random.default_rng(0).normal(size=kernel.shape) for name, kernel in kernels.items()}
    kernels.pop("top")  # was too small to cluster
    done, goals = dict.fromkeys(kernels, ""), tfmot.Goals(0.6, 7)
    checks.check_step("prune", done, full, kernels, set(), goals)
    for step, message in (
        ("prune", "0.0% of its weights are zero instead of 60.0%"),
        ("prune_2_4", "more than two that are not zero"),
        ("cluster", "share of zeros fell|different values instead of 7"),
        ("qat", "its share of zeros fell from 60.*% to 0.0%"),
    ):
        with pytest.raises(CheckFailed, match=message):
            checks.check_step(step, done, kernels, full, {"pruned", "clustered"}, goals)
    with pytest.raises(CheckFailed, match="different values became"):
        checks.check_step("qat", done, kernels, full, {"clustered"}, goals)


def test_the_check_of_the_file_fails_where_it_should(compressed):
    pruned = checks.kernels(to_tf_keras(compressed("pqat").model))
    checks.check_file(compressed("pqat").tflite(), pruned, {})
    with pytest.raises(CheckFailed, match=r"lost the compression of layer 'first'.*60.*% of them zero"):
        checks.check_file(compressed("qat").tflite(), pruned, {})
    clustered = checks.kernels(to_tf_keras(compressed("cluster").model))
    with pytest.raises(CheckFailed, match="lost the compression of layer 'first'.* different values in a channel"):
        checks.check_file(compressed("qat").tflite(), clustered, {"first", "plain"})


def test_a_file_is_the_same_whatever_was_quantized_before(student):
    """tfmot numbers its layers by process; their names are in the file."""
    first, second = (convert_quantized(tfmot.quantize(to_tf_keras(student), False, False)[0], "logits") for _ in "12")
    assert first == second


def test_kernels_before_a_relu_are_quantized_in_training(student):
    """tfmot alone would quantize no weights of a convolution with a ReLU layer behind it."""
    wrapped, _ = tfmot.quantize(to_tf_keras(student), False, False)
    names = [v.name for v in wrapped.get_layer("quant_plain").weights]
    assert any("kernel_min" in name for name in names) and not any("post_activation" in name for name in names)
    assert kernels_by_layer(parse(convert_quantized(wrapped, "logits")))["plain"].dtype == np.int8


@pytest.mark.exhaustive
def test_activations_of_layers_compute_in_int8():
    """tfmot by itself learns no range for what goes into a swish."""
    names = ("relu", "relu6", "sigmoid", "tanh", "silu", "gelu", "hard_sigmoid", "hard_swish")
    stack = [L.Conv2D(4, 1, activation=name, name=name) for name in names]
    student = keras.Sequential([keras.Input((10, 10, 4)), L.Rescaling(1 / 255), *stack, L.Flatten(), L.Dense(CLASSES)])
    result = compress(student, stage("qat"), None, examples(24), **QUIET)
    assert stayed_float(parse(result.tflite()), "int8") == []
    assert {row["quantized"] for row in result.layers} == {"yes"}


class Subclassed(keras.Model):
    """A model without a graph."""

    def call(self, x):
        return 9 * x[:, 0, 0] - 4  # negative numbers too: logits


def subclassed():
    model = Subclassed()
    model.build((None, 10, 10, 4))
    return model


@pytest.mark.parametrize(
    "change,message",
    [
        ({"stage": "pruned"}, "Unknown scheme 'pruned'. Did you mean 'prune'"),
        ({"stage": 3}, "stage expects a kdistill.Stage or the name of a scheme, received 3"),
        ({"epoch": 3}, "Unknown argument of compress 'epoch'. Did you mean 'epochs'"),
        ({"stage": Stage("prune"), "epochs": 3}, r"epochs belongs into the Stage. Write kdistill.Stage\("),
        ({"data": None}, "compress needs training examples"),
        ({"data": (np.zeros((4, 10, 10, 4)), np.zeros(3))}, "as many images as labels, received 4 and 3"),
        ({"data": (np.zeros((4, 9, 9, 4)), np.zeros(4))}, "expects batches of"),
        ({"data": tf.data.Dataset.from_tensors(0).repeat()}, "unknown, infinite or no length"),
        ({"stage": Stage("prune", epochs=0)}, "'stage.epochs' expects 1 or more, received 0"),
        ({"stage": Stage("prune", batch_size="8")}, "'stage.batch_size' expects 1 or more, received '8'"),
        ({"stage": Stage("prune", learning_rate="1")}, "'stage.learning_rate' expects a number above 0 or a schedule"),
        ({"distillation_weight": 1.5}, "'distillation_weight' expects a number from 0 to 1"),
        (
            {"stage": Stage("prune", final_sparsity=80)},
            "'stage.final_sparsity' expects a share between 0 and 1, received 80",
        ),
        ({"stage": Stage("cluster", clusters=2)}, "'stage.clusters' expects a number from 3 to 256"),
        (
            {"stage": Stage("prune", clusters=8)},
            "'stage.clusters' expects none in the scheme 'prune', .* .cluster, prune_cluster, cqat, pcqat use it",
        ),
        (
            {"stage": Stage("qat", layer_sparsity={"plain": 0.5})},
            "'stage.layer_sparsity.plain' expects none in the scheme 'qat'",
        ),
        (
            {"stage": Stage("prune", layer_sparsity={"plain": 5})},
            "'stage.layer_sparsity.plain' expects a share between 0 and 1, received 5",
        ),
        (
            {"stage": Stage("prune", layer_sparsity={"plian": 0.5})},
            "Unknown layer in layer_sparsity 'plian'. Did you mean 'plain'",
        ),
        ({"terms": {"near": Term("mse_logits")}}, "'near' does nothing without a teacher"),
        (
            {"teacher": flat(), "terms": {"hint": Term("hint", student_tap="plain", teacher_tap="plain")}},
            "'hint' compares layers",
        ),
        ({"temperature": "4"}, "'temperature' expects a number above 0, or a schedule, received '4'"),
        ({"data": tf.data.Dataset.from_tensors((np.zeros((4, 10, 10, 4)), np.zeros(4))), "augment": Data()}, "augment"),
        ({"temperature": 3.0, "teacher": flat(), "terms": {"kd": Term("mse_logits")}}, "'temperature' expects None"),
        ({"stage": Stage("prune", skip=("frist",))}, "Unknown layer in skip 'frist'. Available: .*plain"),
        (
            {"stage": Stage("prune", skip=("plain", "top"))},
            "The step 'prune' can do nothing with this model. plain: skipped",
        ),
        ({"stage": Stage("qat", skip=("plain", "top"))}, "skip names every layer with weights"),
        ({"student": subclassed()}, "is a subclassed model"),
        (
            {"teacher": keras.Sequential([keras.Input((10, 10, 4)), L.Flatten(), L.Dense(7)])},
            "4 classes, the teacher 7",
        ),
    ],
)
def test_bad_input(change, message):
    arguments = {"student": flat(), "stage": "prune", "data": examples(24), **QUIET, **change}
    with pytest.raises(InputError, match=message):
        compress(**arguments)


def test_a_scheme_by_name_has_the_defaults_of_a_stage():
    student = flat()
    by_name, by_value = (compress(student, s, None, examples(48), **QUIET) for s in ("prune", Stage("prune")))
    assert by_name.history == by_value.history and len(by_name.history["prune"]["loss"]) == Stage.epochs


def test_single_layers_have_goals_of_their_own():
    goals = {"final_sparsity": 0.5, "layer_sparsity": {"top": 0.25}, "clusters": 8, "layer_clusters": {"plain": 5}}
    result = compress(flat(), stage("prune_cluster", **goals), None, examples(48), **QUIET)
    assert row(result, "plain")["sparsity"] == 0.5 and row(result, "top")["sparsity"] == 0.25
    assert row(result, "plain")["clusters"] == 5 and "24 weights" in row(result, "top")["clustered"]


def test_every_step_has_its_table_and_sizes(compressed):
    result = compressed("pcqat")
    assert list(result.tables) == ["prune", "cluster", "qat"] and result.tables["qat"] is result.layers
    assert "clustered" not in result.tables["prune"][0] and "pruned" in result.tables["prune"][0]
    sizes = result.sizes
    assert list(sizes) == ["student", "prune", "cluster", "qat", "tflite"]
    assert len({sizes[name]["bytes"] for name in ("student", "prune", "cluster", "qat")}) == 1
    assert sizes["cluster"]["deflated"] < sizes["prune"]["deflated"] < sizes["student"]["deflated"]
    content = result.tflite()
    assert sizes["tflite"] == {"bytes": len(content), "deflated": len(zlib.compress(content, 9))}


@pytest.mark.exhaustive("reference-prune_2_4", "reference-prune_cluster")
@pytest.mark.parametrize("scheme", ["prune_2_4", "prune_cluster"])
@pytest.mark.parametrize("profile", ["reference", "npu"])
def test_zeros_and_clusters_are_in_every_export(compressed, scheme, profile, tmp_path):
    result = compressed(scheme)
    export(result.model, tmp_path / "a.tflite", profile, examples(100).images)
    counts = result.check_file((tmp_path / "a.tflite").read_bytes())
    assert set(counts) == {"first", "plain", "top"}
    for count in counts.values():
        assert count["sparsity"] >= 0.49
        if scheme == "prune_2_4":
            assert count["two_of_four"] == 1.0
    if scheme == "prune_cluster":
        assert counts["plain"]["clusters_per_channel"] <= 7
    export(keras.models.clone_model(result.model), tmp_path / "b.tflite", profile, examples(100).images)
    with pytest.raises(CheckFailed, match="has lost the compression of layer"):
        result.check_file((tmp_path / "b.tflite").read_bytes())


def test_a_file_must_have_every_single_zero_and_cluster():
    values = np.array([[[0, 1, 2, 2]], [[0, 3, 3, 0]]], "int8")
    kernel = np.array([[0, 0.1, 0.2, 0.2], [0, 0.4, 0.4, 0]], "float32")
    assert checks.preserves(values, kernel, True)
    assert not checks.preserves(np.where(values == 1, 0, values), np.where(kernel == 0.2, 0, kernel), True)
    changed = values.copy()
    changed[0, 0, 3] = 1
    assert checks.preserves(changed, kernel, False) and not checks.preserves(changed, kernel, True)


def test_a_student_with_shared_and_nested_layers():
    shared = L.Dense(8, activation="relu", name="shared")
    inner = keras.Sequential([keras.Input((8,)), shared, L.Dense(8, name="own")], name="inner")
    x = keras.Input((10, 10, 4))
    y = L.Dense(8, name="in")(L.Flatten()(x))
    student = keras.Model(x, L.Dense(CLASSES, name="top")(inner(y) + shared(y)))
    result = compress(student, stage("prune", final_sparsity=0.5), None, examples(48), **QUIET)
    assert [row["layer"] for row in result.layers] == ["in", "inner.shared", "inner.own", "top"]
    assert len(result.model.weights) == len(student.weights) == 8
    assert {row["sparsity"] for row in result.layers} == {0.5}
