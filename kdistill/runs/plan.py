"""What a run would show, before it is run: a trial on a tenth of the epochs, and what follows from it.

The trial trains what a run trains, with three seeds: the teacher (unless it comes trained), and control and student on
a tenth of their epochs, with a schedule of that length. One more control, of the first seed, gets three times as many:
two points of a learning curve show how much the trial underrates the control, and how long a step takes.

Accuracies are those of the validation images. A plan is there to change settings by, and whoever has chosen settings by
the test images cannot report them as a result.
"""

import dataclasses
import json
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from kdistill import files, provenance
from kdistill.data.splits import Examples, Splits, load
from kdistill.evaluation import expectation
from kdistill.networks import applications
from kdistill.networks.precision import dtype_policy
from kdistill.recipe import Recipe, Training
from kdistill.recipe.checks import check_precision
from kdistill.recipe.loading import load_profile
from kdistill.recipe.objective import require
from kdistill.recipe.values import as_dict
from kdistill.runs.arms import Arms, needs_training, numbered
from kdistill.runs.folder import RunFolder
from kdistill.runs.preflight import check_run
from kdistill.runs.results import describe_data, lead_examples, teaching_name
from kdistill.runs.scores import check_classifies, outputs_on
from kdistill.teachers.foreign import failures_as_messages
from kdistill.training.strategy import Devices, choose_devices, readable_error

SHARE = 0.1  # of the epochs
SEEDS = 3  # of the trial
LONGER = 3  # times the epochs of the trial, for one control
FORECAST = (3, 5, 10)  # seeds of a run
LONGER_CONTROL = "control-longer"


@failures_as_messages()
def plan(
    recipe: Recipe,
    out: str | Path | None = None,
    *,
    share: float = SHARE,
    data_dir: str | Path | None = None,
    download: bool = False,
    cache: str | Path = "auto",
    strategy: str = "auto",
    worker_timeout: float = 120.0,
    say: Callable[[str], None] = print,
) -> dict:
    """Trains a recipe for a tenth of its epochs, and states what to expect of the whole run.

    Args:
        recipe: what would be run, see `kdistill.load_recipe`.
        out: a new folder that keeps the trial's models, logs and `plan.json`. None: nothing is kept.
        share: the share of the epochs to train, above 0 and up to 1; at least one epoch is trained.
        data_dir, download, cache, strategy, worker_timeout, say: as for `kdistill.run`. The cache stores outputs of
            trained teachers only, unless `cache` names a folder: a teacher of the trial is never used again.

    Returns a JSON-ready dict:
        trial: `share`, `epochs` and `seeds` by model, `seconds`, `images` (validation), and all of it as `sentence`.
        models: for teacher, control, student and control-longer: epochs, of (epochs of a run), accuracy (by seed, on
            the validation images), seconds (of one fit), and full_seconds (estimated for a
            run; None for control-longer).
        lead: the paired test of teacher against control, see `expectation.teacher_lead`; `expected`: the accuracy of
            the control after as large a share of its training as the teacher has had, extrapolated.
        scatter: standard deviations over seeds: `difference` (student minus control) and `control`.
        forecast: for 3, 5 and 10 seeds the `difference` that they show with 80 % power, and `seconds` of
            training, one model after the other (a run trains seeds side by side where it can, which is faster).
        expectation: `word` and `sentence`.
        lines: forecast, resolution and expectation as five lines of text.
        recipe, data, warnings, and the provenance of a run.
        Of several workers only the chief returns this; the others return an empty dict.

    Raises:
        InputError: something in the arguments cannot work; nothing has been trained.
        CheckFailed: a loss is not finite.
    """
    require(0 < share <= 1, "share", "a share of the epochs above 0, up to 1", share)
    profiles = [load_profile(name) for name in recipe.exports]
    check_precision(recipe)
    devices = choose_devices(strategy, worker_timeout, say)
    trained = any(applications.uses_imagenet(network.options) for network in (recipe.teacher, recipe.student))
    splits = load(recipe.data, data_dir, download and not (data_dir and trained), say=say)
    check_classifies(splits, "kdistill plan")
    with dtype_policy(recipe.precision):
        cache = check_run(recipe, splits, devices, str(cache), download, say, profiles)
        with _open_folder(out, devices) as folder:
            if cache == "auto" and _teacher_share(recipe, splits, share) < 1:
                cache = str(folder.path / "cache") if recipe.cache.top_k else "off"
            devices.agree({**as_dict(recipe), "data": splits.fingerprint, "share": share, **provenance.versions()})
            say(f"Data: {splits.source}. A trial of {SEEDS} seeds on about {share:.0%} of the epochs.")
            try:
                result = _trial(recipe, share, splits, folder, say, devices, download, cache)
            except tf.errors.OpError as error:
                raise readable_error(error, devices) from error
            if out and result:
                files.write_text(folder.path / "plan.json", json.dumps(result, indent=1) + "\n")
            return result


