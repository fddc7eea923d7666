"""A teacher that LiteRT runs: the same logits up to its precision, one fingerprint, and messages where it cannot be."""

import dataclasses
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from support.small_models import CLASSES, corners, network

from kdistill.conversion.litert_teacher import faster_teacher, teacher_file
from kdistill.data.splits import Splits
from kdistill.distillation.distiller import Distiller
from kdistill.errors import CheckFailed, InputError
from kdistill.networks import folding
from kdistill.recipe import Data, Network, Recipe
from kdistill.recipe.checks import check_recipe
from kdistill.recipe.loading import load_recipe
from kdistill.runs.run import run
from kdistill.runs.teaching import Teaching
from kdistill.teachers.frozen import blend_models
from kdistill.teachers.replay import Replay, teacher_fingerprint
from kdistill.training.strategy import SINGLE_DEVICE

pytestmark = pytest.mark.slow

IMAGES, CALIBRATION = corners(64).images, corners(40, seed=1).images
SPLITS = Splits(corners(80, seed=3), corners(64), corners(20, seed=2), CLASSES, "corners", "0123456789abcdef")
RECIPE = Recipe("corners", Network("small_cnn"), Network("small_cnn"))
MODELS = {
    "logits": network,
    "softmax": lambda: network(softmax=True),
    "a softmax layer": lambda: keras.Sequential([network(), layers.Softmax()]),
    "a blend": lambda: blend_models([network(), network(filters=5)]),
    "bfloat16": lambda: network(dtype="mixed_bfloat16"),
}
# The largest mean difference of the logits as a share of their spread; int8 computes each layer in 256 steps.
TOLERANCES = {"litert": 1e-5, "litert_dynamic": 0.005, "litert_int8": 0.02}
LOGITS = [("logits", each) for each in TOLERANCES]
OTHERS = [
    ("softmax", "litert_int8"),
    ("a softmax layer", "litert"),
    ("a blend", "litert_dynamic"),
    ("bfloat16", "litert"),
]


def logits_of(model, images=IMAGES):
    outputs = np.asarray(model(images.astype("float32"), training=False), np.float64)
    return np.log(outputs) if abs(outputs.sum(axis=1) - 1).max() < 1e-3 else outputs


def centered(logits):
    return logits - logits.mean(axis=1, keepdims=True)


@pytest.mark.exhaustive(
    "logits-litert_dynamic",
    "bfloat16-litert",
    "softmax-litert_int8",
    "a softmax layer-litert",
    "a blend-litert_dynamic",
)
@pytest.mark.parametrize("name,precision", [*LOGITS, *OTHERS])
def test_its_logits_are_those_of_the_teacher_in_python_and_in_a_graph(name, precision):
    model, said = MODELS[name](), []
    twin = faster_teacher(model, IMAGES, precision, said.append, (), CALIBRATION)
    expected, found = centered(logits_of(model)), centered(np.asarray(twin(IMAGES.astype("float32"))))
    tolerance = TOLERANCES[precision] if name != "bfloat16" else 0.01
    assert abs(found - expected).mean() < tolerance * expected.std()
    traced = tf.function(lambda images: twin(images, training=False))(tf.constant(IMAGES[:5], tf.float32))
    np.testing.assert_array_equal(traced, np.asarray(twin(IMAGES[:5].astype("float32"))))
    assert re.search(rf"in {precision}: its logits change by \d+\.\d+% .* of 64 images\. .* times as fast", said[0])
    if name != "bfloat16":  # a resumed run, and another process, find the cache of the first
        again = faster_teacher(model, IMAGES, precision, said.append, (), CALIBRATION)
        assert teacher_fingerprint([again]) == teacher_fingerprint([twin]) != teacher_fingerprint([model])


