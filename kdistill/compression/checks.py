"""What compression has done, layer by layer: measured in the weights and in the file, not taken from what was asked."""

import numpy as np

from kdistill.compression import tfmot
from kdistill.compression.bridge_layers import last_name
from kdistill.compression.tfmot import Goals
from kdistill.errors import CheckFailed
from kdistill.tflite.flatbuffer import look_inside, weights_of

WORDS = {"prune": "pruned", "prune_2_4": "pruned", "cluster": "clustered", "qat": "quantized"}
SPARSE = 0.1  # from this share of zeros on, a kernel counts as pruned
SHARED = 256  # up to so many values, and a quarter of its size, a kernel counts as clustered
SMALL = 64  # kernels with fewer weights tell nothing about what was done to a model


def kernels(network) -> dict[str, np.ndarray]:
    """layer -> the kernel that pruning and clustering work on, of a tf_keras model."""
    return {layer.name: layer.kernel.numpy() for layer in network.layers if type(layer) in tfmot.KERNELS}


def zeros(kernel: np.ndarray) -> float:
    """The share of weights that are exactly zero."""
    return float(np.mean(kernel == 0))


def kept(network) -> set[str]:
    """What has been done to a student before: `pruned`, `clustered`, both or neither."""
    found = {name: kernel for name, kernel in kernels(network).items() if kernel.size >= SMALL}
    return {word for word, where in (("pruned", sparse(found)), ("clustered", shared(found))) if where}


