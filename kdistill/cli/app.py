"""What the commands share: the app, options, messages, exit status (0 success, 1 a failed check, 2 bad input)."""

import contextlib
import json
import math
import os
import shutil
import sys
import warnings
import webbrowser
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli import surroundings
from kdistill.errors import CheckFailed, InputError
from kdistill.recipe.checks import MOST
from kdistill.recipe.objective import LARGEST

WIDE = 110  # characters of a screen that shows all columns of the table of models
MAIN_COLUMNS = ("model", "accuracy %", "agreement %", "parameters", "bytes", "µs/image")

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distills trained Keras models into small ones for phones, and measures what each is worth.",
    epilog="Examples: `kdistill run mnist` | `kdistill export student.keras --profile npu --out files` | "
    "`kdistill evaluate student.tflite`. `kdistill COMMAND --help` explains each.",
)


def _recipe_names(incomplete: str) -> list[str]:
    from kdistill.recipe.loading import names

    files = (str(path) for path in Path().glob("*.py"))
    return [name for name in (*names("recipes"), *files) if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        help="A recipe's name (see `kdistill list`) or a .py file of your own.", autocompletion=_recipe_names
    ),
]
Variant = Annotated[str, typer.Option(help="A variant of the recipe.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="key=value, e.g. training.epochs=3.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue in the folder --out, exactly where it stopped.")]
Force = Annotated[bool, typer.Option("--force", help="Resume although recipe, grid or data have changed.")]
Strategy = Annotated[
    str, typer.Option(help="auto, none, mirrored (all GPUs), multiworker (TF_CONFIG). Batches stay global.")
]


def number(low: float | None, high: float, help: str):
    """An option that is a number, or numbers, from `low` to `high`. Click lets NaN through, which is refused here."""

    def finite(value):
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is not None and not math.isfinite(each):
                raise typer.BadParameter(f"expects a finite number, received {each}.")
        return value

    return typer.Option(min=low, max=high, callback=finite, help=help)


Ray = Annotated[str | None, typer.Option(help="Train in processes of a Ray cluster: auto, or HOST:PORT of its head.")]
RayCpus = Annotated[int | None, number(1, 4096, "Cores of each process of --ray. Default: all of a machine.")]
WorkerTimeout = Annotated[float, number(0, 7 * 86400, "Seconds that a worker waits for the others, with multiworker.")]
ImageSize = Annotated[
    int | None,
    number(1, MOST["image_size"], "Images of --data image_folder and imagenet are cropped and resized to this size."),
]
DataName = Annotated[str, typer.Option("--data", help="A data set's name.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with the data set's files (IDX, .npz, images).")]
CacheDir = Annotated[str, typer.Option(help="Teacher cache: off, auto (where it saves time), or its folder.")]
Download = Annotated[bool, typer.Option("--download", help="Allow TensorFlow Datasets to download the data.")]
Open = Annotated[bool, typer.Option("--open", help="Open the report in a browser at the end.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for machines.")]
Mean = Annotated[
    list[float] | None,
    number(-LARGEST, LARGEST, "The model was trained on (pixel - mean) / std. Three times for three channels."),
]
Std = Annotated[list[float] | None, number(0, LARGEST, "As --mean; 255 for a model that was trained on pixels / 255.")]


def import_tensorflow() -> None:
    """Imports TensorFlow without its messages at start-up, some of which ignore TF_CPP_MIN_LOG_LEVEL."""
    from kdistill.tflite.interpreter import quiet

    surroundings.check_keras()
    with quiet():
        import tensorflow as tf

        tf.config.list_physical_devices()
    tf.get_logger().setLevel("ERROR")
    import keras

    if keras.config.image_data_format() != "channels_last":
        raise InputError(
            "Keras is set to image_data_format 'channels_first'; kdistill expects 'channels_last'. Change it in "
            "keras.json, in the folder .keras of your home."
        )


def command(function: Callable, group: typer.Typer = app) -> Callable:
    """Registers a command. A user's mistake or a failed check becomes one message and an exit status."""

    @wraps(function)
    def guarded(*args, **kwargs):
        surroundings.prepare_streams()
        try:
            surroundings.check_temporary_folder()
            with _warnings_as_messages(), surroundings.sigterm_as_interrupt():
                function(*args, **kwargs)
                sys.stdout.flush()
        except InputError as error:
            raise _end(f"Error: {error}", 2) from None
        except CheckFailed as error:
            raise _end(f"Failed: {error}", 1) from None
        except surroundings.Terminated:
            raise _end(f"Terminated.{surroundings.how_to_go_on(kwargs)}", surroundings.TERMINATED) from None
        except KeyboardInterrupt:
            raise _end(f"Interrupted.{surroundings.how_to_go_on(kwargs)}", surroundings.INTERRUPTED) from None
        except BrokenPipeError:
            surroundings.drop_output()
            raise typer.Exit(surroundings.BROKEN_PIPE) from None
        except OSError as error:
            raise _end(f"Error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), 2) from None

    return group.command(function.__name__.strip("_"))(guarded)


def _end(message: str, status: int) -> typer.Exit:
    """Prints a message, and returns the exception that ends the command."""
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed, or a broken pipe
        print_in_color(message, "red")
    return typer.Exit(status)


def print_in_color(message: str, color: str) -> None:
    """Prints a message on standard error, its first word in color if that is a terminal and NO_COLOR is not set."""
    word, colon, text = surroundings.printable(message).partition(":")
    colored = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    typer.echo(f"{typer.style(word + colon, fg=color, bold=True)}{text}", err=True, color=colored)


@contextlib.contextmanager
def _warnings_as_messages():
    """Shows warnings for users of the Python API as a line of the command, without a place in the code."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *place, **more: print_in_color(f"Warning: {message}", "yellow")
        yield


def say_to(as_json: bool) -> Callable[[str], None]:
    """Prints progress on standard output, or on standard error with --json."""
    return lambda text: print(surroundings.printable(str(text)), file=sys.stderr if as_json else sys.stdout, flush=True)


def show_lines(*lines: str) -> None:
    """Prints lines of a result; control characters in names from files are escaped."""
    for line in lines:
        print(surroundings.printable_line(line))


def show(rows: list[dict], as_json: bool, result: dict | list) -> None:
    """The table of models or files, or `result` as JSON."""
    if as_json:
        print(json.dumps(result, indent=1))
        return
    from kdistill.report.markdown import model_table

    titles, cells = model_table(rows)
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDE:
        places = [place for place, title in enumerate(titles) if title in MAIN_COLUMNS]
        titles, cells = [titles[place] for place in places], [[row[place] for place in places] for row in cells]
    show_table(titles, cells)


def show_report(report: dict, open_page: bool = False) -> None:
    """The end of a run on one screen: the table, the verdict in plain words, its sentence, hints, and the page."""
    from kdistill.report import advice

    show(report["models"], False, report)
    if report.get("verdict"):
        show_lines(f"{advice.headline(report['verdict'])}.", report["verdict"]["sentence"])
    show_lines(*(f"- {hint}" for hint in advice.hints(report)))
    if open_page:
        open_in_browser(Path(report["folder"], "report.html"))


def open_in_browser(page: Path) -> None:
    """Opens a page; without a browser, a warning names the file."""
    if not webbrowser.open(page.resolve().as_uri()):
        print_in_color(f"Warning: There is no browser here. Open '{page}' on another machine.", "yellow")


def folder_options(
    data_dir: Path | None, out: Path | None, download: bool, resume: bool, force: bool, cache: str
) -> dict:
    """The options that `runs.run.run` and `runs.sweep.sweep` share. Raises `InputError` for what makes no sense."""
    if (resume and out is None) or (force and not resume):
        raise InputError("--resume expects --out, the folder to continue; --force is for --resume.")
    return {
        "out": out,
        "data_dir": data_dir,
        "download": download,
        "resume": resume,
        "force": force,
        "cache": cache,
    }


def fail_if_refused(refused: list[dict], report: Path) -> None:
    """Ends the command with exit status 1 if files are refused; `refused`: rows of a report."""
    if refused:
        names = ", ".join(row["name"] for row in refused)
        raise CheckFailed(
            f"{len(refused)} file{'s are' if len(refused) > 1 else ' is'} refused and not written: {names}. The "
            f"reasons are above and in '{report}'."
        )


def show_table(titles: list[str], cells: list[list[str]]) -> None:
    """A table on the screen; the first column is left-aligned. What cells hold is text, never codes or markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    screen_table = Table()
    for place, title in enumerate(titles):
        alignment = "right" if place else "left"  # a name on two lines looks like two
        screen_table.add_column(Text(surroundings.printable_line(title)), justify=alignment, no_wrap=not place)
    for row in cells:
        screen_table.add_row(*(Text(surroundings.printable_line(cell)) for cell in row))
    # Lines must not break in a file or a pipe, which have no width.
    Console(width=None if sys.stdout.isatty() else 120).print(screen_table)


def data_of(
    name: str, data_dir: Path | None, download: bool, say: Callable[[str], None], image_size: int | None = None
):
    """The splits of a data set. `image_size`: of one whose images are in files, which are cropped and resized."""
    from kdistill.data import splits
    from kdistill.recipe import Data

    if image_size is None and name in splits.ENCODED:
        raise InputError(f"--data {name} expects --image-size, the size of the model's images, such as 224.")
    return splits.load(Data(name, image_size=image_size), data_dir, download, say=say)
