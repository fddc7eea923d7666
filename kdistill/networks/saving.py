"""Models in `.keras` files: loaded in safe mode, written whole."""

from pathlib import Path

import keras

from kdistill import files
from kdistill.errors import InputError
from kdistill.networks import heads


def load_checked(path: str | Path, shape: tuple[int, int, int], classes: int) -> keras.Model:
    """A trained model from a `.keras` file, loaded in safe mode, that fits the data.

    Args:
        shape: (height, width, channels) of the data's images.
        classes: the number of classes of the data.

    Raises:
        InputError: for a file that cannot be loaded, another shape, or another number of classes.
    """
    model = load_model(path)
    expected, received = heads.image_shape(model), tuple(shape)
    if expected != received:
        raise InputError(f"The model '{path}' expects images of {expected}, the data has images of {received}.")
    model_classes = heads.head_of(model).classes
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
    """The model in a `.keras` file, loaded in safe mode, which runs no code from the file."""
    files.existing_file(path, (".keras",))
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises many kinds for a damaged, unsafe or foreign file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"'{path}' cannot be loaded: it is damaged, no .keras file, or needs code that is not imported ({reason})."
        ) from error
