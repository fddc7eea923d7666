"""The options --teacher and --teacher-... of the commands that distill, as settings of a recipe."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, get_args, get_origin

import typer

from kdistill.errors import InputError
from kdistill.recipe import Network, Recipe

HELP = (
    "The trained teacher: .keras, .h5, SavedModel folder, .tflite, .onnx, .py with predict(images), .npz, or an "
    "http(s):// address."
)
# Option -> (kind, help); `--teacher-mean` sets `teacher.mean` of the recipe.
OPTIONS = {
    "python": (str, "The Python that runs a .py, .onnx or SavedModel, of an environment of its own."),
    "timeout": (float, "Seconds for its start and for each batch. Default: 120"),
    "size": (str, "HEIGHTxWIDTH of its images. Default: as its file states."),
    "channels": (int, "1 or 3. Default: as its file states."),
    "bgr": (bool, "It takes blue, green, red."),
    "scale": (float, "It takes (pixel * scale - mean) / std."),
    "mean": (str, "One number, or three with commas."),
    "std": (str, "As --teacher-mean; 255 for pixels / 255."),
    "layout": (str, "channels_last or channels_first. Default: as its file states."),
    "outputs": (str, "What it gives: logits or probabilities. Default: its numbers show it."),
    "output": (str, "The name of the output that classifies, of several."),
    "classes": (str, "The places of the data's classes among its own: 3,0,7"),
}


def takes_teacher(function: Callable) -> Callable:
    """Adds the options to a command, which gets them as `teacher`: settings such as `teacher.mean=127.5`.

    If the parameter `teacher` is an argument of the command, not an option, the first item is its text as it is.
    """
    signature = inspect.signature(function)
    argument = signature.parameters["teacher"].annotation
    is_argument = get_origin(argument) is Annotated
    own = {
        f"teacher_{name}": inspect.Parameter(
            f"teacher_{name}",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, typer.Option(f"--teacher-{name}", help=text)],
        )
        for name, (kind, text) in OPTIONS.items()
    }
    annotation = Annotated[str | None, typer.Option("--teacher", help=HELP)]
    first = inspect.Parameter("teacher", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    if is_argument:
        first = first.replace(default=inspect.Parameter.empty, annotation=Annotated[str, *get_args(argument)[1:]])
    plain = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
        if name != "teacher"
    ]

    @wraps(function)
    def command(**arguments):
        given = {name: arguments.pop(f"teacher_{name}") for name in OPTIONS}
        file = arguments["teacher"]
        of_teacher = [file, *settings(None, given)] if is_argument else settings(file, given)
        return function(**{**arguments, "teacher": of_teacher})

    command.__signature__ = signature.replace(parameters=[*plain, first, *own.values()])
    command.__annotations__ = {
        name: parameter.annotation for name, parameter in command.__signature__.parameters.items()
    }
    return command


def settings(file: str | None, given: dict) -> list[str]:
    """The settings of a recipe: its teacher comes from this file, and is neither built nor trained."""
    values = {name: value for name, value in given.items() if value is not None}
    if file is None:
        return [f"teacher.{name}={_text(value)}" for name, value in values.items()]
    return [*settings_of_file(file), *(f"teacher.{name}={_text(v)}" for name, v in values.items())]


def settings_of_file(file: str) -> list[str]:
    """The settings of a recipe whose teacher is this file. Raises `InputError` if it is missing."""
    if not file.startswith(("http://", "https://")) and not Path(file).exists():
        raise InputError(f"There is no file '{file}'. Check the path of --teacher.")
    return ["teacher.weights=", f"teacher.file={file}"]


def network_of(teacher: list[str]) -> Network:
    """The settings as the network of a command without a recipe."""
    from kdistill.recipe.overrides import override

    plain = Network("teacher")
    network = override(Recipe("command", plain, plain), teacher).teacher
    if network.file is None:
        raise InputError("--teacher-... expects --teacher, the file of the teacher.")
    return network


def _text(value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
