"""Images that stay in their files and are decoded on access, so that a data set may be larger than the memory.

Pillow reads the headers. TensorFlow decodes the pixels, so that an image is the same here and inside `tf.data`;
TensorFlow is imported when the first image is decoded.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from kdistill.errors import InputError
from kdistill.files import cache_root, write_text

CENTER = 0.875  # evaluation sees the center square, 224 of 256 of the shorter side: the custom of ImageNet
MAX_MEGAPIXELS = 50  # larger images are not decoded
PNG = 4  # the way of decoding: a JPEG reduced by 2 to the power 0, 1, 2 or 3, or a PNG
CACHED_FROM = 5000  # images: the result of decoding them all once is cached; fewer are decoded in seconds


class Store(Protocol):
    """Encoded images: `names` (bytes), `headers` int64 `[n, 4]` (height, width, 1 for a PNG, bytes)."""

    names: np.ndarray
    headers: np.ndarray

    def read(self, index: int) -> bytes:
        """The encoded image."""

    def elements(self, indexes: np.ndarray) -> np.ndarray:
        """What `content` needs to read these images inside `tf.data`."""

    def content(self, element):
        """A scalar string tensor, the encoded image, of one of `elements`."""


class Files:
    """Encoded images in one file per image: a `Store`."""

    def __init__(self, root: str | Path, names: np.ndarray, headers: np.ndarray):
        self.root, self.names, self.headers = os.fsencode(root), names, headers

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self.names[index]), "rb") as file:
            return file.read()

    def elements(self, indexes: np.ndarray) -> np.ndarray:
        return self.names[indexes]

    def content(self, element):
        import tensorflow as tf

        return tf.io.read_file(tf.strings.join([self.root, element], "/"))


class Damage:
    """The images that cannot be decoded, with `reasons` by name; the share `limit` of `total` images is allowed."""

    def __init__(self, total: int, limit: float):
        self.total, self.limit = total, limit
        self.reasons: dict[str, str] = {}

    def add(self, name: bytes, reason: str) -> None:
        self.reasons.setdefault(os.fsdecode(name), reason)

    def summary(self) -> str:
        examples = [f"{name} ({reason})" for name, reason in list(self.reasons.items())[:5]]
        more = f", and {len(self.reasons) - 5} more" if len(self.reasons) > 5 else ""
        return f"{len(self.reasons)} of {self.total:,} images cannot be decoded: {', '.join(examples)}{more}"

    def check(self) -> None:
        """Raises `InputError` if more images are damaged than the limit allows."""
        if len(self.reasons) > self.limit * self.total:
            raise InputError(
                f"{self.summary()}. data.max_undecodable allows a share of {self.limit:g}. Fix or remove these images, "
                "or raise data.max_undecodable."
            )


class EncodedImages:
    """uint8 `[n, side, side, 3]`, used like an array: `images[3]`, `images[2:9]` and `images[indexes]` decode.

    `select` takes a subset without decoding. Decoding crops the center square and resizes it; training may crop other
    parts of the same file (see `random_crop_boxes`).
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self, store: Store, side: int, damage: Damage, indexes: np.ndarray | None = None, verified: bool = False
    ):
        self.store, self.side, self.damage, self.verified = store, side, damage, verified
        self.indexes = np.arange(len(store.names)) if indexes is None else indexes  # into the store

    def __len__(self) -> int:
        return len(self.indexes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.side, self.side, 3

    def select(self, which) -> "EncodedImages":
        """The images at these positions (a slice, a mask, or numbers), still encoded."""
        return EncodedImages(self.store, self.side, self.damage, self.indexes[which], self.verified)

    def mark_verified(self) -> "EncodedImages":
        """The same images; `decodable` does not decode them again."""
        return EncodedImages(self.store, self.side, self.damage, self.indexes, True)

    def __getitem__(self, which) -> np.ndarray:
        indexes = self.indexes[which]
        if np.ndim(indexes) == 0:
            return self._decode([indexes])[0]
        return self._decode(indexes)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)

    def _decode(self, indexes) -> np.ndarray:
        pixels = np.empty((len(indexes), *self.shape[1:]), np.uint8)
        for index, reason in zip(indexes, self._try_decoding(indexes, pixels), strict=True):
            if reason:
                name = os.fsdecode(self.store.names[index])
                raise InputError(f"The image '{name}' cannot be decoded: {reason}. Fix or remove it.")
        return pixels

    def _try_decoding(self, indexes, out: np.ndarray | None = None) -> Iterator[str | None]:
        """Decodes the images, into `out` if given; yields for every image why it cannot be decoded, or None."""
        decode, boxes = _eager_decoder(self.side), center_crop_boxes(self.store.headers[indexes], self.side)

        def try_one(position: int) -> str | None:
            try:
                image = decode(self.store.read(indexes[position]), boxes[position])
            except Exception as error:  # of the decoder or the file system: many types
                return _reason(error)
            if out is not None:
                out[position] = image
            return None

        if len(indexes) < 4:
            yield from map(try_one, range(len(indexes)))
            return
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            yield from pool.map(try_one, range(len(indexes)))

    def decodable(self, say: Callable[[str], None]) -> np.ndarray:
        """A mask, bool `[n]`, of the images that can be decoded; the others are added to the damage.

        Every image is decoded once, which takes as long as decoding in one epoch. For a large data set the result is
        cached in the cache folder, under the fingerprint.
        """
        if self.verified:
            return np.ones(len(self), bool)
        path = None if len(self) < CACHED_FROM else cache_root() / f"decoded-{self.fingerprint().hex()[:16]}.json"
        reasons = _cached_reasons(path, len(self))
        if reasons is None:
            reasons = self._reasons(say, announce=path is not None)
            if path:
                with contextlib.suppress(OSError):  # the next run decodes the images again
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, json.dumps(reasons))
        mask = np.ones(len(self), bool)
        for position, reason in reasons.items():
            mask[int(position)] = False
            self.damage.add(self.store.names[self.indexes[int(position)]], reason)
        return mask

    def _reasons(self, say: Callable[[str], None], announce: bool) -> dict[str, str]:
        """Why images cannot be decoded, by position; keys are strings, as in JSON."""
        if announce:
            say(f"Decoding {len(self):,} images once to find damaged ones")
        reasons, last_message = {}, time.monotonic()
        for position, reason in enumerate(self._try_decoding(self.indexes)):
            if reason:
                reasons[str(position)] = reason
            if time.monotonic() - last_message > 30:
                last_message = time.monotonic()
                say(f"Decoded {position:,} of {len(self):,} images")
        return reasons

    def fingerprint(self) -> bytes:
        """Of the names, byte counts and sizes of the images, not of their pixels: reading those takes hours."""
        digest = hashlib.sha256(repr((len(self), self.side)).encode())
        digest.update(np.ascontiguousarray(self.store.names[self.indexes]))
        digest.update(np.ascontiguousarray(self.store.headers[self.indexes]))
        return digest.digest()


