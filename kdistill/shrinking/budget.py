"""A budget: bytes, memory and time that a file may take, the accuracy that it needs, and hours for the search."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from kdistill.errors import InputError, unknown
from kdistill.recipe import Profile

BYTES = {"": 1, "b": 1, "bytes": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}
MICROSECONDS = {"": 1, "us": 1, "µs": 1, "μs": 1, "ms": 1000, "s": 1_000_000}  # both signs that mean micro
LIMITS = {"max_bytes": "bytes", "max_arena": "arena", "max_us": "microseconds"}  # and the measurement that each limits


@dataclass(frozen=True)
class Budget:
    """What a file may cost, and what it has to reach; None: no limit.

    max_bytes: of the file, with its metadata. max_arena: bytes of memory at run time, as TensorFlow Lite Micro plans
    it. max_us: microseconds for one image on one thread of this machine. min_accuracy: on the test images, a share of
    1. hours: of the whole search.
    """

    max_bytes: int | None = None
    max_us: float | None = None
    max_arena: int | None = None
    min_accuracy: float | None = None
    hours: float | None = None

    def as_dict(self) -> dict:
        """The limits that are given."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def exceeded(self, costs: Mapping) -> list[str]:
        """The names of the limits that these costs (bytes, arena, microseconds) exceed."""
        limits = self.as_dict()
        return [name for name, cost in LIMITS.items() if name in limits and (costs[cost] or math.inf) > limits[name]]

    def text(self) -> str:
        """The limits of the file, in words."""
        parts = {
            "max_bytes": f"{self.max_bytes:,} bytes" if self.max_bytes else "",
            "max_arena": f"{self.max_arena:,} bytes of arena" if self.max_arena else "",
            "max_us": f"{self.max_us:,g} µs" if self.max_us else "",
        }
        return ", ".join(filter(None, parts.values()))


def read_budget(budget: "Budget | Mapping | str | int") -> Budget:
    """The budget of a dict such as `{"max_bytes": "16kB", "hours": 0.5}`, or of a number of bytes alone.

    kB are 1,000 bytes, KiB 1,024; times may have us, ms or s. Raises `InputError` for what is no budget.
    """
    if isinstance(budget, Budget):
        values = budget.as_dict()
    elif isinstance(budget, Mapping):
        values = {name: value for name, value in budget.items() if value is not None}
    else:
        values = {"max_bytes": budget}
    names = [field.name for field in fields(Budget)]
    for name in values:
        if name not in names:
            raise unknown("limit of a budget", name, names)
    read = {}
    for name, value in values.items():
        units = {"max_bytes": BYTES, "max_arena": BYTES, "max_us": MICROSECONDS}.get(name, {"": 1})
        number = _number(name, value, units)
        read[name] = int(number) if units is BYTES else number
    result = Budget(**read)
    if not any(getattr(result, name) for name in LIMITS):
        raise InputError("A budget expects one limit or more: --max-bytes, --max-us or --max-arena. Give one.")
    if result.min_accuracy is not None and result.min_accuracy > 1:
        raise InputError(f"min_accuracy expects a share of 1, such as 0.98, received {result.min_accuracy:g}.")
    return result


def _number(name: str, value, units: Mapping[str, float]) -> float:
    """A number with a unit, above 0."""
    matched = re.fullmatch(r"\s*([0-9][0-9_,]*\.?[0-9]*(?:e[0-9]+)?)\s*([a-zµμ]*)\s*", str(value).lower())
    unit = matched.group(2) if matched else None
    number = 0.0
    if unit in units:
        try:
            number = float(matched.group(1).replace(",", "").replace("_", "")) * units[unit]
        except ValueError:
            number = 0.0
    if not 0 < number < math.inf or isinstance(value, bool):
        examples = {id(BYTES): ": 16kB, 64KiB, 16000", id(MICROSECONDS): ": 20ms, 800us, 800"}
        raise InputError(f"{option(name)} expects a number above 0{examples.get(id(units), '')}; received {value!r}.")
    return number


def option(name: str) -> str:
    """The option of a limit: max_bytes -> --max-bytes."""
    return f"--{name.replace('_', '-')}"


def check_budget(budget: Budget, profile: Profile, input_bytes: int, labeled: bool) -> None:
    """Raises `InputError` for a budget that contradicts itself, the profile or the data.

    `input_bytes`: of one example in the type of the file's input, which the arena has to hold.
    """
    if budget.max_arena and profile.batch is None:
        raise InputError(
            f"--max-arena expects a profile with a fixed batch, such as microcontroller or npu: files of "
            f"'{profile.name}' take any number of images, and their memory grows with it."
        )
    if budget.max_arena and budget.max_arena < input_bytes:
        raise InputError(
            f"--max-arena {budget.max_arena:,} contradicts the data: one input alone takes {input_bytes:,} bytes. Give "
            "more memory, or smaller inputs."
        )
    if budget.min_accuracy is not None and not labeled:
        raise InputError(
            "--min-accuracy expects data with labels; without them only the agreement with the teacher can be "
            "measured. Leave it out, or give labels for the test examples at least."
        )
