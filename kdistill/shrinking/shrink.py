"""The story of a search, top to bottom: budget, teacher, students that fit, rounds, the winner's run, the folder."""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from collections.abc import Mapping as AnyMapping
from pathlib import Path

import keras

from kdistill import files
from kdistill.data.splits import Splits, load
from kdistill.errors import CheckFailed, InputError
from kdistill.evaluation.evaluate import predict
from kdistill.recipe import Network, Profile, Recipe
from kdistill.recipe.checks import check_precision
from kdistill.recipe.loading import COMPACT, load_profile
from kdistill.report import shrink as report_of_shrink
from kdistill.runs.arms import Arms, build_network, load_network
from kdistill.runs.folder import RunFolder, new_path
from kdistill.runs.preflight import check_run
from kdistill.runs.run import run
from kdistill.runs.scores import check_classifies
from kdistill.schema import Mapping, Whole
from kdistill.shrinking import result as results
from kdistill.shrinking.budget import Budget, check_budget, read_budget
from kdistill.shrinking.examples import examples_of
from kdistill.shrinking.fit import Ruler, describe, fitting, refusal
from kdistill.shrinking.narrow import family_of
from kdistill.shrinking.plan import NARROWER, Plan
from kdistill.shrinking.search import Search, halve, methods, ranked
from kdistill.shrinking.space import WIDEST, Candidate, families_for
from kdistill.shrinking.template import as_file, check_trained, teacher_network, template
from kdistill.teachers.foreign import failures_as_messages
from kdistill.teachers.gain import little_above_chance
from kdistill.training.strategy import SINGLE_DEVICE

CHECKED = 1000  # validation examples on which the teacher is checked
COMPACT_BELOW = 1 << 16  # bytes; in smaller files names and metadata take a large share
COSTS = {"parameters": Whole(1), "bytes": Whole(1), "arena": (Whole(), None), "microseconds": (float, None)}
SIZES = {"family": str, "width": Whole(1, WIDEST), "depth": Whole(1, WIDEST), "reduce": Whole(1, WIDEST)}
FIT = {"budget": dict, "costs": Mapping({**COSTS, "container": int, "exact": bool}), "candidates": [SIZES]}  # fit.json


