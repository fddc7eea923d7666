"""One Keras 3 layer or operation -> its tf_keras twin of the same name, options and weights.

No option is lost silently: one that tf_keras lacks is dropped only if it has its default. An activation that the two
Keras define differently, or that tf_keras lacks, calls the Keras 3 function.
"""

import inspect
import re
import weakref

import keras
import numpy as np
import tensorflow as tf
import tf_keras

from kdistill.errors import InputError
from kdistill.networks.keras_internals import layers_of, takes_training

# Equal functions in both Keras that tfmot quantizes as the activation of a layer.
FUSED = ("linear", "relu", "softmax", "sigmoid", "tanh", "gelu")
# Equal functions in both Keras, as layers of their own.
SAME = (*FUSED, "silu", "elu", "exponential", "mish", "selu", "softplus", "softsign")
# Layers without weights whose state or randomness differs in tf_keras: the twin calls the Keras 3 layer itself.
CALLED = re.compile(r"Random|Lambda|Hash|Discretization|CategoryEncoding|.*Lookup|TextVectorization")
OPTION_NAMES = {"LeakyReLU": {"negative_slope": "alpha"}}
MERGES = ("Add", "Subtract", "Multiply", "Maximum", "Minimum")
POINTWISE = ".pointwise"  # ends the name of the second half of a SeparableConv2D
OTHER_NAMES = {"kernel": "depthwise_kernel", "pointwise_kernel": "kernel"}
_BASE = {"name", "trainable", "dtype"}
_calls = weakref.WeakValueDictionary()


