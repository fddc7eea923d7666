"""One Keras 3 layer or operation -> its tf_keras twin of the same name, options and weights.

Values never cross by chance: an option that tf_keras does not know is dropped only where it holds its default, and an
activation of which the two Keras disagree (or that tf_keras lacks) calls the Keras 3 function.
"""

import inspect
import re
import weakref

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from kdistill.errors import InputError
from kdistill.networks.keras_internals import takes_training

# The same function in both Keras, and one that tfmot quantizes when it is fused into a layer.
FUSED = ("linear", "relu", "softmax", "sigmoid", "tanh", "gelu")
# The same function in both Keras, as a layer of its own.
SAME = (*FUSED, "silu", "elu", "exponential", "mish", "selu", "softplus", "softsign")
# Layers without weights whose state or randomness tf_keras keeps in another way: the Keras 3 layer itself is called.
CALLED = re.compile(r"Random|Lambda|Hash|Discretization|CategoryEncoding|.*Lookup|TextVectorization")
OPTION_NAMES = {"LeakyReLU": {"negative_slope": "alpha"}}
MERGES = ("Add", "Subtract", "Multiply", "Maximum", "Minimum")
POINTWISE = ".pointwise"  # what SeparableConv2D's second half is called
OTHER_NAMES = {"kernel": "depthwise_kernel", "pointwise_kernel": "kernel"}
_BASE = {"name", "trainable", "dtype"}
_calls = weakref.WeakValueDictionary()


class Call:
    """A Keras 3 operation with its constant arguments; `tensors` fill the places that `slots` mark."""

    def __init__(self, operation, arguments=None, slots=None):
        self.operation = operation
        self.arguments = arguments
        self.slots = slots

    def __call__(self, tensors: list, training):
        if self.slots is None:
            args, kwargs = (tensors[0],), {}
        else:
            filled, leaves = iter(tensors), keras.tree.flatten(self.arguments)
            leaves = [next(filled) if slot else leaf for slot, leaf in zip(self.slots, leaves, strict=True)]
            args, kwargs = keras.tree.pack_sequence_as(self.arguments, leaves)
        if takes_training(self.operation):
            kwargs = {**kwargs, "training": training}
        return self.operation(*args, **kwargs)


@tf_keras.saving.register_keras_serializable(package="kdistill")
class KerasOperation(tf_keras.layers.Layer):
    """Calls a Keras 3 operation, or a Keras 3 layer without weights, on the tensors of a tf_keras graph.

    Its config names the call by a key, so that tfmot can clone it within this process; it cannot be saved.
    """

    def __init__(self, key: str, **kwargs):
        super().__init__(**kwargs)
        self.key = key
        self.supports_masking = True  # Keras 3 has the masks in its graph already, as tensors
        self._held = lambda: None  # a closure: tf_keras would track a Keras 3 layer that is an attribute
        held = _calls[key]
        self._held = lambda: held

    def call(self, inputs, training=None):
        training = bool(training) if not tf.is_tensor(training) else training
        return self._held()(tf.nest.flatten(inputs), training)

    def compute_mask(self, inputs, mask=None):
        return None

    def get_config(self):
        return {**super().get_config(), "key": self.key}


def operation_layer(call: Call, name: str) -> KerasOperation:
    """The tf_keras layer of this name that makes the call."""
    key = f"{name}-{id(call)}"
    _calls[key] = call
    return KerasOperation(key, name=name, dtype="float32", autocast=False)


def _known_activations() -> dict:
    names = [name for name in dir(keras.activations) if not name.startswith("_")]
    functions = {name: getattr(keras.activations, name) for name in names}
    return {f: f.__name__ for name, f in functions.items() if name not in ("get", "serialize", "deserialize")}


ACTIVATIONS = _known_activations()  # the Keras 3 function -> its name


