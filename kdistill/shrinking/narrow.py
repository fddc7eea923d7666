"""The teacher made narrower: whole filters and units are removed, those with the smallest weights first.

Li et al. 2017 (arXiv 1608.08710) prune filters by their norm; where a normalization follows, its scale counts. Works
for chains of ordinary layers; a network with branches or other layers is not narrowed.
"""

from pathlib import Path

import keras
import numpy as np

from kdistill.networks import saving
from kdistill.recipe import Network
from kdistill.shrinking.space import Family

STEPS = 16  # a width is a number of sixteenths of the teacher's filters
LAYERS = keras.layers
WEIGHTED = {LAYERS.Conv1D: "filters", LAYERS.Conv2D: "filters", LAYERS.Dense: "units"}
# Of each channel alone, without weights: channels stay what they are.
PLAIN = (
    *(LAYERS.ReLU, LAYERS.LeakyReLU, LAYERS.ELU, LAYERS.Activation, LAYERS.Dropout, LAYERS.SpatialDropout2D),
    *(LAYERS.MaxPooling1D, LAYERS.MaxPooling2D, LAYERS.AveragePooling1D, LAYERS.AveragePooling2D, LAYERS.ZeroPadding2D),
    *(LAYERS.GlobalAveragePooling1D, LAYERS.GlobalAveragePooling2D, LAYERS.GlobalMaxPooling1D),
    *(LAYERS.GlobalMaxPooling2D, LAYERS.Rescaling),
)
MODULE = '''"""The teacher made narrower by kdistill shrink: the start of a student."""

from pathlib import Path

import keras


def student(shape, classes, sixteenths):
    """The teacher with this share of its filters, and their weights."""
    return keras.models.load_model(Path(__file__).with_name(f"{sixteenths}.keras"))
'''


def family_of(teacher: keras.Model, folder: Path) -> Family | None:
    """The family of a teacher's narrower copies, which are written to this folder; None if it cannot be narrowed."""
    if not can_be_narrowed(teacher):
        return None

    def network(width: int, depth: int, reduce: int) -> Network:
        path = folder / f"{width}.keras"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "narrowed.py").write_text(MODULE, encoding="utf-8")
            saving.save_model(narrowed(teacher, width / STEPS), path)
        return Network(f"{folder / 'narrowed.py'}:student", {"sixteenths": width})

    return Family("teacher", None, (1,), network, widest=STEPS - 1)


def can_be_narrowed(model: keras.Model) -> bool:
    """Whether a model is a chain of layers of which each keeps, gives or weights channels."""
    if not isinstance(model, (keras.Sequential, keras.Model)) or not hasattr(model, "layers"):
        return False
    layers = [layer for layer in model.layers if not isinstance(layer, LAYERS.InputLayer)]
    try:
        chain = _is_chain(model, layers)
    except (AttributeError, ValueError):  # a layer that is shared, or has no single input
        return False
    known = all(
        type(layer) in WEIGHTED
        or type(layer) in PLAIN
        or type(layer) in (LAYERS.BatchNormalization, LAYERS.DepthwiseConv2D, LAYERS.Flatten)
        for layer in layers
    )
    return chain and known and sum(type(layer) in WEIGHTED for layer in layers) > 1 and _is_ordinary(layers)


def _is_chain(model: keras.Model, layers: list) -> bool:
    """Whether each layer takes the output of the one before."""
    tensors = model.inputs
    if len(tensors) != 1 or len(model.outputs) != 1:
        return False
    before = tensors[0]
    for layer in layers:
        if layer.input is not before:
            return False
        before = layer.output
    return before is model.outputs[0]


def _is_ordinary(layers: list) -> bool:
    for layer in layers:
        config = layer.get_config()
        if config.get("groups", 1) != 1 or config.get("depth_multiplier", 1) != 1:
            return False
        last_axis = len(layer.output.shape) - 1
        if config.get("data_format") == "channels_first" or config.get("axis", -1) not in (-1, [-1], last_axis):
            return False
        if config.get("activation") == "softmax" and layer is not layers[-1]:
            return False
    return type(next(layer for layer in reversed(layers) if layer.weights)) in WEIGHTED


def narrowed(teacher: keras.Model, share: float) -> keras.Model:
    """A model with this share of the filters and units of each layer but the last, and their weights."""
    layers = [layer for layer in teacher.layers if not isinstance(layer, LAYERS.InputLayer)]
    last = max(place for place, layer in enumerate(layers) if type(layer) in WEIGHTED)
    x = inputs = keras.Input(teacher.inputs[0].shape[1:], name=teacher.inputs[0].name)
    kept = np.arange(inputs.shape[-1])
    for place, layer in enumerate(layers):
        config, weights, before = layer.get_config(), layer.get_weights(), kept
        if type(layer) in WEIGHTED:
            kernel = weights[0][..., kept, :]
            count = kernel.shape[-1]
            kept = np.arange(count)
            if place < last:
                kept = _strongest(weights[0], layers[place + 1], max(1, round(share * count)))
            config[WEIGHTED[type(layer)]] = len(kept)
            weights = [kernel[..., kept], *(bias[kept] for bias in weights[1:])]
        elif isinstance(layer, LAYERS.DepthwiseConv2D):
            weights = [weights[0][:, :, kept], *(bias[kept] for bias in weights[1:])]
        elif isinstance(layer, LAYERS.BatchNormalization):
            weights = [values[kept] for values in weights]
        elif isinstance(layer, LAYERS.Flatten):
            positions, channels = int(np.prod(layer.input.shape[1:-1])), layer.input.shape[-1]
            kept = (np.arange(positions)[:, None] * channels + before).ravel()
        # The weights are copied; an initializer may hold an array, which has as many filters as the teacher.
        config = {name: value for name, value in config.items() if not name.endswith("_initializer")}
        copy = type(layer).from_config(config)
        x = copy(x)
        if layer.weights:
            copy.set_weights(weights)
    return keras.Model(inputs, x, name="teacher_narrowed")


def _strongest(kernel: np.ndarray, following, count: int) -> np.ndarray:
    """The places of the filters with the largest norm, times the scale of the normalization that follows."""
    norms = np.sqrt((kernel.astype(np.float64) ** 2).sum(axis=tuple(range(kernel.ndim - 1))))
    if isinstance(following, LAYERS.BatchNormalization) and following.scale:
        variance = np.asarray(following.moving_variance, np.float64)
        norms *= np.abs(np.asarray(following.gamma)) / np.sqrt(variance + following.epsilon)
    return np.sort(np.argsort(-norms, kind="stable")[:count])
