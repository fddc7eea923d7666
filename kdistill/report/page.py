"""A run's report as one page, `report.html`, that needs no network and runs no script.

A pure function of `report.json` and the pictures beside it. The page has no section for what a report does not contain,
such as one of an earlier version or of a run without a control.
"""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from kdistill import files
from kdistill.errors import InputError
from kdistill.report import advice, examples, markdown, svg
from kdistill.report.html import NOTHING, cards, details, document, figure, note, part, table, values
from kdistill.report.svg import KINDS, Series
from kdistill.report.svg_parts import number, percent

TONES = {"BETTER": "better", "WORSE": "worse"}
MAX_CLASSES = 30  # of a confusion matrix; with more it is unreadable, and the page lists the most frequent mistakes
PNG = b"\x89PNG\r\n\x1a\n"  # its first bytes
PICTURE_BYTES = 1 << 20  # of a picture; those of a run have at most 96 pixels a side
LISTED = 20  # most frequent mistakes
CURVES = (  # title, metric, as an error?, y axis, caption
    ("Validation error", "val_accuracy", True, "error %", "The share of wrongly classified validation images."),
    ("Validation error", "val_mae", False, "mean absolute error", "Of the numbers of the validation examples."),
    ("Validation loss", "val_hard", False, "loss", "The loss on labels, without the student's other terms."),
    (
        "Training error",
        "accuracy",
        True,
        "error %",
        "The mean over an epoch, on augmented images if the recipe has any.",
    ),
    ("Distance to the teacher", "val_kd", False, "loss", "The student's distillation loss on the validation images."),
)


def save(report: dict, folder: Path) -> None:
    """Writes `report.json`, `report.md` and `report.html` into the run folder."""
    markdown.save(report, folder)
    files.write_text(folder / "report.html", render(report, read_pictures(report, folder)))


def read_pictures(report: dict, folder: Path) -> dict[str, bytes]:
    """The PNG files of a report by name, without those that are missing.

    Raises `InputError` for a picture that is not inside of the folder, or no PNG file.
    """
    pictures = {}
    sources = [report.get("differences") or {}, *report.get("examples", ())]
    for picture in (picture for source in sources for picture in source.get("pictures", ())):
        path = files.inside(folder, picture["file"])
        if path.is_file():
            content = files.read_bytes(path, PICTURE_BYTES)
            if not content.startswith(PNG):
                raise InputError(f"'{files.shown_path(path)}' is no PNG file. Delete it: the page lacks it then.")
            pictures[picture["file"]] = content
    return pictures


def render(report: dict, pictures: Mapping[str, bytes] | None = None) -> str:
    """The page of one run. `pictures`: PNG files by the names in the report."""
    sections = [
        ("models", "Models and files", _models(report)),
        ("training", "Training", _training(report)),
        ("costs", "Accuracy against cost", cost_charts([("", report)])),
        ("calibration", "Calibration", _calibration(report)),
        ("mistakes", "Mistakes", _mistakes(report)),
        ("differences", "Where student and teacher differ", _differences(report, pictures or {})),
        ("examples", "Test examples", examples.section(report, pictures or {})),
        ("files", "Files", _files(report)),
        ("compression", "Compression", _compressions(report)),
        ("origin", "Recipe and origin", origin(report)),
    ]
    refused = [f"Refused, and not written: {sentence}" for sentence in markdown.refusals(report)]
    warnings = part("caveats", [*(f"Warning: {warning}" for warning in markdown.warnings(report)), *refused])
    top = verdict_card(report, advice.hints(report)) + warnings + _tiles(report)
    return document(report["recipe"]["name"], report["recipe"]["variant"], top, sections, numbers="report.json")


def model_kind(name: str) -> str:
    """teacher, control or student, whatever the seed; other models and all files come from the student."""
    match = re.fullmatch(r"(teacher|control|student)(-\d+)?", name)
    return match[1] if match else "student"


def verdict_card(report: dict, hints: Sequence[str] = ()) -> Markup:
    """The verdict, first on the page: in plain words, with what to try next, and the statistics folded behind them."""
    verdict = report.get("verdict")
    if not verdict:
        return NOTHING
    metric = verdict.get("metric")
    unit = metric.upper() if metric else "in points"
    chart = Markup(svg.interval(f"Student minus control, {unit if metric else 'accuracy in points'}", verdict))
    tone = TONES.get(verdict["word"], "even")
    more = markdown.advantage(report)
    texts = [text for text in (verdict["sentence"], more) if text]
    return part("verdict", advice.headline(verdict), tone, texts, hints, chart, unit, template="run.html")