def test_it_teaches_online_and_fills_the_cache(tmp_path):
    teacher, said = network(), []
    recipe = dataclasses.replace(RECIPE, teacher_precision="litert_dynamic")
    teaching = Teaching(teacher, recipe, SPLITS, None, SINGLE_DEVICE, said.append)
    stored = Replay(teaching.model, SPLITS, Data("corners"), 16, 0, tmp_path)
    stored.build(1, said.append)
    images, targets = next(iter(stored.training_batches(0)))[:2]
    np.testing.assert_allclose(targets["teacher_logits"], teaching.model(images), rtol=1e-3, atol=1e-3)
    pixels = [(images, targets["labels"]) for images, targets in stored.training_batches(0)]
    online = tf.data.Dataset.from_tensor_slices(tuple(map(tf.stack, zip(*pixels, strict=True))))
    students = []
    for data in (stored.training_batches(0), online):
        keras.utils.set_random_seed(0)
        model = Distiller(network(filters=3), teaching.model)
        model.compile(keras.optimizers.SGD(0.01))
        model.check_inputs = False
        model.fit(data, epochs=2, verbose=0)
        students.append(model.student.get_weights())
    for first, second in zip(*students, strict=True):
        np.testing.assert_allclose(first, second, atol=2e-3)


class Unusual(layers.Layer):
    """What no `.tflite` has."""

    def call(self, x):
        return tf.numpy_function(lambda numbers: numbers, [x], tf.float32)

    def compute_output_shape(self, shape):
        return shape


def test_what_cannot_be_is_refused_before_anything_trains(tmp_path):
    """An operator that LiteRT lacks, sigmoids, several outputs, layers that terms use, another precision."""
    unusual = network(middle=[Unusual()])
    with pytest.raises(InputError, match="teacher_precision=litert cannot be used with the teacher 'small'.*Omit"):
        teacher_file(unusual, "litert", CALIBRATION)
    small = network()
    sigmoids = keras.Sequential([small, layers.Activation("sigmoid")])
    with pytest.raises(InputError, match="cannot be used with .*ends in a sigmoid"):
        teacher_file(sigmoids, "litert_int8", CALIBRATION)
    several = keras.Model(small.input, [small.output, small.get_layer("flat").output])
    with pytest.raises(InputError, match="cannot be used with .*expected one"):
        teacher_file(several, "litert", CALIBRATION)
    with pytest.raises(InputError, match="gives the logits of a teacher, and terms use its relu"):
        faster_teacher(small, IMAGES, "litert", print, ["relu"])
    with pytest.raises(InputError, match="teacher_precision' expects none or one of .*litert_int8, received 'int8'"):
        check_recipe(dataclasses.replace(RECIPE, teacher_precision="int8"))
    recipe = load_recipe("mnist", "smoke", ["teacher_precision=litert"])
    with pytest.raises(InputError, match="works on one device"):
        run(recipe, tmp_path / "out", strategy="mirrored", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_needs_training_is_converted_before(tmp_path, monkeypatch):
    def refuse(model, precision, calibration):
        raise InputError(f"{model.name} in {precision} on {len(calibration)} images")

    monkeypatch.setattr("kdistill.runs.preflight.teacher_file", refuse)
    recipe = load_recipe("mnist", "smoke", ["teacher_precision=litert_int8"])
    with pytest.raises(InputError, match="in litert_int8 on 32 images"):
        run(recipe, tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_another_teacher_is_refused():
    """Ranges of int8 from other pixels, as random weights and a few activations far outside give."""
    model = network()
    with pytest.raises(CheckFailed, match=r"in litert_int8 is another teacher: .*At most 10% and at least 95%"):
        faster_teacher(model, IMAGES, "litert_int8", print, (), (IMAGES // 64).astype("uint8"))
    turned = network()
    turned.get_layer("last").set_weights([-each for each in turned.get_layer("last").get_weights()])
    with pytest.raises(CheckFailed, match="same class for 0.0% of 64 images"):
        folding.state_change(model, model, turned, IMAGES, "mixed_bfloat16")
    broken = network()
    broken.get_layer("last").set_weights(
        [np.full_like(each, np.nan) for each in broken.get_layer("last").get_weights()]
    )
    with pytest.raises(CheckFailed, match="is another teacher"):
        folding.state_change(model, model, broken, IMAGES, "mixed_bfloat16")
