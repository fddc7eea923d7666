"""`kdistill report`: the page of finished runs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import Json, Open, command, open_in_browser, say_to, show_lines, show_report, show_table


@command
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished runs.")],
    out: Annotated[
        Path | None, typer.Option(help="The page to write. Default: report.html of the run, or comparison.html.")
    ] = None,
    open_page: Open = False,
    as_json: Json = False,
):
    """Write the page of one run again, or a page that compares several runs.

    Example: kdistill report runs/mnist-default-1 runs/mnist-default-2 --out comparison.html
    """
    from kdistill.files import write_text
    from kdistill.report import compare, page

    named = compare.load_runs(runs)
    if len(runs) == 1:
        content, folder = named[0][1], runs[0].parent if runs[0].is_file() else runs[0]
        path, text = out or folder / "report.html", page.render(content, page.read_pictures(content, folder))
        result: dict | list = {**content, "folder": str(folder)}
    else:
        path, text = out or Path("comparison.html"), compare.render(named)
        result = compare.as_dict(named)
    write_text(path, text)
    if as_json:
        print(json.dumps(result, indent=1))
    elif len(runs) == 1:
        show_report(result)
    else:
        show_table(*compare.run_table(named))
        show_lines(*compare.caveats(named))
    say_to(as_json)(f"Page: {path}")
    if open_page:
        open_in_browser(path)
