"""Outputs that were computed elsewhere: a file with a row for each image, found by the image's own pixels."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np

from kdistill import archives, files
from kdistill.errors import InputError

NAME = "teacher_logits.npz"
KEY_BYTES = 16


class StoredOutputs:
    """A function, images -> logits, that looks them up in a file of `store_teacher`.

    The order of the images does not matter, and an image that the file does not hold is an error. Images that are
    augmented are other images.

    Attributes:
        width: the number of classes.
        fingerprint: of the file.
    """

    def __init__(self, path: str | Path):
        files.existing_file(path, (".npz",))
        self.path, self.name = Path(path), Path(path).stem
        try:
            with zipfile.ZipFile(path) as archive:
                archives.check_zip(archive, self.path.stat().st_size)
            with np.load(path, allow_pickle=False) as content:
                keys, self.logits = content["keys"], content["logits"]
        except (OSError, KeyError, *archives.ERRORS) as error:
            raise InputError(
                f"'{path}' is damaged, or no file of kdistill.store_teacher ({error}). Store the outputs again."
            ) from None
        shapes = keys.dtype == np.uint8 and keys.ndim == 2 and keys.shape[1] == KEY_BYTES
        floats = self.logits.dtype == np.float32 and self.logits.ndim == 2 and self.logits.shape[1] > 1
        if not shapes or not floats or len(keys) != len(self.logits) or not len(keys):
            raise InputError(
                f"'{path}' has keys {keys.shape} and logits {self.logits.shape}; expected as many rows of both, as "
                "kdistill.store_teacher writes them."
            )
        if not np.isfinite(self.logits).all():
            raise InputError(f"'{path}' holds NaN or infinity. Store the outputs again.")
        self.width = self.logits.shape[1]
        self.fingerprint = files.sha256(self.path)[:16]
        self._rows = {key.tobytes(): row for row, key in enumerate(keys)}

    def predict(self, images: np.ndarray) -> np.ndarray:
        """float32 logits `[n, classes]` of images `[n, height, width, channels]`, pixels 0..255."""
        rows = [self._rows.get(key) for key in map(bytes, keys_of(images))]
        missing = rows.count(None)
        if missing:
            raise InputError(
                f"'{self.path}' has no outputs for {missing} of {len(rows)} images. Stored outputs belong to the very "
                "images that they were computed for: store those of training, validation and test images, and turn "
                "off what changes pixels (data.shift, flip, crop_area, mixup, cutmix)."
            )
        return self.logits[rows]


def read_array(path: str | Path) -> np.ndarray:
    """The array in a `.npy` file, mapped and not read. Raises `InputError` for any other file."""
    files.existing_file(path, (".npy",))
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except archives.ERRORS as error:
        raise InputError(f"'{path}' is damaged, or no array of numpy.save ({error}).") from None
    if array.dtype.kind != "f":
        raise InputError(f"'{path}' holds {array.dtype}; expected floating-point logits [n, classes].")
    return array


def keys_of(images: np.ndarray) -> np.ndarray:
    """A hash of each image, uint8 `[n, 16]`. Raises `InputError` for pixels that are no whole numbers 0..255."""
    pixels = np.asarray(images)
    if pixels.dtype != np.uint8:
        whole = np.rint(pixels)
        if (whole != pixels).any() or pixels.min() < 0 or pixels.max() > 255:
            raise InputError(
                "Stored outputs belong to images whose pixels are whole numbers from 0 to 255; these are others: they "
                "are augmented or scaled. Turn the augmentation off."
            )
        pixels = whole.astype(np.uint8)
    shape = repr(pixels.shape[1:]).encode()
    digests = (hashlib.blake2b(image.tobytes(), digest_size=KEY_BYTES, key=shape).digest() for image in pixels)
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(pixels), KEY_BYTES)


def write(path: Path, images: np.ndarray, logits: np.ndarray) -> Path:
    """Writes the logits `[n, classes]` of images `[n, ...]` to a file, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_file(path) as part, open(part, "wb") as file:
        np.savez(file, keys=keys_of(images), logits=logits.astype(np.float32))
    return path
