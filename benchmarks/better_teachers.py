"""What a better teacher costs and brings: seven teachers of MNIST, and the student that each of them makes.

    python benchmarks/better_teachers.py MNIST_FOLDER [--epochs 8] [--seeds 5] [--work FOLDER]

The teachers are `small_cnn` with widths 32, 64 and 128, trained on 55,000 of MNIST's 60,000 training images as
`make_mnist_teacher.py` does, for `--epochs`:

    last        the weights of the last epoch
    early       those after a third of the epochs: the rate has not fallen yet (Cho and Hariharan 2019, 1910.01348)
    averaged    the mean weights of the ends of the last three epochs
    calibrated  `last`, its logits divided by the temperature that fits the other 5,000 images best
    smoothed    trained with label smoothing of 0.1 (Mueller et al. 2019, 1906.02629)
    snapshots   one training with three cycles of the rate, their ends blended (Huang et al. 2017, 1704.00109)
    ensemble    `last` of three seeds, blended

Each teaches the student of the recipe `mnist` on its sample, over `--seeds`, beside the control, which is the same
each time. `smoothed` also teaches at T = 1 (Chandrasegaran et al. 2022, 2206.14532). The cost is in epochs of the
teacher, and in its forward passes. Training and runs go on where they were interrupted, in `--work`.
The images are warped in two threads, so that a teacher that is trained again has other bits.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import keras
import make_mnist_teacher as shipped
import numpy as np
from common import save

from kdistill import files
from kdistill.data import mnist
from kdistill.errors import InputError
from kdistill.evaluation.diagnostics import fit_temperature
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.recipe import Data, Network
from kdistill.recipe.loading import load_recipe
from kdistill.runs.run import run
from kdistill.teachers.frozen import blend_models

HELD_OUT, SMOOTHING, CYCLES, MEMBERS = 5_000, 0.1, 3, 3


def schedule(steps: int, cycles: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """The rate of the shipped teacher, over all steps, or from its top down in each of several cycles."""
    if cycles == 1:
        return shipped.rate(steps)
    return keras.optimizers.schedules.CosineDecayRestarts(shipped.RATE, -(-steps // cycles), t_mul=1.0, alpha=1e-3)


def train(data: tuple, folder: Path, epochs: int, seed: int, smoothing: float = 0.0, cycles: int = 1) -> list[Path]:
    """Trains a teacher; returns the file of the weights after each epoch."""
    paths = [folder / f"epoch{epoch}.weights.h5" for epoch in range(1, epochs + 1)]
    if paths[-1].is_file():
        return paths
    keras.utils.set_random_seed(seed)
    model = shipped.network()
    batches = shipped.batches(*data, seed)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    batches = batches.map(lambda x, y: (x, keras.ops.one_hot(y, 10)))
    steps = epochs * (len(data[0]) // shipped.BATCH)
    optimizer = keras.optimizers.AdamW(schedule(steps, cycles), weight_decay=shipped.DECAY)
    model.compile(optimizer, loss, metrics=["accuracy"])
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    each = keras.callbacks.ModelCheckpoint(str(folder / "epoch{epoch}.weights.h5"), save_weights_only=True)
    model.fit(batches, epochs=epochs, verbose=2, callbacks=[each, backup])
    return paths


def teachers(data: tuple, held_out: tuple, work: Path, epochs: int) -> dict[str, tuple[list[Path], int]]:
    """The files of each teacher, one, or several to blend, and the epochs that it costs."""

    def trained(name: str, **options) -> list[Path]:
        return train(data, work / name, epochs, **options)

    def kept(name: str, weights: list[np.ndarray]) -> Path:
        path = work / f"{name}.keras"
        if not path.is_file():  # a run that was interrupted goes on with the same file only
            model = shipped.network()
            model.set_weights(weights)
            with files.atomic_file(path) as part:
                model.save(part)
        return path

    def at(path: Path) -> keras.Model:
        model = shipped.network()
        model.load_weights(path)
        return model

    seeds = [trained(f"seed{seed}", seed=seed) for seed in range(MEMBERS)]
    smoothed, cycled = trained("smoothed", seed=0, smoothing=SMOOTHING), trained("cycles", seed=0, cycles=CYCLES)
    ends = [-(-epochs * cycle // CYCLES) for cycle in range(1, CYCLES + 1)]
    members = [kept(f"last{seed}", at(paths[-1]).get_weights()) for seed, paths in enumerate(seeds)]
    last = at(seeds[0][-1])
    final = [at(path).get_weights() for path in seeds[0][-3:]]
    images, labels = held_out
    temperature = fit_temperature(predict(last, images), labels)
    print(f"The temperature that fits {HELD_OUT:,} other images: {temperature:.3f}")
    *inner, kernel, bias = last.get_weights()
    return {
        "last": ([members[0]], epochs),
        "early": ([kept("early", at(seeds[0][-(-epochs // 3) - 1]).get_weights())], -(-epochs // 3)),
        "averaged": ([kept("averaged", [np.mean(same, 0) for same in zip(*final, strict=True)])], epochs),
        "calibrated": ([kept("calibrated", [*inner, kernel / temperature, bias / temperature])], epochs),
        "smoothed": ([kept("smoothed", at(smoothed[-1]).get_weights())], epochs),
        "snapshots": ([kept(f"cycle{end}", at(cycled[end - 1]).get_weights()) for end in ends], epochs),
        "ensemble": (members, MEMBERS * epochs),
    }


def student_of(paths: list[Path], temperature: float, seeds: int, folder: Path) -> dict:
    """The verdict on the student of these teachers, as the recipe `mnist` trains it."""
    recipe = load_recipe("mnist", "default", [f"seeds={seeds}"])
    first, *more = (Network("small_cnn", file=str(path)) for path in paths)
    distill = dataclasses.replace(recipe.distill, temperature=temperature)
    if more:
        distill = dataclasses.replace(distill, teacher_weights=(1 / len(paths),) * len(paths))
    recipe = dataclasses.replace(recipe, teacher=first, more_teachers=tuple(more), distill=distill, exports=())
    return run(recipe, folder, resume=folder.exists(), say=lambda text: None)["verdict"]


def main(options: argparse.Namespace) -> None:
    """Trains, prints a row for each teacher, and saves."""
    work = options.work / f"{options.epochs}-epochs"
    work.mkdir(parents=True, exist_ok=True)
    parts, _, _ = mnist.mnist(Data(), options.folder, False, print)
    (images, labels), test = ((parts[name][0][..., None], parts[name][1].astype("int32")) for name in ("train", "test"))
    order = np.random.default_rng(0).permutation(len(images))
    data, held_out = ((images[part], labels[part]) for part in (order[HELD_OUT:], order[:HELD_OUT]))
    rows = {}
    for name, (paths, epochs) in teachers(data, held_out, work, options.epochs).items():
        accuracy = 100 * evaluate(blend_models([keras.models.load_model(path) for path in paths]), test)["accuracy"]
        for temperature in (4.0, 1.0) if name == "smoothed" else (4.0,):
            row = f"{name}, T = {temperature:g}"
            verdict = student_of(paths, temperature, options.seeds, work / f"run-{name}-{temperature:g}")
            rows[row] = {"epochs": epochs, "passes": len(paths), "teacher": accuracy, "verdict": verdict}
            print(f"{row}: {epochs} epochs, {len(paths)} passes, teacher {accuracy:.2f} %; {verdict['sentence']}")
    means = {row: 100 * float(np.mean(found["verdict"]["student"])) for row, found in rows.items()}
    save("better_teachers", rows, options.out, means, "Students of better teachers, test accuracy", "%")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the four IDX files of MNIST")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("runs/better-teachers"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    try:
        main(parser.parse_args())
    except InputError as error:
        sys.exit(f"Error: {error}")
