"""`kdistill cache`: the teacher caches that runs share. Arguments and messages only."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import DataDir, Download, Json, app, command, import_tensorflow, say_to
from kdistill.errors import CheckFailed, InputError

group = typer.Typer(no_args_is_help=True, help="Stored teacher outputs: build, verify, list, prune.")
app.add_typer(group, name="cache")
of_group = partial(command, group=group)
Root = Annotated[
    Path | None, typer.Option("--cache", help="Folder of all caches. Default: $KDISTILL_CACHE or ~/.cache/kdistill.")
]
Key = Annotated[str | None, typer.Option(help="Only the cache whose key starts so (see `kdistill cache list`).")]


@of_group
def build(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a .py file of your own.")],
    teacher: Annotated[Path | None, typer.Option(help="The trained teacher, a .keras file.")] = None,
    variant: Annotated[str, typer.Option(help="A variant of the recipe.")] = "default",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. cache.views=4.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    cache: Root = None,
    as_json: Json = False,
):
    """Fill the cache that runs of a recipe with this teacher use. Start it several times to share the work.

    Example: kdistill cache build mnist --teacher runs/mnist-default-1/teacher.keras --set cache.views=4
    """
    from kdistill.recipe.loading import load_recipe

    chosen = load_recipe(recipe, variant, [*(set_ or []), *([f"teacher.file={teacher}"] if teacher else [])])
    if not chosen.teacher.file:
        raise InputError("There is no trained teacher to take outputs from. Give --teacher, the .keras file of one.")
    import_tensorflow()
    from kdistill.teachers import replay

    say = say_to(as_json)
    found, views = replay.of_recipe(chosen, data_dir, download, cache, say)
    needed, missing = found.bytes(views), found.missing(views, say)
    say(
        f"{views} views, {replay.human(needed)} in {found.root}; {missing:.3g} passes over "
        f"{len(found.splits.train):,} images have still to be computed."
    )
    started = time.perf_counter()
    found.build(views, say)
    seconds = time.perf_counter() - started
    if as_json:
        keys = {"train": found.train.key, "validation": found.validation.key}
        print(json.dumps({"keys": keys, "views": views, "bytes": needed, "passes": missing, "seconds": seconds}))
    else:
        print(f"Filled in {seconds:.1f} s: {found.train.path}")


@of_group
def verify(cache: Root = None, key: Key = None, as_json: Json = False):
    """Compare every part with its checksum; exit status 1 if one is damaged (a run would compute it again)."""
    from kdistill import files
    from kdistill.teachers import cache as teachers_cache

    rows = teachers_cache.verified(cache or files.cache_root(), key)
    _show(rows, as_json)
    damaged = [f"{row['key']}/{name}" for row in rows for name in row["damaged"]]
    if damaged:
        raise CheckFailed(f"{len(damaged)} damaged parts, to be computed again when next used: {', '.join(damaged)}")


@of_group
def list_(cache: Root = None, as_json: Json = False):
    """The caches, their size, and when they were last used."""
    from kdistill import files
    from kdistill.teachers import cache as teachers_cache

    _show(teachers_cache.listed(cache or files.cache_root()), as_json)


@of_group
def prune(
    cache: Root = None,
    key: Key = None,
    days: Annotated[float | None, typer.Option(min=0, help="Only those not used for so many days.")] = None,
    as_json: Json = False,
):
    """Delete one cache (--key), or those that were not used for some days (--days).

    Example: kdistill cache prune --days 30
    """
    from kdistill import files
    from kdistill.teachers import cache as teachers_cache

    if key is None and days is None:
        raise InputError("cache prune expects --key or --days (0 deletes all).")
    gone = teachers_cache.pruned(cache or files.cache_root(), key, days)
    _show(gone, as_json)
    if not as_json:
        print(f"Deleted {len(gone)} caches.")


def _show(rows: list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        age = (time.time() - row["used"]) / 86400
        damaged = f", {len(row['damaged'])} damaged" if row.get("damaged") else ""
        print(
            f"{row['key']}  {row['split']:<10} {row['views']:>3} views {row['bytes'] / 1e6:>10,.1f} MB{damaged}  used "
            f"{age:.1f} days ago  teacher {row['teacher']}, {row['data']}"
        )
