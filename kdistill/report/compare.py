"""Several finished runs side by side: a table, what differs between them, and one page. Standard library only."""

import json
from collections.abc import Sequence
from pathlib import Path

from kdistill.errors import InputError
from kdistill.report import markdown, page, svg
from kdistill.report.html import cards, document, figure, table
from kdistill.report.svg import Series

KINDS = "abcdef"
NEEDED = ("recipe", "models", "data", "training", "command")
Runs = Sequence[tuple[str, dict]]  # name and report


def load(path: Path) -> dict:
    """The report of a run folder. Raises `InputError` where there is none that can be read."""
    file = path if path.is_file() else path / "report.json"
    if not file.is_file():
        sweep = (path / "sweep.json").is_file()
        why = "it is a sweep's: open its sweep.html" if sweep else "has its run ended?"
        raise InputError(f"There is no report.json in '{path}' ({why}). Give folders of finished runs.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"'{file}' is no JSON: {error}. Write it anew: kdistill run --resume --out FOLDER.") from None
    lacking = [key for key in NEEDED if key not in found] if isinstance(found, dict) else list(NEEDED)
    if lacking:
        raise InputError(f"'{file}' is no report of a run: it lacks {', '.join(lacking)}.")
    return found


def named(paths: Sequence[Path]) -> list[tuple[str, dict]]:
    """The reports by the names of their folders, with as much of the path as tells them apart."""
    folders = [(path.parent if path.is_file() else path).resolve() for path in paths]
    if len(set(folders)) < len(folders):
        raise InputError("The same run is given twice.")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return [(name, load(path)) for name, path in zip(names, paths, strict=True)]


def rows(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, one row a run; bytes and µs are those of the smallest and of the fastest file."""
    titles = ["run", "verdict", "student %", "control %", "points", "95 % interval", "seeds", "teacher %"]
    titles += ["bytes", "µs"]
    cells = []
    for name, found in runs:
        models = {row["name"]: row for row in found["models"]}
        verdict = found.get("verdict")
        files = [row for row in found["models"] if row.get("bytes")]
        cells.append([name, *_verdict(verdict), _percent(models.get("teacher", {}).get("accuracy"))])
        cells[-1].append(_least("{:,}", [row["bytes"] for row in files]))
        cells[-1].append(_least("{:.3g}", [row.get("microseconds") for row in files]))
    return titles, cells


def _verdict(verdict: dict | None) -> list[str]:
    if not verdict:
        return ["–"] * 6
    student, control = (sum(verdict[arm]) / verdict["seeds"] for arm in ("student", "control"))
    low, high, mean = (f"{100 * verdict[name]:+.2f}" for name in ("low", "high", "difference"))
    unit = str(verdict["seeds"]) if verdict["unit"] == "seeds" else "1"
    return [verdict["word"], _percent(student), _percent(control), mean, f"{low} to {high}", unit]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _least(pattern: str, values: Sequence) -> str:
    known = [value for value in values if value is not None]
    return pattern.format(min(known)) if known else "–"


def differences(runs: Runs) -> dict[str, list]:
    """What is not the same in all runs, by name: settings, data, machine and versions; None: not there."""
    seen = []
    for _, found in runs:
        data = {f"the data's {key}": found["data"].get(key) for key in ("source", "fingerprint", "train", "test")}
        versions = {f"version of {name}": version for name, version in found.get("versions", {}).items()}
        seen.append({**page.flat(found["recipe"]), **data, "machine": found.get("machine"), **versions})
    keys = list(dict.fromkeys(key for each in seen for key in each))
    found = {key: [each.get(key) for each in seen] for key in keys}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def caveats(runs: Runs) -> list[str]:
    """Why numbers of these runs do not compare, in sentences."""
    data = {(found["data"].get("source"), found["data"].get("test")) for _, found in runs}
    machines = {found.get("machine") for _, found in runs}
    found = []
    if len(data) > 1:
        found.append("The runs were measured on different data: their accuracies do not compare.")
    if len(machines) > 1:
        found.append("The runs were measured on different machines: their times do not compare.")
    return found


def html(runs: Runs) -> str:
    """The page that compares runs."""
    top = "".join(f'<p class="caveat">{sentence}</p>' for sentence in caveats(runs))
    note = (
        "The verdict is each run's own: its student against its control, which had the same data, steps and start. "
        "Points are student minus control; bytes and µs are those of the smallest and of the fastest file."
    )
    names = [name for name, _ in runs]
    changed = [[key, *map(_shown, values)] for key, values in differences(runs).items()]
    settings = table(["", *names], changed, "What differs") if changed else "<p>Nothing: all settings are the same.</p>"
    titles, models = markdown.table([])[0], []
    for name, found in runs:
        models += [[f"{name} {cells[0]}", *cells[1:]] for cells in markdown.table(found["models"])[1]]
    commands = [[name, found["command"]] for name, found in runs]
    sections = [
        ("runs", "Runs", top + table(*rows(runs), "Runs") + f'<p class="note">{note}</p>'),
        ("settings", "What differs", settings),
        ("costs", "Accuracy against cost", page.costs(runs)),
        ("training", "Training of the students", cards([_curve(runs, *each) for each in page.CURVES])),
        ("models", "All models and files", table(titles, models, "All models and files")),
        ("commands", "Commands", table(["run", "command"], commands, "Commands")),
    ]
    return document(f"{len(runs)} runs", f"<h1>{len(runs)} runs <small>side by side</small></h1>", "", sections)


def _shown(value: object) -> str:
    return "–" if value is None else str(value)


def _curve(runs: Runs, title: str, metric: str, as_error: bool, y_label: str, caption: str) -> str:
    series = []
    for place, (name, found) in enumerate(runs):
        values = found["training"].get("student", {}).get("history", {}).get(metric)
        if values:
            points = list(enumerate((1 - value if as_error else value for value in values), 1))
            series.append(Series(name, KINDS[place % len(KINDS)], points))
    show = page.percent if as_error else svg.number
    chart = svg.lines(f"{title} by epoch", series, "epoch", f"{y_label}, log scale", log=True, show=show)
    return figure(title, chart, caption, [(s.name, s.kind) for s in series])


def as_dict(runs: Runs) -> dict:
    """The comparison for machines: of each run verdict, models and command; and what differs."""
    short = [
        {"name": name, **{key: found.get(key) for key in ("verdict", "models", "command")}} for name, found in runs
    ]
    return {"runs": short, "differences": differences(runs), "caveats": caveats(runs)}
