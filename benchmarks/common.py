"""Shared by the benchmarks: pairs of networks, interleaved timing, and results as JSON and as a picture.

All sides of a benchmark run in one process, several times, in a new random order for every round: other work of the
machine affects all sides alike, and no side always follows the same other, whose heat and garbage it would inherit.
Results are medians over the rounds of wall time and CPU time of the process, with quartiles. Ratios are computed
within a round; the result is their median.
"""

import argparse
import datetime
import gc
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill import provenance
from kdistill.conversion.litert_teacher import faster_teacher
from kdistill.data.batches import without_autotuning
from kdistill.errors import CheckFailed, InputError
from kdistill.networks import architectures
from kdistill.recipe import Network
from kdistill.recipe.values import LITERT

STEPS_PER_EXECUTION = 16
INK, PAPER, BARS = "#222222", "#ffffff", "#3b6ea5"


def arguments(description: str, repeats: int | None = 7) -> argparse.ArgumentParser:
    """The options of every benchmark. `repeats` is the default of --repeats; None: no such option."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats is not None:
        parser.add_argument("--repeats", type=int, default=repeats, help="rounds, after one that does not count")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON and picture"
    )
    return parser


# -- networks and data ----------------------------------------------------------------------------------------------


def resnet(depth: int) -> keras.Model:
    """The network of `recipes/cifar10.py` (He et al. 2015, arXiv 1512.03385): pixels 0..255 in, logits out."""
    return architectures.build(Network("resnet", {"depth": depth}), (32, 32, 3), 10)


def modest(teacher: keras.Model) -> keras.Model:
    """The teacher with small logits: with random weights they exceed the float16 of a cache."""
    last = teacher.layers[-1]
    last.kernel.assign(last.kernel / 1000)
    return teacher


def lenet_pair() -> tuple[keras.Model, Callable[[], keras.Model]]:
    """The teacher and the student of `recipes/mnist.py`."""
    shape = (28, 28, 1)
    return architectures.build(Network("lenet"), shape, 10), lambda: architectures.build(
        Network("small_cnn"), shape, 10
    )


def resnet_pair() -> tuple[keras.Model, Callable[[], keras.Model]]:
    """ResNet-56 and ResNet-8 for 32x32 images."""
    return modest(resnet(56)), lambda: resnet(8)


def resnet50_pair(side: int = 224) -> tuple[keras.Model, Callable[[], keras.Model]]:
    """ResNet-50 and MobileNetV3-Small of keras.applications, random weights: only time is measured.

    Images have 224 pixels; with a smaller `side` the student resizes them, as one for phones may.
    """
    options = {"weights": None, "classes": 1000, "classifier_activation": None}
    teacher = modest(keras.applications.ResNet50(**options, input_shape=(224, 224, 3)))

    def student() -> keras.Model:
        network = keras.applications.MobileNetV3Small(**options, input_shape=(side, side, 3))
        if side == 224:
            return network
        return keras.Sequential([keras.Input((224, 224, 3)), keras.layers.Resizing(side, side), network])

    return teacher, student


def mobilenet_pair() -> tuple[keras.Model, Callable[[], keras.Model]]:
    """MobileNetV2 and MobileNetV3-Small of keras.applications for 96x96 images, random weights."""
    shape = (96, 96, 3)
    teacher = architectures.build(Network("mobilenet_v2", {"weights": None}), shape, 10)
    return modest(teacher), lambda: architectures.build(Network("mobilenet_v3_small", {"weights": None}), shape, 10)


# name -> pair, batch size, steps of a timed epoch
PAIRS = {
    "lenet": (lenet_pair, 128, 128),
    "resnet": (resnet_pair, 128, 16),
    "mobilenet": (mobilenet_pair, 64, 8),
    "resnet50": (resnet50_pair, 16, 4),
    "resnet50_96": (partial(resnet50_pair, 96), 16, 4),
}


def images_for(model: keras.Model, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random uint8 images and int32 labels that fit a model."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, *model.input_shape[1:]), dtype=np.uint8)
    return images, random.integers(0, model.output_shape[-1], count).astype(np.int32)


def batches(images: np.ndarray, *others: np.ndarray, batch_size: int) -> tf.data.Dataset:
    """Batches of float32 images and the other arrays, in order: the same input for all sides."""
    data = tf.data.Dataset.from_tensor_slices((images, *others)).batch(batch_size, drop_remainder=True)
    data = data.map(lambda x, *rest: (tf.cast(x, tf.float32), *rest), num_parallel_calls=2).prefetch(4)
    # With autotuning, the wait at the end of an epoch would be a third of the measured time.
    return without_autotuning(data)


def plain(student: keras.Model, steps_per_execution: int = STEPS_PER_EXECUTION) -> keras.Model:
    """The student compiled for labels alone, the usual way."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    student.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"], steps_per_execution=steps_per_execution)
    return student