def _tiles(report: dict) -> Markup:
    """The key figures: accuracy, the smallest and the fastest file, parameters."""
    rows = {row["name"]: row for row in report["models"]}
    teacher, student = rows.get("teacher", {}), rows.get("student", {})
    files_ = [row for row in report["models"] if row.get("bytes")]
    timed = [row for row in files_ if row.get("microseconds")]
    tiles = []
    title, shown = markdown.main_metric(report)
    if student:
        others = [f"{name} {shown(rows[name])}" for name in ("control", "teacher") if name in rows]
        tiles.append((f"{title} of the student", shown(student), ", ".join(others)))
    if files_:
        least = min(files_, key=lambda row: row["bytes"])
        more = f"{least['name']}, {title if title.isupper() else title.lower()} {shown(least)}"
        tiles.append(("Smallest file, bytes", f"{least['bytes']:,}", more))
    if timed:
        fastest = min(timed, key=lambda row: row["microseconds"])
        more = f"{fastest['name']}, on one CPU thread of this machine"
        tiles.append(("Fastest file, µs per image", f"{fastest['microseconds']:.3g}", more))
    if student.get("parameters") and teacher.get("parameters"):
        ratio = teacher["parameters"] / student["parameters"]
        more = f"the teacher has {teacher['parameters']:,}: {ratio:.3g} times as many"
        tiles.append(("Parameters", f"{student['parameters']:,}", more))
    return part("tiles", tiles, template="run.html") if tiles else NOTHING


def _models(report: dict) -> Markup:
    test, head = report["data"]["test"], report["data"].get("head")
    resolution = f"One {markdown.example_of(report)} is {100 / test:.2g} points. " if head in (None, "classes") else ""
    text = (
        f"{markdown.metrics_description(report)} {resolution}{markdown.control_description(report)} Compare times "
        f"of files with files only: a file runs single {markdown.example_of(report)}s on one CPU thread, a Keras model "
        "runs on all threads with the overhead of a call."
    )
    content = table(*markdown.model_table(report["models"]), "Models and files") + note(text)
    titles, rows = markdown.output_table(report["models"])
    if rows:
        content += table(titles, rows, "Metrics of each output") + note("The verdict compares the first output.")
    titles, rows = markdown.seed_table(report)
    if rows:
        title = f"{markdown.main_metric(report)[0]} by seed"
        content += table(titles, rows, title, narrow=True) + note(markdown.seed_note(report))
    return content


def _training(report: dict) -> Markup:
    fits = {name: fit for name, fit in report["training"].items() if fit.get("history")}
    histories = [(name, model_kind(name), _of_first_output(fit["history"], report)) for name, fit in fits.items()]
    seconds = ", ".join(f"{name} {fit['seconds']:,.0f} s" for name, fit in report["training"].items())
    return curve_cards(histories) + note(f"Time: {seconds}.") if fits else NOTHING


def _of_first_output(history: dict, report: dict) -> dict:
    """A history with the names of the first of several outputs as those of the only one."""
    head = report["data"].get("head")
    if not isinstance(head, dict):
        return history
    first = f"{next(iter(head))}_"
    names = {name: name.removeprefix("val_").removeprefix(first) for name in history}
    return {("val_" if name.startswith("val_") else "") + names[name]: values for name, values in history.items()}


def curve_cards(histories: Sequence[tuple[str, str, dict]]) -> Markup:
    """The curves of fits: (name, kind, history), where a name such as `student-1` is one of the other seeds: thin."""
    figures = []
    for title, metric, as_error, y_label, caption in CURVES:
        series = []
        for name, kind, history in histories:
            if history.get(metric):
                ys = [1 - value if as_error else value for value in history[metric]]
                series.append(Series(name, kind, list(enumerate(ys, 1)), thin=kind not in KINDS and name != kind))
        if not series:
            continue
        show = percent if as_error else number
        chart = svg.lines(f"{title} by epoch", series, "epoch", f"{y_label}, log scale", log=True, show=show)
        pattern = "{:.2%}" if as_error else "{:.4f}"
        epochs = range(max(len(s.points) for s in series))
        cells = [[str(i + 1), *(_at(s, i, pattern) for s in series)] for i in epochs]
        numbers = table(["epoch", *(s.name for s in series)], cells, f"{title}, numbers")
        if any(s.thin for s in series):
            caption += " Thin lines: the other seeds."
        figures.append(figure(title, chart, caption, [(s.name, s.kind) for s in series if not s.thin], numbers))
    return cards(figures)


def _at(series: Series, i: int, pattern: str) -> str:
    return pattern.format(series.points[i][1]) if i < len(series.points) else ""


