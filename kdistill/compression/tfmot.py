"""The steps of compression by tfmot: prunes, clusters or quantizes the layers of a bridged model, or says why not.

Every function consumes a fresh tf_keras model (tfmot changes the layers that it wraps) and returns the wrapped model
with the decisions: layer name -> "" where the step applies, else the reason why not.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from kdistill.compression.bridge import load_tfmot
from kdistill.compression.bridge_layers import MERGES, KerasOperation
from kdistill.errors import InputError
from kdistill.recipe import Stage

tfmot = load_tfmot()
quantization = tfmot.quantization.keras
# The layers whose kernels are pruned and clustered.
KERNELS = (layers.Conv1D, layers.Conv2D, layers.Conv2DTranspose, layers.Conv3D, layers.Dense)
RECURRENT = (layers.LSTM, layers.GRU, layers.SimpleRNN)  # whose two kernels are pruned, but not clustered
PRESERVED = (layers.Conv2D, layers.Dense)  # where tfmot's quantizers keep zeros and clusters
# The activations that tfmot quantizes as layers; others get a range for their output.
QUANTIZED_ACTIVATIONS = ("linear", "relu", "softmax", "sigmoid", "tanh", "swish", "gelu")
SKIPPED = "skipped (skip)"  # the reason of a layer that the user excludes
Decisions = dict[str, str]


@dataclass(frozen=True)
class Goals:
    """The final share of zeros and number of values of kernels; others for single layers by name."""

    final_sparsity: float = 0.8
    clusters: int = 16
    layer_sparsity: dict[str, float] = field(default_factory=dict)
    layer_clusters: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of_stage(cls, stage: Stage) -> "Goals":
        """The goals of a stage; where it states none, the defaults."""
        single = {"layer_sparsity": dict(stage.layer_sparsity), "layer_clusters": dict(stage.layer_clusters)}
        whole = {"final_sparsity": stage.final_sparsity, "clusters": stage.clusters}
        return cls(**{name: value for name, value in whole.items() if value is not None}, **single)

    def sparsity_of(self, layer: str) -> float:
        """The share of zeros for this layer."""
        return self.layer_sparsity.get(layer, self.final_sparsity)

    def clusters_of(self, layer: str) -> int:
        """The number of values for this layer."""
        return self.layer_clusters.get(layer, self.clusters)

    def of_pruning(self) -> list:
        """What decides the outcome of pruning."""
        return [self.final_sparsity, self.layer_sparsity]

    def of_clustering(self) -> list:
        """What decides the outcome of clustering."""
        return [self.clusters, self.layer_clusters]


def wrap(
    step: str, network, training_steps: int, preserved: set[str], goals: Goals, skip
) -> tuple[tf_keras.Model, Decisions]:
    """The network in tfmot's wrappers for a step of a scheme.

    `preserved`: what earlier steps did, `pruned` and `clustered`. Raises `InputError` if no layer can be wrapped.
    """
    try:
        if step == "qat":
            wrapped, decisions = quantize(network, "pruned" in preserved, "clustered" in preserved, skip)
        elif step == "cluster":
            wrapped, decisions = cluster(network, goals, "pruned" in preserved, skip)
        else:
            wrapped, decisions = prune(network, training_steps, goals, step == "prune_2_4", skip)
    except InputError:
        raise
    except Exception as error:  # tfmot and tf_keras raise many kinds
        raise InputError(
            f"tensorflow-model-optimization cannot wrap the layers of this model for the step '{step}': "
            f"{_first_line(error)} Masks (Masking, Embedding with mask_zero=True) cannot pass its wrappers. Replace "
            "that layer, or name it in skip."
        ) from error
    if all(decisions.values()):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in decisions.items())
        raise InputError(f"The step '{step}' can do nothing with this model. {reasons}.")
    return wrapped, decisions


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".") + "."


def prune(network, steps: int, goals: Goals, two_of_four: bool, skip=()) -> tuple[tf_keras.Model, Decisions]:
    """Magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878) over `steps` training steps.

    The share of zeros rises along a polynomial to that of the goals in the first three quarters of the steps. With
    `two_of_four`, the first step sets two of any four weights along the input channels to zero instead.
    """
    end = max(1, 3 * steps // 4)
    every = max(1, end // 50)
    at_once = tfmot.sparsity.keras.ConstantSparsity(0.5, 0, frequency=1)

    def reason(layer):
        excluded = _exclusion(layer, skip, "pruned")
        if two_of_four and not excluded and type(layer) in RECURRENT:
            return "2:4 sparsity is for kernels of dense layers and convolutions"
        if type(layer) in RECURRENT:
            return excluded
        channels = 4 if excluded else layer.kernel.shape[-2]
        if two_of_four and not excluded and (channels % 4 or layer.kernel.shape.rank not in (2, 4)):
            return f"2:4 sparsity needs input channels in fours, it has {channels}"
        return excluded

    def wrapper(layer):
        pruned = tfmot.sparsity.keras
        if two_of_four:
            return pruned.prune_low_magnitude(layer, at_once, sparsity_m_by_n=(2, 4))
        final = goals.sparsity_of(layer.name)
        gradual = pruned.PolynomialDecay(0.0, final, 0, end - end % every, frequency=every)
        return pruned.prune_low_magnitude(layer, gradual)

    return _wrapped(network, reason, wrapper)


def callbacks(step: str) -> list:
    """The tf_keras callbacks that a step needs."""
    return [tfmot.sparsity.keras.UpdatePruningStep()] if step.startswith("prune") else []


def cluster(network, goals: Goals, keep_zeros: bool, skip=()) -> tuple[tf_keras.Model, Decisions]:
    """Every kernel shares a few values among its weights (Han, Mao, Dally 2016, arXiv 1510.00149).

    With `keep_zeros`, zero is one of the values, and zeros stay zero.
    """

    def reason(layer):
        excluded = _exclusion(layer, skip, "clustered")
        if excluded:
            return excluded
        values, clusters = layer.kernel.numpy(), goals.clusters_of(layer.name)
        needed = values[values != 0] if keep_zeros else values
        if len(np.unique(needed)) < 4 * clusters:  # KMEANS++ fails on fewer than `clusters`, and gains little here
            kind = "weights other than zero" if keep_zeros else "weights"
            return f"too small: {len(np.unique(needed))} {kind} for {clusters} clusters (at least 4 per cluster)"
        return ""

    def wrapper(layer):
        clustering = tfmot.clustering.keras
        start = clustering.CentroidInitialization.KMEANS_PLUS_PLUS
        clusters = goals.clusters_of(layer.name)
        return clustering.cluster_weights(layer, clusters, start, preserve_sparsity=keep_zeros)

    return _wrapped(network, reason, wrapper)


def _exclusion(layer, skip, what: str) -> str:
    """Why a layer is not `what`, or ""."""
    if layer.name in skip:
        return SKIPPED
    if not layer.trainable:
        return "frozen (trainable=False)"
    if type(layer) not in (*KERNELS, *(RECURRENT if what == "pruned" else ())):
        return f"{type(layer).__name__} layers are not {what}"
    return ""


def kernel_of(layer) -> np.ndarray:
    """The kernel of a layer; of a recurrent one that of the inputs and that of the state below it."""
    if type(layer) in RECURRENT:
        return np.concatenate([layer.cell.kernel.numpy(), layer.cell.recurrent_kernel.numpy()])
    return layer.kernel.numpy()


def _wrapped(network, reason, wrapper) -> tuple[tf_keras.Model, Decisions]:
    decisions = {layer.name: reason(layer) for layer in network.layers if layer.weights}
    model = tf_keras.models.clone_model(
        network, clone_function=lambda layer: wrapper(layer) if decisions.get(layer.name) == "" else layer
    )
    return model, decisions


def protected(wrapped, step: str, decisions: Decisions, pruned: dict[str, np.ndarray], clustered) -> tuple[list, list]:
    """What tfmot would lose in a step: (variable, mask) pairs of kernels to mask, and kernels not to train.

    A layer without a wrapper (too small to cluster, not quantized) is trained too; and one Dense or Conv2D without
    zeros makes tfmot lose those of all others. `pruned`: layer -> kernel; `clustered`: names of layers.
    """
    kernels = {v.name.removesuffix("/kernel:0"): v for v in wrapped.trainable_variables if v.name.endswith("/kernel:0")}
    unwrapped = {name for name in kernels if decisions.get(name) != ""}
    if step == "qat":
        kinds = {layer.layer.name: type(layer.layer) for layer in wrapped.layers if hasattr(layer, "layer")}
        unwrapped |= {name for name in kernels if kinds.get(name) not in PRESERVED}
    masked = kernels if step == "qat" else unwrapped
    masks = [(kernels[name], (pruned[name] != 0).astype("float32")) for name in masked if name in pruned]
    for layer in wrapped.layers:
        if type(layer) in RECURRENT and layer.name in pruned:
            mask, rows = (pruned[layer.name] != 0).astype("float32"), layer.cell.kernel.shape[0]
            masks += [(layer.cell.kernel, mask[:rows]), (layer.cell.recurrent_kernel, mask[rows:])]
    return masks, [kernels[name] for name in unwrapped if name in clustered]


@tf_keras.saving.register_keras_serializable(package="kdistill", name="NoOpActivation")
def NoOpActivation(x):
    """The name makes tfmot quantize the weights of a layer but not its output, which the ReLU behind it quantizes."""
    return x


@tf_keras.saving.register_keras_serializable(package="kdistill")
class Rectifier(layers.ReLU):
    """A ReLU behind a convolution under a name that tfmot does not recognize.

    tfmot does not quantize the weights of a convolution with a ReLU behind it, and would lose their zeros and clusters.
    """


class OutputOnly(quantization.QuantizeConfig):
    """Learns the range of a layer's output only."""

    def get_weights_and_quantizers(self, layer):
        return []

    def get_activations_and_quantizers(self, layer):
        return []

    def set_quantize_weights(self, layer, quantize_weights):
        assert not quantize_weights

    def set_quantize_activations(self, layer, quantize_activations):
        assert not quantize_activations

    def get_output_quantizers(self, layer):
        average = quantization.quantizers.MovingAverageQuantizer
        return [average(num_bits=8, per_axis=False, symmetric=False, narrow_range=False)]

    def get_config(self):
        return {}


