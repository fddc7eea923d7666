"""What compression has done, layer by layer: measured in the weights and in the file, not taken from what was asked."""

import numpy as np

from kdistill import schemes
from kdistill.bridge_layers import last_name
from kdistill.errors import CheckFailed
from kdistill.qat_file import look_inside

WORDS = {"prune": "pruned", "prune_2_4": "pruned", "cluster": "clustered", "qat": "quantised"}
SPARSE = 0.1  # from this share of zeros on, a kernel counts as pruned
SHARED = 256  # up to so many values, and a quarter of its size, a kernel counts as clustered
SMALL = 64  # kernels with fewer weights tell nothing about what was done to a model


def kernels(network) -> dict[str, np.ndarray]:
    """layer -> the kernel that pruning and clustering work on, of a tf_keras model."""
    return {layer.name: layer.kernel.numpy() for layer in network.layers if type(layer) in schemes.KERNELS}


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


def check(stage: str, decisions: schemes.Decisions, before: dict, after: dict, kept: set, goals: dict) -> None:
    """Raises CheckFailed unless each kernel is what the stage should have made of it.

    `before`, `after`: layer -> kernel. `kept`: what the stage had to preserve. `goals`: final_sparsity, clusters.
    """
    clustered = shared(before)
    for name, kernel in after.items():
        done, share, values = decisions.get(name) == "", zeros(kernel), len(np.unique(kernel))
        had = zeros(before[name])
        problem = None
        if stage == "prune" and done and share < goals["final_sparsity"] - 1.5 / kernel.size:
            problem = f"{share:.1%} of its weights are zero, {goals['final_sparsity']:.1%} were asked for"
        elif stage == "prune_2_4" and done and not two_of_four(kernel):
            problem = "some four weights along the input channels hold more than two that are not zero"
        elif stage == "cluster" and done and values > goals["clusters"]:
            problem = f"its weights have {values} different values, {goals['clusters']} were asked for"
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


def table(layers, decided: dict[str, schemes.Decisions]) -> list[dict]:
    """One row for each layer that has weights, or that a stage has left alone; of layers of either Keras."""
    rows = []
    for layer in layers:
        told = {WORDS[stage]: d[layer.name] or "yes" for stage, d in decided.items() if layer.name in d}
        if layer.weights or any(reason != "yes" for reason in told.values()):
            rows.append({"layer": layer.name, "kind": type(layer).__name__, **_measured(layer), **told})
    return rows


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


def check_file(content: bytes, rows: list[dict], clustered: dict[str, int]) -> None:
    """Looks for the zeros and clusters of the rows in the `.tflite`, and puts into the rows what computes in float.

    `clustered`: layer -> the values that its kernel had before it was quantised. Raises CheckFailed where a layer has
    fewer zeros in the file than in the model, or a channel of it more values.
    """
    weights, floats = look_inside(content)
    told = {row["layer"]: row for row in rows}
    for name, operators in floats.items():
        if name not in told:
            told[name] = {"layer": name, "kind": "", "parameters": 0, "sparsity": None}
            rows.append(told[name])
        if told[name].get("quantised", "yes") == "yes":
            told[name]["quantised"] = f"no int8 version: {', '.join(sorted(set(operators)))} computes in float"
    for name, row in told.items():
        share = row["sparsity"] or 0.0
        if row.get("quantised") != "yes" or not (share >= SPARSE or name in clustered):
            continue
        if name not in weights:
            raise CheckFailed(f"The .tflite holds no weights that can be told to be those of layer '{name}'.")
        values = weights[name]
        if zeros(values) < share - 1e-9:
            raise CheckFailed(f"Layer '{name}' is {share:.1%} zeros in the model, {zeros(values):.1%} in the .tflite.")
        if name in clustered and per_channel(values, axis=0) > clustered[name]:
            raise CheckFailed(
                f"Layer '{name}' had {clustered[name]} different values; in the .tflite a channel of it has "
                f"{per_channel(values, axis=0)}."
            )