class Call:
    """A Keras 3 operation with its constant arguments; `tensors` replace those that `slots` mark."""

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

    Its config contains the key of the call, so that tfmot can clone it within this process; it cannot be saved.
    """

    def __init__(self, key: str, **kwargs):
        super().__init__(**kwargs)
        self.key = key
        self.supports_masking = True  # the graph of Keras 3 already contains the masks, as tensors
        operation = _calls[key]
        self._operation = lambda: operation  # a closure: tf_keras would track a Keras 3 layer that is an attribute

    @property
    def operation(self):
        """The operation, or layer, of Keras 3."""
        return self._operation().operation

    def call(self, inputs, training=None):
        training = bool(training) if not tf.is_tensor(training) else training
        return self._operation()(tf.nest.flatten(inputs), training)

    def compute_mask(self, inputs, mask=None):
        return None

    def get_config(self):
        return {**super().get_config(), "key": self.key}


@tf_keras.saving.register_keras_serializable(package="kdistill", name="GroupNormalization")
class GroupNormalization(tf_keras.layers.GroupNormalization):
    """Computes as in Keras 3, without masks: those of tf_keras become operators that TFLite cannot run."""

    def call(self, inputs, mask=None):
        shape, dynamic = inputs.shape.as_list(), tf.shape(inputs)
        sizes = [-1, *(dynamic[axis] if size is None else size for axis, size in enumerate(shape) if axis)]
        axis = self.axis % len(shape)
        grouped = tf.reshape(inputs, [*sizes[:axis], self.groups, shape[axis] // self.groups, *sizes[axis + 1 :]])
        others = [other for other in range(1, len(shape) + 1) if other != axis]
        mean, variance = tf.nn.moments(grouped, others, keepdims=True)
        outputs = tf.reshape((grouped - mean) * tf.math.rsqrt(variance + self.epsilon), sizes)
        channels = [-1 if other == axis else 1 for other in range(len(shape))]
        if self.scale:
            outputs *= tf.reshape(self.gamma, channels)
        if self.center:
            outputs += tf.reshape(self.beta, channels)
        return outputs


TWINS = {"GroupNormalization": GroupNormalization}  # others have the twin of their name in tf_keras.layers


def operation_layer(call: Call, name: str) -> KerasOperation:
    """The tf_keras layer of this name that performs the call."""
    key = f"{name}-{id(call)}"
    _calls[key] = call
    return KerasOperation(key, name=name, dtype="float32", autocast=False)


def _keras_activations() -> dict:
    names = [name for name in dir(keras.activations) if not name.startswith("_")]
    functions = {name: getattr(keras.activations, name) for name in names}
    return {f: f.__name__ for name, f in functions.items() if name not in ("get", "serialize", "deserialize")}


ACTIVATIONS = _keras_activations()  # the Keras 3 function -> its name


def _registered(function, name: str):
    """A Keras 3 activation under a name that tf_keras can save and load (`hard_sigmoid` differs between the two)."""

    def activation(x):
        return function(x)

    activation.__name__ = f"keras3_{name}"
    return tf_keras.saving.register_keras_serializable(package="kdistill", name=activation.__name__)(activation)


FOREIGN = {name: _registered(f, name) for f, name in ACTIVATIONS.items() if name not in SAME}


def _native(function) -> str | None:
    """The tf_keras name of a Keras 3 activation that is equal there, else None."""
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
    activation = ACTIVATIONS.get(function)
    if activation is None:
        return [operation_layer(Call(function), name)]
    relu6 = tf_keras.layers.ReLU(max_value=6.0, name=name, dtype=policy)
    if activation == "relu6":
        return [relu6]
    if activation == "hard_sigmoid":  # relu6(x + 3) / 6: tfmot learns a range for each of the steps
        before = tf_keras.layers.Rescaling(1.0, 3.0, name=f"{name}.plus3", dtype=policy)
        return [before, relu6, tf_keras.layers.Rescaling(1 / 6, name=f"{name}.sixth", dtype=policy)]
    return [tf_keras.layers.Activation(_native(function) or FOREIGN[activation], name=name, dtype=policy)]


def twins(layer, name: str, handlers: dict, inside: bool = False) -> list:
    """The tf_keras layers that, one behind the other, equal the Keras 3 layer; one layer if it is `inside` a wrapper.

    Raises `InputError` for a layer with weights that tf_keras lacks, or with an option that tf_keras lacks.
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
            f"Layer '{layer.name}' is already quantized ({policy}). Pass the model from before model.quantize()."
        )
    if kind == "SpectralNormalization":  # tf_keras's own calls `tf.keras`, which is Keras 3
        raise InputError(
            f"Layer '{layer.name}' (SpectralNormalization) has no twin in tf_keras that works, which pruning, "
            "clustering and quantization-aware training need. In prediction it computes what the layer inside of it "
            f"computes: build the model with that layer alone, and give it the weights of '{layer.layer.name}'."
        )
    if getattr(layer, "stateful", False):
        raise InputError(
            f"Layer '{layer.name}' ({kind}) keeps its state from batch to batch (stateful=True), which training on "
            "shuffled batches mixes up. Build the model with stateful=False and the same weights."
        )
    if kind == "Activation":
        return activation_layers(layer.activation, name, policy)
    options, missing = _options(layer, getattr(tf_keras.layers, kind), handlers)
    if missing and not layer.weights:
        return [operation_layer(Call(layer), name)]  # calls the layer itself, with all its options
    if missing:
        raise InputError(
            f"Layer '{layer.name}' ({kind}) has options that tf_keras lacks: "
            + ", ".join(f"{key}={value!r}" for key, value in missing.items())
            + ". Build the layer with their defaults, or pass a handler for it."
        )
    common = {"trainable": layer.trainable, "dtype": policy}
    following = (
        []
        if inside or "recurrent_activation" in options or kind.startswith("SimpleRNN")
        else _activation_behind(layer, name)
    )
    if following:
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
        return [*_separated(options, name, common), *following]
    return [TWINS.get(kind, getattr(tf_keras.layers, kind))(**options, name=name, **common), *following]


def _handled(twin, layer, name):
    if not isinstance(twin, tf_keras.layers.Layer):
        raise InputError(
            f"The handler for layer '{layer.name}' must return a tf_keras layer, returned {type(twin).__name__}."
        )
    twin._name = name
    twin.trainable = layer.trainable
    return twin


def _activation_behind(layer, name: str) -> list:
    """The activation of a layer as a layer behind it, where it cannot be fused."""
    function = getattr(layer, "activation", None)
    if not callable(function) or ACTIVATIONS.get(function) in FUSED:
        return []
    return activation_layers(function, f"{name}.activation", layer.dtype_policy.name)


def _separated(options: dict, name: str, common: dict) -> list:
    """SeparableConv2D as its depthwise and its pointwise convolution."""
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
    """The named parameters of the constructors of a class and its bases below `stop`, with their defaults."""
    defaults = {}
    for base in kind.__mro__[: kind.__mro__.index(stop)]:
        if "__init__" in vars(base):
            for parameter in inspect.signature(base.__init__).parameters.values():
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    defaults.setdefault(parameter.name, parameter.default)
    return defaults


