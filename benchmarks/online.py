"""Distilling online against keras.distillation, against the way of keras.io, and against the limit.

    python benchmarks/online.py [--pair lenet resnet mobilenet resnet50] [--repeats 7]

All sides train the same student from the same teacher on the same batches with Adam, temperature 4, weight 0.9 and 16
steps per execution. keras.distillation gets a `KLDivergence()` instance: with its default loss it computes something
else. The *limit* is the teacher's forward pass plus plain `fit` of the student on labels, each measured alone: what one
cannot save without leaving the teacher out or changing it. `as in runs` is what `kdistill run` does besides: a teacher
with its normalization folded, and the fused Adam; `teacher in ...` is the same with a `teacher_precision`. `stock`
sides are what a user types: NumPy arrays, one step per execution.
"""

import keras
import tensorflow as tf
from common import (
    PAIRS,
    STEPS_PER_EXECUTION,
    arguments,
    batches,
    faster_teachers,
    forward,
    images_for,
    measured,
    plain,
    ratio,
    save,
)
from keras import distillation

import kdistill
from kdistill.networks import folding
from kdistill.training import optimizers

TEMPERATURE, WEIGHT = 4.0, 0.9


class ByHand(keras.Model):
    """What the tutorials do: a model of two models with a `train_step` of its own."""

    def __init__(self, student, teacher):
        super().__init__()
        self.student, self.teacher = student, teacher

    def compile(self, **options):
        super().compile(**options)
        self.hard = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.soft = keras.losses.KLDivergence()

    def call(self, images, training=False):
        return self.student(images, training=training)

    def train_step(self, data):
        images, labels = data
        taught = self.teacher(images, training=False)
        with tf.GradientTape() as tape:
            logits = self.student(images, training=True)
            soft = self.soft(tf.nn.softmax(taught / TEMPERATURE), tf.nn.softmax(logits / TEMPERATURE)) * TEMPERATURE**2
            loss = (1 - WEIGHT) * self.hard(labels, logits) + WEIGHT * soft
        gradients = tape.gradient(loss, self.student.trainable_variables)
        self.optimizer.apply(gradients, self.student.trainable_variables)
        for metric in self.metrics:
            metric.update_state(loss) if metric.name == "loss" else metric.update_state(labels, logits)
        return {metric.name: metric.result() for metric in self.metrics}


def of_keras(student, teacher, steps_per_execution=STEPS_PER_EXECUTION) -> keras.Model:
    """keras.distillation, set up so that it computes the same loss."""
    model = distillation.Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=distillation.LogitsDistillation(temperature=TEMPERATURE, loss=keras.losses.KLDivergence()),
        student_loss_weight=1 - WEIGHT,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3),
        loss=loss,
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )
    return model


def ours(student, teacher=None, steps_per_execution=STEPS_PER_EXECUTION, own=False, **more) -> kdistill.Distiller:
    """kdistill's, with Keras's Adam; `own`: with what a run of kdistill takes, its fused Adam."""
    model = kdistill.Distiller(student, teacher, distillation_weight=WEIGHT, temperature=TEMPERATURE, **more)
    adam = optimizers.Adam if own else keras.optimizers.Adam
    model.compile(adam(1e-3), steps_per_execution=steps_per_execution)
    return model


def by_hand(student, teacher) -> keras.Model:
    """The tutorials'."""
    model = ByHand(student, teacher)
    model.compile(optimizer=keras.optimizers.Adam(1e-3), metrics=["accuracy"], steps_per_execution=STEPS_PER_EXECUTION)
    return model


def one_pair(name: str, repeats: int) -> dict:
    """All sides for one pair."""
    make, batch_size, steps = PAIRS[name]
    keras.utils.set_random_seed(0)
    teacher, student = make()
    images, labels = images_for(teacher, batch_size * steps)
    data, pixels = batches(images, labels, batch_size=batch_size), images.astype("float32")
    once = {"epochs": 1, "verbose": 0}
    models = {
        "kdistill": ours(student(), teacher),
        "kdistill, as in runs": ours(student(), folding.inference_copy(teacher), own=True),
        "keras.distillation": of_keras(student(), teacher),
        "by hand, as on keras.io": by_hand(student(), teacher),
        "student alone": plain(student()),
    }
    faster = faster_teachers(teacher, images)
    names = {precision: f"kdistill, teacher in {precision}" for precision in faster}
    models |= {names[precision]: ours(student(), copy, own=True) for precision, copy in faster.items()}
    sides = {each: (lambda model=model: model.fit(data, **once)) for each, model in models.items()}
    stock = of_keras(student(), teacher, steps_per_execution=1)
    sides["keras.distillation, stock"] = lambda: stock.fit(pixels, labels, batch_size=batch_size, **once)
    alone = forward(teacher)
    sides["teacher alone"] = lambda: alone(data)
    print(f"{name}: teacher {teacher.count_params():,}, student {student().count_params():,} parameters")
    timings = measured(sides, len(images), repeats)
    limit = ["teacher alone", "student alone"]
    return {
        "sides": timings,
        "kdistill / limit": ratio(timings, "kdistill", limit),
        "kdistill, as in runs / limit": ratio(timings, "kdistill, as in runs", limit),
        **{f"{name} / limit": ratio(timings, name, limit) for name in names.values()},
        "kdistill, as in runs / keras.distillation": ratio(timings, "kdistill, as in runs", "keras.distillation"),
        "kdistill / keras.distillation": ratio(timings, "kdistill", "keras.distillation"),
        "kdistill / by hand": ratio(timings, "kdistill", "by hand, as on keras.io"),
        "kdistill / keras.distillation, stock": ratio(timings, "kdistill", "keras.distillation, stock"),
    }


def main() -> None:
    """Measures, prints, writes `online.json` and `online.svg`."""
    parser = arguments(__doc__)
    parser.add_argument("--pair", nargs="*", default=["lenet", "resnet"], choices=list(PAIRS))
    options = parser.parse_args()
    result = {name: one_pair(name, options.repeats) for name in options.pair}
    bars = {
        f"{name}: {key}": value["ratio"]
        for name, pair in result.items()
        for key, value in pair.items()
        if key != "sides"
    }
    save("online", result, options.out, bars, "Distilling online: images per second, kdistill over others", "times")


if __name__ == "__main__":
    main()