def _open_folder(out: str | Path | None, devices: Devices) -> RunFolder:
    if out and devices.chief:
        return RunFolder(Path(out))
    return RunFolder(Path(tempfile.mkdtemp(prefix="kdistill-plan-")), temporary=True)


def _short(training: Training, share: float, times: int = 1) -> Training:
    epochs = max(1, round(share * training.epochs))
    return dataclasses.replace(training, epochs=min(training.epochs, times * epochs))


def _teacher_share(recipe: Recipe, splits: Splits, share: float) -> float:
    """The share of its training that what teaches the students has in the trial: 1 if nothing of it is trained."""
    networks = (recipe.teacher, *recipe.more_teachers)
    if not recipe.assistants and not any(needs_training(network, splits.sizes) for network in networks):
        return 1.0
    return _short(recipe.teacher_training, share).epochs / recipe.teacher_training.epochs


def _trial(
    recipe: Recipe,
    share: float,
    splits: Splits,
    folder: RunFolder,
    say: Callable[[str], None],
    devices: Devices,
    download: bool,
    cache: str,
) -> dict:
    started = time.perf_counter()
    short = dataclasses.replace(
        recipe,
        teacher_training=_short(recipe.teacher_training, share),
        training=_short(recipe.training, share),
        seeds=SEEDS,
        max_seeds=None,
        compress=(),
    )
    longer = dataclasses.replace(short, training=_short(recipe.training, share, LONGER))
    arms = Arms(short, splits, folder, say, devices, download=download)
    arms.fit_teacher()
    for place in range(SEEDS):
        arms.fit_control(place)
        arms.fit_student(place, cache)
    if longer.training != short.training:
        more = Arms(longer, splits, folder, say, devices, download=download)
        more.teaching = arms.teaching
        more.fit_control(0, LONGER_CONTROL)
        arms.models[LONGER_CONTROL], arms.fits[LONGER_CONTROL] = more.models[LONGER_CONTROL], more.fits[LONGER_CONTROL]
    if not devices.chief:
        devices.wait()
        return {}
    arms.plain_models()
    result = _result(recipe, share, arms, longer.training.epochs)
    devices.wait()
    result["trial"]["seconds"] = time.perf_counter() - started
    return {"recipe": as_dict(recipe), **provenance.of_run(), "data": describe_data(splits), **result}


def _result(recipe: Recipe, share: float, arms: Arms, longer_epochs: int) -> dict:
    splits, test_images = arms.splits, len(arms.splits.test)
    lead = _lead(recipe, share, arms, longer_epochs)
    control, student = (_correct(arms, splits.validation, *_of_seeds(arm)) for arm in ("control", "student"))
    difference = (student.mean(axis=1) - control.mean(axis=1)).tolist()
    scatter = expectation.deviations(student, control, test_images)
    models = _models(recipe, arms, longer_epochs)
    by_seed = sum(models[name]["full_seconds"] for name in ("control", "student"))
    once = sum(row["full_seconds"] for name, row in models.items() if name.startswith(("teacher", "assistant")))
    forecast = [
        {
            "seeds": seeds,
            "difference": expectation.visible_difference(max(scatter["difference"], 1 / test_images), seeds),
            "seconds": once + seeds * by_seed,
        }
        for seeds in FORECAST
    ]
    still = max(0.0, lead["expected"] - lead["control"])
    images, classes = len(splits.validation), len(splits.class_names)
    expected = expectation.expect(lead, difference, images, still, test_images, classes)
    lines = [_forecast_line(row) for row in forecast]
    return {
        "trial": {
            "share": share,
            "seeds": [recipe.seed + place for place in range(SEEDS)],
            "images": len(splits.validation),
            "sentence": _trial_sentence(models, len(splits.validation)),
        },
        "models": models,
        "difference": difference,
        "lead": lead,
        "scatter": scatter,
        "forecast": forecast,
        "expectation": expected,
        "lines": [*lines, expectation.resolution_sentence(test_images), expected["sentence"]],
        "warnings": arms.warnings,
    }


def _of_seeds(name: str) -> list[str]:
    return [numbered(name, place) for place in range(SEEDS)]


def _correct(arms: Arms, examples: Examples, *names: str) -> np.ndarray:
    """Whether each model classifies each image correctly, bool `[models, n]`."""
    outputs = (outputs_on(arms.models[name], examples, arms.splits) for name in names)
    return np.stack([logits.argmax(axis=1) == examples.labels for logits in outputs])


