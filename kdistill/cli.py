"""The command line: arguments, messages and exit status only. 0 is success, 1 a failed check, 2 bad input."""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from kdistill.errors import CheckFailed, InputError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distils trained Keras models into small ones for phones, and proves what each is worth.",
    epilog="Examples: `kdistill run mnist` | `kdistill export student.keras --profile npu --out files` | "
    "`kdistill evaluate student.tflite`. `kdistill COMMAND --help` explains each.",
)

DataDir = Annotated[Path | None, typer.Option(help="Folder with the data set's own files (IDX, .npz).")]
Download = Annotated[bool, typer.Option("--download", help="Allow TensorFlow Datasets to download the data.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]


def import_tensorflow() -> None:
    """Imports TensorFlow without its start-up remarks, which TF_CPP_MIN_LOG_LEVEL no longer covers."""
    from kdistill.litert import quiet

    with quiet():
        import tensorflow as tf

        tf.config.list_physical_devices()
    tf.get_logger().setLevel("ERROR")


def _command(function: Callable) -> Callable:
    """Registers a command; a user's mistake or a failed check becomes one message and an exit status."""

    @wraps(function)
    def guarded(*args, **kwargs):
        try:
            function(*args, **kwargs)
        except InputError as error:
            print(f"Error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None
        except CheckFailed as error:
            print(f"Failed: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            print("Interrupted.", file=sys.stderr)
            raise typer.Exit(130) from None
        except OSError as error:
            print(f"Error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
            raise typer.Exit(2) from None

    return app.command(function.__name__.strip("_"))(guarded)


def _say(as_json: bool) -> Callable[[str], None]:
    """Progress goes to the screen, or to standard error where standard output is for a machine."""
    return lambda text: print(text, file=sys.stderr if as_json else sys.stdout, flush=True)


def _show(rows: list[dict], as_json: bool, result: dict | list) -> None:
    if as_json:
        print(json.dumps(result, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    from kdistill.report import table

    titles, cells = table(rows)
    shown = Table(*titles)
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in cells:
        shown.add_row(*row)
    # A terminal is as wide as it is; a file or a pipe gets lines that do not break.
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


@_command
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

    options = {"data_dir": data_dir, "download": download, "resume": resume, "force": force}
    result = run_recipe(chosen, out, **options, say=_say(as_json))
    _show(result["models"], as_json, result)
    if not as_json:
        print(result["verdict"]["sentence"])


def _data(name: str, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    from kdistill import data
    from kdistill.recipe import Data

    return data.load(Data(name), data_dir, download, say=say)


DataName = Annotated[str, typer.Option("--data", help="A data set's name.")]


@_command
def evaluate(
    model: Annotated[str, typer.Argument(help="A .keras or .tflite file.")],
    data: DataName = "mnist",
    data_dir: DataDir = None,
    download: Download = False,
    teacher: Annotated[str | None, typer.Option(help="A .keras or .tflite file to compare with.")] = None,
    as_json: Json = False,
):
    """Accuracy, agreement, calibration, size and latency of one model on the test images.

    Example: kdistill evaluate runs/mnist-default-1/npu/student.tflite --teacher runs/mnist-default-1/teacher.keras
    """
    from kdistill.evaluate import evaluate as measured
    from kdistill.evaluate import predict

    if any(name and not name.endswith(".tflite") for name in (model, teacher)):
        import_tensorflow()
    splits = _data(data, data_dir, download, _say(as_json))
    teacher_logits = predict(teacher, splits.test.images) if teacher else None
    row = {"name": Path(model).name, **measured(model, splits.test, teacher_logits=teacher_logits)}
    _show([row], as_json, row)


@_command
def benchmark(
    file: Annotated[Path, typer.Argument(help="A .tflite file.")],
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    as_json: Json = False,
):
    """Latency of a .tflite on this machine's CPU: the median and the 90th percentile of single images.

    Example: kdistill benchmark runs/mnist-default-1/npu/student.tflite --threads 2
    """
    from kdistill.litert import File

    result = File(file).latency(threads=threads)
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{file}: median {result['median_us']:.0f} µs, p90 {result['p90_us']:.0f} µs, {threads} thread(s)")


@_command
def export(
    model: Annotated[Path, typer.Argument(help="A .keras file.")],
    profile: Annotated[list[str] | None, typer.Option(help="A profile's name or .py file; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for <profile>/student.tflite.")] = Path("exports"),
    data: DataName = "mnist",
    data_dir: DataDir = None,
    download: Download = False,
    max_drop: Annotated[float | None, typer.Option(min=0, help="Accuracy it may lose, in points.")] = None,
    min_agreement: Annotated[float | None, typer.Option(min=0, max=100, help="Agreement it must have, in %.")] = None,
    as_json: Json = False,
):
    """Convert a Keras model to .tflite files, each checked against the model on the test images.

    Example: kdistill export student.keras --profile npu --profile phone_cpu --out files
    """
    from kdistill.loading import load_profile

    profiles = [load_profile(name) for name in profile or ["phone_cpu"]]
    import_tensorflow()
    from kdistill import models

    splits = _data(data, data_dir, download, _say(as_json))
    from kdistill.evaluate import evaluate as measured
    from kdistill.verify import export_checked

    student = models.load(str(model), splits.train.images.shape[1:], len(splits.class_names))
    limits = {
        "max_drop": None if max_drop is None else max_drop / 100,
        "min_agreement": None if min_agreement is None else min_agreement / 100,
    }
    rows, files = [], []
    for each in profiles:
        images, names = splits.train.images, splits.class_names
        files.append(export_checked(student, out / each.name, each, images, splits.test, class_names=names, **limits))
        rows.append({"name": each.name, **measured(files[-1]["path"], splits.test)})
    _show(rows, as_json, files)


@_command
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
