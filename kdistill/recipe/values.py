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

# What an output means: exclusive classes, labels that do not exclude each other, or numbers.
MEANINGS = CLASSES, LABELS, NUMBERS = "classes", "labels", "numbers"
# The precisions of a teacher that LiteRT runs, and how its file is quantized.
LITERT = {"litert": "none", "litert_dynamic": "dynamic", "litert_int8": "int8"}


@dataclass(frozen=True)
class Data:
    """The data set, its held-out share, and the augmentation of training images (the same for every model)."""

    name: str = "mnist"
    # npz: what its labels are, for arrays other than images with a class: classes, labels (independent), numbers; of
    # several outputs {output: ...}
    head: str | dict | None = None
    validation: float = 0.1  # share of the training images held out for validation, which picks; test reports
    shift: int = 0  # random translation by up to this many pixels in each direction, edges filled with zeros
    flip: bool = False  # random left-right flip
    image_size: int | None = None  # imagenet, image_folder: images are cropped and resized to this many pixels squared
    crop_area: float = 1.0  # random crops of at least this share of the area, resized (0.08 is usual for ImageNet)
    mixup: float = 0.0  # alpha: blends images and labels of a batch in pairs, by a share from Beta(alpha, alpha)
    cutmix: float = 0.0  # alpha: pastes a rectangle of one image into another; with mixup: one of both per batch
    max_undecodable: float = 0.001  # highest share of damaged image files; they are skipped and named
    train_limit: int | None = None  # use only the first images of each split, this many (smoke variants)
    labeled: int | None = None  # students see the labels of this many images, validation included; None: all
    labeled_share: float = 1.0  # and of this share of the images at most
    teacher_labels: str = "all"  # all: the teacher is trained on every label; same: on the students' labels only


@dataclass(frozen=True)
class Network:
    """A network of `kdistill.networks` by name with its options, or a trained one from a file.

    A teacher's `file` may be of any format (`docs/teachers.md`); the settings at the end say how that teacher sees the
    images, and what its outputs are.

    `weights` are files whose weights it starts with; `mapping` says which layer of a file fills which layer, without it
    names have to be equal (see `kdistill.weights`). A teacher with `weights` is not trained.
    """

    name: str
    options: dict = field(default_factory=dict)
    file: str | None = None  # .keras, .h5, SavedModel folder, .tflite, .onnx, .py, .npz of store_teacher, http(s)://
    weights: tuple[str, ...] = ()  # .keras, .weights.h5 or .npz files
    mapping: dict = field(default_factory=dict)  # {file's layer: network's layer}; of several files {file: {...}}
    # Of a teacher's file; None: as the file states it.
    python: str | None = None  # the interpreter that runs it, in an environment of its own
    timeout: float | None = None  # seconds for its start and for each batch
    size: tuple[int, ...] | None = None  # height and width of its images
    channels: int | None = None  # 1 or 3
    bgr: bool | None = None
    scale: float | None = None  # (pixel * scale - mean) / std: one number, or one for each channel
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    layout: str | None = None  # channels_last, channels_first
    outputs: str | None = None  # logits, probabilities
    output: str | None = None  # the name of one of several outputs
    classes: tuple[int, ...] | None = None  # the places of the data's classes among its own


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
    drop_at: float = 0.8  # step only: the rate drops after this share of the steps
    drop_factor: float = 0.1  # step only: the rate is multiplied by this
    warmup: float = 0.0  # share of the steps in which the rate rises from zero


# The steps of each scheme, in this order; each is fine-tuned. int8 is quantization after training, without steps.
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
    """One compression, see `kdistill.compress`. In a recipe it starts from the stage before, or from the student.

    It is fine-tuned with the recipe's teacher and loss, and, with the same budget, on labels alone.
    """

    scheme: str
    epochs: int = 2  # of each step of the scheme
    batch_size: int = 128
    learning_rate: float = 1e-3  # of Adam; it decays to zero along a cosine in each step
    final_sparsity: float | None = None  # share of zeros after pruning; None: 0.8
    clusters: int | None = None  # different values in each kernel after clustering; None: 16
    layer_sparsity: dict = field(default_factory=dict)  # {layer: share}: other goals for single layers
    layer_clusters: dict = field(default_factory=dict)  # {layer: number}
    skip: tuple[str, ...] = ()  # layers that stay as they are


