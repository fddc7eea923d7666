"""The section of a run's page that shows test examples of outputs other than one class: masks, labels, numbers."""

import base64
from collections.abc import Mapping

from markupsafe import Markup

from kdistill.report import svg
from kdistill.report.html import NOTHING, cards, figure, note, part
from kdistill.report.svg import Series

LABELED = ("label", "teacher", "student")
CAPTIONS = {
    "positions": "From left to right: image, label, teacher, student. First the examples with the lowest score of the "
    "student, then evenly spaced ones. Gray pixels have no label.",
    "labels": "First the examples with the lowest score of the student, then evenly spaced ones.",
    "numbers": "On the diagonal, a model gives the label.",
}


def section(report: dict, pictures: Mapping[str, bytes]) -> Markup:
    """The section, empty for a report without such examples. `pictures`: PNG files by the names in the report."""
    parts = [_of_output(one, pictures) for one in report.get("examples", ())]
    return Markup("").join(part for part in parts if part)


def _of_output(one: dict, pictures: Mapping[str, bytes]) -> Markup:
    title = f"Output {one['output']}. " if one["output"] else ""
    if one["kind"] == "numbers":
        return _scatter(one, title)
    shown = [picture for picture in one.get("pictures", ()) if picture["file"] in pictures]
    if not shown:
        return NOTHING
    items = [
        {
            "data": base64.b64encode(pictures[picture["file"]]).decode(),
            "index": picture["index"],
            "score": f"{picture['score']:.1%}",
            "rows": [(who, ", ".join(picture[who]) or "none") for who in LABELED if who in picture],
        }
        for picture in shown
    ]
    wide = one["kind"] == "positions"
    return note(title + CAPTIONS[one["kind"]]) + part("examples", items, wide, template="run.html")


def _scatter(one: dict, title: str) -> Markup:
    figures = []
    for place, model in ((1, "teacher"), (2, "student")):
        points = [(point[0], point[place]) for point in one["points"]]
        chart = svg.predictions(f"{model} against label", Series(model, model, points))
        figures.append(figure(f"{model.capitalize()} against label", chart, CAPTIONS["numbers"], [(model, model)]))
    return (note(title) if title else NOTHING) + cards(figures)