def _options(layer, kind, handlers) -> tuple[dict, dict]:
    """(options for the tf_keras class, options that it lacks and that differ from their default)."""
    config = {key: value for key, value in layer.get_config().items() if key not in _BASE}
    defaults = _parameters(type(layer), keras.layers.Layer)
    accepted = {*_parameters(kind, tf_keras.layers.Layer), "activity_regularizer"}
    names = OPTION_NAMES.get(type(layer).__name__, {})
    if type(layer) is keras.layers.Normalization and layer.weights:
        # As constants: tf_keras loses adapted weights when it clones a model.
        config |= {"mean": layer.adapt_mean.numpy(), "variance": layer.adapt_variance.numpy()}
    options, missing = {}, {}
    for key, value in config.items():
        if names.get(key, key) not in accepted:
            resolved = keras.config.image_data_format() if key == "data_format" else None
            default = defaults.get(key, False)  # an option outside the signature (`rms_scaling`) is a switch
            if value not in (default, resolved, None):
                missing[key] = value
        elif not key.endswith("_initializer"):  # the weights are copied
            options[names.get(key, key)] = _value(layer, key, value, handlers)
    return options, missing


def _value(layer, key, value, handlers):
    """One config value as tf_keras needs it."""
    attribute = getattr(layer, key, None)
    if type(layer) is keras.layers.Bidirectional and key in ("layer", "backward_layer"):
        attribute = layer.forward_layer if key == "layer" else layer.backward_layer
    several = isinstance(attribute, (list, tuple)) and len(attribute) > 0
    if several and all(isinstance(item, keras.layers.Layer) for item in attribute):
        return [_inner(item, handlers) for item in attribute]
    if isinstance(attribute, keras.layers.Layer):
        return attribute if "activation" in key else _inner(attribute, handlers)
    if key.endswith("activation") and callable(attribute):
        return _native(attribute) or FOREIGN.get(ACTIVATIONS.get(attribute), attribute)
    if isinstance(value, dict) and key.endswith(("_regularizer", "_constraint")):
        return _counterpart(layer, key, attribute)
    return value


def _counterpart(layer, key, penalty):
    """A regularizer or constraint of Keras 3 as that of tf_keras."""
    module = tf_keras.regularizers if key.endswith("_regularizer") else tf_keras.constraints
    kind = getattr(module, type(penalty).__name__, None)
    if kind is None or not type(penalty).__module__.startswith("keras."):
        raise InputError(
            f"Layer '{layer.name}' has a {key} without a counterpart in tf_keras: {type(penalty).__name__}. "
            "Remove it (it does not change the outputs), or pass a handler for the layer."
        )
    return kind.from_config(penalty.get_config())


def _inner(layer, handlers):
    """The twin of a layer inside a wrapper or a recurrent layer, where no second layer can stand behind it."""
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


def matched(layer, candidates: list[tuple[str, object]]) -> list[tuple[object, object]]:
    """Pairs (variable of the Keras 3 layer, its counterpart among the candidates `(last part of the name, value)`).

    Raises `InputError` if a variable has no counterpart of its shape.
    """
    # The numbers of a Normalization are options of its twin, inside of a TimeDistributed too.
    norms = [part for part in [layer, *layers_of(layer)] if isinstance(part, keras.layers.Normalization)]
    options = {id(variable) for norm in norms for variable in norm.weights}
    names = {name for name, _ in candidates}
    remaining = list(candidates)
    pairs = []
    for variable in (variable for variable in layer.weights if id(variable) not in options):
        wanted = last_name(variable.path)
        if wanted not in names:
            wanted = OTHER_NAMES.get(wanted, wanted)
        place = next(
            (i for i, (name, value) in enumerate(remaining) if name == wanted and value.shape == variable.shape), None
        )
        if place is None:
            raise InputError(
                f"Layer '{layer.name}' ({type(layer).__name__}): its weight '{wanted}' of shape "
                f"{tuple(variable.shape)} has no counterpart among "
                f"{[(name, tuple(value.shape)) for name, value in remaining]}. A handler must return a layer with "
                "weights of the same names and shapes."
            )
        pairs.append((variable, remaining.pop(place)[1]))
    return pairs


def numbers(variable) -> np.ndarray:
    """The value of a variable or tensor of either Keras."""
    return np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)
