"""Weights from files into layers of other names: several files into one model, and a report of what went where.

Nothing is unpickled: `.keras` is loaded in safe mode, `.weights.h5` and `.npz` are read as plain arrays.
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
    """Puts the weights of files into a built model's layers; returns what was and was not loaded.

    `files`: paths, each with a mapping from its layers' names to the model's (`block/conv` inside of a nested model);
    None maps equal names. The report: `loaded` (file, its layer, the model's layer, shapes), `left` (file, layer)
    that no mapping named, and `not_loaded`, the model's layers with weights that got none. Nothing is changed where
    anything is wrong: raises `InputError` for a name that is not there, a shape that differs (both are named), a layer
    that two files fill, and a file that cannot be read.

    An `.npz` holds `<layer>/<weight>` arrays, in the order of the layer's weights; a `.keras` or `.weights.h5` file
    is one that Keras 3 wrote.
    """
    targets = {name: layer for name, layer in _named_layers(model).items() if layer.weights}
    report: dict[str, list] = {"loaded": [], "left": [], "not_loaded": []}
    plan: dict[str, list[np.ndarray]] = {}
    for path, mapping in files:
        found = read(path)
        chosen = {name: name for name in found if name in targets} if mapping is None else mapping
        for source, target in chosen.items():
            if source not in found:
                raise unknown(f"layer of '{path}'", source, found, "Fix the mapping.")
            if target not in targets:
                raise unknown(f"layer of the model '{model.name}'", target, targets, "Fix the mapping.")
            if target in plan:
                raise InputError(
                    f"Two layers of the files go to '{target}', the second from '{path}'. Fix the mapping."
                )
            shapes = [tuple(array.shape) for array in found[source]]
            expected = [tuple(weight.shape) for weight in targets[target].weights]
            if shapes != expected:
                raise InputError(
                    f"'{source}' of '{path}' holds weights of the shapes {shapes}; '{target}' of the model "
                    f"'{model.name}' expects {expected}. Map it to another layer, or leave it out."
                )
            plan[target] = found[source]
            report["loaded"].append([str(path), source, target, [list(shape) for shape in shapes]])
        report["left"] += [[str(path), name] for name in found if name not in chosen]
    for name, arrays in plan.items():
        for weight, array in zip(targets[name].weights, arrays, strict=True):
            weight.assign(array)
    report["not_loaded"] = [name for name in targets if name not in plan]
    return report


def told(report: dict[str, list]) -> str:
    """What `load` reports, in words: how much each file gave, what it held besides, which layers got nothing."""
    parts = []
    for file in dict.fromkeys(each[0] for each in [*report["loaded"], *report["left"]]):
        pairs = [each[1:3] for each in report["loaded"] if each[0] == file]
        names = ", ".join(source if source == target else f"{source} -> {target}" for source, target in pairs)
        left = ", ".join(name for path, name in report["left"] if path == file)
        parts.append(f"from '{file}' {names or 'nothing'}" + (f" (not taken: {left})" if left else ""))
    return "; ".join([*parts, f"layers that got none: {', '.join(report['not_loaded']) or 'none'}"])


def read(path: str | Path) -> dict[str, list[np.ndarray]]:
    """The arrays of a file by the name of their layer."""
    name = os.fspath(path)
    files.existing_file(name, (".keras", ".weights.h5", ".npz"))
    if name.endswith(".keras"):
        layers = _named_layers(saving.load_model(path)).items()
        return {n: [w.numpy() for w in layer.weights] for n, layer in layers if layer.weights}
    try:
        if name.endswith(".npz"):
            return _of_npz(name)
        if name.endswith(".weights.h5"):
            return _of_h5(name)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"'{path}' cannot be read as plain arrays: {error}") from None
    raise InputError(f"Weights are read from .keras, .weights.h5 and .npz files; received '{path}'.")


def _named_layers(model: keras.Model, prefix: str = "") -> dict[str, keras.layers.Layer]:
    found = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= _named_layers(layer, f"{prefix}{layer.name}/")
        else:
            found[f"{prefix}{layer.name}"] = layer
    return found


def _of_npz(path: str) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    with np.load(path, allow_pickle=False) as archive:
        for key in archive.files:
            layer, slash, _ = key.rpartition("/")
            if not slash:
                raise ValueError(f"the array '{key}' is not named <layer>/<weight>")
            found.setdefault(layer, []).append(archive[key])
    return found


def _of_h5(path: str) -> dict[str, list[np.ndarray]]:
    """Keras 3 writes `layers/<place>/.../vars/<number>`, and the name of the layer as an attribute of `vars`."""
    found: dict[str, list[np.ndarray]] = {}
    with h5py.File(path) as file:
        if "layers" not in file:
            raise ValueError("it has no 'layers', so Keras 3 did not write it; save the model as .keras")

        def walk(group, layer: str):
            for place in group:
                if isinstance(group[place], h5py.Dataset) or place in ("vars", "seed_generator"):
                    continue
                if place == "layers":
                    for each in group[place]:
                        own = group[place][each].get("vars")
                        name = own.attrs.get("name", each) if own is not None else each
                        visit(group[place][each], f"{layer}/{name}" if layer else str(name))
                else:
                    visit(group[place], layer)

        def visit(group, layer: str):
            own = group.get("vars", {})
            for number in sorted(own, key=int):
                found.setdefault(layer, []).append(np.asarray(own[number]))
            walk(group, layer)

        walk(file, "")
    found.pop("", None)
    return found
