"""The page in headless Chromium: nothing on the console, no request, every picture, no scrolling to the side."""

import pytest
from support import browser
from support.browser import Browser
from support.reports import images, report

from kdistill.report import compare, page

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(browser.MISSING is not None, reason=str(browser.MISSING)),
]


@pytest.fixture(scope="module")
def chromium():
    with Browser() as window:
        yield window


def test_the_page_of_a_run(chromium, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page.render(report(), images()))
    assert chromium.faults(path) == []
    assert chromium.run("return document.images.length") == 2
    assert chromium.run("return document.querySelector('svg.chart').getBoundingClientRect().width") > 250
    assert "prefers-color-scheme" in path.read_text()
    grounds = []
    for dark in (False, True):
        chromium.look(375, dark=dark)
        grounds.append(chromium.run("return getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1], "one theme only"


@pytest.mark.parametrize(
    "wrong,message",
    [
        ("<script>console.error('oh')</script>", "oh"),
        ("<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>", "asks for http://127.0.0.1:9/x"),
        ("<img alt='gone' src='data:image/png;base64,AAAA'>", "no picture 'gone'"),
        ("<p style='width: 2000px'>wide</p>", "375: 2000 pixels wide"),
    ],
)
def test_the_check_finds_what_is_wrong(chromium, tmp_path, wrong, message):
    path = tmp_path / "page.html"
    path.write_text(
        f"<!doctype html><meta name=viewport content='width=device-width'><style>*{{margin:0}}</style>{wrong}"
    )
    assert message in "; ".join(chromium.faults(path))


def test_the_browser_refuses_scripts_and_requests_on_the_page(chromium, tmp_path):
    """Should an escape be missing somewhere: the page's own policy is a second wall."""
    path = tmp_path / "page.html"
    evil = "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/x.png' alt=''>"
    path.write_text(page.render(report()).replace("<main>", f"<main>{evil}"))
    chromium.open("about:blank")
    chromium.console()
    chromium.open(path.as_uri())
    assert chromium.run("return document.title") != "taken"
    refused = [each for each in chromium.console() if "violates the following Content Security Policy" in each]
    assert len(refused) == 2, refused  # the script and the picture


def test_the_page_that_compares_runs(chromium, tmp_path):
    other = report()
    other["recipe"]["distill"]["temperature"] = 8.0
    path = tmp_path / "comparison.html"
    path.write_text(compare.render([("one", report()), ("a run with " + "a-very-long-name" * 8, other)]))
    assert chromium.faults(path) == []
