"""The examples of a search: a data set of recipes, or arrays; labels that are missing come from the teacher."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from kdistill import files
from kdistill.data.mnist import find_archive, read_arrays
from kdistill.errors import InputError
from kdistill.recipe import Data, Network
from kdistill.recipe.values import CLASSES, FILE_SETTINGS
from kdistill.shrinking.template import DATA
from kdistill.teachers.foreign import teacher as load_teacher

NAMES = ("x_train", "y_train", "x_test", "y_test")
BATCH = 256


def examples_of(
    data: str | Data | Mapping, data_dir, teacher: Network, folder: Path, say: Callable[[str], None]
) -> tuple[Data, Path | None, tuple[str, ...]]:
    """The data of a recipe, its files, and the parts (`train`, `test`) whose labels the teacher gives.

    Arrays, and an `.npz` without labels, are written to `data.npz` in the folder, for the recipe of the winner too.
    """
    if isinstance(data, str):
        data = Data(data, **DATA.get(data, {}))
    arrays, settings = None, data if isinstance(data, Data) else None
    if isinstance(data, Mapping):
        if data_dir:
            raise InputError("data_dir does nothing with arrays. Leave it out.")
        arrays = {name: np.asarray(values) for name, values in data.items()}
    elif data.name == "npz" and data_dir:
        read, names = read_arrays(find_archive(Path(data_dir)), NAMES.__contains__)
        if "y_train" not in names and "x_train" in read:
            arrays = read
    if arrays is None:
        return data, data_dir, ()
    unknown = sorted(set(arrays) - set(NAMES))
    if unknown or not {"x_train", "x_test"} <= set(arrays):
        raise InputError(
            f"Arrays expects x_train and x_test, with labels y_train and y_test; received {', '.join(sorted(arrays))}."
        )
    missing = tuple(part for part in ("train", "test") if f"y_{part}" not in arrays)
    if missing == ("test",):
        raise InputError("The training examples have labels, the test examples have none. Give y_test.")
    for part in missing:
        arrays[f"y_{part}"] = _predicted_classes(teacher, arrays[f"x_{part}"])
    if missing:
        say(
            f"The {' and '.join(missing)} examples have no labels: the classes that the teacher predicts take their "
            "place. What is called accuracy there is agreement with the teacher."
        )
    path = folder / "data.npz"
    with files.atomic_file(path) as part:
        np.savez(part, **arrays)
    images = arrays["x_train"].dtype == np.uint8 and arrays["x_train"].ndim in (3, 4)
    return settings or Data("npz", head=None if images else CLASSES), path, missing


def _predicted_classes(network: Network, inputs: np.ndarray) -> np.ndarray:
    """The teacher's class for each of these inputs, `[n]`."""
    if not network.file:
        raise InputError(
            f"Examples without labels expect a teacher in a file; '{network.name}' is a network of a recipe. Give its "
            ".keras file."
        )
    given = {name: getattr(network, name) for name in FILE_SETTINGS if getattr(network, name) is not None}
    model = load_teacher(network.file, **given)
    if inputs.ndim == 3 and inputs.dtype == np.uint8:
        inputs = inputs[..., None]
    starts = range(0, len(inputs), BATCH)
    outputs = [np.asarray(model(inputs[start : start + BATCH].astype(np.float32))) for start in starts]
    return np.concatenate(outputs).argmax(axis=1).astype(np.int64)
