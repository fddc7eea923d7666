"""`kdistill run`."""

import contextlib
import sys
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
    Ray,
    RayCpus,
    RecipeName,
    Resume,
    Settings,
    Strategy,
    Variant,
    WorkerTimeout,
    command,
    fail_if_refused,
    folder_options,
    import_tensorflow,
    number,
    say_to,
    show,
    show_report,
)
from kdistill.cli.teacher import takes_teacher
from kdistill.errors import InputError

MOST_TOGETHER = 10_000  # as the settings of a grid


@command
@takes_teacher
def run(
    recipe: RecipeName,
    teacher: list[str],
    variant: Variant = "default",
    set_: Settings = None,
    seeds: Annotated[
        str | None, typer.Option(help="Number of seeds; 3..10 adds seeds until the verdict is clear.")
    ] = None,
    margin: Annotated[float | None, number(0, 100, "Points that the verdict counts as equal. Default: 0.2")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="New run folder. Default: a new one under runs/.")] = None,
    download: Download = False,
    resume: Resume = False,
    force: Force = False,
    cache: CacheDir = "auto",
    strategy: Strategy = "auto",
    worker_timeout: WorkerTimeout = 120,
    together: Annotated[
        str, typer.Option(help="Controls and students of several seeds that train at a time: a number, or auto.")
    ] = "auto",
    ray: Ray = None,
    ray_cpus: RayCpus = None,
    profile: Annotated[bool, typer.Option("--profile", help="Record a trace of some steps for TensorBoard.")] = False,
    open_page: Open = False,
    as_json: Json = False,
):
    """Run a recipe from data to report: teacher, control, student, files.

    --teacher replaces the recipe's teacher by a trained one of any format, see docs/teachers.md.

    Example: kdistill run mnist --set temperature=8 --out runs/t8
    """
    from kdistill.recipe.loading import load_recipe

    options = folder_options(data_dir, out, download, resume, force, cache)
    settings = load_recipe(
        recipe, variant, [*teacher, *(set_ or []), *_seed_settings(seeds), *_margin_settings(margin)]
    )
    import_tensorflow()
    from kdistill.runs.run import run as run_recipe

    options |= {"strategy": strategy, "worker_timeout": worker_timeout, "profile": profile}
    options |= {"together": _number_together(together), "ray": ray, "ray_cpus": ray_cpus}
    # Keras prints its progress on standard output, which --json reserves for the result.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = run_recipe(settings, **options, say=say_to(as_json))
    if "models" not in result:  # a worker other than the chief
        return
    if as_json:
        show(result["models"], as_json, result)
    else:
        show_report(result, open_page)
    fail_if_refused(result["refused"], Path(result["folder"], "report.html"))


def _seed_settings(text: str | None) -> list[str]:
    """`5` -> seeds=5, `3..10` -> seeds=3 and max_seeds=10."""
    if text is None:
        return []
    first, dots, last = text.partition("..")
    if not first.isdecimal() or (dots and not last.isdecimal()):
        raise InputError(f"--seeds expects a number, or two as in 3..10, received '{text}'.")
    return [f"seeds={first}", f"max_seeds={last if dots else 'none'}"]


def _number_together(text: str) -> int | None:
    if text != "auto" and not (text.isdecimal() and len(text) < 6 and 1 <= int(text) <= MOST_TOGETHER):
        raise InputError(f"--together expects a number from 1 to {MOST_TOGETHER:,}, or auto, received '{text}'.")
    return None if text == "auto" else int(text)


def _margin_settings(points: float | None) -> list[str]:
    return [] if points is None else [f"margin={points / 100}"]
