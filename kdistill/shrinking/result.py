"""What a search hands over: the winner's file, the checked files around it, and the figures of both."""

import dataclasses
import math
from pathlib import Path

import keras

from kdistill import provenance
from kdistill.conversion.build import NAME
from kdistill.conversion.float32 import prepare
from kdistill.conversion.verify import export_checked
from kdistill.data.splits import Examples, Splits
from kdistill.errors import FileRefused
from kdistill.evaluation.evaluate import evaluate
from kdistill.networks import saving
from kdistill.recipe import Profile, Recipe
from kdistill.recipe.values import as_dict
from kdistill.runs.arms import numbered
from kdistill.runs.preflight import seeds_are_copies
from kdistill.runs.results import describe_data
from kdistill.shrinking.fit import BYTES_OF_A_WEIGHT
from kdistill.shrinking.search import Search
from kdistill.shrinking.space import Candidate
from kdistill.tflite import flatbuffer, metadata, microcontroller
from kdistill.tflite.interpreter import File

COSTS = ("accuracy", "bytes", "arena", "microseconds")


def costs_of(path: Path, profile: Profile, parameters: int) -> dict:
    """Bytes, container, arena and time of a file."""
    content = path.read_bytes()
    arena = None
    if profile.batch is not None:
        arena = microcontroller.arena(flatbuffer.parse(metadata.bare(content)))["total"]
    return {
        "parameters": parameters,
        "bytes": len(content),
        "container": len(content) - round(BYTES_OF_A_WEIGHT[profile.quantization] * parameters),
        "arena": arena,
        "microseconds": File(path, trusted=True).latency()["median_us"],
    }


def export_student(search: Search, name: str, recipe: Recipe, profile: Profile, epochs: int) -> dict:
    """Exports a student that the search has kept, checked on the validation examples: a row of the Pareto table."""
    folder, splits = search.arms.folder.path, search.arms.splits
    row = {"name": name, "epochs": epochs, "winner": False}
    model = saving.load_model(folder / "students" / f"{name}.keras")
    target = folder / "pareto" / name
    try:
        file = _export(model, target, splits, recipe, profile, splits.validation)
    except FileRefused as error:
        empty = dict.fromkeys((*COSTS, "container"))
        return {**row, **empty, "parameters": model.count_params(), "file": None, "refused": error.reason}
    costs = costs_of(target / NAME, profile, model.count_params())
    accuracy = file["check"]["accuracy"]
    return {**row, **costs, "accuracy": accuracy, "file": f"pareto/{name}/{NAME}", "refused": None}


def _export(
    model: keras.Model, folder: Path, splits: Splits, recipe: Recipe, profile: Profile, examples: Examples
) -> dict:
    """Exports a model into a folder, checked on these examples. Raises `FileRefused`."""
    student, about = prepare(model, splits.head), {"recipe": as_dict(recipe), "data": splits.fingerprint}
    options = {"class_names": splits.class_names or None, "about": about}
    return export_checked(student, folder, profile, splits.train.inputs, examples, **options)


def mark_pareto(rows: list[dict]) -> list[dict]:
    """The rows, the smallest first, with `pareto`: no other file is as good in everything and better in something.

    Times differ by noise, so that files count as equally fast within 5 %.
    """

    def dominates(one: dict, other: dict) -> bool:
        no_worse = one["accuracy"] >= other["accuracy"] and one["bytes"] <= other["bytes"]
        no_worse = no_worse and (one["arena"] or 0) <= (other["arena"] or 0)
        no_worse = no_worse and one["microseconds"] <= 1.05 * other["microseconds"]
        better = one["accuracy"] > other["accuracy"] or one["bytes"] < other["bytes"]
        return no_worse and (better or (one["arena"] or 0) < (other["arena"] or 0))

    good = [row for row in rows if row["accuracy"] is not None]
    for row in rows:
        row["pareto"] = row in good and not any(dominates(other, row) for other in good)
    return sorted(rows, key=lambda row: (row["bytes"] is None, row["bytes"] or 0))


def files_of_seeds(search: Search, report: dict, recipe: Recipe, profile: Profile) -> list[dict]:
    """The winner's file of every seed and its accuracy on the test examples; that of the first seed is the run's."""
    splits, run = search.arms.splits, Path(report["folder"])
    rows = []
    for place in range(recipe.seeds):
        name = numbered("student", place)
        path = run / profile.name / NAME
        reason = None
        if place:
            path = run / "seeds" / name / NAME
            try:
                model = saving.load_model(run / f"{name}.keras")
                _export(model, path.parent, splits, recipe, profile, splits.test)
            except FileRefused as error:
                reason = error.reason
        accuracy = evaluate(path, splits.test)["accuracy"] if reason is None and path.is_file() else None
        rows.append({"seed": recipe.seed + place, "accuracy": accuracy, "refused": reason})
    return rows


def gather(
    search: Search, winner: Candidate, recipe: Recipe, profile: Profile, report: dict, tried: dict, rows: list[dict]
) -> dict:
    """The content of `shrink.json`: what the search has `tried`, the run's figures, and the Pareto rows."""
    splits, run = search.arms.splits, Path(report["folder"])
    path = run / profile.name / NAME
    parameters = saving.load_model(run / "student.keras").count_params()
    file = {**costs_of(path, profile, parameters), "path": str(path.relative_to(search.arms.folder.path))}
    own = {**file, "name": winner.name, "epochs": recipe.training.epochs, "winner": True, "refused": None}
    own["file"], own["accuracy"] = own.pop("path"), evaluate(path, splits.validation)["accuracy"]
    models = {row["name"]: row for row in report["models"]}
    controls = [models[numbered("control", place)]["accuracy"] for place in range(recipe.seeds)]
    return {
        "profile": profile.name,
        "winner": winner.name,
        "recipe": as_dict(recipe),
        **provenance.of_run(),
        "data": describe_data(splits),
        "validation": len(splits.validation),
        "test": len(splits.test),
        "seeds": [recipe.seed + place for place in range(recipe.seeds)],
        "file": file,
        "files": files_of_seeds(search, report, recipe, profile),
        "controls": controls,
        "verdict": report["verdict"],
        "pareto": mark_pareto([*rows, own]),
        **tried,
    }


def with_settings(recipe: Recipe, splits: Splits, winner: Candidate, distill, epochs: int) -> Recipe:
    """The template with the winner, how it is taught, and for how long."""
    training = dataclasses.replace(recipe.training, epochs=epochs)
    return of_student(dataclasses.replace(recipe, distill=distill, training=training), splits, winner)


def of_student(recipe: Recipe, splits: Splits, candidate: Candidate) -> Recipe:
    """A recipe with this student.

    Where its start is the same for every seed, such as the teacher's weights, each seed draws its own batches: else the
    seeds would be copies. They repeat their views, so that the teacher runs as often as for one seed.
    """
    recipe = dataclasses.replace(recipe, student=candidate.network)
    if not seeds_are_copies(recipe, splits):
        return recipe
    views = recipe.cache.views or math.ceil(recipe.training.epochs / recipe.seeds)
    return dataclasses.replace(recipe, cache=dataclasses.replace(recipe.cache, seed=None, views=views))
