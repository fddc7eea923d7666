"""Every kind of output against keras.distillation on the same model: steps per second, and the values of the loss.

    python benchmarks/heads.py [--repeats 7]

Both sides distill the same student from the same teacher with SGD at temperature 4 and weight 0.5, on the same 64
batches of 64 examples, 16 steps per execution, and log the accuracy or the mean absolute error. The value of each side
is its distillation loss of the untrained student, next to the formula in float64. keras.distillation has one loss of
logits, a softmax over the last axis: of one label it is always 0, and of several labels it compares distributions that
neither model gives.
"""

import keras
import numpy as np
from common import STEPS_PER_EXECUTION, arguments, batches, measured, ratio, save
from keras import distillation, layers

import kdistill

TEMPERATURE, WEIGHT, BATCH, STEPS = 4.0, 0.5, 64, 64
LOSSES = {
    "classes": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    "labels": keras.losses.BinaryCrossentropy(from_logits=True),
    "numbers": keras.losses.MeanSquaredError(),
}
METRICS = {"classes": "accuracy", "labels": "binary_accuracy", "numbers": "mae"}


def images(outputs: int, name: str, positions: bool = False):
    """A function of the width that gives a convolutional network."""

    def build(width: int) -> keras.Model:
        keras.utils.set_random_seed(width)
        x = image = keras.Input((16, 16, 1))
        for _ in range(2):
            x = layers.Conv2D(width, 3, padding="same", activation="relu")(x)
        x = layers.Conv2D(outputs, 1)(x) if positions else layers.Dense(outputs)(layers.Flatten()(x))
        return keras.Model(image, x, name=f"{name}_{width}")

    return build


# The networks, what their output means, and the shape of the labels.
HEADS = {
    "classes": (images(10, "classes"), "classes", lambda r, n: r.integers(0, 10, n)),
    "pixels": (images(4, "pixels", positions=True), "classes", lambda r, n: r.integers(0, 4, (n, 16, 16))),
    "binary": (images(1, "binary"), "labels", lambda r, n: r.integers(0, 2, (n, 1)).astype("float32")),
    "labels": (images(10, "labels"), "labels", lambda r, n: r.integers(0, 2, (n, 10)).astype("float32")),
    "numbers": (images(3, "numbers"), "numbers", lambda r, n: r.normal(size=(n, 3)).astype("float32")),
}


def right_value(meaning: str, student: np.ndarray, teacher: np.ndarray) -> float:
    """The distillation loss by its formula, in float64: the mean over the rows."""
    s, t = student.astype("float64"), teacher.astype("float64")
    if meaning == "numbers":
        return float(((s - t) ** 2).mean())
    s, t = s / TEMPERATURE, t / TEMPERATURE
    if meaning == "labels":
        p, q = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-s))
        kl = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    else:
        s, t = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (s, t))
        kl = np.exp(t) * (t - s)
    return float(TEMPERATURE**2 * kl.sum(-1).mean())


def ours(student, teacher, meaning: str) -> keras.Model:
    options = {} if meaning == "numbers" else {"temperature": TEMPERATURE}
    model = kdistill.Distiller(student, teacher, distillation_weight=WEIGHT, head=meaning, **options)
    model.compile(keras.optimizers.SGD(1e-3), LOSSES[meaning], steps_per_execution=STEPS_PER_EXECUTION)
    return model


def of_keras(student, teacher, meaning: str) -> keras.Model:
    loss = keras.losses.MeanSquaredError() if meaning == "numbers" else keras.losses.KLDivergence()
    temperature = 1.0 if meaning == "numbers" else TEMPERATURE
    model = distillation.Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=distillation.LogitsDistillation(temperature=temperature, loss=loss),
        student_loss_weight=1 - WEIGHT,
    )
    optimizer, metrics = keras.optimizers.SGD(1e-3), [METRICS[meaning]]  # kdistill logs it in any case
    model.compile(optimizer, LOSSES[meaning], metrics=metrics, steps_per_execution=STEPS_PER_EXECUTION)
    return model


def compared(name: str, repeats: int) -> dict:
    build, meaning, labels = HEADS[name]
    random = np.random.default_rng(0)
    x = random.normal(size=(BATCH * STEPS, 16, 16, 1)).astype("float32")
    y = labels(random, len(x))
    data = batches(x, y, batch_size=BATCH)
    teacher = build(24)
    models = {"kdistill": ours(build(8), teacher, meaning), "keras": of_keras(build(8), teacher, meaning)}
    first = slice(8 * BATCH)
    values = {"right": right_value(meaning, np.asarray(build(8)(x[first])), np.asarray(teacher(x[first])))}
    for side, key in (("kdistill", "kd"), ("keras", "distillation_loss")):
        logs = models[side].evaluate(x[first], y[first], batch_size=BATCH, verbose=0, return_dict=True)
        values[side] = logs[key]
    sides = {side: (lambda model=model: model.fit(data, verbose=0)) for side, model in models.items()}
    timings = measured(sides, len(x), repeats)
    print(f"{name}: " + ", ".join(f"{side} {value:.5f}" for side, value in values.items()))
    return {"values": values, "sides": timings, "kdistill / keras.distillation": ratio(timings, "kdistill", "keras")}


def main() -> None:
    """Measures, prints, writes `heads.json` and `heads.svg`."""
    options = arguments(__doc__).parse_args()
    result = {name: compared(name, options.repeats) for name in HEADS}
    bars = {name: head["kdistill / keras.distillation"]["ratio"] for name, head in result.items()}
    save("heads", result, options.out, bars, "Distilling online: examples per second over keras.distillation", "times")


if __name__ == "__main__":
    main()