def cost_charts(runs: Sequence[tuple[str, dict]]) -> Markup:
    """Accuracy against bytes, deflated bytes and latency of the files of one or several runs: (name, report)."""
    if any((report.get("verdict") or {}).get("metric") for _, report in runs):
        return NOTHING  # of numbers, which have no accuracy
    several = len(runs) > 1
    levels, legend = [], [(name, _run_kind(place)) for place, (name, _) in enumerate(runs)]
    if not several:
        models = {row["name"]: row["accuracy"] for row in runs[0][1]["models"]}
        levels = [(name, name, models[name]) for name in ("teacher", "control") if name in models]
        legend = [(name, name) for name, _, _ in levels] + [("files of the student", "student")]
    figures = []
    for title, key, label in (
        ("Accuracy against size", "bytes", "bytes of the file, log scale"),
        ("Accuracy against size, deflated", "deflated", "bytes after deflate, log scale"),
        ("Accuracy against latency", "microseconds", "µs per image on one CPU thread, log scale"),
    ):
        points = []
        for place, (run, report) in enumerate(runs):
            for row in report["models"]:
                if row.get("bytes") and row.get(key):
                    name = f"{run} {row['name']}" if several else row["name"]
                    kind = _run_kind(place) if several else "student"
                    points.append(Series(name, kind, [(row[key], row["accuracy"])]))
        chart = svg.scatter(title, points, label, "accuracy %", levels, show_y=percent)
        caption = "Dotted stairs: the Pareto front. No file on it is beaten by a file of the same or lower cost."
        figures.append(figure(title, chart, caption, legend))
    return cards(figures)


def _run_kind(place: int) -> str:
    return KINDS[place % len(KINDS)]


def _diagnostics(report: dict, key: str) -> dict[str, dict]:
    """The diagnostics that have `key`, by model, of the first seed."""
    diagnostics = report.get("diagnostics", {}).items()
    return {name: values for name, values in diagnostics if name == model_kind(name) and key in values}


def _calibration(report: dict) -> Markup:
    ece = {row["name"]: row.get("ece") for row in report["models"]}
    figures = []
    for name, diagnostics in _diagnostics(report, "reliability").items():
        bins = diagnostics["reliability"]
        count = len(bins["count"])
        cells = [
            [f"{i / count:.0%}", f"{bins['confidence'][i]:.1%}", f"{bins['accuracy'][i]:.1%}", f"{n:,}"]
            for i, n in enumerate(bins["count"])
            if n
        ]
        numbers = table(["from", "confidence", "accuracy", "images"], cells, f"Reliability of the {name}, numbers")
        chart = svg.reliability(f"Reliability of the {name}", model_kind(name), bins, ece.get(name))
        caption = "" if ece.get(name) is None else f"Expected calibration error {ece[name]:.2%}."
        figures.append(figure(name.capitalize(), chart, caption, (), numbers))
    if not figures:
        return NOTHING
    text = (
        "On the diagonal, confidence equals accuracy; below it the model is overconfident, above it underconfident. "
        "Vertical lines are 95 % intervals. Bars count the images in each bin, on a logarithmic scale. "
    )
    return note(text + markdown.calibration_sentence(report)) + cards(figures)


def _mistakes(report: dict) -> Markup:
    diagnostics = _diagnostics(report, "confusion")
    if not diagnostics:
        return NOTHING
    classes = len(next(iter(diagnostics.values()))["confusion"])
    names = report["data"].get("class_names") or [str(i) for i in range(classes)]
    figures = []
    for name, values_ in diagnostics.items():
        pairs = svg.mistakes(values_["confusion"])
        rows = [[names[i], names[j], f"{n:,}"] for n, i, j in pairs[:LISTED]]
        listed = table(["true class", "predicted class", "images"], rows, f"Most frequent mistakes of the {name}")
        if classes > MAX_CLASSES:
            figures.append(part("card", f"{name.capitalize()}, most frequent mistakes", listed))
            continue
        chart = svg.heatmap(f"Confusion of the {name}", model_kind(name), values_["confusion"], names)
        wrong = sum(n for n, _, _ in pairs)
        caption = f"{wrong:,} mistakes; a stronger color means more of them."
        figures.append(figure(name.capitalize(), chart, caption, (), listed))
    return cards(figures) + (_accuracy_by_class(diagnostics, names) if classes <= MAX_CLASSES else NOTHING)


def _accuracy_by_class(diagnostics: dict[str, dict], names: Sequence[str]) -> Markup:
    columns = {name: values_["per_class"] for name, values_ in diagnostics.items() if values_.get("per_class")}
    if not columns:
        return NOTHING
    rows = [
        [name, *("–" if shares[i] is None else f"{shares[i]:.2%}" for shares in columns.values())]
        for i, name in enumerate(names)
    ]
    content = table(["class", *columns], rows, "Accuracy by class", narrow=True)
    return part("subsection", "Accuracy by class", content)


