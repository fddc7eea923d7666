"""Recipes and profiles by name, or from a user's own file."""

import importlib.util
import pkgutil
import uuid
from importlib import import_module
from pathlib import Path
from types import ModuleType

from kdistill.errors import InputError, unknown
from kdistill.recipe.checks import checked
from kdistill.recipe.overrides import override
from kdistill.recipe.values import Profile, Recipe


def names(package: str) -> list[str]:
    """The names of what ships in `kdistill.recipes` or `kdistill.exports`."""
    return sorted(module.name for module in pkgutil.iter_modules(import_module(f"kdistill.{package}").__path__))


def load_recipe(name_or_path: str, variant: str = "default", overrides: list[str] | None = None) -> Recipe:
    """The recipe of this name, or of a `.py` file that defines `recipe(variant)`, with `key=value` overrides on it."""
    module = _module(name_or_path, "recipes", "recipe")
    try:
        recipe = module.recipe(variant)
    except KeyError as error:
        if error.args != (variant,):
            raise _failed("recipe", name_or_path, error) from error
        raise InputError(
            f"Unknown variant '{variant}' of recipe '{name_or_path}'. {' '.join((module.recipe.__doc__ or '').split())}"
        ) from None
    except Exception as error:  # whatever a user's own function may raise
        raise _failed("recipe", name_or_path, error) from error
    if not isinstance(recipe, Recipe):
        raise InputError(f"recipe('{variant}') of '{name_or_path}' must return a kdistill.Recipe, returned {recipe!r}.")
    return _checked(recipe, overrides, name_or_path)


def load_profile(profile: str | Profile) -> Profile:
    """The export profile of this name, or of a `.py` file that defines `profile()`; a `Profile` is returned as is."""
    if isinstance(profile, Profile):
        return profile
    module = _module(profile, "exports", "profile")
    try:
        made = module.profile()
    except Exception as error:  # whatever a user's own function may raise
        raise _failed("profile", profile, error) from error
    if not isinstance(made, Profile):
        raise InputError(f"profile() of '{profile}' must return a kdistill.Profile, returned {made!r}.")
    return made


def _checked(recipe: Recipe, overrides: list[str] | None, name_or_path: str) -> Recipe:
    try:
        return override(recipe, overrides) if overrides else checked(recipe)
    except TypeError as error:  # a text where a number belongs, say
        raise _failed("recipe", name_or_path, error) from error


def _failed(function: str, name_or_path: str, error: Exception) -> InputError:
    return InputError(f"{function}() of '{name_or_path}' cannot be run: {type(error).__name__}: {error}")


def _module(name_or_path: str, package: str, function: str) -> ModuleType:
    name = str(name_or_path)
    if name.endswith(".py"):
        module = _from_file(Path(name), function)
    elif name in (known := names(package)):
        module = import_module(f"kdistill.{package}.{name}")
    else:
        raise unknown(function, name, known, f"Or give the path of a .py file that defines {function}().")
    if not callable(getattr(module, function, None)):
        raise InputError(f"'{name}' defines no function {function}(). See `kdistill list` for files to copy from.")
    return module


def _from_file(path: Path, function: str) -> ModuleType:
    if not path.is_file():
        raise InputError(f"No {function} file at '{path}'.")
    spec = importlib.util.spec_from_file_location(f"kdistill_user_{uuid.uuid4().hex}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's own file may raise
        raise InputError(f"The {function} file '{path}' cannot be run: {type(error).__name__}: {error}") from error
    return module
