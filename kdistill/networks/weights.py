"""Loads weights from files into layers of other names: several files into one model, with a report.

Nothing is unpickled: `.keras` files are loaded in safe mode, `.weights.h5` and `.npz` are read as plain arrays.
"""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import keras
import numpy as np

from kdistill import files
from kdistill.errors import InputError, unknown
from kdistill.networks import saving

Mapping = dict[str, str] | None


def load(model: keras.Model, files: Sequence[tuple[str | Path, Mapping]]) -> dict[str, list]:
    """Loads the weights of files into the layers of a built model. Where anything is wrong, it changes nothing.

    Args:
        files: paths, each with a mapping from the layers of the file to those of the model (`block/conv` is `conv`
            inside of the nested model `block`). None maps equal names. An `.npz` file has arrays `<layer>/<weight>`,
            in the order of the layer's weights; `.keras` and `.weights.h5` files come from Keras 3.

    Returns:
        A report: `loaded` lists (file, its layer, the model's layer, shapes), `unused` lists (file, layer) that no
        mapping names, `not_loaded` lists the model's layers with weights that received none.

    Raises:
        InputError: for an unknown name, a shape that differs, a layer that two files fill, or an unreadable file.

    Example:
        `weights.load(model, [("backbone.npz", {"conv_1": "block/conv"}), ("head.keras", None)])`
    """
    targets = {name: layer for name, layer in _named_layers(model).items() if layer.weights}
    report: dict[str, list] = {"loaded": [], "unused": [], "not_loaded": []}
    plan: dict[str, list[np.ndarray]] = {}
    for path, mapping in files:
        arrays = read(path)
        pairs = {name: name for name in arrays if name in targets} if mapping is None else mapping
        for source, target in pairs.items():
            if source not in arrays:
                raise unknown(f"layer of '{path}'", source, arrays, "Fix the mapping.")
            if target not in targets:
                raise unknown(f"layer of the model '{model.name}'", target, targets, "Fix the mapping.")
            if target in plan:
                raise InputError(
                    f"Two layers of the files go to '{target}', the second from '{path}'. Fix the mapping."
                )
            shapes = [tuple(array.shape) for array in arrays[source]]
            expected = [tuple(weight.shape) for weight in targets[target].weights]
            if shapes != expected:
                raise InputError(
                    f"'{target}' of the model '{model.name}' expects weights of the shapes {expected}, received "
                    f"{shapes} from '{source}' of '{path}'. Map '{source}' to another layer, or omit it."
                )
            plan[target] = arrays[source]
            report["loaded"].append([str(path), source, target, [list(shape) for shape in shapes]])
        report["unused"] += [[str(path), name] for name in arrays if name not in pairs]
    for name, values in plan.items():
        for weight, array in zip(targets[name].weights, values, strict=True):
            weight.assign(array)
    report["not_loaded"] = [name for name in targets if name not in plan]
    return report


def summary(report: dict[str, list]) -> str:
    """The report of `load` in words: the layers from each file, its unused layers, and the layers without weights."""
    parts = []
    for file in dict.fromkeys(row[0] for row in [*report["loaded"], *report["unused"]]):
        pairs = [row[1:3] for row in report["loaded"] if row[0] == file]
        names = ", ".join(source if source == target else f"{source} -> {target}" for source, target in pairs)
        unused = ", ".join(name for path, name in report["unused"] if path == file)
        parts.append(f"from '{file}' {names or 'nothing'}" + (f" (unused: {unused})" if unused else ""))
    return "; ".join([*parts, f"layers without loaded weights: {', '.join(report['not_loaded']) or 'none'}"])


def read(path: str | Path) -> dict[str, list[np.ndarray]]:
    """The arrays of a file by the name of their layer, in the order of the layer's weights."""
    name = os.fspath(path)
    files.existing_file(name, (".keras", ".weights.h5", ".npz"))
    if name.endswith(".keras"):
        layers = _named_layers(saving.load_model(path)).items()
        return {n: [w.numpy() for w in layer.weights] for n, layer in layers if layer.weights}
    try:
        if name.endswith(".npz"):
            return _read_npz(name)
        if name.endswith(".weights.h5"):
            return _read_h5(name)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' cannot be read as plain arrays: {error}") from None
    raise InputError(f"Expected weights in a .keras, .weights.h5 or .npz file, received '{path}'.")


def _named_layers(model: keras.Model, prefix: str = "") -> dict[str, keras.layers.Layer]:
    layers = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            layers |= _named_layers(layer, f"{prefix}{layer.name}/")
        else:
            layers[f"{prefix}{layer.name}"] = layer
    return layers


def _read_npz(path: str) -> dict[str, list[np.ndarray]]:
    arrays: dict[str, list[np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            layer, slash, _ = key.rpartition("/")
            if not slash:
                raise ValueError(f"the array '{key}' is not named <layer>/<weight>")
            arrays.setdefault(layer, []).append(archive[key])
    return arrays


def _read_h5(path: str) -> dict[str, list[np.ndarray]]:
    """Keras 3 writes `layers/<place>/.../vars/<number>`, and the name of the layer as an attribute of `vars`."""
    arrays: dict[str, list[np.ndarray]] = {}
    with h5py.File(path) as file:
        if "layers" not in file:
            raise ValueError("it has no 'layers', so Keras 3 did not write it; save the model as .keras")

        def walk(group, layer: str):
            for place in group:
                if isinstance(group[place], h5py.Dataset) or place in ("vars", "seed_generator"):
                    continue
                if place == "layers":
                    for key in group[place]:
                        variables = group[place][key].get("vars")
                        name = key if variables is None else variables.attrs.get("name", key)
                        visit(group[place][key], f"{layer}/{name}" if layer else str(name))
                else:
                    visit(group[place], layer)

        def visit(group, layer: str):
            variables = group.get("vars", {})
            for number in sorted(variables, key=int):
                arrays.setdefault(layer, []).append(np.asarray(variables[number]))
            walk(group, layer)

        walk(file, "")
    arrays.pop("", None)
    return arrays