def _registered(function, name: str):
    """A Keras 3 activation under a name that tf_keras can save and load (`hard_sigmoid` differs between the two)."""

    def activation(x):
        return function(x)

    activation.__name__ = f"keras3_{name}"
    return tf_keras.saving.register_keras_serializable(package="kdistill", name=activation.__name__)(activation)


FOREIGN = {name: _registered(f, name) for f, name in ACTIVATIONS.items() if name not in SAME}


def _native(function) -> str | None:
    """The tf_keras name of a Keras 3 activation that is the same function there, else None."""
    name = ACTIVATIONS.get(function)
    return {"silu": "swish"}.get(name, name) if name in SAME else None


def activation_layers(function, name: str, policy: str) -> list:
    """The tf_keras layers of an activation: a function, or a Keras 3 layer used as one."""
    if isinstance(function, keras.layers.Layer):
        if function.weights or type(function).build is not keras.layers.Layer.build:  # PReLU: weights at its first call
            raise InputError(
                f"The activation of layer '{name}' is a layer with weights ({type(function).__name__}). "
                "Put it behind the layer as a layer of its own."
            )
        return twins(function, name, {})
    known = ACTIVATIONS.get(function)
    if known is None:
        return [operation_layer(Call(function), name)]
    relu6 = tf_keras.layers.ReLU(max_value=6.0, name=name, dtype=policy)
    if known == "relu6":
        return [relu6]
    if known == "hard_sigmoid":  # relu6(x + 3) / 6: tfmot learns a range for each of the steps
        before = tf_keras.layers.Rescaling(1.0, 3.0, name=f"{name}.plus3", dtype=policy)
        return [before, relu6, tf_keras.layers.Rescaling(1 / 6, name=f"{name}.sixth", dtype=policy)]
    return [tf_keras.layers.Activation(_native(function) or FOREIGN[known], name=name, dtype=policy)]


def twins(layer, name: str, handlers: dict, inside: bool = False) -> list:
    """The tf_keras layers that, one behind the other, are the Keras 3 layer; a single one where it stands `inside`.

    Raises InputError for a layer with weights that tf_keras lacks, or with an option that tf_keras lacks.
    """
    for kind in type(layer).__mro__:
        if kind in handlers:
            return [_handled(handlers[kind](layer), layer, name)]
    kind = type(layer).__name__
    native = type(layer) is getattr(keras.layers, kind, None) and hasattr(tf_keras.layers, kind)
    if not native or CALLED.match(kind):
        if layer.weights:
            raise InputError(
                f"Layer '{layer.name}' ({kind}) has weights and no twin in tf_keras, which pruning, clustering and "
                "quantization-aware training need. Pass handlers={" + kind + ": function(layer) -> tf_keras layer}, "
                "or replace the layer."
            )
        return [operation_layer(Call(layer), name)]
    policy = layer.dtype_policy.name
    if policy.startswith(("int8", "int4", "float8")):
        raise InputError(
            f"Layer '{layer.name}' is already quantized ({policy}). Give the model as it was before model.quantize()."
        )
    if kind == "Activation":
        return activation_layers(layer.activation, name, policy)
    options, unknown = _options(layer, getattr(tf_keras.layers, kind), handlers)
    if unknown and not layer.weights:
        return [operation_layer(Call(layer), name)]  # the layer itself is called, with every option
    if unknown:
        raise InputError(
            f"Layer '{layer.name}' ({kind}) has options that tf_keras lacks: "
            + ", ".join(f"{key}={value!r}" for key, value in unknown.items())
            + ". Build the layer with their defaults, or pass a handler for it."
        )
    common = {"trainable": layer.trainable, "dtype": policy}
    behind = [] if inside or "recurrent_activation" in options or kind.startswith("SimpleRNN") else _behind(layer, name)
    if behind:
        options["activation"] = "linear"
    for key in ("activation", "recurrent_activation"):
        if callable(options.get(key)) and options[key] not in FOREIGN.values():
            raise InputError(
                f"Layer '{layer.name}' has an {key} of its own ({options[key]!r}) that stands inside a loop or a "
                "wrapper, and cannot be bridged. Use one of keras.activations, or put it behind the wrapper."
            )
    if kind == "Rescaling" and not inside and np.any(layer.offset):  # two steps, so that tfmot learns a range for each
        scale = tf_keras.layers.Rescaling(layer.scale, name=name, **common)
        return [scale, tf_keras.layers.Rescaling(1.0, layer.offset, name=f"{name}.offset", **common)]
    if kind == "SeparableConv2D" and not inside:  # tfmot quantizes it as two layers, and would lose the names
        return [*_separated(options, name, common), *behind]
    return [getattr(tf_keras.layers, kind)(**options, name=name, **common), *behind]