def forward(teacher: keras.Model) -> Callable[[tf.data.Dataset], None]:
    """The teacher's forward pass over a data set, as a compiled function."""
    call = tf.function(lambda images: teacher(images, training=False))

    def run(data):
        for images, *_ in data:
            outputs = call(images)
        outputs.numpy()

    return run


def faster_teachers(teacher: keras.Model, images: np.ndarray) -> dict[str, keras.Model]:
    """The teacher in each `teacher_precision` that is accepted, by name."""
    copies = {}
    for precision in ("mixed_bfloat16", *LITERT):
        try:
            copies[precision] = faster_teacher(teacher, images[:256], precision, print, (), images[-256:])
        except (CheckFailed, InputError) as error:
            print(f"  {error}")
    return copies


# -- timing ---------------------------------------------------------------------------------------------------------


def measured(sides: dict[str, Callable[[], None]], images: int | dict, repeats: int) -> dict[str, dict]:
    """Runs each side once to compile, then `repeats` rounds of all; by side: seconds of each round, wall and CPU.

    `images`: how many a call of a side handles, one number or one by side.
    """
    counts = images if isinstance(images, dict) else dict.fromkeys(sides, images)
    for name, side in sides.items():
        start = time.perf_counter()
        side()
        print(f"  first call of {name}: {time.perf_counter() - start:.1f} s", flush=True)
    timings = {name: {"images": counts[name], "wall": [], "cpu": []} for name in sides}
    random = np.random.default_rng(0)
    for _ in range(repeats):
        for name in random.permutation(list(sides)):
            gc.collect()  # the garbage of the side before does not count here
            wall, cpu = time.perf_counter(), time.process_time()
            sides[name]()
            timings[name]["wall"].append(time.perf_counter() - wall)
            timings[name]["cpu"].append(time.process_time() - cpu)
    return {name: {**each, **_summary(each)} for name, each in timings.items()}


def _summary(each: dict) -> dict:
    rates = each["images"] / np.array(each["wall"])
    low, median, high = np.percentile(rates, [25, 50, 75])
    cpu = each["images"] / np.median(each["cpu"])
    return {"images_per_second": median, "quartiles": [low, high], "images_per_cpu_second": cpu}


def ratio(timings: dict, over: str, under: str | list[str]) -> dict:
    """How many times faster `over` is than `under` (several: their times added), within rounds: median, quartiles."""
    under = [under] if isinstance(under, str) else under
    values = {}
    for clock in ("wall", "cpu"):
        # Seconds per image, so that sides of different sizes compare.
        mine = np.array(timings[over][clock]) / timings[over]["images"]
        other = sum(np.array(timings[name][clock]) / timings[name]["images"] for name in under)
        values[clock] = other / mine
    low, median, high = np.percentile(values["wall"], [25, 50, 75])
    return {"ratio": median, "quartiles": [low, high], "cpu_ratio": float(np.median(values["cpu"]))}


# -- results --------------------------------------------------------------------------------------------------------


def save(name: str, result: dict, out: Path, bars: dict[str, float], title: str, unit: str) -> None:
    """Writes `<name>.json` and `<name>.svg`, and prints the bars."""
    out.mkdir(parents=True, exist_ok=True)
    about = provenance.of_run()
    about["load"] = os.getloadavg()
    about["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    text = json.dumps({**about, **result}, indent=1, default=float)
    (out / f"{name}.json").write_text(text + "\n")
    picture(out / f"{name}.svg", bars, f"{title}\n{about['machine']}, {about['date'][:10]}", unit)
    for label, value in bars.items():
        print(f"{label:44} {value:12,.2f} {unit}")
    print(f"Load of the machine: {about['load'][0]:.1f}. Written: {out / name}.json, .svg", flush=True)


def picture(path: Path, bars: dict[str, float], title: str, unit: str) -> None:
    """Horizontal bars with their values."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.9 + 0.34 * len(bars)), facecolor=PAPER)
    places = range(len(bars))[::-1]
    axes.barh(places, list(bars.values()), color=BARS, height=0.7)
    axes.set_yticks(list(places), list(bars), color=INK)
    for place, value in zip(places, bars.values(), strict=True):
        axes.text(value, place, f" {value:,.2f}" if value < 100 else f" {value:,.0f}", va="center", color=INK)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(unit, color=INK)
    axes.margins(x=0.14)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)
