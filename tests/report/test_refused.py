"""A refused file in the report: a row of table and page with its reason, and what so many images can show."""

from support.reports import report

from kdistill.report import compare, markdown, page

CHECK = {
    "accuracy": 0.9,
    "drop": 0.05,
    "agreement": 0.91,
    "max_difference": 2.5,
    "max_drop": 0.002,
    "min_agreement": 0.98,
    "note": None,
    "resolution": "300 images can show a loss from 5 images on.",
}
REFUSED = [
    {"name": "npu", "reason": "It lost 15 images.", "advice": "Try <phone_cpu>.", "check": CHECK, "bytes": 4321},
    {"name": "wide", "reason": "LiteRT lacks 'Fft'.", "advice": "", "check": None, "bytes": None},
]


def with_refused() -> dict:
    content = report()
    content["refused"] = REFUSED
    content["models"] += [markdown.refused_model(row) for row in REFUSED]
    content["files"][0]["check"] |= CHECK | {"note": "accuracy fell by 0.67 points. Chance allows this on 300 images."}
    return content


def test_a_refused_file_is_a_row_with_what_was_measured():
    rows = markdown.model_table(with_refused()["models"])[1]
    assert [row[:2] for row in rows[-2:]] == [["npu (refused)", "90.00"], ["wide (refused)", "–"]]
    assert set(rows[-1][1:]) == {"–"}


def test_the_markdown_states_reason_advice_and_what_the_images_can_show():
    text = markdown.to_markdown(with_refused())
    assert (
        "Refused, and not written:\n\n- npu: It lost 15 images. Try <phone_cpu>.\n- wide: LiteRT lacks 'Fft'.\n" in text
    )
    limits = "Limits of 0.2 points and 98 % agreement: 300 images can show a loss from 5 images on."
    name = report()["files"][0]["path"]
    assert f"{limits} ({name}, npu)" in text  # once, for both
    assert f"{name}: accuracy fell by 0.67 points. Chance allows this on 300 images." in text
    assert "Refused" not in markdown.to_markdown(report())  # of an earlier version


def test_the_page_shows_them_and_counts_them_nowhere():
    content, before = with_refused(), report()
    text = page.render(content)
    assert '<p class="caveat">Refused, and not written: npu: It lost 15 images. Try &lt;phone_cpu&gt;.</p>' in text
    assert '<th scope="row">npu (refused)</th><td>4,321</td>' in text and "300 images can show a loss" in text
    # A file that nobody can use is neither the smallest nor the fastest, and no point of a chart.
    assert compare.run_table([("a", content)])[1] == compare.run_table([("a", before)])[1]
    assert page.cost_charts([("a", content)]) == page.cost_charts([("a", before)])
    content["files"] = []
    assert '<th scope="row">wide (refused)</th><td>–</td>' in page.render(content)