@failures_as_messages()
def shrink(
    teacher: str | Path | Network,
    data="mnist",
    profile: str | Path = "npu",
    budget: Budget | AnyMapping | str | int | None = None,
    *,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    download: bool = False,
    resume: bool = False,
    student: str | None = None,
    families: Sequence[str] = (),
    seeds: int = 3,
    settings: Sequence[str] = (),
    cache: str | Path = "auto",
    together: int | None = None,
    say: Callable[[str], None] = print,
) -> dict:
    """Finds the best student whose file meets a budget, taught by a trained teacher, and proves what it is worth.

    Students of several families are converted untrained, so that only what fits is trained. Successive halving picks
    one on the validation examples; a run with `seeds` seeds trains it and its control.

    Args:
        teacher: a file of any format that `docs/teachers.md` lists, `shipped:mnist_cnn`, or a `Network`.
        data: the name of a data set, a `kdistill.recipe.Data`, or a dict of arrays: x_train, x_test, y_train, y_test.
            Without labels students learn from the teacher alone, and the teacher's classes stand for y_test.
        profile: the name of an export profile, or the path of a `.py` file with one. Below 64 KiB files are compact,
            see `Profile.compact`.
        budget: such as `"16kB"`, or a dict of max_bytes, max_us, max_arena, min_accuracy and hours.
        out: a new folder, by default one under `runs/`; with `resume` the folder of the search.
        data_dir, download: as for `kdistill.run`.
        resume: continues the search in `out`, which ends as it would have without the interruption.
        student: `FILE.py:FUNCTION` of (shape, classes, width, depth) or (width, depth), in place of the families.
        families: of these names alone: small_cnn, ds_cnn, resnet (images), conv1d (sequences), dense (rows), teacher
            (narrower copies of the teacher, where it is a chain of ordinary layers).
        seeds: of the winner and its control.
        settings: `key=value` of a recipe, such as `training.epochs=12` (of the winner) or `data.flip=true`.
        cache: the folder of the teacher's stored outputs, `auto` for one in `out`, or `off`.
        together: the most students that train at a time. None: as many as the memory takes.
        say: receives each line of progress.

    Returns:
        The content of `shrink.json`, with `folder`. The winner's file is `folder`/`file`["path"].

    Raises:
        InputError: the budget cannot be met, or something in the arguments cannot work; nothing has been trained.
        CheckFailed: the winner's file is refused, or does not reach `min_accuracy`.

    Example:

    ```python
    result = kdistill.shrink("shipped:mnist_cnn", "mnist", "npu", "16kB")
    print(result["file"]["path"], result["verdict"]["sentence"])
    ```
    """
    started = time.monotonic()
    budget = read_budget({} if budget is None else budget)
    if not isinstance(profile, (str, Path)):
        raise InputError(
            f"profile expects the name of a profile or the path of a .py file, for the recipe of the winner; "
            f"received {profile!r}."
        )
    profile = str(profile)
    if budget.max_bytes and budget.max_bytes <= COMPACT_BELOW and not profile.endswith(COMPACT):
        profile += COMPACT
    chosen = load_profile(profile)
    trained = teacher_network(teacher)
    with _folder(Path(out) if out else new_path(Recipe("shrink", trained, trained)), resume) as folder:
        data, data_dir, unlabeled = examples_of(data, data_dir, trained, folder.path, say)
        recipe = template(trained, data, profile, seeds, settings, labeled="train" not in unlabeled)
        check_precision(recipe)
        splits = load(recipe.data, data_dir, download, say=say)
        check_classifies(splits, "kdistill shrink")
        check_trained(recipe, splits.sizes)
        check_budget(budget, chosen, _input_bytes(splits, chosen), labeled="test" not in unlabeled)
        model, accuracy = _check_teacher(recipe, splits, budget, download)
        parameters = model.count_params() if isinstance(model, keras.Model) else None
        tried = families_for(splits.input_shape, [name for name in families if name != "teacher"], student)
        narrower = None if student else family_of(model, folder.path / "narrowed")
        if "teacher" in families and narrower is None:
            raise InputError("This teacher cannot be made narrower: it is no chain of ordinary layers of Keras.")
        if narrower and (not families or "teacher" in families):
            tried = [narrower] if list(families) == ["teacher"] else [*tried, narrower]
        ruler = Ruler(recipe, splits, chosen, budget, parameters)
        candidates = _candidates(ruler, tried, folder.path, resume, say)
        base, recipe = recipe, results.of_student(recipe, splits, next(iter(candidates.values())))
        cache = check_run(recipe, splits, cache=str(cache), download=download, say=say, profiles=[chosen])
        folder.settle(recipe, splits.fingerprint, False, say)
        _keep(folder, budget, candidates, ruler)
        say(f"Data: {splits.source}. Teacher: {accuracy:.2%} on validation. Folder: {folder.path}")
        arms = Arms(recipe, splits, folder, say, download=download)
        arms.fit_teacher()
        search = Search(arms, str(folder.path / "cache") if cache == "auto" else cache, together)
        plan = Plan(search, candidates, budget, started)
        plan.announce()
        rounds = halve(search, candidates, plan.epochs, recipe.distill)
        winner = candidates[next(iter(rounds[-1]["students"]))]
        kept = [*rounds[-1]["students"]]
        taught, distill, smaller = _teach_winner(search, ruler, winner, rounds[-1], say)
        final = results.with_settings(base, splits, winner, distill, plan.final())
        heading = f"The student that kdistill shrink picked for {chosen.name}: {budget.text()}."
        files.write_text(folder.path / "recipe.py", as_file(final, heading))
        report = _train_winner(final, folder.path, data_dir, download, search.cache, say)
        record = {
            "budget": budget.as_dict(),
            "unlabeled": list(unlabeled),
            "teacher": {"validation_accuracy": accuracy, "parameters": parameters},
            "candidates": {name: ruler.costs[name] for name in candidates},
            "rounds": rounds,
            "methods": taught,
        }
        rows = []
        for name in [name for name in kept if name != winner.name] + smaller:
            say(f"Exporting {name}")
            rows.append(results.export_student(search, name, recipe, chosen, rounds[-1]["epochs"]))
        if not (Path(report["folder"]) / chosen.name / "student.tflite").is_file():
            reasons = "; ".join(row["reason"] for row in report["refused"])
            raise CheckFailed(f"The winner {winner.name} has no file that holds its limits: {reasons}")
        result = results.gather(search, winner, final, chosen, report, record, rows)
        report_of_shrink.save(result, folder.path)
        say(f"Report: {folder.path / 'shrink.html'}")
        _check_result(result, budget, folder.path)
        return {**result, "folder": str(folder.path)}


def _check_teacher(recipe: Recipe, splits: Splits, budget: Budget, download: bool) -> tuple[keras.Model, float]:
    """The teacher and its accuracy on validation examples. Raises `InputError` if it is near chance."""
    if recipe.teacher.file:
        model = load_network(recipe.teacher, splits, SINGLE_DEVICE).model
    else:
        model = build_network(recipe.teacher, splits, recipe.seed, SINGLE_DEVICE, download)[0]
    examples = splits.validation.select(slice(CHECKED))
    logits = predict(model, examples.inputs)
    accuracy, classes = float((logits.argmax(axis=1) == examples.labels).mean()), logits.shape[1]
    if accuracy < little_above_chance(classes):
        raise InputError(
            f"The teacher is right on {accuracy:.1%} of {len(examples):,} validation examples; chance is "
            f"{1 / classes:.1%}. It teaches noise. Check its normalization (--teacher-mean, --teacher-std), the order "
            "of its classes and its training."
        )
    if budget.min_accuracy and accuracy < budget.min_accuracy:
        raise InputError(
            f"--min-accuracy {100 * budget.min_accuracy:g} contradicts the teacher, which is right on {accuracy:.2%} "
            f"of {len(examples):,} validation examples. Give less, or a better teacher."
        )
    return model, accuracy


