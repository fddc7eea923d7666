"""What a student learns from: named terms, their weights, and schedules of both. Standard library only."""

import math
from dataclasses import dataclass, field

from kdistill.errors import InputError, unknown

# The defaults of `Distill`, `Distiller` and `compress`.
DISTILLATION_WEIGHT = 0.9
TEMPERATURE = 4.0
LARGEST = 1_000_000  # weight, temperature or option: a larger one is a slip of the keyboard
# The methods that a term can name, with their options: of logits, and of what a layer inside of each model gives.
LOGIT_LOSSES: dict[str, tuple[str, ...]] = {
    "kl_logits": ("temperature",),
    "soft_cross_entropy": ("temperature",),
    "mse_logits": (),
    "cosine": (),
    "dkd": ("alpha", "beta", "temperature"),
    "dist": ("beta", "gamma", "temperature"),
    "standardized_kl": ("temperature",),
    "bernoulli_kl": ("temperature",),
    "squared_error": (),
    "huber": ("delta",),
}
# For which outputs they are: exclusive classes, independent labels, numbers.
OUTPUTS_OF_LOSSES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LOGIT_LOSSES, ("classes",)),
    "mse_logits": ("classes", "labels"),
    "cosine": ("classes", "labels"),
    "bernoulli_kl": ("labels",),
    "squared_error": ("numbers",),
    "huber": ("numbers",),
}
FEATURE_LOSSES = ("hint", "attention_transfer", "rkd_distance", "rkd_angle", "similarity_preserving")
PROJECTORS = ("conv1x1", "dense")
SHAPES = ("linear", "cosine", "step")
# What a step logs besides the terms, and what `fit` puts before the names of validation.
RESERVED = ("loss", "hard", "accuracy", "agreement", "distillation_weight", "temperature", "learning_rate")


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` between two shares of the training, and stays there.

    As text (in `--set`): `shape:start:end[:begin[:finish]]`, such as `linear:0.9:0.1` or `cosine:0.9:0:0.5:1`.
    A `step` jumps at `begin`.
    """

    start: float
    end: float
    begin: float = 0.0  # share of the training before which it is `start`
    finish: float = 1.0  # share after which it is `end`
    shape: str = "linear"  # linear, cosine (slow at both ends), step

    @classmethod
    def of_text(cls, text: str) -> "Schedule":
        """The schedule of `shape:start:end[:begin[:finish]]`; raises `ValueError` for other text."""
        shape, *numbers = (part.strip() for part in text.split(":"))
        if shape not in SHAPES or not 2 <= len(numbers) <= 4:
            raise ValueError(f"expects {'|'.join(SHAPES)}:start:end[:begin[:finish]], received '{text}'")
        return cls(*(float(number) for number in numbers), shape=shape)


@dataclass(frozen=True)
class Term:
    """One more thing that the student is taught: `weight * loss`, added to the total and logged under its name.

    `loss`: a name (see `docs/methods.md`), or, outside of recipes, a function of the student's and the teacher's
    outputs (and `labels`, if it has a parameter of that name) -> `[batch]`. `options` are its further arguments, such
    as `temperature`. `weight` and the numbers among the options may be schedules: a `Schedule` in a recipe, a Keras
    `LearningRateSchedule` elsewhere.

    `output` names the output whose logits are compared, for a student with several outputs.

    A loss of features needs both taps, names of layers (`block/conv` inside of a nested model); with several teachers
    the teacher's is `0/conv1`, the number of the teacher first. `projector` maps the student's features to the
    teacher's channels: `conv1x1`, `dense` (on the last axis), or, outside of recipes, a Keras layer. It is trained with
    the student and is no part of it.
    """

    loss: str | object
    weight: float | Schedule = 1.0
    output: str | None = field(default=None, kw_only=True)
    student_tap: str | None = field(default=None, kw_only=True)
    teacher_tap: str | None = field(default=None, kw_only=True)
    projector: str | object | None = field(default=None, kw_only=True)
    options: dict[str, float | Schedule] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Distill:
    """The student's loss: `(1 - w) * hard + w * kd + sum of weight * term`.

    `kd` is `T^2 * KL(softmax(t/T) || softmax(s/T))`, or the term of that name, which takes its place; `temperature` is
    None then.
    """

    distillation_weight: float | Schedule = DISTILLATION_WEIGHT
    temperature: float | Schedule | None = TEMPERATURE
    terms: dict[str, Term] = field(default_factory=dict)
    teacher_weights: tuple[float, ...] | None = None  # one for each of several teachers; None is equal ones


def require(holds: bool, path: str, expected: str, received) -> None:
    """Raises `InputError`, which names the key and what it expects, unless `holds`."""
    if not holds:
        raise InputError(
            f"The key '{path}' expects {expected}, received {received!r}. Fix it in the recipe or with --set."
        )


def check_distill(distill: Distill, teachers: int = 1) -> None:
    """Raises `InputError` for what cannot be trained, or does nothing, in a recipe with so many teachers."""
    check_mix(distill.distillation_weight, distill.temperature, distill.terms, "distill.")
    for name, term in distill.terms.items():
        if not isinstance(term.loss, str):
            raise InputError(f"distill.terms.{name}.loss expects the name of a method in a recipe, not {term.loss!r}.")
        if not (term.projector is None or isinstance(term.projector, str)):
            raise InputError(f"distill.terms.{name}.projector expects {' or '.join(PROJECTORS)} in a recipe.")
        check_term(name, term)
    weights = distill.teacher_weights
    if weights is not None:
        expected = f"{teachers} numbers above 0, one for each teacher" if teachers > 1 else "None with one teacher"
        right = teachers > 1 and len(weights) == teachers and all(is_number(w) and 0 < w < math.inf for w in weights)
        require(right, "distill.teacher_weights", expected, weights)


def check_mix(
    distillation_weight, temperature, terms: dict[str, Term], part: str = "", schedules: tuple[type, ...] = (Schedule,)
) -> None:
    """Raises `InputError` for a weight or temperature out of range, or a temperature that has no effect."""
    check_number(distillation_weight, f"{part}distillation_weight", lambda v: 0 <= v <= 1, "from 0 to 1", schedules)
    if "kd" in terms:
        expected = "None, as the term 'kd' takes the place of the KL; the term has options of its own"
        require(temperature is None, f"{part}temperature", expected, temperature)
    else:
        check_number(temperature, f"{part}temperature", lambda v: 0 < v < math.inf, "above 0", schedules)


def check_term(name: str, term: Term, schedules: tuple[type, ...] = (Schedule,)) -> None:
    """Raises `InputError` for a term that cannot be computed, or that has a setting which would do nothing."""
    path = f"distill.terms.{name}"
    if not isinstance(term, Term):
        raise InputError(f"{path} expects a kdistill.Term, received {term!r}.")
    if not name.isidentifier() or name in RESERVED or name.startswith("val_"):
        raise InputError(
            f"A term cannot be named '{name}': names are letters, digits and _, none of {', '.join(RESERVED)}, and do "
            "not start with val_. Give it another name."
        )
    if isinstance(term.loss, str):
        if term.loss not in LOGIT_LOSSES and term.loss not in FEATURE_LOSSES:
            raise unknown("loss", term.loss, [*LOGIT_LOSSES, *FEATURE_LOSSES], f"Fix {path}.loss.")
        options = LOGIT_LOSSES.get(term.loss, ())
        for option in term.options:
            if option not in options:
                raise unknown(f"option of {term.loss}", option, options, f"Fix {path}.options.")
    elif not callable(term.loss):
        raise InputError(f"{path}.loss expects the name of a method or a function, received {term.loss!r}.")
    _check_taps(path, term)
    if name == "kd" and term.weight != 1:
        raise InputError(
            f"{path}.weight expects 1, received {term.weight!r}: distillation_weight weighs the term 'kd'."
        )
    check_number(term.weight, f"{path}.weight", lambda v: 0 <= v < math.inf, "0 or more", schedules)
    for option, value in term.options.items():
        if option == "temperature":
            check_number(value, f"{path}.options.temperature", lambda v: 0 < v < math.inf, "above 0", schedules)
        elif isinstance(term.loss, str):
            check_number(value, f"{path}.options.{option}", lambda v: 0 <= v < math.inf, "0 or more", schedules)


def _check_taps(path: str, term: Term) -> None:
    taps = (term.student_tap, term.teacher_tap)
    for side, tap in zip(("student_tap", "teacher_tap"), taps, strict=True):
        if tap is not None and (not isinstance(tap, str) or not tap):
            raise InputError(f"{path}.{side} expects the name of a layer, received {tap!r}.")
    if term.loss in LOGIT_LOSSES and (any(taps) or term.projector is not None):
        raise InputError(
            f"{path}: {term.loss} compares logits; student_tap, teacher_tap and projector would do nothing. "
            f"Leave them out, or take one of {', '.join(FEATURE_LOSSES)}."
        )
    needed = term.loss in FEATURE_LOSSES or any(taps) or term.projector is not None
    if needed and not all(taps):
        missing = " and ".join(n for n, tap in zip(("student_tap", "teacher_tap"), taps, strict=True) if not tap)
        name = term.loss if isinstance(term.loss, str) else "it"
        raise InputError(f"{path}: {name} compares layers of student and teacher; give {missing} too.")
    if isinstance(term.projector, str) and term.projector not in PROJECTORS:
        raise unknown("projector", term.projector, PROJECTORS, f"Or give a Keras layer. Fix {path}.projector.")


def check_number(value, path: str, holds, expected: str, schedules: tuple[type, ...] = (Schedule,)) -> None:
    """Raises `InputError` unless `value` is a number that holds, or a schedule between such numbers."""
    if isinstance(value, Schedule) and Schedule in schedules:
        for number in (value.start, value.end):
            require(is_number(number) and holds(number), path, f"a schedule between numbers {expected}", value)
            require(number <= LARGEST, path, f"a schedule between numbers of at most {LARGEST:,}", value)
        require(value.shape in SHAPES, f"{path}.shape", f"one of {', '.join(SHAPES)}", value.shape)
        require(0 <= value.begin < value.finish <= 1, path, "0 <= begin < finish <= 1", value)
        require(value.start != value.end, path, "a start that is not the end; write a number for what stays", value)
        if value.shape == "step":
            require(value.begin > 0 and value.finish == 1, path, "a step with 0 < begin and without finish", value)
        return
    if not isinstance(value, schedules):
        require(is_number(value) and holds(value), path, f"a number {expected}, or a schedule", value)
        require(value <= LARGEST, path, f"at most {LARGEST:,}", value)


def is_number(value) -> bool:
    """Whether it is a number; Python counts True as one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def teacher_taps(terms: dict[str, Term]) -> dict[str, str]:
    """The layers of the teacher that the terms look at, and the setting that names each."""
    return {term.teacher_tap: f"distill.terms.{name}.teacher_tap" for name, term in terms.items() if term.teacher_tap}


def softness(distill: Distill) -> float:
    """The temperature at which the student first sees the teacher's probabilities; 1 where no setting has one."""
    kd = distill.terms.get("kd")
    value = distill.temperature if kd is None else kd.options.get("temperature", 1.0)
    return value.start if isinstance(value, Schedule) else value


def at_the_end(distill: Distill) -> dict[str, float | None]:
    """The `distillation_weight` and `temperature` that the training ends with, to continue from."""
    values = {"distillation_weight": distill.distillation_weight, "temperature": distill.temperature}
    return {name: value.end if isinstance(value, Schedule) else value for name, value in values.items()}
