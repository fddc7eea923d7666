"""The page in headless Chromium: nothing on the console, no request, every picture, no scrolling to the side."""

import os
import time
from pathlib import Path

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


def test_the_keyboard_reaches_all_that_can_be_unfolded_and_scrolled(chromium, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(page.render(report(), images()))
    chromium.look(375)
    chromium.open(path.as_uri())
    reached = []
    for _ in range(80):
        chromium.press("Tab", 9)
        tag = chromium.run("return document.activeElement.tagName + (document.activeElement.className || '')")
        if tag == "BODY":
            break
        reached.append(tag)
        outline = chromium.run("return getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", tag
    count = "document.querySelectorAll('a[href], summary, [tabindex=\"0\"]')"
    hidden = "[...document.querySelectorAll('details [tabindex=\"0\"]')].length"
    assert len(reached) == chromium.run(f"return {count}.length - {hidden}") and "SUMMARY" in reached
    chromium.run("document.querySelector('.verdict summary').focus()")
    chromium.press("Enter", 13)
    assert chromium.run("return document.querySelector('.verdict details').open")


AXE = os.environ.get("KDISTILL_AXE")  # axe.min.js of the npm package axe-core


@pytest.mark.skipif(not AXE, reason="needs axe-core: KDISTILL_AXE names its axe.min.js")
@pytest.mark.parametrize("width,dark", [(375, False), (375, True), (1280, False), (1280, True)])
def test_the_rules_of_axe(chromium, tmp_path, width, dark):
    pages = {"run": page.render(report(), images()), "comparison": compare.render([("one", report()), ("b", report())])}
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text)
        chromium.look(width, dark=dark)
        chromium.open((tmp_path / f"{name}.html").as_uri())
        chromium.run("document.querySelectorAll('details').forEach(each => each.open = true)")
        chromium.run(Path(AXE).read_text())
        chromium.run("axe.run().then(result => window.violations = result.violations.map(each => each.id))")
        for _ in range(100):
            violations = chromium.run("return window.violations || null")
            if violations is not None:
                break
            time.sleep(0.1)
        assert violations == [], name


def test_the_page_that_compares_runs(chromium, tmp_path):
    other = report()
    other["recipe"]["distill"]["temperature"] = 8.0
    path = tmp_path / "comparison.html"
    path.write_text(compare.render([("one", report()), ("a run with " + "a-very-long-name" * 8, other)]))
    assert chromium.faults(path) == []
