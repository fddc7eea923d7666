"""What compression costs and saves: every scheme, with the teacher kept on and on labels alone, over seeds.

    python benchmarks/compression.py --out runs/compression [--data-dir FOLDER] [--seeds 3] [--scheme S ...]
    python benchmarks/compression.py --out runs/few --variant few_labels --seeds 5 --scheme int8 qat [--data-dir FOLDER]

Trains the teacher and, for each seed, the distilled student of the recipe `mnist` (a folder of `kdistill run` of the
same recipe will do: what is finished in it is used). Then compresses each student by each scheme, twice in the same
budget: with the teacher kept on, and on labels alone. Prints for each the test accuracy of the Keras 3 model and of
its int8 `.tflite`, and that file's bytes, raw and deflated; means over the seeds, and a paired test of the teacher's
worth. Schemes without quantization get their int8 file by quantization after the training. Writes `compression.json`
(rows by seed) and `compression.png` (accuracy against deflated bytes); rows that are there are not measured again.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np

from kdistill import files, provenance
from kdistill.compression.compress import compress
from kdistill.conversion import convert, float32
from kdistill.data import load
from kdistill.data.few_labels import for_control, for_student
from kdistill.evaluation import verdict
from kdistill.evaluation.evaluate import predict
from kdistill.files import byte_sizes
from kdistill.recipe import SCHEMES, Profile, Stage
from kdistill.recipe.loading import load_recipe
from kdistill.recipe.objective import at_the_end
from kdistill.runs.arms import Arms
from kdistill.runs.folder import RunFolder
from kdistill.tflite.interpreter import File

INT8 = Profile("int8", quantization="int8")
FLOAT32 = Profile("reference")


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The share of right classes."""
    return float(np.mean(outputs.argmax(axis=-1) == labels))


def trained(arms: Arms, seed: int):
    """The recipe's student of this seed, kept in the run's folder with its teacher."""
    arms.fit_teacher()
    return arms.fit_student(seed - arms.recipe.seed, cache="off")


