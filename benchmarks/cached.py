"""Distilling from the teacher cache against plain training of the student, and what filling the cache costs.

    python benchmarks/cached.py [--pair lenet resnet mobilenet resnet50 resnet50_96] [--repeats 7]

- `cached` and `student alone` read the same input pipeline, with 16 steps per execution: the one has the teacher's
  stored logits beside the labels. `as in runs` has kdistill's fused Adam in place of Keras'.
- `student alone, stock` is `student.fit(x, y, batch_size=...)` on NumPy arrays, as anyone types it; `cached, bfloat16`
  is `cached, as in runs` with a student in mixed_bfloat16.
- `filling the cache` is a pass that computes, checks and writes every part, against `teacher.predict(x)`; `teacher in
  ...` has its `teacher_precision`.
"""

import shutil
import tempfile

import keras
from common import PAIRS, STEPS_PER_EXECUTION, arguments, faster_teachers, images_for, measured, plain, ratio, save
from online import of_keras, ours

from kdistill.data import batches
from kdistill.data.splits import Examples, Splits
from kdistill.recipe import Data
from kdistill.teachers.replay import Replay


def one_pair(name: str, repeats: int, root: str) -> dict:
    """All sides for one pair."""
    make, batch_size, steps = PAIRS[name]
    keras.utils.set_random_seed(0)
    teacher, student = make()
    images, labels = images_for(teacher, batch_size * steps)
    train, few = Examples(images, labels), Examples(images[:batch_size], labels[:batch_size])
    classes = tuple(map(str, range(teacher.output_shape[-1])))
    splits, data = Splits(train, few, few, classes, "random", f"{name:0>16}"), Data("random")

    def replay(place: str, teacher=teacher) -> Replay:
        return Replay(teacher, splits, data, batch_size, 0, f"{root}/{name}/{place}")

    def fill(place: str = "again") -> None:
        shutil.rmtree(f"{root}/{name}/{place}", ignore_errors=True)
        fillers[place].build(1, lambda text: None)

    faster = faster_teachers(teacher, images)
    names = {precision: f"filling the cache, teacher in {precision}" for precision in faster}
    fillers = {"again": replay("again")} | {precision: replay(precision, copy) for precision, copy in faster.items()}
    stored = replay("once")
    stored.build(1, lambda text: None)
    keras.config.set_dtype_policy("mixed_bfloat16")
    narrow = ours(make()[1](), own=True)
    keras.config.set_dtype_policy("float32")
    cached, own, online = ours(student()), ours(student(), own=True), of_keras(student(), teacher)
    alone, stock = plain(student()), plain(student(), 1)
    once, view = {"epochs": 1, "verbose": 0}, (data, batch_size, 0)
    pixels = images.astype("float32")
    sides = {
        "cached": lambda: cached.fit(stored.training_batches(0), **once),
        "cached, as in runs": lambda: own.fit(stored.training_batches(0), **once),
        "cached, bfloat16": lambda: narrow.fit(stored.training_batches(0), **once),
        "student alone": lambda: alone.fit(batches.training_batches(train, *view, 0), **once),
        "student alone, stock": lambda: stock.fit(pixels, labels, batch_size=batch_size, **once),
        "keras.distillation": lambda: online.fit(batches.training_batches(train, *view, 0), **once),
        "filling the cache": fill,
        **{names[precision]: lambda place=precision: fill(place) for precision in faster},
        "teacher.predict": lambda: teacher.predict(pixels, batch_size=batch_size, verbose=0),
    }
    print(f"{name}: teacher {teacher.count_params():,}, student {student().count_params():,} parameters")
    counts = {side: len(images) + (len(few) if side.startswith("filling the cache") else 0) for side in sides}
    timings = measured(sides, counts, repeats)
    return {
        "sides": timings,
        "steps_per_execution": STEPS_PER_EXECUTION,
        "bytes": stored.bytes(1),
        "cached / student alone": ratio(timings, "cached", "student alone"),
        "cached, as in runs / student alone": ratio(timings, "cached, as in runs", "student alone"),
        "cached, as in runs / student alone, stock": ratio(timings, "cached, as in runs", "student alone, stock"),
        "cached, bfloat16 / student alone, stock": ratio(timings, "cached, bfloat16", "student alone, stock"),
        "cached / keras.distillation": ratio(timings, "cached", "keras.distillation"),
        "cached, as in runs / keras.distillation": ratio(timings, "cached, as in runs", "keras.distillation"),
        "cached, bfloat16 / keras.distillation": ratio(timings, "cached, bfloat16", "keras.distillation"),
        "filling the cache / teacher.predict": ratio(timings, "filling the cache", "teacher.predict"),
        **{f"{side} / teacher.predict": ratio(timings, side, "teacher.predict") for side in names.values()},
    }


def main() -> None:
    """Measures, prints, writes `cached.json` and `cached.svg`."""
    parser = arguments(__doc__)
    parser.add_argument("--pair", nargs="*", default=list(PAIRS), choices=list(PAIRS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        result = {name: one_pair(name, options.repeats, root) for name in options.pair}
    bars = {
        f"{name}: {key}": value["ratio"]
        for name, pair in result.items()
        for key, value in pair.items()
        if isinstance(value, dict) and "ratio" in value
    }
    save(
        "cached",
        result,
        options.out,
        bars,
        "Distilling from the cache: images per second, the first over the second",
        "times",
    )


if __name__ == "__main__":
    main()
