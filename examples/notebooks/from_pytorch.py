# %% [markdown]
# # From a PyTorch teacher to a TFLite student
#
# A teacher of another framework comes as an `.onnx` file. The student is a Keras model, and ends as a checked
# `.tflite`. It runs on Colab, and locally. Where PyTorch is not installed, an ONNX file that is made with NumPy
# stands in for its export; everything after that is the same. To open it as a notebook: `python to_ipynb.py
# from_pytorch.py`.

# %%
# %pip install --quiet "kdistill[onnx]" onnx torch
import importlib.util

import keras
import numpy as np

import kdistill
from kdistill.data.splits import load
from kdistill.recipe import Data

keras.utils.set_random_seed(0)
digits = load(Data(), say=print)
x_train, y_train = digits.train.images, digits.train.labels


def as_pytorch(images):
    """The images as the teacher takes them: float32 `[n, 1, 28, 28]`, pixels from -1 to 1."""
    return ((images.astype("float32") - 127.5) / 127.5).transpose(0, 3, 1, 2)


# %% [markdown]
# ## The teacher
#
# With PyTorch: train a network (or load yours), and export it.


# %%
def from_torch():
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 32, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(32, 64, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 6 * 6, 10),
    )
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = torch.from_numpy(as_pytorch(x_train)), torch.from_numpy(y_train.astype("int64"))
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    names = {"input_names": ["image"], "output_names": ["logits"]}
    torch.onnx.export(model.eval(), (x[:1],), "teacher.onnx", dynamic_axes={"image": {0: "n"}}, dynamo=False, **names)


# %% [markdown]
# Without PyTorch: 2,000 random features and a ridge regression, which reach about 93 %.


# %%
def from_numpy():
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    first = (random.normal(size=(784, 2000)) / 28).astype("float32")
    features = np.maximum(as_pytorch(x_train).reshape(-1, 784) @ first, 0)
    targets = 2 * np.eye(10, dtype="float32")[y_train] - 1
    last = np.linalg.solve(features.T @ features + 10 * np.eye(2000), features.T @ targets)
    arrays = {"first": first, "last": (8 * last).astype("float32")}  # logits of a usual size
    nodes = [
        helper.make_node("Flatten", ["image"], ["pixels"]),
        helper.make_node("MatMul", ["pixels", "first"], ["sums"]),
        helper.make_node("Relu", ["sums"], ["features"]),
        helper.make_node("MatMul", ["features", "last"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 28, 28])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "teacher", [image], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "teacher.onnx")


with_torch = importlib.util.find_spec("torch") is not None
from_torch() if with_torch else from_numpy()
print("PyTorch" if with_torch else "NumPy stands in for PyTorch")

# %% [markdown]
# ## The teacher in kdistill
#
# It runs in a process of its own. `mean` and `std` say how it sees raw pixels; the file says that channels come
# first.

# %%
teacher = kdistill.teacher("teacher.onnx", mean=127.5, std=127.5)


def outputs(images):
    """The teacher's logits, 500 images at a time."""
    batches = np.array_split(images.astype("float32"), max(1, len(images) // 500))
    return np.concatenate([np.asarray(teacher(batch)) for batch in batches])


accuracy = np.mean(outputs(digits.test.images).argmax(-1) == digits.test.labels)
print(f"teacher {accuracy:.2%}")

# %% [markdown]
# ## The student
#
# Its teacher runs once over all images; then the student trains from the stored outputs, for as many epochs as you
# like.

# %%
student = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Conv2D(8, 3, strides=2, activation="relu"),
        keras.layers.Conv2D(16, 3, strides=2, activation="relu"),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
stored = outputs(x_train)
distiller = kdistill.Distiller(student, distillation_weight=0.5, temperature=2.0)
distiller.compile(keras.optimizers.Adam(3e-3))
distiller.fit(x_train, {"labels": y_train, "teacher_logits": stored}, batch_size=128, epochs=5, verbose=2)
print(f"student {kdistill.evaluate(student, digits.test)['accuracy']:.2%}, {student.count_params():,} parameters")

# %% [markdown]
# ## The file

# %%
file = kdistill.export(student, "files", "phone_cpu", calibration=x_train, examples=digits.test)
print(f"{file['bytes']:,} bytes, agreement with the student {file['agreement']:.1%}")
print(f"accuracy of the file {kdistill.evaluate('files/student.tflite', digits.test)['accuracy']:.2%}")

# %% [markdown]
# As a recipe, with control, verdict and report: `kdistill run mnist --teacher teacher.onnx --teacher-mean 127.5
# --teacher-std 127.5`.
