"""A sweep as one page, `sweep.html`, beside `sweep.json` and `sweep.md`. Standard library only."""

import base64
from collections.abc import Mapping
from html import escape
from pathlib import Path

from kdistill import page, sweep_report
from kdistill.files import write
from kdistill.markup import document, table


def save(result: dict, pictures: list[str], folder: Path) -> None:
    """Writes `sweep.json`, `sweep.md` and `sweep.html`; the named pictures are in the folder as .png."""
    sweep_report.save(result, pictures, folder)
    content = {name: (folder / f"{name}.png").read_bytes() for name in pictures}
    write(folder / "sweep.html", html(result, content))


def html(result: dict, pictures: Mapping[str, bytes]) -> str:
    """The page of a sweep; `pictures` are PNG files by name."""
    recipe, best = result["recipe"], result["best"]
    title = f"Sweep of {recipe['name']} ({recipe['variant']})"
    top = f"<p>Best on validation, which had to choose: <strong>{escape(best)}</strong>.</p>" if best else ""
    note = (
        f"Means over {len(result['seeds'])} seed(s); one teacher. The test images had no part in choosing. The control "
        "is trained on labels alone, with the recipe's own settings."
    )
    students = table(*sweep_report.rows(result), "Students") + f'<p class="note">{note}</p>'
    sections = [
        ("pictures", "Pictures", "".join(_picture(name, content, best) for name, content in pictures.items())),
        ("students", "Teacher, control and students", students),
        ("origin", "Recipe and origin", page.origin(result)),
    ]
    head = f"<h1>{escape(recipe['name'])} <small>{escape(recipe['variant'])}, sweep</small></h1>"
    return document(title, head, page.verdict_card(result) + top, sections)


def _picture(name: str, content: bytes, best: str | None) -> str:
    told = sweep_report.TITLES[name]
    data, alt = (
        base64.b64encode(content).decode(),
        f"{told} The best on validation is {best}; the table has all numbers.",
    )
    return (
        f'<figure class="picture"><img src="data:image/png;base64,{data}" alt="{escape(alt)}">'
        f"<figcaption>{escape(told)}</figcaption></figure>"
    )
