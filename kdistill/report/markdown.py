"""A run's results, plain dicts, as `report.json`, `report.md` and tables for the screen. Standard library only."""

import json
from collections.abc import Callable, Collection
from pathlib import Path

from kdistill.files import write_text

COLUMNS = (
    ("model", "name", "{}"),
    ("accuracy %", "accuracy", "{:.2%}"),
    ("mIoU %", "mean_iou", "{:.2%}"),
    ("AUC %", "auc", "{:.2%}"),
    ("F1 %", "f1", "{:.2%}"),
    ("MSE", "mse", "{:.4g}"),
    ("MAE", "mae", "{:.4g}"),
    ("top-5 %", "top5", "{:.2%}"),
    ("agreement %", "agreement", "{:.2%}"),
    ("KL to teacher", "kl", "{:.4f}"),
    ("ECE %", "ece", "{:.2%}"),
    ("parameters", "parameters", "{:,}"),
    ("bytes", "bytes", "{:,}"),
    ("deflated", "deflated", "{:,}"),
    ("µs/image", "microseconds", "{:.0f}"),
)
COSTS = ("parameters", "bytes", "deflated", "microseconds")  # of the model, not of an output
BY_MEANING = ("top5", "mean_iou", "auc", "f1", "mse", "mae", "kl", "ece")  # which not every kind of labels has
Table = tuple[list[str], list[list[str]]]  # titles, and rows of cells
ATTEMPT_TITLES = ["file", "attempt", "bytes", "µs/image", "agreement %", "accuracy %", "result"]
ATTEMPT_NOTE = (
    "Where a file loses too much, repair makes it in other ways, one after the other, until it holds its limits. What "
    "an attempt chooses, it chooses on training examples; each is checked once on the test examples."
)


def model_table(models: list[dict]) -> Table:
    """The table of models and files; a dash stands for a value that a row does not have.

    Metrics that no row has are left out, such as those of other kinds of labels.
    """
    unused = {key for key in BY_MEANING if all(row.get(key) is None for row in models)}
    if "mse" not in unused and all(row.get("accuracy") is None for row in models):
        unused.add("accuracy")
    columns = [column for column in COLUMNS if column[1] not in unused]

    def cell(row: dict, key: str, pattern: str) -> str:
        value = row.get(key)
        if key == "name" and row.get("refused"):
            return f"{value} (refused)"
        return "–" if value is None else pattern.format(value).removesuffix("%")

    return [title for title, _, _ in columns], [[cell(row, key, p) for _, key, p in columns] for row in models]


def output_table(models: list[dict]) -> Table:
    """The table of the metrics of each output, for models with several; without rows for others."""
    rows = [
        {"name": f"{row['name']}, {name}", **metrics}
        for row in models
        for name, metrics in row.get("outputs", {}).items()
    ]
    titles, cells = model_table(rows)
    costs = [title for title, key, _ in COLUMNS if key in COSTS]
    kept = [place for place, title in enumerate(titles) if title not in costs]
    return [titles[place] for place in kept], [[row[place] for place in kept] for row in cells]


def refused_model(refused: dict) -> dict:
    """The row of `models` for a file that is not written. `refused`: its row of `refused`."""
    return {"name": refused["name"], "refused": True, "accuracy": (refused.get("check") or {}).get("accuracy")}


def refusals(report: dict) -> list[str]:
    """The files that are not written, why, and what to try, in sentences."""
    return [f"{row['name']}: {row['reason']} {row['advice']}".rstrip() for row in report.get("refused") or ()]


def file_notes(report: dict) -> list[str]:
    """What so many test images can show about the files, and which limits chance has exceeded, in sentences."""
    checks = {file.get("path", "a file"): file["check"] for file in report.get("files") or () if file.get("check")}
    checks |= {row["name"]: row["check"] for row in report.get("refused") or () if row.get("check")}
    names: dict[str, list[str]] = {}
    for name, check in checks.items():
        if check.get("resolution"):  # a report of an earlier version has none
            limits = f"Limits of {100 * check['max_drop']:g} points and {100 * check['min_agreement']:g} % agreement"
            names.setdefault(f"{limits}: {check['resolution']}", []).append(name)
    notes = [f"{sentence} ({', '.join(of)})" for sentence, of in names.items()]
    return notes + [f"{name}: {check['note']}" for name, check in checks.items() if check.get("note")]


def attempt_table(report: dict) -> Table:
    """The table of what repair has tried for each file; without rows where nothing was repaired."""
    of_files = [
        (row.get("profile") or row.get("name") or "a file", row.get("attempts") or ())
        for row in [*(report.get("files") or ()), *(report.get("refused") or ())]
    ]
    return ATTEMPT_TITLES, [[name, *attempt_cells(row)] for name, attempts in of_files for row in attempts]


