"""The parts that a page is made of: document, table, figure and others, from the templates in `templates/`.

Every function returns `Markup`. Jinja escapes each text that is not: no other module writes or escapes HTML.
"""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from kdistill.report.svg_parts import swatch

FOLDER = Path(__file__).parent
ENVIRONMENT = Environment(
    loader=FileSystemLoader(FOLDER / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
NOTHING = Markup("")


def document(
    name: str,
    variant: str,
    top: Markup,
    sections: Sequence[tuple[str, str, Markup]],
    title: str = "",
    numbers: str = "",
) -> str:
    """A whole page: heading, contents, `top`, and sections (id, heading, content), without those that are empty.

    `title`: of the browser's window, if not the heading. `numbers`: the file beside the page that holds all numbers.
    """
    return ENVIRONMENT.get_template("document.html").render(
        name=name,
        variant=variant,
        title=title or f"{name} ({variant})",
        top=top,
        sections=[section for section in sections if section[2]],
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        numbers=numbers,
    )


def part(name: str, *values, template: str = "parts.html") -> Markup:
    """What the macro `name` of a template makes of these values."""
    return getattr(ENVIRONMENT.get_template(template).module, name)(*values)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], label: str, narrow: bool = False) -> Markup:
    """A table in its own box, which scrolls if it is too wide; the first cell of a row is its heading."""
    return part("table", titles, rows, label, narrow)


def values(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Names and values, one a row."""
    return part("values", pairs)


def figure(
    title: str, chart: str, caption: str = "", kinds: Sequence[tuple[str, str]] = (), numbers: Markup = NOTHING
) -> Markup:
    """A chart with its heading, a legend of (name, kind), a caption and, folded away, its numbers as a table."""
    if not chart:
        return NOTHING
    legend = [(name, Markup(swatch(kind))) for name, kind in kinds]
    return part("figure", title, Markup(chart), caption, legend, numbers)


def cards(figures: Sequence[Markup]) -> Markup:
    """Figures side by side, as many as fit."""
    figures = [figure for figure in figures if figure]
    return part("cards", figures) if figures else NOTHING


def note(text: str) -> Markup:
    """A paragraph in small letters that explains what is beside it."""
    return part("note", text)


def details(summary: str, content: Markup) -> Markup:
    """Content that is folded away."""
    return part("details", summary, content)
