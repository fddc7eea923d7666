"""A sweep's pictures (PNG and SVG) and its TensorBoard logs, with HParams."""

from pathlib import Path

import matplotlib
from matplotlib import pyplot as plt

from kdistill.files import atomic_file

matplotlib.use("Agg")
SHOWN = 12  # lines in one picture


def draw(result: dict, curves: dict, folder: Path, first_steps: int) -> list[str]:
    """Writes the pictures into `folder` as .png and .svg; returns their names.

    `first_steps`: how many steps a picture of its own shows.
    """
    made = {"accuracy_by_setting": _by_setting(result)}
    names = _along(result)
    first = curves[str(result["seeds"][0])]
    made["first_steps"] = _first_steps(names, first, first_steps)
    made["losses"] = _losses(names, first)
    for name, figure in made.items():
        if figure is None:
            continue
        for ending in ("png", "svg"):
            with atomic_file(folder / f"{name}.{ending}") as part:
                figure.savefig(part, dpi=110)
        plt.close(figure)
    return [name for name, figure in made.items() if figure is not None]


def _legend(axis, size: int) -> None:
    if axis.get_legend_handles_labels()[0]:  # none where no student's loss stayed finite
        axis.legend(fontsize=size)


def number_of(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _by_setting(result: dict):
    """Test accuracy against the first key of the grid, one line for each combination of the others."""
    (key, values), *others = result["grid"].items()
    lines: dict[str, list[tuple]] = {}
    for student in result["students"]:
        if not all(student["test"]):
            continue
        accuracy = [100 * each["accuracy"] for each in student["test"]]
        for setting in student["settings"]:
            name = ", ".join(f"{other.split('.')[-1]} {setting[other]}" for other, _ in others)
            lines.setdefault(name, []).append(
                (setting[key], sum(accuracy) / len(accuracy), min(accuracy), max(accuracy))
            )
    if not lines:
        return None
    numbers = [number_of(value) for value in values]
    places = dict(zip(values, range(len(values)) if None in numbers else numbers, strict=True))
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, points in lines.items():
        points = sorted((places[value], mean, low, high) for value, mean, low, high in points)
        x, mean, low, high = zip(*points, strict=True)
        (line,) = axis.plot(x, mean, marker="o", markersize=3, linewidth=1.2, label=name or None)
        axis.fill_between(x, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    control = [each["accuracy"] for each in result["students"][0]["test"] if each]
    if control:
        axis.axhline(100 * sum(control) / len(control), color="0.4", linestyle=":", linewidth=1, label="control")
    if None in numbers:
        axis.set_xticks(range(len(values)), values)
    elif min(numbers) > 0 and max(numbers) / min(numbers) >= 30:
        axis.set_xscale("log")
    axis.set(xlabel=key.split(".")[-1], ylabel="test accuracy %")
    _legend(axis, 8)
    axis.grid(alpha=0.3)
    return figure


def _along(result: dict) -> dict[str, str]:
    """Students along the first key of the grid, the other keys at the best student's values: label -> name."""
    key, *others = result["grid"]
    by_name = {student["name"]: student for student in result["students"] if student["settings"]}
    best = by_name.get(result["best"], next(iter(by_name.values())))["settings"][0]
    found = {}
    for name, student in by_name.items():
        for setting in student["settings"]:
            if all(setting[other] == best[other] for other in others):
                found[f"{key.split('.')[-1]} {setting[key]}"] = name
    step = -(-len(found) // SHOWN)
    return {label: name for place, (label, name) in enumerate(found.items()) if place % step == 0}


def _first_steps(names: dict[str, str], curves: dict, steps: int):
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    colors = plt.get_cmap("viridis")
    for place, (label, name) in enumerate(names.items()):
        curve = curves[name]
        points = [
            (step, 100 * value)
            for step, value in zip(curve["step"], curve["validation"], strict=True)
            if value is not None and step <= steps
        ]
        axis.plot(*zip(*points, strict=True), color=colors(place / max(1, len(names) - 1)), linewidth=1.2, label=label)
    axis.set(xlabel="step", ylabel="validation accuracy %")
    _legend(axis, 8)
    axis.grid(alpha=0.3)
    return figure


def _losses(names: dict[str, str], curves: dict):
    logged = [key for key in ("hard", "kd") if any(key in curves[name] for name in names.values())]
    figure, axes = plt.subplots(1, len(logged), figsize=(5 * len(logged), 4.2), layout="constrained", squeeze=False)
    colors = plt.get_cmap("viridis")
    for axis, key in zip(axes[0], logged, strict=True):
        for place, (label, name) in enumerate(names.items()):
            curve = curves[name]
            points = [(s, v) for s, v in zip(curve["step"], curve.get(key, []), strict=False) if v is not None]
            highest = max((value for _, value in points), default=0)
            if highest > 0:
                scaled = [(step, value / highest) for step, value in points]
                axis.plot(
                    *zip(*scaled, strict=True), color=colors(place / max(1, len(names) - 1)), linewidth=1, label=label
                )
        axis.set(xlabel="step", ylabel="share of its own maximum", title=f"{key} loss", ylim=(0, 1.05))
        axis.grid(alpha=0.3)
    _legend(axes[0][0], 7)
    return figure
