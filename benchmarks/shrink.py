"""`kdistill shrink` against as many random students, trained for as long: is the search worth its time?

    python benchmarks/shrink.py --data-dir MNIST_FOLDER [--max-bytes 16kB 8kB] [--hours 0.5] [--random]

For each budget: the search (its teacher ships with kdistill), then, with `--random`, as many random students that fit
(family, depth, resolution and width at random), each trained for as many epochs as the search has spent on average. The
best of them on validation is trained as the winner is, with the same seeds. Both are measured once on the test images,
in int8.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from common import arguments

import kdistill
from kdistill.data.splits import load
from kdistill.files import read_json, write_text
from kdistill.recipe import Data
from kdistill.recipe.loading import load_profile, load_recipe
from kdistill.runs.arms import Arms
from kdistill.runs.folder import RunFolder
from kdistill.shrinking.budget import read_budget
from kdistill.shrinking.fit import Ruler
from kdistill.shrinking.result import files_of_seeds, with_settings
from kdistill.shrinking.search import Search, ranked
from kdistill.shrinking.space import FAMILIES, Candidate

TEACHER, PROFILE = "shipped:mnist_cnn", "npu"


def student_epochs(result: dict) -> int:
    """The epochs that the search has spent on all students before the winner's run."""
    rounds, ways = result["rounds"], result["methods"]
    spent, before = 0, None
    for one in rounds:
        spent += 0 if one["epochs"] == before else one["epochs"] * len(one["students"])
        before = one["epochs"]
    return spent + ways["epochs"] * (len(ways["students"]) - 1)


def random_students(folder: Path, count: int, seed: int) -> list[Candidate]:
    """Students of random shapes and widths, up to the widest of each shape that fits."""
    rows = read_json(folder / "fit.json", {"candidates": [dict]})["candidates"]
    rows = [row for row in rows if row["family"] in FAMILIES]
    random = np.random.default_rng(seed)
    students = {}
    while len(students) < count:
        row = rows[random.integers(len(rows))]
        width = int(random.integers(1, row["width"] + 1))
        student = Candidate(FAMILIES[row["family"]], width, row["depth"], row["reduce"])
        students[student.name] = student
    return list(students.values())


def best_of_random(result: dict, folder: Path, data_dir: Path, seed: int) -> dict:
    """The best of as many random students on validation, trained and measured as the winner of the search was."""
    recipe = load_recipe(str(folder / "recipe.py"))
    splits = load(recipe.data, data_dir)
    students = random_students(folder, len(result["candidates"]), seed)
    epochs = max(1, round(student_epochs(result) / len(students)))
    with RunFolder(folder / "random") as place:
        place.settle(recipe, splits.fingerprint, False, print)
        arms = Arms(recipe, splits, place, print)
        arms.fit_teacher()
        search = Search(arms, str(folder / "cache"))
        scores = search.train("random", {one.name: (one.network, recipe.distill) for one in students}, epochs)
        best = next(one for one in students if one.name == ranked(scores)[0])
        final = with_settings(recipe, splits, best, recipe.distill, recipe.training.epochs)
        report = kdistill.run(final, folder / "random-run", data_dir=data_dir, cache=str(folder / "cache"))
        profile = load_profile(recipe.exports[0])
        ruler = Ruler(dataclasses.replace(recipe, student=best.network), splits, profile, read_budget(result["budget"]))
        files = files_of_seeds(search, report, final, profile)
    return {"best": best.name, "epochs": epochs, "costs": ruler.measure(best), "scores": scores, "files": files}


def mean(files: list[dict]) -> float:
    return float(np.mean([file["accuracy"] for file in files if file["accuracy"] is not None]))


def main() -> None:
    parser = arguments(__doc__, repeats=None)
    parser.add_argument("--data-dir", type=Path, help="all of MNIST; default: the sample")
    parser.add_argument("--max-bytes", nargs="+", default=["16kB", "8kB"])
    parser.add_argument("--hours", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--random", action="store_true", help="also train as many random students")
    options = parser.parse_args()
    for size in options.max_bytes:
        folder = options.out / f"shrink-{size}"
        budget = {"max_bytes": size, "hours": options.hours}
        data = Data("mnist", shift=2)
        result = kdistill.shrink(
            TEACHER, data, PROFILE, budget, data_dir=options.data_dir, out=folder, seeds=options.seeds
        )
        lines = [f"{size}: {result['winner']}, {result['file']['bytes']:,} bytes, int8 {mean(result['files']):.2%}"]
        record = {"shrink": result}
        if options.random:
            record["random"] = best_of_random(result, folder, options.data_dir, seed=1)
            lines.append(
                f"best of random students: {record['random']['best']}, int8 {mean(record['random']['files']):.2%}"
            )
        write_text(options.out / f"shrink-{size}.json", json.dumps(record, indent=1) + "\n")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
