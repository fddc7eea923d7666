"""Distilling from the cache, as a run does it, against stock `student.fit(x, y)`: seconds and test accuracy by seed.

    python benchmarks/to_accuracy.py [--data-dir FOLDER] [--pair lenet resnet] [--seeds 3] [--images 60000]

`cached.py` measures speed on random images; this one asks whether the faster way is as accurate. The pairs of
`common.py` learn MNIST (for the ResNets in three channels, with an edge of 2 pixels). The teacher is trained first,
with a cosine schedule: after so few epochs it would otherwise be less accurate than the student alone. The cache is
filled once for all seeds; its time is stated separately. Then, for each seed, the same student from the same weights:

    stock            `student.fit(x, y, batch_size=128)` in float32, one step per execution, Keras's Adam
    cached           distilled from the stored logits, 16 steps per execution, the fused Adam
    cached bfloat16  the same with a student in mixed_bfloat16, measured in float32 (not for the small LeNet student)

Seconds are those of all epochs with what compiling takes. The sides take turns, in an order that rotates.
"""

import tempfile
import time
from collections.abc import Callable

import keras
import numpy as np
from common import PAIRS, arguments, plain, save
from online import ours

from kdistill.conversion import float32
from kdistill.data import load
from kdistill.data.splits import Examples, Splits
from kdistill.evaluation import verdict
from kdistill.evaluation.evaluate import predict
from kdistill.recipe import Data
from kdistill.teachers.replay import Replay

EPOCHS, TEACHER_EPOCHS, BATCH = {"lenet": 5, "resnet": 8}, {"lenet": 4, "resnet": 8}, 128
SIDES = {"lenet": ("stock", "cached"), "resnet": ("stock", "cached", "cached bfloat16")}


def examples(of: Examples, pair: str, count: int | None) -> Examples:
    """The first `count` images as the pair takes them."""
    images, labels = of.images[:count], of.labels[:count]
    if pair == "resnet":
        images = np.repeat(np.pad(images, [[0, 0], [2, 2], [2, 2], [0, 0]]), 3, axis=-1)
    return Examples(images, labels)


def accuracy(model: keras.Model, test: Examples) -> float:
    """The share of right classes."""
    return float(np.mean(predict(model, test.images).argmax(-1) == test.labels))


def one(side: str, seed: int, make, train: Examples, stored: Replay, epochs: int) -> tuple[keras.Model, float]:
    """A student trained by one side, in float32 again, and the seconds that its training took."""
    keras.config.set_dtype_policy("mixed_bfloat16" if side.endswith("bfloat16") else "float32")
    keras.utils.set_random_seed(seed)
    student = make()
    keras.config.set_dtype_policy("float32")
    start = time.perf_counter()
    if side == "stock":
        pixels = train.images.astype("float32")
        plain(student, 1).fit(pixels, train.labels, batch_size=BATCH, epochs=epochs, verbose=0)
    else:
        distiller = ours(student, own=True)
        for epoch in range(epochs):
            distiller.fit(stored.training_batches(epoch), initial_epoch=epoch, epochs=epoch + 1, verbose=0)
    return float32.prepare(student).model, time.perf_counter() - start


def taught(name: str, train: Examples, test: Examples) -> tuple[keras.Model, Callable[[], keras.Model]]:
    """The pair's teacher, trained, and what makes its student."""
    keras.utils.set_random_seed(100)
    teacher, make = PAIRS[name][0]()
    pixels, start = train.images.astype("float32"), time.perf_counter()
    steps = TEACHER_EPOCHS[name] * -(-len(train) // BATCH)
    plain(teacher).optimizer.learning_rate = keras.optimizers.schedules.CosineDecay(1e-3, steps)
    teacher.fit(pixels, train.labels, batch_size=BATCH, epochs=TEACHER_EPOCHS[name], verbose=0)
    seconds = time.perf_counter() - start
    print(f"{name}: {len(train):,} images; teacher {accuracy(teacher, test):.2%} after {seconds:.0f} s", flush=True)
    return teacher, make


def compared(results: dict[str, dict], images: int) -> dict[str, dict]:
    """Times and verdicts of each side against stock, added to the results."""
    stock = results["stock"]
    for side in [name for name in results if name != "stock"]:
        times = np.divide(stock["seconds"], results[side]["seconds"])
        results[side]["times as fast as stock"] = float(np.median(times))
        results[side]["range"] = [times.min(), times.max()]
        if len(times) > 1:
            results[side]["verdict"] = verdict.judge(results[side]["accuracy"], stock["accuracy"], images)
            print(f"  {side} (the student) against stock (the control): {results[side]['verdict']['sentence']}")
    return results


def one_pair(name: str, splits: Splits, options) -> dict:
    """Seconds and accuracies of all sides by seed."""
    train, test = examples(splits.train, name, options.images), examples(splits.test, name, None)
    teacher, make = taught(name, train, test)
    few = examples(splits.validation, name, BATCH)
    kept = Splits(train, few, test, splits.class_names, splits.source, f"{name:0>16}")
    results = {side: {"seconds": [], "accuracy": []} for side in SIDES[name]}
    with tempfile.TemporaryDirectory() as root:
        stored = Replay(teacher, kept, Data("mnist"), BATCH, 0, root)
        start = time.perf_counter()
        stored.build(1, lambda text: None)
        filling = time.perf_counter() - start
        for seed in range(options.seeds):
            sides = SIDES[name][seed % len(results) :] + SIDES[name][: seed % len(results)]
            for side in sides:
                student, seconds = one(side, seed, make, train, stored, EPOCHS[name])
                results[side]["seconds"].append(seconds)
                results[side]["accuracy"].append(accuracy(student, test))
                print(f"  seed {seed}, {side}: {seconds:.1f} s, {results[side]['accuracy'][-1]:.2%}", flush=True)
    results = compared(results, len(test))
    return {"epochs": EPOCHS[name], "images": len(train), "filling the cache, seconds": filling, "sides": results}


def main() -> None:
    """Measures, prints, writes `to_accuracy.json` and `to_accuracy.svg`."""
    parser = arguments(__doc__, repeats=None)
    parser.add_argument("--pair", nargs="*", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--data-dir", help="all of MNIST; without it the sample that ships with kdistill")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, help="train on so many only")
    options = parser.parse_args()
    splits = load(Data("mnist"), options.data_dir)
    result = {name: one_pair(name, splits, options) for name in options.pair}
    bars = {
        f"{name}: {side} / stock": each["times as fast as stock"]
        for name, pair in result.items()
        for side, each in pair["sides"].items()
        if side != "stock"
    }
    title = "Training a student: seconds of stock fit over those of the cached way"
    save("to_accuracy", result, options.out, bars, title, "times")


if __name__ == "__main__":
    main()
