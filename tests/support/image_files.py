"""Small image files for tests: JPEG, PNG and broken ones, in folders of classes."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"blue": (30, 40, 200), "green": (40, 180, 50), "red": (210, 40, 30), "white": (230, 230, 230)}


def image(color, height=48, width=64, seed=0, noise=20) -> Image.Image:
    """Noise around a color."""
    random = np.random.default_rng(seed)
    pixels = np.array(color) + random.integers(-noise, noise + 1, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def content(picture: Image.Image, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def folders(root: Path, parts=("train", "val"), count=6, colors=COLORS, **size) -> Path:
    """`count` JPEGs of each color, in a folder for each color, in a folder for each part."""
    for number, part in enumerate(parts):
        for name, color in colors.items():
            place = root / part / name
            place.mkdir(parents=True)
            for i in range(count):
                (place / f"{i:02}.JPEG").write_bytes(content(image(color, seed=100 * number + i, **size), quality=90))
    return root
