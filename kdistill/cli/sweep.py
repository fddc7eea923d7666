"""`kdistill sweep`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import (
    CacheDir,
    DataDir,
    Download,
    Force,
    Json,
    Open,
    RecipeName,
    Resume,
    Settings,
    Variant,
    command,
    folder_options,
    import_tensorflow,
    number,
    open_in_browser,
    say_to,
    show_lines,
    show_table,
)
from kdistill.cli.teacher import takes_teacher
from kdistill.recipe.checks import MOST


@command
@takes_teacher
def sweep(
    recipe: RecipeName,
    teacher: list[str],
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="key=v1,v2,... or key=0,0.1,...,1; may be repeated.")
    ] = None,
    variant: Variant = "default",
    set_: Settings = None,
    seeds: Annotated[int | None, number(1, MOST["seeds"], "Train every student with this many seeds.")] = None,
    together: Annotated[int | None, number(1, 10_000, "Students that train at the same time. Default: all.")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="New sweep folder. Default: a new one under runs/.")] = None,
    download: Download = False,
    resume: Resume = False,
    force: Force = False,
    cache: CacheDir = "auto",
    open_page: Open = False,
    as_json: Json = False,
):
    """Train a student for every setting of a grid, side by side: the teacher runs once for all of them.

    Example: kdistill sweep mnist --grid distillation_weight=0,0.1,...,1 --grid temperature=1,2,4,8,20
    """
    from kdistill.recipe.grid import axes
    from kdistill.recipe.loading import load_recipe

    options = folder_options(data_dir, out, download, resume, force, cache)
    settings = load_recipe(recipe, variant, [*teacher, *(set_ or []), *([f"seeds={seeds}"] if seeds else [])])
    axes(settings, grid or list(settings.grid))  # refuses a wrong grid before TensorFlow is imported
    import_tensorflow()
    from kdistill.report.sweep import pick_sentence, student_table
    from kdistill.runs.sweep import sweep as sweep_recipe

    result = sweep_recipe(settings, grid, together=together, **options, say=say_to(as_json))
    if as_json:
        print(json.dumps(result, indent=1))
        return
    show_table(*student_table(result))
    if result["verdict"]:
        show_lines(f"Best on validation: {result['best']}. {result['verdict']['sentence']}")
    if pick_sentence(result):
        show_lines(pick_sentence(result))
    if open_page:
        open_in_browser(Path(result["folder"], "sweep.html"))
