"""Charts: where things stand, what a screen reader gets, and labels that keep clear of each other."""

import re
import xml.etree.ElementTree as ET

import pytest
from support.reports import NAMES, report

from kdistill.report import svg as report_svg
from kdistill.report import svg_parts
from kdistill.report.svg import Series
from kdistill.report.svg_parts import Scale


def texts(svg: str) -> list[str]:
    return [element.text for element in ET.fromstring(svg).iter("text")]


def test_scales_and_ticks_by_hand():
    assert [Scale(0, 10, 100, 300)(v) for v in (0, 5, 10)] == [100, 200, 300]
    assert [Scale(1, 100, 0, 200, log=True)(v) for v in (1, 10, 100)] == [0, 100, 200]
    assert Scale(0, 10, 0, 1).ticks(6) == [0, 2, 4, 6, 8, 10]
    assert Scale(0.951, 0.962, 0, 1).ticks(6) == pytest.approx([0.952, 0.954, 0.956, 0.958, 0.96, 0.962])
    assert Scale(1, 1000, 0, 1, log=True).ticks(5) == [1, 10, 100, 1000]
    assert Scale(0.9, 10, 0, 1, log=True).ticks(5) == [1, 2, 5, 10]
    assert Scale(21, 29, 0, 1, log=True).ticks(5) == [22, 24, 26, 28]  # no 1, 2, 5 within: as on a plain axis
    assert Scale(3, 3, 0, 1)(3) == 0.5 and Scale(3, 3, 0, 1, log=True)(3) == 0.5
    for low, high in ((1e-9, 1), (0.02, 0.3), (12_496, 32_452), (1, 1.0001)):
        for log in (True, False):
            ticks = Scale(low, high, 0, 1, log).ticks(6)
            assert 1 <= len(ticks) <= 7 and all(low * 0.999 <= tick <= high * 1.001 for tick in ticks), (low, high, log)


def test_the_pareto_front_by_hand():
    #        cost, accuracy: the third costs more than the first and is worse; the last is as good as the fourth, dearer
    points = [(2.0, 0.5), (1.0, 0.4), (3.0, 0.45), (4.0, 0.9), (5.0, 0.9)]
    assert report_svg.front(points) == [1, 0, 3]
    assert report_svg.front([(1.0, 0.5), (1.0, 0.6)]) == [1]


def test_wilsons_interval_by_hand():
    assert report_svg.wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # 5 of 10
    assert report_svg.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert report_svg.wilson(0.0, 1)[0] == 0


def test_lines_go_through_the_points():
    svg = report_svg.lines("Up", [Series("s", "student", [(1, 1.0), (3, 3.0)])], "epoch", "y")
    points = re.search(r'points="(.*?)"', svg)[1]
    first, last = (tuple(map(float, pair.split(","))) for pair in points.split())
    assert first[0] == svg_parts.LEFT + 6 and last[0] == svg_parts.RIGHT - 6
    tall = svg_parts.BOTTOM - svg_parts.TOP  # the values take 20 of 22 parts of it
    assert first[1] == pytest.approx(svg_parts.BOTTOM - tall / 22, abs=0.1)
    assert last[1] == pytest.approx(svg_parts.TOP + tall / 22, abs=0.1)
    assert 'role="img"' in svg and "Last values: s 3." in svg


def test_zeros_and_numbers_that_are_not_finite_on_a_logarithmic_axis():
    points = [(1, 0.5), (2, float("nan")), (3, 0.0), (4, 0.25)]
    svg = report_svg.lines("Down", [Series("s", "student", points)], "epoch", "y", log=True)
    heights = [float(pair.split(",")[1]) for pair in re.search(r'points="(.*?)"', svg)[1].split()]
    assert len(heights) == 3 and heights[1] == pytest.approx(svg_parts.BOTTOM, abs=0.1) and heights[0] < heights[2]
    assert report_svg.lines("Nothing", [Series("s", "student", [(1, 0.0)])], "epoch", "y", log=True) == ""
    assert report_svg.lines("Nothing", [], "epoch", "y") == ""


def test_labels_of_points_cover_neither_points_nor_each_other():
    points = [Series(f"file_{i}", "student", [(1000 + 40 * i, 0.98 + 0.0001 * (i % 3))]) for i in range(7)]
    svg = report_svg.scatter("Sizes", points, "bytes", "accuracy")
    boxes = []
    for each in ET.fromstring(svg).iter("text"):
        if "name" in each.get("class"):
            x, y, wide = float(each.get("x")), float(each.get("y")), svg_parts.LETTER * len(each.text)
            left = x - {"start": 0, "middle": wide / 2, "end": wide}[each.get("class").split()[0]]
            boxes.append((left, y - 10, left + wide, y + 3))
    marks = [(float(c.get("cx")), float(c.get("cy"))) for c in ET.fromstring(svg).iter("circle")]
    assert len(marks) == 7 and len(boxes) >= 4
    for i, a in enumerate(boxes):
        assert not any(a[0] < x < a[2] and a[1] < y < a[3] for x, y in marks)
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in boxes[:i])
    assert all(f"file_{i} 1" in svg for i in range(7)), "the text alternative names them all"


def test_a_heatmap_shows_counts_and_shades_only_mistakes():
    counts = [[5, 0, 2], [1, 6, 0], [0, 0, 7]]
    svg = report_svg.heatmap("Confusion", "student", counts, ["a", "b", "c"])
    assert report_svg.mistakes(counts) == [(2, 0, 2), (1, 1, 0)]
    assert "3 mistakes. a predicted as c 2 times; b predicted as a 1 times." in svg
    shades = [float(re.search(r"[\d.]+$", each.get("style"))[0]) for each in ET.fromstring(svg).iter("rect")]
    assert shades == [0, 0, 0.62, 0.37, 0, 0, 0, 0, 0]
    assert [t for t in texts(svg) if t.isdigit()] == ["5", "2", "1", "6", "7"]


def test_every_chart_is_one_well_formed_picture_with_a_text_alternative():
    run = report()
    student = run["diagnostics"]["student"]
    for svg in (
        report_svg.reliability("R", "student", student["reliability"], 0.0123),
        report_svg.heatmap("C", "student", student["confusion"], NAMES),
        report_svg.interval("Difference", run["verdict"]),
        report_svg.scatter("S", [Series(NAMES[2], "student", [(10, 0.5)])], "x", "y", [(NAMES[2], "teacher", 0.6)]),
        report_svg.lines(NAMES[2], [Series(NAMES[2], "student", [(1, 0.5)])], "x", "y"),
    ):
        root = ET.fromstring(svg)
        assert root.get("role") == "img" and len(root.get("aria-label")) > 5
        assert not list(root.iter("script"))
    assert "1.23%" in report_svg.reliability("R", "student", student["reliability"], 0.0123)


def test_the_interval_shows_zero_where_it_is():
    verdict = {"student": [0.9], "control": [0.9], "difference": 0.0, "low": -0.01, "high": 0.02, "level": 0.95}
    svg = report_svg.interval("D", {**verdict, "seeds": 1})
    zero, left, right = (
        float(re.search(p, svg)[1]) for p in (r'zero" d="M([\d.]+)', r'interval" d="M([\d.]+)', r"26H([\d.]+)")
    )
    assert right - zero == pytest.approx(2 * (zero - left), abs=0.3)
    assert "interval -1.00 to +2.00" in svg
