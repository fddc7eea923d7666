"""Quantization-aware training starts from measured ranges, and is no worse than int8 after training without a word."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from keras import layers as L
from keras import ops
from support.compressing import QUIET, stage

from kdistill.compression import ranges, tfmot
from kdistill.compression.bridge import to_tf_keras
from kdistill.compression.compress import compress
from kdistill.compression.inputs import batches_of
from kdistill.compression.quantized_file import convert_quantized
from kdistill.data.splits import Examples, Splits
from kdistill.errors import CheckFailed, FileRefused, InputError
from kdistill.evaluation.evaluate import predict
from kdistill.tflite.flatbuffer import parse, stayed_float
from kdistill.tflite.interpreter import File

pytestmark = pytest.mark.slow
SHAPE, CLASSES = (12, 12, 3), 4


def examples(count=384, seed=0, classes=CLASSES):
    """Noisy copies of one pattern for each class; bright, so that pixels minus their mean are far from zero."""
    patterns = np.random.default_rng(9).uniform(0, 255, (classes, *SHAPE))
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count).astype("int32")
    images = patterns[labels] + generator.normal(0, 40, (count, *SHAPE))
    return Examples(np.clip(images, 0, 255).astype("uint8"), labels)


def functional(build):
    image = keras.Input(SHAPE, name="image")
    return keras.Model(image, build(image), name="student")


def convolutions(x, head_scale=1.0, activation=None):
    """Three kernels, whose activations are as wide as what comes in."""
    x = L.Conv2D(8, 3, strides=2, activation="relu", kernel_initializer="he_normal", name="first")(x)
    x = L.Conv2D(8, 3, kernel_initializer="he_normal", name="second")(x)
    x = L.GlobalAveragePooling2D()(L.ReLU()(x))
    start = keras.initializers.RandomNormal(stddev=0.3 * head_scale)
    return L.Dense(CLASSES, kernel_initializer=start, activation=activation, name="top")(x)


def residual(image):
    x = L.Conv2D(8, 3, padding="same", name="first")(L.Rescaling(1.0, [-90.0, -110.0, -120.0])(image))
    y = L.ReLU()(L.BatchNormalization(momentum=0.8)(L.Conv2D(8, 3, padding="same", name="second")(x)))
    return L.Dense(CLASSES, name="top")(L.Flatten()(L.AveragePooling2D(4)(x + 3.0 * y)))


def adapted():
    normalization = L.Normalization()
    normalization.adapt(examples().images.astype("float32"))
    return functional(lambda image: convolutions(30.0 * normalization(image)))


STUDENTS = {
    "keras.applications: blue first, minus the mean": lambda: functional(
        lambda image: convolutions(keras.applications.vgg16.preprocess_input(image))
    ),
    "pixels as they are": lambda: functional(convolutions),
    "tiny activations": lambda: functional(lambda image: convolutions(L.Rescaling(1e-3)(image))),
    "wide logits": lambda: functional(lambda image: convolutions(L.Rescaling(1 / 32, -4.0)(image), head_scale=30.0)),
    "a softmax of wide logits": lambda: functional(
        lambda image: convolutions(L.Rescaling(1 / 32, -4.0)(image), head_scale=30.0, activation="softmax")
    ),
    "a sum of wide branches": lambda: functional(residual),
    "adapted normalization, then wider": adapted,
}


def fitted(model, rate=1e-3):
    """The model, trained to more than 90 % of right classes."""
    data = examples()
    probabilities = model.layers[-1].activation is keras.activations.softmax
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not probabilities)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(data.images.astype("float32"), data.labels, batch_size=32, epochs=12, verbose=0)
    return model


def accuracy(outputs, data):
    return np.mean(outputs.argmax(axis=1) == data.labels)


def outputs_of(content, images, folder):
    path = folder / "student.tflite"
    path.write_bytes(content)
    return File(path).predict(images)


def wrapped(student, data, batch_size=64):
    """The student in tfmot's wrappers, and its batches."""
    network, _ = tfmot.quantize(to_tf_keras(student), False, False)
    return network, batches_of(data, batch_size, 0, (None, *SHAPE), None)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", STUDENTS)
def test_quantization_aware_training_keeps_what_a_student_knows(kind, tmp_path):
    keras.utils.set_random_seed(3)
    student, test = fitted(STUDENTS[kind](), rate=1e-2 if kind == "tiny activations" else 1e-3), examples(300, seed=5)
    before = predict(student, test.images)
    assert accuracy(before, test) > 0.9
    result = compress(student, stage("qat", batch_size=64), None, examples(), **QUIET)
    outputs = outputs_of(result.tflite(), test.images, tmp_path)
    assert np.mean(outputs.argmax(axis=1) == before.argmax(axis=1)) > 0.97
    assert result.refusal is None and result.notes == []


