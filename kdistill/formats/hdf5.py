"""Models in `.h5` and `.hdf5` files, as Keras 2 and 3 write them. No code in a file is run."""

import json
import os
import warnings
from pathlib import Path

import h5py
import keras

from kdistill import archives, files
from kdistill.errors import InputError
from kdistill.networks.copying import derive_state

CODE = ("Lambda", "TFSMLayer", "function", "__lambda__")  # names of classes whose code is in the file, or elsewhere
MODULES = ("keras", "tf_keras", "tensorflow", "builtins")  # packages of the classes that an .h5 file may name


def load_hdf5(path: str | Path) -> keras.Model | None:
    """The model in an `.h5` or `.hdf5` file; no code in the file is run.

    Returns None for a model whose layers Keras 3 does not know as Keras 2 wrote them: Keras 2 (tf_keras) loads it.

    Raises `InputError` for a damaged file, one with weights only, and one with code (a Lambda layer).
    """
    files.existing_file(path, (".h5", ".hdf5"))
    try:
        with h5py.File(path) as file:
            archives.check_hdf5(file, os.path.getsize(path))
            text = file.attrs.get("model_config")
            text = text.decode() if isinstance(text, bytes) else text
            config = None if text is None else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"'{path}' cannot be loaded: it is damaged, or no HDF5 file ({_first_line(error)}).") from None
    if config is None:
        raise InputError(
            f"'{path}' holds weights without a model. Save the whole model, model.save('teacher.keras'), or give a "
            "network of kdistill these weights: Network(name, weights=(file,))."
        )
    _check_no_code(config, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Keras warns of its own older arguments
            model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception:  # Keras 3 raises many kinds for a layer that Keras 2 wrote with other arguments
        return None
    derive_state(model)
    return model


def _check_no_code(config, path: str | Path) -> None:
    """Raises `InputError` for a config that names code: a Lambda layer, a function, a class of another package."""
    waiting = [config]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            name, module = part.get("class_name"), part.get("module")
            foreign = isinstance(module, str) and module.split(".")[0] not in MODULES
            if name in CODE or foreign:
                raise InputError(
                    f"'{path}' contains {name!a}{f' of the module {module!a}' if foreign else ''}, whose code would "
                    "run. Code in a model file is not run. Create the model in a Python file that defines "
                    "predict(images), load its weights there, and give that file as the teacher."
                )
        if isinstance(part, (dict, list)):
            waiting += part.values() if isinstance(part, dict) else part


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
