"""The cost of doubling data, batch, teacher and student, for distilling online and from the cache.

    python benchmarks/size.py [--repeats 5]

Seconds of an epoch over a ladder of sizes of one thing, the others fixed at the middle. A straight line through the
origin is the ideal for data, teacher and student; for the batch, seconds for each image should fall or stay.
"""

import tempfile
from itertools import pairwise

import keras
import numpy as np
from common import arguments, images_for, measured, resnet, save
from online import ours

from kdistill.data.splits import Examples, Splits
from kdistill.recipe import Data
from kdistill.teachers.replay import Replay

# images, batch, teacher's depth, student's width as a multiple; the middle ones are the base
IMAGES, BATCHES, TEACHERS, STUDENTS = (512, 1024, 2048), (32, 64, 128), (8, 14, 26), (1, 2, 4)
BASE = (1024, 64, 14, 2)


def student(width: int) -> keras.Model:
    """Two convolutions and a dense layer, `width` times 16 and 32 filters."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((32, 32, 3)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(16 * width, 3, strides=2, activation="relu"),
            layers.Conv2D(32 * width, 3, strides=2, activation="relu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def sides(root: str, count: int, batch_size: int, depth: int, width: int) -> dict:
    """An epoch online and one from the cache, at these sizes."""
    teacher = resnet(depth)
    images, labels = images_for(teacher, count)
    train = Examples(images, labels)
    splits = Splits(train, train, train, tuple("0123456789"), "random", f"{count:016}")
    replay = Replay(teacher, splits, Data("random"), batch_size, 0, root)
    replay.build(1, lambda text: None)
    options = replay.training_batches(0)
    online, cached = ours(student(width), teacher, 4), ours(student(width), None, 4)
    # The same batches; online leaves the stored logits out.
    bare = options.map(lambda x, targets: (x, targets["labels"]))
    once = {"epochs": 1, "verbose": 0}
    return {"online": lambda: online.fit(bare, **once), "cached": lambda: cached.fit(options, **once)}


def main() -> None:
    """Measures, prints, writes `size.json` and `size.svg`."""
    options = arguments(__doc__, repeats=5).parse_args()
    ladders = {"images": IMAGES, "batch": BATCHES, "teacher depth": TEACHERS, "student width": STUDENTS}
    points = {BASE}
    for place, ladder in enumerate(ladders.values()):
        points |= {(*BASE[:place], size, *BASE[place + 1 :]) for size in ladder}
    with tempfile.TemporaryDirectory() as root:
        keras.utils.set_random_seed(0)
        calls = {
            f"{side}, {point}": (call, point[0])
            for point in sorted(points)
            for side, call in sides(root, *point).items()
        }
        counts = {name: count for name, (_, count) in calls.items()}
        timings = measured({name: call for name, (call, _) in calls.items()}, counts, options.repeats)
    result, bars = {}, {}
    for place, (what, ladder) in enumerate(ladders.items()):
        for side in ("online", "cached"):
            rows = []
            for size in ladder:
                each = timings[f"{side}, {(*BASE[:place], size, *BASE[place + 1 :])}"]
                rows.append({"size": size, **{clock: float(np.median(each[clock])) for clock in ("wall", "cpu")}})
            result[f"{what}, {side}"] = rows
            for before, after in pairwise(rows):
                bars[f"{what} {before['size']} to {after['size']}, {side}"] = after["cpu"] / before["cpu"]
    title = "CPU time of an epoch, after doubling (the depth: 8, 14, 26 layers have 3, 6, 12 blocks) over before"
    save("size", {"sides": timings, "ladders": result}, options.out, bars, title, "times")


if __name__ == "__main__":
    main()
