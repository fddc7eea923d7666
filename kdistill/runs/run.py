"""The story of a run, top to bottom: data, checks, teacher, control and student of each seed, files, report."""

from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from kdistill import provenance
from kdistill.data.splits import load
from kdistill.evaluation.expectation import lead_warning
from kdistill.networks import applications
from kdistill.networks.precision import dtype_policy
from kdistill.recipe import Profile, Recipe
from kdistill.recipe.checks import check_precision
from kdistill.recipe.loading import load_profile
from kdistill.recipe.values import as_dict
from kdistill.report import page
from kdistill.runs import results
from kdistill.runs.arms import Arms
from kdistill.runs.folder import open_folder
from kdistill.runs.preflight import check_run
from kdistill.runs.together import Workers, check_together, fit_seeds
from kdistill.teachers.foreign import failures_as_messages
from kdistill.training.ray_tasks import connected
from kdistill.training.strategy import choose_devices, readable_error


@failures_as_messages()
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
    together: int | None = None,
    ray: str | None = None,
    ray_cpus: int | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Trains teacher, control and student, exports and checks the student, writes the report.

    Args:
        recipe: what to run, see `kdistill.load_recipe`.
        out: a new folder, by default one under `runs/`; with `resume` the folder of the run.
        data_dir: folder or file with the data set, see `kdistill.data.splits.load`.
        download: lets TensorFlow Datasets and Keras download data and weights.
        resume: continues the run in `out` and ends with the same bits as an uninterrupted run.
        force: resumes although recipe, data or strategy have changed.
        cache: the folder of the teacher caches, `auto` for the default one where it pays, or `off`.
        strategy: `auto`, `none`, `mirrored` or `multiworker`, see `kdistill.training.strategy.choose_devices`.
        worker_timeout: seconds that a worker waits for the others.
        profile: records a trace of some steps of each model under `logs`.
        together: trains at most this many controls and students side by side. None: with several seeds as many as the
            memory takes, on one device; else one after the other. The weights are the same, except for rounding.
        ray: trains control and student of each seed as tasks of a Ray cluster: `auto`, or the `HOST:PORT` of its head.
            All machines see run folder, data and teacher under the same paths.
        ray_cpus: cores of a task, by default those of the smallest machine. The same number gives the same bits.
        say: receives each line of progress.

    Returns:
        The report, as in `report.json`, with `folder`. A file that is not good enough is not written, and stands in
        `refused` (name, reason, advice, check) instead of `files`. Of several workers only the chief, worker 0, writes
        and returns the report; the others return an empty dict.

    Raises:
        InputError: something in the arguments cannot work; nothing has been trained.
        CheckFailed: a loss is not finite, or a worker was lost.

    Example:

    ```python
    report = kdistill.run(kdistill.load_recipe("mnist", overrides=["training.epochs=3"]), "runs/short")
    print(report["verdict"]["sentence"])
    ```
    """
    profiles = [load_profile(name) for name in recipe.exports]
    check_precision(recipe)
    devices = choose_devices(strategy, worker_timeout, say)
    check_together(together, devices, profile, ray)
    # With images in a folder and weights of Keras, --download is for the weights.
    trained = any(applications.uses_imagenet(network.options) for network in (recipe.teacher, recipe.student))
    splits = load(recipe.data, data_dir, download and not (data_dir and trained), say=say)
    with dtype_policy(recipe.precision):
        cache = check_run(recipe, splits, devices, str(cache), download, say, profiles)
        with connected(ray, ray_cpus, say) as cluster, open_folder(recipe, out, resume, devices) as folder:
            folder.settle(recipe, splits.fingerprint, force, say, str(cluster or devices))
            devices.agree({**as_dict(recipe), "data": splits.fingerprint, **provenance.versions()})
            say(f"Data: {splits.source}. Run folder: {folder.path}")
            arms = ComparingArms(recipe, splits, folder, say, devices, profile, download)
            try:
                workers = Workers(cluster, recipe, data_dir, folder.path) if cluster else None
                return _train_and_report(
                    arms, profiles, lambda seeds: fit_seeds(arms, seeds, cache, together, workers), cache
                )
            except tf.errors.OpError as error:
                raise readable_error(error, devices) from error


class ComparingArms(Arms):
    """The models of a run; a warning follows as soon as teacher and control show that there is little to teach."""

    compared = False

    def fit_control(self, place: int, name: str | None = None) -> keras.Model:
        """As `Arms.fit_control`."""
        control = super().fit_control(place, name)
        self.compare()
        return control

    def compare(self) -> None:
        """Compares the teacher with the control of the first seed, once; a warning is printed, and in the report."""
        if self.compared or not self.devices.chief:
            return
        self.compared = True
        warning = lead_warning(results.compare_teacher(self))
        if warning:
            self.say(f"Warning: {warning}")
            self.warnings.append(warning)


def _train_and_report(
    arms: ComparingArms, profiles: list[Profile], fit_next: Callable[[int], None], cache: str
) -> dict:
    """`fit_next` trains control and student of the next seeds, as many as it receives."""
    arms.fit_teacher()
    fit_next(arms.recipe.seeds)
    arms.compare()
    while _next_seed_is_needed(arms):
        fit_next(1)
    if not arms.devices.chief:
        arms.say("Training is finished. The chief measures, exports and reports.")
        arms.devices.wait()
        return {}
    arms.plain_models()
    compressions = {}
    if arms.recipe.compress:
        from kdistill.runs.compressions import run_stages  # imports tf_keras, for those who compress

        compressions = run_stages(arms, cache)
    report = results.measure_run(arms, profiles, compressions, cache)
    page.save(report, arms.folder.path)
    results.log_verdict(report["verdict"], arms.folder.path / "logs" / "verdict")
    arms.devices.wait()
    arms.say(f"Report: {arms.folder.path / 'report.html'}")
    return {**report, "folder": str(arms.folder.path)}


def _next_seed_is_needed(arms: Arms) -> bool:
    """Whether the recipe adds seeds, and the verdict over those trained so far is not clear. The chief decides."""
    if not arms.recipe.max_seeds or arms.seeds >= arms.recipe.max_seeds:
        return False
    decision = b""
    if arms.devices.chief:
        verdict = results.judge_seeds(arms)
        arms.say(f"After {arms.seeds} seeds: {verdict['sentence']}")
        decision = b"train" if verdict["word"] == "UNDECIDED" else b""
    return bool(arms.devices.share(decision))
