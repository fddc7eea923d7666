"""The report of a sweep: table, markdown, page, and its charts as files."""

import json
from collections.abc import Sequence
from pathlib import Path

from kdistill.files import write_text
from kdistill.report import page
from kdistill.report.html import NOTHING, cards, document, figure, note, part, table
from kdistill.report.markdown import Table, markdown_table, provenance_lines
from kdistill.report.svg_parts import standalone
from kdistill.report.sweep_charts import Chart, draw


def student_table(result: dict) -> Table:
    """The table of a sweep: teacher, control, and one row for each setting."""
    keys = [key.split(".")[-1] for key in result["grid"]]
    published = dict(map(tuple, result["recipe"]["published"]))
    spread = ["lowest", "highest"] if len(result["seeds"]) > 1 else []
    titles = [*keys, "validation %", "test %", *spread, "agreement %", "KL", "ECE %"]
    titles += ["published %"] if published else []

    def published_cells(name: str) -> list[str]:
        if not published:
            return []
        return [f"{100 * published[name]:.2f}" if name in published else "–"]

    dashes = ["–"] * (len(keys) - 1)
    teacher = f"{100 * result['teacher']['accuracy']:.2f}"
    rows = [["teacher", *dashes, "–", teacher, *["–"] * (3 + len(spread)), *published_cells("teacher")]]
    for student in result["students"]:
        for values in student["settings"] or [None]:
            settings = list(values.values()) if values else ["control", *dashes]
            pairs = zip(keys, settings, strict=True)
            name = ",".join(f"{key}={value}" for key, value in pairs) if values else student["name"]
            rows.append([*settings, *_metric_cells(student, bool(spread)), *published_cells(name)])
    return titles, rows


def _metric_cells(student: dict, spread: bool) -> list[str]:
    if not all(student["test"]):
        step = next((step for step in student["broken_steps"] if step is not None), "?")
        return ["–", f"not finite from step {step}", *["–"] * (5 if spread else 3)]

    def mean(split: str, key: str) -> float | None:
        values = [metrics.get(key) for metrics in student[split]]
        return None if None in values else sum(values) / len(values)

    accuracy = [metrics["accuracy"] for metrics in student["test"]]
    cells = [f"{100 * mean('validation', 'accuracy'):.2f}", f"{100 * mean('test', 'accuracy'):.2f}"]
    cells += [f"{100 * min(accuracy):.2f}", f"{100 * max(accuracy):.2f}"] if spread else []
    for key, pattern, factor in (("agreement", "{:.2f}", 100), ("kl", "{:.4f}", 1), ("ece", "{:.2f}", 100)):
        value = mean("test", key)
        cells.append("–" if value is None else pattern.format(factor * value))
    return cells


def to_markdown(result: dict, charts: Sequence[Chart]) -> str:
    """The sweep as Markdown."""
    passes, data, best = result["cost"]["passes"], result["data"], result["best"]
    seconds, students = (sum(one[key] for one in passes) for key in ("seconds", "students"))
    verdict = (
        f"Best setting on the validation images: **{best}**. Against the control, on the test images, which had no "
        f"part in this choice: {result['verdict']['sentence']}"
        if best and result["verdict"]
        else "No student has finite outputs for all seeds: see the table."
    )
    lines = [
        f"# Sweep of {result['recipe']['name']} ({result['recipe']['variant']})",
        "",
        verdict,
        "",
        *((pick_sentence(result), "") if pick_sentence(result) else ()),
        *[line for chart in charts for line in (_heading(chart), "", f"![{chart.title}]({chart.name}.svg)", "")],
        *markdown_table(student_table(result), left=range(len(result["grid"]))),
        "",
        f"{_means(result)} Seeds: {', '.join(map(str, result['seeds']))}. Settings that give the same student (any "
        "temperature with weight 0) are trained once.",
        "",
        f"Cost: {students} students in {len(passes)} pass(es) of the data, {seconds:,.0f} s in total. In a pass the "
        "teacher runs once for each batch, for all students.",
        "",
        f"- Command: `{result['command']}`",
        f"- Data: {data['source']}; fingerprint {data['fingerprint']}; {data['train']:,} training "
        f"({data['labeled']:,} labeled), {data['validation']:,} validation, {data['test']:,} test images",
        *provenance_lines(result),
        "",
    ]
    return "\n".join(lines)


def pick_sentence(result: dict) -> str:
    """Which settings chance does not distinguish from the best one; empty if the sweep does not state it."""
    return (result.get("pick") or {}).get("sentence", "")


def _heading(chart: Chart) -> str:
    return f"{chart.title}. {chart.caption}".rstrip()


def _means(result: dict) -> str:
    return (
        f"Means over {len(result['seeds'])} seed(s), with one teacher. The control is trained on labels alone, with "
        "the recipe's own settings."
    )


def save(result: dict, curves: dict, folder: Path, first_steps: int) -> None:
    """Writes `sweep.json`, `sweep.md`, `sweep.html` and the charts as .svg files; arguments as of `draw`."""
    charts = draw(result, curves, first_steps)
    for chart in charts:
        write_text(folder / f"{chart.name}.svg", standalone(chart.svg, chart.legend))
    write_text(folder / "sweep.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "sweep.md", to_markdown(result, charts))
    write_text(folder / "sweep.html", render(result, charts))


def render(result: dict, charts: Sequence[Chart]) -> str:
    """The page of a sweep."""
    recipe, best = result["recipe"], result["best"]
    best_part = part("best", best, pick_sentence(result), template="run.html") if best else NOTHING
    top = page.verdict_card(result) + best_part
    figures = [figure(chart.title, chart.svg, chart.caption, chart.legend) for chart in charts]
    text = f"{_means(result)} The test images have no part in the choice of the best setting."
    sections = [
        ("charts", "Charts", cards(figures)),
        ("students", "Teacher, control and students", table(*student_table(result), "Students") + note(text)),
        ("origin", "Recipe and origin", page.origin(result)),
    ]
    title = f"Sweep of {recipe['name']} ({recipe['variant']})"
    return document(recipe["name"], f"{recipe['variant']}, sweep", top, sections, title=title, numbers="sweep.json")
