"""A student as it can be converted: checked, and rebuilt in float32 if it computes in another precision."""

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion.graph import with_channel
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.networks import copying
from kdistill.networks.heads import Head
from kdistill.networks.keras_internals import consumers_of, graph_of, layers_of, operation_behind
from kdistill.networks.precision import check_not_quantized, dtype_policy
from kdistill.networks.saving import load_model, loss_of_file
from kdistill.networks.signatures import (
    Input,
    heads_of,
    image_shape,
    in_structure,
    inputs_of,
    main_output,
    noise_inputs,
    numpy_outputs,
    takes_images,
)


@dataclass(frozen=True)
class Text:
    """The layer that turns strings into numbers, and the model behind it."""

    layer: keras.layers.Layer
    rest: keras.Model

    def numbers(self, strings) -> np.ndarray:
        """What the layer gives for strings `[n]` or `[n, 1]`."""
        import tensorflow as tf

        return np.asarray(self.layer(tf.convert_to_tensor(np.asarray(strings))))


@dataclass(frozen=True)
class Prepared:
    """A student that is ready for every profile. `prepare` makes it once; the conversion then hands it on."""

    model: keras.Model  # float32, finite weights
    precision: str | None  # in which the student itself computes
    inputs: dict[str, Input]  # of `model`
    heads: dict[str, Head]  # what each of its outputs means
    weights_sha256: str  # of `model`
    text: Text | None = None  # the layer for strings that is not part of `model`

    @property
    def takes_images(self) -> bool:
        """Whether it takes one image."""
        return takes_images(self.model)

    @property
    def classifies_images(self) -> bool:
        """Whether it takes one image, and gives one row of exclusive classes, as of several outputs the main one."""
        heads = list(self.heads.values())
        return self.takes_images and len(heads) == 1 and heads[0].exclusive and not heads[0].positions

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width, channels. Raises `InputError` for a model of anything else than one image."""
        return image_shape(self.model)

    @property
    def meanings(self) -> str | dict[str, str]:
        """What its outputs mean, as the argument `head` of `prepare`."""
        meanings = {name: head.meaning for name, head in self.heads.items()}
        return meanings if len(meanings) > 1 else next(iter(meanings.values()))

    @property
    def head(self) -> Head:
        """What the only output means. Raises `InputError` where there are several."""
        if len(self.heads) > 1:
            main_output(self.heads, self.model.name)
        return next(iter(self.heads.values()))


def prepare(student: keras.Model | str | Path, head: str | Mapping | None = None) -> Prepared:
    """Checks a student (a model, a `Supervised` trainer of one, or a `.keras` file) and gives it in float32.

    `head`: what its outputs mean, see `heads_of`; where nothing tells, they are numbers.

    A model trained in mixed precision is rebuilt in float32 with the same weights: its own conversion would need
    operators that phones do not have. Raises `InputError` for a model that cannot be exported, and `CheckFailed` if the
    rebuilt model computes something else.
    """
    model = load_model(student) if isinstance(student, (str, Path)) else student
    if isinstance(model, Supervised):
        model = model.student
    if not isinstance(model, keras.Model):
        raise InputError(f"export expects a keras.Model or the path of a .keras file, received {model!r}.")
    loss = loss_of_file(student) if isinstance(student, (str, Path)) else getattr(model, "loss", None)
    text = _text_of(model)
    if text is not None:
        model = text.rest
    _check_sizes(model)
    check_not_quantized(model, allowed=("int4",))  # the converter takes no other mode
    _check_finite(model)
    plain = model if _is_float32(model) else _in_float32(model)
    heads = heads_of(plain, head, loss, strict=False)
    plain = with_channel(plain) if takes_images(plain) else plain
    precision = getattr(model, "compute_dtype", None)
    return Prepared(plain, precision, inputs_of(plain), heads, weights_sha256(plain), text)


def _check_sizes(model: keras.Model) -> None:
    """Raises `InputError` for a model that is not built, and for inputs without a fixed size."""
    if takes_images(model):
        image_shape(model)
        return
    for one in inputs_of(model).values():
        if None in one.shape:
            shape = tuple(8 if size is None else size for size in one.shape)
            raise InputError(
                f"The input '{one.name}' of the model '{model.name}' is [batch, "
                f"{', '.join('any' if size is None else str(size) for size in one.shape)}]; a file needs a fixed size. "
                f"Build the model with it, such as keras.Input({shape}), and give it the weights of this one "
                "(new.set_weights(model.get_weights()))."
            )
        if one.dtype == "string":
            raise InputError(
                f"The input '{one.name}' of the model '{model.name}' is text, which no file takes. Give the model "
                "behind the layer that turns text into numbers: keras.Model(<output of that layer>, model.output)."
            )


def _text_of(model: keras.Model) -> Text | None:
    """The layer that turns the only input, strings, into numbers, and the model behind it; None for other models."""
    graph = graph_of(model)
    structure = None if graph is None else graph.input
    structure = structure[0] if isinstance(structure, (list, tuple)) and len(structure) == 1 else structure
    if getattr(structure, "dtype", None) != "string":
        return None
    layers = set(consumers_of(operation_behind(structure)))
    layers = [layer for layer in layers if layer in graph.operations]
    if len(layers) != 1 or layers[0].output.dtype == "string":
        return None
    rest = keras.Model(layers[0].output, graph.output, name=model.name)
    warnings.warn(
        f"The model '{model.name}' takes text, which no file takes. The file takes what its layer '{layers[0].name}' "
        f"gives, {layers[0].output.dtype} {['batch', *layers[0].output.shape[1:]]}. Run that layer before the file.",
        UserWarning,
        stacklevel=3,
    )
    return Text(layers[0], rest)


def _check_finite(model: keras.Model) -> None:
    for weight in model.weights:
        values = keras.ops.convert_to_numpy(weight)
        if np.issubdtype(values.dtype, np.inexact) and not np.isfinite(values).all():
            raise InputError(
                f"The weights '{weight.path}' are not finite (NaN or infinite): the training diverged. Train again, "
                "for example with a smaller learning rate."
            )


def _precision(model: keras.Model) -> str:
    """The other precisions in which a model computes, in words."""
    return ", ".join(sorted({layer.compute_dtype for layer in [model, *layers_of(model)]} - {"float32", None}))


def _is_float32(model: keras.layers.Layer) -> bool:
    policies = [layer.dtype_policy for layer in [model, *layers_of(model)]]
    return {dtype for p in policies for dtype in (p.compute_dtype, p.variable_dtype)} <= {"float32", None}


def _in_float32(model: keras.Model) -> keras.Model:
    try:
        # The global policy is for the layers that a subclassed model creates itself.
        with dtype_policy("float32"), copying.own_classes(model):
            rebuilt = type(model).from_config(_float32_config(model.get_config()))
            copying.build(rebuilt, model)
            copying.copy_weights(model, rebuilt, compare=False)  # which `_check_same` does, with another tolerance
        if not _is_float32(rebuilt):
            fixed = ", ".join(f"'{layer.name}'" for layer in layers_of(rebuilt) if not _is_float32(layer))
            raise InputError(f"the dtype of its layers {fixed} is fixed.")
    except Exception as error:  # a user's own layers may raise anything
        raise InputError(
            f"The model '{model.name}' computes in {_precision(model)} and cannot be rebuilt in float32: "
            f"{copying.cause_of(model, error)} Or build it under the policy 'float32' and load the weights into it."
        ) from error
    _check_same(model, rebuilt)
    return rebuilt


def _check_same(model: keras.Model, rebuilt: keras.Model) -> None:
    noise = noise_inputs(model)
    before, after = (list(numpy_outputs(which, noise).values()) for which in (model, rebuilt))
    differences = [float(np.max(abs(first - second))) for first, second in zip(before, after, strict=True)]
    spreads = [max(1.0, float(np.max(abs(second)))) for second in after]
    # bfloat16 has 2 to 3 digits
    wrong = [pair for pair in zip(differences, spreads, strict=True) if not pair[0] <= 0.1 * pair[1]]
    if wrong:
        difference, spread = wrong[0]
        inputs = in_structure(model, noise)
        raise CheckFailed(
            f"The model '{model.name}', rebuilt in float32, differs by {difference:.3g} from itself in "
            f"{_precision(model)} (its outputs go up to {spread:.3g}): "
            f"{copying.difference(model, rebuilt, inputs, tolerance=0.1)} Or train it in float32."
        )


def _float32_config(value, key: str = ""):
    """A model's config with every dtype policy replaced by float32."""
    if isinstance(value, dict):
        if value.get("class_name") in ("DTypePolicy", "DTypePolicyMap"):
            return "float32"
        return {name: _float32_config(item, name) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_float32_config(item, key) for item in value)
    if key == "dtype" and value in ("float16", "bfloat16", "float64", "mixed_float16", "mixed_bfloat16"):
        return "float32"
    return value


def weights_sha256(model: keras.Model) -> str:
    """A hash of all weights, in their order, with their shapes."""
    digest = hashlib.sha256()
    for weight in model.get_weights():
        digest.update(repr((weight.shape, weight.dtype.str)).encode())
        digest.update(np.ascontiguousarray(weight))
    return digest.hexdigest()
