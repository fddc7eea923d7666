"""A user's examples of any kind (`Examples`, pairs, dicts, tuples, `tf.data`) as arrays by the names of the inputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kdistill.data.lazy_images import EncodedImages
from kdistill.errors import InputError, unknown

MOST_BATCHES = 10_000_000  # of a tf.data.Dataset, which is endless beyond
KINDS = "kdistill.Examples, (inputs, labels), (inputs, labels, sample_weight) or a finite tf.data.Dataset of these"


@dataclass(frozen=True)
class Gathered:
    """Examples as arrays.

    Args:
        inputs: by name, arrays `[n, ...]`.
        labels: an array, or arrays by the names of outputs (a dict) or in their order (a tuple); None without labels.
        weights: of the labels, in the same structure; None if all count alike.
    """

    inputs: dict[str, np.ndarray]
    labels: object = None
    weights: object = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


def gather(examples, inputs: Mapping | None, what: str = "examples", with_labels: bool = True) -> Gathered:
    """Examples as arrays by the names of the inputs, in the dtype that each input has.

    Args:
        examples: `Examples(inputs, labels)`, `(x, y)`, `(x, y, sample_weight)` or a finite `tf.data.Dataset` of these,
            where x is an array, a dict by name, or a tuple in the order of the inputs. Without labels also x alone.
        inputs: of the model, by name (see `inputs_of`); None: x has one array, and is not checked.
        what: the argument, for messages.
        with_labels: whether a pair is inputs and labels. Without it, labels of `Examples` and data sets are ignored,
            and a tuple of as many arrays as there are inputs is the inputs.

    Raises `InputError` for what does not fit.
    """
    if hasattr(examples, "element_spec"):
        examples = _collected(examples, inputs, what)
    if hasattr(examples, "images") and hasattr(examples, "labels"):
        parts = (examples.images, examples.labels)
    elif isinstance(examples, (tuple, list)) and not _are_inputs(examples, inputs, with_labels):
        if not 1 <= len(examples) <= 3:
            raise InputError(f"{what} expects {KINDS}; received {len(examples)} parts.")
        parts = tuple(examples)
    else:
        parts = (examples,)
    arrays = _by_name(parts[0], inputs, what)
    count = len(next(iter(arrays.values())))
    if not count or any(len(array) != count for array in arrays.values()):
        counts = ", ".join(f"{len(array)} of '{name}'" for name, array in arrays.items())
        raise InputError(f"{what} expects the same number of examples of each input, 1 or more; received {counts}.")
    labels, weights = (parts[place] if with_labels and len(parts) > place else None for place in (1, 2))
    return Gathered(arrays, labels, weights)


def _are_inputs(examples, inputs: Mapping | None, with_labels: bool) -> bool:
    """Whether a tuple is the inputs alone, and not inputs and labels."""
    if with_labels or inputs is None or len(inputs) != len(examples) or len(inputs) < 2:
        return False
    return not isinstance(examples[0], (Mapping, tuple, list))


def _by_name(x, inputs: Mapping | None, what: str) -> dict[str, np.ndarray]:
    if inputs is None:
        return {"input": np.asarray(x, object) if isinstance(x, (list, tuple)) else np.asarray(x)}
    if isinstance(x, Mapping):
        for name in x:
            if name not in inputs:
                raise unknown(f"input in {what}", str(name), inputs)
    elif isinstance(x, (tuple, list)) and len(x) == len(inputs) > 1:
        x = dict(zip(inputs, x, strict=True))
    elif len(inputs) == 1:
        x = {next(iter(inputs)): x}
    else:
        received = f"{len(x)} arrays" if isinstance(x, (tuple, list)) else type(x).__name__
        raise InputError(
            f"{what} expects the inputs {', '.join(inputs)}: a dict by name, or a tuple in this order; received "
            f"{received}."
        )
    missing = [name for name in inputs if name not in x]
    if missing:
        raise InputError(f"{what} has no input '{missing[0]}'; expected {', '.join(inputs)}.")
    return {name: _array(x[name], one, what) for name, one in inputs.items()}


def _array(values, one, what: str):
    """The examples of an input, in its dtype and rank."""
    if isinstance(values, EncodedImages):
        return values
    values = np.asarray(values)
    if values.ndim == len(one.shape) and (not one.shape or one.shape[-1] == 1):  # as Keras does
        values = values[..., None]
    elif values.ndim == len(one.shape) + 2 and values.shape[-1] == 1:
        values = values[..., 0]
    shape = values.shape[1:]
    if len(shape) == len(one.shape) == 3 and shape[-1] == 1 and one.shape[-1] == 3:
        shape = (*shape[:2], 3)  # gray images, which a file takes that expects color
    pairs = list(zip(one.shape, shape, strict=False))
    if values.ndim != len(one.shape) + 1 or any(size not in (None, received) for size, received in pairs):
        expected = ", ".join(["n", *("any" if size is None else str(size) for size in one.shape)])
        raise InputError(f"{what} expects [{expected}] for the input '{one.name}', received an array {values.shape}.")
    whole = one.dtype.startswith(("int", "uint"))
    if one.dtype == "string" or values.dtype == one.dtype:
        return values
    if values.dtype.kind not in "biuf" or (whole and values.dtype.kind == "f" and (values != np.floor(values)).any()):
        kind = "whole numbers" if whole else "numbers"
        raise InputError(f"{what} expects {kind} for the input '{one.name}' ({one.dtype}), received {values.dtype}.")
    if values.dtype == np.uint8 and len(one.shape) == 3:  # pixels, which are converted a batch at a time
        return values
    return values.astype(one.dtype)


def _collected(dataset, inputs: Mapping | None, what: str) -> tuple:
    """The batches of a data set, or its single examples, in arrays: (x,), (x, y) or (x, y, sample_weight)."""
    import tensorflow as tf

    if int(tf.data.experimental.cardinality(dataset)) == tf.data.INFINITE_CARDINALITY:
        raise InputError(f"{what} is an endless data set. Give a finite one: dataset.take(100).")
    elements = list(dataset.take(MOST_BATCHES).as_numpy_iterator())
    if not elements:
        raise InputError(f"{what} is an empty data set.")
    elements = [element if isinstance(element, tuple) else (element,) for element in elements]
    join = np.concatenate if _is_batched(dataset, inputs) else np.stack
    return tuple(tf.nest.map_structure(lambda *parts: join(parts), *column) for column in zip(*elements, strict=True))


def _is_batched(dataset, inputs: Mapping | None) -> bool:
    """Whether the elements of a data set are batches: by the rank of the first input, else by their first axes."""
    import tensorflow as tf

    spec = dataset.element_spec
    x = spec[0] if isinstance(spec, tuple) else spec
    if inputs is not None:
        name = next(iter(inputs))
        first = x[name] if isinstance(x, Mapping) and name in x else tf.nest.flatten(x)[0]
        return first.shape.rank is None or first.shape.rank > len(inputs[name].shape)
    return all(part.shape.rank and part.shape[0] is None for part in tf.nest.flatten(spec))


def rows_of(labels, names, what: str = "labels") -> dict:
    """Labels, weights or outputs of a teacher by the names of outputs: a dict, a tuple in their order, or one array."""
    names = list(names)
    if labels is None:
        return {}
    if isinstance(labels, Mapping):
        for name in labels:
            if name not in names:
                raise unknown(f"output in {what}", str(name), names)
        return {name: np.asarray(values) for name, values in labels.items()}
    if len(names) == 1:
        return {names[0]: np.asarray(labels)}
    if isinstance(labels, (tuple, list)) and len(labels) == len(names):
        return {name: np.asarray(values) for name, values in zip(names, labels, strict=True)}
    raise InputError(
        f"{what} expects a dict with {', '.join(names)}, or a tuple in this order; received {type(labels).__name__}."
    )
