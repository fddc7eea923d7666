"""What a verdict costs: controls and students of several seeds by kdistill, and by a loop of Keras's own fits.

    python benchmarks/verdict_cost.py [--recipe mnist] [--variant default] [--data-dir FOLDER] [--seeds 5]
        [--teacher FILE] [--set KEY=VALUE] [--repeats 3]

The teacher is trained before, or comes with the recipe; its training does not count. From there to the verdict:

    kdistill   what `kdistill run` does: side by side where memory allows, the teacher's outputs from a cache that is
               empty at first, checkpoints, logs for TensorBoard; then the verdict
    keras      for each seed `model.fit` of the control and `fit` of a keras.distillation.Distiller, with its defaults,
               on a tf.data pipeline with the same augmentation; validation after each epoch; predictions of the test
               images; a paired t-test. No checkpoints, no logs.

Both train the same networks for the same number of steps with the same batch size, optimizer and schedule; the random
numbers of the views differ. The sides take turns. Reports seconds, their ratio within a round, and the accuracies.
"""

import gc
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
import scipy.stats
import tensorflow as tf
from common import arguments, save
from keras import distillation

from kdistill.data import load
from kdistill.data.splits import Examples
from kdistill.networks.precision import dtype_policy
from kdistill.recipe import Recipe
from kdistill.recipe.loading import load_recipe
from kdistill.runs import results
from kdistill.runs.arms import Arms
from kdistill.runs.folder import RunFolder
from kdistill.runs.together import fit_seeds
from kdistill.training.optimizers import learning_rate


def by_kdistill(arms: Arms, folder: Path) -> dict:
    """Trains and judges as a run does."""
    fit_seeds(arms, arms.recipe.seeds, str(folder / "cache"))
    verdict = results.judge_seeds(arms)
    return {"student": verdict["student"], "control": verdict["control"], "sentence": verdict["sentence"]}


def batches(examples: Examples, recipe: Recipe, seed: int) -> tf.data.Dataset:
    """Shuffled, shifted and flipped images, as a user of Keras writes it."""
    shape, shift = examples.images.shape[1:], recipe.data.shift

    def augmented(image, label):
        if shift:
            image = tf.image.random_crop(tf.pad(image, [[shift, shift], [shift, shift], [0, 0]]), shape)
        if recipe.data.flip:
            image = tf.image.random_flip_left_right(image)
        return tf.cast(image, tf.float32), label

    data = tf.data.Dataset.from_tensor_slices((examples.images, examples.labels)).shuffle(len(examples), seed)
    data = data.map(augmented, num_parallel_calls=tf.data.AUTOTUNE)
    return data.batch(recipe.training.batch_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def optimizer_of(recipe: Recipe, steps: int) -> keras.Optimizer:
    """Keras's own optimizer with the schedule of the recipe."""
    training = recipe.training
    rate, decay = learning_rate(training, steps), training.weight_decay or None
    if training.optimizer == "sgd":
        return keras.optimizers.SGD(rate, momentum=training.momentum, weight_decay=decay)
    return keras.optimizers.Adam(rate, weight_decay=decay)


def by_keras(arms: Arms, folder: Path) -> dict:
    """Trains and judges with `fit` alone."""
    recipe, splits, teacher = arms.recipe, arms.splits, arms.models["teacher"]
    epochs, weight = recipe.training.epochs, recipe.distill.distillation_weight
    steps = len(splits.train) // recipe.training.batch_size * epochs
    validation = tf.data.Dataset.from_tensor_slices(
        (splits.validation.images.astype("float32"), splits.validation.labels)
    )
    accuracies: dict[str, list[float]] = {"control": [], "student": []}
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        for kind, found in accuracies.items():
            network = arms.network(recipe.student, seed)
            model = (
                network
                if kind == "control"
                else distillation.Distiller(
                    teacher=teacher,
                    student=network,
                    distillation_losses=distillation.LogitsDistillation(
                        temperature=recipe.distill.temperature, loss=keras.losses.KLDivergence()
                    ),
                    student_loss_weight=1 - weight,
                )
            )
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile(optimizer_of(recipe, steps), loss, metrics=["accuracy"])
            data = batches(splits.train, recipe, seed)
            model.fit(data, validation_data=validation.batch(256), epochs=epochs, verbose=0)
            logits = network.predict(splits.test.images.astype("float32"), batch_size=256, verbose=0)
            found.append(float(np.mean(logits.argmax(-1) == splits.test.labels)))
    scipy.stats.ttest_rel(accuracies["student"], accuracies["control"])
    return accuracies


SIDES = {"kdistill": by_kdistill, "keras": by_keras}


def main() -> None:
    """Measures both sides in turn, prints and saves."""
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--recipe", default="mnist")
    parser.add_argument("--variant", default="default")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--teacher", help="a .keras file, in place of the recipe's teacher")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], help="key=value, as for `kdistill run`")
    options = parser.parse_args()
    teacher = [f"teacher.file={options.teacher}"] if options.teacher else []
    recipe = load_recipe(options.recipe, options.variant, [f"seeds={options.seeds}", *teacher, *options.set])
    splits = load(recipe.data, options.data_dir)
    times, accuracies = {side: [] for side in SIDES}, {}
    with dtype_policy(recipe.precision):
        for turn in range(options.repeats):
            for name, side in list(SIDES.items())[:: -1 if turn % 2 else 1]:
                gc.collect()
                with tempfile.TemporaryDirectory() as temporary, RunFolder(Path(temporary) / "run") as folder:
                    arms = Arms(recipe, splits, folder, lambda text: None)
                    arms.fit_teacher()
                    start = time.perf_counter()
                    accuracies[name] = side(arms, Path(temporary))
                    times[name].append(time.perf_counter() - start)
                print(f"{name}: {times[name][-1]:.1f} s", flush=True)
    ratios = [keras_ / ours for ours, keras_ in zip(times["kdistill"], times["keras"], strict=True)]
    for name, found in accuracies.items():
        means = ", ".join(f"{kind} {100 * statistics.mean(found[kind]):.2f} %" for kind in ("control", "student"))
        print(f"{name}: {means}; {statistics.median(times[name]):.1f} s")
    print(f"keras / kdistill: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    bars = {name: statistics.median(seconds) for name, seconds in times.items()}
    result = {"times": times, "accuracies": accuracies, "ratios": ratios}
    title = f"{recipe.name}, {recipe.training.epochs} epochs: seconds until the verdict over {recipe.seeds} seeds"
    save(f"verdict_cost_{recipe.name}", result, options.out, bars, title, "s")


if __name__ == "__main__":
    main()
