"""The parts that a page is made of: document, table, figure. Every text is escaped here. Standard library only."""

from collections.abc import Sequence
from html import escape
from pathlib import Path

from kdistill.report import svg


def document(title: str, head: str, top: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page of sections (id, heading, content); those without content are left out, of the contents too."""
    sections = [each for each in sections if each[2]]
    links = "".join(f'<li><a href="#{key}">{escape(heading)}</a></li>' for key, heading, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{key}"><h2 id="{key}">{escape(heading)}</h2>{content}</section>\n'
        for key, heading, content in sections
    )
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    # The policy makes the browser itself refuse every script and every request, whatever a name in the report holds.
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>{escape(title)} · kdistill</title>
<style>
{style}</style>
</head>
<body>
<header>{head}<nav aria-label="Contents"><ul>{links}</ul></nav></header>
<main>
{top}{body}</main>
<footer class="soft">Written by kdistill. The numbers are in <code>report.json</code> beside this page.</footer>
</body>
</html>
"""


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], label: str, narrow: bool = False) -> str:
    """A table in a box of its own, which scrolls where it is too wide; the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide{" narrow" if narrow else ""}" role="region" aria-label="{escape(label)}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def values(pairs: Sequence[tuple[str, object]]) -> str:
    """Names and values, one a row."""
    rows = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{_value(value)}</td></tr>' for name, value in pairs)
    return f'<div class="wide"><table class="values"><tbody>{rows}</tbody></table></div>'


def _value(value: object) -> str:
    return "–" if value is None else f"<code>{escape(str(value))}</code>"


def figure(title: str, chart: str, caption: str = "", kinds: Sequence[tuple[str, str]] = (), numbers: str = "") -> str:
    """A chart with its heading, legend of (name, kind), caption and, folded away, its numbers as a table."""
    if not chart:
        return ""
    legend = "".join(f"<li>{svg.swatch(kind)}{escape(name)}</li>" for name, kind in kinds)
    return (
        f"<figure><h3>{escape(title)}</h3>{chart}"
        + (f'<ul class="legend">{legend}</ul>' if legend else "")
        + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
        + (f"<details><summary>Numbers</summary>{numbers}</details>" if numbers else "")
        + "</figure>"
    )


def cards(figures: Sequence[str]) -> str:
    """Figures side by side, as many as fit."""
    shown = "".join(figures)
    count = sum(map(bool, figures))
    return f'<div class="cards{" pairs" if count in (2, 4) else ""}">{shown}</div>' if shown else ""
