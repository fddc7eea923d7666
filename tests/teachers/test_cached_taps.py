"""The cache stores layers of the teacher too: the same features, the same weights as with the teacher running."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from support import teacher_files
from support.small_models import CLASSES, corners, network
from support.teacher_files import teacher_model

from kdistill.data.splits import Splits
from kdistill.distillation.distiller import Distiller
from kdistill.errors import CheckFailed, InputError
from kdistill.formats import onnx_graph, process
from kdistill.recipe import Cache, Data, Distill, Network, Recipe, Term, Training
from kdistill.runs.run import run
from kdistill.teachers.foreign import teacher as open_teacher
from kdistill.teachers.replay import Replay
from kdistill.training import fit

pytestmark = pytest.mark.slow

SPLITS = Splits(corners(83), corners(30, seed=1), corners(30, seed=2), CLASSES, "corners", "0123456789abcdef")
TRAINING = Training(epochs=2, batch_size=16, learning_rate=0.02, optimizer="sgd")
TEACHER = network(filters=6)
TAPS = {"relu": "distill.terms.hint.teacher_tap", "flat": "distill.terms.relation.teacher_tap"}
TERMS = {
    "hint": Term("hint", 0.5, student_tap="relu", teacher_tap="relu", projector="conv1x1"),
    "relation": Term("rkd_distance", 1.0, student_tap="flat", teacher_tap="flat"),
}


def quiet(text):
    pass


def replay_of(root, data, **options):
    return Replay(TEACHER, SPLITS, data, 16, seed=3, root=root, taps=TAPS, **options)


def distiller(teacher, terms=None):
    keras.utils.set_random_seed(1)
    return Distiller(keras.models.clone_model(network(filters=3)), teacher, terms=TERMS if terms is None else terms)


def rounded(images):
    """The outputs of the teacher, rounded as the cache does."""
    graph = keras.Model(TEACHER.input, {"logits": TEACHER.output, **{n: TEACHER.get_layer(n).output for n in TAPS}})
    return {name: tf.cast(tf.cast(x, tf.float16), tf.float32) for name, x in graph(images, training=False).items()}


@pytest.mark.exhaustive("by image")
@pytest.mark.parametrize(
    "data",
    [Data("corners"), Data("corners", shift=2, flip=True, mixup=0.4)],
    ids=["by image", "by position"],
)
def test_the_features_and_the_weights_are_those_of_the_running_teacher(tmp_path, data):
    splits = dataclasses.replace(SPLITS, train=dataclasses.replace(SPLITS.train, classes=4))
    store = Replay(TEACHER, splits, data, 16, seed=3, root=tmp_path, taps=TAPS)
    plain = Replay(TEACHER, splits, data, 16, seed=3, root=tmp_path)
    assert store.shapes == {"logits": (4,), "relu": (5, 5, 6), "flat": (150,)} and store.image_bytes == 2 * 304
    assert plain.train.key != store.train.key and plain.image_bytes == 8
    store.build(store.views(2), quiet)
    for images, targets in store.training_batches(1, 2):
        for name, values in rounded(images).items():
            np.testing.assert_allclose(targets["teacher_logits"][name], values, atol=2e-3, rtol=1e-3)
    fitted = {}
    teach = tf.function(rounded)
    for name, teacher, stored in (("cached", None, store), ("rounded", teach, None), ("online", TEACHER, None)):
        if name == "online" and not store.by_image:
            continue
        model = distiller(TEACHER if teacher is None else teacher)
        log = fit.fit(model, splits, data, TRAINING, 3, say=quiet, stored=stored)
        fitted[name] = model.student.get_weights(), log
    start = distiller(TEACHER).student.get_weights()
    assert np.abs(fitted["cached"][0][0] - start[0]).max() > 1e-3
    for name, (weights, log) in fitted.items():
        for a, b in zip(fitted["cached"][0], weights, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-4 if name == "online" else 2e-6)
        for part in ("hint", "relation", "kd", "val_hint"):
            assert fitted["cached"][1][part] == pytest.approx(log[part], rel=2e-3, abs=1e-5)
            assert log[part] > 0


def test_a_cache_with_other_features_is_refused(tmp_path):
    store = replay_of(tmp_path, Data("corners"))
    store.build(1, quiet)
    teach = store._predict
    again = replay_of(tmp_path, Data("corners"))
    again._predict = lambda images: {**teach(images), "relu": teach(images)["relu"] * 1.5}
    with pytest.raises(CheckFailed, match="does not hold this teacher's logits"):
        again.build(1, quiet)
    with pytest.raises(InputError, match="cache.top_k=2 keeps some logits, but relu, flat .* stored whole"):
        replay_of(tmp_path, Data("corners"), top_k=2)


@pytest.mark.exhaustive
def test_features_of_the_data_in_ones_own_fit():
    images, labels = SPLITS.train.images[:32].astype(np.float32), SPLITS.train.labels[:32]
    stored = {name: np.asarray(values) for name, values in rounded(images).items()}
    metrics = []
    for teacher, targets in (
        (tf.function(rounded), labels),
        (TEACHER, {"labels": labels, "teacher_logits": stored}),
        (TEACHER, {"labels": labels, "teacher_logits": {**stored, "more": stored["flat"]}}),
    ):
        model = distiller(teacher)
        model.compile(keras.optimizers.SGD(0.02))
        metrics.append(model.fit(images, targets, batch_size=16, shuffle=False, verbose=0).history["loss"][0])
    assert metrics[1:] == pytest.approx([metrics[0]] * 2, rel=1e-5)
    # The tap `logits` is there with any stored logits.
    own = {"same": Term(lambda s, t: tf.reduce_mean((s - t) ** 2, -1), student_tap="logits", teacher_tap="logits")}
    model = distiller(TEACHER, own)
    model.compile(keras.optimizers.SGD(0.02))
    model.fit(images, {"labels": labels, "teacher_logits": stored["logits"]}, verbose=0)
    for part in ("logits", "flat"):
        model = distiller(TEACHER)
        model.compile(keras.optimizers.SGD(0.02))
        values = {name: array for name, array in stored.items() if name != part}
        with pytest.raises(InputError, match=f"need.* {part} of the teacher, which the stored teacher_logits do not"):
            model.fit(images, {"labels": labels, "teacher_logits": values}, verbose=0)


# -- teachers of other formats ----------------------------------------------------------------------------------------

DICT_SCRIPT = """
def predict(images):
    x = (images - 127.5) / 127.5
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
    features = np.tanh(np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias)
    return {"logits": features.reshape(len(x), -1) @ dense + offset, "block/tanh:0": features}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers")
    model = teacher_model()
    model.save(path / "model.keras")
    teacher_files.save_onnx(model, path / "model.onnx")
    teacher_files.save_onnx(model, path / "fixed.onnx", batch=5)
    teacher_files.save_numpy_script(model, path / "script.py")
    (path / "script.py").write_text((path / "script.py").read_text() + DICT_SCRIPT)
    teacher_files.save_data(path)
    yield path
    process.close_all()