def of_file(content: bytes, examples) -> dict:
    """Test accuracy of a `.tflite`, and its sizes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.tflite")
        path.write_bytes(content)
        return {"tflite": accuracy(File(path).predict(examples.images), examples.labels), **byte_sizes(content)}


def measured(arms: Arms, student, scheme: str, seed: int, kept_on: bool, options) -> dict:
    """One row: a scheme, a seed, with or without the teacher."""
    splits, recipe = arms.splits, arms.recipe
    steps = SCHEMES[scheme]
    stage = Stage(
        scheme,
        options.epochs,
        learning_rate=options.learning_rate,
        final_sparsity=options.sparsity if "prune" in steps else None,
        clusters=options.clusters if "cluster" in steps else None,
    )
    result = compress(
        student,
        stage,
        arms.models["teacher"] if kept_on and steps else None,
        for_student(splits) if kept_on else for_control(splits),
        augment=recipe.data,
        keep=arms.folder.path / "steps" / f"{seed}-{'teacher' if kept_on else 'labels'}",
        seed=seed,
        **(at_the_end(recipe.distill) if kept_on and steps else {}),
    )
    content = result.tflite() if result.quantized else convert.convert(result.model, INT8, splits.train.images[:500])
    row = {"model": accuracy(predict(result.model, splits.test.images), splits.test.labels)}
    if steps:
        row |= {"validation": result.history[steps[-1]]["val_accuracy"][-1]}
    row |= of_file(content, splits.test)
    kept = result.check_file(content)
    floats = convert.convert(result.model, FLOAT32)
    kept_in_float = result.check_file(floats)
    row |= {"float32_deflated": byte_sizes(floats)["deflated"], "kept": kept, "kept_in_float32": kept_in_float}
    return {"scheme": scheme, "seed": seed, "teacher": kept_on, **row, "table": result.layers}


def summary(rows: list[dict], before: list[dict], images: int) -> str:
    """The table over all seeds, as Markdown."""

    def mean(values) -> str:
        values = [100 * value for value in values]
        return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")

    titles = ["scheme", "model %, teacher kept on", "model %, labels alone", "int8 file %, teacher kept on"]
    titles += ["int8 file %, labels alone", "teacher minus labels, points (95 % interval)", "bytes", "deflated"]
    titles += ["float32 deflated / this"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    base = statistics.mean(each["deflated"] for each in before)
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        arms = {on: [r for r in rows if r["scheme"] == scheme and r["teacher"] == on] for on in (True, False)}
        cells = [mean(row[key] for row in arms[on]) if arms[on] else "–" for key in ("model", "tflite") for on in arms]
        gain = "–"
        if all(arms.values()) and len(arms[True]) > 1:
            judged = verdict.judge([r["tflite"] for r in arms[True]], [r["tflite"] for r in arms[False]], images)
            gain = f"{100 * judged['difference']:+.2f} ({100 * judged['low']:+.2f} to {100 * judged['high']:+.2f})"
        small = arms[True] or arms[False]
        raw, deflated = (statistics.mean(row[key] for row in small) for key in ("bytes", "deflated"))
        cells += [gain, f"{raw:,.0f}", f"{deflated:,.0f}", f"{base / deflated:.1f}"]
        lines.append(f"| `{scheme}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(rows: list[dict], before: list[dict], path: Path) -> None:
    """Accuracy of the int8 files against their deflated bytes, means over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for on, marker, label in ((True, "o", "teacher kept on"), (False, "x", "labels alone")):
        points = {}
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            selected = [row for row in rows if row["scheme"] == scheme and row["teacher"] == on]
            if selected:
                points[scheme] = [statistics.mean(row[key] for row in selected) for key in ("deflated", "tflite")]
        axes.plot(*zip(*[(x, 100 * y) for x, y in points.values()], strict=True), marker, label=label)
        for scheme, (x, y) in points.items() if on else ():
            axes.annotate(scheme, (x, 100 * y), xytext=(4, 4), textcoords="offset points", fontsize=8)
    x, y = (statistics.mean(each[key] for each in before) for key in ("deflated", "tflite"))
    axes.plot([x], [100 * y], "s", label="float32, before")
    axes.set_xlabel("bytes of the file, deflated")
    axes.set_ylabel("test accuracy, %")
    axes.set_xscale("log")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Trains what is missing, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the run's folder; a new one, or one to continue")
    parser.add_argument("--variant", default="default", help="of the recipe mnist")
    parser.add_argument("--set", action="append", default=[], help="key=value, as for `kdistill run`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--data-dir")
    parser.add_argument("--scheme", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--epochs", type=int, default=1, help="of each step of a scheme")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--sparsity", type=float, default=0.6)
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--force", action="store_true", help="go on with a folder of another recipe")
    options = parser.parse_args()
    recipe = load_recipe("mnist", options.variant, [*options.set, f"seeds={options.seeds}"])
    splits = load(recipe.data, options.data_dir)
    folder = RunFolder(options.out, resume=(options.out / "recipe.json").exists())
    folder.settle(recipe, splits.fingerprint, options.force, print)
    arms = Arms(recipe, splits, folder, print)
    test, path = splits.test, options.out / "compression.json"
    stored = json.loads(path.read_text()) if path.exists() else {"before": [], "rows": [], **provenance.of_run()}
    settings = [options.epochs, options.learning_rate, options.sparsity, options.clusters]
    for seed in range(options.seeds):
        student = trained(arms, seed)
        if len(stored["before"]) == seed:
            row = of_file(convert.convert(float32.prepare(student).model, FLOAT32), test)
            stored["before"].append({"seed": seed, "parameters": student.count_params(), **row})
        for scheme in options.scheme:
            for kept_on in (True, False) if SCHEMES[scheme] else (False,):
                key = [scheme, seed, kept_on, *settings]
                if any(row["key"] == key for row in stored["rows"]):
                    continue
                stored["rows"].append({"key": key, **measured(arms, student, scheme, seed, kept_on, options)})
                files.write_text(path, json.dumps(stored) + "\n")
    rows = [row for row in stored["rows"] if row["key"][3:] == settings and row["scheme"] in options.scheme]
    rows.sort(key=lambda row: (options.scheme.index(row["scheme"]), row["seed"]))
    teacher = accuracy(predict(arms.models["teacher"], test.images), test.labels)
    print(f"{splits.source}; teacher {teacher:.2%}; student before, float32:")
    for each in stored["before"]:
        print(f"  seed {each['seed']}: {each['tflite']:.2%}, {each['bytes']:,} bytes, {each['deflated']:,} deflated")
    print(summary(rows, stored["before"], len(test)))
    picture(rows, stored["before"], options.out / "compression.png")


if __name__ == "__main__":
    main()
