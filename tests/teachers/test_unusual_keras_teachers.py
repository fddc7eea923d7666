"""Keras teachers that are no plain file: subclassed, a SavedModel as a layer, quantized, LoRA; and bare arrays."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_models import CLASSES, corners
from support.teacher_files import teacher_model

import kdistill
from kdistill.data.splits import Splits
from kdistill.errors import InputError
from kdistill.formats import process
from kdistill.recipe import Data, Network
from kdistill.teachers.as_model import load_teacher
from kdistill.teachers.frozen import frozen
from kdistill.teachers.replay import Replay

pytestmark = pytest.mark.slow

SHAPE = (12, 12, 1)
SPLITS = Splits(corners(40), corners(10, seed=1), corners(10, seed=2), CLASSES, "corners", "0")

# A subclassed model has no graph: its file states a class, and its weights belong to layers by their attributes.
SUBCLASSED = '''"""Needs Keras 3."""
import os
import keras, tensorflow as tf


class Teacher(keras.Model):
    def __init__(self):
        super().__init__()
        self.scale = keras.layers.Rescaling(1 / 127.5, -1)
        self.first = keras.layers.Conv2D(6, 3, strides=2, activation="tanh")
        self.flat, self.last = keras.layers.Flatten(), keras.layers.Dense(4)

    def call(self, images):
        return self.last(self.flat(self.first(self.scale(images))))


'''
LOADED = """
model = Teacher()
model(tf.zeros([1, 12, 12, 1]))
model.load_weights(os.path.join(os.path.dirname(os.path.abspath(__file__)), "subclassed.weights.h5"))
call = tf.function(lambda images: model(images, training=False))


def predict(images):
    return call(tf.constant(images))
