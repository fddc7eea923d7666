"""The story of a run, top to bottom: data, teacher, control, student, files, report."""

from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from kdistill import provenance
from kdistill.data import splits as data_splits
from kdistill.distillation.distiller import Distiller, from_recipe
from kdistill.networks import applications
from kdistill.recipe import Recipe
from kdistill.recipe.checks import check_precision
from kdistill.recipe.loading import load_profile
from kdistill.recipe.objective import teacher_taps
from kdistill.recipe.values import as_dict
from kdistill.report import page
from kdistill.runs import results
from kdistill.runs.arms import Arms
from kdistill.runs.folder import open_folder
from kdistill.training.strategy import choose, explained


def run(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    force: bool = False,
    cache: str | Path = "auto",
    strategy: str = "auto",
    worker_timeout: float = 120.0,
    profile: bool = False,
    say: Callable[[str], None] = print,
) -> dict:
    """Trains teacher, control and student, exports and checks the student, writes the report; returns it.

    `out` is a new folder, by default one under `runs/`; with `resume` it is that of a run to go on with, exactly where
    it was. `force` goes on although recipe, data or strategy differ. `cache`: the folder of the teacher caches, `auto`
    for the usual one where it pays, or `off`. `strategy` is auto, none, mirrored or multiworker (see
    `kdistill.strategy.choose`); of several workers only the chief, worker 0, writes and returns the report, the others
    an empty dict. `profile` records a trace of some steps of each stage under `logs`. Raises `InputError` for what the
    user can mend and `CheckFailed` for a loss that is not finite, a file that is not good enough, or a lost worker.
    """
    profiles = [load_profile(name) for name in recipe.exports]
    check_precision(recipe.precision)
    devices = choose(strategy, worker_timeout, say)
    weights = any(applications.fetched(network.options) for network in (recipe.teacher, recipe.student))
    # With images of one's own and weights of Keras, --download is for the weights.
    splits = data_splits.load(recipe.data, data_dir, download and not (data_dir and weights), say=say)
    for part in ("teacher_training", "training"):
        devices.check_batch(min(getattr(recipe, part).batch_size, len(splits.train)), f"{part}.batch_size")
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.precision)
    folder = open_folder(recipe, out, resume, devices)
    try:
        folder.settle(recipe, splits.fingerprint, force, say, str(devices))
        devices.agree({**as_dict(recipe), "data": splits.fingerprint, **provenance.versions()})
        say(f"Data: {splits.source}. Run folder: {folder.path}")
        arms = Arms(recipe, splits, folder, say, devices, profile, download)
        asked = arms.asked(arms.teacher(), teacher_taps(recipe.distill.terms))

        def distiller(network: keras.Model, steps: int) -> Distiller:
            return from_recipe(recipe.distill, network, asked, steps)

        for place in range(recipe.seeds):
            seed, end = recipe.seed + place, f"-{place}" if place else ""
            arms.control("control" + end, seed)
            stored = arms.stored("student" + end, seed, asked, str(cache))
            arms.student("student" + end, seed, distiller, stored)
        if not devices.chief:
            say("All is trained; the chief measures, exports and reports.")
            devices.wait()
            return {}
        arms.on_one_device()
        compressions = {}
        if recipe.compress:
            from kdistill.runs.compressions import run_stages  # which imports tf_keras, for those who compress

            compressions = run_stages(arms)
        result = results.measured(arms, profiles, compressions)
        page.save(result, folder.path)
        devices.wait()
        say(f"Report: {folder.path / 'report.html'}")
        return {**result, "folder": str(folder.path)}
    except tf.errors.OpError as error:
        raise explained(error, devices) from error
    finally:
        folder.close()
        keras.config.set_dtype_policy(policy)
