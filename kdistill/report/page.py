"""A run's report as one page, `report.html`, that needs no network and runs no script. Standard library only.

A pure function of the dicts of `report.json` and the pictures beside it. What a report of an earlier version, or of a
run without a control, does not hold is left out of the page.
"""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from kdistill import files
from kdistill.report import markdown, svg
from kdistill.report.html import cards, document, figure, table, values
from kdistill.report.svg import Series

TONES = {"BETTER": "better", "WORSE": "worse"}
MANY = 30  # classes; above, a confusion matrix is too fine to read, and the most frequent mistakes are listed
CURVES = (  # title, metric, as an error?, y axis, what it says
    ("Validation error", "val_accuracy", True, "error %", "Share of validation images named wrong, by epoch."),
    ("Validation loss", "val_hard", False, "nats", "Cross-entropy with the labels; the student's loss has more parts."),
    ("Training error", "accuracy", True, "error %", "A mean over the epoch, on shifted or flipped images if so set."),
    ("Distance to the teacher", "val_kd", False, "loss", "The student's distillation term on validation images."),
)


def save(found: dict, folder: Path) -> None:
    """Writes `report.json`, `report.md` and `report.html` into the run folder."""
    markdown.save(found, folder)
    files.write_text(folder / "report.html", html(found, pictures_of(found, folder)))


def pictures_of(found: dict, folder: Path) -> dict[str, bytes]:
    """The PNG files that a report names, by name, as far as they are there."""
    names = [each["file"] for each in found.get("differences", {}).get("pictures", ())]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}


def html(found: dict, pictures: Mapping[str, bytes] | None = None) -> str:
    """The page of one run. `pictures`: PNG files by the name that the report gives them."""
    sections = [
        ("models", "Models and files", _models(found)),
        ("training", "Training", _training(found)),
        ("costs", "Accuracy against cost", costs([("", found)])),
        ("calibration", "Calibration", _calibration(found)),
        ("mistakes", "Mistakes", _mistakes(found)),
        ("differences", "Where student and teacher differ", _differences(found, pictures or {})),
        ("files", "Files", _files(found)),
        ("compression", "Compression", _compressions(found)),
        ("origin", "Recipe and origin", origin(found)),
    ]
    recipe = found["recipe"]
    head = f"<h1>{escape(recipe['name'])} <small>{escape(recipe['variant'])}</small></h1>"
    top = verdict_card(found) + _warnings(found) + _tiles(found)
    return document(f"{recipe['name']} ({recipe['variant']})", head, top, sections)


def kind_of(name: str) -> str:
    """teacher, control or student, whatever the seed; other models and all files come from the student."""
    match = re.fullmatch(r"(teacher|control|student)(-\d+)?", name)
    return match[1] if match else "student"


def percent(value: float) -> str:
    """A share for an axis: as many digits as it needs."""
    return f"{100 * value:.4g}"


def verdict_card(found: dict) -> str:
    """The verdict, first on the page: word, sentence, interval."""
    verdict = found.get("verdict")
    if not verdict:
        return ""
    rest = verdict["sentence"].removeprefix(verdict["word"]).lstrip(": ")
    chart = svg.interval("Student minus control, accuracy in points", verdict)
    return (
        f'<section class="verdict {TONES.get(verdict["word"], "even")}" aria-label="Verdict"><div>'
        f'<p class="question">Did distillation help?</p><p class="word">{escape(verdict["word"])}</p>'
        f"<p>{escape(rest[:1].upper() + rest[1:])}</p></div>"
        f"<figure><h3>Student minus control, in points</h3>{chart}</figure></section>"
    )


def _warnings(found: dict) -> str:
    """What makes the verdict doubtful, right below it."""
    return "".join(f'<p class="caveat">Warning: {escape(each)}</p>\n' for each in markdown.warnings(found))