def shared(found: dict[str, np.ndarray]) -> dict[str, int]:
    """layer -> how many values its kernel has, for those that are clustered."""
    counts = {name: len(np.unique(kernel)) for name, kernel in found.items()}
    return {name: count for name, count in counts.items() if 1 < count <= min(SHARED, found[name].size // 4)}


def sparse(found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of the kernels that are pruned."""
    return {name: kernel for name, kernel in found.items() if zeros(kernel) >= SPARSE}


def per_channel(kernel: np.ndarray, axis: int = -1) -> int:
    """The most different values in any one output channel: tfmot goes on clustering convolutions by channel."""
    return max(len(np.unique(channel)) for channel in np.moveaxis(kernel, axis, 0))


def check(stage: str, decisions: tfmot.Decisions, before: dict, after: dict, kept: set, goals: Goals) -> None:
    """Raises CheckFailed unless each kernel is what the stage should have made of it.

    `before`, `after`: layer -> kernel. `kept`: what the stage had to preserve.
    """
    clustered = shared(before)
    for name, kernel in after.items():
        done, share, values = decisions.get(name) == "", zeros(kernel), len(np.unique(kernel))
        had, asked, most = zeros(before[name]), goals.sparsity_of(name), goals.clusters_of(name)
        problem = None
        if stage == "prune" and done and share < asked - 1.5 / kernel.size:
            problem = f"{share:.1%} of its weights are zero, {asked:.1%} were asked for"
        elif stage == "prune_2_4" and done and not two_of_four(kernel):
            problem = "some four weights along the input channels hold more than two that are not zero"
        elif stage == "cluster" and done and values > most:
            problem = f"its weights have {values} different values, {most} were asked for"
        elif stage in ("cluster", "qat") and "pruned" in kept and had >= SPARSE and share < had:
            problem = f"its share of zeros fell from {had:.1%} to {share:.1%}"
        elif stage == "qat" and name in clustered and per_channel(kernel) > clustered[name]:
            problem = f"its {clustered[name]} different values became {per_channel(kernel)} in one output channel"
        if problem:
            raise CheckFailed(f"After the stage '{stage}', layer '{name}' is not what it should be: {problem}.")


def two_of_four(kernel: np.ndarray) -> bool:
    """Whether no four weights in a row along the input channels hold more than two that are not zero."""
    rows = np.moveaxis(kernel, -2, -1).reshape(-1, 4)
    return bool(np.all(np.count_nonzero(rows, axis=1) <= 2))


def table(layers, decided: dict[str, tfmot.Decisions]) -> list[dict]:
    """One row for each layer that has weights, or that a stage has left alone; of layers of either Keras."""
    rows = []
    for layer in layers:
        told = {WORDS[stage]: d[layer.name] or "yes" for stage, d in decided.items() if layer.name in d}
        if layer.weights or any(reason != "yes" for reason in told.values()):
            rows.append({"layer": layer.name, "kind": type(layer).__name__, **_measured(layer), **told})
    return rows


def summary(rows: list[dict]) -> str:
    """The table in half a sentence."""
    kernels = [row for row in rows if row["sparsity"] is not None]
    weights = sum(row["parameters"] for row in kernels)
    share = sum(row["parameters"] * row["sparsity"] for row in kernels) / max(weights, 1)
    parts = [f"{share:.0%} of the weights are zero"]
    for word in dict.fromkeys(WORDS.values()):
        told = [row[word] for row in rows if word in row]
        if told:
            parts.append(f"{word} {told.count('yes')} of {len(told)} layers")
    return ", ".join(parts)


def _measured(layer) -> dict:
    names = [last_name(getattr(weight, "path", weight.name)) for weight in layer.weights]
    found = [w for w, name in zip(layer.weights, names, strict=True) if name in ("kernel", "depthwise_kernel")]
    values = np.asarray(found[0]) if len(found) == 1 else None
    return {
        "parameters": sum(int(np.prod(weight.shape)) for weight in layer.weights),
        "sparsity": None if values is None else zeros(values),
        "clusters": None if values is None else len(np.unique(values)),
        "clusters_per_channel": None if values is None else per_channel(values),
    }


def mark_float(content: bytes, rows: list[dict]) -> None:
    """Puts into the rows what computes in float in the `.tflite` of a quantization-aware trained network."""
    told = {row["layer"]: row for row in rows}
    for name, operators in look_inside(content)[1].items():
        if name not in told:
            told[name] = {"layer": name, "kind": "", "parameters": 0, "sparsity": None}
            rows.append(told[name])
        if told[name].get("quantized", "yes") == "yes":
            told[name]["quantized"] = f"no int8 version: {', '.join(sorted(set(operators)))} computes in float"


def check_file(content: bytes, found: dict[str, np.ndarray], clustered) -> dict[str, dict]:
    """Looks for the zeros and clusters of these kernels (layer -> kernel) in any `.tflite` made of their model.

    `clustered`: the names of layers that are. Returns layer -> sparsity, clusters_per_channel and, of a 2:4-pruned
    kernel, two_of_four: the share of groups that have the pattern; all as counted in the file. Raises CheckFailed where
    the file has lost what the model has.
    """
    held, told = weights_of(content), {}
    for name, kernel in found.items():
        pruned = zeros(kernel) >= SPARSE
        if not (pruned or name in clustered):
            continue
        # The file's own weights: zero wherever the kernel is, and as many values in each channel. Names do not matter.
        asked = [
            values for values in held if any(_holds(values, turned, name in clustered) for turned in _turned(kernel))
        ]
        if not asked:
            lost = (
                f"{zeros(kernel):.1%} of them zero"
                if pruned
                else f"{per_channel(kernel)} different values in a channel"
            )
            raise CheckFailed(
                f"The .tflite has lost what was done to layer '{name}': none of its weights are those of the model, "
                f"{lost}."
            )
        told[name] = {"sparsity": zeros(asked[0]), "clusters_per_channel": per_channel(asked[0], axis=0)}
        if pruned and kernel.shape[-2] % 4 == 0 and two_of_four(kernel):
            groups = np.count_nonzero(asked[0].reshape(-1, 4), axis=1)
            told[name]["two_of_four"] = float(np.mean(groups <= 2))
    return told


def _turned(kernel: np.ndarray) -> list[np.ndarray]:
    """The kernel with its output channels first, `[channels, rest]`; those of Conv2DTranspose stand last but one."""
    axes = (-1, -2) if kernel.ndim == 4 else (-1,)
    return [np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1) for axis in axes]


def _holds(values: np.ndarray, kernel: np.ndarray, clustered: bool) -> bool:
    """Whether weights of a file are zero wherever the kernel is, and, channel by channel, equal where it is equal."""
    if values.shape[0] != kernel.shape[0] or values.size != kernel.size:
        return False
    values = values.reshape(kernel.shape)
    if not np.all(values[kernel == 0] == 0):
        return False
    if not clustered:
        return True
    pairs = (np.stack([a, b.astype(a.dtype)]) for a, b in zip(kernel, values, strict=True))
    return all(len(np.unique(pair, axis=1)[0]) == len(np.unique(pair[0])) for pair in pairs)
