"""Filling the teacher cache from a process of the teacher's own, against the same Keras model in this process.

    python benchmarks/teachers.py [--pair lenet] [--repeats 7] [--images 9000]

A Python file loads the model and calls it in a `tf.function`; both sides fill an empty cache with one pass over the
images, in turn. Reports images per second, their ratio within a round, the overhead of an image (the time of a batch
through a process that computes nothing), and whether the stored logits are equal.
"""

import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from common import arguments, lenet_pair, resnet_pair, save

from kdistill.data.splits import Examples, Splits
from kdistill.recipe import Data, Network
from kdistill.teachers.as_model import load_teacher
from kdistill.teachers.replay import Replay

PAIRS = {"lenet": (lenet_pair, (28, 28, 1)), "resnet": (resnet_pair, (32, 32, 3))}
SCRIPT = """
import keras
import tensorflow as tf

model = keras.saving.load_model({path!r}, compile=False)
call = tf.function(lambda images: model(images, training=False))


def predict(images):
    return call(tf.constant(images))
"""
BATCH, CALLS = 256, 200


def splits_of(shape, count: int) -> Splits:
    """Random images: only time is measured."""
    random = np.random.default_rng(0)

    def examples(size: int) -> Examples:
        pixels = random.integers(0, 256, (size, *shape), dtype=np.uint8)
        return Examples(pixels, random.integers(0, 10, size).astype(np.int32))

    return Splits(examples(count), examples(256), examples(256), tuple(map(str, range(10))), "random", "0" * 16)


def fill(model, splits: Splits) -> tuple[float, np.ndarray]:
    """Images per second of a pass that fills an empty cache, and the stored logits."""
    with tempfile.TemporaryDirectory() as folder:
        replay = Replay(model, splits, Data("random"), BATCH, 0, Path(folder))
        start = time.perf_counter()
        replay.build(1, lambda text: None)
        seconds = time.perf_counter() - start
        return len(splits.train) / seconds, replay.train.read_rows(0, slice(0, len(splits.train))).copy()


def overhead(foreign, batch: np.ndarray) -> float:
    """Microseconds of an image on the way to the process and back, with a function that does nothing there."""
    times = []
    for _ in range(CALLS):
        start = time.perf_counter()
        foreign.predict(batch)
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times) / len(batch)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pair", choices=PAIRS, default="lenet")
    parser.add_argument("--images", type=int, default=9000)
    options = parser.parse_args()
    pair, shape = PAIRS[options.pair]
    keras.utils.set_random_seed(0)
    splits = splits_of(shape, options.images)
    with tempfile.TemporaryDirectory() as folder:
        path, script, empty = (Path(folder, name) for name in ("model.keras", "script.py", "empty.py"))
        pair()[0].save(path)
        script.write_text(SCRIPT.format(path=str(path)))
        empty.write_text("def predict(images):\n    return images.reshape(len(images), -1)[:, :10]\n")
        own = load_teacher(Network("t", file=str(script)), shape, 10).model
        models = {"in this process": keras.saving.load_model(path, compile=False), "in one of its own": own}
        rounds, logits = {side: [] for side in models}, {}
        for place in range(options.repeats + 1):
            for side in list(models)[:: 1 if place % 2 else -1]:
                rate, logits[side] = fill(models[side], splits)
                if place:  # the first round warms up
                    rounds[side].append(rate)
        nothing = load_teacher(Network("t", file=str(empty)), shape, 10).adapted.teacher
        microseconds = overhead(nothing, splits.train.images[:BATCH].astype(np.float32))
    ratios = [own / inside for inside, own in zip(*rounds.values(), strict=True)]
    result = {
        "pair": options.pair,
        "images": options.images,
        "images_per_second": {side: statistics.median(rates) for side, rates in rounds.items()},
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4)[::2] if len(ratios) > 1 else ratios,
        "overhead_us": microseconds,
        "equal": bool(np.array_equal(*logits.values())),
    }
    equal = "equal" if result["equal"] else "not equal"
    print(f"Ratio {result['ratio']:.2f} ({', '.join(f'{q:.2f}' for q in result['quartiles'])}); logits are {equal}.")
    print(f"A batch of {BATCH} goes to the process and back in {microseconds:.2f} us for each image.")
    save("teachers", result, options.out, result["images_per_second"], "Filling the teacher cache", "images/s")


if __name__ == "__main__":
    main()
