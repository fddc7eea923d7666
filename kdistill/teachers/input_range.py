"""Whether a model gets its inputs in the range on which it was trained: raw pixels, 0 to 1, or -1 to 1.

Nothing in a model file states the range. Three things give it away: the accuracy with other ranges, the statistics of a
trained batch normalization, and what the first layer with weights receives. The first one is a measurement; the others
need no labels. Keras is imported where a model is looked into.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kdistill.errors import InputError
from kdistill.teachers.gain import MIN_GAIN, better

if TYPE_CHECKING:
    import keras

IMAGES = 64  # that run through the first layers of a model
LABELED = 500  # images on which accuracies are compared
UNSCALED = 30.0  # inputs that are never negative and reach this are not scaled pixels
SQUEEZED = 0.03  # a first layer that sees less contrast than this gets pixels that were scaled twice
MISMATCH, MATCH = 10.0, 4.0  # factor between the standard deviations of inputs and those of a batch normalization


class Scale(NamedTuple):
    """A change of range, in words, and its numbers: `(input - mean) / std`."""

    words: str
    mean: float
    std: float

    @property
    def arguments(self) -> str:
        """The change as arguments of a call."""
        return f"mean={_number(self.mean)}, std={_number(self.std)}"

    @property
    def factor(self) -> str:
        """The change as arguments of `keras.layers.Rescaling`."""
        offset = f", {-self.mean / self.std:g}" if self.mean else ""
        return f"1 / {self.std:g}{offset}" if self.std > 1 else f"{1 / self.std:g}{offset}"


RAW = (Scale("pixels / 255", 0.0, 255.0), Scale("pixels / 127.5 - 1", 127.5, 127.5))
UNIT = (Scale("inputs * 255", 0.0, 1 / 255), Scale("inputs * 2 - 1", 0.5, 0.5))
SIGNED = (Scale("(inputs + 1) * 127.5", -1.0, 1 / 127.5), Scale("(inputs + 1) / 2", -1.0, 2.0))


class Finding(NamedTuple):
    """A sentence about inputs in the wrong range, and the change that fits.

    `measured`: by accuracy or a batch normalization, and not guessed from what a layer receives.
    """

    sentence: str
    scale: Scale
    measured: bool = True


# -- mean and std -----------------------------------------------------------------------------------------------------


def normalization(mean, std) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The arguments `mean` and `std` of a call as tuples; None if both are None. One that is None is 0 or 1.

    Raises `InputError` for what is not a number, or one for each channel, and for a `std` that is not above 0.
    """
    if mean is None and std is None:
        return None
    numbers = []
    for name, value, default in (("mean", mean, 0.0), ("std", std, 1.0)):
        try:
            values = np.atleast_1d(np.asarray(default if value is None else value, np.float64))
        except (TypeError, ValueError):
            values = np.array([np.nan])
        if values.ndim != 1 or len(values) not in (1, 3) or not np.isfinite(values).all():
            raise InputError(f"{name} expects a number, or one for each of three channels, received {value!r}.")
        numbers.append(tuple(values.tolist()))
    if min(numbers[1]) <= 0:
        raise InputError(f"std expects numbers above 0, received {std!r}.")
    return tuple(numbers)


def normalized(images: np.ndarray, mean: float | Sequence[float], std: float | Sequence[float]) -> np.ndarray:
    """`(image - mean) / std`, float32. Raises `InputError` unless there is one number, or one for each channel."""
    channels = images.shape[-1]
    for name, values in (("mean", mean), ("std", std)):
        if np.size(values) not in (1, channels):
            raise InputError(f"{name} expects 1 or {channels} numbers, received {np.size(values)}.")
    return (images.astype(np.float32) - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


class Normalized:
    """Images that are normalized on access: as many at a time as a model takes at once."""

    dtype = np.dtype(np.float32)

    def __init__(self, images, mean: Sequence[float], std: Sequence[float]):
        if len(mean) not in (1, images.shape[-1]) or len(std) not in (1, images.shape[-1]):
            raise InputError(f"mean and std expect 1 or {images.shape[-1]} numbers, received {len(mean)}, {len(std)}.")
        self.images, self.mean, self.std = images, mean, std
        self.shape, self.ndim = images.shape, images.ndim

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, which) -> np.ndarray:
        return normalized(self.images[which], self.mean, self.std)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.float32, copy=False)


