"""The story of a sweep: the teacher once, then all students of a grid side by side; validation picks, test reports."""

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdistill import files, provenance
from kdistill.data import few_labels
from kdistill.data.batches import steps_per_epoch
from kdistill.data.splits import load
from kdistill.distillation.distiller import from_recipe
from kdistill.distillation.supervised import Supervised
from kdistill.evaluation import diagnostics, input_checks, picks, verdict
from kdistill.evaluation.evaluate import predict
from kdistill.evaluation.metrics import measure
from kdistill.networks import saving
from kdistill.networks.precision import dtype_policy
from kdistill.recipe import Recipe, grid
from kdistill.recipe.checks import check_precision
from kdistill.recipe.objective import teacher_taps
from kdistill.recipe.values import as_dict
from kdistill.report import sweep as sweep_report
from kdistill.report.content import PASS
from kdistill.report.sweep_charts import as_number
from kdistill.runs.arms import IMAGES, Arms
from kdistill.runs.folder import RunFolder, new_path
from kdistill.runs.preflight import check_run, check_students
from kdistill.runs.results import describe_data, log_verdict, measure_model, teaching_name
from kdistill.runs.scores import check_classifies
from kdistill.runs.together import Workers, joined
from kdistill.teachers.foreign import failures_as_messages
from kdistill.teachers.frozen import frozen
from kdistill.training import side_by_side
from kdistill.training.ray_tasks import connected
from kdistill.training.side_by_side import OncePerBatch, SideBySide

Groups = dict[str, list[grid.Setting]]
LOGGED = ("accuracy", "agreement", "kl", "ece")  # metrics of a student in TensorBoard


