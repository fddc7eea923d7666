"""What a run is: frozen dataclasses, and how overrides such as `training.epochs=3` are put on them.

Standard library only. A recipe file (`recipes/mnist.py`, or a user's own) has a docstring and a function
`recipe(variant) -> Recipe`; a profile file (`exports/npu.py`) has a docstring and `profile() -> Profile`.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field

from kdistill.errors import InputError, unknown
from kdistill.objective import Distill, Schedule, check_distill
from kdistill.objective import Term as Term  # recipes import from here alone
from kdistill.objective import check as _check


@dataclass(frozen=True)
class Data:
    """The data set, its held-out share, and the augmentation of training images (the same for every model)."""

    name: str = "mnist"
    validation: float = 0.1  # share of the training images that is held out; validation picks, test reports
    shift: int = 0  # random translation, up to so many pixels in each direction, edges filled with zeros
    flip: bool = False  # random left-right flip
    image_size: int | None = None  # imagenet, image_folder: images are cut and resized to so many pixels squared
    crop_area: float = 1.0  # random parts of this share of the area at least, resized (0.08 is usual for ImageNet)
    mixup: float = 0.0  # alpha: images and labels of a batch blended in pairs, by a share from Beta(alpha, alpha)
    cutmix: float = 0.0  # alpha: a rectangle of one image in another, and their labels; with mixup: one or the other
    max_undecodable: float = 0.001  # share of damaged image files that is borne (left out, and named)
    train_limit: int | None = None  # use only the first so many images of each split (smoke variants)
    labelled: int | None = None  # students see the labels of so many images, validation among them; None: of all
    labelled_share: float = 1.0  # and of this share of the images at most
    teacher_labels: str = (
        "all"  # all: the teacher knows every label, as one trained elsewhere; same: the students' only
    )


@dataclass(frozen=True)
class Network:
    """A network of `kdistill.models` by name with its options, or a trained one from a `.keras` file.

    With `weights` it starts with those of files, into layers of other names by `mapping`; a teacher of `weights` is not
    trained. Without a mapping, layers of equal names are filled; see `kdistill.weights`.
    """

    name: str
    options: dict = field(default_factory=dict)
    file: str | None = None  # a .keras file: loaded (in safe mode) instead of trained
    weights: tuple[str, ...] = ()  # .keras, .weights.h5 or .npz files
    mapping: dict = field(default_factory=dict)  # {file's layer: network's layer}; of several files {file: {...}}


@dataclass(frozen=True)
class Training:
    """How one network is fitted. The student and its control share one of these: the same budget."""

    epochs: int = 8
    batch_size: int = 128
    optimizer: str = "adam"  # adam, sgd
    learning_rate: float = 1e-3
    momentum: float = 0.0  # sgd only
    weight_decay: float = 0.0  # decoupled, as in AdamW
    schedule: str = "cosine"  # cosine (to zero), constant, step
    drop_at: float = 0.8  # step only: the share of the steps after which the rate falls
    drop_factor: float = 0.1  # step only: to so much of what it was
    warmup: float = 0.0  # share of the steps in which the rate climbs from zero


# What a compression does, one step after the other, each fine-tuned; int8 is quantisation without training.
SCHEMES = {
    "prune": ("prune",),
    "prune_2_4": ("prune_2_4",),
    "cluster": ("cluster",),
    "prune_cluster": ("prune", "cluster"),
    "qat": ("qat",),
    "pqat": ("prune", "qat"),
    "cqat": ("cluster", "qat"),
    "pcqat": ("prune", "cluster", "qat"),
    "int8": (),
}


@dataclass(frozen=True)
class Stage:
    """One compression of the student, which goes on from the stage before; see `kdistill.compress`.

    It is fine-tuned with the recipe's teacher and loss, and, in the same budget, on labels alone.
    """

    scheme: str
    epochs: int = 2  # of each step of the scheme
    batch_size: int = 128
    learning_rate: float = 1e-3  # of Adam; a cosine leads to zero in each step
    final_sparsity: float | None = None  # share of zeros that pruning ends with; None: 0.8
    clusters: int | None = None  # values that each kernel keeps; None: 16
    layer_sparsity: dict = field(default_factory=dict)  # other shares and numbers for single layers
    layer_clusters: dict = field(default_factory=dict)
    skip: tuple[str, ...] = ()  # layers to leave alone


@dataclass(frozen=True)
class Cache:
    """The views of the training images that control and student see (an epoch's order, augmentation and mixing), and
    how the teacher's outputs for them are stored where they are stored (`--cache`)."""

    views: int | None = None  # epochs repeat after so many; None: every epoch has a view of its own
    seed: int | None = None  # of the views; None: the run's. Runs that share it share their views and a cache
    top_k: int | None = None  # store so many logits of an image, and the mass of the rest; None: all


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run. Written to the run folder before anything runs."""

    name: str
    teacher: Network
    student: Network
    data: Data = Data()
    teacher_training: Training = Training()
    training: Training = Training()
    distill: Distill = field(default_factory=Distill)
    more_teachers: tuple[Network, ...] = ()  # blended with `teacher`, by distill.teacher_weights
    assistants: tuple[Network, ...] = ()  # each learns from the one before, the student from the last
    cache: Cache = Cache()
    compress: tuple[Stage, ...] = ()  # compressions of the student, one behind the other
    exports: tuple[str, ...] = ("reference", "phone_gpu", "phone_cpu", "npu")
    seed: int = 0
    seeds: int = 1  # control and student are trained for so many seeds, from `seed` on; the teacher once
    precision: str = "float32"  # float32, mixed_bfloat16, mixed_float16
    teacher_precision: str | None = None  # in which students ask the teacher; None: as it was trained
    variant: str = "default"
    grid: tuple[str, ...] = ()  # what `kdistill sweep` tries without --grid: ("training.learning_rate=0.01,0.1",)
    published: tuple[tuple[str, float], ...] = ()  # accuracies from a paper by a sweep's row, shown beside ours


@dataclass(frozen=True)
class Profile:
    """One kind of device: what a `.tflite` file for it looks like, and the limits that it must keep."""

    name: str
    quantization: str = "none"  # none, float16, dynamic (int8 weights), int8 (weights, activations), int4 (weights)
    input_type: str = "float32"  # float32, uint8 (raw pixels, as a camera gives them), int8 (with int8 only)
    output_type: str = "float32"  # float32; int8 and uint8 with int8 only
    batch: int | None = None  # None: any batch size
    output: str | None = None  # None: what the model gives; logits; probabilities (a softmax is added if need be)
    channels: int | None = None  # None: as the model; 3: a model of grey images gets colour and reduces it itself
    operators: str = "builtin"  # builtin; micro: only those that TensorFlow Lite Micro has as well
    c_array: bool = False  # write the file also as C++ source, and estimate the arena
    mean: tuple[float, ...] = ()  # the graph gives the model (pixel - mean) / deviation: one number, or one per channel
    deviation: tuple[float, ...] = ()
    max_drop: float = 0.002  # accuracy lost against the Keras model, as a share of 1
    min_agreement: float = 0.99  # share of test images on which file and Keras model name the same class


def as_dict(value) -> dict:
    """A recipe or profile as plain, JSON-ready values."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


def from_dict(kind: type, values: dict):
    """The inverse of `as_dict`."""
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    for name in values:
        if name not in known:
            raise unknown(f"key of {kind.__name__}", name, known)
    return kind(**{name: _rebuilt(hints[name], value) for name, value in values.items()})


def _rebuilt(hint, value):
    """A plain value as what a field of this type holds."""
    inner = typing.get_args(hint)
    if isinstance(value, dict):
        kind = next((each for each in (hint, *inner) if dataclasses.is_dataclass(each)), None)
        if typing.get_origin(hint) is dict:
            return {name: _rebuilt(inner[1], each) for name, each in value.items()}
        return from_dict(kind, value) if kind else value
    if isinstance(value, (list, tuple)):
        return tuple(_rebuilt(inner[0], each) if inner else each for each in value)
    return value


def keys(recipe) -> dict[str, object]:
    """Every key that `--set` takes, with its value: `{"training.epochs": 8, ...}`.

    A schedule is one key, and so is each of its parts.
    """
    found = {}
    for name, value in _parts(recipe):
        if not _holds_parts(value) or isinstance(value, Schedule):
            found[name] = value
        if _holds_parts(value):
            found.update({f"{name}.{key}": v for key, v in keys(value).items()})
    return found


def _parts(owner) -> list[tuple[str, object]]:
    if dataclasses.is_dataclass(owner):
        return [(f.name, getattr(owner, f.name)) for f in dataclasses.fields(owner)]
    return [(str(name), value) for name, value in (owner.items() if isinstance(owner, dict) else enumerate(owner))]


def _holds_parts(value) -> bool:
    several = isinstance(value, tuple) and value and all(dataclasses.is_dataclass(each) for each in value)
    return dataclasses.is_dataclass(value) or isinstance(value, dict) or bool(several)


def override(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with `key=value` settings put on it.

    A key is a dotted path (`training.epochs`) or, where it is the only one of that name, its last part
    (`temperature`). Raises `InputError` for an unknown key, a value of another type, or one out of range.
    """
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise InputError(f"--set expects key=value, received '{setting}'. Example: --set training.epochs=3")
        path = path_of(recipe, key.strip())
        recipe = _replaced(recipe, path.split("."), text.strip(), path)
    return checked(recipe)


def path_of(recipe: Recipe, key: str) -> str:
    """The full path of a key as it may be typed: whole, without `options`, or its last part; or `InputError`."""
    known = keys(recipe)
    fixed = {"name", "variant", "grid", "published"}
    ends = [path for path in known if key in (path, path.split(".")[-1], path.replace(".options.", "."))]
    if key in known and key not in fixed:
        return key
    if len(ends) == 1 and key not in fixed:
        return ends[0]
    if len(ends) > 1 and key not in fixed:
        raise InputError(f"The key '{key}' is ambiguous. Write one of: {', '.join(ends)}.")
    raise unknown("key of --set", key, known.keys() - fixed)


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
            plain = kind in (tuple, list)  # an option of a network, whose items are what they look like: 8x16x24
            inner = (typing.get_args(kind) or (str,))[0]
            parts = [part.strip() for part in (text.replace("x", ",") if plain else text).split(",") if part.strip()]
            return tuple(int(part) if plain and part.isdigit() else inner(part) for part in parts)
        return kind(text)
    except (ValueError, KeyError, TypeError) as error:
        expected = getattr(kind, "__name__", str(kind))
        if Schedule in options:
            expected = f"{expected} or a schedule (shape:start:end[:begin[:finish]])"
        if isinstance(error, TypeError):
            raise InputError(f"The key '{path}' cannot be set from text; write it in a recipe file.") from None
        raise InputError(f"The key '{path}' expects {expected}, received '{text}'.") from None


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if every value is in its range."""
    data = recipe.data
    _check(0 < data.validation < 1, "data.validation", "a share between 0 and 1", data.validation)
    _check(data.shift >= 0, "data.shift", "a number of pixels, 0 or more", data.shift)
    _check(data.image_size is None or data.image_size >= 1, "data.image_size", "1 or more", data.image_size)
    _check(0 < data.crop_area <= 1, "data.crop_area", "a share above 0, up to 1 (off)", data.crop_area)
    _check(0 <= data.max_undecodable < 1, "data.max_undecodable", "a share below 1", data.max_undecodable)
    for name in ("mixup", "cutmix"):
        alpha = getattr(data, name)
        _check(0 <= alpha < math.inf, f"data.{name}", "0 (off) or more", alpha)
        _check(not alpha or data.labelled is None, f"data.{name}", "0 with data.labelled: no label is no blend", alpha)
    _check(data.train_limit is None or data.train_limit >= 1, "data.train_limit", "1 or more", data.train_limit)
    _check(data.labelled is None or data.labelled >= 1, "data.labelled", "1 or more, or none", data.labelled)
    _check(0 < data.labelled_share <= 1, "data.labelled_share", "a share above 0, up to 1", data.labelled_share)
    _check(data.teacher_labels in ("all", "same"), "data.teacher_labels", "all or same", data.teacher_labels)
    if data.labelled is None:
        _check(data.labelled_share == 1, "data.labelled_share", "1 without data.labelled", data.labelled_share)
        _check(data.teacher_labels == "all", "data.teacher_labels", "all without data.labelled", data.teacher_labels)
    _check(recipe.seed >= 0, "seed", "0 or more", recipe.seed)
    _check(recipe.seeds >= 1, "seeds", "1 or more", recipe.seeds)
    precisions = ("float32", "mixed_bfloat16", "mixed_float16")
    asked = recipe.teacher_precision
    _check(asked in (None, *precisions), "teacher_precision", f"none or one of {', '.join(precisions)}", asked)
    _check(recipe.precision in precisions, "precision", f"one of {', '.join(precisions)}", recipe.precision)
    check_distill(recipe.distill, 1 + len(recipe.more_teachers))
    tapping = [name for name, term in recipe.distill.terms.items() if term.teacher_tap]
    for part in ("more_teachers", "assistants"):
        expected = f"none, as the terms {', '.join(tapping)} look into the one teacher" if tapping else ""
        _check(not (tapping and getattr(recipe, part)), part, expected, getattr(recipe, part))
    for part in ("teacher", "student", "more_teachers", "assistants"):
        for network in (found,) if isinstance(found := getattr(recipe, part), Network) else found:
            _check_weights(network, part)
    for name, least in (("views", 1), ("seed", 0), ("top_k", 1)):
        value = getattr(recipe.cache, name)
        _check(value is None or value >= least, f"cache.{name}", f"{least} or more, or none", value)
    for part in ("teacher_training", "training"):
        _check_training(getattr(recipe, part), part)
    for place, stage in enumerate(recipe.compress):
        _check_stage(stage, f"compress.{place}")
    for part, network in (("student", recipe.student), *(("assistants", each) for each in recipe.assistants)):
        _check(network.file is None, f"{part}.file", "none: it is trained. weights gives it a start", network.file)
    return recipe


def _check_weights(network: Network, part: str) -> None:
    files, mapping = network.weights, network.mapping
    _check(not isinstance(files, str), f"{part}.weights", "several files, (file,) for one", files)
    _check(not (files and network.file), f"{part}.weights", f"none with {part}.file, which has its own", files)
    _check(files or not mapping, f"{part}.mapping", f"none without {part}.weights, the files to map", mapping)
    kind, form = (str, "{layer of the file: layer of the network}")
    if len(files) > 1:
        kind, form = dict, "{file: {its layer: layer of the network}} with several files"
    fits = all(isinstance(each, kind) and (kind is str or name in files) for name, each in mapping.items())
    _check(fits, f"{part}.mapping", form, mapping)


def _check_stage(stage: Stage, part: str) -> None:
    if stage.scheme not in SCHEMES:
        raise unknown("scheme", stage.scheme, SCHEMES, f"Fix {part}.scheme.")
    _check(stage.epochs >= 1, f"{part}.epochs", "1 or more", stage.epochs)
    _check(stage.batch_size >= 1, f"{part}.batch_size", "1 or more", stage.batch_size)
    _check(0 < stage.learning_rate < math.inf, f"{part}.learning_rate", "a number above 0", stage.learning_rate)
    for step, key in (("prune", "sparsity"), ("cluster", "clusters")):
        whole, single = ("final_sparsity" if step == "prune" else key), f"layer_{key}"
        given = {whole: getattr(stage, whole)} | {f"{single}.{k}": v for k, v in getattr(stage, single).items()}
        for name, value in given.items():
            if step not in SCHEMES[stage.scheme]:
                nothing = f"none in the scheme '{stage.scheme}', where it does nothing"
                _check(value is None, f"{part}.{name}", nothing, value)
            elif step == "prune":
                _check(value is None or 0 < value < 1, f"{part}.{name}", "a share between 0 and 1", value)
            else:
                _check(value is None or 3 <= value <= 256, f"{part}.{name}", "a number from 3 to 256", value)


def _check_training(training: Training, part: str) -> None:
    optimizers, schedules = ("adam", "sgd"), ("cosine", "constant", "step")
    _check(training.epochs >= 1, f"{part}.epochs", "1 or more", training.epochs)
    _check(training.batch_size >= 1, f"{part}.batch_size", "1 or more", training.batch_size)
    rate = training.learning_rate
    _check(0 < rate < math.inf, f"{part}.learning_rate", "a number above 0", rate)
    _check(training.optimizer in optimizers, f"{part}.optimizer", " or ".join(optimizers), training.optimizer)
    _check(training.schedule in schedules, f"{part}.schedule", " or ".join(schedules), training.schedule)
    _check(0 <= training.warmup < 1, f"{part}.warmup", "a share from 0 to below 1", training.warmup)
    if training.schedule == "step":
        _check(training.warmup == 0, f"{part}.warmup", "0 with the schedule 'step'", training.warmup)
        _check(0 < training.drop_at < 1, f"{part}.drop_at", "a share between 0 and 1", training.drop_at)
        _check(0 < training.drop_factor < 1, f"{part}.drop_factor", "a share between 0 and 1", training.drop_factor)
    else:
        for name in ("drop_at", "drop_factor"):
            value, usual = getattr(training, name), getattr(Training(), name)
            _check(value == usual, f"{part}.{name}", f"{usual}, but with the schedule 'step'", value)
    _check(training.weight_decay >= 0, f"{part}.weight_decay", "0 or more", training.weight_decay)
    momentum = training.momentum
    _check(0 <= momentum < 1, f"{part}.momentum", "a number from 0 to below 1", momentum)
    used = training.optimizer == "sgd" or momentum == 0
    _check(used, f"{part}.momentum", "0 with adam, which ignores it", momentum)
