"""The precision in which Keras layers compute: the global dtype policy, set for a while, and layers with integers."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import keras

from kdistill.errors import InputError
from kdistill.networks.keras_internals import layers_of


@contextmanager
def dtype_policy(policy: str | keras.DTypePolicy) -> Iterator[None]:
    """Sets Keras's global dtype policy, for example `"mixed_bfloat16"`, and restores the previous one at the end.

    New layers take the global policy; layers that exist keep theirs.
    """
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def check_not_quantized(model: keras.Model, allowed: Collection[str] = ()) -> None:
    """Raises `InputError` for a layer that `model.quantize()` has quantized, except in the `allowed` modes."""
    for layer in layers_of(model):
        mode = getattr(layer, "quantization_mode", None)
        if mode is not None and mode not in allowed:
            raise InputError(
                f"Layer '{layer.name}' ({type(layer).__name__}) of the model '{model.name}' is already quantized "
                f"({mode}), by model.quantize(). kdistill quantizes itself, by a profile or a stage: pass the model "
                "from before model.quantize()."
            )