def _handled(made, layer, name):
    if not isinstance(made, tf_keras.layers.Layer):
        raise InputError(
            f"The handler for layer '{layer.name}' must return a tf_keras layer, returned {type(made).__name__}."
        )
    made._name = name
    made.trainable = layer.trainable
    return made


def _behind(layer, name: str) -> list:
    """The activation of a layer as a layer behind it, where it cannot be fused."""
    function = getattr(layer, "activation", None)
    if not callable(function) or ACTIVATIONS.get(function) in FUSED:
        return []
    return activation_layers(function, f"{name}.activation", layer.dtype_policy.name)


def _separated(options: dict, name: str, common: dict) -> list:
    """SeparableConv2D as the depthwise and the pointwise convolution that it is made of."""
    shared = {"data_format": options["data_format"]}
    depthwise = {
        key: options[key] for key in ("kernel_size", "strides", "padding", "dilation_rate", "depth_multiplier")
    }
    depthwise |= {key: value for key, value in options.items() if key.startswith("depthwise_")}
    pointwise = {key: options[key] for key in ("filters", "use_bias", "activation")}
    pointwise |= {key: value for key, value in options.items() if key.startswith(("bias_", "activity_"))}
    pointwise |= {"kernel_" + key[10:]: value for key, value in options.items() if key.startswith("pointwise_")}
    return [
        tf_keras.layers.DepthwiseConv2D(**depthwise, **shared, use_bias=False, name=name, **common),
        tf_keras.layers.Conv2D(kernel_size=1, **pointwise, **shared, name=f"{name}{POINTWISE}", **common),
    ]


def _parameters(kind, stop) -> dict:
    """Every named parameter of the constructors of a class, with its default."""
    found = {}
    for each in kind.__mro__[: kind.__mro__.index(stop)]:
        if "__init__" in vars(each):
            for parameter in inspect.signature(each.__init__).parameters.values():
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    found.setdefault(parameter.name, parameter.default)
    return found


def _options(layer, kind, handlers) -> tuple[dict, dict]:
    """(options for the tf_keras class, options that it lacks and that do not hold their default)."""
    config = {key: value for key, value in layer.get_config().items() if key not in _BASE}
    defaults = _parameters(type(layer), keras.layers.Layer)
    known = {*_parameters(kind, tf_keras.layers.Layer), "activity_regularizer"}
    names = OPTION_NAMES.get(type(layer).__name__, {})
    if type(layer) is keras.layers.Normalization and layer.weights:
        # As constants: tf_keras loses weights that it has adapted when a model is cloned.
        config |= {"mean": layer.adapt_mean.numpy(), "variance": layer.adapt_variance.numpy()}
    options, unknown = {}, {}
    for key, value in config.items():
        if names.get(key, key) not in known:
            resolved = keras.config.image_data_format() if key == "data_format" else None
            default = defaults.get(key, False)  # an option outside the signature (`rms_scaling`) is a switch
            if value not in (default, resolved, None):
                unknown[key] = value
        elif not key.endswith("_initializer"):  # the weights are copied
            options[names.get(key, key)] = _value(layer, key, value, handlers)
    return options, unknown


