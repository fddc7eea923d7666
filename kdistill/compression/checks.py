"""What compression did to each layer: measured in the weights and in the file, not taken from the request."""

import numpy as np

from kdistill.compression import tfmot
from kdistill.compression.bridge_layers import last_name
from kdistill.compression.tfmot import Goals
from kdistill.errors import CheckFailed
from kdistill.tflite import flatbuffer

# Step -> its column in the table by layer.
COLUMNS = {"prune": "pruned", "prune_2_4": "pruned", "cluster": "clustered", "qat": "quantized"}
PRUNED = 0.1  # a kernel with at least this share of zeros counts as pruned
CLUSTERED = 256  # a kernel with at most this many values, and a quarter of its size, counts as clustered
SMALL = 64  # kernels with fewer weights say nothing about earlier compression of a model


def kernels(network) -> dict[str, np.ndarray]:
    """layer -> the kernel that pruning and clustering change, of a tf_keras model."""
    kinds = (*tfmot.KERNELS, *tfmot.RECURRENT)
    return {layer.name: tfmot.kernel_of(layer) for layer in network.layers if type(layer) in kinds}


def in_files(network) -> set[str]:
    """The names of the layers whose kernels a `.tflite` holds as one tensor: not those of recurrent layers."""
    return {layer.name for layer in network.layers if type(layer) in tfmot.KERNELS}


def sparsity(kernel: np.ndarray) -> float:
    """The share of weights that are exactly zero."""
    return float(np.mean(kernel == 0))


def applied(network) -> set[str]:
    """The earlier compression of a student: `pruned`, `clustered`, both or neither."""
    large = {name: kernel for name, kernel in kernels(network).items() if kernel.size >= SMALL}
    return {word for word, layers in (("pruned", pruned(large)), ("clustered", clustered(large))) if layers}


