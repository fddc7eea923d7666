"""The command line: arguments, messages and exit status only. 0 is success, 1 a failed check, 2 bad input."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdistill import cli_cache, cli_files, cli_report  # noqa: F401  (their commands register themselves)
from kdistill.cli_base import (
    CacheDir,
    DataDir,
    Download,
    Json,
    app,
    command,
    import_tensorflow,
    say_to,
    show,
    show_table,
)
from kdistill.errors import InputError


@command
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `kdistill list`) or a .py file of your own.")],
    variant: Annotated[str, typer.Option(help="A variant of the recipe.")] = "default",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. training.epochs=3.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Train control and student for so many seeds.")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="New run folder. Default: a new one under runs/.")] = None,
    download: Download = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, exactly where it was.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Resume although recipe or data have changed.")] = False,
    cache: CacheDir = "auto",
    strategy: Annotated[
        str, typer.Option(help="auto, none, mirrored (all GPUs), multiworker (TF_CONFIG). Batches stay global.")
    ] = "auto",
    worker_timeout: Annotated[
        float, typer.Option(min=0, help="Seconds that a worker waits for the others, with multiworker.")
    ] = 120,
    profile: Annotated[bool, typer.Option("--profile", help="Record a trace of some steps for TensorBoard.")] = False,
    as_json: Json = False,
):
    """Run a recipe from data to report: teacher, control, student, files.

    Example: kdistill run mnist --set temperature=8 --out runs/t8
    """
    from kdistill.loading import load_recipe

    if (resume and out is None) or (force and not resume):
        raise InputError("--resume expects --out, the folder of the run to go on with; --force goes with --resume.")
    chosen = load_recipe(recipe, variant, [*(set_ or []), *([f"seeds={seeds}"] if seeds else [])])
    import_tensorflow()
    from kdistill.run import run as run_recipe

    options = {"data_dir": data_dir, "download": download, "resume": resume, "force": force, "cache": cache}
    options |= {"strategy": strategy, "worker_timeout": worker_timeout, "profile": profile}
    # Keras prints its progress on standard output, which may be for a machine.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = run_recipe(chosen, out, **options, say=say_to(as_json))
    if "models" not in result:  # a worker that is not the chief
        return
    show(result["models"], as_json, result)
    if not as_json:
        print(result["verdict"]["sentence"])


@command
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (see `kdistill list`) or a .py file of your own.")],
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="key=v1,v2,... or key=0,0.1,...,1; may be repeated.")
    ] = None,
    variant: Annotated[str, typer.Option(help="A variant of the recipe.")] = "default",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. training.epochs=3.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Train every student for so many seeds.")] = None,
    together: Annotated[int | None, typer.Option(min=1, help="Train so many students at a time. Default: all.")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="New sweep folder. Default: a new one under runs/.")] = None,
    download: Download = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in --out, exactly where it was.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Resume although recipe, grid or data have changed.")] = False,
    cache: CacheDir = "auto",
    as_json: Json = False,
):
    """Train a student for every setting of a grid, side by side: the teacher runs once for all of them.

    Example: kdistill sweep mnist --grid distillation_weight=0,0.1,...,1 --grid temperature=1,2,4,8,20
    """
    from kdistill.grid import axes
    from kdistill.loading import load_recipe

    if (resume and out is None) or (force and not resume):
        raise InputError("--resume expects --out, the folder of the sweep to go on with; --force goes with --resume.")
    chosen = load_recipe(recipe, variant, [*(set_ or []), *([f"seeds={seeds}"] if seeds else [])])
    axes(chosen, grid or list(chosen.grid))  # a mistake in the grid is told before TensorFlow is imported
    import_tensorflow()
    from kdistill.sweep import sweep as sweep_recipe
    from kdistill.sweep_report import rows

    options = {"data_dir": data_dir, "download": download, "resume": resume, "force": force, "cache": cache}
    result = sweep_recipe(chosen, grid, out, together=together, **options, say=say_to(as_json))
    if as_json:
        print(json.dumps(result, indent=1))
        return
    show_table(*rows(result))
    if result["verdict"]:
        print(f"Best on validation: {result['best']}. {result['verdict']['sentence']}")


@command
def list_(as_json: Json = False):
    """The recipes and the export profiles that ship with kdistill."""
    from importlib import import_module

    from kdistill.loading import names

    found = {
        package: {
            name: import_module(f"kdistill.{package}.{name}").__doc__.partition("\n")[0] for name in names(package)
        }
        for package in ("recipes", "exports")
    }
    if as_json:
        print(json.dumps(found, indent=1))
        return
    for package, title in (("recipes", "Recipes"), ("exports", "Export profiles")):
        print(title)
        for name, line in found[package].items():
            print(f"  {name:<14} {line}")


def main() -> None:
    """The entry point of the `kdistill` command."""
    app()


if __name__ == "__main__":
    main()
