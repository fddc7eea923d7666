"""The precision in which Keras layers compute: the global dtype policy, set for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import keras


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
