"""The ranges of quantization-aware training, measured: tfmot's own start at -6..6 and move by 0.1 % per step.

A network whose activations are hundreds wide (VGG and ResNet, which subtract the mean of the pixels) would compute with
clipped numbers all through a short training, and one whose activations are tiny with a handful of values.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np

from kdistill.compression.finetune import Batches
from kdistill.compression.tfmot import quantization
from kdistill.errors import CheckFailed

IMAGES = 500  # on which ranges are measured, in whole batches
GROUP = 128  # images whose extremes count once, whatever the batch size: those of a few images are too narrow
quantizers = quantization.quantizers
_measure_kernel = quantizers.LastValueQuantizer.__call__  # the function itself, while `_observing` replaces it


def measure(network, batches: Batches) -> int:
    """Sets every range of a network in tfmot's wrappers, as the network computes without rounding; returns how many.

    The range of an activation is the mean over groups of images of their smallest and largest value, of the input that
    of all images. Zero is always inside. The range of a kernel is that of its weights. A range without width (a layer
    whose activations are all zero) stays as it was.

    Args:
        network: a network from `tfmot.quantize`, trained or not.
        batches: of which the first of the first epoch are used, `IMAGES` images.

    Raises:
        CheckFailed: activations are NaN or infinite on these images.
    """
    measured = {}  # a quantizer, its variables, and its extremes by group; a shared layer has one for all its calls
    count = 0

    def observe(quantizer, inputs, variables):
        if isinstance(quantizer, quantizers.LastValueQuantizer):
            _measure_kernel(quantizer, inputs, True, variables)
        elif variables:  # of an activation
            _, _, extremes = measured.setdefault(id(variables["min_var"]), (quantizer, variables, {}))
            low, high = extremes.get(count // GROUP, (np.inf, -np.inf))
            values = inputs.numpy()
            extremes[count // GROUP] = np.minimum(low, values.min()), np.maximum(high, values.max())  # NaN stays NaN
        return inputs

    with _observing(observe):
        for images, _ in batches.of_epoch(0):
            network(images, training=False)
            count += len(images)
            if count >= IMAGES:
                break
    for quantizer, variables, extremes in measured.values():
        low, high = np.transpose(list(extremes.values()))
        if not np.isfinite([low, high]).all():
            layer = variables["min_var"].name.split("/")[0].removeprefix("quant_")
            raise CheckFailed(
                f"The activations of layer '{layer}' are NaN or infinite on the training images, so that int8 has no "
                "range for them. Check the pixels and the weights of the model."
            )
        whole = isinstance(quantizer, quantizers.AllValuesQuantizer)
        low, high = (low.min(), high.max()) if whole else (low.mean(), high.mean())
        if min(low, 0) < max(high, 0):
            variables["min_var"].assign(min(low, 0))
            variables["max_var"].assign(max(high, 0))
    return len(measured)


@contextlib.contextmanager
def _observing(observe: Callable) -> Iterator[None]:
    """Calls `observe(quantizer, inputs, variables)` instead of every quantizer of tfmot, in this thread."""
    thread = threading.get_ident()
    calls = {kind: kind.__call__ for kind in _kinds(quantizers.Quantizer) if "__call__" in vars(kind)}

    def replace(kind, call):
        def observed(self, inputs, training, weights, **kwargs):
            if threading.get_ident() != thread:
                return call(self, inputs, training, weights, **kwargs)
            return observe(self, inputs, weights)

        kind.__call__ = observed

    try:
        for kind, call in calls.items():
            replace(kind, call)
        yield
    finally:
        for kind, call in calls.items():
            kind.__call__ = call


def _kinds(kind: type) -> set[type]:
    """A class and all that derive from it."""
    return {kind}.union(*(_kinds(derived) for derived in kind.__subclasses__()))