def test_tensors_inside_of_other_formats_are_those_of_the_keras_model(folder):
    model = keras.models.load_model(folder / "model.keras")
    images = corners(7).images.astype(np.float32)
    inside = keras.Model(model.input, [model.get_layer("first").output, model.output])
    features, logits = map(np.asarray, inside(images))
    own = {"mean": 127.5, "std": 127.5}
    for file, taps, settings in (
        ("model.onnx", ["tanh", "flat"], own),
        ("fixed.onnx", ["flat", "tanh"], own),  # batches of one size, and another order
        ("script.py", ["block/tanh:0"], {}),
    ):
        opened = open_teacher(folder / file, taps=[*taps, "logits"], **settings)
        for values in (opened(images), tf.function(opened)(tf.constant(images))):
            np.testing.assert_allclose(values["logits"], logits, atol=1e-4)
            np.testing.assert_allclose(values["tanh" if "tanh" in taps else "block/tanh:0"], features, atol=1e-5)
            if "flat" in taps:  # as the file computes it: channels first
                np.testing.assert_allclose(values["flat"], features.transpose(0, 3, 1, 2).reshape(7, -1), atol=1e-5)


@pytest.mark.parametrize(
    "file, taps, message",
    [
        ("model.onnx", ["tahn"], "has no tensor 'tahn'. It computes 4: tanh.*Fix the teacher_tap"),
        ("script.py", ["absent"], "a dict without 'absent'; it has logits, block/tanh:0"),
        ("model.keras", ["first"], "works for ONNX and Python file; .*teacher_tap names a layer"),
    ],
)
def test_tensors_that_are_not_there(folder, file, taps, message):
    with pytest.raises(InputError, match=message):
        open_teacher(folder / file, taps=taps)(corners(3).images.astype(np.float32))


@pytest.mark.exhaustive
def test_a_run_with_features_of_every_format_and_from_the_cache(folder, tmp_path):
    """The cached run is the online one, up to float16, and each format teaches the same student."""
    weights = []
    for name, tap, settings, cache in (
        ("model.keras", "first", {}, "off"),
        ("model.onnx", "tanh", {"mean": (127.5,), "std": (127.5,)}, str(tmp_path / "cache")),
        ("script.py", "block/tanh:0", {}, str(tmp_path / "cache")),
    ):
        teacher = Network("teacher", file=str(folder / name), **settings)
        terms = {"map": Term("attention_transfer", 5.0, student_tap="conv1", teacher_tap=tap)}
        recipe = Recipe(
            "corners",
            teacher,
            Network("small_cnn", {"widths": (4, 6)}),
            Data("npz", shift=1),
            training=dataclasses.replace(TRAINING, epochs=1, batch_size=32, learning_rate=0.005),
            distill=Distill(terms=terms),
            cache=Cache(views=1),
            exports=(),
        )
        out, lines = tmp_path / name, []
        run(recipe, out, data_dir=folder / "corners.npz", cache=cache, say=lines.append)
        weights.append(keras.models.load_model(out / "student.keras").get_weights())
        said = "\n".join(lines)
        stated = f"logits and {tap} (5, 5, 6) of the teacher take 308 bytes an image, and 66.5 kB in all: 216 images"
        assert (stated in said) == (f"with the layers {tap} of the teacher" in said) == (cache != "off"), said
    control = keras.models.load_model(out / "control.keras").get_weights()
    for a, b, c, plain in zip(*weights, control, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-4)
        np.testing.assert_allclose(c, b, atol=1e-5)
        assert np.abs(plain - a).max() > 1e-3 or a.ndim == 1


def test_the_bytes_of_an_onnx_file(folder):
    import onnx

    content = (folder / "model.onnx").read_bytes()
    assert onnx_graph.tensors_of(content) == (["conv", "tanh", "flat", "logits"], ["logits"])
    more = onnx.load_from_string(onnx_graph.with_outputs(content, ["conv", "t" * 200]))
    assert [value.name for value in more.graph.output] == ["logits", "conv", "t" * 200]
    assert [node.op_type for node in more.graph.node] == ["Conv", "Tanh", "Flatten", "Gemm"]
    for damaged in (content[:-3], b"\xff" * 40, b"\x0f" + content, content[:200]):
        with pytest.raises(onnx_graph.Unusable, match="its file is damaged"):
            onnx_graph.tensors_of(damaged)