# -- measured accuracy ------------------------------------------------------------------------------------------------


def other_scales(images: np.ndarray) -> tuple[Scale, ...]:
    """The changes that may be missing, by the range of these numbers; none for a range that is no custom."""
    low, high = float(images.min()), float(images.max())
    if low >= 0 and high >= UNSCALED:
        return RAW
    if low >= 0 and high <= 1:
        return UNIT
    return SIGNED if low >= -1 and high <= 1 else ()


def compare_accuracies(
    predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray, labels: np.ndarray, subject: str
) -> tuple[float, Finding | None]:
    """The accuracy on these images, a share of 1, and whether it is much higher after a change of range.

    Args:
        predict: float32 images -> scores `[n, classes]`.
        images: `[n, ...]`, as the model gets them.
        labels: classes `[n]`.
        subject: names the model, such as "the teacher 'net'".
    """

    def right(numbers) -> np.ndarray:
        scores = np.asarray(predict(numbers))
        outputs.append(scores.shape[-1])
        return scores.argmax(axis=-1) == labels

    outputs: list[int] = []
    images = images.astype(np.float32)
    own = right(images)
    received = float(own.mean())
    if received + MIN_GAIN > 1:
        return received, None
    results = {scale: right(normalized(images, scale.mean, scale.std)) for scale in other_scales(images)}
    best = better(own, results, labels, outputs[0])
    if best is None:
        return received, None
    sentence = (
        f"The accuracy of {subject} is {received:.1%} on {len(labels)} images, but {results[best].mean():.1%} with "
        f"{best.words}: its inputs look unnormalized."
    )
    return received, Finding(sentence, best)


# -- what the first layers receive ------------------------------------------------------------------------------------


class _Stop(Exception):
    """Ends a pass through a model: what was needed is known."""


def first_inputs(model: "keras.Model", images: np.ndarray) -> dict[str, tuple["keras.layers.Layer", np.ndarray]]:
    """The first layers of a model in inference mode, each with its inputs.

    `weights`: the first layer with weights, where `Normalization` counts as scaling and not as such a layer.
    `statistics`: the first `BatchNormalization`. Both are absent if the model has no graph (subclassed), or does not
    take the images.
    """
    import keras

    from kdistill.networks.keras_internals import graph_of, layers_of, run_graph, takes_training

    seen = {}
    norms = {id(layer) for layer in layers_of(model) if isinstance(layer, keras.layers.BatchNormalization)}

    def call(operation, *args, **kwargs):
        if graph_of(operation) is not None and len(args) == 1 and not isinstance(args[0], (dict, list, tuple)):
            return run_graph(graph_of(operation), args[0], call)
        if isinstance(operation, keras.Model):  # a subclassed one: it may scale its inputs
            raise _Stop
        if isinstance(operation, keras.layers.Layer) and operation.weights:
            inputs = args[0] if args else None
            if not isinstance(operation, keras.layers.Normalization):
                seen.setdefault("weights", (operation, inputs))
            if id(operation) in norms:
                seen.setdefault("statistics", (operation, inputs))
            if "weights" in seen and ("statistics" in seen or not norms):
                raise _Stop
        if takes_training(operation):
            kwargs = {**kwargs, "training": False}
        return operation(*args, **kwargs)

    graph = graph_of(model)
    if graph is None or len(graph.inputs) != 1:
        return {}
    shape = graph.inputs[0].shape
    if images.ndim == len(shape) - 1 and shape[-1] == 1:  # as Keras does
        images = images[..., None]
    pairs = zip(shape[1:], images.shape[1:], strict=False)
    if images.ndim != len(shape) or any(size not in (None, received) for size, received in pairs):
        return {}
    # A user's layer may raise anything, such as for images of another size: whoever runs the model says so better.
    with contextlib.suppress(_Stop, Exception):
        run_graph(graph, keras.ops.convert_to_tensor(images.astype(np.float32)), call)
    return {
        name: (layer, np.asarray(keras.ops.convert_to_numpy(keras.ops.cast(inputs, "float32"))))
        for name, (layer, inputs) in seen.items()
        if getattr(inputs, "shape", None) is not None
    }