def quantize(network, keep_zeros: bool, keep_clusters: bool, skip=()) -> tuple[tf_keras.Model, Decisions]:
    """Quantization-aware training (Jacob et al. 2018, arXiv 1712.05877): int8 rounding in the forward pass.

    `keep_zeros`, `keep_clusters`: preserve the zeros of pruning and the values of clustering. Raises `InputError` if
    `skip` names every layer with weights.
    """
    combine = tfmot.experimental.combine
    scheme = quantization.default_8bit.Default8BitQuantizeScheme()
    if keep_clusters:
        scheme = combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=keep_zeros)
    elif keep_zeros:
        scheme = combine.Default8BitPrunePreserveQuantizeScheme()
    plain = quantization.default_8bit.Default8BitQuantizeRegistry()
    graph, decisions = _Graph(network), {}
    if all(layer.name in skip for layer in network.layers if layer.weights):
        raise InputError("skip names every layer with weights, so there is nothing to quantize. Remove some of them.")

    def annotate(layer):
        decisions[layer.name] = SKIPPED if layer.name in skip else _unquantizable(layer, plain)
        if decisions[layer.name]:
            return layer
        if graph.feeds_relu(layer):
            layer.activation = NoOpActivation
        if graph.is_relu_behind_kernel(layer):
            return quantization.quantize_annotate_layer(_rectifier(layer), OutputOnly())
        return quantization.quantize_annotate_layer(layer, _config(layer, graph, plain, keep_zeros or keep_clusters))

    objects = {"OutputOnly": OutputOnly, "NoOpActivation": NoOpActivation}
    tf_keras.backend.reset_uids()  # tfmot's own layers are numbered by process, and a file states their names
    with quantization.quantize_scope(objects), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "No clustering performed": the table by layer says where
        annotated = tf_keras.models.clone_model(network, clone_function=annotate)
        return quantization.quantize_apply(annotated, scheme), decisions


