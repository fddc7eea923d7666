"""The settings of a sweep: from `key=v1,v2,...` to one recipe for each combination. Standard library only."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from kdistill.errors import InputError
from kdistill.recipe.overrides import override, path_of
from kdistill.recipe.values import Recipe

# What may differ between students that train side by side. They share their batches, so data and batch size may not.
SWEPT = ("distill.", "student.options.")
MOST_SETTINGS = 10_000
SWEPT_TRAINING = ("optimizer", "learning_rate", "momentum", "weight_decay", "schedule", "warmup")


@dataclass(frozen=True)
class Setting:
    """One student of a sweep: `values` by full key, and the recipe with these values."""

    values: dict[str, str]
    recipe: Recipe

    @property
    def name(self) -> str:
        """`distillation_weight=0.1,temperature=4`, by the last part of each key."""
        return ",".join(f"{key.split('.')[-1]}={value}" for key, value in self.values.items())


def axes(recipe: Recipe, grids: list[str]) -> dict[str, list[str]]:
    """Every key of a grid, as its full path, with its values as texts.

    `0,0.1,...,1` is `0,0.1,0.2` and so on up to `1`. Numbers that make a list, such as widths, are joined by `x`:
    `student.widths=4x8x12,8x16x24`. Raises `InputError` for a key that cannot differ between students of one pass.
    """
    values_by_path: dict[str, list[str]] = {}
    for text in grids:
        key, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise InputError(f"--grid expects key=v1,v2,..., received '{text}'. Example: --grid temperature=1,2,4")
        path = path_of(recipe, key.strip())
        if not (path.startswith(SWEPT) or path in [f"training.{name}" for name in SWEPT_TRAINING]):
            raise InputError(
                f"--grid cannot sweep '{path}': the students train side by side, on the same batches. "
                f"It can sweep the keys of distill, student options, training.{', training.'.join(SWEPT_TRAINING)}. "
                "For seeds use --seeds; for another key run one sweep for each value with --set."
            )
        if path in values_by_path:
            raise InputError(f"--grid names '{path}' twice. Write all its values in one.")
        values_by_path[path] = _values(values, text)
    if not values_by_path:
        raise InputError("A sweep expects --grid key=v1,v2,..., because this recipe has no grid.")
    count = math.prod(map(len, values_by_path.values()))
    if count > MOST_SETTINGS:
        raise InputError(f"--grid has {count:,} settings; a sweep has at most {MOST_SETTINGS:,}. Give fewer values.")
    return values_by_path


def _as_number(text: str) -> Decimal | str:
    """A value of a grid such that equal numbers are equal: 1, 1.0 and 1e0."""
    try:
        number = Decimal(text)
    except InvalidOperation:
        return text
    return number if number.is_finite() else text


def _values(text: str, whole: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if "..." in parts:
        at = parts.index("...")
        try:
            first, second, last = (Decimal(parts[i]) for i in (at - 2, at - 1, at + 1)) if at >= 2 else (None,) * 3
            step = second - first
            count = (last - second) / step
        except (InvalidOperation, IndexError, TypeError, ZeroDivisionError):
            count = None
        if count is not None and count.is_finite() and count > MOST_SETTINGS:
            raise InputError(
                f"--grid {whole}: '...' stands for {count:,.0f} values; a sweep has at most {MOST_SETTINGS:,}."
            )
        if count is None or not count.is_finite() or count < 1 or count != int(count):
            raise InputError(
                f"--grid {whole}: '...' expects two numbers before it and, a whole number of steps away, the last one "
                "behind it, as in 0,0.1,...,1."
            )
        between = [str(second + step * i) for i in range(1, int(count))]
        parts = parts[:at] + between + parts[at + 1 :]
    if "" in parts or "..." in parts:
        raise InputError(f"--grid {whole}: a value is empty, or '...' appears twice.")
    if len({_as_number(part) for part in parts}) != len(parts):
        raise InputError(f"--grid {whole}: a value appears twice.")
    return parts


def settings(recipe: Recipe, values_by_path: dict[str, list[str]]) -> list[Setting]:
    """One setting for each combination of the values of `axes`; the last key changes fastest."""
    combinations = []
    for values in itertools.product(*values_by_path.values()):
        chosen = dict(zip(values_by_path, values, strict=True))
        combinations.append(Setting(chosen, override(recipe, [f"{key}={value}" for key, value in chosen.items()])))
    return combinations


def students(combinations: list[Setting]) -> dict[str, list[Setting]]:
    """The students to train, by name, each with the settings that it covers.

    With distillation weight 0 the temperature has no effect, so such settings are one student.
    """
    groups: dict[object, list[Setting]] = {}
    for setting in combinations:
        distill = setting.recipe.distill
        same = distill
        if distill.distillation_weight == 0 and distill.temperature is not None:
            same = dataclasses.replace(distill, temperature=1.0)
        key = repr(dataclasses.replace(setting.recipe, distill=same))
        groups.setdefault(key, []).append(setting)
    return {group[0].name: group for group in groups.values()}
