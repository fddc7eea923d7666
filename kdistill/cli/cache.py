"""`kdistill cache`: the teacher caches that runs share. Arguments and messages only."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import (
    DataDir,
    Download,
    Json,
    Ray,
    RayCpus,
    app,
    command,
    import_tensorflow,
    number,
    say_to,
    show_lines,
)
from kdistill.cli.teacher import takes_teacher
from kdistill.errors import CheckFailed, InputError

group = typer.Typer(no_args_is_help=True, help="Stored teacher outputs: build, verify, list, prune.")
app.add_typer(group, name="cache")
cache_command = partial(command, group=group)
Root = Annotated[
    Path | None, typer.Option("--cache", help="Folder of all caches. Default: $KDISTILL_CACHE or ~/.cache/kdistill.")
]
Key = Annotated[str | None, typer.Option(help="Only the cache whose key starts with this (see `kdistill cache list`).")]


@cache_command
@takes_teacher
def build(
    recipe: Annotated[str, typer.Argument(help="A recipe's name or a .py file of your own.")],
    teacher: list[str],
    variant: Annotated[str, typer.Option(help="A variant of the recipe.")] = "default",
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. cache.views=4.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    cache: Root = None,
    ray: Ray = None,
    ray_cpus: RayCpus = None,
    as_json: Json = False,
):
    """Fill the cache that runs of a recipe use with this teacher. Several processes can share the work.

    Example: kdistill cache build mnist --teacher runs/mnist-default-1/teacher.keras --set cache.views=4
    """
    from kdistill.recipe.loading import load_recipe

    settings = load_recipe(recipe, variant, [*teacher, *(set_ or [])])
    if not settings.teacher.file:
        raise InputError("cache build expects a trained teacher. Give --teacher, its file.")
    import_tensorflow()
    from kdistill.runs.teaching import fill_alone, of_recipe
    from kdistill.teachers import cache_choice
    from kdistill.training.ray_tasks import connected

    say = say_to(as_json)
    stored, views = of_recipe(settings, data_dir, download, cache, say)
    needed, missing = stored.bytes(views), stored.missing(views, say)
    say(
        f"{views} views, {cache_choice.human_size(needed)} in {stored.root}; {missing:.3g} passes over "
        f"{len(stored.splits.train):,} images are missing."
    )
    started = time.perf_counter()
    with connected(ray, ray_cpus, say) as cluster:
        if cluster and missing:
            own = settings, data_dir and data_dir.resolve(), download, stored.root.resolve()
            cluster.run({f"process {place + 1}": (fill_alone, own) for place in range(cluster.slots)})
    stored.build(views, say)
    seconds = time.perf_counter() - started
    if as_json:
        keys = {"train": stored.train.key, "validation": stored.validation.key}
        print(json.dumps({"keys": keys, "views": views, "bytes": needed, "passes": missing, "seconds": seconds}))
    else:
        show_lines(f"Filled in {seconds:.1f} s: {stored.train.path}")


@cache_command
def verify(cache: Root = None, key: Key = None, as_json: Json = False):
    """Compare every part with its checksum. Exit status 1 if one is damaged; the next run computes it again."""
    from kdistill import files
    from kdistill.teachers import cache as teachers_cache

    root = cache or files.cache_root()
    rows = teachers_cache.verify_caches(root, key)
    if not rows and cache is not None:
        raise InputError(f"'{root}' holds no teacher cache to verify. Give --cache the folder of all caches.")
    _show(rows, as_json)
    damaged = [f"{row['key']}/{name} ({reason})" for row in rows for name, reason in row["reasons"].items()]
    if damaged:
        raise CheckFailed(f"{len(damaged)} damaged parts, which the next run computes again: {', '.join(damaged)}")


@cache_command
def list_(cache: Root = None, as_json: Json = False):
    """The caches, their size, and when they were last used."""
    from kdistill import files
    from kdistill.teachers import cache as teachers_cache

    _show(teachers_cache.list_caches(cache or files.cache_root()), as_json)


@cache_command
def prune(
    cache: Root = None,
    key: Key = None,
    days: Annotated[float | None, number(0, 36_500, "Only caches not used for this many days.")] = None,
    as_json: Json = False,
):
    """Delete one cache (--key), or those not used for some days (--days).

    Example: kdistill cache prune --days 30
    """
    from kdistill import files
    from kdistill.teachers import cache as teachers_cache

    if key is None and days is None:
        raise InputError("cache prune expects --key or --days (0 deletes all).")
    deleted = teachers_cache.prune_caches(cache or files.cache_root(), key, days)
    _show(deleted, as_json)
    if not as_json:
        print(f"Deleted {len(deleted)} caches.")


def _show(rows: list[dict], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        age = (time.time() - row["used"]) / 86400
        damaged = f", {len(row['damaged'])} damaged" if row.get("damaged") else ""
        origin = ", ".join(file["file"] for file in row["teacher_files"])
        show_lines(
            f"{row['key']}  {row['split']:<10} {row['views']:>3} views {row['bytes'] / 1e6:>10,.1f} MB{damaged}  used "
            f"{age:.1f} days ago  teacher {row['teacher']}{f' from {origin}' if origin else ''}, {row['data']}"
        )