class _Graph:
    """The layers before and after every layer of a functional tf_keras model."""

    def __init__(self, network):
        self.before = {}
        self.after = {layer.name: [] for layer in network.layers}
        for layer in network.layers:
            inputs = [source for node in layer.inbound_nodes for source in tf.nest.flatten(node.inbound_layers)]
            self.before[layer.name] = inputs
            for source in inputs:
                self.after[source.name].append(layer)
        for name in network.output_names:
            self.after[name].append(None)  # an output of the model is a consumer too

    def feeds_relu(self, layer) -> bool:
        """Whether this is a kernel without an activation whose only consumer is a ReLU."""
        consumers = self.after[layer.name]
        plain = _is_kernel(layer) and _activation(layer) == "linear"
        return plain and len(consumers) == 1 and _is_relu(consumers[0])

    def is_relu_behind_kernel(self, layer) -> bool:
        """Whether this is the ReLU of `feeds_relu`."""
        return _is_relu(layer) and any(
            _is_kernel(source) and len(self.after[source.name]) == 1 for source in self.before[layer.name]
        )

    def folds(self, layer) -> bool:
        """Whether the converter folds this BatchNormalization into the kernel before it."""
        before = self.before[layer.name]
        return (
            len(before) == 1
            and _is_kernel(before[0])
            and _activation(before[0]) == "linear"
            and (len(self.after[before[0].name]) == 1)
        )