def clustered(kernels: dict[str, np.ndarray]) -> dict[str, int]:
    """layer -> the number of values in its kernel, for the clustered ones."""
    counts = {name: len(np.unique(kernel)) for name, kernel in kernels.items()}
    return {name: count for name, count in counts.items() if 1 < count <= min(CLUSTERED, kernels[name].size // 4)}


def pruned(kernels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The pruned ones of the kernels."""
    return {name: kernel for name, kernel in kernels.items() if sparsity(kernel) >= PRUNED}


def values_per_channel(kernel: np.ndarray, axis: int = -1) -> int:
    """The most different values in one output channel. After clustering, tfmot's qat clusters each channel apart."""
    return max(len(np.unique(channel)) for channel in np.moveaxis(kernel, axis, 0))


def check_step(step: str, decisions: tfmot.Decisions, before: dict, after: dict, preserved: set, goals: Goals) -> None:
    """Raises `CheckFailed` unless the step did to every kernel what it should.

    `before`, `after`: layer -> kernel. `preserved`: what the step had to preserve, `pruned` and `clustered`.
    """
    counts = clustered(before)
    for name, kernel in after.items():
        done, share, values = decisions.get(name) == "", sparsity(kernel), len(np.unique(kernel))
        share_before, goal, most = sparsity(before[name]), goals.sparsity_of(name), goals.clusters_of(name)
        problem = None
        if step == "prune" and done and share < goal - 1.5 / kernel.size:
            problem = f"{share:.1%} of its weights are zero instead of {goal:.1%}"
        elif step == "prune_2_4" and done and not is_two_of_four(kernel):
            problem = "some four weights along the input channels have more than two that are not zero"
        elif step == "cluster" and done and values > most:
            problem = f"its weights have {values} different values instead of {most}"
        elif step in ("cluster", "qat") and "pruned" in preserved and share_before >= PRUNED and share < share_before:
            problem = f"its share of zeros fell from {share_before:.1%} to {share:.1%}"
        elif step == "qat" and name in counts and values_per_channel(kernel) > counts[name]:
            problem = f"its {counts[name]} different values became {values_per_channel(kernel)} in one output channel"
        if problem:
            raise CheckFailed(f"The step '{step}' failed in layer '{name}': {problem}.")


def is_two_of_four(kernel: np.ndarray) -> bool:
    """Whether any four weights in a row along the input channels have at most two that are not zero."""
    rows = np.moveaxis(kernel, -2, -1).reshape(-1, 4)
    return bool(np.all(np.count_nonzero(rows, axis=1) <= 2))


def table(layers, decisions: dict[str, tfmot.Decisions]) -> list[dict]:
    """One row for each layer that has weights or that a step excluded; the layers are of either Keras.

    `decisions`: step -> layer -> "" or why the step excluded it.
    """
    rows = []
    for layer in layers:
        cells = {COLUMNS[step]: of[layer.name] or "yes" for step, of in decisions.items() if layer.name in of}
        if layer.weights or any(reason != "yes" for reason in cells.values()):
            rows.append({"layer": layer.name, "kind": type(layer).__name__, **_measurements(layer), **cells})
    return rows


def summary(rows: list[dict]) -> str:
    """The table in half a sentence."""
    kernels = [row for row in rows if row["sparsity"] is not None]
    weights = sum(row["parameters"] for row in kernels)
    share = sum(row["parameters"] * row["sparsity"] for row in kernels) / max(weights, 1)
    parts = [f"{share:.0%} of the weights are zero"]
    for column in dict.fromkeys(COLUMNS.values()):
        cells = [row[column] for row in rows if column in row]
        if cells:
            parts.append(f"{column} {cells.count('yes')} of {len(cells)} layers")
    return ", ".join(parts)


def _measurements(layer) -> dict:
    names = [last_name(getattr(weight, "path", weight.name)) for weight in layer.weights]
    kernels = [w for w, name in zip(layer.weights, names, strict=True) if name in ("kernel", "depthwise_kernel")]
    kernel = np.asarray(kernels[0]) if len(kernels) == 1 else None
    return {
        "parameters": sum(int(np.prod(weight.shape)) for weight in layer.weights),
        "sparsity": None if kernel is None else sparsity(kernel),
        "clusters": None if kernel is None else len(np.unique(kernel)),
        "clusters_per_channel": None if kernel is None else values_per_channel(kernel),
    }


def mark_float(content: bytes, rows: list[dict]) -> None:
    """Writes into the rows what computes in float in the `.tflite` of a quantization-aware trained network."""
    by_layer = {row["layer"]: row for row in rows}
    for name, operators in flatbuffer.float_operators_by_layer(flatbuffer.parse(content)).items():
        if name not in by_layer:
            by_layer[name] = {"layer": name, "kind": "", "parameters": 0, "sparsity": None}
            rows.append(by_layer[name])
        if by_layer[name].get("quantized", "yes") == "yes":
            by_layer[name]["quantized"] = f"no int8 version: {', '.join(sorted(set(operators)))} computes in float"


def check_file(content: bytes, kernels: dict[str, np.ndarray], clustered) -> dict[str, dict]:
    """Checks that a `.tflite` has the zeros and clusters of its model's kernels (layer -> kernel).

    `clustered`: the names of the clustered layers. Returns layer -> sparsity, clusters_per_channel and, for a
    2:4-pruned kernel, two_of_four: the share of groups that have the pattern; all as counted in the file. Raises
    `CheckFailed` where the file has lost some.
    """
    stored, counts = flatbuffer.kernels(flatbuffer.parse(content)), {}
    for name, kernel in kernels.items():
        is_pruned = sparsity(kernel) >= PRUNED
        if not (is_pruned or name in clustered):
            continue
        # Names do not matter: the file's kernel is one that preserves what the model's has.
        forms = _channels_first(kernel)
        twin = next((s for s in stored if any(preserves(s, form, name in clustered) for form in forms)), None)
        if twin is None:
            lost = (
                f"{sparsity(kernel):.1%} of them zero"
                if is_pruned
                else f"{values_per_channel(kernel)} different values in a channel"
            )
            raise CheckFailed(
                f"The .tflite has lost the compression of layer '{name}': it contains no weights like the model's, "
                f"{lost}."
            )
        counts[name] = {"sparsity": sparsity(twin), "clusters_per_channel": values_per_channel(twin, axis=0)}
        if is_pruned and kernel.shape[-2] % 4 == 0 and is_two_of_four(kernel):
            groups = np.count_nonzero(twin.reshape(-1, 4), axis=1)
            counts[name]["two_of_four"] = float(np.mean(groups <= 2))
    return counts


def _channels_first(kernel: np.ndarray) -> list[np.ndarray]:
    """The kernel with its output channels first, `[channels, rest]`; Conv2DTranspose has them last but one."""
    axes = (-1, -2) if kernel.ndim == 4 else (-1,)
    return [np.moveaxis(kernel, axis, 0).reshape(kernel.shape[axis], -1) for axis in axes]


def preserves(stored: np.ndarray, kernel: np.ndarray, clustered: bool) -> bool:
    """Whether stored weights are zero wherever the kernel is and, if `clustered`, equal in a channel where it is equal.

    Both have their output channels first.
    """
    if stored.shape[0] != kernel.shape[0] or stored.size != kernel.size:
        return False
    stored = stored.reshape(kernel.shape)
    if not np.all(stored[kernel == 0] == 0):
        return False
    if not clustered:
        return True
    pairs = (np.stack([a, b.astype(a.dtype)]) for a, b in zip(kernel, stored, strict=True))
    return all(len(np.unique(pair, axis=1)[0]) == len(np.unique(pair[0])) for pair in pairs)