def _tiles(found: dict) -> str:
    rows = {row["name"]: row for row in found["models"]}
    teacher, student = rows.get("teacher", {}), rows.get("student", {})
    files = [row for row in found["models"] if row.get("bytes")]
    tiles = []
    if student:
        others = [f"{name} {rows[name]['accuracy']:.2%}" for name in ("control", "teacher") if name in rows]
        tiles.append(("Accuracy of the student", f"{student['accuracy']:.2%}", ", ".join(others)))
    if files:
        least = min(files, key=lambda row: row["bytes"])
        tiles.append(
            ("Smallest file, bytes", f"{least['bytes']:,}", f"{least['name']}, accuracy {least['accuracy']:.2%}")
        )
        quick = min(
            (row for row in files if row.get("microseconds")), key=lambda row: row["microseconds"], default=None
        )
        if quick:
            told = f"{quick['name']}, on one CPU thread of this machine"
            tiles.append(("Fastest file, µs per image", f"{quick['microseconds']:.3g}", told))
    if student.get("parameters") and teacher.get("parameters"):
        ratio = teacher["parameters"] / student["parameters"]
        ratio = f"the teacher has {teacher['parameters']:,}: {ratio:.3g} times as many"
        tiles.append(("Parameters", f"{student['parameters']:,}", ratio))
    shown = (
        f'<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd class="more">{escape(c)}</dd></div>' for a, b, c in tiles
    )
    return f'<dl class="tiles">{"".join(shown)}</dl>\n' if tiles else ""


def _models(found: dict) -> str:
    test = found["data"]["test"]
    note = (
        f"Measured on {test:,} test images: one image is {100 / test:.2g} points. Agreement and KL are with "
        "the teacher; ECE is the expected calibration error (15 bins). The control is the same student, trained on "
        f"labels alone: {markdown.same(found)}. Times of files are of single images on one CPU thread of the machine "
        "below, those of Keras models with its overhead and threads: compare files with files."
    )
    verdict, seeds = found.get("verdict") or {}, ""
    if verdict.get("seeds", 1) > 1:
        pairs = zip(verdict["control"], verdict["student"], strict=True)
        first = found["recipe"]["seed"]
        rows = [[str(first + i), f"{c:.2%}", f"{s:.2%}", f"{100 * (s - c):+.2f}"] for i, (c, s) in enumerate(pairs)]
        seeds = table(["seed", "control", "student", "difference, points"], rows, "Accuracy by seed", narrow=True)
        seeds += (
            f'<p class="note">Files are of the student of seed {first}, the first: no test accuracy has picked it.</p>'
        )
    return table(*markdown.table(found["models"]), "Models and files") + f'<p class="note">{escape(note)}</p>' + seeds


def _training(found: dict) -> str:
    fits = {name: fit for name, fit in found["training"].items() if fit.get("history")}
    figures = [_curve(fits, *each) for each in CURVES]
    seconds = ", ".join(f"{name} {fit['seconds']:,.0f} s" for name, fit in found["training"].items())
    return cards(figures) + f'<p class="note">Time: {escape(seconds)}.</p>' if fits else ""


def _curve(fits: dict, title: str, metric: str, as_error: bool, y_label: str, caption: str) -> str:
    series = []
    for name, fit in fits.items():
        kind = kind_of(name)
        if metric in fit["history"]:
            found = [1 - value if as_error else value for value in fit["history"][metric]]
            series.append(Series(name, kind, list(enumerate(found, 1)), thin=name != kind))
    if not series:
        return ""
    show = percent if as_error else svg.number
    chart = svg.lines(f"{title} by epoch", series, "epoch", f"{y_label}, log scale", log=True, show=show)
    epochs = range(1, 1 + max(len(s.points) for s in series))
    cells = [[str(e), *(_at(s, e, "{:.2%}" if as_error else "{:.4f}") for s in series)] for e in epochs]
    numbers = table(["epoch", *(s.name for s in series)], cells, f"{title}, numbers")
    kinds = [(s.name, s.kind) for s in series if not s.thin]
    if any(s.thin for s in series):
        caption += " Thin lines: the other seeds."
    return figure(title, chart, caption, kinds, numbers)


def _at(series: Series, epoch: int, pattern: str) -> str:
    return pattern.format(series.points[epoch - 1][1]) if epoch <= len(series.points) else ""


def costs(runs: Sequence[tuple[str, dict]]) -> str:
    """Accuracy against bytes, deflated bytes and latency of the files of one run or several: (name, report)."""
    figures = []
    for title, key, label in (
        ("Accuracy against size", "bytes", "bytes of the file, log scale"),
        ("Accuracy against size, deflated", "deflated", "bytes after deflate, log scale"),
        ("Accuracy against latency", "microseconds", "µs per image on one CPU thread, log scale"),
    ):
        points = []
        for place, (run, found) in enumerate(runs):
            rows = [row for row in found["models"] if row.get("bytes") and row.get(key)]
            kind = "abcdef"[place % 6] if len(runs) > 1 else "student"
            name = (lambda row, run=run: f"{run} {row['name']}") if len(runs) > 1 else (lambda row: row["name"])
            points += [Series(name(row), kind, [(row[key], row["accuracy"])]) for row in rows]
        if not points:
            continue
        levels = []
        if len(runs) == 1:
            models = {row["name"]: row["accuracy"] for row in runs[0][1]["models"]}
            levels = [(name, name, models[name]) for name in ("teacher", "control") if name in models]
        chart = svg.scatter(title, points, label, "accuracy %", levels, show_y=percent)
        kinds = [(name, name) for name, _, _ in levels] + [("files of the student", "student")]
        if len(runs) > 1:
            kinds = [(run, "abcdef"[place % 6]) for place, (run, _) in enumerate(runs)]
        caption = "Dotted stairs: the Pareto front. What is on it is beaten by none that costs less."
        figures.append(figure(title, chart, caption, kinds))
    return cards(figures)


def _calibration(found: dict) -> str:
    ece = {row["name"]: row.get("ece") for row in found["models"]}
    figures = []
    for name, about in found.get("diagnostics", {}).items():
        if name == kind_of(name) and "reliability" in about:
            counts = about["reliability"]
            chart = svg.reliability(f"Reliability of the {name}", kind_of(name), counts, ece.get(name))
            cells = [
                [
                    f"{i / len(counts['count']):.0%}",
                    f"{counts['confidence'][i]:.1%}",
                    f"{counts['accuracy'][i]:.1%}",
                    f"{n:,}",
                ]
                for i, n in enumerate(counts["count"])
                if n
            ]
            numbers = table(["from", "confidence", "accuracy", "images"], cells, f"Reliability of the {name}, numbers")
            caption = "" if ece.get(name) is None else f"Expected calibration error {ece[name]:.2%}."
            figures.append(figure(name.capitalize(), chart, caption, (), numbers))
    if not figures:
        return ""
    note = (
        "A model that is right as often as it is sure lies on the diagonal: below it is overconfident, above "
        "underconfident. Upright lines are 95 % intervals, bars below count the images of each bin (logarithmic)."
    )
    scaling = found["diagnostics"].get("teacher", {}).get("scaling")
    if scaling:
        before, after = scaling["before"], scaling["after"]
        note += (
            f" Temperature scaling, fitted on validation images (T = {scaling['temperature']:.3g}), takes the "
            f"teacher's ECE from {before['ece']:.2%} to {after['ece']:.2%} and its negative log-likelihood from "
            f"{before['nll']:.4f} to {after['nll']:.4f}."
        )
    return f'<p class="note">{escape(note)}</p>' + cards(figures)


def _mistakes(found: dict) -> str:
    about = {name: each for name, each in found.get("diagnostics", {}).items() if name == kind_of(name)}
    about = {name: each for name, each in about.items() if "confusion" in each}
    if not about:
        return ""
    classes = len(next(iter(about.values()))["confusion"])
    names = found["data"].get("class_names") or [str(i) for i in range(classes)]
    figures = []
    for name, each in about.items():
        pairs = svg.mistakes(each["confusion"])
        rows = [[names[i], names[j], f"{n:,}"] for n, i, j in pairs[:20]]
        listed = table(["true class", "named class", "images"], rows, f"Most frequent mistakes of the {name}")
        if classes > MANY:
            figures.append(
                f'<div class="card"><h3>{escape(name.capitalize())}, most frequent mistakes</h3>{listed}</div>'
            )
            continue
        chart = svg.heatmap(f"Confusion of the {name}", kind_of(name), each["confusion"], names)
        wrong = sum(n for n, _, _ in pairs)
        figures.append(
            figure(name.capitalize(), chart, f"{wrong:,} mistakes; the stronger the color, the more.", (), listed)
        )
    shown = [(name, each["per_class"]) for name, each in about.items() if each.get("per_class")]
    by_class = ""
    if shown and classes <= MANY:
        rows = [[names[i], *("–" if per[i] is None else f"{per[i]:.2%}" for _, per in shown)] for i in range(classes)]
        titles = ["class", *(name for name, _ in shown)]
        by_class = "<h3>Accuracy by class</h3>" + table(titles, rows, "Accuracy by class", narrow=True)
    return cards(figures) + (f'<div class="after">{by_class}</div>' if by_class else "")


def _differences(found: dict, pictures: Mapping[str, bytes]) -> str:
    about = found.get("differences")
    if not about:
        return ""
    names = found["data"].get("class_names") or []
    both_wrong = about["count"] - about["student_right"] - about["teacher_right"]
    note = (
        f"They name another class for {about['count']:,} of {about['images']:,} test images: the teacher is right on "
        f"{about['teacher_right']:,}, the student on {about['student_right']:,}, neither on {both_wrong:,}."
    )
    shown = [each for each in about["pictures"] if each["file"] in pictures]
    if shown:
        part = "all of them" if len(shown) == about["count"] else f"{len(shown)} of them"
        note += f" Below: {part}, first those on which the student is surest."
    items = []
    for each in shown:
        label, student, teacher = (_class(names, each[key]) for key in ("label", "student", "teacher"))
        data = base64.b64encode(pictures[each["file"]]).decode()
        says = [
            f'{who} <span class="{"right" if each[who] == each["label"] else "wrong"}">{escape(name)}</span> '
            f"{each[who + '_confidence']:.0%} {'✓' if each[who] == each['label'] else '✗'}"
            for who, name in (("student", student), ("teacher", teacher))
        ]
        alt = f"Test image {each['index']}, a {label}: the student names it {student}, the teacher {teacher}"
        items.append(
            f'<li><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
            f"label <strong>{escape(label)}</strong><br>{'<br>'.join(says)}</li>"
        )
    listed = f'<ul class="pictures">{"".join(items)}</ul>' if items else ""
    return f'<p class="note">{escape(note)}</p>{listed}'


def _class(names: Sequence[str], index: int) -> str:
    return names[index] if index < len(names) else str(index)


def _files(found: dict) -> str:
    columns: tuple[tuple[str, Callable[[dict, dict], object]], ...] = (
        ("file", lambda f, _: f.get("path")),
        ("bytes", lambda f, _: f"{f['bytes']:,}"),
        ("input", lambda f, _: f["input"]["type"]),
        ("output", lambda f, _: f["output"]["type"]),
        ("points lost", lambda _, c: f"{100 * c['drop']:.2f}"),
        ("agreement %", lambda _, c: f"{100 * c['agreement']:.2f}"),
        ("largest difference", lambda _, c: f"{c['max_difference']:.2g}"),
        ("stayed float", lambda f, _: f"{len(f['float_layers'])} layer(s)" if f["float_layers"] else "none"),
        ("runtime", lambda f, _: f.get("min_runtime")),
        ("SHA-256", lambda f, _: f["sha256"][:16]),
    )

    def cell(get: Callable, file: dict) -> str:
        try:
            return str(get(file, file.get("check") or {}) or "–")
        except (KeyError, TypeError):
            return "–"

    rows = [[cell(get, file) for _, get in columns] for file in found.get("files") or []]
    stayed = [
        [file.get("profile", "–"), str(each.get("layer")), str(each.get("operator")), str(each.get("reason"))]
        for file in found.get("files") or []
        for each in file.get("float_layers") or []
    ]
    why = table(["profile", "layer", "operator", "why it stayed float"], stayed, "What stayed float")
    listed = table([title for title, _ in columns], rows, "Files") if rows else ""
    return listed + (f"<details><summary>What stayed float, and why</summary>{why}</details>" if stayed else "")


def _compressions(found: dict) -> str:
    parts = []
    for name, made in (found.get("compressions") or {}).items():
        said = " ".join([f"The scheme {made['scheme']}.", *made["notes"]])
        layers = table(*markdown.layers(made["stages"]), f"{name}, layer by layer")
        parts.append(f'<h3 class="after">{escape(name)}</h3><p class="note">{escape(said)}</p>{layers}')
    return "".join(parts)


def flat(values_: dict, path: str = "") -> dict[str, object]:
    """A recipe's values by dotted key, as `--set` takes them."""
    found = {}
    for key, value in values_.items():
        found |= flat(value, f"{path}{key}.") if isinstance(value, dict) else {path + key: value}
    return found


def origin(found: dict) -> str:
    """Where the numbers come from: command, data, machine, versions, recipe."""
    data = found["data"]
    counts = ", ".join(f"{data[part]:,} {part}" for part in ("train", "validation", "test") if part in data)
    pairs = [
        ("command", found["command"]),
        ("data", f"{data['source']}; {counts} images"),
        ("data fingerprint", data["fingerprint"]),
        ("commit", found.get("commit")),
        ("machine", found.get("machine")),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.get("versions", {}).items())),
    ]
    recipe = [(key, value) for key, value in flat(found["recipe"]).items()]
    return values(pairs) + f"<details><summary>The recipe, every value</summary>{values(recipe)}</details>"
