"""Files of any model: inputs and outputs by name, the numbers of Keras, and limits by head, in every profile."""

import hashlib
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.any_models import audio, segmentation, table, tagging, text, two_heads, two_inputs

import kdistill
from kdistill.conversion.comparison import compare_heads, mean_p_value
from kdistill.conversion.export import export
from kdistill.conversion.verify import check
from kdistill.errors import FileRefused, InputError
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.networks.heads import CLASSES, LABELS, NUMBERS, Head
from kdistill.recipe import Profile
from kdistill.recipe.loading import load_profile
from kdistill.tflite import metadata
from kdistill.tflite.benchmark import benchmark
from kdistill.tflite.inspection import inspect, lines
from kdistill.tflite.interpreter import File

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (64, 8, 8, 1)).astype("uint8")
TOKENS = RNG.integers(0, 20, (64, 6)).astype("int32")
ROWS = RNG.normal(size=(64, 5)).astype("float32")
PAIR = {"a": RNG.normal(size=(64, 8)).astype("float32"), "b": RNG.integers(0, 3, (64, 3)).astype("int32")}
SOUNDS = RNG.normal(size=(64, 32, 1)).astype("float32")
ANY = ("reference", "phone_cpu", "phone_gpu", "npu")
NEAR = {"reference": 1e-4, "phone_gpu": 0.01, "phone_cpu": 0.05, "npu": 0.05}  # of the range of the output


def scaled_masks():
    return keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Rescaling(1 / 255), *segmentation().layers, layers.Softmax()]
    )


def four_heads():
    row = keras.Input((5,))
    x = layers.Dense(8, "relu")(row)
    ends = {"kind": (3, "softmax"), "price": (1, None), "is_new": (1, "sigmoid"), "tags": (3, None)}
    return keras.Model(row, {name: layers.Dense(*end, name=name)(x) for name, end in ends.items()})


# model, inputs, labels, head, the names of the file's inputs and outputs, the profiles that take it
CASES = {
    "segmentation": (scaled_masks, IMAGES, RNG.integers(-1, 3, (64, 8, 8)), None, "image -> probabilities", ANY),
    "tagging": (tagging, TOKENS, RNG.integers(0, 3, (64, 6)), None, "input -> logits", ("phone_gpu",)),
    "text": (text, TOKENS, RNG.integers(0, 4, 64), None, "input -> logits", ANY),
    "audio": (audio, SOUNDS, RNG.integers(0, 4, 64), None, "input -> logits", ANY),
    "two inputs": (two_inputs, PAIR, RNG.integers(0, 4, 64), None, "a b -> logits", ANY),
    "binary": (lambda: table(1, "sigmoid"), ROWS, RNG.integers(0, 2, 64), None, "input -> labels", ("npu",)),
    "labels": (lambda: table(3), ROWS, RNG.integers(0, 2, (64, 3)), "labels", "input -> label_logits", ("npu",)),
    "regression": (lambda: table(1), ROWS, RNG.normal(size=64), "numbers", "input -> outputs", ("npu",)),
    "four heads": (
        four_heads,
        ROWS,
        {
            "kind": RNG.integers(0, 3, 64),
            "price": RNG.normal(size=(64, 1)),
            "is_new": RNG.integers(0, 2, 64),
            "tags": RNG.integers(0, 2, (64, 3)),
        },
        {"price": "numbers", "tags": "labels"},
        "input -> is_new kind price tags",
        ANY,
    ),
}


def made(make):
    keras.utils.set_random_seed(3)
    return make()


def as_dict(outputs) -> dict:
    return outputs if isinstance(outputs, dict) else {"": outputs}


