"""A run's results, plain dicts, as `report.json`, `report.md` and lines for the screen. Standard library only."""

import json
from pathlib import Path

from kdistill.files import write_text

COLUMNS = (
    ("model", "name", "{}"),
    ("accuracy %", "accuracy", "{:.2%}"),
    ("top-5 %", "top5", "{:.2%}"),
    ("agreement %", "agreement", "{:.2%}"),
    ("KL to teacher", "kl", "{:.4f}"),
    ("ECE %", "ece", "{:.2%}"),
    ("parameters", "parameters", "{:,}"),
    ("bytes", "bytes", "{:,}"),
    ("deflated", "deflated", "{:,}"),
    ("µs/image", "microseconds", "{:.0f}"),
)


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The headings and cells of the table of models and files; what a row does not have is a dash."""

    def cell(row: dict, name: str, pattern: str) -> str:
        value = row.get(name)
        return "–" if value is None else pattern.format(value).removesuffix("%")

    return [title for title, _, _ in COLUMNS], [[cell(row, key, p) for _, key, p in COLUMNS] for row in rows]


def markdown(report: dict) -> str:
    """The report as Markdown."""
    titles, cells = table(report["models"])
    lines = [
        f"# {report['recipe']['name']} ({report['recipe']['variant']})",
        "",
        report["verdict"]["sentence"],
        "",
        *(line for warning in warnings(report) for line in (f"**Warning**: {warning}", "")),
        "| " + " | ".join(titles) + " |",
        "|---" + "|---:" * (len(titles) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        f"The control is the same student, trained on labels alone: {same(report)}. Accuracy is on "
        f"{report['data']['test']:,} test images. Agreement and KL are with the teacher, ECE is the expected "
        "calibration error (15 bins), µs/image the median of single images on one CPU thread.",
        "",
        *_seeds(report),
        *_compressions(report),
        *_calibration(report),
        f"- Command: `{report['command']}`",
        f"- Data: {report['data']['source']}; fingerprint {report['data']['fingerprint']}; "
        f"{report['data']['train']:,} training, {report['data']['validation']:,} validation images"
        + (f"; {report['data']['unlabeled']:,} training images have no label" if _partly(report) else ""),
        f"- Seed: {_range(report)}; precision {report['recipe']['precision']}",
        "- Training: " + ", ".join(f"{name} {fit['seconds']:.0f} s" for name, fit in report["training"].items()),
        f"- Machine: {report['machine']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        f"- Commit: {report['commit'] or 'not known'}",
        "",
    ]
    return "\n".join(lines)


def warnings(report: dict) -> list[str]:
    """What makes the numbers doubtful: a teacher near chance, inputs that look unscaled. Sentences, each once."""
    fits = [f"{name}: {fit['warning']}" for name, fit in report.get("training", {}).items() if fit.get("warning")]
    return list(dict.fromkeys([*(report.get("warnings") or ()), *fits]))


def layers(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The headings and cells of a table of stages: what compression has done, layer by layer."""
    words = ["pruned", "clustered", "quantized"]
    cells = [
        [
            *(row["layer"], row["kind"], f"{row['parameters']:,}"),
            "–" if row["sparsity"] is None else f"{100 * row['sparsity']:.0f}",
            str(row.get("clusters") or "–"),
            *(row.get(word, "–") for word in words),
        ]
        for row in rows
    ]
    return ["layer", "kind", "parameters", "zero %", "values", *words], cells


def _compressions(report: dict) -> list[str]:
    """What each compression has done, layer by layer."""
    made = report.get("compressions") or {}
    if not made:
        return []
    lines = [
        "Compressions: `NAME` is the student compressed with the teacher kept on, `NAME_labels` on labels alone in the "
        "same budget, `NAME.tflite` its file: int8 where the scheme quantizes, else float32. Zeros and clusters show "
        "in the deflated bytes only.",
    ]
    for name, each in made.items():
        titles, cells = layers(each["stages"])
        lines += ["", f"`{name}`: " + " ".join([f"the scheme {each['scheme']}.", *each["notes"]]), ""]
        lines += ["| " + " | ".join(titles) + " |", "|---|---|---:|---:|---:|---|---|---|"]
        lines += ["| " + " | ".join(row) + " |" for row in cells]
    return [*lines, ""]


def _partly(report: dict) -> bool:
    return report["data"].get("unlabeled", 0) > 0


def same(report: dict) -> str:
    if not _partly(report):
        return "same data, order, steps and seed"
    teacher = "on all labels" if report["recipe"]["data"]["teacher_labels"] == "all" else "on the same labels"
    return (
        f"same steps, batch size and seed, every batch drawn from the {report['data']['labeled']:,} labeled images; "
        f"the student also learns from the teacher's outputs on {report['data']['unlabeled']:,} unlabeled ones. "
        f"The teacher is trained {teacher}"
    )


def _range(report: dict) -> str:
    first, count = report["recipe"]["seed"], report["recipe"]["seeds"]
    return f"{first}" if count == 1 else f"{first} to {first + count - 1} (teacher: {first})"


def _seeds(report: dict) -> list[str]:
    """Accuracy by seed, where there are several; the files are of the first, which no test accuracy has picked."""
    found, first = report["verdict"], report["recipe"]["seed"]
    if found["seeds"] == 1:
        return []
    rows = [
        f"| {first + place} | {100 * control:.2f} | {100 * student:.2f} | {100 * (student - control):+.2f} |"
        for place, (control, student) in enumerate(zip(found["control"], found["student"], strict=True))
    ]
    line = f"Files, if any, are of the student of seed {first}, the first: no test accuracy has picked it."
    return ["| seed | control % | student % | difference |", "|---:|---:|---:|---:|", *rows, "", line, ""]


def _calibration(report: dict) -> list[str]:
    scaling = report["diagnostics"].get("teacher", {}).get("scaling")
    if not scaling:
        return []
    before, after = scaling["before"], scaling["after"]
    if scaling["at_bound"]:
        return [
            f"The teacher's calibration on the test images: ECE {before['ece']:.2%}, NLL {before['nll']:.4f}. "
            f"No temperature can be fitted: the {report['data']['validation']:,} validation images show "
            "too few mistakes.",
            "",
        ]
    return [
        f"The teacher's calibration on the test images: ECE {before['ece']:.2%}, NLL {before['nll']:.4f}; after "
        f"temperature scaling (T = {scaling['temperature']:.3g}, fitted on validation) ECE {after['ece']:.2%}, "
        f"NLL {after['nll']:.4f}.",
        "",
    ]


def save(report: dict, folder: Path) -> None:
    """Writes `report.json` and `report.md` into the run folder."""
    write_text(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(folder / "report.md", markdown(report))
