"""Models in `.keras` files: loaded in safe mode, written whole."""

from pathlib import Path

import keras

from kdistill import files
from kdistill.errors import InputError
from kdistill.files import atomic_file
from kdistill.networks import heads


def load_checked(path: str | Path, shape: tuple[int, int, int], classes: int) -> keras.Model:
    """A trained model from a `.keras` file, in safe mode, checked to fit images (height, width, channels)."""
    model = load_model(path)
    if heads.image_shape(model) != tuple(shape):
        raise InputError(f"The model '{path}' expects images of {heads.image_shape(model)}, the data holds {shape}.")
    found = heads.head_of(model)[1]
    if found != classes:
        raise InputError(f"The model '{path}' has {found} classes, the data has {classes}.")
    return model


def save_model(model: keras.Model, path: Path) -> None:
    """Writes a `.keras` file whole or not at all."""
    try:
        with atomic_file(path) as part:
            model.save(part)
    except OSError as error:
        raise InputError(f"Cannot write '{path}': {error.strerror or error}. Make room, then go on.") from None


def load_model(path: str | Path) -> keras.Model:
    """The model in a `.keras` file, loaded in safe mode: no code from the file is run."""
    files.existing_file(path, (".keras",))
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises many kinds for a file that is damaged, unsafe or from another program
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"'{path}' cannot be loaded: it is damaged, no .keras file, or needs code that is not imported ({reason})."
        ) from error
