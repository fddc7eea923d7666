"""The commands that search: `kdistill sweep` over settings, `kdistill shrink` over students within a budget."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import (
    CacheDir,
    DataDir,
    DataName,
    Download,
    Force,
    ImageSize,
    Json,
    Open,
    Ray,
    RayCpus,
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
from kdistill.cli.teacher import network_of, settings_of_file, takes_teacher
from kdistill.errors import InputError
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
    ray: Ray = None,
    ray_cpus: RayCpus = None,
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

    options |= {"together": together, "ray": ray, "ray_cpus": ray_cpus}
    result = sweep_recipe(settings, grid, **options, say=say_to(as_json))
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


@command
@takes_teacher
def shrink(
    teacher: Annotated[
        list[str], typer.Argument(help="The trained teacher, a file of any format, or shipped:mnist_cnn.")
    ],
    data: DataName = "mnist",
    data_dir: DataDir = None,
    image_size: ImageSize = None,
    profile: Annotated[str, typer.Option(help="An export profile's name or .py file.")] = "npu",
    max_bytes: Annotated[str | None, typer.Option(help="Of the file: 16kB, 64KiB, 16000.")] = None,
    max_us: Annotated[str | None, typer.Option(help="For one image on this machine: 800us, 20ms.")] = None,
    max_arena: Annotated[str | None, typer.Option(help="Memory at run time, as TFLite Micro plans it: 32kB.")] = None,
    min_accuracy: Annotated[
        float | None, number(0, 100, "In %, on the test examples; the command fails below.")
    ] = None,
    hours: Annotated[float | None, number(0, 10_000, "The whole search takes no longer.")] = None,
    student: Annotated[
        str | None, typer.Option(help="FILE.py:FUNCTION of width and depth, in place of the families.")
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option(help="small_cnn, ds_cnn, resnet, conv1d, dense, teacher (made narrower); repeated."),
    ] = None,
    seeds: Annotated[int, number(1, MOST["seeds"], "Of the winner and its control.")] = 3,
    set_: Settings = None,
    out: Annotated[Path | None, typer.Option(help="New folder. Default: a new one under runs/.")] = None,
    download: Download = False,
    resume: Resume = False,
    cache: CacheDir = "auto",
    together: Annotated[int | None, number(1, 10_000, "Students that train at the same time. Default: all.")] = None,
    open_page: Open = False,
    as_json: Json = False,
):
    """Find the best student whose file fits a budget of bytes, memory and time, and prove what it is worth.

    Students are converted before they train, so that only what fits is trained; validation picks, and a run with
    several seeds and a control measures the winner once on the test images.

    Example: kdistill shrink shipped:mnist_cnn --profile npu --max-bytes 16kB
    """
    if resume and out is None:
        raise InputError("--resume expects --out, the folder to continue.")
    budget = {"max_bytes": max_bytes, "max_us": max_us, "max_arena": max_arena, "hours": hours or None}
    budget["min_accuracy"] = None if min_accuracy is None else min_accuracy / 100
    from kdistill.shrinking.budget import read_budget
    from kdistill.shrinking.template import SHIPPED

    limits = read_budget(budget)
    name, *its_settings = teacher
    network = SHIPPED.get(name, name)
    if its_settings:
        network = network_of([*settings_of_file(name), *its_settings])
    import_tensorflow()
    from kdistill.report.shrink import pareto_table, summary
    from kdistill.shrinking.shrink import shrink as search

    settings = [*([] if image_size is None else [f"data.image_size={image_size}"]), *(set_ or [])]
    options = {"out": out, "data_dir": data_dir, "download": download, "resume": resume, "cache": cache}
    options |= {"student": student, "families": family or (), "seeds": seeds, "together": together}
    # Keras prints its progress on standard output, which --json reserves for the result.
    with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
        result = search(network, data, profile, limits, settings=settings, **options, say=say_to(as_json))
    if as_json:
        print(json.dumps(result, indent=1))
        return
    show_table(*pareto_table(result))
    show_lines(*summary(result))
    if open_page:
        open_in_browser(Path(result["folder"], "shrink.html"))
