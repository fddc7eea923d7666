"""Controls and students of several seeds side by side, or as tasks of a cluster, with the weights of each alone."""

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path

from kdistill.data import few_labels
from kdistill.data.splits import load
from kdistill.errors import InputError
from kdistill.files import exclusive_lock
from kdistill.networks.precision import dtype_policy
from kdistill.recipe import Recipe
from kdistill.recipe.objective import teacher_taps
from kdistill.runs.arms import Arms, numbered, unscaled_warning, with_warning
from kdistill.runs.folder import RunFolder
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.frozen import frozen
from kdistill.training import side_by_side
from kdistill.training.fit_together import Member, fit_together
from kdistill.training.ray_tasks import Cluster
from kdistill.training.side_by_side import OncePerBatch
from kdistill.training.strategy import Devices

STAGE = "together-"  # and the name of its first model: a stage in the run folder


class Workers:
    """The processes of a cluster that train stages of one run, in its folder."""

    def __init__(self, cluster: Cluster, recipe: Recipe, data_dir: str | Path | None, folder: Path):
        self.cluster = cluster
        self.run = recipe, data_dir and Path(data_dir).resolve(), folder.resolve()

    def train(self, stages: dict[str, tuple]) -> None:
        """Trains stages by name; each is a function and its arguments after those of `joined`."""
        self.cluster.run({name: (function, (*self.run, *own)) for name, (function, *own) in stages.items()})


def check_together(together: int | None, devices: Devices, profile: bool, ray: str | None = None) -> None:
    """Raises `InputError` for a number of models at a time, or tasks of Ray, that cannot be."""
    if ray is not None and (devices.strategy or profile or together is not None):
        option = "--strategy" if devices.strategy else "--profile" if profile else "--together"
        raise InputError(f"--ray trains each model in a process of its own, so it excludes {option}. Leave out one.")
    if together is not None and together < 1:
        raise InputError(f"together expects a number of models from 1 on, or auto, received {together}.")
    if together is not None and together > 1 and (devices.strategy or profile):
        option = "--profile records one model at a time" if profile else "with --strategy, models train one by one"
        raise InputError(f"--together {together}: {option}. Leave out one of the two.")


def fit_seeds(arms: Arms, count: int, cache: str, together: int | None = None, workers: Workers | None = None) -> None:
    """Trains control and student of the next `count` seeds.

    They train side by side on one device; with a strategy, or with a profile, one after the other; with `workers`, each
    is a task of its own. What an earlier session has begun goes on as it was begun.

    Args:
        cache: as for `Teaching.replay`.
        together: models at a time. None: as many as the memory takes, and one if the recipe has one seed. 1: one after
            the other.
    """
    places = range(arms.seeds, arms.seeds + count)
    names = {numbered(kind, place): (kind, place) for place in places for kind in ("control", "student")}
    several = max(arms.recipe.seeds, arms.recipe.max_seeds or 1) > 1
    alone = arms.devices.strategy or arms.profile or together == 1 or (together is None and not several)
    alone = alone or workers or not arms.splits.classifies
    if not arms.devices.strategy:
        for stage, members in _begun(arms, names).items():
            _fit_group(arms, stage, {name: names[name] for name in members}, cache)
        open_names = [name for name in names if not arms.folder.is_finished(name) and not _checkpoints(arms, name)]
        if not alone:
            size = together or _models_that_fit(arms)
            for start in range(0, len(open_names), size):
                part = open_names[start : start + size]
                _fit_group(arms, STAGE + part[0], {name: names[name] for name in part}, cache)
    if workers:
        open_names = [name for name in names if not arms.folder.is_finished(name)]
        workers.train({name: (fit_alone, *names[name], cache) for name in open_names})
    for name, (kind, place) in names.items():
        if name in arms.models:  # in the order of the seeds, whatever the order of training
            arms.models[name], arms.fits[name] = arms.models.pop(name), arms.fits.pop(name)
        elif kind == "control":  # loads what is finished, and trains what is not
            arms.fit_control(place)
        else:
            arms.fit_student(place, cache)
    arms.seeds += count


