"""What a whole model takes and gives: its inputs by name, the shape of its images, its outputs and what they mean."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kdistill.errors import InputError, unknown
from kdistill.networks.heads import CLASSES, MAIN_OUTPUTS, Head, check_meaning, find_head, meaning_of_loss
from kdistill.networks.outputs import ends_of_call

if TYPE_CHECKING:
    import keras


def main_output(outputs, model: str = "the model"):
    """The output that classifies: the only one, or in a dict the one named `logits` or `probabilities`."""
    if not isinstance(outputs, dict):
        return outputs
    names = [name for name in MAIN_OUTPUTS if name in outputs]
    if len(names) != 1:
        raise InputError(
            f"The model '{model}' has the outputs {', '.join(sorted(outputs))}; expected exactly one named 'logits' or "
            "'probabilities'. Build it with keras.Model(image, {'logits': ..., ...})."
        )
    return outputs[names[0]]


def image_shape(model: "keras.Model") -> tuple[int, int, int]:
    """(height, width, channels) of the images for a model; 1 channel for a model that takes (height, width)."""
    shape = input_shape(model)
    return shape if len(shape) == 3 else (*shape, 1)


def input_shape(model: "keras.Model") -> tuple[int, ...]:
    """(height, width, channels) or (height, width), which a model takes."""
    if not model.built:
        raise InputError(f"The model '{model.name}' is not built. Call it once on a batch of images before export.")
    try:
        shape = model.input_shape
    except AttributeError:  # a subclassed model takes the shape that it was built with
        shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise InputError(
            f"The subclassed model '{model.name}' does not state its input shape. "
            "Call model.build((None, height, width, channels)) before export."
        )
    if isinstance(shape, dict) or not all(size is None or isinstance(size, int) for size in shape):
        raise InputError(f"The model '{model.name}' has several inputs: {shape}; expected one image.")
    if len(shape) not in (3, 4) or None in shape[1:]:
        raise InputError(
            f"The model '{model.name}' takes {tuple(shape)}; expected images [batch, height, width, channels] "
            "of a fixed size. Build it with keras.Input((height, width, channels))."
        )
    _check_channels_last(model, tuple(shape[1:]))
    return tuple(shape[1:])


def _check_channels_last(model: "keras.Model", shape: tuple[int, ...]) -> None:
    """Raises `InputError` for a model that takes (channels, height, width)."""
    from kdistill.networks.keras_internals import layers_of

    if len(shape) != 3 or shape[0] not in (1, 3) or shape[2] in (1, 3):
        return
    for layer in layers_of(model):
        moves = getattr(layer, "dims", None) == (2, 3, 1)  # a Permute
        if moves or getattr(layer, "data_format", None) == "channels_first":
            reason = "moves the channels to the end" if moves else "has data_format='channels_first'"
            raise InputError(
                f"The model '{model.name}' takes images channels first, {shape}: its layer '{layer.name}' {reason}. "
                "kdistill takes [batch, height, width, channels]. Build it with data_format='channels_last', or put "
                f"keras.layers.Permute((3, 1, 2)) before it: image = keras.Input({(*shape[1:], shape[0])}); "
                "keras.Model(image, model(keras.layers.Permute((3, 1, 2))(image)))."
            )


def subject_of(model, role: str) -> str:
    """Names the output of a model or function for messages: "The output 'scores' of the teacher 'net'"."""
    name = getattr(model, "name", None)
    if not isinstance(name, str):
        return f"The output of the {role}"
    from kdistill.networks.keras_internals import graph_of

    names = getattr(graph_of(model), "output_names", None) or ()
    return f"The output {f'{names[0]!r} ' if len(names) == 1 else ''}of the {role} {name!r}"


def class_count(model) -> int | None:
    """The number of classes of a Keras model with one output, where its graph states it; else None. Nothing is run."""
    try:
        shape = model.output_shape
    except (AttributeError, ValueError):
        return None
    return shape[-1] if isinstance(shape, tuple) and shape and isinstance(shape[-1], int) else None


@dataclass(frozen=True)
class Input:
    """One input of a model: its name, its shape without the batch (None for a size that is open), and its dtype."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


def inputs_of(model: "keras.Model") -> dict[str, Input]:
    """The inputs of a model by name: the keys of a dict, else the names of its `keras.Input`.

    A single input is called `input`. Raises `InputError` for a model that is not built.
    """
    return {one.name: one for one in _flat(_input_structure(model))}


def in_structure(model: "keras.Model", inputs: Mapping[str, object]):
    """Inputs by name as the model takes them: alone, or in a list, tuple or dict."""
    structure = _input_structure(model)
    if isinstance(structure, dict):
        return {name: inputs[one.name] for name, one in structure.items()}
    if isinstance(structure, (list, tuple)):
        return [inputs[one.name] for one in structure]
    return inputs[structure.name]


def _flat(structure) -> list[Input]:
    if isinstance(structure, dict):
        return list(structure.values())
    return list(structure) if isinstance(structure, (list, tuple)) else [structure]


