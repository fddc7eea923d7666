"""`kdistill list` and `kdistill new`: the recipes and profiles that ship, and recipes of one's own."""

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kdistill.cli.app import Json, command
from kdistill.errors import InputError
from kdistill.files import atomic_file

TEMPLATES = Path(__file__).parent / "templates"


class Kind(StrEnum):
    """What `kdistill new` writes: a recipe for images of a kind, or a profile."""

    image_folder = "image_folder"
    npz = "npz"
    profile = "profile"


@command
def list_(as_json: Json = False):
    """List the recipes and export profiles that ship with kdistill."""
    from importlib import import_module

    from kdistill.recipe.loading import names

    lines = {
        package: {name: _first_line(import_module(f"kdistill.{package}.{name}").__doc__) for name in names(package)}
        for package in ("recipes", "exports")
    }
    if as_json:
        print(json.dumps(lines, indent=1))
        return
    for package, title in (("recipes", "Recipes"), ("exports", "Export profiles")):
        print(title)
        for name, line in lines[package].items():
            print(f"  {name:<14} {line}")


@command
def new(
    name: Annotated[str, typer.Argument(help="The name of the recipe or profile: letters, digits and _.")],
    kind: Annotated[Kind, typer.Option(help="image_folder, npz (recipes for images of your own), or profile.")] = (
        Kind.image_folder
    ),
):
    """Write a commented recipe for images of your own, or an export profile, as NAME.py in this folder.

    Example: kdistill new flowers, then kdistill run flowers.py --data-dir FOLDER
    """
    if not name.isidentifier():
        raise InputError(f"A name is letters, digits and _, and does not start with a digit; received '{name}'.")
    path = Path(f"{name}.py")
    if os.path.lexists(path):
        raise InputError(f"'{path}' exists. Choose another name, or remove the file.")
    with atomic_file(path) as file:
        file.write_bytes((TEMPLATES / f"{kind.value}.py.txt").read_text().replace("NAME", name).encode())
    use = {
        Kind.profile: f"kdistill export student.keras --profile {path}",
        Kind.image_folder: f"kdistill run {path} --data-dir FOLDER (with train/CLASS and val/CLASS or test/CLASS)",
        Kind.npz: f"kdistill run {path} --data-dir DATA.npz (with x_train, y_train, x_test, y_test)",
    }
    print(f"Written: {path}. Use it: {use[kind]}")


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]  # python -OO drops the texts
