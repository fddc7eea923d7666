"""Models in `.keras` files: loaded in safe mode, written whole."""

import json
import os
import warnings
import zipfile
from pathlib import Path

import h5py
import keras

from kdistill import archives, files
from kdistill.errors import InputError
from kdistill.networks import heads, signatures
from kdistill.networks.copying import derive_state
from kdistill.networks.keras_internals import layers_of

CONFIG_BYTES = 64 << 20
WEIGHTS = "model.weights.h5"  # the weights inside of a .keras file


def load_checked(path: str | Path, shape: tuple[int, int, int], classes: int) -> keras.Model:
    """A trained model from a `.keras` file, loaded in safe mode, that fits the data.

    Args:
        shape: (height, width, channels) of the data's images.
        classes: the number of classes of the data.

    Raises:
        InputError: for a file that cannot be loaded, another shape, or another number of classes.
    """
    model = load_model(path)
    expected, received = signatures.image_shape(model), tuple(shape)
    if expected != received:
        raise InputError(f"The model '{path}' expects images of {expected}, the data has images of {received}.")
    head = signatures.head_of(model)
    heads.exclusive_kind(head, signatures.subject_of(model, "model"))
    model_classes = head.classes
    if model_classes != classes:
        raise InputError(f"The model '{path}' has {model_classes} classes, the data has {classes}.")
    return model


def save_model(model: keras.Model, path: Path) -> None:
    """Writes a `.keras` file that is complete or absent."""
    try:
        with files.atomic_file(path) as part:
            model.save(part)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"Cannot write '{path}': {reason}. Free some space, then try again.") from None


def load_model(path: str | Path) -> keras.Model:
    """The model in a `.keras` file, loaded in safe mode, which runs no code from the file.

    Raises `InputError` for a file that cannot be loaded, and where Keras leaves weights of the file out.
    """
    files.existing_file(path, (".keras",))
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="(?s).*freshly-initialized weights")
            model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except UserWarning:
        raise InputError(
            f"'{path}' cannot be loaded: Keras would give layers random weights. It saves a layer once that a nested "
            "model shares with the model around it, and loads two. Create the model in your code, call "
            "load_weights() with this file, and pass the model."
        ) from None
    except Exception as error:  # Keras raises many kinds for a damaged, unsafe or foreign file
        raise InputError(
            f"'{path}' cannot be loaded: it is damaged, no .keras file, or needs code that is not imported "
            f"({_reason_of(error)})."
        ) from error
    _check_built(model, path)
    derive_state(model)
    return model


def loss_of_file(path: str | Path):
    """The loss of `compile` of the model in a `.keras` file that `load_model` has loaded, as the file states it.

    None for a model that was not compiled. Nothing of it is built: it only tells what the outputs mean.
    """
    with zipfile.ZipFile(path) as archive:
        config = json.loads(archive.read("config.json"))
    compiled = config.get("compile_config") if isinstance(config, dict) else None
    return compiled.get("loss") if isinstance(compiled, dict) else None


def load_weights(model: keras.Model, path: Path) -> None:
    """Loads the weights in a `.keras` file into a model of the same structure. Raises `InputError` if it cannot."""
    try:
        model.load_weights(path)
    except Exception as error:  # Keras raises many kinds for a damaged or foreign file
        raise InputError(f"'{path}' cannot be loaded: {_reason_of(error)}. Delete it.") from error


def _reason_of(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_archive(path: str | Path) -> None:
    """Checks a `.keras` file before Keras reads it: sizes, and that its weights are arrays of its own.

    Raises one of `archives.ERRORS`, or `KeyError`.
    """
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive:
        archives.check_zip(archive, size)
        config = archive.getinfo("config.json")
        if config.file_size > CONFIG_BYTES:
            raise archives.TooLarge(f"its config.json has {config.file_size:,} bytes, of at most {CONFIG_BYTES:,}")
        if WEIGHTS in archive.namelist():
            with archive.open(WEIGHTS) as content, h5py.File(content) as file:
                archives.check_hdf5(file, size)


def _check_built(model: keras.Model, path: str | Path) -> None:
    """Raises `InputError` if a layer is not built, so that Keras has silently left its weights in the file."""
    layers = [layer for layer in layers_of(model) if not layer.built and not layer.weights]
    with zipfile.ZipFile(path) as archive:
        if not layers or WEIGHTS not in archive.namelist():
            return
        with archive.open(WEIGHTS) as content, h5py.File(content) as file:
            saved = _count_weights(file)
    with files.temporary_folder() as folder:
        model.save_weights(Path(folder, "again.weights.h5"))
        with h5py.File(Path(folder, "again.weights.h5")) as file:
            loaded = _count_weights(file)
    if saved > loaded:
        names = ", ".join(f"'{layer.name}' ({type(layer).__name__})" for layer in layers)
        raise InputError(
            f"'{path}': {saved - loaded} weights in the file are not loaded, because Keras does not build the layers "
            f"{names} of '{model.name}'. Build them in build() of the class that contains them, save the model "
            "again, and load that file. Or create the model, call it once, and load the weights with load_weights()."
        )


def _count_weights(file: h5py.File) -> int:
    counts = []

    def visit(name, value):
        if isinstance(value, h5py.Dataset) and not name.startswith("optimizer/") and "seed_generator" not in name:
            counts.append(name)

    file.visititems(visit)
    return len(counts)
