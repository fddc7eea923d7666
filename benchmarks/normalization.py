"""A training step with `BatchNormalization` as Keras computes it, and as one operation of TensorFlow.

    python benchmarks/normalization.py [--steps 30] [--repeats 7]

Plain SGD steps on one batch of 128 images, of the student of `mnist` and of ResNet-8, in float32 and mixed bfloat16.
Both sides have the same weights at the start and take turns. Reports how many times as fast one operation is.
"""

from contextlib import nullcontext
from functools import partial

import keras
import numpy as np
import tensorflow as tf
from common import arguments, measured, ratio, resnet, save

from kdistill.networks.architectures import small_cnn
from kdistill.networks.keras_internals import fused_normalization
from kdistill.networks.precision import dtype_policy

BATCH = 128
NETWORKS = {
    "small_cnn (8, 16, 24)": ((28, 28, 1), small_cnn),
    "ResNet-8": ((32, 32, 3), lambda shape, classes: resnet(8)),
}
POLICIES, FUSED = ("float32", "mixed_bfloat16"), "one operation"


def steps_of(build, shape, policy: str, fused: bool):
    """A function that takes a number of steps."""
    keras.utils.set_random_seed(0)
    with dtype_policy(policy):
        model = build(shape, 10)
    optimizer = keras.optimizers.SGD(0.01)
    optimizer.build(model.trainable_variables)
    random = np.random.default_rng(0)
    images = tf.constant(random.integers(0, 256, (BATCH, *shape)), tf.float32)
    labels = tf.constant(random.integers(0, 10, BATCH))

    def step():
        with tf.GradientTape() as tape:
            with fused_normalization(model) if fused else nullcontext():
                logits = tf.cast(model(images, training=True), tf.float32)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    @tf.function
    def steps(count):
        for _ in tf.range(count):
            step()

    return steps


def main() -> None:
    """Measures both sides in turn, prints and saves."""
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    count, results, bars = tf.constant(options.steps), {}, {}
    for name, (shape, build) in NETWORKS.items():
        for policy in POLICIES:
            sides = {side: partial(steps_of(build, shape, policy, side == FUSED), count) for side in ("Keras", FUSED)}
            timings = measured(sides, BATCH * options.steps, options.repeats)
            found = ratio(timings, FUSED, "Keras")
            results[f"{name}, {policy}"] = {**timings, "ratio": found}
            bars[f"{name}, {policy}: {FUSED} / Keras"] = found["ratio"]
            low, high = found["quartiles"]
            print(f"{name}, {policy}: {found['ratio']:.2f} ({low:.2f} to {high:.2f}), CPU {found['cpu_ratio']:.2f}")
    save("normalization", results, options.out, bars, "Training steps a second, batch of 128", "times as fast")


if __name__ == "__main__":
    main()
