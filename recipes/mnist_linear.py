"""The numpy tutorial: six students of one layer learn a small teacher's outputs, at six learning rates side by side.

    kdistill sweep mnist_linear                         on the sample: too few steps for this teacher, see below
    kdistill sweep mnist_linear --data-dir FOLDER       on all of MNIST (the four IDX files): the published results
    kdistill sweep mnist_linear --variant unscaled      the same with pixels from 0 to 255, the tutorial's first trial
    kdistill sweep mnist_linear --variant smoke         the same, tiny: for tests

"Neural networks fundamentals with Python: student-teacher": a teacher of 784-16-16-10 with LeakyReLU after every
layer; six students of 784-10 with LeakyReLU, trained by the squared error to the teacher's outputs; batches of one
image, plain SGD, one epoch. An image passes through the teacher once and trains all six students. A benchmark student
of the same architecture learns the labels by cross-entropy; here it is the control.

The tutorial does not define its squared error. The mean over the 10 outputs (a gradient of 2/10 of the difference),
LeakyReLU with slope 0.1, and normal initial weights with standard deviation 1 / (inputs * outputs) give the published
results. The sum (a gradient of 2) acts as ten times the rate, and breaks down from 0.01 on. So `mse_logits`, which is
the mean, is the tutorial's loss. Here images come in random order, and 2 % of them are used for validation.

Because its initial weights are tiny, the teacher needs more than the sample's 9,800 steps to exceed chance (11.35 %).
Until then the six students have nothing to learn from it.

Measured on all of MNIST, seed 0: 81.31, 82.04, 81.69, 81.21, 65.49, 29.29 beside the published 82.0, 82.72, 82.62,
82.29, 69.4, 36.55; teacher 90.02 (86.69), benchmark 90.14 (about 90). See docs/experiments.md. Cost: about a minute
on the sample, 5 on all of MNIST (2 CPU cores, busy with other work).
"""

import dataclasses

from kdistill.recipe import Data, Distill, Network, Recipe, Term, Training

# Published accuracies by learning rate.
RATES = {0.001: 0.82, 0.003: 0.8272, 0.01: 0.8262, 0.03: 0.8229, 0.1: 0.694, 0.3: 0.3655}


def recipe(variant: str = "default") -> Recipe:
    """Variants: `default`; `unscaled`, pixels of 0 to 255; `smoke`, 300 images."""
    training = Training(epochs=1, batch_size=1, optimizer="sgd", learning_rate=0.001, schedule="constant")
    base = Recipe(
        name="mnist_linear",
        variant=variant,
        data=Data("mnist", validation=0.02),
        teacher=Network("mlp", {"units": (16, 16), "slope": 0.1, "scale": 1 / 255}),
        student=Network("mlp", {"units": (), "slope": 0.1, "scale": 1 / 255}),
        teacher_training=dataclasses.replace(training, learning_rate=0.03),
        training=training,
        distill=Distill(1.0, temperature=None, terms={"kd": Term("mse_logits")}),
        exports=("reference",),
        grid=("training.learning_rate=" + ",".join(map(str, RATES)),),
        published=(("teacher", 0.8669), ("control", 0.90), *((f"learning_rate={r}", a) for r, a in RATES.items())),
    )
    if variant == "default":
        return base
    if variant == "unscaled":
        raw = dataclasses.replace(base.student, options={**base.student.options, "scale": 1.0})
        return dataclasses.replace(base, student=raw, published=(("control", 0.098),))
    if variant == "smoke":
        return dataclasses.replace(base, data=dataclasses.replace(base.data, train_limit=300))
    raise KeyError(variant)
