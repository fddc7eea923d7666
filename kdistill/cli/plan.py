"""`kdistill plan`."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import (
    CacheDir,
    DataDir,
    Download,
    Json,
    RecipeName,
    Settings,
    Strategy,
    Variant,
    WorkerTimeout,
    command,
    import_tensorflow,
    number,
    say_to,
    show_lines,
    show_table,
)
from kdistill.cli.teacher import takes_teacher


@command
@takes_teacher
def plan(
    recipe: RecipeName,
    teacher: list[str],
    variant: Variant = "default",
    set_: Settings = None,
    share: Annotated[
        float | None, number(0, 1, "Share of the epochs to train; a longer trial predicts better. Default: 0.1")
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, typer.Option(help="New folder for the trial's models and logs. Default: nothing is kept.")
    ] = None,
    download: Download = False,
    cache: CacheDir = "auto",
    strategy: Strategy = "auto",
    worker_timeout: WorkerTimeout = 120,
    as_json: Json = False,
):
    """Before a long run: a trial on a tenth of the epochs, and what to expect of 3, 5 and 10 seeds.

    Example: kdistill plan mnist --set temperature=8
    """
    from kdistill.recipe.loading import load_recipe

    settings = load_recipe(recipe, variant, [*teacher, *(set_ or [])])
    import_tensorflow()
    from kdistill.runs.plan import plan as plan_recipe

    options = {} if share is None else {"share": share}
    options |= {"data_dir": data_dir, "download": download, "cache": cache}
    options |= {"strategy": strategy, "worker_timeout": worker_timeout}
    # Keras prints its progress on standard output, which --json reserves for the result.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = plan_recipe(settings, out, **options, say=say_to(as_json))
    if not result:  # a worker other than the chief
        return
    if as_json:
        print(json.dumps(result, indent=1))
        return
    show_table(["model", "epochs", "of", "accuracy %", "s per fit", "s per fit of a run"], _cells(result))
    scatter = {name: f"{100 * value:.2g}" for name, value in result["scatter"].items()}
    show_lines(
        f"{result['trial']['sentence']} Standard deviation over seeds, for the test set: {scatter['difference']} "
        f"points of the difference, {scatter['control']} of the control.",
        *(f"- {line}" for line in result["lines"]),
    )


def _cells(result: dict) -> list[list[str]]:
    def cells(name: str, row: dict) -> list[str]:
        accuracies = " ".join(f"{100 * accuracy:.2f}" for accuracy in row["accuracy"])
        if not row["of"]:  # it comes trained
            return [name, "–", "–", accuracies, "–", "–"]
        seconds, full_seconds = ("–" if row[key] is None else f"{row[key]:,.0f}" for key in ("seconds", "full_seconds"))
        return [name, str(row["epochs"]), str(row["of"]), accuracies, seconds, full_seconds]

    return [cells(name, row) for name, row in result["models"].items()]
