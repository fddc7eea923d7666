"""One teacher in every format gives the same logits, seen as its file or the user says; misfits are refused."""

import json
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from support import teacher_files
from support.small_models import corners
from support.teacher_files import teacher_model

import kdistill
from kdistill.errors import InputError
from kdistill.formats import process
from kdistill.recipe import Network
from kdistill.teachers.as_model import load_teacher
from kdistill.teachers.frozen import frozen
from kdistill.teachers.normalizations import look_at

pytestmark = pytest.mark.slow

IMAGES = corners(64, seed=5)
PIXELS = tf.constant(IMAGES.images, tf.float32)
NORMALIZED = {"mean": (127.5,), "std": (127.5,)}
SHAPE = (12, 12, 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of one teacher. Those of `outside` take (pixel - 127.5) / 127.5."""
    path = tmp_path_factory.mktemp("teachers")
    inside, outside = teacher_model(), teacher_model(inside=False)
    inside.save(path / "inside.keras")
    teacher_model(softmax=True).save(path / "softmax.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras calls its own older formats legacy
        inside.save(path / "keras3.h5")
        teacher_files.save_keras2(outside, path / "keras2.hdf5")
        teacher_files.save_savedmodel(inside, path / "saved")
        teacher_files.save_tflite(inside, path / "float.tflite")
    teacher_files.save_onnx(outside, path / "any.onnx")
    teacher_files.save_onnx(outside, path / "batch5.onnx", batch=5)
    teacher_files.save_onnx(outside, path / "half.onnx", kind="float16")
    teacher_files.save_onnx(outside, path / "two.onnx", inputs=2)
    teacher_files.save_script(inside, path / "script.py")
    teacher_files.save_numpy_script(outside, path / "plain.py")
    yield path
    process.close_all()


EXPECTED = teacher_model()(PIXELS).numpy()
FORMATS = {
    "inside.keras": ({}, 0.0),
    "keras3.h5": ({}, 0.0),
    "saved": ({}, 1e-6),
    "script.py": ({}, 1e-6),
    "float.tflite": ({}, 1e-4),
    "keras2.hdf5": (NORMALIZED, 1e-4),
    "any.onnx": (NORMALIZED, 1e-4),
    "batch5.onnx": (NORMALIZED, 1e-4),
    "half.onnx": (NORMALIZED, 2e-2),
    "plain.py": ({}, 1e-4),
}


@pytest.mark.exhaustive("inside.keras", "saved", "script.py")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_logits(folder, name):
    settings, tolerance = FORMATS[name]
    teacher = kdistill.teacher(folder / name, **settings)
    predict = frozen(teacher)
    np.testing.assert_allclose(predict(PIXELS), EXPECTED, rtol=0, atol=tolerance)
    np.testing.assert_allclose(tf.function(predict)(PIXELS), EXPECTED, rtol=0, atol=max(tolerance, 1e-5))
    file = load_teacher(Network("teacher", file=str(folder / name), **settings), SHAPE, 4)
    np.testing.assert_allclose(file.model(PIXELS, training=False), EXPECTED, rtol=0, atol=max(tolerance, 1e-5))
    about = file.as_dict()
    assert len(about["fingerprint"]) == 16 and json.loads(json.dumps(about)) == about
    assert file.foreign == (name not in ("inside.keras", "keras3.h5", "keras2.hdf5"))
    assert ("python" in about["versions"]) == file.foreign


@pytest.mark.exhaustive
def test_probabilities_are_found_and_classes_chosen(folder):
    model = teacher_model(softmax=True)
    teacher_files.save_savedmodel(model, folder / "saved_softmax")
    for name in ("softmax.keras", "saved_softmax"):
        logits = frozen(kdistill.teacher(folder / name))(PIXELS)
        np.testing.assert_allclose(tf.nn.softmax(logits), model(PIXELS), atol=1e-5)
    for name in ("inside.keras", "saved"):
        chosen = kdistill.teacher(folder / name, classes=(2, 0))
        np.testing.assert_allclose(frozen(chosen)(PIXELS), EXPECTED[:, [2, 0]], atol=1e-5)
        file = load_teacher(Network("teacher", file=str(folder / name), classes=(3, 1, 0)), SHAPE, 3)
        np.testing.assert_allclose(file.model(PIXELS), EXPECTED[:, [3, 1, 0]], atol=1e-5)
        with pytest.raises(InputError, match=r"classes 0 to 3, not 7. Fix (--teacher-)?classes"):
            frozen(kdistill.teacher(folder / name, classes=(1, 7)))(PIXELS)
        with pytest.raises(InputError, match="gives 4 classes, the data has 10. Give the places .* --teacher-classes"):
            load_teacher(Network("teacher", file=str(folder / name), mean=(0.0,)), SHAPE, 10)


def test_images_of_another_size_and_channels(folder):
    small, color = tf.image.resize(PIXELS, (8, 8)), tf.repeat(PIXELS, 3, -1)
    resized = tf.image.resize(small, (12, 12), antialias=True)
    said = []
    file = load_teacher(Network("t", file=str(folder / "any.onnx"), **NORMALIZED), (8, 8, 1), 4, said.append)
    np.testing.assert_allclose(file.model(small), teacher_model()(resized), atol=1e-3)
    assert said == ["The teacher 'any' sees the images of (8, 8) resized to (12, 12)."]
    file = load_teacher(Network("t", file=str(folder / "saved")), (12, 12, 3), 4)
    np.testing.assert_allclose(file.model(color), teacher_model()(tf.image.rgb_to_grayscale(color)), atol=1e-4)
    with pytest.raises(
        InputError, match=r"expects images of \(12, 12, 1\), but receives \(8, 8, 1\). Give size .*12x12"
    ):
        load_teacher(Network("t", file=str(folder / "keras3.h5")), (8, 8, 1), 4)
    file = load_teacher(Network("t", file=str(folder / "inside.keras"), size=(12, 12), channels=1), (8, 8, 3), 4)
    expected = teacher_model()(tf.image.rgb_to_grayscale(tf.repeat(resized, 3, -1)))
    np.testing.assert_allclose(file.model(tf.repeat(small, 3, -1)), expected, atol=1e-3)


def test_layout_and_output_of_keras_models():
    image = keras.Input((1, 12, 12))
    inner = teacher_model()
    scores = inner(keras.layers.Permute((2, 3, 1))(image))
    model = keras.Model(image, {"scores": scores, "aux": keras.layers.Softmax()(scores)}, name="first")
    adapted = kdistill.Adapted(model, layout="channels_first", output="scores", classes=[3, 1])
    np.testing.assert_allclose(frozen(adapted)(PIXELS), EXPECTED[:, [3, 1]], atol=1e-5)
    assert adapted.teacher.input_shape == (None, 12, 12, 1) and adapted.teacher.output_shape == (None, 2)
    function = kdistill.Adapted(lambda x: model(x, training=False), layout="channels_first", output="scores")
    np.testing.assert_allclose(frozen(function)(PIXELS), EXPECTED, atol=1e-5)
    with pytest.raises(InputError, match="no output 'score'. It has aux, scores"):
        kdistill.Adapted(model, output="score")
    with pytest.raises(InputError, match="layout expects 'channels_last' or 'channels_first', received 'NCHW'"):
        kdistill.Adapted(model, layout="NCHW")


def test_a_distiller_learns_from_a_process(folder):
    """Online, in a traced step; the same weights as from the Keras model itself."""
    weights = []
    for teacher in (kdistill.teacher(folder / "inside.keras"), kdistill.teacher(folder / "saved")):
        keras.utils.set_random_seed(3)
        student = keras.Sequential([keras.Input(SHAPE), keras.layers.Rescaling(1 / 255), keras.layers.Flatten()])
        student.add(keras.layers.Dense(4))
        distiller = kdistill.Distiller(student, teacher, distillation_weight=1.0)
        distiller.compile(keras.optimizers.SGD(0.01))
        distiller.fit(
            IMAGES.images.astype(np.float32), IMAGES.labels, batch_size=16, epochs=1, verbose=0, shuffle=False
        )
        weights.append(student.get_weights())
    for one, two in zip(*weights, strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_the_usual_normalization_is_proposed(folder):
    """Of a teacher that gives class 0 for what is not from -1 to 1, negative numbers included."""
    script = teacher_files.NUMPY_SCRIPT.replace("x = (images - 127.5) / 127.5", "x = images")
    script += "own = predict\ndef predict(images):\n    fits = images.min() < -0.5 and images.max() <= 1.0\n"
    script += "    return own(images) if fits else np.eye(4)[np.zeros(len(images), int)] * 5.0 - 1.0\n"
    (folder / "picky.py").write_text(script)
    examples = corners(300, seed=9)
    file = load_teacher(Network("t", file=str(folder / "picky.py")), SHAPE, 4)
    sentence, warning = look_at(file, examples.images, examples.labels)
    chance = (examples.labels[:256] == 0).mean()
    assert sentence.startswith(f"Teacher 'picky': Python file, '{folder / 'picky.py'}', fingerprint {file.fingerprint}")
    assert sentence.endswith(f"Its accuracy on 256 validation images is {chance:.1%}.")
    assert warning == (
        f"The accuracy of the teacher 'picky' is {chance:.1%} on 256 images, but 100.0% with (pixels - 127.5) / 127.5, "
        "-1 to 1. Give it this normalization: --teacher-mean 127.5 --teacher-std 127.5 (in a recipe: mean=(127.5,), "
        "std=(127.5,))."
    )
    right = load_teacher(Network("t", file=str(folder / "picky.py"), **NORMALIZED), SHAPE, 4)
    assert look_at(right, examples.images, examples.labels)[1] is None
    worse = load_teacher(Network("t", file=str(folder / "saved"), classes=(1, 2, 3, 0)), SHAPE, 4)
    assert "It teaches noise. Check the order of its classes" in look_at(worse, examples.images, examples.labels)[1]


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("two.onnx", {}, r"it has 2 inputs \('image' .*'more0' .*\); expected one, of images"),
        ("any.onnx", {"output": "nope"}, "it has no output 'nope'; it has logits. Fix --teacher-output"),
        ("saved", {"output": "nope"}, "it has no output 'nope'; it has output_0"),
        ("inside.keras", {"python": "python3"}, "--teacher-python does nothing for .*Keras"),
        ("float.tflite", {"python": "python3"}, "--teacher-python does nothing for .*TFLite"),
        ("inside.keras", {"timeout": 3}, "--teacher-timeout does nothing for .*Keras"),
        ("absent.onnx", {}, "There is no file"),
        ("inside.pt", {}, r"expected .keras, .h5, .hdf5, .tflite, .onnx, .py, .npz, the folder of a SavedModel, or an"),
        ("broken.onnx", {}, "damaged, or no ONNX that onnxruntime runs"),
        ("broken.h5", {}, "damaged, or no HDF5 file"),
        ("broken.npz", {}, "damaged, or no file of kdistill.store_teacher"),
        ("broken.tflite", {}, "is no .tflite file"),
        (".", {}, "is a folder. Give the path of a file"),
    ],
)
def test_files_and_settings_that_are_refused(folder, name, settings, message):
    if name.startswith("broken"):
        (folder / name).write_bytes(b"something else entirely")
    with pytest.raises(InputError, match=message):
        kdistill.teacher(folder / name, **settings)


def test_no_code_in_an_hdf5_file_runs(folder):
    import tf_keras

    layer = tf_keras.layers
    model = tf_keras.Sequential([layer.Input(SHAPE), layer.Flatten(), layer.Lambda(lambda x: 2 * x), layer.Dense(4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(folder / "lambda.h5")
        tf_keras.Sequential([layer.Input(SHAPE), layer.Dense(4)]).save_weights(folder / "weights.h5")
        old = [layer.Input(SHAPE), layer.DepthwiseConv2D(3), layer.Flatten(), layer.Dense(4)]
        older = tf_keras.Sequential(old)  # Keras 3 does not know how Keras 2 writes this layer
        older.save(folder / "older.h5")
    with pytest.raises(InputError, match="contains '(Lambda|function|__lambda__)', whose code would run"):
        kdistill.teacher(folder / "lambda.h5")
    with pytest.raises(InputError, match="holds weights without a model"):
        kdistill.teacher(folder / "weights.h5")
    np.testing.assert_allclose(
        frozen(kdistill.teacher(folder / "older.h5"))(PIXELS), older(PIXELS), atol=1e-2, rtol=1e-5
    )


def test_stored_outputs(folder, tmp_path):
    splits = [corners(30, seed=1), corners(20, seed=2)]
    path = kdistill.store_teacher(folder / "saved", splits, tmp_path / "of a path")
    images = np.concatenate([part.images for part in splits])
    logits = teacher_model()(images.astype(np.float32)).numpy()
    again = kdistill.store_teacher(logits, images, tmp_path / "of an array")
    for file in (path, again):
        predict = frozen(kdistill.teacher(file))
        np.testing.assert_allclose(predict(tf.constant(images[::-1], tf.float32)), logits[::-1], atol=1e-5)
        np.testing.assert_allclose(tf.function(predict)(tf.constant(images[7:9], tf.float32)), logits[7:9], atol=1e-5)
    with pytest.raises(InputError, match="has no outputs for 64 of 64 images"):
        predict(PIXELS)
    with pytest.raises(InputError, match="pixels are whole numbers from 0 to 255; these are others"):
        predict(PIXELS / 255)
    with pytest.raises(InputError, match=r"expects logits \[50, classes\], a row for each image; received \(49, 4\)"):
        kdistill.store_teacher(logits[:-1], splits, tmp_path)
    with pytest.raises(InputError, match="finite logits"):
        kdistill.store_teacher(np.full((50, 4), np.inf, np.float32), splits, tmp_path)
    with pytest.raises(InputError, match="holds outputs and no model: mean would do nothing"):
        kdistill.teacher(path, mean=3.0)
    file = load_teacher(Network("t", file=str(path)), SHAPE, 4)
    np.testing.assert_allclose(file.model(tf.constant(images, tf.float32)), logits, atol=1e-5)
    with pytest.raises(InputError, match="gives 4 classes, the data has 3"):
        load_teacher(Network("t", file=str(path)), SHAPE, 3)
    assert not [name.name for name in tmp_path.rglob("*") if name.is_file() and name.suffix != ".npz"]


def test_quantized_and_adapted_keras_models_and_an_int8_tflite(folder):
    model = teacher_model()
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([image[None].astype(np.float32)] for image in corners(100).images)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.uint8
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers that have nothing to quantize
        (folder / "int8.tflite").write_bytes(converter.convert())
        model.quantize("int8")
    file = load_teacher(Network("t", file=str(folder / "int8.tflite")), SHAPE, 4)
    np.testing.assert_allclose(file.model(PIXELS), EXPECTED, atol=0.25)  # of logits up to 7
    adapted = teacher_model()
    adapted.get_layer("last").enable_lora(2)
    for name, one in (("int8.keras", model), ("lora.keras", adapted)):
        one.save(folder / name)
        file = load_teacher(Network("t", file=str(folder / name), mean=(0.0,)), SHAPE, 4)
        np.testing.assert_allclose(file.model(PIXELS), one(PIXELS), atol=1e-6)