def subset(images, which):
    """`images[which]` of an array; of encoded images a subset that is still encoded."""
    return images.select(which) if isinstance(images, EncodedImages) else images[which]


def center_crop_boxes(headers: np.ndarray, side: int) -> np.ndarray:
    """The center square of every image: int32 `[n, 5]`, top, left, height, width and the way of decoding."""
    height, width = headers[:, 0], headers[:, 1]
    edge = np.maximum(1, np.round(np.minimum(height, width) * CENTER)).astype(np.int64)
    return _boxes((height - edge) // 2, (width - edge) // 2, edge, edge, headers[:, 2], side)


def random_crop_boxes(headers: np.ndarray, side: int, draws: np.ndarray, min_area: float) -> np.ndarray:
    """Random parts, `min_area` to 1 of the area and 3:4 to 4:3 in shape (Szegedy et al. 2014, arXiv 1409.4842).

    `draws`: float64 `[n, 4]` in [0, 1). Returns boxes as `center_crop_boxes` does.
    """
    height, width = headers[:, 0], headers[:, 1]
    area = height * width * (min_area + (1 - min_area) * draws[:, 0])
    ratio = np.exp(np.log(3 / 4) + draws[:, 1] * (np.log(4 / 3) - np.log(3 / 4)))
    tall = np.clip(np.round(np.sqrt(area / ratio)), 1, height).astype(np.int64)
    wide = np.clip(np.round(np.sqrt(area * ratio)), 1, width).astype(np.int64)
    top = (draws[:, 2] * (height - tall + 1)).astype(np.int64)
    left = (draws[:, 3] * (width - wide + 1)).astype(np.int64)
    return _boxes(top, left, tall, wide, headers[:, 2], side)


def _boxes(top, left, height, width, png, side: int) -> np.ndarray:
    # A large JPEG is reduced by 2, 4 or 8 while it is decoded, which is faster and averages, if enough pixels remain.
    halvings = np.floor(np.log2(np.maximum(1, np.minimum(height, width) / side)))
    way = np.where(png != 0, PNG, np.minimum(3, halvings))
    return np.stack([top, left, height, width, way], 1).astype(np.int32)


def decode_image(content, box, side: int, way: int | None = None):
    """uint8 `[side, side, 3]` of an encoded image: grayscale becomes gray, CMYK is converted, transparency dropped.

    `way`: the way of decoding, if it is the same for all images; None: the last number of `box`.
    """
    import tensorflow as tf

    window = box[:4]

    def decode_full():
        return tf.io.decode_and_crop_jpeg(content, window, channels=3)

    def decode_reduced(ratio: int):
        image = tf.io.decode_jpeg(content, channels=3, ratio=ratio)
        top, left, height, width = tf.unstack(window // ratio)
        return image[top : top + height, left : left + width]

    def decode_png():
        top, left, height, width = tf.unstack(window)
        return tf.io.decode_png(content, channels=3)[top : top + height, left : left + width]

    ways = [decode_full, *(functools.partial(decode_reduced, ratio) for ratio in (2, 4, 8)), decode_png]
    image = tf.switch_case(box[4], ways) if way is None else ways[way]()
    # The kernel of tf.image.resize, without its checks of the shape, which take time for every image.
    image = tf.raw_ops.ResizeBilinear(images=image[None], size=(side, side), half_pixel_centers=True)[0]
    return tf.cast(tf.round(image), tf.uint8)


@functools.lru_cache(maxsize=32)
def traced_decoder(side: int, way: int | None = None):
    """`decode_image` as a graph, traced once and not every epoch: (content, box) -> uint8 `[side, side, 3]`."""
    import tensorflow as tf

    with tf.device("CPU"):
        traced = tf.function(lambda content, box: decode_image(content, box, side, way), autograph=False)
        return traced.get_concrete_function(tf.TensorSpec([], tf.string), tf.TensorSpec([5], tf.int32))


def _eager_decoder(side: int):
    import tensorflow as tf

    decode = traced_decoder(side)
    return lambda content, box: decode(tf.constant(content), tf.constant(box)).numpy()


def _cached_reasons(path: Path | None, count: int) -> dict[str, str] | None:
    """The cached reasons by position; None if they are not cached, or the file is damaged."""
    try:
        reasons = json.loads(path.read_text(encoding="utf-8")) if path else None
        valid = isinstance(reasons, dict) and all(
            0 <= int(position) < count and isinstance(reason, str) for position, reason in reasons.items()
        )
    except (OSError, ValueError):
        return None
    return reasons if valid else None


def _reason(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return text.replace("{{function_node", "\n").splitlines()[0].strip()[:100] or "damaged"


def read_header(file: BinaryIO, length: int) -> tuple[int, int, int, int]:
    """(height, width, 1 for a PNG, bytes) of a JPEG or PNG; no pixel is decoded.

    Call it inside `header_warnings_ignored`. Raises `ValueError` with the reason why the image cannot be used.
    """
    start = file.read(8)
    if not start:
        raise ValueError("an empty file")
    # Pillow's classes, not `Image.open`, which warns or raises for many pixels before the limit here is checked.
    if start == b"\x89PNG\r\n\x1a\n":
        kind, image_file = "PNG", PngImageFile
    elif start.startswith(b"\xff\xd8"):
        kind, image_file = "JPEG", JpegImageFile
    else:
        raise ValueError("neither a JPEG nor a PNG")
    file.seek(0)
    try:
        with image_file(file) as image:
            width, height = image.size
    except (OSError, SyntaxError, ValueError) as error:
        if getattr(error, "errno", None):  # of the file system, not of the content
            raise
        raise ValueError(f"a {kind} with a damaged header: {_reason(error)}") from None
    if height * width > MAX_MEGAPIXELS * 1_000_000:
        raise ValueError(f"{height * width / 1e6:.0f} megapixels, the limit is {MAX_MEGAPIXELS}")
    return height, width, int(kind == "PNG"), length


def header_of(content: bytes) -> tuple[int, int, int, int]:
    """As `read_header`, of an image in memory."""
    return read_header(io.BytesIO(content), len(content))


@contextlib.contextmanager
def header_warnings_ignored() -> Iterator[None]:
    """Hides what Pillow warns of in headers, such as damaged EXIF data, which decoding does not need.

    Enter it once around a scan, not in its threads: Python's warning filters belong to the process.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield
