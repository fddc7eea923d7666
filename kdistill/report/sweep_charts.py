"""The charts of a sweep, in the style of the page: accuracy by setting, the first steps, the losses."""

from collections.abc import Sequence
from dataclasses import dataclass

from kdistill.report import svg
from kdistill.report.svg import Series, ramp
from kdistill.report.svg_parts import percent

MAX_LINES = 12  # of one chart


@dataclass(frozen=True)
class Chart:
    """A chart: the name of its file, title, caption, legend of (name, kind), and the SVG."""

    name: str
    title: str
    caption: str
    legend: Sequence[tuple[str, str]]
    svg: str


def draw(result: dict, curves: dict, first_steps: int) -> list[Chart]:
    """The charts of a sweep, without those that have nothing to show.

    `result`: what `sweep.json` holds. `curves`: by seed and student, lists `step`, `validation` and losses by name;
    the charts of curves show the first seed. `first_steps`: the steps that have a chart of their own.
    """
    by_setting = accuracy_by_setting(result)
    students, first_seed = _students(result), curves[str(result["seeds"][0])]
    chosen = [(label, first_seed[name]) for label, name in students.items()]
    steps = _curve_chart(
        "first_steps",
        "Validation accuracy over the first steps",
        f"The first {first_steps:,} steps, by {_short(next(iter(result['grid'])))}.",
        [(label, _points(curve, "validation", first_steps)) for label, curve in chosen],
        "accuracy %",
    )
    losses = [
        _curve_chart(
            f"{key}_loss",
            title,
            "Each curve is divided by its own maximum.",
            [(label, _relative(_points(curve, key))) for label, curve in chosen],
            "% of the maximum",
        )
        for key, title in (("hard", "Hard loss (labels)"), ("kd", "Distillation loss (teacher)"))
    ]
    return [chart for chart in (by_setting, steps, *losses) if chart.svg]


def as_number(text: str) -> float | None:
    """The number that a value of the grid is, or None."""
    try:
        return float(text)
    except ValueError:
        return None


def accuracy_by_setting(result: dict) -> Chart:
    """Test accuracy over the first key of the grid: one line for each combination of the others, and the control."""
    (key, values), *others = result["grid"].items()
    numbers = [as_number(value) for value in values]
    words = None in numbers
    places = dict(zip(values, range(len(values)) if words else numbers, strict=True))
    lines: dict[str, list[tuple]] = {}
    for student in result["students"]:
        if not all(student["test"]):
            continue
        accuracy = [test["accuracy"] for test in student["test"]]
        for setting in student["settings"]:
            label = ", ".join(f"{_short(other)} {setting[other]}" for other, _ in others) or "student"
            point = places[setting[key]], sum(accuracy) / len(accuracy), (min(accuracy), max(accuracy))
            lines.setdefault(label, []).append(point)
    kinds = ramp(len(lines)) if len(lines) > 1 else ["student"]
    several = len(result["seeds"]) > 1
    series = []
    for (label, points), kind in zip(lines.items(), kinds, strict=False):
        points = sorted(points)
        spread = [bounds for _, _, bounds in points] if several else ()
        series.append(Series(label, kind, [(x, y) for x, y, _ in points], spread=spread))
    control = [test["accuracy"] for test in result["students"][0]["test"] if test]
    levels = [("control", "control", sum(control) / len(control))] if control else []
    title = f"Test accuracy by {_short(key)}"
    chart = svg.lines(
        title,
        series,
        _short(key),
        "accuracy %",
        levels=levels,
        log_x=not words and min(numbers) > 0 and max(numbers) / min(numbers) >= 30,
        names=values if words else (),
        show=percent,
    )
    caption = "Means over the seeds; bands from the lowest to the highest." if several else ""
    legend = [(s.name, s.kind) for s in series] + [(name, kind) for name, kind, _ in levels]
    return Chart("accuracy_by_setting", title, caption, legend, chart)


def _short(key: str) -> str:
    return key.split(".")[-1]


def _students(result: dict) -> dict[str, str]:
    """Students along the first key of the grid, the other keys as in the best student: label -> name."""
    key, *others = result["grid"]
    settings = {student["name"]: student["settings"] for student in result["students"] if student["settings"]}
    best = settings.get(result["best"], next(iter(settings.values())))[0]
    labels = {
        f"{_short(key)} {setting[key]}": name
        for name, of_student in settings.items()
        for setting in of_student
        if all(setting[other] == best[other] for other in others)
    }
    step = -(-len(labels) // MAX_LINES)
    return dict(list(labels.items())[::step])


def _points(curve: dict, key: str, last_step: float = float("inf")) -> list[tuple[float, float]]:
    pairs = zip(curve["step"], curve.get(key, ()), strict=False)
    return [(step, value) for step, value in pairs if value is not None and step <= last_step]


def _relative(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points as shares of their maximum; none where that is 0."""
    highest = max((value for _, value in points), default=0)
    return [(step, value / highest) for step, value in points] if highest > 0 else []


def _curve_chart(name: str, title: str, caption: str, curves: Sequence[tuple[str, list]], y_label: str) -> Chart:
    kinds = ramp(len(curves))
    series = [Series(label, kind, points) for (label, points), kind in zip(curves, kinds, strict=True) if points]
    chart = svg.lines(title, series, "step", y_label, show=percent, marks=False)
    return Chart(name, title, caption, [(s.name, s.kind) for s in series], chart)