@failures_as_messages()
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
    ray: str | None = None,
    ray_cpus: int | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Trains the student of each setting of the grid, for each of `recipe.seeds` seeds.

    The students of a seed (of all seeds, where `recipe.cache.seed` gives them the same batches) train side by side, on
    one pass of the data and one forward pass of the teacher for each batch. The control, the student trained on labels
    alone with the recipe's own settings, is one of them.

    Args:
        grids: such as `["temperature=1,2,4"]`, see `kdistill.recipe.grid.axes`; by default the recipe's grid.
        together: trains at most this many students at a time, where memory is short. None: all; with `ray`, each of the
            tasks that run at the same time gets the same number.
        ray, ray_cpus: as for `kdistill.run`; a task trains students side by side.
        out, data_dir, download, resume, force, cache, say: as for `kdistill.run`.

    Returns:
        The content of `sweep.json`, with `folder`.

    Raises:
        InputError, CheckFailed: as `kdistill.run`.
    """
    recipe = dataclasses.replace(recipe, grid=tuple(grids or recipe.grid))
    axes = grid.axes(recipe, list(recipe.grid))
    check_precision(recipe)
    groups = grid.students(settings := grid.settings(recipe, axes))
    splits = load(recipe.data, data_dir, download, say=say)
    check_classifies(splits, "kdistill sweep")
    with dtype_policy(recipe.precision):
        cache = check_run(recipe, splits, cache=str(cache), download=download, say=say)
        check_students([group[0].recipe for group in groups.values()], splits)
        path = Path(out) if out else new_path(recipe, "sweep")
        with connected(ray, ray_cpus, say) as cluster, RunFolder(path, resume) as folder:
            folder.settle(recipe, splits.fingerprint, force, say, str(cluster or "none"))
            same = "" if len(settings) == len(groups) else " (with weight 0 the temperature has no effect)"
            say(f"Data: {splits.source}. Sweep folder: {folder.path}")
            say(f"{len(settings)} settings need {len(groups)} students{same}; seeds: {recipe.seeds}")
            arms = Arms(recipe, splits, folder, say, download=download)
            arms.fit_teacher(_taps(groups))
            workers = Workers(cluster, recipe, data_dir, folder.path) if cluster else None
            by_seed = _train_all(arms, groups, together, cache, workers)
            name = teaching_name(recipe)
            row = measure_model(arms, name, splits.test, None, arms.test_outputs(name))
            result = _result(arms, axes, groups, by_seed) | {"teacher": row}
            curves = {str(seed): by_seed[seed]["curves"] for seed in result["seeds"]}
            files.write_text(folder.path / "curves.json", json.dumps(curves) + "\n")
            sweep_report.save(result, curves, folder.path, side_by_side.FIRST_STEPS)
            _tensorboard(result, curves, folder.path / "logs")
            log_verdict(result["verdict"], folder.path / "logs" / "verdict")
            say(f"Report: {folder.path / 'sweep.html'}")
            return {**result, "folder": str(folder.path)}


def _taps(groups: Groups) -> dict[str, str]:
    """The layers of the teacher that the students use, with the settings that name them."""
    terms = [group[0].recipe.distill.terms for group in groups.values()]
    return {tap: setting for own in terms for tap, setting in teacher_taps(own).items()}


@dataclasses.dataclass
class Pass:
    """Students that train side by side on one pass of the data.

    Args:
        stage: its name in the run folder.
        recipes: the students' settings by `seed/name`, the path of their files.
        sharing: the number of passes that can share a cache.
    """

    stage: str
    recipes: dict[str, Recipe]
    sharing: int

    @property
    def seed(self) -> int:
        """The first seed of its students, with which the views of the data are made."""
        return int(next(iter(self.recipes)).partition("/")[0])


def _train_all(
    arms: Arms, groups: Groups, together: int | None, cache: str, workers: Workers | None
) -> dict[int, dict]:
    """Trains every student of every seed. Returns by seed `students` (measurements by name), `curves` and `cost`."""
    seeds = [arms.recipe.seed + place for place in range(arms.recipe.seeds)]
    by_seed = {seed: {"students": {}, "curves": {}, "cost": []} for seed in seeds}
    if arms.splits.labeled_mask is not None:
        # The control's batches hold labeled images only, so it cannot train on those of the students.
        for seed in seeds:
            control = arms.fit_control(seed - arms.recipe.seed, f"control-{seed}")
            outputs = [predict(control, part.images) for part in (arms.splits.validation, arms.splits.test)]
            by_seed[seed]["students"]["control"] = _measure_student(arms, control, *outputs, None)
    if workers and together is None:  # what is resumed keeps its passes, whatever the cluster is by then
        count = (len(groups) + 1) * len(seeds)
        size = arms.folder.choice("students", "together", lambda: str(-(-count // workers.cluster.slots)))
        together = int(size) if str(size).isdecimal() and int(size) else None
    passes = _passes(arms, groups, seeds, together)
    if workers:
        unfinished = [one for one in passes if not arms.folder.is_finished(one.stage)]
        workers.train(
            {one.stage: (train_pass_alone, one.stage, list(one.recipes), one.sharing, cache) for one in unfinished}
        )
    for one in passes:
        record = _train_pass(arms, one, cache)
        for key in ("students", "curves"):
            for member, value in record[key].items():
                seed, _, name = member.partition("/")
                by_seed[int(seed)][key][name] = value
        by_seed[one.seed]["cost"].append(record["cost"])
    return by_seed


def _passes(arms: Arms, groups: Groups, seeds: list[int], together: int | None) -> list[Pass]:
    recipes = {name: group[0].recipe for name, group in groups.items()}
    if arms.splits.labeled_mask is None:
        recipes = {"control": arms.recipe, **recipes}
    passes = []
    # Seeds differ in the order of the images too, unless the recipe has one seed for all views: then one pass will do.
    for seeds_of_pass in [seeds] if arms.recipe.cache.seed is not None else [[seed] for seed in seeds]:
        members = {f"{seed}/{name}": recipe for seed in seeds_of_pass for name, recipe in recipes.items()}
        size, names = together or len(members), list(members)
        for place, start in enumerate(range(0, len(names), size)):
            part = {name: members[name] for name in names[start : start + size]}
            stage = "students-" + "+".join(map(str, seeds_of_pass)) + (f"-{place}" if place else "")
            passes.append(Pass(stage, part, -(-len(names) // size)))
    return passes


def train_pass_alone(
    recipe: Recipe, data_dir: Path | None, folder: Path, stage: str, names: list[str], sharing: int, cache: str
) -> None:
    """Trains the students of one pass, and leaves them in the folder of the sweep. `names`: those of its recipes."""
    groups = grid.students(grid.settings(recipe, grid.axes(recipe, list(recipe.grid))))
    recipes = {"control": recipe, **{name: group[0].recipe for name, group in groups.items()}}
    with joined(recipe, data_dir, folder, stage, _taps(groups)) as arms:
        _train_pass(arms, Pass(stage, {name: recipes[name.partition("/")[2]] for name in names}, sharing), cache)


def _train_pass(arms: Arms, one: Pass, cache: str) -> dict:
    """Trains the students of one pass, or returns what an earlier session has recorded."""
    stage, recipes = one.stage, one.recipes
    if arms.folder.is_finished(stage):
        arms.say(f"{stage}: already finished")
        record, size = arms.folder.record(stage, PASS), -(-len(arms.splits.test) // 8)
        right = [student["right"] for student in record["students"].values()]
        if set(record["students"]) == set(record["curves"]) == set(recipes) and set(map(len, right)) == {2 * size}:
            return record
    splits, training = few_labels.for_student(arms.splits), arms.recipe.training
    steps = steps_per_epoch(splits.train, training.batch_size) * training.epochs
    members, teacher = _members(arms, recipes, steps)
    memory = side_by_side.memory(members, training.batch_size)
    arms.say(
        f"Training {len(members)} students side by side ({stage}), {training.epochs} epochs. Memory, besides data "
        f"and teacher: {memory['state'] / 1e6:,.0f} MB for weights, gradients and optimizers, and about "
        f"{memory['activations'] / 1e6:,.0f} MB for activations (--together N trains at most N at a time)"
    )
    options = {**arms.teaching.views(one.seed), "stored": arms.teaching.replay(stage, one.seed, cache, one.sharing)}
    group, checkpoints = SideBySide(members, teacher), arms.folder.checkpoints(stage)
    fit = side_by_side.fit(group, splits, arms.recipe.data, training, checkpoints=checkpoints, say=arms.say, **options)
    cost = {"seconds": fit["seconds"], "students": len(members), "steps": fit["steps"], "memory": memory}
    record = {"students": _measure_group(arms, group), "curves": fit["curves"], "cost": cost}
    arms.folder.finish_record(stage, record)
    return record


def _members(arms: Arms, recipes: dict[str, Recipe], steps: int) -> tuple[dict[str, Supervised], OncePerBatch]:
    """The compiled Distiller of each setting, or for the control a Supervised, and the teacher that they call."""
    taps = {tap: key for recipe in recipes.values() for tap, key in teacher_taps(recipe.distill.terms).items()}
    teacher = OncePerBatch(frozen(arms.teaching.model, taps=taps))
    members, subjects = {}, {}
    for name, recipe in recipes.items():
        student = arms.network(recipe.student, int(name.partition("/")[0]))
        is_control = name.endswith("/control")
        member = Supervised(student) if is_control else from_recipe(recipe.distill, student, teacher, steps)
        members[name] = side_by_side.compiled(member, recipe.training, steps)
        subjects[input_checks.unscaled_warning(student, arms.splits.train.images[:IMAGES])] = name
    for warning in filter(None, subjects):
        arms.say(f"Warning, {subjects[warning]} and similar students: {warning}")
    return members, teacher


def _measure_group(arms: Arms, group: SideBySide) -> dict[str, dict]:
    """Saves and measures each student of a group, by `seed/name`."""
    validation, test = (group.predict(part.images) for part in (arms.splits.validation, arms.splits.test))
    teacher_logits, broken = predict(arms.models["teacher"], arms.splits.test.images), group.broken()
    measurements = {}
    for name, member in group.members.items():
        path = arms.folder.path / "students" / f"{name}.keras"
        path.parent.mkdir(parents=True, exist_ok=True)
        saving.save_model(member.student, path)
        outputs = validation[name], test[name], teacher_logits
        measurements[name] = _measure_student(arms, member.student, *outputs, broken.get(name))
    return measurements


def _measure_student(arms: Arms, student, validation, test, teacher_logits, broken: int | None = None) -> dict:
    """The measurements of one student.

    `right` and `validation_right` hold which test and validation images it classifies correctly, as bits.
    """
    splits = arms.splits
    finite = np.isfinite(test).all(axis=1)
    correct = (test.argmax(axis=1) == splits.test.labels) & finite
    measurements = {
        "parameters": student.count_params(),
        "broken_step": broken,
        "right": np.packbits(correct).tobytes().hex(),
        "validation": None,
        "test": None,
    }
    if finite.all() and np.isfinite(validation).all():
        labels = splits.validation.labels
        correct = validation.argmax(axis=1) == labels
        accuracy = float(np.mean(correct))
        measurements["validation_right"] = np.packbits(correct).tobytes().hex()
        nll = diagnostics.negative_log_likelihood(validation, labels)
        measurements["validation"] = {"accuracy": accuracy, "nll": nll}
        measurements["test"] = measure(test, splits.test.labels, teacher_logits)
    return measurements


def _result(arms: Arms, axes: dict[str, list[str]], groups: Groups, by_seed: dict[int, dict]) -> dict:
    students = [by_seed[seed]["students"] for seed in by_seed]
    rows = [_row(name, groups.get(name), students) for name in ("control", *groups)]
    best = _best(rows)
    return {
        "recipe": as_dict(arms.recipe),
        **provenance.of_run(),
        "data": describe_data(arms.splits),
        "grid": axes,
        "seeds": list(by_seed),
        "students": rows,
        "best": best,
        "pick": _pick(best, rows, students, len(arms.splits.validation)) if best else None,
        "verdict": _verdict(best, students, len(arms.splits.test), arms.recipe.margin) if best else None,
        "cost": {
            "teacher_seconds": arms.fits.get("teacher", {}).get("seconds"),
            "passes": [cost for results in by_seed.values() for cost in results["cost"]],
        },
    }


def _row(name: str, group: list[grid.Setting] | None, students: list[dict]) -> dict:
    """A student over all seeds: lists by seed."""
    measurements = [by_name[name] for by_name in students]
    return {
        "name": name,
        "settings": [setting.values for setting in group or []],
        "parameters": measurements[0]["parameters"],
        "broken_steps": [row["broken_step"] for row in measurements],
        "validation": [row["validation"] for row in measurements],
        "test": [row["test"] for row in measurements],
    }


def _best(rows: list[dict]) -> str | None:
    """The setting with the highest mean validation accuracy over the seeds; of equal ones the lowest NLL."""

    def score(row: dict) -> tuple[float, float]:
        return tuple(
            sign * sum(metrics[key] for metrics in row["validation"]) for key, sign in (("accuracy", 1), ("nll", -1))
        )

    finite = [row for row in rows if row["settings"] and all(row["validation"])]
    return max(finite, key=score)["name"] if finite else None


def _pick(best: str, rows: list[dict], students: list[dict], images: int) -> dict | None:
    """Which settings chance does not distinguish from the best one, on the validation images, which picked it.

    None if the record of one seed does not hold these images, as that of an earlier version.
    """
    finite = [row for row in rows if row["settings"] and all(row["validation"])]
    accuracies = {row["name"]: [metrics["accuracy"] for metrics in row["validation"]] for row in finite}
    correct = None
    if len(students) == 1:
        try:
            correct = {name: _from_bits(students[0][name]["validation_right"], images) for name in accuracies}
        except (KeyError, TypeError, ValueError):
            return None
        if {len(values) for values in correct.values()} != {images}:
            return None
    return picks.compare_with_best(best, accuracies, images, correct)


def _from_bits(text: str, images: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))[:images] == 1


def _verdict(best: str, students: list[dict], images: int, margin: float) -> dict | None:
    """The best setting against the control, on the test images, which had no part in choosing it."""
    arms = [[by_name[name] for by_name in students] for name in (best, "control")]
    if not all(row["test"] for arm in arms for row in arm):
        return None
    accuracies = [[row["test"]["accuracy"] for row in arm] for arm in arms]
    correct = [_from_bits(arm[0]["right"], images) for arm in arms]
    only = int((correct[0] & ~correct[1]).sum()), int((correct[1] & ~correct[0]).sum())
    return verdict.judge(*accuracies, images, only, margin=margin)


def _tensorboard(result: dict, curves: dict, folder: Path) -> None:
    """Writes the curves of every student and seed to `folder`, in place of older ones, and for the tab HParams its
    settings with its results.

    `result`: what `sweep.json` holds. `curves`: by seed and student, lists `step`, `validation` and losses by name.
    """
    import tensorflow as tf

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own, about numpy 2
        from tensorboard.plugins.hparams import api as hparams

        for place, seed in enumerate(result["seeds"]):
            for student in result["students"]:
                path = folder / "students" / str(seed) / student["name"]
                for old in path.glob("events.out.tfevents.*"):  # of the sweep before it was resumed
                    old.unlink()
                writer = tf.summary.create_file_writer(str(path))
                with writer.as_default():
                    if student["settings"]:
                        settings = {key: _number_or_text(value) for key, value in student["settings"][0].items()}
                        hparams.hparams({**settings, "seed": seed}, trial_id=f"{student['name']},seed={seed}")
                    curve = curves[str(seed)].get(student["name"], {"step": []})
                    for key, values in curve.items():
                        for step, value in zip(curve["step"], values, strict=True):
                            if key != "step" and value is not None:
                                tf.summary.scalar(f"curve/{key}", value, step=step)
                    test, last_step = student["test"][place] or {}, (curve["step"] or [0])[-1]
                    for key in LOGGED:
                        if test.get(key) is not None:
                            tf.summary.scalar(f"test/{key}", test[key], step=last_step)
                writer.close()


def _number_or_text(value: str) -> float | str:
    number = as_number(value)
    return value if number is None else number
