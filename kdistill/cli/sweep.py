"""`kdistill sweep`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import CacheDir, DataDir, Download, Json, command, import_tensorflow, say_to, show_table
from kdistill.errors import InputError


@command
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `kdistill list`) or a .py file of your own.")],
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="key=v1,v2,... or key=0,0.1,...,1; may be repeated.")
    ] = None,
    variant: Annotated[str, typer.Option(help="A variant of the recipe.")] = "default",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. training.epochs=3.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Train every student with this many seeds.")] = None,
    together: Annotated[
        int | None, typer.Option(min=1, help="Students that train at the same time. Default: all.")
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="New sweep folder. Default: a new one under runs/.")] = None,
    download: Download = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the sweep in --out, exactly where it stopped.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Resume although recipe, grid or data have changed.")] = False,
    cache: CacheDir = "auto",
    as_json: Json = False,
):
    """Train a student for every setting of a grid, side by side: the teacher runs once for all of them.

    Example: kdistill sweep mnist --grid distillation_weight=0,0.1,...,1 --grid temperature=1,2,4,8,20
    """
    from kdistill.recipe.grid import axes
    from kdistill.recipe.loading import load_recipe

    if (resume and out is None) or (force and not resume):
        raise InputError("--resume expects --out, the folder of the sweep to continue; --force is for --resume.")
    settings = load_recipe(recipe, variant, [*(set_ or []), *([f"seeds={seeds}"] if seeds else [])])
    axes(settings, grid or list(settings.grid))  # refuses a wrong grid before TensorFlow is imported
    import_tensorflow()
    from kdistill.report.sweep import student_table
    from kdistill.runs.sweep import sweep as sweep_recipe

    options = {"data_dir": data_dir, "download": download, "resume": resume, "force": force, "cache": cache}
    result = sweep_recipe(settings, grid, out, together=together, **options, say=say_to(as_json))
    if as_json:
        print(json.dumps(result, indent=1))
        return
    show_table(*student_table(result))
    if result["verdict"]:
        print(f"Best on validation: {result['best']}. {result['verdict']['sentence']}")
