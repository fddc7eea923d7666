"""What tfmot does to each layer of a bridged model: pruned, clustered, quantized, or left alone for a named reason.

Each function takes a fresh tf_keras model, which it uses up (tfmot changes the layers that it wraps), and returns the
wrapped model with a dict: layer name -> "" where the step is done, else the reason why not.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf
import tf_keras
from tf_keras import layers

from kdistill.compression.bridge import load_tfmot
from kdistill.errors import InputError

tfmot = load_tfmot()
quantization = tfmot.quantization.keras
# The kernels that are pruned and clustered.
KERNELS = (layers.Conv1D, layers.Conv2D, layers.Conv2DTranspose, layers.Conv3D, layers.Dense)
PRESERVED = (layers.Conv2D, layers.Dense)  # where tfmot's quantizers keep zeros and clusters
# The activations that tfmot quantizes as layers; others get a range for their output.
QUANTIZED_ACTIVATIONS = ("linear", "relu", "softmax", "sigmoid", "tanh", "swish", "gelu")
Decisions = dict[str, str]


@dataclass(frozen=True)
class Goals:
    """The share of zeros and the number of values that kernels end with; other ones for single layers by name."""

    final_sparsity: float = 0.8
    clusters: int = 16
    layer_sparsity: dict[str, float] = field(default_factory=dict)
    layer_clusters: dict[str, int] = field(default_factory=dict)

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


def prune(network, steps: int, goals: Goals, two_of_four: bool, skip=()) -> tuple[tf_keras.Model, Decisions]:
    """Magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878) over `steps` training steps.

    The share of zeros climbs along a polynomial to that of the goals in the first three quarters of the steps. With
    `two_of_four`, two of each four weights along the input channels are zeroed at the first step instead.
    """
    end = max(1, 3 * steps // 4)
    every = max(1, end // 50)
    at_once = tfmot.sparsity.keras.ConstantSparsity(0.5, 0, frequency=1)

    def reason(layer):
        left = _no_kernel(layer, skip, "pruned")
        channels = layer.kernel.shape[-2] if not left else 4
        if two_of_four and not left and (channels % 4 or layer.kernel.shape.rank not in (2, 4)):
            return f"2:4 sparsity needs input channels in fours, it has {channels}"
        return left

    def wrap(layer):
        pruned = tfmot.sparsity.keras
        if two_of_four:
            return pruned.prune_low_magnitude(layer, at_once, sparsity_m_by_n=(2, 4))
        final = goals.sparsity_of(layer.name)
        gradual = pruned.PolynomialDecay(0.0, final, 0, end - end % every, frequency=every)
        return pruned.prune_low_magnitude(layer, gradual)

    return _wrapped(network, reason, wrap)


def callbacks(stage: str) -> list:
    """The tf_keras callbacks without which a stage does not work."""
    return [tfmot.sparsity.keras.UpdatePruningStep()] if stage.startswith("prune") else []


def cluster(network, goals: Goals, keep_zeros: bool, skip=()) -> tuple[tf_keras.Model, Decisions]:
    """Weights shared among a few values for each kernel (Han, Mao, Dally 2016, arXiv 1510.00149).

    `keep_zeros`: zero is one of the values, and what is zero stays zero.
    """

    def reason(layer):
        left = _no_kernel(layer, skip, "clustered")
        if left:
            return left
        values, clusters = layer.kernel.numpy(), goals.clusters_of(layer.name)
        needed = values[values != 0] if keep_zeros else values
        if len(np.unique(needed)) < 4 * clusters:  # KMEANS++ fails on fewer than `clusters`, and little is to be gained
            kind = "weights other than zero" if keep_zeros else "weights"
            return f"too small: {len(np.unique(needed))} {kind} for {clusters} clusters (4 for each are needed)"
        return ""

    def wrap(layer):
        clustering = tfmot.clustering.keras
        start = clustering.CentroidInitialization.KMEANS_PLUS_PLUS
        clusters = goals.clusters_of(layer.name)
        return clustering.cluster_weights(layer, clusters, start, preserve_sparsity=keep_zeros)

    return _wrapped(network, reason, wrap)


def _no_kernel(layer, skip, what: str) -> str:
    if layer.name in skip:
        return "left alone as asked (skip)"
    if not layer.trainable:
        return "frozen (trainable=False)"
    if type(layer) not in KERNELS:
        return f"{type(layer).__name__} layers are not {what}"
    return ""


def _wrapped(network, reason, wrap) -> tuple[tf_keras.Model, Decisions]:
    decisions = {layer.name: reason(layer) for layer in network.layers if layer.weights}
    model = tf_keras.models.clone_model(
        network, clone_function=lambda layer: wrap(layer) if decisions.get(layer.name) == "" else layer
    )
    return model, decisions


def holds(wrapped, stage: str, decisions: Decisions, sparse: dict[str, np.ndarray], clustered) -> tuple[list, list]:
    """What tfmot would lose in a stage: (variable, mask) pairs of kernels to mask, and kernels not to train.

    A layer without a wrapper (too small to cluster, not quantized) is trained all the same; and one Dense or Conv2D
    without zeros makes tfmot forget those of all others. `sparse`: layer -> kernel; `clustered`: names of layers.
    """
    kernels = {v.name.removesuffix("/kernel:0"): v for v in wrapped.trainable_variables if v.name.endswith("/kernel:0")}
    left = {name for name in kernels if decisions.get(name) != ""}
    if stage == "qat":
        kinds = {layer.layer.name: type(layer.layer) for layer in wrapped.layers if hasattr(layer, "layer")}
        left |= {name for name in kernels if kinds.get(name) not in PRESERVED}
    masked = kernels if stage == "qat" else left
    masks = [(kernels[name], (sparse[name] != 0).astype("float32")) for name in masked if name in sparse]
    return masks, [kernels[name] for name in left if name in clustered]


@tf_keras.saving.register_keras_serializable(package="kdistill", name="NoOpActivation")
def NoOpActivation(x):
    """The name tells tfmot to quantize the weights of a layer, but not its output: a ReLU behind it does."""
    return x


@tf_keras.saving.register_keras_serializable(package="kdistill")
class Rectifier(layers.ReLU):
    """A ReLU behind a convolution, hidden from tfmot: seeing one, it would stop quantizing the convolution's weights,
    and the zeros and clusters among them would be lost."""


class OutputOnly(quantization.QuantizeConfig):
    """Learns the range of a layer's output, and nothing else."""

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

    `keep_zeros`, `keep_clusters`: what pruning and clustering have made is preserved.
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
        raise InputError("Nothing is left to quantize: skip names every layer with weights.")

    def annotate(layer):
        decisions[layer.name] = "left alone as asked (skip)" if layer.name in skip else _unquantizable(layer, plain)
        if decisions[layer.name]:
            return layer
        if graph.feeds_relu(layer):
            layer.activation = NoOpActivation
        if graph.is_relu_behind_kernel(layer):
            return quantization.quantize_annotate_layer(_rectifier(layer), OutputOnly())
        return quantization.quantize_annotate_layer(layer, _config(layer, graph, plain, keep_zeros or keep_clusters))

    objects = {"OutputOnly": OutputOnly, "NoOpActivation": NoOpActivation}
    with quantization.quantize_scope(objects), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "No clustering performed": the table of stages says where
        annotated = tf_keras.models.clone_model(network, clone_function=annotate)
        return quantization.quantize_apply(annotated, scheme), decisions