@contextlib.contextmanager
def _folder(path: Path, resume: bool):
    """The folder of the search. A search that is refused before it trains leaves nothing."""
    is_new = not path.exists()
    folder = RunFolder(path, resume)
    try:
        with folder:
            yield folder
    except InputError:
        if is_new and not (path / "checkpoints").exists():
            shutil.rmtree(path, ignore_errors=True)
        raise


def _candidates(ruler: Ruler, families, path: Path, resume: bool, say) -> dict[str, Candidate]:
    """The students that fit, by name: those that an earlier session has measured, or measured now."""
    record = path / "fit.json"
    if resume and record.exists():
        content = files.read_json(record, FIT)
        if content["budget"] != ruler.budget.as_dict():
            raise InputError(
                f"The search in '{path}' was started with another budget: {content['budget']}. Give the same, or a new "
                "folder."
            )
        ruler.costs |= content["costs"]
        by_name = {family.name: family for family in families}
        rows = [
            (by_name.get(row["family"]), row["width"], row["depth"], row["reduce"]) for row in content["candidates"]
        ]
        known = {row[0] and Candidate(*row).name: Candidate(*row) for row in rows}
        if known and None not in known and set(known) <= set(ruler.costs):
            return known
    say(f"Students within {ruler.budget.text()} for {ruler.profile.name}, converted and run untrained:")
    candidates, narrowest = fitting(ruler, families, say)
    if not candidates:
        raise InputError(refusal(ruler, narrowest))
    return {candidate.name: candidate for candidate in candidates}


def _keep(folder: RunFolder, budget: Budget, candidates: AnyMapping[str, Candidate], ruler: Ruler) -> None:
    """Keeps what was measured, for a resumed search."""
    rows = [
        {"family": one.family.name, "width": one.width, "depth": one.depth, "reduce": one.reduce}
        for one in candidates.values()
    ]
    content = {"budget": budget.as_dict(), "costs": ruler.costs, "candidates": rows}
    files.write_text(folder.path / "fit.json", json.dumps(content, indent=1) + "\n")


def _teach_winner(search: Search, ruler: Ruler, winner: Candidate, last: dict, say) -> tuple[dict, object, list[str]]:
    """The small sweep: other ways to teach the winner, and narrower ones, for as long as the last round.

    Returns the scores of each way, the best way, and the names of the narrower students.
    """
    ways = methods(search.arms.recipe.distill, len(search.splits.class_names))
    as_given = next(iter(ways))
    members = {name: (winner.network, way) for name, way in ways.items() if name != as_given}
    narrower = {}
    for share in NARROWER:
        width = max(1, round(share * winner.width))
        if width < winner.width:
            candidate = dataclasses.replace(winner, width=width)
            narrower[candidate.name] = candidate
    members |= {name: (candidate.network, ways[as_given]) for name, candidate in narrower.items()}
    students = search.train("methods", members, last["epochs"])
    scores = {as_given: last["students"][winner.name]} | {name: students[name] for name in ways if name != as_given}
    order = ranked(scores)
    say(f"{winner.name} is taught with: {order[0]}")
    taught = {"epochs": last["epochs"], "students": {name: scores[name] for name in order}, "best": order[0]}
    return taught, ways[order[0]], list(narrower)


def _train_winner(recipe: Recipe, folder: Path, data_dir, download: bool, cache: str, say) -> dict:
    """The run of the winner: its seeds, its control, the file and its check, a page."""
    path = folder / "run"
    resume = (path / "recipe.json").exists()
    say(f"The winner: a run of {recipe.seeds} seed{'s' * (recipe.seeds > 1)} and its control, in {path}")
    options = {"data_dir": data_dir, "download": download, "cache": cache, "resume": resume, "say": say}
    return run(recipe, path, strategy="none", **options)


def _check_result(result: dict, budget: Budget, folder: Path) -> None:
    """Raises `CheckFailed` if the trained file exceeds the budget, or is not as accurate as it has to be."""
    exceeded = budget.exceeded(result["file"])
    if "max_bytes" in exceeded or "max_arena" in exceeded:
        raise CheckFailed(
            f"The file of {result['winner']} exceeds the budget of {budget.text()}: {describe(result['file'])}. See "
            f"'{folder / 'shrink.html'}'."
        )
    accuracy = result["files"][0]["accuracy"]
    if budget.min_accuracy and accuracy < budget.min_accuracy:
        raise CheckFailed(
            f"The best of {len(result['candidates'])} students that fit, {result['winner']}, reaches {accuracy:.2%} on "
            f"the test examples, below --min-accuracy {100 * budget.min_accuracy:g}. Give a larger budget or more "
            f"--hours. See '{folder / 'shrink.html'}'."
        )


def _input_bytes(splits: Splits, profile: Profile) -> int:
    """The bytes of one input in the type of the file."""
    shape = splits.input_shape
    shapes = shape.values() if isinstance(shape, AnyMapping) else [shape]
    return sum(map(math.prod, shapes)) * (4 if profile.input_type == "float32" else 1)
