"""Recipes and profiles by name, or from a user's own file."""

import dataclasses
import importlib.util
import pkgutil
import uuid
from importlib import import_module
from pathlib import Path
from types import ModuleType

from kdistill.errors import InputError, unknown
from kdistill.recipe.checks import check_recipe
from kdistill.recipe.overrides import override
from kdistill.recipe.profile import check_profile
from kdistill.recipe.values import Profile, Recipe

COMPACT = ":compact"


def names(package: str) -> list[str]:
    """The names of what ships in `kdistill.recipes` or `kdistill.exports`."""
    return sorted(module.name for module in pkgutil.iter_modules(import_module(f"kdistill.{package}").__path__))


def load_recipe(name_or_path: str, variant: str = "default", overrides: list[str] | None = None) -> Recipe:
    """The recipe of this name, or of a `.py` file that defines `recipe(variant)`, with `key=value` overrides; checked.

    Example: `load_recipe("mnist", "smoke", ["training.epochs=3"])`. Raises `InputError`.
    """
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
    try:
        return override(recipe, overrides) if overrides else check_recipe(recipe)
    except TypeError as error:  # such as a text where a number belongs
        raise _failed("recipe", name_or_path, error) from error


def load_profile(profile: str | Profile) -> Profile:
    """The export profile of this name, or of a `.py` file that defines `profile()`, or this `Profile`; checked.

    `:compact` behind a name turns on `compact`, as in `npu:compact`.

    Raises `InputError` for a name or file that cannot be loaded, and for a value out of its range.
    """
    if isinstance(profile, Profile):
        return check_profile(profile)
    if str(profile).endswith(COMPACT):
        return dataclasses.replace(load_profile(str(profile).removesuffix(COMPACT)), compact=True)
    module = _module(profile, "exports", "profile")
    try:
        value = module.profile()
    except Exception as error:  # whatever a user's own function may raise
        raise _failed("profile", profile, error) from error
    if not isinstance(value, Profile):
        raise InputError(f"profile() of '{profile}' must return a kdistill.Profile, returned {value!r}.")
    return check_profile(value)


def _failed(function: str, name_or_path: str, error: Exception) -> InputError:
    return InputError(f"{function}() of '{name_or_path}' cannot be run: {type(error).__name__}: {error}")


def _module(name_or_path: str, package: str, function: str) -> ModuleType:
    name = str(name_or_path)
    if name.endswith(".py"):
        module = _from_file(Path(name), function)
    elif name in (available := names(package)):
        module = import_module(f"kdistill.{package}.{name}")
    else:
        raise unknown(function, name, available, f"Or give the path of a .py file that defines {function}().")
    if not callable(getattr(module, function, None)):
        raise InputError(f"'{name}' defines no function {function}(). See `kdistill list` for files to copy from.")
    return module


def function_of_file(path: Path, name: str):
    """A function of a user's Python file. Raises `InputError` if there is none."""
    function = getattr(_from_file(path, name), name, None)
    if not callable(function):
        raise InputError(f"'{path}' defines no function {name}().")
    return function


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