"""
AS_A_LAYER = '''"""Needs Keras 3."""
import os
import keras, tensorflow as tf

layer = keras.layers.TFSMLayer(
    os.path.join(os.path.dirname(os.path.abspath(__file__)), "saved"), call_endpoint="serve"
)
call = tf.function(lambda images: layer(images))


def predict(images):
    return call(tf.constant(images))
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path, plain = tmp_path_factory.mktemp("teachers"), teacher_model()
    (path / "subclassed.py").write_text(SUBCLASSED + LOADED)
    names: dict = {}
    exec(SUBCLASSED, names)
    model = names["Teacher"]()
    model(np.zeros((1, *SHAPE), np.float32))
    model.set_weights(plain.get_weights())
    model.save_weights(path / "subclassed.weights.h5")
    model.save(path / "subclassed.keras")
    plain.export(path / "saved", verbose=False)
    (path / "layer.py").write_text(AS_A_LAYER)
    image = keras.Input(SHAPE)
    keras.Model(image, keras.layers.TFSMLayer(str(path / "saved"), call_endpoint="serve")(image)).save(
        path / "layer.keras"
    )
    yield path
    process.close_all()


@pytest.mark.exhaustive("layer.py", "subclassed.py")
@pytest.mark.parametrize("name", ["subclassed.py", "layer.py", "saved"])
def test_models_that_are_created_by_a_python_file(folder, name):
    """Their logits are those of the Keras model, and so are what the cache stores of them, up to float16."""
    plain, images = teacher_model(), corners(20, seed=5).images.astype(np.float32)
    file = load_teacher(Network("teacher", file=str(folder / name)), SHAPE, 4)
    np.testing.assert_allclose(file.model(images), plain(images), atol=1e-4)
    rows = []
    for model in (file.model, plain):
        stored = Replay(model, SPLITS, Data("corners"), 8, 0, folder / "cache")
        stored.build(1, lambda text: None)
        rows.append(stored.train.read_rows(0, slice(0, 40)))
    np.testing.assert_allclose(*rows, atol=4e-3)  # a step of float16 at 7


@pytest.mark.parametrize("name", ["subclassed.keras", "layer.keras"])
def test_their_keras_files_are_refused_with_the_reason(folder, name):
    with pytest.raises(InputError, match=r"cannot be loaded: .*(Could not locate class|safe_mode|unsafe)"):
        load_teacher(Network("teacher", file=str(folder / name)), SHAPE, 4)


@pytest.mark.exhaustive("int4", "int8")
@pytest.mark.filterwarnings("ignore:Layer .* (does not have|must be)")  # of layers that have nothing to quantize
@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "lora", "mixed_bfloat16"])
def test_quantized_and_adapted_models_teach_and_are_stored(kind, tmp_path):
    """From their file, running and stored alike, and none of them under the key of another."""
    images = corners(20, seed=5).images.astype(np.float32)
    model = teacher_model()
    key = Replay(model, SPLITS, Data("corners"), 8, 0, tmp_path).train.key
    if kind == "lora":
        model.get_layer("last").enable_lora(2)
        layer = model.get_layer("last")
        layer.lora_kernel_b.assign(np.full(layer.lora_kernel_b.shape, 0.05))
    elif kind == "mixed_bfloat16":
        model = keras.models.clone_model(model, clone_function=lambda layer: _with_policy(layer, kind))
        model.set_weights(teacher_model().get_weights())
    else:
        model.get_layer("last").quantize(kind)
    model.save(tmp_path / "teacher.keras")
    file = load_teacher(Network("teacher", file=str(tmp_path / "teacher.keras")), SHAPE, 4)
    expected = frozen(model)(tf.constant(images)).numpy()
    assert expected.dtype == np.float32 and np.abs(expected - teacher_model()(images)).max() < 1.5
    np.testing.assert_allclose(frozen(file.model)(tf.constant(images)), expected, atol=1e-6)
    stored = Replay(file.model, SPLITS, Data("corners"), 8, 0, tmp_path)
    assert stored.train.key != key
    stored.build(1, lambda text: None)
    running = frozen(model)(tf.constant(SPLITS.train.images, tf.float32))
    np.testing.assert_allclose(stored.train.read_rows(0, slice(0, 40)), running, atol=6e-2)
    keras.utils.set_random_seed(0)
    student = keras.Sequential([keras.Input(SHAPE), keras.layers.Flatten(), keras.layers.Dense(4)])
    distiller = kdistill.Distiller(student, file.model)
    distiller.compile("sgd")
    distiller.check_inputs = False
    distiller.fit(images / 255, corners(20, seed=5).labels, verbose=0)


def _with_policy(layer, policy: str):
    config = {**layer.get_config(), "dtype": policy}
    return type(layer).from_config(config)


def test_a_bare_array_of_outputs(tmp_path):
    """It is stored with the images that it belongs to; alone it is refused, because no row tells its image."""
    parts = [SPLITS.train, SPLITS.validation, SPLITS.test]
    logits = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    np.save(tmp_path / "outputs.npy", logits)
    np.save(tmp_path / "half.npy", logits.astype(np.float16))
    for name, tolerance in (("outputs.npy", 0), ("half.npy", 2e-3)):
        path = kdistill.store_teacher(tmp_path / name, parts, tmp_path / name[:4])
        predict = frozen(kdistill.teacher(path))
        np.testing.assert_allclose(predict(tf.constant(SPLITS.test.images, tf.float32)), logits[50:], atol=tolerance)
    with pytest.raises(InputError, match=r"is a bare array: .* kdistill.store_teacher\(FILE"):
        kdistill.teacher(tmp_path / "outputs.npy")
    with pytest.raises(InputError, match=r"expects logits \[50, classes\], a row for each image; received \(60, 4\)"):
        kdistill.store_teacher(str(tmp_path / "outputs.npy"), parts[:2], tmp_path)
    (tmp_path / "damaged.npy").write_bytes((tmp_path / "outputs.npy").read_bytes()[:-40])
    np.save(tmp_path / "labels.npy", np.zeros(60, np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}, 1], object), allow_pickle=True)
    for name, message in (
        ("damaged.npy", "is damaged, or no array"),
        ("labels.npy", "holds int64; expected floating-point logits"),
        ("objects.npy", "is damaged, or no array"),
        ("absent.npy", "absent.npy"),
    ):
        with pytest.raises(InputError, match=message):
            kdistill.store_teacher(tmp_path / name, parts, tmp_path)
