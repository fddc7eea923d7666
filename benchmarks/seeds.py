"""Control and student of several seeds side by side, against the same fits one after the other.

    python benchmarks/seeds.py [--pair lenet] [--seeds 5] [--epochs 12] [--repeats 3]

What `kdistill run --seeds N` does after its teacher is trained: the fits of the recipe (`mnist`, on its sample;
`cifar10`, on 4,096 random images), with augmentation, validation, TensorBoard, checkpoints and the tracing of new fits.
Both sides in one process, in turn. Reports wall and CPU seconds, their ratio within a round, and whether the weights
are equal: bit by bit, and by the largest difference.
"""

import dataclasses
import gc
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from common import arguments, modest, save

from kdistill.data import load
from kdistill.data.splits import Examples, Splits
from kdistill.networks import architectures
from kdistill.recipe import Recipe
from kdistill.recipe.loading import load_recipe
from kdistill.runs.arms import Arms
from kdistill.runs.folder import RunFolder
from kdistill.runs.together import fit_seeds

RECIPES = {"lenet": ("mnist", 12), "resnet": ("cifar10", 2)}  # recipe, epochs


def random_images(classes: int = 10) -> Splits:
    """Random images of 32x32 pixels: only time is measured."""
    random = np.random.default_rng(0)

    def examples(count: int) -> Examples:
        images = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        return Examples(images, random.integers(0, classes, count).astype(np.int32))

    parts = examples(4096), examples(256), examples(256)
    return Splits(*parts, tuple(map(str, range(classes))), "random", "0" * 16)


class Teaches(Arms):
    """The arms of a run with an untrained teacher: only time is measured."""

    def _teacher(self, name, network):
        keras.utils.set_random_seed(self.recipe.seed)
        self.models[name] = modest(architectures.build(network, self.splits.train.images.shape[1:], 10))
        return self.models[name]


def fits(recipe: Recipe, splits: Splits, together: int | None) -> tuple[tuple[float, float], dict]:
    """Wall and CPU seconds of all fits of a run, and its models."""
    with tempfile.TemporaryDirectory() as temporary, RunFolder(Path(temporary) / "run") as folder:
        arms = Teaches(recipe, splits, folder, lambda text: None)
        arms.fit_teacher()
        wall, cpu = time.perf_counter(), time.process_time()
        fit_seeds(arms, recipe.seeds, "off", together)
        return (time.perf_counter() - wall, time.process_time() - cpu), arms.models


def main() -> None:
    """Measures both sides in turn, prints and saves."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--pair", choices=RECIPES, default="lenet")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int)
    options = parser.parse_args()
    name, epochs = RECIPES[options.pair]
    recipe = load_recipe(name, overrides=[f"seeds={options.seeds}", f"training.epochs={options.epochs or epochs}"])
    recipe = dataclasses.replace(recipe, compress=(), max_seeds=None)
    splits = load(recipe.data) if options.pair == "lenet" else random_images()
    sides = {"one after the other": 1, "side by side": None}
    times, models = {side: [] for side in sides}, {}
    for _ in range(options.repeats):
        for side, together in sides.items():
            gc.collect()
            seconds, models[side] = fits(recipe, splits, together)
            times[side].append(seconds)
            print(f"{side}: {seconds[0]:.1f} s wall, {seconds[1]:.1f} s CPU", flush=True)
    alone, together = (times[side] for side in sides)
    ratios = [[b[clock] / a[clock] for a, b in zip(alone, together, strict=True)] for clock in (0, 1)]
    differences = [
        float(np.abs(one - other).max())
        for model in models["side by side"]
        if model != "teacher"
        for one, other in zip(*(models[side][model].get_weights() for side in sides), strict=True)
    ]
    bars = {side: statistics.median(wall for wall, _ in seconds) for side, seconds in times.items()}
    result = {"times": times, "wall_ratio": ratios[0], "cpu_ratio": ratios[1], "largest_difference": max(differences)}
    title = f"{2 * options.seeds} fits of the {options.pair} pair, {recipe.training.epochs} epochs"
    save(f"seeds_{options.pair}", result, options.out, bars, title, "s")
    print(
        f"side by side / one after the other: {statistics.median(ratios[0]):.2f} by the clock, "
        f"{statistics.median(ratios[1]):.2f} in CPU time; largest difference of a weight {max(differences):.2g}"
    )


if __name__ == "__main__":
    main()
