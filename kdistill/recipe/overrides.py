"""How overrides such as `training.epochs=3` are put on a recipe. Standard library only."""

import dataclasses
import types
import typing

from kdistill.errors import InputError, unknown
from kdistill.recipe.checks import check_recipe
from kdistill.recipe.objective import Schedule
from kdistill.recipe.values import Recipe


def keys(recipe) -> dict[str, object]:
    """Every key that `--set` takes, with its value: `{"training.epochs": 8, ...}`.

    A schedule is one key, and so is each of its parts.
    """
    values = {}
    for name, value in _parts(recipe):
        if not _has_parts(value) or isinstance(value, Schedule):
            values[name] = value
        if _has_parts(value):
            values.update({f"{name}.{key}": part for key, part in keys(value).items()})
    return values


def _parts(owner) -> list[tuple[str, object]]:
    if dataclasses.is_dataclass(owner):
        return [(f.name, getattr(owner, f.name)) for f in dataclasses.fields(owner)]
    return [(str(name), value) for name, value in (owner.items() if isinstance(owner, dict) else enumerate(owner))]


def _has_parts(value) -> bool:
    is_tuple = isinstance(value, tuple) and value and all(dataclasses.is_dataclass(item) for item in value)
    return dataclasses.is_dataclass(value) or isinstance(value, dict) or bool(is_tuple)


def override(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `key=value` settings put on it.

    A key is a dotted path (`training.epochs`) or, where it is the only one of that name, its last part
    (`temperature`). Raises `InputError` for an unknown key, a value of another type, or one out of range.
    """
    given: dict[str, str] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set expects key=value, received '{setting}'. Example: --set training.epochs=3")
        path = path_of(recipe, key.strip())
        if path in given:
            raise InputError(
                f"The key '{path}' is set twice, to {given[path]} and to {text.strip()}, by --set or by an option such "
                "as --seeds. Give one of them."
            )
        given[path] = text.strip()
        recipe = _replaced(recipe, path.split("."), text.strip(), path)
    return check_recipe(recipe)


def path_of(recipe: Recipe, key: str) -> str:
    """The full path of a key that is typed whole, without `options`, or as its last part. Raises `InputError`."""
    paths = keys(recipe)
    fixed = {"name", "variant", "grid", "published"}
    matches = [path for path in paths if key in (path, path.split(".")[-1], path.replace(".options.", "."))]
    if key in paths and key not in fixed:
        return key
    if len(matches) == 1 and key not in fixed:
        return matches[0]
    if len(matches) > 1 and key not in fixed:
        raise InputError(f"The key '{key}' is ambiguous. Write one of: {', '.join(matches)}.")
    raise unknown("key of --set", key, paths.keys() - fixed)


def _replaced(owner, names: list[str], text: str, path: str, hint=None):
    name, rest = names[0], names[1:]
    if isinstance(owner, tuple):
        index = int(name)
        changed = _replaced(owner[index], rest, text, path)
        return (*owner[:index], changed, *owner[index + 1 :])
    if isinstance(owner, dict):
        value = owner[name]
        inner = typing.get_args(hint)[1] if typing.get_args(hint) else type(value)
    else:
        value, inner = getattr(owner, name), typing.get_type_hints(type(owner))[name]
    changed = _replaced(value, rest, text, path, inner) if rest else _parsed(text, inner, path)
    return {**owner, name: changed} if isinstance(owner, dict) else dataclasses.replace(owner, **{name: changed})


def _parsed(text: str, hint, path: str):
    """The text of a setting as the type that the field is declared with."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and text.lower() in ("none", ""):
        return None
    kind = next(option for option in options if option is not type(None))
    try:
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if Schedule in options and ":" in text:
            return Schedule.of_text(text)
        if kind in (tuple, list) or typing.get_origin(kind) is tuple:
            plain = kind in (tuple, list)  # an option of a network, whose items have no declared type: 8x16x24
            inner = (typing.get_args(kind) or (str,))[0]
            sizes = plain or inner is int  # 224x224
            parts = [part.strip() for part in (text.replace("x", ",") if sizes else text).split(",") if part.strip()]
            return tuple(_number_or_text(part) if plain else inner(part) for part in parts)
        return kind(text)
    except (ValueError, KeyError, TypeError) as error:
        expected = getattr(kind, "__name__", str(kind))
        if Schedule in options:
            expected = f"{expected} or a schedule (shape:start:end[:begin[:finish]])"
        if isinstance(error, TypeError):
            raise InputError(f"The key '{path}' cannot be set from text; write it in a recipe file.") from None
        raise InputError(f"The key '{path}' expects {expected}, received '{text}'.") from None


def _number_or_text(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