class _Graph:
    """Who feeds whom in a functional tf_keras model."""

    def __init__(self, network):
        self.before = {}
        self.after = {layer.name: [] for layer in network.layers}
        for layer in network.layers:
            feeding = [f for node in layer.inbound_nodes for f in tf.nest.flatten(node.inbound_layers)]
            self.before[layer.name] = feeding
            for each in feeding:
                self.after[each.name].append(layer)
        for name in network.output_names:
            self.after[name].append(None)  # an output of the model is a consumer too

    def feeds_relu(self, layer) -> bool:
        """A kernel with no activation of its own whose only consumer is a ReLU."""
        consumers = self.after[layer.name]
        plain = _is_kernel(layer) and _activation(layer) == "linear"
        return plain and len(consumers) == 1 and _is_relu(consumers[0])

    def is_relu_behind_kernel(self, layer) -> bool:
        """The ReLU of `feeds_relu`."""
        return _is_relu(layer) and any(
            _is_kernel(each) and len(self.after[each.name]) == 1 for each in self.before[layer.name]
        )

    def folds(self, layer) -> bool:
        """A BatchNormalization that the converter folds into the kernel before it."""
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


def _unquantizable(layer, plain) -> str:
    """Why a layer stays float, or "" where it does not."""
    kind = type(layer).__name__
    known = plain.supports(layer) and not isinstance(layer, layers.RNN)
    if layer.weights and not known and type(layer) is not layers.BatchNormalization:
        return f"tfmot has no 8-bit scheme for {kind} layers"
    outputs = tf.nest.flatten([node.output_tensors for node in layer.inbound_nodes])
    if len(outputs) > len(layer.inbound_nodes):
        return "it has several outputs"
    if not outputs[0].dtype.is_floating:
        return f"its output is {outputs[0].dtype.name}"
    return ""


def _config(layer, graph: _Graph, plain, preserving: bool):
    """None where tfmot's own choice for the layer is right."""
    if type(layer) is layers.BatchNormalization:
        return None if graph.folds(layer) else OutputOnly()
    if type(layer) is layers.Activation:
        return None if _activation(layer) in QUANTIZED_ACTIVATIONS else OutputOnly()
    if not plain.supports(layer):
        return OutputOnly()
    if preserving and layer.trainable_weights and type(layer) not in (*PRESERVED, layers.DepthwiseConv2D):
        return plain.get_quantize_config(layer)  # the preserving registries refuse it
    return None