def _differences(report: dict, pictures: Mapping[str, bytes]) -> Markup:
    differences = report.get("differences")
    if not differences:
        return NOTHING
    count, student, teacher = (differences[key] for key in ("count", "student_right", "teacher_right"))
    text = (
        f"Student and teacher predict different classes for {count:,} of {differences['images']:,} test images: the "
        f"teacher is right on {teacher:,}, the student on {student:,}, neither on {count - student - teacher:,}."
    )
    shown = [picture for picture in differences["pictures"] if picture["file"] in pictures]
    if not shown:
        return note(text)
    extent = "all of them" if len(shown) == count else f"{len(shown)} of them"
    text += f" Below: {extent}, first those with the most confident student."
    names = report["data"].get("class_names") or []
    items = [_picture_item(picture, names, pictures[picture["file"]]) for picture in shown]
    return note(text) + part("pictures", items, template="run.html")


def _picture_item(picture: dict, names: Sequence[str], content: bytes) -> dict:
    def name(index: int) -> str:
        return names[index] if index < len(names) else str(index)

    item = {"index": picture["index"], "label": name(picture["label"]), "data": base64.b64encode(content).decode()}
    for model in ("student", "teacher"):
        item[model] = {
            "name": name(picture[model]),
            "confidence": f"{picture[model + '_confidence']:.0%}",
            "correct": picture[model] == picture["label"],
        }
    return item


FILE_COLUMNS: tuple[tuple[str, Callable[[dict], object]], ...] = (
    ("file", lambda file: file["path"]),
    ("bytes", lambda file: f"{file['bytes']:,}"),
    ("input", lambda file: file["input"]["type"]),
    ("output", lambda file: file["output"]["type"]),
    ("points lost", lambda file: f"{100 * file['check']['drop']:.2f}"),
    ("agreement %", lambda file: f"{100 * file['check']['agreement']:.2f}"),
    ("largest difference", lambda file: f"{file['check']['max_difference']:.2g}"),
    ("stayed float", lambda file: f"{len(file['float_layers'])} layer(s)" if file["float_layers"] else "none"),
    ("runtime", lambda file: file["min_runtime"]),
    ("SHA-256", lambda file: file["sha256"][:16]),
)


def _files(report: dict) -> Markup:
    def cell(value: Callable[[dict], object], file: dict) -> str:
        try:
            return str(value(file) or "–")
        except (KeyError, TypeError):  # not in a report of an earlier version
            return "–"

    exported = report.get("files") or []
    refused = [{**row, "path": f"{row['name']} (refused)"} for row in report.get("refused") or ()]
    if not exported and not refused:
        return NOTHING
    rows = [[cell(value, file) for _, value in FILE_COLUMNS] for file in [*exported, *refused]]
    content = table([title for title, _ in FILE_COLUMNS], rows, "Files")
    notes = markdown.file_notes(report)
    content += note(" ".join(notes)) if notes else NOTHING
    reasons = [
        [file.get("profile", "–"), *(str(layer.get(key)) for key in ("layer", "operator", "reason"))]
        for file in exported
        for layer in file.get("float_layers") or []
    ]
    if reasons:
        titles = ["profile", "layer", "operator", "why it stayed float"]
        content += details("What stayed float, and why", table(titles, reasons, "What stayed float"))
    attempts = markdown.attempt_table(report)
    if attempts[1]:
        content += note(markdown.ATTEMPT_NOTE) + table(*attempts, "Repair")
    return content


def _compressions(report: dict) -> Markup:
    content = NOTHING
    for name, compression in (report.get("compressions") or {}).items():
        text = " ".join([f"The scheme {compression['scheme']}.", *compression["notes"]])
        layers = markdown.layer_table(compression["layers"])
        shown = table(*layers, f"{name}, layer by layer") if layers[1] else NOTHING
        content += part("subsection", name, note(text) + shown)
    return content


def flatten(settings: dict, path: str = "") -> dict[str, object]:
    """A recipe's values by dotted key, as `--set` takes them."""
    flat = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return flat


def origin(report: dict) -> Markup:
    """Where the numbers come from: command, data, machine, versions, recipe."""
    data = report["data"]
    counts = ", ".join(f"{data[split]:,} {split}" for split in ("train", "validation", "test") if split in data)
    pairs = [
        ("command", report["command"]),
        ("data", f"{data['source']}; {counts} images"),
        ("data fingerprint", data["fingerprint"]),
        *(("teacher", markdown.teacher_line(row)) for row in report.get("teachers") or ()),
        ("commit", report.get("commit")),
        ("machine", report.get("machine")),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.get("versions", {}).items())),
    ]
    recipe = list(flatten(report["recipe"]).items())
    return values(pairs) + details("The recipe, every value", values(recipe))
