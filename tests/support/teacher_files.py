"""One small teacher of corners in every format that can be written here."""

from pathlib import Path

import keras
import numpy as np
from keras import layers
from support.small_models import corners

SCALE, OFFSET = 127.5, 127.5  # the files in which normalization is not inside take (pixel - 127.5) / 127.5


def teacher_model(inside: bool = True, softmax: bool = False) -> keras.Model:
    """Convolution, tanh, dense, fitted by least squares. Without batch normalization, which a run folds.

    `inside`: raw pixels go in. Otherwise the user normalizes.
    """
    keras.utils.set_random_seed(0)
    image = keras.Input((12, 12, 1), name="image")
    x = layers.Rescaling(1 / SCALE, -OFFSET / SCALE)(image) if inside else image
    x = layers.Conv2D(6, 3, strides=2, activation="tanh", name="first")(x)
    features = layers.Flatten(name="flat")(x)
    dense = layers.Dense(4, activation="softmax" if softmax else None, name="last")
    model = keras.Model(image, dense(features), name="teacher")
    examples = corners(300, seed=1)
    pixels = examples.images.astype(np.float32)
    values = np.asarray(keras.Model(image, features)(pixels if inside else (pixels - OFFSET) / SCALE), np.float64)
    inputs = np.column_stack([values, np.ones(len(values))])
    targets = 8 * np.eye(4)[examples.labels] - 2
    fitted = np.linalg.solve(inputs.T @ inputs + 0.1 * np.eye(inputs.shape[1]), inputs.T @ targets)
    dense.set_weights([fitted[:-1], fitted[-1]])
    return model


def save_savedmodel(model: keras.Model, folder: Path) -> Path:
    """Writes the folder of a SavedModel."""
    model.export(folder, verbose=False)
    return folder


def save_tflite(model: keras.Model, path: Path) -> Path:
    """Writes a float32 `.tflite`."""
    model.export(path, format="litert", verbose=False)
    return path


def save_keras2(model: keras.Model, path: Path) -> Path:
    """Writes an `.h5` file as Keras 2 does, of the model without its rescaling."""
    import tf_keras

    twin = tf_keras.Sequential(
        [
            tf_keras.layers.Conv2D(6, 3, strides=2, activation="tanh", input_shape=(12, 12, 1)),
            tf_keras.layers.Flatten(),
            tf_keras.layers.Dense(4),
        ]
    )
    twin.set_weights(model.get_weights())
    twin.save(path)
    return path


def save_onnx(model: keras.Model, path: Path, batch=None, kind: str = "float", inputs: int = 1) -> Path:
    """Writes an ONNX model as PyTorch exports it: channels first, without the rescaling.

    `batch`: a fixed batch size. `kind`: float or float16. `inputs`: 2 adds one.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    number = np.float16 if kind == "float16" else np.float32
    proto = TensorProto.FLOAT16 if kind == "float16" else TensorProto.FLOAT
    kernel, bias, weights, offset = model.get_weights()
    height = (12 - 3) // 2 + 1
    order = np.arange(height * height * 6).reshape(height, height, 6).transpose(2, 0, 1).ravel()
    constants = {
        "kernel": kernel.transpose(3, 2, 0, 1),
        "bias": bias,
        "weights": weights[order],
        "offset": offset,
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel", "bias"], ["conv"], strides=[2, 2]),
        helper.make_node("Tanh", ["conv"], ["tanh"]),
        helper.make_node("Flatten", ["tanh"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weights", "offset"], ["logits"]),
    ]
    images = [helper.make_tensor_value_info("image", proto, [batch or "n", 1, 12, 12])]
    images += [helper.make_tensor_value_info(f"more{place}", proto, ["n", 1]) for place in range(inputs - 1)]
    graph = helper.make_graph(
        nodes,
        "teacher",
        images,
        [helper.make_tensor_value_info("logits", proto, [batch or "n", 4])],
        [numpy_helper.from_array(value.astype(number), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(made)
    onnx.save(made, path)
    return path


SCRIPT = '''"""Needs TensorFlow and Keras 3."""
import keras, tensorflow as tf
print("loading the teacher")
model = keras.saving.load_model({path!r}, compile=False)
call = tf.function(lambda images: model(images, training=False))
def predict(images):
    return call(tf.constant(images))
'''

# What the network computes, in NumPy: for another Python that has nothing else.
NUMPY_SCRIPT = '''"""Needs NumPy."""
import os
import numpy as np
weights = np.load(os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights.npz"))
kernel, bias, dense, offset = (weights["arr_" + str(place)] for place in range(4))
def predict(images):
    x = (images - 127.5) / 127.5
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
    conv = np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias
    return np.tanh(conv).reshape(len(x), -1) @ dense + offset
'''


def save_script(model: keras.Model, path: Path) -> Path:
    """Writes a Python file that loads the model, and the model beside it."""
    model.save(path.with_suffix(".keras"))
    path.write_text(SCRIPT.format(path=str(path.with_suffix(".keras"))))
    return path


def save_numpy_script(model: keras.Model, path: Path) -> Path:
    """Writes a Python file that needs NumPy only, and the weights beside it."""
    np.savez(path.parent / "weights.npz", *model.get_weights())
    path.write_text(NUMPY_SCRIPT)
    return path


def save_data(folder: Path) -> Path:
    """Writes the corners as `.npz` files, for `--data npz`."""
    train, test = corners(240), corners(80, seed=2)
    path = folder / "corners.npz"
    np.savez(path, x_train=train.images, y_train=train.labels, x_test=test.images, y_test=test.labels)
    return path
