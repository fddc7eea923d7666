"""The charts of a sweep: lines, bands and axes by the grid, and files that stand alone."""

import copy
import re
import xml.etree.ElementTree as ET

import pytest
from support.reports import HOSTILE, report

from kdistill.report import sweep, sweep_charts
from kdistill.report.svg_parts import standalone


def result(grid: dict[str, list[str]], accuracies: list[list[float]], best: str | None = None) -> dict:
    """What sweep.json holds: a control of 50 % and the students of a grid, with test accuracies by seed."""
    (key, values), *others = grid.items()
    settings = [{key: value} for value in values]
    for other, values in others:
        settings = [{**setting, other: value} for setting in settings for value in values]
    students = [{"name": "control", "settings": [], "test": [{"accuracy": 0.5} for _ in accuracies[0]]}]
    for setting, accuracy in zip(settings, accuracies, strict=True):
        name = ",".join(f"{key.split('.')[-1]}={value}" for key, value in setting.items())
        students.append({"name": name, "settings": [setting], "test": [{"accuracy": value} for value in accuracy]})
    return {
        "grid": grid,
        "seeds": list(range(len(accuracies[0]))),
        "best": best or students[1]["name"],
        "students": students,
    }


def curves(result: dict, **losses) -> dict:
    curve = {"step": [1, 2], "validation": [0.1, 0.2], **(losses or {"hard": [2.0, 1.0]})}
    return {"0": {student["name"]: copy.deepcopy(curve) for student in result["students"]}}


def xs(chart) -> list[float]:
    return [float(pair.split(",")[0]) for pair in re.search(r'<polyline[^>]* points="(.*?)"', chart.svg)[1].split()]


def test_charts_of_words_and_of_one_key():
    swept = result({"training.optimizer": ["sgd", "adam"]}, [[0.6], [0.6]], "optimizer=adam")
    charts = sweep_charts.draw(swept, curves(swept), 1000)
    assert [chart.name for chart in charts] == ["accuracy_by_setting", "first_steps", "hard_loss"]
    assert ">sgd</text>" in charts[0].svg and ">adam</text>" in charts[0].svg
    assert charts[0].legend == [("student", "student"), ("control", "control")]
    assert "band" not in charts[0].svg  # one seed
    assert [label for label, _ in charts[1].legend] == ["optimizer sgd", "optimizer adam"]
    assert "Last values: optimizer sgd 50, optimizer adam 50." in charts[2].svg  # 1.0 of a maximum of 2.0, in %


def test_the_distillation_loss_has_its_own_chart_and_what_is_not_finite_is_skipped():
    swept = result({"distill.temperature": ["1", "2"]}, [[0.6], [0.6]])
    charts = sweep_charts.draw(swept, curves(swept, hard=[None, None], kd=[4.0, 1.0]), 1000)
    assert [chart.name for chart in charts] == ["accuracy_by_setting", "first_steps", "kd_loss"]


def test_one_line_for_each_combination_of_the_other_keys_with_its_band():
    grid = {"distill.temperature": ["1", "2", "4"], "distill.distillation_weight": ["0.5", "1"]}
    swept = result(grid, [[0.7 + 0.01 * i, 0.8] for i in range(6)])
    chart = sweep_charts.accuracy_by_setting(swept)
    assert [name for name, _ in chart.legend] == ["distillation_weight 0.5", "distillation_weight 1", "control"]
    assert chart.svg.count("<polyline") == 2 and chart.svg.count('class="band') == 2
    # 1, 2, 4: the second point stands at a third of the way
    first, second, last = xs(chart)
    assert second - first == pytest.approx((last - first) / 3, abs=0.2)


def test_a_wide_range_of_a_setting_has_a_logarithmic_axis():
    first, second, last = xs(
        sweep_charts.accuracy_by_setting(result({"training.learning_rate": ["0.01", "0.1", "1"]}, [[0.6]] * 3))
    )
    assert second - first == pytest.approx(last - second, abs=0.2)


def test_students_that_are_not_finite_are_skipped():
    swept = result({"distill.temperature": ["1", "2"]}, [[0.6], [0.7]])
    swept["students"][1]["test"] = [None]
    assert sweep_charts.accuracy_by_setting(swept).svg.count('<circle class="mark') == 1
    swept["students"][2]["test"] = [None]
    assert sweep_charts.accuracy_by_setting(swept).svg == ""


def test_many_values_are_thinned_to_twelve_lines():
    swept = result({"distill.temperature": [str(value) for value in range(1, 31)]}, [[0.6]] * 30)
    steps = sweep_charts.draw(swept, curves(swept), 1000)[1]
    assert len(steps.legend) == 10 and len({kind for _, kind in steps.legend}) == 10


def test_a_chart_as_a_file_has_style_and_legend_and_escapes_names():
    swept = result({"training.optimizer": [HOSTILE, "adam"]}, [[0.6], [0.7]])
    charts = sweep_charts.draw(swept, curves(swept), 1000)
    for chart in charts:
        text = standalone(chart.svg, chart.legend)
        root = ET.fromstring(text)
        assert HOSTILE not in text and "prefers-color-scheme" in root[0].text
        assert all(name in "".join(root.itertext()) for name, _ in chart.legend)
        assert "url(" not in text and not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_the_page_of_a_sweep_escapes_names():
    swept = result({"training.optimizer": [HOSTILE, "adam"]}, [[0.6], [0.7]])
    for student in swept["students"]:
        student["validation"] = [{"accuracy": 0.5}]
    run = report()
    swept |= {key: run[key] for key in ("verdict", "command", "machine", "versions", "commit", "data")}
    swept |= {"recipe": {**run["recipe"], "published": []}, "teacher": {"accuracy": 0.99}}
    charts = sweep_charts.draw(swept, curves(swept), 1000)
    text = sweep.render(swept, charts)
    assert HOSTILE not in text and text.count('class="chart"') == 1 + len(charts)