def _input_structure(model: "keras.Model"):
    """An `Input`, or a list or dict of them, as the model takes them."""
    from kdistill.networks.keras_internals import graph_of, layers_of

    graph = graph_of(model)
    if graph is not None:

        def describe(tensor, name=None) -> Input:
            return Input(name or tensor.name, tuple(tensor.shape[1:]), str(tensor.dtype))

        structure = graph.input
        if isinstance(structure, dict):
            return {name: describe(tensor, name) for name, tensor in structure.items()}
        if isinstance(structure, (list, tuple)) and len(structure) > 1:
            return [describe(tensor) for tensor in structure]
        return describe(structure[0] if isinstance(structure, (list, tuple)) else structure, "input")
    if not model.built:
        raise InputError(f"The model '{model.name}' is not built. Call it once on a batch of its inputs before export.")
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise InputError(
            f"The subclassed model '{model.name}' does not state the shape of its inputs. Call model.build(...) with "
            "it before export."
        )
    # A subclassed model does not state the dtype: only tokens are no floats.
    tokens = any(type(layer).__name__ == "Embedding" for layer in layers_of(model))

    def shaped(shape, name) -> Input:
        return Input(name, tuple(shape[1:]), "int32" if tokens and len(shape) == 2 else "float32")

    if isinstance(shape, dict):
        return {name: shaped(part, name) for name, part in shape.items()}
    if all(isinstance(part, (list, tuple)) for part in shape) and shape:
        return [shaped(part, f"input_{place}") for place, part in enumerate(shape)]
    return shaped(shape, "input")


SEQUENCES = (  # layers that take `[time, features]`, by the beginnings of the names of their classes
    "Conv1D", "SeparableConv1D", "DepthwiseConv1D", "MaxPooling1D", "AveragePooling1D", "GlobalMaxPooling1D",
    "GlobalAveragePooling1D", "LSTM", "GRU", "SimpleRNN", "RNN", "Bidirectional", "MultiHeadAttention", "Attention",
    "GroupQueryAttention", "Embedding", "UpSampling1D", "ZeroPadding1D", "Cropping1D", "Conv1DTranspose",
)  # fmt: skip


def takes_images(model: "keras.Model") -> bool:
    """Whether a model takes one image: `[height, width, channels]`, or `[height, width]` of numbers.

    `[time, features]`, which layers of sequences take, is no image unless the model scales it as pixels are scaled.
    """
    from kdistill.networks.keras_internals import layers_of

    inputs = list(inputs_of(model).values())
    if len(inputs) != 1 or inputs[0].dtype == "string":
        return False
    (one,) = inputs
    if len(one.shape) != 2:
        return len(one.shape) == 3
    names = {type(layer).__name__ for layer in layers_of(model)}
    if one.dtype.startswith(("int", "bool")):
        return False
    return "Rescaling" in names or names.isdisjoint(SEQUENCES)


def noise_inputs(model: "keras.Model", count: int = 4) -> dict[str, np.ndarray]:
    """Noise that a model takes, by the names of its inputs; always the same. Open sizes are 8.

    Pixels from 0 to 255 for a single image (open sizes are 32), else normal numbers. Integers, and what an Embedding
    may read, are zeros and ones, which every vocabulary has.
    """
    from kdistill.networks.keras_internals import layers_of

    random = np.random.default_rng(0)
    if takes_images(model):
        ((name, image),) = inputs_of(model).items()
        shape = (count, *(size or 32 for size in image.shape))
        return {name: random.integers(0, 256, shape).astype(np.float32)}
    tokens = any(type(layer).__name__ == "Embedding" for layer in layers_of(model))
    noise = {}
    for name, one in inputs_of(model).items():
        shape = (count, *(8 if size is None else size for size in one.shape))
        if one.dtype == "string":
            noise[name] = np.full(shape, "a", object)
        elif one.dtype.startswith(("int", "uint", "bool")) or (tokens and len(one.shape) == 1):
            noise[name] = random.integers(0, 2, shape).astype(one.dtype)
        else:
            noise[name] = random.normal(size=shape).astype(np.float32)
    return noise


def call_on(model: "keras.Model", inputs: Mapping[str, object]):
    """The outputs of a model, in inference mode, for inputs by name. Raises `InputError` where it does not run."""
    try:
        return model(in_structure(model, inputs), training=False)
    except Exception as error:  # a user's own layers may raise anything
        shapes = ", ".join(str(tuple(getattr(one, "shape", ()))) for one in inputs.values())
        kind = "images" if takes_images(model) else "inputs"
        raise InputError(f"The model '{model.name}' does not run on {kind} {shapes}: {error}") from error


def outputs_by_name(model: "keras.Model", outputs) -> dict:
    """The outputs of a model by name: the keys of a dict, else its `output_names`; a single one may lack a name."""
    if isinstance(outputs, Mapping):
        return dict(outputs)
    from kdistill.networks.keras_internals import graph_of

    parts = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    names = list(getattr(graph_of(model), "output_names", None) or ())
    if len(names) != len(parts) or len(set(names)) != len(parts):
        names = ["output"] if len(parts) == 1 else [f"output_{place}" for place in range(len(parts))]
    return dict(zip(names, parts, strict=True))


