"""A training step with `BatchNormalization` as Keras computes it, and as one operation of TensorFlow.

    python benchmarks/normalization.py [--steps 30] [--repeats 7]

Plain SGD steps on one batch of 128 images, of the student of `mnist` and of ResNet-8, in float32 and mixed bfloat16.
Both sides have the same weights at the start and take turns. Reports the time of a step and the ratio within a round.
"""

import resource
import statistics
import time
from contextlib import nullcontext

import keras
import numpy as np
import tensorflow as tf
from common import arguments, save

from kdistill.networks.architectures import resnet, small_cnn
from kdistill.networks.keras_internals import fused_normalization
from kdistill.networks.precision import dtype_policy

BATCH = 128
NETWORKS = {
    "small_cnn (8, 16, 24)": ((28, 28, 1), small_cnn),
    "ResNet-8": ((32, 32, 3), lambda shape, classes: resnet(shape, classes, 8)),
}
POLICIES = ("float32", "mixed_bfloat16")


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

    steps(tf.constant(3))
    return steps


def seconds(steps, count: int) -> tuple[float, float]:
    """Wall and processor time of a step."""
    usage, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    steps(tf.constant(count))
    after = resource.getrusage(resource.RUSAGE_SELF)
    processor = after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime
    return (time.perf_counter() - start) / count, processor / count


def main() -> None:
    """Measures both sides in turn, prints and saves."""
    parser = arguments(__doc__, repeats=7)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    results, bars = {}, {}
    for name, (shape, build) in NETWORKS.items():
        for policy in POLICIES:
            sides = {
                side: steps_of(build, shape, policy, side == "one operation") for side in ("Keras", "one operation")
            }
            times = {side: [] for side in sides}
            for turn in range(options.repeats):
                for side in list(sides)[:: -1 if turn % 2 else 1]:
                    times[side].append(seconds(sides[side], options.steps))
            ratios = [
                [
                    fused[place] / plain[place]
                    for plain, fused in zip(times["Keras"], times["one operation"], strict=True)
                ]
                for place in range(2)
            ]
            wall, processor = (statistics.median(of_kind) for of_kind in ratios)
            results[f"{name}, {policy}"] = {"times": times, "wall": ratios[0], "processor": ratios[1]}
            for side in sides:
                bars[f"{name}, {policy}: {side}"] = 1000 * statistics.median(one for one, _ in times[side])
            print(
                f"{name}, {policy}: one operation / Keras {wall:.2f} ({min(ratios[0]):.2f} to {max(ratios[0]):.2f}), "
                f"processor {processor:.2f}",
                flush=True,
            )
    save("normalization", results, options.out, bars, "A training step, batch of 128", "ms")


if __name__ == "__main__":
    main()
