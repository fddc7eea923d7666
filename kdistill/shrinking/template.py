"""The recipe that all students of a search share: teacher, data, training; and the winner's, as a file."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kdistill.errors import InputError
from kdistill.recipe import Cache, Data, Distill, Network, Recipe, Training
from kdistill.recipe.overrides import override

# What ships with kdistill: weights, and the network that they belong to.
SHIPPED = {"shipped:mnist_cnn": Network("small_cnn", {"widths": (32, 64, 128)}, weights=("shipped:mnist_cnn",))}
EPOCHS = 30  # of the winner, where `hours` or --set training.epochs state no other number
DATA = {  # the usual augmentation
    "mnist": {"shift": 2},
    "cifar10": {"shift": 4, "flip": True},
}


def teacher_network(teacher: str | Path | Network) -> Network:
    """The trained teacher of a recipe: a file of any format, an address, `shipped:NAME`, or a network of a recipe."""
    if isinstance(teacher, Network):
        return teacher
    name = str(teacher)
    if name in SHIPPED:
        return SHIPPED[name]
    if name.startswith("shipped:"):
        raise InputError(f"'{name}' does not ship with kdistill; these do: {', '.join(SHIPPED)}.")
    if not name.startswith(("http://", "https://")) and not Path(name).exists():
        raise InputError(f"There is no file '{name}'. Check the path of the teacher.")
    return Network("teacher", file=name)


def template(
    teacher: Network, data: Data, profile: str, seeds: int, settings: Sequence[str] = (), labeled: bool = True
) -> Recipe:
    """The recipe of the search, with `key=value` settings put on it; its student is a placeholder.

    The students of all seeds and rounds see the same views of the data: the teacher runs once for them. If not
    `labeled`, the students learn from the teacher's outputs alone.
    """
    recipe = Recipe(
        name="shrink",
        teacher=teacher,
        student=Network("small_cnn"),
        data=data,
        training=Training(epochs=EPOCHS, batch_size=128, learning_rate=1e-2, warmup=0.05),
        distill=Distill() if labeled else Distill(distillation_weight=1.0),
        cache=Cache(seed=0),
        exports=(profile,),
        seeds=seeds,
        repair=True,
    )
    for setting in settings:
        if setting.strip().startswith(("student", "seeds", "exports", "compress")):
            raise InputError(f"--set {setting}: kdistill shrink chooses that itself, by --student, --seeds, --profile.")
    return override(recipe, list(settings))


def check_trained(recipe: Recipe, sizes) -> None:
    """Raises `InputError` for a teacher that is not trained."""
    from kdistill.networks.applications import is_pretrained  # the module is loaded before Keras is

    teacher = recipe.teacher
    pretrained = isinstance(sizes, int) and is_pretrained(teacher.options, sizes)
    if not (teacher.file or teacher.weights or pretrained):
        raise InputError(
            f"kdistill shrink expects a trained teacher; the network '{teacher.name}' has neither a file nor weights. "
            "Train it first, such as by kdistill run, and give its .keras file."
        )


def as_file(recipe: Recipe, heading: str) -> str:
    """A recipe as the text of a file that `kdistill run` takes."""
    names = sorted(_names(recipe))
    code = _code(recipe, 1)
    return (
        f'"""{heading}"""\n\nfrom kdistill.recipe import {", ".join(names)}\n\n\n'
        f'def recipe(variant: str = "default") -> Recipe:\n    """Variants: `default`."""\n'
        f'    if variant != "default":\n        raise KeyError(variant)\n    return {code}\n'
    )


def _changed(value) -> dict:
    """The fields of a dataclass that differ from their defaults."""
    changed = {}
    for field in dataclasses.fields(value):
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if getattr(value, field.name) != default:
            changed[field.name] = getattr(value, field.name)
    return changed


def _names(value) -> set[str]:
    if dataclasses.is_dataclass(value):
        return {type(value).__name__}.union(*(_names(part) for part in _changed(value).values()))
    if isinstance(value, dict):
        value = tuple(value.values())
    return set().union(*(_names(part) for part in value)) if isinstance(value, tuple) else set()


def _code(value, level: int) -> str:
    """A value as Python; one field a line where it is a recipe."""
    if dataclasses.is_dataclass(value):
        parts = [f"{name}={_code(part, level + 1)}" for name, part in _changed(value).items()]
        if isinstance(value, Recipe):
            inner = "".join(f"        {part},\n" for part in parts)
            return f"Recipe(\n{inner}    )"
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_code(part, level)}" for key, part in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_code(part, level) for part in value) + ("," if len(value) == 1 else "") + ")"
    return repr(value)