@dataclass(frozen=True)
class Cache:
    """The views of the training images that control and student see (an epoch's order, augmentation and mixing), and
    how the teacher's outputs for them are stored where they are stored (`--cache`)."""

    views: int | None = None  # views repeat after this many epochs; None: every epoch has its own
    seed: int | None = None  # seed of the views; None: the run's. Runs with one seed share views and cache
    top_k: int | None = None  # store the k largest logits of an image, and the mass of the rest; None: all


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
    compress: tuple[Stage, ...] = ()  # compressions of the student, one after the other
    exports: tuple[str, ...] = ("reference", "phone_gpu", "phone_cpu", "npu")
    repair: bool = False  # makes a file that loses too much in other ways, see `kdistill.repair`
    seed: int = 0
    seeds: int = 1  # control and student are trained with this many seeds, from `seed` on; the teacher once
    max_seeds: int | None = None  # adds seeds up to this number until the verdict is clear; None: never
    margin: float = 0.002  # the verdict counts smaller differences of accuracy, a share of 1, as equal
    precision: str = "float32"  # float32, mixed_bfloat16, mixed_float16
    # Of the teacher: one of those for `precision`, in which it is trained, where the run trains it, and runs for
    # students; or one of `LITERT`, for its forward pass. None: it is trained in `precision`, and runs in its own.
    teacher_precision: str | None = None
    variant: str = "default"
    grid: tuple[str, ...] = ()  # the grid of `kdistill sweep` without --grid: ("training.learning_rate=0.01,0.1",)
    published: tuple[tuple[str, float], ...] = ()  # published accuracies by row of a sweep, shown beside ours


@dataclass(frozen=True)
class Profile:
    """One kind of device: what a `.tflite` file for it looks like, and the limits that the file must keep."""

    name: str
    quantization: str = "none"  # none, float16, dynamic (int8 weights), int8 (weights, activations), int4 (weights)
    input_type: str = "float32"  # float32, uint8 (raw pixels, as from a camera), int8 (with int8 only)
    output_type: str = "float32"  # float32; int8 and uint8 with int8 only
    batch: int | None = None  # None: any batch size
    output: str | None = None  # None: as the model; logits; probabilities (adds a softmax where the model has none)
    channels: int | None = None  # None: as the model; 3: a model of gray images takes color and converts it to gray
    operators: str = "builtin"  # builtin; micro: only operators that TensorFlow Lite Micro has, too
    c_array: bool = False  # also writes the file as C++ source, with an estimate of the arena
    mean: tuple[float, ...] = ()  # the graph computes (pixel - mean) / std: one number, or one per channel
    std: tuple[float, ...] = ()
    max_drop: float = 0.002  # largest accuracy loss against the Keras model, as a share of 1
    min_agreement: float = 0.99  # share of test images with the same predicted class
    compact: bool = False  # short names of tensors, and metadata without the recipe; `npu:compact` names such a profile


FILE_SETTINGS = tuple(field.name for field in dataclasses.fields(Network))[5:]  # of a teacher's file


def as_dict(value) -> dict:
    """A recipe or profile as plain, JSON-ready values, without the settings of a teacher's file that are not given.

    `repair` and `compact` are there only where they are on, so that folders of earlier versions stay what they are.
    """
    return json.loads(json.dumps(dataclasses.asdict(value, dict_factory=_without_unset)))


def _without_unset(items: list) -> dict:
    return {
        name: value
        for name, value in items
        if (value is not None or name not in FILE_SETTINGS) and not (name in ("repair", "compact") and value is False)
    }


def from_dict(kind: type, values: dict):
    """The inverse of `as_dict`."""
    hints = typing.get_type_hints(kind)
    fields = {f.name for f in dataclasses.fields(kind)}
    for name in values:
        if name not in fields:
            raise unknown(f"key of {kind.__name__}", name, fields)
    return kind(**{name: _field_value(hints[name], value) for name, value in values.items()})


def _field_value(hint, value):
    """A plain value as the type that a field is declared with."""
    inner = typing.get_args(hint)
    if isinstance(value, dict):
        kind = next((option for option in (hint, *inner) if dataclasses.is_dataclass(option)), None)
        if typing.get_origin(hint) is dict:
            return {name: _field_value(inner[1], item) for name, item in value.items()}
        return from_dict(kind, value) if kind else value
    if isinstance(value, (list, tuple)):
        return tuple(_field_value(inner[0], item) if inner else item for item in value)
    return value
