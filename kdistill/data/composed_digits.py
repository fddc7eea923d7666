"""Data sets made of handwritten digits, one for each kind of labels that a network can have besides one class.

The digits are those of `mnist`: the sample that ships with kdistill, or the files of `--data-dir`. Every canvas is a
function of its number, so the data sets are the same on every machine.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from kdistill.data.mnist import DIGITS, mnist
from kdistill.recipe import Data

SIDE = 40  # of a canvas, in pixels
CANVASES = {"train": 4000, "test": 1000}
MOST_DIGITS = 3  # on a canvas
INK = 96  # a pixel of a digit that is at least this bright belongs to it
NOISE = 40  # highest brightness of the background


def segment(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Canvases of 40x40 with one to three digits; every pixel is background (0) or of a digit (1 to 10)."""
    parts, source = _canvases(data, data_dir, download, say)
    return (
        {name: (images, classes) for name, (images, classes, _) in parts.items()},
        "classes",
        ("background", *DIGITS),
        f"canvases of digits of {source}",
    )


def multilabel(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Canvases of 40x40 with one to three digits; ten labels state which digits are on a canvas."""
    parts, source = _canvases(data, data_dir, download, say)
    return (
        {name: (images, labels) for name, (images, _, labels) in parts.items()},
        "labels",
        DIGITS,
        f"canvases of digits of {source}",
    )


def rows(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Digits as sequences of 28 rows with 28 features from 0 to 1; one class for each sequence."""
    parts, _, source = mnist(data, data_dir, download, say)
    sequences = {
        name: (images.reshape(-1, 28, 28).astype(np.float32) / 255, labels) for name, (images, labels) in parts.items()
    }
    return sequences, "classes", DIGITS, f"rows of {source}"


def _canvases(data: Data, data_dir: Path | None, download: bool, say: Callable[[str], None]):
    """Of each part images `[n, 40, 40, 1]`, classes of the pixels `[n, 40, 40]` and labels `[n, 10]`; the source."""
    parts, _, source = mnist(data, data_dir, download, say)
    return {
        name: compose(images.reshape(-1, 28, 28), labels, CANVASES[name], place)
        for place, (name, (images, labels)) in enumerate(parts.items())
    }, source


def compose(digits: np.ndarray, classes: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, ...]:
    """Canvases of digits `[n, 28, 28]` at random places: images, classes of the pixels, and labels.

    Where digits overlap, the brighter pixel is seen, and decides the class.
    """
    random = np.random.Generator(np.random.Philox(key=[5, seed]))
    images = random.integers(0, NOISE, (count, SIDE, SIDE), np.uint8)
    pixels, labels = np.zeros((count, SIDE, SIDE), np.uint8), np.zeros((count, len(DIGITS)), np.uint8)
    numbers, reach = random.integers(1, MOST_DIGITS + 1, count), SIDE - digits.shape[1] + 1
    chosen = random.integers(0, len(digits), (count, MOST_DIGITS))
    corners = random.integers(0, reach, (count, MOST_DIGITS, 2))
    for canvas in range(count):
        for digit, (top, left) in zip(chosen[canvas, : numbers[canvas]], corners[canvas], strict=False):
            place = canvas, slice(top, top + digits.shape[1]), slice(left, left + digits.shape[2])
            ink, seen = digits[digit], images[place]
            above = ink > seen
            pixels[place] = np.where(above & (ink >= INK), classes[digit] + 1, pixels[place])
            images[place] = np.where(above, ink, seen)
            labels[canvas, classes[digit]] = 1
    return images[..., None], pixels, labels