def _is_kernel(layer) -> bool:
    return type(layer) in (layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)


def _activation(layer) -> str:
    function = layer.activation
    return "linear" if function is NoOpActivation else getattr(function, "__name__", "")


def _is_relu(layer) -> bool:
    return type(layer) is layers.ReLU or (type(layer) is layers.Activation and _activation(layer) == "relu")


def _rectifier(layer) -> Rectifier:
    options = layer.get_config() if type(layer) is layers.ReLU else {"name": layer.name}
    return Rectifier.from_config(options)


def unusual(network) -> list[tf_keras.layers.Layer]:
    """The layers of a bridged network that tfmot does not quantize, and operations of Keras 3 other than `MERGES`."""
    plain = quantization.default_8bit.Default8BitQuantizeRegistry()

    def is_unusual(layer) -> bool:
        if isinstance(layer, KerasOperation):
            return type(layer.operation).__name__ not in MERGES
        return bool(_unquantizable(layer, plain))

    return [layer for layer in network.layers if is_unusual(layer)]


def _unquantizable(layer, plain) -> str:
    """Why a layer stays float, or ""."""
    kind = type(layer).__name__
    supported = plain.supports(layer) and not isinstance(layer, layers.RNN)
    if layer.weights and not supported and type(layer) is not layers.BatchNormalization:
        return f"tfmot has no 8-bit scheme for {kind} layers"
    outputs = tf.nest.flatten([node.output_tensors for node in layer.inbound_nodes])
    if len(outputs) > len(layer.inbound_nodes):
        return "it has several outputs"
    if not outputs[0].dtype.is_floating:
        return f"its output is {outputs[0].dtype.name}"
    return ""


def _config(layer, graph: _Graph, plain, preserving: bool):
    """The quantization of a layer; None is tfmot's own choice."""
    if type(layer) is layers.BatchNormalization:
        return None if graph.folds(layer) else OutputOnly()
    if type(layer) is layers.Activation:
        return None if _activation(layer) in QUANTIZED_ACTIVATIONS else OutputOnly()
    if not plain.supports(layer):
        return OutputOnly()
    if preserving and layer.trainable_weights and type(layer) not in (*PRESERVED, layers.DepthwiseConv2D):
        return plain.get_quantize_config(layer)  # the preserving registries refuse it
    return None
