"""The story of a sweep: the teacher once, then all students of a grid side by side; validation picks, test reports."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

from kdistill import files, provenance
from kdistill.data import few_labels
from kdistill.data import splits as data_splits
from kdistill.data.batches import steps_per_epoch
from kdistill.distillation.distiller import from_recipe
from kdistill.distillation.supervised import Supervised
from kdistill.evaluation import diagnostics, input_checks, verdict
from kdistill.evaluation.evaluate import evaluate, predict
from kdistill.evaluation.metrics import measure
from kdistill.networks import saving
from kdistill.recipe import Recipe, grid
from kdistill.recipe.checks import check_precision
from kdistill.recipe.objective import teacher_taps
from kdistill.recipe.values import as_dict
from kdistill.report import sweep as report_sweep
from kdistill.report import sweep_charts
from kdistill.runs import sweep_logs
from kdistill.runs.arms import LOOKED_AT, Arms
from kdistill.runs.folder import RunFolder, new_path
from kdistill.teachers.frozen import frozen
from kdistill.training import side_by_side
from kdistill.training.side_by_side import Once, SideBySide


def sweep(
    recipe: Recipe,
    grids: list[str] | None = None,
    out: str | Path | None = None,
    *,
    data_dir: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    force: bool = False,
    together: int | None = None,
    cache: str | Path = "auto",
    say: Callable[[str], None] = print,
) -> dict:
    """Trains the student of each setting of the grid, for each of `recipe.seeds` seeds; returns what is in sweep.json.

    The students of a seed (of all seeds, where `recipe.cache.seed` gives them the same batches) train side by side, on
    one pass of the data and one forward of the teacher for each batch;
    `together`: at most so many at a time, where memory is short; `cache` as in `run`. The control, the student trained
    on labels alone with the recipe's own settings, is one more of them. Errors are those of `run`.
    """
    recipe = dataclasses.replace(recipe, grid=tuple(grids or recipe.grid))
    found = grid.axes(recipe, list(recipe.grid))
    check_precision(recipe.precision)
    groups = grid.students(settings := grid.settings(recipe, found))
    splits = data_splits.load(recipe.data, data_dir, download, say=say)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.precision)
    folder = RunFolder(Path(out) if out else new_path(recipe, "sweep"), resume)
    try:
        folder.settle(recipe, splits.fingerprint, force, say)
        say(f"Data: {splits.source}. Sweep folder: {folder.path}")
        say(f"{len(settings)} settings are {len(groups)} students{_why(settings, groups)}; seeds: {recipe.seeds}")
        arms = Arms(recipe, splits, folder, say)
        teacher = arms.teacher()
        seeds = range(recipe.seed, recipe.seed + recipe.seeds)
        # Seeds differ in the order of the images too, unless the recipe has one seed for all views: then all of them
        # train on one pass.
        passes = [
            each
            for some in ([list(seeds)] if recipe.cache.seed is not None else [[seed] for seed in seeds])
            for each in _trained(arms, groups, teacher, some, together, str(cache), say)
        ]
        rows = [_row(name, groups.get(name), passes) for name in ("control", *groups)]
        best = _best(rows)
        result = {
            "recipe": as_dict(recipe),
            **provenance.of_run(),
            "data": {
                "source": splits.source,
                "fingerprint": splits.fingerprint,
                **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
                **few_labels.counts(splits),
            },
            "grid": found,
            "seeds": list(seeds),
            "teacher": evaluate(teacher, splits.test),
            "students": rows,
            "best": best,
            "verdict": _verdict(best, passes, len(splits.test)) if best else None,
            "cost": {
                "teacher_seconds": arms.fits.get("teacher", {}).get("seconds"),
                "passes": [cost for each in passes for cost in each["cost"]],
            },
        }
        curves = {str(seed): each["curves"] for seed, each in zip(seeds, passes, strict=True)}
        files.write(folder.path / "curves.json", json.dumps(curves) + "\n")
        pictures = sweep_charts.draw(result, curves, folder.path, side_by_side.FIRST)
        report_sweep.save(result, pictures, folder.path)
        sweep_logs.tensorboard(result, curves, folder.path / "logs")
        say(f"Report: {folder.path / 'sweep.html'}")
        return {**result, "folder": str(folder.path)}
    finally:
        folder.close()
        keras.config.set_dtype_policy(policy)


def _why(settings: list, groups: dict) -> str:
    return "" if len(settings) == len(groups) else " (with weight 0 the temperature has no effect: trained once)"


def _trained(arms: Arms, groups: dict, teacher, seeds: list[int], together: int | None, cache: str, say) -> list[dict]:
    """Every student of these seeds, which see the same batches, trained: for each seed `students` (measurements by
    name), `curves` and `cost`."""
    chosen = {name: group[0].recipe for name, group in groups.items()}
    found = [{"students": {}, "curves": {}, "cost": []} for _ in seeds]
    if arms.splits.known is None:
        chosen = {"control": arms.recipe, **chosen}
    else:  # the control's batches hold labeled images alone, so it cannot train on those of the students
        for seed, each in zip(seeds, found, strict=True):
            control = arms.control(f"control-{seed}", seed)
            outputs = [predict(control, part.images) for part in (arms.splits.validation, arms.splits.test)]
            each["students"]["control"] = _measured(arms, control, *outputs, None)
    # A member's name is the place of its file: seed/name.
    members = {f"{seed}/{name}": recipe for seed in seeds for name, recipe in chosen.items()}
    size, names = together or len(members), list(members)
    for place, start in enumerate(range(0, len(names), size)):
        part = {name: members[name] for name in names[start : start + size]}
        stage = "students-" + "+".join(map(str, seeds)) + (f"-{place}" if place else "")
        made = _one_pass(arms, part, teacher, stage, (cache, -(-len(names) // size)), say)
        for key in ("students", "curves"):
            for member, value in made[key].items():
                seed, _, name = member.partition("/")
                found[seeds.index(int(seed))][key][name] = value
        found[0]["cost"].append(made["cost"])
    return found


def _one_pass(arms: Arms, chosen: dict[str, Recipe], teacher, stage: str, cache: tuple, say) -> dict:
    """The students of one pass of the data, by `seed/name`: trained, or as an earlier session has left them. `cache`:
    where, and how many passes of a seed can share it."""
    checkpoints = arms.folder.checkpoints(stage)
    if (checkpoints / "finished.json").exists():
        say(f"{stage}: finished before")
        made = files.read(checkpoints / "finished.json")
        if set(made["students"]) == set(chosen):
            return made
    splits, training = few_labels.for_student(arms.splits), arms.recipe.training
    steps = steps_per_epoch(splits.train, training.batch_size) * training.epochs
    taps = {tap: path for recipe in chosen.values() for tap, path in teacher_taps(recipe.distill.terms).items()}
    asked = arms.asked(teacher, taps)
    shown = Once(frozen(asked, taps=taps))
    members, warnings = {}, {}
    for name, recipe in chosen.items():
        seed = int(name.partition("/")[0])
        network = arms.network(recipe.student, seed)
        plain = name.endswith("/control")
        member = Supervised(network) if plain else from_recipe(recipe.distill, network, shown, steps)
        members[name] = side_by_side.compiled(member, recipe.training, steps)
        warnings[input_checks.unscaled_warning(network, splits.train.images[:LOOKED_AT])] = name
    for warning in filter(None, warnings):
        say(f"Warning, {warnings[warning]} and the like: {warning}")
    need = side_by_side.memory(members, training.batch_size)
    say(
        f"Training {len(members)} students side by side ({stage}), {training.epochs} epochs. Memory, besides data "
        f"and teacher: {need['state'] / 1e6:,.0f} MB for weights, gradients and optimizers, and about "
        f"{need['activations'] / 1e6:,.0f} MB for activations (--together N trains at most N at a time)"
    )
    group, views = SideBySide(members), arms.views(seed)
    views["stored"] = arms.stored(stage, seed, asked, *cache)
    fitted = side_by_side.fit(group, splits, arms.recipe.data, training, checkpoints=checkpoints, say=say, **views)
    validation, test = (group.predict(part.images) for part in (arms.splits.validation, arms.splits.test))
    teacher_logits, broken = predict(teacher, arms.splits.test.images), group.broken()
    measured = {}
    for name, member in members.items():
        path = arms.folder.path / "students" / f"{name}.keras"
        path.parent.mkdir(parents=True, exist_ok=True)
        saving.save_model(member.student, path)
        measured[name] = _measured(arms, member.student, validation[name], test[name], teacher_logits, broken.get(name))
    cost = {"seconds": fitted["seconds"], "students": len(members), "steps": fitted["steps"], "memory": need}
    made = {"students": measured, "curves": fitted["curves"], "cost": cost}
    files.write(checkpoints / "finished.json", json.dumps(made) + "\n")
    for old in checkpoints.glob("step-*.npz"):
        old.unlink()
    return made


def _measured(arms: Arms, student, validation, test, teacher_logits, broken: int | None = None) -> dict:
    """What one student is worth; `right` are the test images that it gets right, as bits."""
    splits = arms.splits
    found = {"parameters": student.count_params(), "broken_step": broken}
    right = (test.argmax(axis=1) == splits.test.labels) & np.isfinite(test).all(axis=1)
    found["right"] = np.packbits(right).tobytes().hex()
    if not (np.isfinite(test).all() and np.isfinite(validation).all()):
        return {**found, "validation": None, "test": None}
    held = splits.validation.labels
    accuracy = float(np.mean(validation.argmax(axis=1) == held))
    found["validation"] = {"accuracy": accuracy, "nll": diagnostics.negative_log_likelihood(validation, held)}
    return {**found, "test": measure(test, splits.test.labels, teacher_logits)}


def _row(name: str, group: list | None, passes: list[dict]) -> dict:
    """A student over all seeds: lists by seed."""
    seen = [each["students"][name] for each in passes]
    return {
        "name": name,
        "settings": [setting.values for setting in group or []],
        "parameters": seen[0]["parameters"],
        "broken_steps": [each["broken_step"] for each in seen],
        "validation": [each["validation"] for each in seen],
        "test": [each["test"] for each in seen],
    }


def _best(rows: list[dict]) -> str | None:
    """The setting with the highest mean validation accuracy over the seeds; of equal ones the least likelihood loss."""

    def worth(row: dict) -> tuple[float, float]:
        return tuple(
            sign * sum(each[key] for each in row["validation"]) for key, sign in (("accuracy", 1), ("nll", -1))
        )

    whole = [row for row in rows if row["settings"] and all(row["validation"])]
    return max(whole, key=worth)["name"] if whole else None


def _verdict(best: str, passes: list[dict], images: int) -> dict | None:
    """The best setting against the control, on the test images, which had no part in choosing it."""
    both = [[each["students"][name] for each in passes] for name in (best, "control")]
    if not all(each["test"] for arm in both for each in arm):
        return None
    accuracy = [[each["test"]["accuracy"] for each in arm] for arm in both]
    right = [np.unpackbits(np.frombuffer(bytes.fromhex(arm[0]["right"]), np.uint8))[:images] == 1 for arm in both]
    only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
    return verdict.judge(*accuracy, images, only)