def look_into(model: "keras.Model", images: np.ndarray, subject: str) -> Finding | None:
    """Whether the first layers of a model show that these images are in another range than it expects.

    Args:
        images: `[n, ...]`, as the model gets them; up to 64 are used.
        subject: names the model, such as "the teacher 'net'".
    """
    images = images[:IMAGES].astype(np.float32)
    first = first_inputs(model, images)
    if "statistics" in first:
        finding = _by_statistics(model, images, first, subject)
        if finding or _is_trained(first["statistics"][0]):
            return finding
    return _by_contrast(images, first, subject)


def _is_trained(norm: "keras.layers.BatchNormalization") -> bool:
    mean, variance = (np.asarray(weight) for weight in (norm.moving_mean, norm.moving_variance))
    return bool((mean != 0).any() or (variance != 1).any())


def find(
    images: np.ndarray,
    subject: str,
    model: "keras.Model | None" = None,
    predict: Callable[[np.ndarray], np.ndarray] | None = None,
    labels: np.ndarray | None = None,
) -> Finding | None:
    """Whether a trained model gets images in another range than it expects.

    The statistics of a batch normalization decide, else accuracy, where there are labels `[n]` and `predict`, else what
    the first layer with weights receives. A model whose layers show that raw pixels are right does not predict at all.
    """
    finding = None if model is None else look_into(model, images, subject)
    if labels is None or predict is None or (finding and finding.measured):
        return finding
    if finding is None and model is not None and other_scales(images) is RAW:
        from kdistill.networks.keras_internals import graph_of  # a .tflite needs no TensorFlow

        if graph_of(model) is not None:
            return None
    return compare_accuracies(predict, images, labels, subject)[1]


def _by_statistics(model, images: np.ndarray, first: dict, subject: str) -> Finding | None:
    norm = first["statistics"][0]
    factor = _spread(*first["statistics"])
    if not _is_trained(norm) or factor is None or 1 / MISMATCH < factor < MISMATCH:
        return None
    distances = {}
    for scale in other_scales(images):
        again = first_inputs(model, normalized(images, scale.mean, scale.std))
        distances[scale] = _distance(*again["statistics"]) if "statistics" in again else np.inf
    best = min(distances, key=distances.get, default=None)
    if best is None or distances[best] > np.log(MATCH):
        return None
    ratio = f"{factor:.0f} times as large as" if factor > 1 else f"{1 / factor:.0f} times smaller than"
    return Finding(
        f"The inputs of the layer '{norm.name}' of {subject} are {ratio} those on which it was trained, but fit with "
        f"{best.words}: its inputs look unnormalized.",
        best,
    )


def _spread(norm, values: np.ndarray) -> float | None:
    """The standard deviation of a layer's inputs as a multiple of the moving one, the median of the channels."""
    variances, _, moving, _ = _moments(norm, values)
    return float(np.sqrt(np.median(variances / moving))) if len(moving) else None


def _distance(norm, values: np.ndarray) -> float:
    """How far the inputs are from the moving statistics: the logarithm of a factor, 0 if they are equal."""
    variances, means, moving, moving_means = _moments(norm, values)
    second = (variances + (means - moving_means) ** 2) / moving
    return abs(float(np.log(np.sqrt(np.median(second))))) if len(moving) else np.inf


