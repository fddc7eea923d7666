"""What a Keras model or a `.tflite` takes and gives, by name: inputs, heads, and outputs for any inputs."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Union

import numpy as np

from kdistill.errors import InputError, unknown
from kdistill.networks.heads import CLASSES, LABELS, MAIN_OUTPUTS, MEANINGS, Head, check_meaning, find_head
from kdistill.networks.signatures import (
    Input,
    heads_of,
    inputs_of,
    outputs_of_call,
)
from kdistill.tflite import metadata
from kdistill.tflite.interpreter import OTHERS, WHOLE, File, noise_for

if TYPE_CHECKING:
    import keras

Runner = Union[File, "keras.Model"]
KINDS = ("logits", "probabilities", "numbers", "unclear")


def inputs_of_runner(runner: Runner) -> dict[str, Input]:
    """The inputs by name. A file that quantizes an input takes the numbers as they are: float32."""
    if not isinstance(runner, File):
        return inputs_of(runner)
    inputs = {
        one["name"]: Input(one["name"], tuple(one["shape"][1:]), one["type"] if one["type"] in WHOLE else "float32")
        for one in runner.inputs
    }
    order = _document(runner).get("input_order") if len(inputs) > 1 else None
    fits = isinstance(order, list) and all(isinstance(name, str) for name in order) and set(order) == set(inputs)
    return {name: inputs[name] for name in order} if fits else inputs


def outputs_of(runner: Runner, inputs: Mapping[str, np.ndarray], batch_size: int = 256) -> dict[str, np.ndarray]:
    """Every output by name, float32 `[n, ...]`, for inputs by name.

    Raises `InputError` where the model does not run on them.
    """
    if isinstance(runner, File):
        return runner.run(inputs, batch_size)
    import tensorflow as tf

    call, count, parts = traced(runner, inputs), len(next(iter(inputs.values()))), []
    for start in range(0, count, batch_size):
        batch = {name: array[start : start + batch_size] for name, array in inputs.items()}
        try:
            outputs = call(constants(runner, batch))
        except (tf.errors.OpError, ValueError) as error:
            raise InputError(f"The model '{runner.name}' does not run on these inputs: {error}") from error
        parts.append({name: np.asarray(output, np.float32) for name, output in outputs.items()})
        for name, output in parts[-1].items():
            if not output.ndim or len(output) != min(batch_size, count - start):
                raise InputError(
                    f"The output '{name}' of the model '{runner.name}' is {output.shape}; expected [batch, ..., n]."
                )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def traced(model: "keras.Model", inputs: Mapping[str, np.ndarray]):
    """The concrete function of a model: inputs by name -> outputs by name, in inference mode."""
    import tensorflow as tf

    dtypes = {name: one.dtype for name, one in inputs_of(model).items()}
    specs = {name: tf.TensorSpec([None, *array.shape[1:]], dtypes[name]) for name, array in inputs.items()}
    try:
        return tf.function(lambda batch: outputs_of_call(model, batch), autograph=False).get_concrete_function(specs)
    except Exception as error:  # a user's own layers may raise anything
        raise InputError(f"The model '{model.name}' does not run on these inputs: {error}") from error


def masks_of(model: "keras.Model", inputs: Mapping[str, np.ndarray], batch_size: int = 256) -> dict[str, np.ndarray]:
    """Which positions of its outputs a Keras model does not mask, bool `[n, ...]`, by name; {} without masks.

    These are Keras's masks of sequences, such as of `Embedding(mask_zero=True)`; losses do not count what they hide.
    """
    import tensorflow as tf

    from kdistill.networks.keras_internals import mask_of

    def masks(batch):
        outputs = outputs_of_call(model, batch)
        found = {name: (mask_of(output), output) for name, output in outputs.items()}
        return {
            name: tf.broadcast_to(mask, tf.shape(output)[:-1])
            for name, (mask, output) in found.items()
            if mask is not None and output.shape.rank > 2
        }

    dtypes = {name: one.dtype for name, one in inputs_of(model).items()}
    specs = {name: tf.TensorSpec([None, *array.shape[1:]], dtypes[name]) for name, array in inputs.items()}
    call = tf.function(masks, autograph=False).get_concrete_function(specs)
    if not call.structured_outputs:
        return {}
    count = len(next(iter(inputs.values())))
    parts = [
        call(constants(model, {name: array[start : start + batch_size] for name, array in inputs.items()}))
        for start in range(0, count, batch_size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def constants(model: "keras.Model", batch: Mapping[str, np.ndarray]) -> dict:
    """A batch as tensors, in the dtypes of the model's inputs."""
    import tensorflow as tf

    return {name: tf.constant(batch[name], one.dtype) for name, one in inputs_of(model).items()}