def test_ranges_are_those_of_the_float_network():
    """By hand: means over groups of 128 images of the extremes of every layer, whatever the batch size."""
    keras.utils.set_random_seed(0)
    image = keras.Input(SHAPE)
    x = L.Conv2D(4, 3, name="plain")(L.Rescaling(1.0, -100.0, name="center")(image))
    x = L.Conv2D(4, 3, activation="relu", name="fused")(x)
    x = L.ReLU(name="relu")(L.BatchNormalization(name="norm")(L.Conv2D(4, 3, name="before")(x)))
    x = L.Activation("sigmoid", name="sigmoid")(L.Flatten(name="flat")(x))
    student = keras.Model(image, L.Dense(3, activation="softmax", name="top")(x))
    student.get_layer("norm").set_weights([np.full(4, v, "float32") for v in (0.01, 0.5, 3.0, 2.0)])
    data = examples(256, classes=3)
    network, batches = wrapped(student, data, batch_size=32)
    images = np.concatenate([images.numpy() for images, _ in batches.of_epoch(0)])
    assert ranges.measure(network, batches) > 6

    def extremes(tensor, groups=2):
        values = keras.Model(student.input, tensor).predict(images, verbose=0).reshape(groups, -1)
        return min(0, values.min(axis=1).mean()), max(0, values.max(axis=1).mean())

    scores = L.Dense(3)
    scores.build((None, student.get_layer("flat").output.shape[1]))
    scores.set_weights(student.get_layer("top").get_weights())
    measured = {}
    for variable in network.variables:
        layer, _, name = variable.name.removesuffix(":0").partition("/")
        for end in ("_min", "_max"):
            if name.endswith(end):
                measured.setdefault((layer, name.removesuffix(end)), {})[end] = variable.numpy()
    # tfmot numbers this layer by how many there have been in the process.
    pixels = measured.pop(next(key for key in measured if key[0].startswith("quantize_layer")))
    assert (pixels["_min"], pixels["_max"]) == (min(0, images.min()), images.max())
    expected = {
        "quant_center": student.get_layer("center").output + 100.0,  # its scale; the offset is a layer of its own
        "quant_center.offset": student.get_layer("center").output,
        "quant_plain": student.get_layer("plain").output,
        "quant_fused": student.get_layer("fused").output,
        "quant_relu": student.get_layer("relu").output,
        "quant_top": scores(student.get_layer("sigmoid").output),  # before the softmax
    }
    activations = {layer: pair for (layer, name), pair in measured.items() if "kernel" not in name}
    assert set(expected) <= set(activations)
    for layer, tensor in expected.items():
        pair = activations[layer]
        assert (pair["_min"], pair["_max"]) == pytest.approx(extremes(tensor), rel=1e-4, abs=1e-4), layer
    for name in ("plain", "fused", "before"):
        kernel = np.abs(np.asarray(student.get_layer(name).kernel)).reshape(-1, 4).max(axis=0)
        np.testing.assert_allclose(measured[(f"quant_{name}", "kernel")]["_max"], kernel, rtol=1e-6)
        np.testing.assert_allclose(measured[(f"quant_{name}", "kernel")]["_min"], -kernel, rtol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("scheme", ["pqat", "cqat", "pcqat"])
def test_zeros_and_clusters_are_kept_with_wide_activations(scheme, tmp_path):
    keras.utils.set_random_seed(3)
    student, test = fitted(STUDENTS["pixels as they are"]()), examples(300, seed=5)
    goals = {"final_sparsity": 0.4} if "p" in scheme[:2] else {}
    result = compress(student, stage(scheme, batch_size=32, learning_rate=1e-3, **goals), student, examples(), **QUIET)
    outputs, model = outputs_of(result.tflite(), test.images, tmp_path), predict(result.model, test.images)
    assert np.mean(outputs.argmax(axis=1) == model.argmax(axis=1)) > 0.97


def test_a_layer_that_is_always_zero_keeps_a_range():
    student = functional(lambda image: L.Dense(4)(L.Flatten()(L.Conv2D(2, 3, activation="relu", name="dead")(image))))
    student.get_layer("dead").bias.assign([-1e6, -1e6])
    network, batches = wrapped(student, examples(64))
    ranges.measure(network, batches)
    values = {v.name: v.numpy() for v in network.get_layer("quant_dead").variables if "post_activation" in v.name}
    assert list(values.values()) == [-6, 6]
    assert np.isfinite(network(np.zeros((1, *SHAPE), "float32"))).all()


def test_activations_that_are_not_finite_are_named():
    student = functional(lambda image: L.Dense(4)(L.Flatten()(L.Conv2D(2, 3, name="large")(L.Rescaling(1.0)(image)))))
    student.get_layer("large").kernel.assign(np.full((3, 3, 3, 2), 1e38))
    network, batches = wrapped(student, examples(64))
    with pytest.raises(CheckFailed, match="activations of layer 'large' are NaN or infinite on the training images"):
        ranges.measure(network, batches)


def test_tfmot_computes_as_ever_after_the_measurement():
    network, batches = wrapped(STUDENTS["pixels as they are"](), examples(64))
    calls = {kind: kind.__call__ for kind in (tfmot.quantization.quantizers.MovingAverageQuantizer,)}
    ranges.measure(network, batches)
    assert all(kind.__call__ is call for kind, call in calls.items())
    assert len(np.unique(network(np.ones((1, *SHAPE), "float32") * 200, training=False))) <= 4


# -- against int8 after training --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    keras.utils.set_random_seed(3)
    return fitted(STUDENTS["pixels as they are"]())


@pytest.fixture
def unmeasured(monkeypatch):
    """tfmot as it is: ranges of -6..6."""
    monkeypatch.setattr(ranges, "measure", lambda network, batches: 0)


FIGURES = (
    r"a file with [0-9.]+% of 150 validation images right, int8 after training one with (9|100).* in float32; limit: "
    r"0.5 points, p = .*Use the scheme 'int8'"
)


def with_validation():
    data = examples()
    return Splits(data, examples(150, seed=8), data, tuple("abcd"), "here", "0")


@pytest.mark.exhaustive
@pytest.mark.parametrize("check", ["raise", "warn", None])
def test_a_file_that_is_worse_than_int8_after_training_is_refused(check, wide, unmeasured):
    lines = []
    arguments = {"teacher": None, "data": with_validation(), "say": lines.append}
    if check == "raise":
        with pytest.raises(CheckFailed, match=FIGURES) as raised:
            compress(wide, stage("qat"), **arguments)
        figures = raised.value.check
        assert (
            figures["int8_accuracy"] - figures["accuracy"] == pytest.approx(figures["drop"]) and figures["drop"] > 0.1
        )
        assert isinstance(raised.value, FileRefused) and figures["lost"] > figures["gained"]
        return
    if check == "warn":
        with pytest.warns(UserWarning, match=FIGURES):
            result = compress(wide, stage("qat"), **arguments, check=check)
    else:
        result = compress(wide, stage("qat"), **arguments, check=check)
    assert isinstance(result.refusal, FileRefused) and len(result.tflite()) == result.refusal.size
    assert "% of 150 validation images right in int8, " in lines[-1]


@pytest.mark.exhaustive
def test_chance_refuses_no_file(wide, unmeasured):
    """One of three images is a loss of 33 points, and no proof."""
    data = examples(3)
    result = compress(wide, stage("qat"), None, Splits(data, data, data, tuple("abcd"), "here", "0"), **QUIET)
    (note,) = result.notes
    assert result.refusal is None and note.endswith("Chance allows this difference.") and "of 3 validation" in note


@pytest.mark.exhaustive
def test_examples_without_labels_cannot_tell(wide):
    data = examples(48)
    unlabeled = Examples(data.images, np.full(48, -1, "int32"))
    result = compress(wide, stage("qat"), None, unlabeled, mean=0, std=1, **QUIET)
    assert result.notes == ["No example has a label: the file was not compared with int8 after training."]


def test_an_unknown_check_is_refused(wide):
    with pytest.raises(InputError, match="check expects 'raise', 'warn' or None, received 'no'"):
        compress(wide, stage("qat"), None, examples(24), check="no", **QUIET)


# -- layers that tfmot does not quantize -------------------------------------------------------------------------


def with_layer(layer):
    """A student with a layer behind a convolution."""
    return functional(lambda image: L.Dense(4)(L.Flatten()(layer(L.Conv2D(8, 3)(L.Rescaling(1.0, -100.0)(image))))))


def over_rows(*layers):
    """A student that reads the rows of an image one after the other."""
    return keras.Sequential([keras.Input(SHAPE), L.Rescaling(1 / 255), L.Reshape((12, 36)), *layers, L.Dense(4)])


def transformer(image):
    x = L.Dense(16)(L.Reshape((12, 36))(L.Rescaling(1 / 255)(image)))
    y = L.LayerNormalization()(x)
    x = x + L.MultiHeadAttention(2, 8)(y, y)
    y = L.Dense(16)(L.Dense(32, activation="gelu")(L.LayerNormalization()(x)))
    return L.Dense(4)(L.GlobalAveragePooling1D()(x + y))


RUNNING = {
    "group normalization; with one group; of every channel": lambda: with_layer(
        keras.Sequential(
            [
                keras.Input((10, 10, 8)),
                L.GroupNormalization(4),
                L.GroupNormalization(1, scale=False),
                L.GroupNormalization(-1, center=False),
            ]
        )
    ),
    "layer normalization": lambda: with_layer(L.LayerNormalization()),
    "PReLU": lambda: with_layer(L.PReLU(shared_axes=[1, 2])),
    "an unrolled GRU": lambda: over_rows(L.GRU(6, unroll=True)),
    "an unrolled LSTM, both ways": lambda: over_rows(L.Bidirectional(L.LSTM(6, unroll=True))),
    "Conv1D": lambda: over_rows(L.Conv1D(6, 3), L.GlobalAveragePooling1D()),
    "a transformer": lambda: functional(transformer),
}


@pytest.mark.exhaustive(
    "PReLU",
    "a transformer",
    "an unrolled GRU",
    "an unrolled LSTM, both ways",
    "group normalization; with one group; of every channel",
    "layer normalization",
)
@pytest.mark.parametrize("kind", RUNNING)
def test_other_layers_give_a_file_that_runs(kind, tmp_path):
    """At batch 1 and more, and with the outputs of the student."""
    keras.utils.set_random_seed(0)
    student, data = RUNNING[kind](), examples(64)
    result = compress(student, stage("qat", batch_size=32), student, data, distillation_weight=1.0, **QUIET)
    path = tmp_path / "student.tflite"
    path.write_bytes(result.tflite())
    file, expected = File(path), predict(student, data.images)
    outputs = file.predict(data.images)
    assert np.abs(outputs - expected).max() < 0.25 * np.ptp(expected)
    np.testing.assert_array_equal(file.predict(data.images[:1]), outputs[:1])
    assert stayed_float(parse(result.tflite()), "int8")


class Untouched(keras.callbacks.Callback):
    """Fails if anything trains."""

    def on_train_begin(self, logs=None):
        raise AssertionError("training began")


def refusal(student, scheme="qat", **options):
    data = examples(24)
    with pytest.raises(InputError) as raised:
        compress(student, stage(scheme), None, data, callbacks=[Untouched()], **QUIET, **options)
    return str(raised.value)


LOOPS = {
    "gru": lambda: over_rows(L.GRU(6, name="gru")),
    "both": lambda: over_rows(L.Bidirectional(L.LSTM(6), name="both")),
    "stacked": lambda: over_rows(L.RNN([L.LSTMCell(4), L.GRUCell(4)], name="stacked")),
    "pictures": lambda: keras.Sequential(
        [keras.Input(SHAPE), L.Reshape((3, 4, 12, 3)), L.ConvLSTM2D(2, 3, name="pictures"), L.Flatten(), L.Dense(4)]
    ),
}


@pytest.mark.exhaustive(
    but=(
        "qat-stacked",
        "pcqat-both",
    )
)
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("scheme", ["qat", "pcqat"])
def test_recurrent_layers_are_refused_before_any_training(name, scheme):
    message = refusal(LOOPS[name](), scheme)
    assert f"'{scheme}' cannot quantize the loop over time steps in '{name}'. Build a model" in message
    assert "unroll=True" in message and message.endswith("or use 'prune' or 'cluster', which do not quantize.")


@pytest.mark.exhaustive
def test_a_file_that_would_not_run_is_refused_before_any_training():
    """tfmot has no scheme for these, and the converter, or the interpreter, refuses them."""
    gamma = with_layer(L.Lambda(lambda x: tf.math.lgamma(x * x + 1.0), name="gamma"))
    message = refusal(gamma)
    assert (
        "'student' would not run after quantization-aware training" in message and "'gamma' (KerasOperation)" in message
    )
    masked = {L.GroupNormalization: lambda layer: tf_keras.layers.GroupNormalization(layer.groups)}
    message = refusal(with_layer(L.GroupNormalization(4, name="groups")), "pqat", handlers=masked)
    assert "does not run on 1 images" in message and "'groups' (GroupNormalization)" in message


def test_harmless_operations_need_no_trial():
    student = functional(lambda image: convolutions(ops.maximum(L.Rescaling(1 / 32)(image) * 2.0 + 1.0, 0.5)))
    assert tfmot.unusual(to_tf_keras(student)) == []
    assert [layer.name for layer in tfmot.unusual(to_tf_keras(with_layer(L.LayerNormalization(name="norm"))))] == [
        "norm"
    ]


def test_kernels_without_a_scheme_do_not_hide_a_file_that_runs():
    network, _ = tfmot.quantize(to_tf_keras(RUNNING["PReLU"]()), False, False)
    assert convert_quantized(network, "logits")[4:8] == b"TFL3"