def _lead(recipe: Recipe, share: float, arms: Arms, longer_epochs: int) -> dict:
    """The teacher against the control that has had the most similar share of its training.

    Of the seeds of the short control, the one with the median accuracy. A teacher that comes trained has had all of its
    training: it meets the longer control, and `expected` extrapolates what the control still reaches.
    """
    names = [teaching_name(recipe), *_of_seeds("control")]
    names += [LONGER_CONTROL] if LONGER_CONTROL in arms.models else []
    trained, epochs = _teacher_share(recipe, arms.splits, share), recipe.training.epochs
    shares = arms.recipe.training.epochs / epochs, longer_epochs / epochs
    nearest = int(abs(np.log(trained / shares[1])) < abs(np.log(trained / shares[0])))
    for split, examples in lead_examples(recipe, arms.splits).items():
        teacher, *controls = _correct(arms, examples, *names)
        short, longer = controls[:SEEDS], controls[-1]
        median = sorted(short, key=np.mean)[SEEDS // 2]
        lead = expectation.teacher_lead(teacher, (median, longer)[nearest], split)
        if lead["decidable"]:
            break
    expected = lead["control"]
    if shares[0] < shares[1] and shares[nearest] < trained:
        errors = 1 - float(np.mean(short)), 1 - float(longer.mean())
        error = expectation.error_after(*errors, len(examples), shares, trained)
        expected = max(expected, 1 - error)
    return {**lead, "expected": expected, "share": trained}


def _models(recipe: Recipe, arms: Arms, longer_epochs: int) -> dict[str, dict]:
    """The rows of the table by name: epochs, accuracy on the validation images by seed, and seconds."""
    short, full = arms.recipe, (recipe.training.epochs, recipe.teacher_training.epochs)
    compilation, epoch = _compilation_and_epoch(arms, longer_epochs)
    rows = {}
    for name in arms.models:
        kind = re.sub(r"-\d+$", "", name)
        of_teacher = kind not in ("control", "student", LONGER_CONTROL)
        seeds = [numbered(kind, place) for place in range(SEEDS)] if kind in ("control", "student") else [name]
        fits = [arms.fits[seed]["seconds"] for seed in seeds if seed in arms.fits]
        trained = short.teacher_training.epochs if of_teacher else short.training.epochs
        epochs = longer_epochs if kind == LONGER_CONTROL else trained
        seconds = float(np.mean(fits)) if fits else 0.0
        fixed = min(compilation, seconds)
        # A student takes the time of its control at least, whatever a short measurement says.
        per_epoch = max((seconds - fixed) / epochs, epoch if kind == "student" else 0.0)
        rows[kind] = {
            "epochs": epochs if fits else 0,
            "of": full[of_teacher] if fits else 0,
            "accuracy": [float(value) for value in _correct(arms, arms.splits.validation, *seeds).mean(axis=1)],
            "seconds": seconds,
            "full_seconds": None if kind == LONGER_CONTROL else fixed + per_epoch * full[of_teacher],
        }
    return rows


def _compilation_and_epoch(arms: Arms, longer_epochs: int) -> tuple[float, float]:
    """The seconds of a fit before its first step, taken to be the same for all models, and of an epoch of the control.

    They follow from the short and the longer control; without a longer one, a fit is counted as all steps.
    """
    short, seconds = (
        arms.recipe.training.epochs,
        float(np.mean([arms.fits[c]["seconds"] for c in _of_seeds("control")])),
    )
    if LONGER_CONTROL not in arms.fits:
        return 0.0, seconds / short
    epoch = max(0.0, arms.fits[LONGER_CONTROL]["seconds"] - seconds) / (longer_epochs - short)
    return max(0.0, seconds - short * epoch), min(epoch, seconds / short)


def _trial_sentence(models: dict[str, dict], images: int) -> str:
    def extent(name: str) -> str:
        return f"{models[name]['epochs']} of {models[name]['of']} epochs"

    trained = [name for name in models if name.startswith(("teacher", "assistant")) and models[name]["of"]]
    teacher = f"{', '.join(trained)} {extent(trained[0])}" if trained else "the teacher comes trained"
    longer = f", one control {extent(LONGER_CONTROL)}" if LONGER_CONTROL in models else ""
    text = (
        f"Trial: {teacher}; control and student {extent('control')}, {SEEDS} seeds{longer}; accuracies on the "
        f"{images:,} validation images. "
    )
    if models["control"]["epochs"] == models["control"]["of"]:
        return text + "The control has had all of its training."
    return text + (
        "So few epochs underrate all models"
        + (", the teacher most if it learns more slowly." if trained else " that were trained.")
    )


def _forecast_line(row: dict) -> str:
    return (
        f"{row['seeds']} seeds show a difference from {100 * row['difference']:.2g} points on (80 % power), in about "
        f"{_duration(row['seconds'])} of training, one model after the other."
    )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