def gives_one_row(model: "keras.Model") -> bool:
    """Whether a Keras model has one input of floats, and gives one row `[batch, n]`, or a dict with one for classes."""
    from kdistill.networks.keras_internals import graph_of

    try:
        inputs = list(inputs_of(model).values())
    except InputError:  # a subclassed model that is not built yet
        return True
    if len(inputs) != 1 or not inputs[0].dtype.startswith(("float", "bfloat")):
        return False
    graph = graph_of(model)
    if graph is not None:
        outputs = graph.output
    else:  # a subclassed model
        call = traced(model, {inputs[0].name: np.zeros((1, *(size or 8 for size in inputs[0].shape)), np.float32)})
        outputs = call.structured_outputs
    if isinstance(outputs, Mapping) and len(outputs) > 1:
        outputs = [outputs[name] for name in MAIN_OUTPUTS if name in outputs]
    outputs = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    return len(outputs) == 1 and len(outputs[0].shape) == 2


def heads_of_runner(runner: Runner, head=None, loss=None) -> dict[str, Head]:
    """What the outputs mean, by name: see `heads_of`; of a file what its `model.json`, names and operators tell.

    Raises `InputError` where nothing tells.
    """
    if not isinstance(runner, File):
        return heads_of(runner, head, loss)
    stated = _stated_heads(runner)
    if head is not None:
        names = [output["name"] for output in runner.outputs]
        given = head if isinstance(head, Mapping) else dict.fromkeys(stated or [runner.output["name"]], head)
        for name, meaning in given.items():
            if name not in names:
                raise unknown(f"output of '{runner.path}' in head", str(name), names)
            check_meaning(meaning)
    else:
        given = {}
    heads = {}
    for name in {**stated, **given} or [output["name"] for output in runner.outputs]:
        if name in stated and given.get(name) in (None, stated[name].meaning):
            heads[name] = stated[name]
            continue
        noise = {one["name"]: noise_for(one, runner.batch or 4) for one in runner.inputs}
        end = "sigmoid" if runner.sigmoid else "softmax" if runner.probabilities else "unknown"
        subject = f"The output '{name}' of '{runner.path}'"
        heads[name] = find_head(runner.run(noise)[name], lambda end=end: end, subject, head=given.get(name))
    return heads


def _document(file: File) -> dict:
    document = (metadata.of_file(file.path) or {}).get("document")
    return document if isinstance(document, dict) else {}


def _stated_heads(file: File) -> dict[str, Head]:
    """The heads that a file states: in its `model.json`, or by the name of its main output."""
    rows = _document(file).get("outputs")
    shapes, heads = {output["name"]: tuple(output["shape"][1:]) for output in file.outputs}, {}
    for row in rows if isinstance(rows, list) else ():
        head, name = (row.get("head"), row.get("name")) if isinstance(row, dict) else (None, None)
        if isinstance(head, dict) and name in shapes:
            meaning, kind = head.get("meaning"), head.get("kind")
            if meaning in MEANINGS and kind in KINDS:
                heads[name] = Head(meaning, kind, shapes[name])
    name = file.output["name"]
    if heads or file.several:
        return heads
    if (file.exclusive and name in MAIN_OUTPUTS) or file.probabilities:
        return {name: Head(CLASSES, "probabilities" if file.probabilities else "logits", shapes[name])}
    if file.sigmoid or name in OTHERS[1:]:
        return {name: Head(LABELS, "logits" if name == "label_logits" else "probabilities", shapes[name])}
    return {}


def by_head(outputs: Mapping[str, np.ndarray], heads: Mapping[str, Head]) -> dict[str, np.ndarray]:
    """The outputs that have a head."""
    if len(outputs) == len(heads) == 1:
        return dict(zip(heads, outputs.values(), strict=True))
    return {name: outputs[name] for name in heads}
