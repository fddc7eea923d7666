"""Loads weights from files into layers of other names: several files into one model, with a report.

Nothing is unpickled: `.keras` files are loaded in safe mode, `.weights.h5` and `.npz` are read as arrays. An array
finds its place by the structure of layers, and Keras itself puts it there: the model is saved, arrays in that file are
replaced, and the file is loaded.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import keras
import numpy as np

from kdistill import archives, files
from kdistill.errors import InputError, unknown
from kdistill.files import temporary_folder
from kdistill.networks import copying, saving
from kdistill.networks.keras_internals import layers_of

Mapping = dict[str, str] | None
Arrays = dict[str, "_Array"]  # the arrays of a part of a model, by their path inside of the part
OWN = "."  # the name of the weights that a model has itself, beside those of its layers
DEEPEST = 64  # groups inside of each other; a damaged file may contain itself
SHIPPED = Path(__file__).parent / "shipped"  # `shipped:NAME` is a file in here
SEEDS = "seed_generator"  # the states of random generators, which are no weights


def load(model: keras.Model, files: Sequence[tuple[str | Path, Mapping]]) -> dict[str, list]:
    """Loads the weights of files into the layers of a built model. Where anything is wrong, it changes nothing.

    A layer that contains layers (`Bidirectional`, `MultiHeadAttention`, your own) is loaded whole, by its structure.

    Args:
        files: paths, or `shipped:mnist_cnn` (see networks/shipped), each with a mapping from the layers of the file to
            those of the model (`block/conv` is `conv` inside of the nested model or layer `block`, and `block/.` are
            the weights of the model `block` itself). None maps equal names. An `.npz` file has arrays
            `<layer>/<weight>`, in the order of the layer's weights; `.keras` and `.weights.h5` files come from Keras 3.

    Returns:
        A report: `loaded` lists (file, its layer, the model's layer, shapes), `unused` lists (file, layer) that no
        mapping names, `not_loaded` lists the model's layers with weights that received none.

    Raises:
        InputError: for an unknown name, a shape or structure that differs, a layer that two files fill, an unreadable
            file, and for a layer that computes something else than that of a `.keras` file.

    Example:
        `weights.load(model, [("backbone.npz", {"conv_1": "block/conv"}), ("head.keras", None)])`
    """
    report: dict[str, list] = {"loaded": [], "unused": [], "not_loaded": []}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(temporary_folder()))
        target = _Target(model, _saved(model, folder / "target.weights.h5", stack))
        for number, (path, mapping) in enumerate(files):
            source = _opened(path, folder / f"{number}.weights.h5", stack)
            pairs = target.equal_names(source) if mapping is None else mapping
            for name, place in pairs.items():
                report["loaded"].append([str(path), name, place, target.plan(source, name, place)])
            report["unused"] += [[str(path), name] for name in source.unused(pairs)]
        target.fill()
        report["not_loaded"] = target.not_loaded()
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


class _Array(NamedTuple):
    """An array in a file: its path there, and its shape."""

    file: h5py.File
    path: str
    shape: tuple[int, ...]

    def read(self) -> np.ndarray:
        """Its numbers; those of bfloat16, which HDF5 lacks, as float32."""
        dataset = self.file[self.path]
        values = dataset[()]
        if dataset.attrs.get("dtype") == "bfloat16" and values.dtype.itemsize == 2:
            return (np.asarray(values.view(np.uint16), np.uint32) << 16).view(np.float32)
        if values.dtype.kind not in "biuf":
            raise ValueError(f"'{self.path}' contains {values.dtype} instead of numbers")
        return values


class _Saved:
    """A model in a file: its parts by name. A part is a layer, a layer inside of a layer, or a model inside of one."""

    def __init__(self, title: str, file: h5py.File | None = None, model: keras.Model | None = None):
        self.title, self.file, self.model = title, file, model
        self.parts: dict[str, list[Arrays]] = {}  # several, where parts have the same name
        self.units: list[str] = []  # the names of the layers as a whole, which reports list
        self.layers: dict[str, keras.layers.Layer] = {}
        self.lists: dict[str, list[np.ndarray]] = {}  # of an .npz file, instead of parts
        if file is not None:
            self._read(file, "", 0)
            self.units = [unit for unit in self.units if not any(unit.startswith(f"{other}/") for other in self.units)]
        if model is not None:
            self._name_layers(model)

    def _read(self, group: h5py.Group, name: str, depth: int) -> Arrays:
        """All arrays inside of a group. Keras writes `<attribute>/.../vars/<number>`, names as attributes of `vars`."""
        if depth > DEEPEST:
            raise ValueError("its groups are too deep inside of each other")
        variables = _inside(group, "vars") if "vars" in group else {}
        own = {f"vars/{key}": self._array(_inside(variables, key)) for key in sorted(variables, key=_number)}
        arrays, prefix = dict(own), f"{name}/" if name else ""
        for key in group:
            if key == "vars" or key.startswith(SEEDS) or (depth == 0 and key == "optimizer"):
                continue
            child = _inside(group, key)
            if isinstance(child, h5py.Dataset):
                continue
            is_part = "vars" in child or group.name.endswith("/layers")  # else it is a list or a dict of layers
            part = f"{prefix}{_layer_name(child, key)}" if is_part else name
            inside = self._read(child, part, depth + 1)
            arrays |= {f"{key}/{path}": array for path, array in inside.items()}
            if is_part and inside:
                self.parts.setdefault(part, []).append(inside)
                if "layers" not in child:  # as models have them
                    self.units.append(part)
        if own and (not name or len(arrays) > len(own)):
            self.parts.setdefault(prefix + OWN, []).append(own)
            if not name or "layers" in group:
                self.units.append(prefix + OWN)
        return arrays

    def _array(self, dataset: h5py.Dataset) -> _Array:
        if not isinstance(dataset, h5py.Dataset) or dataset.is_virtual or dataset.external:
            raise ValueError(f"'{dataset.name}' is not an array of this file")
        return _Array(self.file, dataset.name, dataset.shape)

    def _name_layers(self, model: keras.Model) -> None:
        """Finds the layers by name, and takes as units what the model has, instead of what the file suggests."""
        own, names = {OWN}, {}

        def visit(model: keras.Model, prefix: str) -> None:
            for layer in model.layers:
                name = f"{prefix}{layer.name}"
                self.layers.setdefault(name, layer)
                if isinstance(layer, keras.Model):
                    own.add(f"{name}/{OWN}")
                    visit(layer, f"{name}/")
                elif name in self.parts:
                    names.setdefault(id(layer), name)  # a shared layer has several names; its weights are saved once

        visit(model, "")
        self.units = [*(name for name in self.parts if name in own), *names.values()]

    def part(self, name: str) -> Arrays:
        """The arrays of a part, by their path inside of it."""
        if name not in self.parts:
            raise unknown(f"layer of {self.title}", name, self.units, "Fix the mapping.")
        if len(self.parts[name]) > 1:
            raise InputError(
                f"{len(self.parts[name])} layers of {self.title} have the name '{name}'. Give each its own name."
            )
        return self.parts[name][0]

    def arrays(self, name: str) -> list:
        """The arrays of a part in their order, or those of an `.npz` file: all have a shape."""
        if self.lists and name not in self.lists:
            raise unknown(f"layer of {self.title}", name, self.lists, "Fix the mapping.")
        return self.lists[name] if self.lists else list(self.part(name).values())

    def unused(self, used) -> list[str]:
        """The names of the layers that `used` neither names nor contains."""

        def is_used(unit: str) -> bool:
            return any(unit == name or unit.startswith(f"{name}/") or name.startswith(f"{unit}/") for name in used)

        return [unit for unit in (*self.lists, *self.units) if not is_used(unit)]


class _Target(_Saved):
    """The model that receives weights, in a file as it saves itself, and what it receives."""

    def __init__(self, model: keras.Model, file: h5py.File):
        super().__init__(f"the model '{model.name}'", file, model)
        self.filled: dict[str, _Array | None] = {}  # path of an array -> the array for it, None from an .npz file
        self.pairs: list[tuple[_Saved, str, str]] = []

    def equal_names(self, source: _Saved) -> dict[str, str]:
        """The layers of a file that have the name of a layer of the model, with this layer."""
        pairs = {}
        for unit in self.units:
            layer = self.layers.get(unit)
            aliases = [name for name, other in self.layers.items() if layer is not None and other is layer]
            name = next((name for name in (unit, *aliases) if name in source.parts or name in source.lists), None)
            if name is not None:
                pairs[name] = unit
        return pairs

    def weights_of(self, place: str) -> list[keras.Variable]:
        """The weights of a layer, or of a model without those of its layers."""
        if place in self.layers:
            return self.layers[place].weights
        model = self.layers.get(place.removesuffix(f"/{OWN}"), self.model if place == OWN else None)
        if model is None:
            raise unknown(f"layer of {self.title}", place, self.units, "Fix the mapping.")
        inside = {id(weight) for layer in layers_of(model) for weight in layer.weights}
        return [weight for weight in model.weights if id(weight) not in inside]

    def plan(self, source: _Saved, name: str, place: str) -> list[list[int]]:
        """Plans to fill the part `place` with the part `name` of a file. Changes nothing. Returns the shapes."""
        theirs, ours = source.arrays(name), self.part(place)
        if source.lists:
            shapes = [tuple(weight.shape) for weight in self.weights_of(place)]
            pairs = dict.fromkeys(ours) if shapes == [array.shape for array in theirs] else None
            expected, received = str(shapes), str([array.shape for array in theirs])
        else:
            pairs = _paired(ours, source.part(name))
            expected, received = _shapes(ours), _shapes(source.part(name))
        if pairs is None:
            raise InputError(
                f"'{place}' of {self.title} expects weights of the shapes {expected}, received {received} from "
                f"'{name}' of {source.title}. Map '{name}' to another layer, or omit it."
            )
        if any(ours[path].path in self.filled for path in pairs):
            raise InputError(
                f"Two layers of the files go to '{place}', the second from {source.title}. Fix the mapping."
            )
        self.filled |= {ours[path].path: array for path, array in pairs.items()}
        self.pairs.append((source, name, place))
        return [list(array.shape) for array in theirs]

    def fill(self) -> None:
        """Gives the model its new weights. Where that fails, it gets back the former ones."""
        for path, array in self.filled.items():
            if array is not None:
                _replace(self.file, path, array)
        file = self.file.filename
        self.file.close()
        before = self.model.get_weights()
        try:
            self.model.load_weights(file)
            for source, name, place in (pair for pair in self.pairs if pair[0].lists):
                for weight, array in zip(self.weights_of(place), source.lists[name], strict=True):
                    weight.assign(array)
            copying.derive_state(self.model)
            self._check()
        except Exception:
            self.model.set_weights(before)
            copying.derive_state(self.model)
            raise

    def _check(self) -> None:
        """Compares layers with those of `.keras` files; files of the other kinds contain no layers, only numbers."""
        for source in {id(source): source for source, *_ in self.pairs if source.model is not None}.values():
            calls = {call.name: call for call in copying.noise_calls(source.model)}
            for _, name, place in (pair for pair in self.pairs if pair[0] is source):
                call, layer = calls.get(name), self.layers.get(place)
                if call is None or layer is None or not _are_alike(call.operation, layer):
                    continue
                outputs = layer(*call.args, **call.kwargs)
                if not copying.same(call.outputs, outputs):
                    raise InputError(
                        f"'{place}' of {self.title} has the weights of '{name}' of {source.title}, but computes "
                        f"something else (largest difference {copying.distance(call.outputs, outputs):.3g}). "
                        f"{copying.ADVICE}"
                    )

    def not_loaded(self) -> list[str]:
        """The layers with weights that received none; of a layer that is filled in part, the empty ones inside."""
        names = []
        for unit in self.units:
            if self._is_empty(unit):
                names.append(unit)
            else:
                inside = [name for name in self.parts if name.startswith(f"{unit}/") and self._is_empty(name)]
                names += [name for name in inside if not any(name.startswith(f"{other}/") for other in inside)]
        return names

    def _is_empty(self, name: str) -> bool:
        return not any(array.path in self.filled for arrays in self.parts[name] for array in arrays.values())


def _shipped(name: str) -> str:
    """The path of a file; `shipped:NAME` is one that ships with kdistill."""
    if not name.startswith("shipped:"):
        return name
    available = {file.stem: file for file in SHIPPED.glob("*.npz")}
    wanted = name.removeprefix("shipped:")
    if wanted not in available:
        raise unknown("shipped weights", wanted, available)
    return str(available[wanted])


def _opened(path: str | Path, copy: Path, stack: contextlib.ExitStack) -> _Saved:
    """A file with weights, which `stack` closes. `copy`: where a model is saved that is in a `.keras` file."""
    name = _shipped(os.fspath(path))
    files.existing_file(name, (".keras", ".weights.h5", ".npz"))
    if name.endswith(".keras"):
        model = saving.load_model(name)
        return _Saved(f"'{path}'", _saved(model, copy, stack), model)
    try:
        if name.endswith(".npz"):
            source = _Saved(f"'{path}'")
            source.lists = _read_npz(name)
            return source
        if name.endswith(".weights.h5"):
            file = archives.check_hdf5(stack.enter_context(h5py.File(name)), os.path.getsize(name))
            source = _Saved(f"'{path}'", file)
            if not source.parts:
                raise ValueError("it has no weights as Keras 3 writes them; save the model as .keras")
            return source
    except (*archives.ERRORS, KeyError) as error:
        raise InputError(f"'{path}' cannot be read as plain arrays: {error}") from None
    raise InputError(f"Expected weights in a .keras, .weights.h5 or .npz file, received '{path}'.")


def _saved(model: keras.Model, path: Path, stack: contextlib.ExitStack) -> h5py.File:
    """The file in which Keras saves the weights of a model, open."""
    if not model.built:
        raise InputError(f"The model '{model.name}' is not built. Call it once on a batch of images.")
    model.save_weights(path)
    return stack.enter_context(h5py.File(path, "r+"))


def _read_npz(path: str) -> dict[str, list[np.ndarray]]:
    arrays: dict[str, list[np.ndarray]] = {}
    with archives.Arrays(path) as archive:
        for key in archive.shapes:
            layer, slash, _ = key.rpartition("/")
            if not slash:
                raise ValueError(f"the array '{key}' is not named <layer>/<weight>")
            arrays.setdefault(layer, []).append(archive.read(key))
    return arrays


def _inside(group: h5py.Group, key: str):
    """What is in a group. Raises `ValueError` for a link, which may point out of the file."""
    if not isinstance(group.get(key, getlink=True), h5py.HardLink):
        raise ValueError(f"'{group.name}/{key}' is a link to another place")
    return group[key]


def _layer_name(group: h5py.Group, key: str) -> str:
    """The name of the layer in a group. Files of an old Keras 3 have only the name of its class."""
    return str(group["vars"].attrs.get("name", key)) if "vars" in group else key


def _number(key: str) -> tuple:
    return (0, int(key), "") if key.isdecimal() else (1, 0, key)


def _paired(ours: Arrays, theirs: Arrays) -> dict[str, _Array] | None:
    """The path of each of our arrays with the one of theirs for it; None where structure or shapes differ.

    Layers of one group each, such as `Dense` and the one inside of `TimeDistributed`, need not have the same path.
    """
    if ours.keys() != theirs.keys():
        groups = [{path.rpartition("vars/")[0] for path in arrays} for arrays in (ours, theirs)]
        if len(groups[0]) > 1 or len(groups[1]) > 1 or len(ours) != len(theirs):
            return None
        theirs = dict(zip(ours, theirs.values(), strict=True))
    return theirs if all(theirs[path].shape == array.shape for path, array in ours.items()) else None


def _shapes(arrays: Arrays) -> str:
    if all(path.startswith("vars/") for path in arrays):
        return str([array.shape for array in arrays.values()])
    return "; ".join(f"{path.replace('vars/', '')} {array.shape}" for path, array in arrays.items())


def _replace(file: h5py.File, path: str, array: _Array) -> None:
    try:
        values = array.read()
    except (OSError, ValueError) as error:
        raise InputError(f"'{array.file.filename}' cannot be read as plain arrays: {error}") from None
    if file[path].dtype == values.dtype:
        file[path][...] = values
    else:
        del file[path]
        file[path] = values


def _are_alike(layer: keras.layers.Layer, other: keras.layers.Layer) -> bool:
    """Whether two layers must compute the same with the same weights: their options are equal."""
    return type(layer) is type(other) and _options(layer.get_config()) == _options(other.get_config())


def _options(config):
    """A config without what is in names, weights and the training alone."""
    if isinstance(config, dict):
        other = ("name", "trainable", "seed", "build_config")
        return {key: _options(value) for key, value in config.items() if key not in other and "_initializer" not in key}
    return [_options(value) for value in config] if isinstance(config, (list, tuple)) else config
