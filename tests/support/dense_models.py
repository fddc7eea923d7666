"""Small dense models, data for them, and a Distiller of the two."""

import keras
import numpy as np

from kdistill.distillation.distiller import Distiller

RNG = np.random.default_rng(7)
X = RNG.normal(size=(48, 6)).astype("float32")
Y = RNG.integers(0, 4, 48).astype("int32")
SW = RNG.uniform(0.2, 2.0, 48).astype("float32")


def dense(seed=0, ending="logits", classes=4, width=5, penalty=None):
    keras.utils.set_random_seed(seed)
    net = [keras.Input((6,)), keras.layers.Dense(width, activation="tanh", kernel_regularizer=penalty)]
    if ending == "fused":
        net.append(keras.layers.Dense(classes, activation="softmax"))
    else:
        net.append(keras.layers.Dense(classes))
    if ending == "softmax":
        net.append(keras.layers.Softmax())
    if ending == "activation":
        net.append(keras.layers.Activation("softmax"))
    return keras.Sequential(net)


def functional(seed=0, ending="softmax"):
    sequential = dense(seed, ending)
    image = keras.Input((6,))
    return keras.Model(image, sequential(image))


def values_of(model):
    return [v.numpy() for v in model.weights]


def compiled(student, teacher, rate=0.1, **options):
    distiller = Distiller(student, teacher, **options)
    distiller.compile(keras.optimizers.SGD(rate))
    return distiller
