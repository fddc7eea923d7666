"""Distilling with two terms of features against keras.distillation with the same two, and against no such terms.

    python benchmarks/features.py [--repeats 7]

A hint (the squared difference; channels are the same here) at the ends of the second and third stage of
ResNet-56 and ResNet-8, besides the softened logits. keras.distillation runs the student, and the teacher, anew for its
features; kdistill taps both in the forward that there is anyway. `as in runs` is what `kdistill run` does besides: a
teacher with its normalization folded (but for the tapped layers), and the fused Adam.
"""

import keras
from common import PAIRS, STEPS_PER_EXECUTION, arguments, batches, images_for, measured, ratio, save
from keras import distillation
from online import TEMPERATURE, WEIGHT, ours

import kdistill
from kdistill.networks import folding


def stages(model: keras.Model) -> list[str]:
    """The last layer of each of the three stages: the last one with 32x32, 16x16 and 8x8 places."""
    last = {}
    for layer in model.layers:
        if len(getattr(layer.output, "shape", ())) == 4:
            last[layer.output.shape[1]] = layer.name
    return list(last.values())


def of_keras(student, teacher, taps) -> keras.Model:
    """keras.distillation with two FeatureDistillations and logits."""
    losses = [distillation.LogitsDistillation(temperature=TEMPERATURE, loss=keras.losses.KLDivergence())]
    losses += [
        distillation.FeatureDistillation(loss="mse", teacher_layer_name=t, student_layer_name=s) for s, t in taps
    ]
    distiller = distillation.Distiller(
        teacher=teacher,
        student=student,
        distillation_losses=losses,
        distillation_loss_weights=[1.0, 1.0, 1.0],
        student_loss_weight=1 - WEIGHT,
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    adam = keras.optimizers.Adam(1e-3)
    distiller.compile(optimizer=adam, loss=loss, metrics=["accuracy"], steps_per_execution=STEPS_PER_EXECUTION)
    return distiller


def main() -> None:
    """Measures, prints, writes `features.json` and `features.svg`."""
    options = arguments(__doc__).parse_args()
    make, batch_size, steps = PAIRS["resnet"]
    keras.utils.set_random_seed(0)
    teacher, student = make()
    own, one, two = student(), student(), student()

    def taps(of: keras.Model) -> list[tuple[str, str]]:
        return list(zip(stages(of), stages(teacher), strict=True))[1:]

    def terms(of: keras.Model) -> dict[str, kdistill.Term]:
        named = enumerate(taps(of))
        return {f"hint{place}": kdistill.Term("hint", student_tap=s, teacher_tap=t) for place, (s, t) in named}

    folded = folding.inference_copy(teacher, taps=stages(teacher))
    images, labels = images_for(teacher, batch_size * steps)
    data, once = batches(images, labels, batch_size=batch_size), {"epochs": 1, "verbose": 0}
    models = {
        "kdistill, two terms, as in runs": ours(own, folded, terms=terms(own), own=True),
        "kdistill, two terms": ours(one, teacher, terms=terms(one)),
        "keras.distillation, two terms": of_keras(two, teacher, taps(two)),
        "kdistill, logits alone": ours(student(), teacher),
    }
    sides = {name: (lambda model=model: model.fit(data, **once)) for name, model in models.items()}
    timings = measured(sides, len(images), options.repeats)
    result = {
        "sides": timings,
        "kdistill / keras.distillation": ratio(timings, "kdistill, two terms", "keras.distillation, two terms"),
        "kdistill, as in runs / keras.distillation": ratio(
            timings, "kdistill, two terms, as in runs", "keras.distillation, two terms"
        ),
        "two terms / none": ratio(timings, "kdistill, two terms", "kdistill, logits alone"),
    }
    bars = {name: each["images_per_second"] for name, each in timings.items()}
    title = "Distilling with two terms of features, ResNet-56 to ResNet-8"
    save("features", {"resnet": result}, options.out, bars, title, "images per second")


if __name__ == "__main__":
    main()
