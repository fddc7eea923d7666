"""What a run is: frozen dataclasses, and how overrides such as `training.epochs=3` are put on them.

Standard library only. A recipe file (`recipes/mnist.py`, or a user's own) has a docstring and a function
`recipe(variant) -> Recipe`; a profile file (`exports/npu.py`) has a docstring and `profile() -> Profile`.
"""

import dataclasses
import json
import typing
from dataclasses import dataclass, field

from kdistill.errors import unknown
from kdistill.recipe.objective import Distill
from kdistill.recipe.objective import Term as Term  # recipes import from here alone


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
    labeled: int | None = None  # students see the labels of so many images, validation among them; None: of all
    labeled_share: float = 1.0  # and of this share of the images at most
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


# What a compression does, one step after the other, each fine-tuned; int8 is quantization without training.
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
    channels: int | None = None  # None: as the model; 3: a model of gray images gets color and reduces it itself
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
