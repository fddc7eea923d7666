"""The students that may be tried: families, each a function of width, depth and resolution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kdistill.errors import InputError, unknown
from kdistill.recipe import Network

WIDEST = 512


@dataclass(frozen=True)
class Family:
    """A kind of student.

    `network`: (width, depth, reduce) -> its network; `rank`: dimensions of the inputs that it takes, 3 for images;
    `reductions`: the sizes of the squares over which images may be averaged first.
    """

    name: str
    rank: int | None
    depths: tuple[int, ...]
    network: Callable[[int, int, int], Network]
    reductions: tuple[int, ...] = (1,)
    widest: int = WIDEST


@dataclass(frozen=True)
class Candidate:
    """A student of a family."""

    family: Family
    width: int
    depth: int
    reduce: int = 1

    @property
    def name(self) -> str:
        """Such as `ds_cnn-w8-d3`, or `-r2` behind it where the image is reduced by 2."""
        return f"{self.family.name}-w{self.width}-d{self.depth}" + (f"-r{self.reduce}" if self.reduce > 1 else "")

    @property
    def network(self) -> Network:
        """As a recipe names it."""
        return self.family.network(self.width, self.depth, self.reduce)


def _with_reduce(options: dict, reduce: int) -> dict:
    return options | ({"reduce": reduce} if reduce > 1 else {})


def _small_cnn(width: int, depth: int, reduce: int) -> Network:
    widths = tuple(width * place for place in range(1, depth + 1))
    return Network("small_cnn", _with_reduce({"widths": widths}, reduce))


def _ds_cnn(width: int, depth: int, reduce: int) -> Network:
    return Network("ds_cnn", _with_reduce({"width": width, "depth": depth}, reduce))


def _resnet(width: int, depth: int, reduce: int) -> Network:
    return Network("resnet", {"depth": 6 * depth + 2, "width": width})


def _conv1d(width: int, depth: int, reduce: int) -> Network:
    return Network("conv1d", {"widths": tuple(width * place for place in range(1, depth + 1))})


def _dense(width: int, depth: int, reduce: int) -> Network:
    return Network("dense", {"width": width, "depth": depth})


FAMILIES = {
    family.name: family
    for family in (
        Family("small_cnn", 3, (2, 3, 4), _small_cnn, (1, 2)),
        Family("ds_cnn", 3, (2, 4), _ds_cnn, (1, 2)),
        Family("resnet", 3, (1,), _resnet),
        Family("conv1d", 2, (1, 2, 3, 4), _conv1d),
        Family("dense", 1, (1, 2, 3), _dense),
    )
}
KINDS = {3: "images", 2: "sequences", 1: "rows of numbers"}


def families_for(shape, names: Sequence[str] = (), own: str | None = None) -> list[Family]:
    """The families for inputs of this shape: those of these names, or all that fit, or a user's own function.

    `own`: `FILE.py:FUNCTION`, a function of (shape, classes, width, depth) or of (width, depth) that returns a model.
    Raises `InputError` where nothing fits.
    """
    if own:
        if ".py:" not in own:
            raise InputError(f"--student expects FILE.py:FUNCTION, a function of width and depth; received '{own}'.")

        def network(width: int, depth: int, reduce: int) -> Network:
            return Network(own, {"width": width, "depth": depth})

        return [Family(own.rpartition(":")[2], None, (1, 2, 3), network)]
    for name in names:
        if name not in FAMILIES:
            raise unknown("family", name, FAMILIES)
    if not isinstance(shape, tuple):
        raise InputError(
            "kdistill shrink has no family for several inputs. Give a function of your own: --student FILE.py:FUNCTION."
        )
    fitting = {name: family for name, family in FAMILIES.items() if family.rank == len(shape)}
    if not fitting or not set(names) <= set(fitting):
        kind = KINDS.get(len(shape), f"inputs of {len(shape)} dimensions")
        raise InputError(
            f"The families for {kind} are {', '.join(fitting) or 'none'}; received {', '.join(names) or 'none'}. Give "
            "one of them, or a function of your own: --student FILE.py:FUNCTION."
        )
    return [fitting[name] for name in names or fitting]
