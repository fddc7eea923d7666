# %% [markdown]
# # Distill your Keras classifier in ten minutes
#
# From a trained Keras model to a small one in a checked `.tflite`. It runs on Colab, and locally on two CPU cores in
# about a minute. To open it as a notebook: `python to_ipynb.py ten_minutes.py`.

# %%
# %pip install --quiet kdistill
import keras
import numpy as np

import kdistill
from kdistill.data.splits import load
from kdistill.recipe import Data

keras.utils.set_random_seed(0)

# %% [markdown]
# ## Your data
#
# Arrays of raw pixels, 0 to 255, and the numbers of their classes. Here: digits that ship with kdistill. For yours,
# replace this cell.

# %%
digits = load(Data(), say=print)
x_train, y_train = digits.train.images, digits.train.labels
x_test, y_test = digits.test.images, digits.test.labels
print(x_train.shape, x_train.dtype, np.unique(y_train))

# %% [markdown]
# ## Your model
#
# The teacher: any Keras model that is trained already, such as `keras.models.load_model("mine.keras")`. Here one is
# trained now.


# %%
def network(width, name):
    layers = [keras.layers.Conv2D(width * factor, 3, strides=2, activation="relu") for factor in (1, 2)]
    return keras.Sequential(
        [
            keras.Input(x_train.shape[1:]),
            keras.layers.Rescaling(1 / 255),
            *layers,
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ],
        name=name,
    )


teacher = network(24, "teacher")
teacher.compile(
    keras.optimizers.Adam(2e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
)
teacher.fit(x_train, y_train, batch_size=64, epochs=4, verbose=2)

# %% [markdown]
# ## The student, and its control
#
# The control is the same student on labels alone. Without it nobody knows whether the teacher helped.

# %%
students = {}
for name, weight in (("control", 0.0), ("student", 0.9)):
    keras.utils.set_random_seed(1)
    students[name] = network(6, name)
    distiller = kdistill.Distiller(students[name], teacher, distillation_weight=weight, temperature=4.0)
    distiller.compile(keras.optimizers.Adam(5e-3))
    distiller.fit(x_train, y_train, batch_size=64, epochs=4, verbose=2)

# %%
for name, model in {"teacher": teacher, **students}.items():
    print(f"{name}: {kdistill.evaluate(model, digits.test)['accuracy']:.2%}, {model.count_params():,} parameters")

# %% [markdown]
# One seed proves little: a run of a recipe (`kdistill new mine`, `kdistill run mine.py --seeds 3..10`) trains
# several, and gives a verdict.
#
# ## The file
#
# Full int8, calibrated on training images. The file runs in a process of its own, without TensorFlow, and is compared
# with its model.

# %%
student = students["student"]
file = kdistill.export(student, "files", "npu", calibration=x_train, examples=digits.test)
print(
    f"{file['bytes']:,} bytes, agreement with the student {file['agreement']:.1%}, points lost {100 * file['drop']:.2f}"
)
accuracy = kdistill.evaluate("files/student.tflite", digits.test)["accuracy"]
print(f"accuracy of the file {accuracy:.2%}")

# %% [markdown]
# What is in the file: `kdistill inspect files/student.tflite`. Example programs for Android, iOS and
# microcontrollers: `examples/`.