@contextlib.contextmanager
def joined(recipe: Recipe, data_dir: Path | None, folder: Path, stage: str, taps=None) -> Iterator[Arms]:
    """The models of a run whose teacher is trained, in a process that trains one stage for it.

    Args:
        data_dir: as for `load`.
        folder: the folder of the run, which another process has locked.
        stage: what is trained here. Only one process does: Ray can lose sight of a task that goes on.
        taps: as for `Arms.fit_teacher`.
    """
    lines: list[str] = []
    splits = load(recipe.data, data_dir, say=lines.append)
    with dtype_policy(recipe.precision), RunFolder(folder, resume=True, lock=False) as run_folder:
        stage_folder = run_folder.checkpoints(stage)
        stage_folder.mkdir(parents=True, exist_ok=True)
        lock = exclusive_lock(stage_folder / ".lock", f"Another process trains '{stage}' in '{folder}'.")
        try:
            arms = Arms(recipe, splits, run_folder, lines.append)
            arms.fit_teacher(taps)
            yield arms
        finally:
            lock.release()


def fit_alone(recipe: Recipe, data_dir: Path | None, folder: Path, kind: str, place: int, cache: str) -> None:
    """Trains control or student of a seed, and leaves it in the folder of the run."""
    with joined(recipe, data_dir, folder, numbered(kind, place)) as arms:
        if kind == "control":
            arms.fit_control(place)
        else:
            arms.fit_student(place, cache)


def _begun(arms: Arms, names: Collection[str]) -> dict[str, list[str]]:
    """The groups among these models that an earlier session has begun and not finished, by stage."""
    stages = [folder.parent.name for folder in arms.folder.path.glob(f"checkpoints/{STAGE}*/members.json")]
    members = {
        stage: arms.folder.choice(stage, "members", lambda: "").split()
        for stage in sorted(stages)
        if not arms.folder.is_finished(stage)
    }
    return {stage: part for stage, part in members.items() if part and set(part) <= set(names)}


def _checkpoints(arms: Arms, name: str) -> bool:
    """Whether a training of this model alone has begun."""
    return any(arms.folder.checkpoints(name).glob("step-*.npz"))


def _models_that_fit(arms: Arms) -> int:
    """How many models the memory takes at a time."""
    training = arms.recipe.training
    models = {"control": arms.control(0), "student": arms.distiller(0, arms.teaching.model)}
    compiled = {name: side_by_side.compiled(model, training, 1) for name, model in models.items()}
    return side_by_side.models_that_fit(compiled, training.batch_size)


def _fit_group(arms: Arms, stage: str, names: dict[str, tuple[str, int]], cache: str) -> None:
    """Trains these models, (kind, place) by name, at the same time."""
    arms.folder.choice(stage, "members", lambda: " ".join(names))
    recipe = arms.recipe
    taps = teacher_taps(recipe.distill.terms)
    teacher = OncePerBatch(frozen(arms.teaching.model, taps=taps))
    # Its outputs are logits, whatever those of the teacher are, so that no student has to look.
    shown = Adapted(teacher, outputs="logits") if arms.splits.classifies else teacher
    student_splits, control_splits = few_labels.for_student(arms.splits), few_labels.for_control(arms.splits)
    members, warnings = {}, {}
    for name, (kind, place) in names.items():
        seed = recipe.seed + place
        if kind == "control":
            member = Member(arms.control(place), control_splits, **arms.teaching.views(seed))
        else:
            stored = arms.teaching.replay(name, seed, cache)
            model = arms.distiller(place, shown)
            member = Member(model, student_splits, **arms.teaching.views(seed), stored=stored)
        members[name] = member
        warnings[name] = unscaled_warning(member.model.student, member.splits)
    for warning in sorted({*filter(None, warnings.values())}):
        arms.say(f"Warning: {warning}")
    parameters = next(iter(members.values())).model.student.count_params()
    arms.say(
        f"Training side by side: {', '.join(names)}; {parameters:,} parameters each, {recipe.training.epochs} epochs "
        "(--together N trains at most N at a time)"
    )
    logs, checkpoints = arms.folder.path / "logs", arms.folder.checkpoints(stage)
    records = fit_together(members, teacher, recipe.data, recipe.training, logs, checkpoints, arms.say)
    for name, record in records.items():
        arms.finish(name, members[name].model, with_warning(record, warnings[name]))
    arms.folder.finish_record(stage, {"members": list(names)})
