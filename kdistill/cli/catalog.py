"""`kdistill list`."""

import json

from kdistill.cli.app import Json, command


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


def _first_line(text: str | None) -> str:
    return (text or "").partition("\n")[0]  # python -OO drops the texts