def _value(layer, key, value, handlers):
    """One config value in the terms of tf_keras."""
    held = getattr(layer, key, None)
    if type(layer) is keras.layers.Bidirectional and key in ("layer", "backward_layer"):
        held = layer.forward_layer if key == "layer" else layer.backward_layer
    if isinstance(held, (list, tuple)) and held and all(isinstance(each, keras.layers.Layer) for each in held):
        return [_inner(each, handlers) for each in held]
    if isinstance(held, keras.layers.Layer):
        return held if "activation" in key else _inner(held, handlers)
    if key.endswith("activation") and callable(held):
        return _native(held) or FOREIGN.get(ACTIVATIONS.get(held), held)
    if isinstance(value, dict) and key.endswith(("_regularizer", "_constraint")):
        return _counterpart(layer, key, held)
    return value


def _counterpart(layer, key, held):
    """A regularizer or constraint of Keras 3 as that of tf_keras."""
    module = tf_keras.regularizers if key.endswith("_regularizer") else tf_keras.constraints
    kind = getattr(module, type(held).__name__, None)
    if kind is None or not type(held).__module__.startswith("keras."):
        raise InputError(
            f"Layer '{layer.name}' has a {key} without a counterpart in tf_keras: {type(held).__name__}. "
            "Remove it (it plays no part in the outputs), or pass a handler for the layer."
        )
    return kind.from_config(held.get_config())


def _inner(layer, handlers):
    """The layer inside a wrapper or a recurrent layer; nothing can stand behind it."""
    if isinstance(layer, keras.Model):
        raise InputError(
            f"The model '{layer.name}' stands inside a wrapper layer (TimeDistributed or the like), where it cannot be "
            "inlined. Wrap its layers one by one."
        )
    return twins(layer, layer.name, handlers, inside=True)[0]


def merge_layer(operation, tensors, name: str):
    """`x + y` of equal shapes as tf_keras's Add layer (and likewise), which tfmot quantizes well; else None."""
    kind = type(operation).__name__
    if kind not in MERGES or not _is_keras_operation(operation) or len(tensors) != 2:
        return None
    first, second = tensors
    same = first.shape.as_list() == second.shape.as_list() and first.dtype == second.dtype and first.dtype.is_floating
    return getattr(tf_keras.layers, kind)(name=name, dtype=first.dtype) if same else None


def _is_keras_operation(operation) -> bool:
    """Whether an operation is one of `keras.ops` and no layer: `keras.layers.Add` has the same name as `x + y`."""
    kind = type(operation)
    return not isinstance(operation, keras.layers.Layer) and kind.__module__.partition(".")[0] == "keras"


def last_name(name: str) -> str:
    """`quant_conv/kernel:0` -> `kernel`."""
    return name.split("/")[-1].split(":")[0]


def matched(layer, found: list[tuple[str, object]]) -> list[tuple[object, object]]:
    """Pairs (variable of the Keras 3 layer, what belongs to it among `found`: last parts of names with values).

    Raises InputError unless every variable finds one of its shape.
    """
    if isinstance(layer, keras.layers.Normalization):
        return []  # its numbers are options of the twin
    names = {name for name, _ in found}
    left = list(found)
    pairs = []
    for variable in layer.weights:
        wanted = last_name(variable.path)
        if wanted not in names:
            wanted = OTHER_NAMES.get(wanted, wanted)
        place = next(
            (i for i, (name, value) in enumerate(left) if name == wanted and value.shape == variable.shape), None
        )
        if place is None:
            raise InputError(
                f"Layer '{layer.name}' ({type(layer).__name__}): its weight '{wanted}' of shape "
                f"{tuple(variable.shape)} has no counterpart; found "
                f"{[(name, tuple(value.shape)) for name, value in left]}. A handler must return a layer with weights "
                "of the same names and shapes."
            )
        pairs.append((variable, left.pop(place)[1]))
    return pairs


def numbers(variable) -> np.ndarray:
    """The value of a variable or tensor of either Keras."""
    return np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)