def attempt_cells(row: dict) -> list[str]:
    """The cells of an attempt, without the name of its file."""
    ends = "skipped" if row["skipped"] else "holds its limits" if row["holds"] else "refused"
    return [
        row["action"],
        "–" if row["bytes"] is None else f"{row['bytes']:,}",
        "–" if row["microseconds"] is None else f"{row['microseconds']:.0f}",
        "–" if row["agreement"] is None else f"{100 * row['agreement']:.2f}",
        "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f}",
        f"{ends}: {row['reason']}" if row["reason"] else ends,
    ]


def layer_table(layers: list[dict]) -> Table:
    """The table of what compression has done to each layer."""
    steps = ["pruned", "clustered", "quantized"]
    cells = [
        [
            *(layer["layer"], layer["kind"], f"{layer['parameters']:,}"),
            "–" if layer["sparsity"] is None else f"{100 * layer['sparsity']:.0f}",
            str(layer.get("clusters") or "–"),
            *(layer.get(step, "–") for step in steps),
        ]
        for layer in layers
    ]
    return ["layer", "kind", "parameters", "zero %", "values", *steps], cells


def seed_table(report: dict) -> Table:
    """The table of accuracies by seed; without rows if there is one seed."""
    verdict, first = report.get("verdict") or {}, report["recipe"].get("seed", 0)
    titles = ["seed", "control %", "student %", "difference"]
    if verdict.get("seeds", 1) == 1:
        return titles, []
    pairs = enumerate(zip(verdict["control"], verdict["student"], strict=True), first)
    if metric := verdict.get("metric"):
        titles = ["seed", f"control, {metric}", f"student, {metric}", "difference"]
        return titles, [[str(seed), f"{c:.4g}", f"{s:.4g}", f"{s - c:+.3g}"] for seed, (c, s) in pairs]
    return titles, [[str(seed), f"{100 * c:.2f}", f"{100 * s:.2f}", f"{100 * (s - c):+.2f}"] for seed, (c, s) in pairs]


def markdown_table(table: Table, left: Collection[int] = (0,)) -> list[str]:
    """The lines of a table; the columns `left` are left-aligned, all others right-aligned."""
    titles, rows = table
    rule = "".join("|---" if i in left else "|---:" for i in range(len(titles))) + "|"
    return ["| " + " | ".join(titles) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def to_markdown(report: dict) -> str:
    """The report as Markdown."""
    lines = [
        f"# {report['recipe']['name']} ({report['recipe']['variant']})",
        "",
        report["verdict"]["sentence"],
        "",
        *((advantage(report), "") if advantage(report) else ()),
        *(line for warning in warnings(report) for line in (f"**Warning**: {warning}", "")),
        *markdown_table(model_table(report["models"])),
        "",
        f"{control_description(report)} {metrics_description(report)} µs/image is the median time of one "
        f"{example_of(report)}, for files on one CPU thread.",
        "",
        *_outputs(report),
        *_seeds(report),
        *_files(report),
        *_compressions(report),
        *_calibration(report),
        f"- Command: `{report['command']}`",
        f"- Data: {report['data']['source']}; fingerprint {report['data']['fingerprint']}; "
        f"{report['data']['train']:,} training, {report['data']['validation']:,} validation images"
        + (f"; {report['data']['unlabeled']:,} training images have no label" if _unlabeled(report) else ""),
        *(f"- Teacher {teacher_line(row)}" for row in report.get("teachers") or ()),
        f"- Seed: {_seed_range(report)}; precision {report['recipe']['precision']}",
        "- Training: " + ", ".join(f"{name} {fit['seconds']:.0f} s" for name, fit in report["training"].items()),
        *provenance_lines(report),
        "",
    ]
    return "\n".join(lines)


def main_metric(report: dict) -> tuple[str, Callable[[dict], str]]:
    """The metric that the verdict compares: its name, and a function that shows that of a row of the table."""
    metric = (report.get("verdict") or {}).get("metric")
    if metric:
        return metric.upper(), lambda row: f"{row[metric]:.4g}" if row.get(metric) is not None else "–"
    return "Accuracy", lambda row: f"{row['accuracy']:.2%}" if row.get("accuracy") is not None else "–"


def example_of(report: dict) -> str:
    """What an example is called: image, or example."""
    return "image" if report["data"].get("head") is None else "example"


def metrics_description(report: dict) -> str:
    """What the metrics of the table of models are, in sentences."""
    rows = report["models"]

    def has(*keys: str) -> bool:
        return any(row.get(key) is not None for row in rows for key in keys)

    sentences = [f"Measured on {report['data']['test']:,} test {example_of(report)}s."]
    if has("mean_iou"):
        sentences.append(
            "Accuracy is the share of positions whose class is right; mIoU is the mean over classes of intersection "
            "over union."
        )
    elif has("auc", "f1"):
        sentences.append(
            "Accuracy is the share of labels on whose side of 0.5 the output is; AUC is the mean over labels of the "
            "area under the ROC curve, F1 that of all labels together."
        )
    elif has("mse"):
        sentences.append("MSE and MAE are the mean squared and the mean absolute error: less is better.")
    if has("mse", "mean_iou", "auc", "f1"):
        sentences.append(
            f"Agreement compares with the teacher{' (for numbers the correlation)' if has('mse') else ''}."
        )
    else:
        sentences.append("Agreement and KL compare with the teacher. ECE is the expected calibration error (15 bins).")
    return " ".join(sentences)


def _outputs(report: dict) -> list[str]:
    table = output_table(report["models"])
    if not table[1]:
        return []
    return ["The verdict compares the first output. Metrics of each:", "", *markdown_table(table), ""]


def advantage(report: dict) -> str:
    """What the teacher knows and the control does not, in words; reports of older versions do not say."""
    return (report.get("teacher_advantage") or {}).get("sentence", "")


def teacher_line(row: dict) -> str:
    """Name, format, file and fingerprint of a teacher that came from a file."""
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items())
    run_with = f"; run with {versions}" if versions else ""
    return f"'{row['name']}': {row['format']}, {row['file']}, fingerprint {row['fingerprint']}{run_with}"