def heads_of(
    model: "keras.Model", head: str | Head | Mapping | None = None, loss=None, strict: bool = True
) -> dict[str, Head]:
    """What each output of a model means, by the names of the outputs, from its outputs on noise.

    Args:
        model: with one output or several (a dict, or a list, which `model.output_names` names).
        head: `classes`, `labels` or `numbers`, where you state it; with several outputs a dict by name, of those that
            you state.
        loss: as of `compile`, where the model itself is not compiled (see `saving.loss_of_file`).
        strict: see `find_head`.

    Of a dict of outputs with exactly one named `logits` or `probabilities`, that one is the head, unless `head` or the
    loss says more; the others are further outputs.

    Raises `InputError` where loss, last activation and numbers disagree or do not tell (it asks for `head=`), for a
    stated head that the output cannot have, and for outputs that are no numbers.
    """
    loss = getattr(model, "loss", None) if loss is None else loss
    noise = noise_inputs(model)
    returned = call_on(model, noise)
    outputs = outputs_by_name(model, returned)
    every = sorted(outputs)
    single_loss = loss is None or isinstance(loss, str) or not isinstance(loss, (Mapping, list, tuple)) or len(loss) < 2
    head, loss = _by_output(head, outputs, model, "head"), _by_output(loss, outputs, model, "loss")
    main = [name for name in MAIN_OUTPUTS if name in outputs] if isinstance(returned, Mapping) else []
    if len(outputs) > 1 and len(main) == 1 and not head.keys() - set(main) and single_loss:
        outputs = {main[0]: outputs[main[0]]}
    numbers = {name: _numbers(model, name, output) for name, output in outputs.items()}
    ends: list[dict] = []

    def end(name: str) -> str:
        if not ends:
            called = ends_of_call(lambda inputs: outputs_of_call(model, inputs), noise)
            ends.append(dict(zip(every, called, strict=False)))
        return ends[0].get(name, "unknown")

    heads = {}
    for name, output in numbers.items():
        stated = head.get(name)
        if isinstance(stated, Head):
            heads[name] = dataclasses.replace(stated, shape=output.shape[1:])
        elif name in main and stated is None and output.ndim > 1 and output.shape[-1] > 1:
            heads[name] = Head(CLASSES, name, output.shape[1:])  # the name decides
        else:
            heads[name] = find_head(
                output,
                lambda name=name: end(name),
                f"The output '{name}' of the model '{model.name}'",
                head=None if stated is None else check_meaning(stated),
                loss=meaning_of_loss(loss.get(name)),
                strict=strict,
            )
    return heads


def outputs_of_call(model: "keras.Model", inputs: Mapping[str, object]) -> dict:
    """The outputs by name, for a `tf.function`."""
    return outputs_by_name(model, model(in_structure(model, inputs), training=False))


def _by_output(value, outputs: Mapping, model: "keras.Model", what: str) -> dict:
    """A `head` or a `loss` of `compile` by the names of the outputs."""
    if value is None:
        return {}
    if isinstance(value, Mapping) and "class_name" not in value:
        for name in value:
            if name not in outputs and what == "head":
                raise unknown(f"output of the model '{model.name}' in {what}", str(name), outputs)
        return dict(value)
    if isinstance(value, (list, tuple)):
        return dict(zip(outputs, value, strict=False))
    if what == "head" and len(outputs) > 1:
        main = [name for name in MAIN_OUTPUTS if name in outputs]
        if len(main) != 1:
            raise InputError(
                f"The model '{model.name}' has the outputs {', '.join(outputs)}: head expects a dict, such as "
                f"{{'{next(iter(outputs))}': {value!r}, ...}}."
            )
        return {main[0]: value}
    return dict.fromkeys(outputs, value)


def _numbers(model: "keras.Model", name: str, output) -> np.ndarray:
    """An output as float32. Raises `InputError` for one that is no tensor of numbers."""
    dtype = getattr(output, "dtype", None)
    kind = getattr(dtype, "name", str(dtype))
    if dtype is None or kind.startswith("string"):
        raise InputError(
            f"The output '{name}' of the model '{model.name}' is "
            f"{'text' if dtype is not None else type(output).__name__}; expected a tensor of numbers [batch, ..., n]. "
            "Give the tensor before it: keras.Model(model.inputs, <that tensor>)."
        )
    return np.asarray(output, np.float32)


def head_of(model: "keras.Model", strict: bool = False) -> Head:
    """What the only output of a model means, or of several the one named `logits` or `probabilities`; see `heads_of`.

    Raises `InputError` for several outputs without such a name.
    """
    heads = heads_of(model, strict=strict)
    if len(heads) != 1:
        main_output(heads, model.name)  # raises, with the names
    return next(iter(heads.values()))


def numpy_outputs(model: "keras.Model", inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a model by name, as float32 arrays. Raises `InputError` where the model does not run."""
    outputs = outputs_by_name(model, call_on(model, inputs))
    return {name: _numbers(model, name, output) for name, output in outputs.items()}