def _moments(norm, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """Variances and means of the inputs, then the moving ones, of the channels that are in use."""
    axes = tuple(axis for axis in range(values.ndim) if axis != norm.axis % values.ndim)
    moving, moving_means = (np.asarray(weight, np.float64) for weight in (norm.moving_variance, norm.moving_mean))
    variances, means = values.var(axis=axes, dtype=np.float64), values.mean(axis=axes, dtype=np.float64)
    # Channels without any variance are dead; the moving variance of such a channel is what is left of its first value.
    used = (variances > 1e-6 * variances.max()) & (moving > 1e-6 * moving.max())
    return variances[used], means[used], moving[used], moving_means[used]


def _by_contrast(images: np.ndarray, first: dict, subject: str) -> Finding | None:
    import keras

    layer, values = first.get("weights", (None, None))
    others = keras.layers.Embedding, keras.layers.LayerNormalization, keras.layers.GroupNormalization
    if layer is None or isinstance(layer, others) or not values.size or not np.isfinite(values).all():
        return None
    low, high = float(values.min()), float(values.max())
    scales = other_scales(images)
    if low >= 0 and high >= UNSCALED and not isinstance(layer, keras.layers.BatchNormalization):
        received = f"receives inputs from {low:g} to {high:g}: they look unscaled."
        return Finding(f"The layer '{layer.name}' of {subject} {received}", RAW[0], measured=False)
    contrast = np.ptp(values.reshape(-1, values.shape[-1]), axis=0).max()
    if scales in (UNIT, SIGNED) and np.ptp(images) > SQUEEZED and contrast < SQUEEZED * max(1, abs(low), abs(high)):
        return Finding(
            f"The images are from {images.min():g} to {images.max():g}, and {subject} scales them itself: its layer "
            f"'{layer.name}' receives inputs from {low:.4g} to {high:.4g}, almost without contrast.",
            scales[0],
            measured=False,
        )
    return None


# -- warnings ---------------------------------------------------------------------------------------------------------


def range_warning(
    images,
    subject: str,
    model: "keras.Model | None" = None,
    predict: Callable[[np.ndarray], np.ndarray] | None = None,
    labels: np.ndarray | None = None,
    stated: tuple[Sequence[float], Sequence[float]] | None = None,
    labeled: int = LABELED,
) -> str | None:
    """A warning if a trained model gets images in another range than it expects, with the way out, or None.

    Args:
        images: `[n, height, width, channels]`; as many as are needed are read.
        subject: names the model, such as "the model 'net'".
        model: The model, if it is one of Keras.
        predict: images -> scores `[n, classes]`, for the accuracy, see `find`.
        labels: Classes `[n]`; below 0 means "unlabeled". Other labels count as none.
        stated: The mean and std that were passed. Then accuracy alone may object.
        labeled: The number of images on which accuracies are compared, at most.
    """
    labels = np.asarray(labels) if labels is not None and predict is not None else np.zeros(0)
    if labels.ndim != 1 or labels.dtype.kind not in "ui" or not (labels >= 0).any():
        labels = np.zeros(0, int)
    places = np.flatnonzero(labels >= 0) if len(labels) else np.arange(len(images))
    places = places[np.linspace(0, len(places) - 1, min(len(places), labeled if len(labels) else IMAGES)).astype(int)]
    if len(places) == 0:
        return None
    numbers = images[places] if stated is None else normalized(images[places], *stated)
    finding = find(
        numbers, subject, model if stated is None else None, predict, labels[places] if len(labels) else None
    )
    return None if finding is None else f"{finding.sentence} {_advice(finding.scale, stated)}"


def _advice(scale: Scale, stated: tuple[Sequence[float], Sequence[float]] | None) -> str:
    if stated is None:
        return (
            f"Pass mean={_number(scale.mean)} and std={_number(scale.std)} (--mean and --std of a command): the model "
            "then gets (pixel - mean) / std. If the images are right as they are, pass mean=0 and std=1."
        )
    mean, std = (np.asarray(values) for values in stated)
    mean, std = mean + std * scale.mean, std * scale.std
    if np.allclose(mean, 0) and np.allclose(std, 1):
        return "Leave out mean and std."
    texts = [", ".join(_number(float(value)) for value in values) for values in (mean, std)]
    return f"Pass mean={texts[0]} and std={texts[1]} instead."


def _number(value: float) -> str:
    """A number as one would write it: 1/255 for 0.00392157."""
    inverse = 1 / value if value else 0.0
    return f"1/{inverse:g}" if inverse > 2 and abs(inverse - round(inverse, 3)) < 1e-6 else f"{value:.6g}"