@pytest.mark.exhaustive("audio", "four heads", "segmentation", "tagging", "text", "two inputs")
@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_give_what_keras_gives_within_the_limits_of_their_profiles(name, tmp_path):
    make, inputs, labels, head, names, profiles = CASES[name]
    model, examples = made(make), (inputs, labels)
    expected, metrics = as_dict(predict(model, inputs)), evaluate(model, examples, head=head)
    for profile in profiles:
        report = export(model, tmp_path / profile, profile, inputs, examples=examples, head=head, check="raise")
        file = File(report["path"])
        ends = (" ".join(sorted(end["name"] for end in part)) for part in (file.inputs, file.outputs))
        assert " -> ".join(ends) == names
        for key, numbers in as_dict(predict(report["path"], inputs)).items():
            size = NEAR[profile] * np.ptp(expected[key])
            np.testing.assert_allclose(numbers, expected[key], atol=max(size, 1e-5), err_msg=profile)
        received = evaluate(report["path"], examples)
        for key in metrics.keys() - {"parameters", "bytes", "deflated", "microseconds"}:
            assert received[key] == pytest.approx(metrics[key], abs=0.05, rel=0.05), (profile, key)
        assert report["agreement"] >= load_profile(profile).min_agreement - 0.02
        document = metadata.of_file(report["path"])["document"]
        assert ("input" in document) == (names.startswith("image")) and document["provenance"]["metrics"][
            "images"
        ] == 64
    again = check(report["path"], model, examples, profile, head=head)
    assert again["agreement"] == report["agreement"] and again["drop"] == report["drop"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple:
    """A model of two inputs and two outputs, and its int8 file."""
    keras.utils.set_random_seed(1)
    a, words = keras.Input((8,), name="sizes"), keras.Input((6,), name="words", dtype="int32")
    x = layers.Concatenate()([a, layers.GlobalAveragePooling1D()(layers.Embedding(20, 4)(words))])
    kind, price = layers.Dense(3, "softmax", name="kind")(x), layers.Dense(2, name="price")(x)
    model = keras.Model([a, words], [kind, price], name="pair")
    model.compile("sgd", loss=["sparse_categorical_crossentropy", "mse"])
    return model, export(model, tmp_path_factory.mktemp("pair"), "npu", (PAIR["a"], TOKENS))["path"]


LABELS_OF_PAIR = (np.arange(64) % 3, RNG.normal(size=(64, 2)))


@pytest.mark.slow
def test_examples_of_every_form(pair):
    model, path = pair
    x, y = (PAIR["a"], TOKENS), LABELS_OF_PAIR
    expected = evaluate(model, (x, y))
    assert list(expected)[:2] == ["kind", "price"] and set(expected["price"]) == {"mse", "mae"}
    names, heads = {"sizes": x[0], "words": x[1]}, {"kind": y[0], "price": y[1]}
    dataset = tf.data.Dataset.from_tensor_slices((x, y))
    weighted = tf.data.Dataset.from_tensor_slices((names, heads, {"kind": np.ones(64), "price": np.ones(64)}))
    forms = [(names, heads), kdistill.Examples(names, heads), dataset, dataset.batch(24), weighted.batch(7)]
    for form in forms:
        assert evaluate(model, form)["kind"]["accuracy"] == pytest.approx(expected["kind"]["accuracy"])
        assert evaluate(path, form)["price"]["mse"] == pytest.approx(expected["price"]["mse"], rel=0.1)
    teacher = predict(model, names)
    same = evaluate(model, (x, y), teacher)
    assert same["kind"]["agreement"] == 1 and same["price"]["agreement"] == pytest.approx(1)
    hidden = np.r_[np.ones(32), np.zeros(32)]
    half = evaluate(model, (x, y, {"kind": hidden, "price": hidden}))
    first = evaluate(model, ({name: part[:32] for name, part in names.items()}, {n: p[:32] for n, p in heads.items()}))
    assert half["price"] == pytest.approx(first["price"])
    assert half["kind"]["accuracy"] == first["kind"]["accuracy"]
    again = export(model, path.replace("student", "again"), "npu", dataset.batch(24), check=None)
    assert again["sha256"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.slow
def test_files_of_tensors_are_inspected_timed_and_described(pair):
    _, path = pair
    report = inspect(path)
    assert {(end["name"], end["type"]) for end in report["inputs"]} == {("sizes", "int8"), ("words", "int32")}
    text = "\n".join(lines(report))
    assert "input 'words': numbers in the range on which the model was trained" in text
    assert "output 'kind': probabilities of exclusive classes" in text
    measured = benchmark(path, threads=(1,))
    assert measured["latency"][0]["median_us"] > 0 and measured["operators"]
    document = metadata.of_file(path)["document"]
    assert document["input_order"] == ["sizes", "words"] and document["description"].startswith("A model for")
    assert [(row["name"], row["head"]["meaning"]) for row in document["outputs"]] == [
        ("kind", CLASSES),
        ("price", NUMBERS),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "make,profile,message",
    [
        (segmentation, "mediapipe", "'mediapipe' is for one row of probabilities for an image; the output .* 8, 8, 3"),
        (text, "mediapipe", "'mediapipe' is for one image .* takes 'input' .batch, 6.. Use reference, phone_cpu"),
        (two_inputs, "microcontroller", "'microcontroller' is for one input and one output; .* takes 'a' .*, 'b'"),
        (two_heads, "microcontroller", "'microcontroller' is for one input and one output; .* gives kind, price"),
        (two_heads, Profile("p", output="logits"), "'p' is for one output of logits; .* gives kind, price"),
        (audio, Profile("p", mean=(1.0,), std=(2.0,)), "'p' is for one image"),
        (audio, Profile("p", input_type="uint8"), "'p' is for one image"),
        (lambda: table(1), Profile("p", output="probabilities"), "gives one number for each example"),
        (
            lambda: keras.Sequential([keras.Input((None, 4)), layers.Conv1D(3, 2), layers.GlobalMaxPooling1D()]),
            "reference",
            r"The input 'input' of .* is \[batch, any, 4\]; a file needs a fixed size. .* keras.Input\(\(8, 4\)\)",
        ),
        (
            lambda: keras.Sequential([keras.Input((4,)), layers.Lambda(tf.strings.as_string)]),
            "reference",
            "The output .* is text; expected a tensor of numbers",
        ),
        (tagging, "reference", "LiteRT has no operator 'TensorListReserve'.*batch=1"),
    ],
)
def test_what_a_profile_cannot_hold_is_one_message(make, profile, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export(make(), tmp_path, profile)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "examples,message",
    [
        (None, "calibration expects training examples of .*, for int8; received none"),
        ({"a": PAIR["a"]}, "calibration has no input 'b'; expected a, b"),
        ({**PAIR, "c": TOKENS}, "Unknown input in calibration 'c'"),
        ((PAIR["a"],), "expects the inputs a, b"),
        ((PAIR["a"], PAIR["b"][:9]), "same number of examples .* 64 of 'a', 9 of 'b'"),
        ((PAIR["a"], TOKENS), r"expects \[n, 3\] for the input 'b', received an array \(64, 6\)"),
        ((PAIR["a"], PAIR["b"] + 0.5), "whole numbers for the input 'b' .int32., received float64"),
        ((PAIR["a"] * np.inf, PAIR["b"]), "NaN or infinite in the input 'a'"),
        ((PAIR["a"][:1].repeat(5, 0), PAIR["b"][:1].repeat(5, 0)), "the same example 5 times"),
        (tf.data.Dataset.from_tensor_slices((PAIR["a"], PAIR["b"])).repeat(), "endless data set.*take"),
    ],
)
def test_calibration_that_does_not_fit_is_one_message(examples, message, tmp_path):
    with np.errstate(invalid="ignore"), pytest.raises(InputError, match=message):
        export(two_inputs(), tmp_path, "npu", examples)


@pytest.mark.slow
def test_text_is_taken_by_the_layer_before_the_file(tmp_path):
    words = np.array(["red green", "blue red red", "green", "yellow blue"] * 8)
    vectors = layers.TextVectorization(output_mode="int", output_sequence_length=5, name="vectors")
    vectors.adapt(words)
    text = keras.Input((1,), dtype="string")
    x = layers.GlobalAveragePooling1D()(layers.Embedding(10, 4)(vectors(text)))
    model = keras.Model(text, layers.Dense(3)(x), name="reader")
    labels = np.arange(32) % 3
    accuracy = evaluate(model, (words, labels))["accuracy"]
    for profile in ("npu", "reference"):
        with pytest.warns(UserWarning, match="'reader' takes text.* file takes what its layer 'vectors' gives, int64"):
            report = export(model, tmp_path / profile, profile, words, examples=(words, labels))
        file = File(report["path"])
        assert file.input["type"] == "int64" and report["agreement"] == 1
        assert evaluate(file.path, (np.asarray(vectors(words)), labels))["accuracy"] == pytest.approx(accuracy)


@pytest.mark.slow
def test_sounds_on_a_microcontroller_and_layer_by_layer(tmp_path):
    """The source states sizes of tensors that are no images; the cost of layers is measured on any single input."""
    model = made(audio)
    report = export(model, tmp_path / "micro", "microcontroller", SOUNDS)
    header = Path(report["path"]).with_suffix(".h").read_text()
    assert "constexpr int kInputSize = 32, kOutputSize = 4, kClasses = 4;" in header
    assert "round(number / kInputScale)" in header and report["arena"]["total"] > 0
    paths = [export(model, tmp_path / name, name, SOUNDS, check=None)["path"] for name in ("npu", "reference")]
    assert inspect(paths[0], against=paths[1], images=SOUNDS)["cost"]


@pytest.mark.slow
def test_a_saved_model_keeps_the_meaning_of_its_loss(pair, tmp_path):
    model, _ = pair
    model.save(tmp_path / "pair.keras")
    names = dict(zip(("sizes", "words"), (PAIR["a"], TOKENS), strict=True))
    expected = evaluate(model, (names, LABELS_OF_PAIR))
    loaded = evaluate(tmp_path / "pair.keras", (names, LABELS_OF_PAIR))
    assert loaded["price"] == pytest.approx(expected["price"]) and loaded["kind"] == pytest.approx(expected["kind"])
    path = export(tmp_path / "pair.keras", tmp_path, "reference", names)["path"]
    assert {row["name"]: row["head"]["meaning"] for row in metadata.of_file(path)["document"]["outputs"]} == {
        "kind": CLASSES,
        "price": NUMBERS,
    }


@pytest.mark.slow
def test_other_heads_in_mixed_precision_with_normalization_and_pixels(tmp_path):
    """A binary classifier of pixels / 255, built under mixed_float16; `mediapipe` takes color and needs a score."""
    policy = keras.dtype_policies.DTypePolicy("mixed_float16")
    tail = [
        layers.Conv2D(4, 3, dtype=policy),
        layers.GlobalAveragePooling2D(dtype=policy),
        layers.Dense(2, dtype=policy),
    ]
    keras.utils.set_random_seed(2)
    model = keras.Sequential([keras.Input((8, 8, 1)), *tail], name="mixed")
    for profile in ("reference", "mediapipe"):
        report = export(model, tmp_path / profile, profile, IMAGES, mean=0, std=255, head="labels")
        (numbers,) = as_dict(predict(report["path"], IMAGES)).values()
        logits = predict(model, IMAGES / 255.0)
        expected = logits if profile == "reference" else 1 / (1 + np.exp(-logits))
        np.testing.assert_allclose(numbers, expected, atol=0.01)
        assert report["outputs"][0]["name"] == ("label_logits" if profile == "reference" else "labels")


def test_files_that_lose_too_much_are_refused():
    """Limits by head, beyond chance: positions, labels and numbers of which half are wrong."""
    profile = load_profile("reference")
    spoiled = np.arange(64) % 2 == 0
    right = np.eye(3)[RNG.integers(0, 3, (64, 5))]
    numbers = RNG.normal(size=(64, 2))
    heads = {
        "mask": Head(CLASSES, "logits", (5, 3)),
        "tags": Head(LABELS, "probabilities", (5, 3)),
        "sizes": Head(NUMBERS, "numbers", (2,)),
    }
    expected = {"mask": right, "tags": right, "sizes": numbers}
    labels = {"mask": right.argmax(-1), "tags": right, "sizes": numbers}
    perfect = compare_heads(expected, expected, heads, labels, profile)
    assert perfect["agreement"] == 1 and perfect["drop"] == 0 and perfect["heads"]["sizes"]["correlation"] == 1
    outputs = {
        "mask": np.where(spoiled[:, None, None], np.roll(right, 1, -1), right),
        "tags": np.where(spoiled[:, None, None], 1 - right, right),
        "sizes": np.where(spoiled[:, None], numbers + 1, numbers),
    }
    worse = compare_heads(outputs, expected, heads, labels, profile)
    mask, tags, sizes = (worse["heads"][name] for name in heads)
    assert mask["agreement"] == mask["drop"] == 0.5 and mask["model_accuracy"] == 1 and mask["p_drop"] < 1e-6
    assert tags["agreement"] == tags["drop"] == 0.5
    assert sizes["drop"] == pytest.approx(0.5 / numbers.var()) and sizes["agreement"] == 0.5
    assert worse["agreement"] == 0.5 and worse["drop"] == max(row["drop"] for row in worse["heads"].values())


def test_one_sided_test_of_means():
    assert mean_p_value(np.zeros(10), 0.0) == 1 and mean_p_value(np.ones(10), 0.5) == 0
    assert mean_p_value(np.array([1.0]), 0.0) == 1
    values = np.r_[np.ones(6), np.zeros(4)]  # mean 0.6, standard error sqrt(0.24 / 9)
    import scipy.stats

    assert mean_p_value(values, 0.2) == pytest.approx(scipy.stats.t.sf(0.4 / np.sqrt(0.24 / 9), 9))


@pytest.mark.slow
def test_a_bad_file_is_refused_with_the_name_of_its_output(pair, tmp_path):
    model, path = pair
    x = (PAIR["a"], TOKENS)
    outputs = predict(model, x)
    assert check(path, outputs, (x, None), "npu")["agreement"] > 0.95
    with pytest.raises(FileRefused, match="'price': it agrees with its model on .*limit: 98.00%"):
        check(path, {**outputs, "price": np.roll(outputs["price"], 1, axis=0)}, (x, LABELS_OF_PAIR), "npu")
    broken = keras.Sequential([keras.Input((5,)), layers.Dense(2), layers.Lambda(lambda x: x / 0.0, name="ratio")])
    with pytest.raises(InputError, match="The output 'ratio' of the Keras model is NaN or infinite for 64 of 64"):
        export(broken, tmp_path, "reference", ROWS, head="numbers")
