"""What a JSON file has to contain: small schemas, and the check of values against them. Standard library only.

A schema is

- a type: `str`, `bool`, `int`, `float` (any finite number, no bool), `dict`, `list`, or `object` for any value;
- `None` for null, and a tuple of schemas for one of them;
- `[schema]` for a list of such values, and `Mapping(schema)` for an object with any keys;
- `{"key": schema, "key?": schema}` for an object with these keys. `?` marks a key that may be absent. Other keys are
  allowed, because another version may write more;
- `Between(low, high)` for a finite number in a range, `Whole(low, high)` for an integer in it;
- `Matching(test, description)` for what a function accepts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Mapping:
    """An object with any keys, whose values fit `schema`."""

    schema: object


@dataclass(frozen=True)
class Between:
    """A finite number from `low` to `high`."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class Whole:
    """An integer from `low` to `high`."""

    low: int = 0
    high: int = 2**53


@dataclass(frozen=True)
class Matching:
    """A value that `test` accepts; `description` says which values those are. It is tried on values of any type."""

    test: Callable[[object], bool]
    description: str


DEEPEST = 100  # values inside of each other; code that walks through them is recursive


class Mismatch(ValueError):
    """A value does not fit a schema. The message states where, what was expected, and what was received."""


def check_depth(value) -> None:
    """Raises `Mismatch` if lists and objects are more than `DEEPEST` inside of each other."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for item in level
            if isinstance(item, (dict, list))
            for inner in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise Mismatch("its values are too deep inside of each other")


def check(value, schema, path: str = "") -> None:
    """Raises `Mismatch` if a value does not fit a schema. `path`: where the value is, for the message."""
    if isinstance(schema, tuple):
        _check_one_of(value, schema, path)
    elif isinstance(schema, dict):
        _expect(isinstance(value, dict), value, "an object", path)
        missing = [key for key in schema if not key.endswith("?") and key not in value]
        if missing:
            raise Mismatch(f"{_place(path)} lacks {', '.join(missing)}")
        for key, inner in schema.items():
            if (name := key.removesuffix("?")) in value:
                check(value[name], inner, _joined(path, name))
    elif isinstance(schema, Mapping):
        _expect(isinstance(value, dict), value, "an object", path)
        for name, item in value.items():
            check(item, schema.schema, _joined(path, name))
    elif isinstance(schema, list):
        _expect(isinstance(value, list), value, "a list", path)
        for place, item in enumerate(value):
            check(item, schema[0], _joined(path, str(place)))
    else:
        _expect(_fits_single(value, schema), value, _title(schema), path)


def _check_one_of(value, schemas: tuple, path: str) -> None:
    """Reports the mismatch of the only alternative of this kind, which says more than that no alternative fits."""
    kinds = {dict: (dict, Mapping), list: (list,)}.get(type(value), ())
    alike = [schema for schema in schemas if isinstance(schema, kinds)] if kinds else []
    if len(alike) == 1 and dict not in schemas and list not in schemas:
        check(value, alike[0], path)
        return
    for schema in schemas:
        try:
            return check(value, schema, path)
        except Mismatch:
            continue
    _expect(False, value, " or ".join(_title(schema) for schema in schemas), path)


def _fits_single(value, schema) -> bool:
    if schema is None or schema is object:
        return schema is object or value is None
    if isinstance(schema, Matching):
        return schema.test(value)
    is_whole = type(value) is int
    if isinstance(schema, Whole) or schema is int:
        low, high = (schema.low, schema.high) if isinstance(schema, Whole) else (-(2**63), 2**63)
        return is_whole and low <= value <= high
    if isinstance(schema, Between) or schema is float:
        low, high = (schema.low, schema.high) if isinstance(schema, Between) else (-math.inf, math.inf)
        # An integer of many digits is no float that can be computed with.
        finite = abs(value) < 2**1000 if is_whole else type(value) is float and math.isfinite(value)
        return finite and low <= value <= high
    return isinstance(value, schema)


def _expect(condition: bool, value, expected: str, path: str) -> None:
    if not condition:
        raise Mismatch(f"{_place(path)} expects {expected}, received {shown(value)}")


def _title(schema) -> str:
    if isinstance(schema, (Whole, Between)):
        kind = "a whole number" if isinstance(schema, Whole) else "a number"
        upper = schema.high not in (math.inf, 2**53)
        if schema.low == -math.inf:
            return kind
        return f"{kind} from {schema.low} to {schema.high}" if upper else f"{kind}, {schema.low} or more"
    if isinstance(schema, Matching):
        return schema.description
    if isinstance(schema, (dict, Mapping)):
        return "an object"
    if isinstance(schema, list):
        return "a list"
    names = {str: "a text", bool: "true or false", int: "a whole number", float: "a finite number", None: "null"}
    return names.get(schema, {dict: "an object", list: "a list"}.get(schema, "a value"))


def plain(value) -> str:
    """A value from a file as people write it, if it is short and has no control characters; else as `shown`."""
    text = str(value) if not isinstance(value, int) or abs(value) < 10**40 else ""
    return text if text and len(text) <= 200 and text.isprintable() else shown(value)


def shown(value) -> str:
    """A value from a file as a short text on one line, its control characters escaped."""
    if type(value) is int and abs(value) >= 10**40:
        return "a number of many digits"
    text = ascii(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)} values"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _joined(path: str, name: str) -> str:
    name = ascii(name)[1:-1][:60]
    return f"{path}.{name}" if path else name


def _place(path: str) -> str:
    return f"'{path}'" if path else "it"