def provenance_lines(report: dict) -> list[str]:
    """Machine, versions and commit of a run or sweep."""
    return [
        f"- Machine: {report['machine']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        f"- Commit: {report['commit'] or 'unknown'}",
    ]


def warnings(report: dict) -> list[str]:
    """What makes the numbers doubtful, such as a teacher near chance or unscaled inputs; without repetitions."""
    fits = [f"{name}: {fit['warning']}" for name, fit in report.get("training", {}).items() if fit.get("warning")]
    return list(dict.fromkeys([*(report.get("warnings") or ()), *fits]))


def _files(report: dict) -> list[str]:
    refused, notes = refusals(report), file_notes(report)
    lines = ["Refused, and not written:", "", *(f"- {sentence}" for sentence in refused), ""] if refused else []
    attempts = attempt_table(report)
    if attempts[1]:
        lines += ["Repair:", "", *markdown_table(attempts, left=(0, 1, 6)), "", ATTEMPT_NOTE, ""]
    return [*lines, *(line for note in notes for line in (note, ""))]


def _compressions(report: dict) -> list[str]:
    compressions = report.get("compressions") or {}
    if not compressions:
        return []
    lines = [
        "Compressions: `NAME` is the student compressed with the teacher, `NAME_labels` on labels alone with the same "
        "budget, `NAME.tflite` its file (int8 if the scheme quantizes, else float32). Zeros and clusters reduce the "
        "deflated bytes only.",
    ]
    for name, compression in compressions.items():
        lines += ["", f"`{name}`: " + " ".join([f"the scheme {compression['scheme']}.", *compression["notes"]]), ""]
        if compression["layers"]:  # none, if the compression failed
            lines += markdown_table(layer_table(compression["layers"]), left=(0, 1, 5, 6, 7))
    return [*lines, ""]


def _unlabeled(report: dict) -> bool:
    return report["data"].get("unlabeled", 0) > 0


def control_description(report: dict) -> str:
    """What the control is, in sentences."""
    control = "The control is the same student, trained on labels alone with the same"
    if not _unlabeled(report):
        return f"{control} data, order, steps and seed."
    teacher = "all labels" if report["recipe"]["data"]["teacher_labels"] == "all" else "the same labels"
    return (
        f"{control} steps, batch size and seed, on the {report['data']['labeled']:,} labeled images. The student also "
        f"learns from the teacher's outputs on {report['data']['unlabeled']:,} unlabeled images. The teacher is "
        f"trained on {teacher}."
    )


def _seed_range(report: dict) -> str:
    first = report["recipe"]["seed"]
    count = (report.get("verdict") or report["recipe"])["seeds"]  # a run may have added seeds
    return f"{first}" if count == 1 else f"{first} to {first + count - 1} (teacher: {first})"


def seed_note(report: dict) -> str:
    """Which seed the files belong to."""
    first = report["recipe"].get("seed", 0)
    return f"All files are of the first seed, {first}: choosing the best seed would flatter them."


def _seeds(report: dict) -> list[str]:
    titles, rows = seed_table(report)
    return [*markdown_table((titles, rows), left=()), "", seed_note(report), ""] if rows else []


def calibration_sentence(report: dict) -> str:
    """The teacher's calibration before and after temperature scaling; empty if the report has none."""
    scaling = report.get("diagnostics", {}).get("teacher", {}).get("scaling")
    if not scaling:
        return ""
    before, after = scaling["before"], scaling["after"]
    text = f"The teacher's calibration on the test images: ECE {before['ece']:.2%}, NLL {before['nll']:.4f}"
    if scaling["at_bound"]:
        count = report["data"]["validation"]
        return (
            f"{text}. No temperature can be fitted: the teacher makes too few mistakes on {count:,} validation images."
        )
    return (
        f"{text}; after temperature scaling (T = {scaling['temperature']:.3g}, fitted on the validation images) "
        f"ECE {after['ece']:.2%}, NLL {after['nll']:.4f}."
    )


def _calibration(report: dict) -> list[str]:
    sentence = calibration_sentence(report)
    return [sentence, ""] if sentence else []


def save(report: dict, folder: Path) -> None:
    """Writes `report.json` and `report.md` into the run folder."""
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "report.md", to_markdown(report))
