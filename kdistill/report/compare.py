"""Several finished runs side by side: a table, the settings that differ, and one page."""

from collections.abc import Sequence
from pathlib import Path

from kdistill import files
from kdistill.errors import InputError
from kdistill.report import markdown, page
from kdistill.report.content import check_report
from kdistill.report.html import NOTHING, document, note, part, table
from kdistill.report.svg import KINDS
from kdistill.schema import Mismatch

REQUIRED = ("recipe", "models", "data", "training", "command")
Runs = Sequence[tuple[str, dict]]  # name and report


def load_report(path: Path) -> dict:
    """The report of a run folder. Raises `InputError` if there is none or it is damaged."""
    file = path if path.is_file() else files.inside(path, "report.json")
    if not file.is_file():
        is_sweep = (path / "sweep.json").is_file()
        reason = "This is the folder of a sweep: open its sweep.html." if is_sweep else "Has the run finished?"
        raise InputError(f"There is no report.json in '{path}'. {reason} Expected folders of finished runs.")
    advice = "Write it again with: kdistill run --resume --out FOLDER."
    report = files.read_json(file, advice=advice)
    missing = [key for key in REQUIRED if key not in report] if isinstance(report, dict) else list(REQUIRED)
    if missing:
        raise InputError(f"'{file}' is not the report of a run: it lacks {', '.join(missing)}.")
    try:
        check_report(report)
    except Mismatch as error:
        raise InputError(f"'{file}' is damaged: {error}. {advice}") from None
    check_models(file.parent)
    return report


def check_models(folder: Path) -> None:
    """Compares the models of finished stages with the SHA-256 in their records, as `--resume` does.

    Models that are not there, and records of earlier versions, which have no SHA-256, are no error. Raises `InputError`
    for a model that is damaged or was replaced: the report is not about it.
    """
    checkpoints = folder / "checkpoints"
    stages = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else []
    for stage in stages:
        record = files.inside(folder, f"checkpoints/{stage}/finished.json")
        model = files.inside(folder, f"{stage}.keras")
        if not (record.is_file() and model.is_file()):
            continue
        advice = f"Delete '{record.parent}' and continue the run with --resume, which trains the stage again."
        content = files.read_json(record, {"sha256?": str}, advice)
        if content.get("sha256") not in (None, files.sha256(model)):
            raise InputError(
                f"'{files.shown_path(folder / model.name)}' is not the model with which the stage "
                f"'{files.shown_path(stage)}' ended (another SHA-256): it is damaged, or was replaced, and the report "
                "is about another one. Put the file back, or delete "
                f"'{files.shown_path(record.parent)}' and continue the run with --resume."
            )


def load_runs(paths: Sequence[Path]) -> list[tuple[str, dict]]:
    """The reports by the names of their folders, with as much of the path as makes the names unique."""
    folders = [(path.parent if path.is_file() else path).resolve() for path in paths]
    repeated = {str(folder) for folder in folders if folders.count(folder) > 1}
    if repeated:
        raise InputError(f"Expected different runs, received '{min(repeated)}' twice.")
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return [(name, load_report(path)) for name, path in zip(names, paths, strict=True)]


def run_table(runs: Runs) -> tuple[list[str], list[list[str]]]:
    """Titles and rows, one per run; bytes and µs are those of the smallest and of the fastest file."""
    titles = ["run", "verdict", "student %", "control %", "points", "interval", "seeds", "teacher %"]
    titles += ["bytes", "µs"]
    rows = []
    for name, report in runs:
        models = {row["name"]: row for row in report["models"]}
        exported = [row for row in report["models"] if row.get("bytes")]
        teacher = _percent(models.get("teacher", {}).get("accuracy"))
        sizes = _least("{:,}", [row["bytes"] for row in exported])
        times = _least("{:.3g}", [row.get("microseconds") for row in exported])
        rows.append([name, *_verdict_cells(report.get("verdict")), teacher, sizes, times])
    return titles, rows


def _verdict_cells(verdict: dict | None) -> list[str]:
    if not verdict:
        return ["–"] * 6
    student, control = (sum(verdict[name]) / verdict["seeds"] for name in ("student", "control"))
    low, high, mean = (f"{100 * verdict[name]:+.2f}" for name in ("low", "high", "difference"))
    return [
        verdict.get("headline", verdict["word"]),
        _percent(student),
        _percent(control),
        mean,
        f"{low} to {high}",
        str(verdict["seeds"]),
    ]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def _least(pattern: str, values: Sequence) -> str:
    numbers = [value for value in values if value is not None]
    return pattern.format(min(numbers)) if numbers else "–"


def differences(runs: Runs) -> dict[str, list]:
    """What differs between the runs, by name: settings, data, machine and versions; None where a run has no value."""
    settings = []
    for _, report in runs:
        data = {f"the data's {key}": report["data"].get(key) for key in ("source", "fingerprint", "train", "test")}
        versions = {f"version of {name}": version for name, version in report.get("versions", {}).items()}
        settings.append({**page.flatten(report["recipe"]), **data, "machine": report.get("machine"), **versions})
    keys = dict.fromkeys(key for of_run in settings for key in of_run)
    values_by_key = {key: [of_run.get(key) for of_run in settings] for key in keys}
    return {key: values for key, values in values_by_key.items() if any(value != values[0] for value in values)}


def caveats(runs: Runs) -> list[str]:
    """Why numbers of these runs do not compare, in sentences."""
    data = {(report["data"].get("source"), report["data"].get("test")) for _, report in runs}
    machines = {report.get("machine") for _, report in runs}
    sentences = []
    if len(data) > 1:
        sentences.append("The runs were measured on different data: their accuracies do not compare.")
    if len(machines) > 1:
        sentences.append("The runs were measured on different machines: their times do not compare.")
    return sentences


def render(runs: Runs) -> str:
    """The page that compares runs."""
    text = (
        "Each verdict compares the run's own student with its control, which had the same data, steps and initial "
        "weights. Points are student minus control; bytes and µs are those of the smallest and of the fastest file."
    )
    names = [name for name, _ in runs]
    rows = [
        [key, *("–" if value is None else str(value) for value in values)] for key, values in differences(runs).items()
    ]
    settings = table(["", *names], rows, "What differs") if rows else part("paragraph", "All settings are the same.")
    models = [{**row, "name": f"{name} {row['name']}"} for name, report in runs for row in report["models"]]
    histories = [
        (name, KINDS[place % len(KINDS)], report["training"].get("student", {}).get("history", {}))
        for place, (name, report) in enumerate(runs)
    ]
    commands = [[name, report["command"]] for name, report in runs]
    sections = [
        ("runs", "Runs", part("caveats", caveats(runs)) + table(*run_table(runs), "Runs") + note(text)),
        ("settings", "What differs", settings),
        ("costs", "Accuracy against cost", page.cost_charts(runs)),
        ("training", "Training of the students", page.curve_cards(histories)),
        ("models", "All models and files", table(*markdown.model_table(models), "All models and files")),
        ("commands", "Commands", table(["run", "command"], commands, "Commands")),
    ]
    return document(f"{len(runs)} runs", "side by side", NOTHING, sections, title=f"{len(runs)} runs")


def as_dict(runs: Runs) -> dict:
    """The comparison as JSON: verdict, models and command of each run, and what differs."""
    keys = ("verdict", "models", "command")
    summaries = [{"name": name, **{key: report.get(key) for key in keys}} for name, report in runs]
    return {"runs": summaries, "differences": differences(runs), "caveats": caveats(runs)}
