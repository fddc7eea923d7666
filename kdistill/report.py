"""A run's results, plain dicts, as `report.json`, `report.md` and lines for the screen. Standard library only."""

import json
import os
from pathlib import Path

COLUMNS = (
    ("model", "name", "{}"),
    ("accuracy %", "accuracy", "{:.2%}"),
    ("top-5 %", "top5", "{:.2%}"),
    ("agreement %", "agreement", "{:.2%}"),
    ("KL to teacher", "kl", "{:.4f}"),
    ("ECE %", "ece", "{:.2%}"),
    ("parameters", "parameters", "{:,}"),
    ("bytes", "bytes", "{:,}"),
    ("µs/image", "microseconds", "{:.0f}"),
)


def write(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """The headings and cells of the table of models and files; what a row does not have is a dash."""

    def cell(row: dict, name: str, pattern: str) -> str:
        value = row.get(name)
        return "–" if value is None else pattern.format(value).removesuffix("%")

    return [title for title, _, _ in COLUMNS], [[cell(row, key, p) for _, key, p in COLUMNS] for row in rows]


def markdown(report: dict) -> str:
    """The report as Markdown."""
    titles, cells = table(report["models"])
    gain = verdict(report["models"])
    lines = [
        f"# {report['recipe']['name']} ({report['recipe']['variant']})",
        "",
        gain,
        "",
        "| " + " | ".join(titles) + " |",
        "|---" + "|---:" * (len(titles) - 1) + "|",
        *("| " + " | ".join(row) + " |" for row in cells),
        "",
        "The control is the same student, trained on labels alone: same data, order, steps and seed. Accuracy is on "
        f"{report['data']['test']:,} test images. Agreement and KL are with the teacher, ECE is the expected "
        "calibration error (15 bins), µs/image the median of single images on one CPU thread.",
        "",
        f"- Command: `{report['command']}`",
        f"- Data: {report['data']['source']}; fingerprint {report['data']['fingerprint']}; "
        f"{report['data']['train']:,} training, {report['data']['validation']:,} validation images",
        f"- Seed: {report['recipe']['seed']}; precision {report['recipe']['precision']}",
        "- Training: " + ", ".join(f"{name} {fit['seconds']:.0f} s" for name, fit in report["training"].items()),
        f"- Machine: {report['machine']}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in report['versions'].items())}",
        f"- Commit: {report['commit'] or 'not known'}",
        "",
    ]
    return "\n".join(lines)


def verdict(rows: list[dict]) -> str:
    """Student against control in a sentence. One seed is an observation, no proof, and the sentence says so."""
    accuracy = {row["name"]: row["accuracy"] for row in rows}
    gain = 100 * (accuracy["student"] - accuracy["control"])
    return (
        f"Distilled {accuracy['student']:.2%}, control {accuracy['control']:.2%}: {gain:+.2f} points with one seed, "
        "which proves nothing by itself."
    )


def save(report: dict, folder: Path) -> None:
    """Writes `report.json` and `report.md` into the run folder."""
    write(folder / "report.json", json.dumps(report, indent=1) + "\n")
    write(folder / "report.md", markdown(report))
