"""Images that stay in their files and are decoded when they are asked for, so that they need not fit into memory.

NumPy only until something is decoded: TensorFlow's decoders give the same pixels here and inside `tf.data`.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from kdistill.errors import InputError
from kdistill.files import cache_root, write_text

CENTER = 0.875  # evaluation sees the middle square, 224 of 256 of the shorter side: the custom of ImageNet
MEGAPIXELS = 50  # what claims to be larger is not decoded
PNG = 4  # how an image is decoded: a JPEG shrunk by 2 to the power 0, 1, 2 or 3, or a PNG
_START_OF_FRAME = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}
KEPT_FROM = 5000  # images; fewer are decoded in seconds


class Store(Protocol):
    """Where encoded images are: `names` (bytes), `headers` int64 `[n, 4]` (height, width, 1 for a PNG, bytes)."""

    names: np.ndarray
    headers: np.ndarray

    def read(self, place: int) -> bytes:
        """The encoded image."""

    def elements(self, places: np.ndarray) -> np.ndarray:
        """What `content` needs to read these images inside `tf.data`."""

    def content(self, element):
        """A scalar string tensor, the encoded image, of one of `elements`."""


class Files:
    """Encoded images in files of their own: a `Store`."""

    def __init__(self, root: str | Path, names: np.ndarray, headers: np.ndarray):
        self.root, self.names, self.headers = os.fsencode(root), names, headers

    def read(self, place: int) -> bytes:
        with open(os.path.join(self.root, self.names[place]), "rb") as file:
            return file.read()

    def elements(self, places: np.ndarray) -> np.ndarray:
        return self.names[places]

    def content(self, element):
        import tensorflow as tf

        return tf.io.read_file(tf.strings.join([self.root, element], "/"))


class Damage:
    """Images that cannot be decoded, by name, with the reason; of `total`, at most the share `limit` is borne."""

    def __init__(self, total: int, limit: float):
        self.total, self.limit = total, limit
        self.found: dict[str, str] = {}

    def note(self, name: bytes, reason: str) -> None:
        self.found.setdefault(os.fsdecode(name), reason)

    def text(self) -> str:
        some = [f"{name} ({reason})" for name, reason in list(self.found.items())[:5]]
        more = f", and {len(self.found) - 5} more" if len(self.found) > 5 else ""
        return f"{len(self.found)} of {self.total:,} images cannot be decoded: {', '.join(some)}{more}"

    def check(self) -> None:
        """Raises `InputError` if there are more than are borne."""
        if len(self.found) > self.limit * self.total:
            raise InputError(
                f"{self.text()}. Borne is a share of {self.limit:g}. Mend or remove them, or raise "
                "data.max_undecodable."
            )


class EncodedImages:
    """uint8 `[n, side, side, 3]`, like an array: `len`, `shape`, `images[3]`, `images[2:9]`, `images[places]` decode.

    `select` gives a part of them without decoding. An image is cut to its middle square and resized; `pipeline` cuts
    otherwise (see `boxes`) from the same file.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(self, store: Store, side: int, damage: Damage, places: np.ndarray | None = None, tried: bool = False):
        self.store, self.side, self.damage, self.tried = store, side, damage, tried
        self.places = np.arange(len(store.names)) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.side, self.side, 3

    def select(self, which) -> "EncodedImages":
        """The images at these places (a slice, a mask, or numbers), still encoded."""
        return EncodedImages(self.store, self.side, self.damage, self.places[which], self.tried)

    def trusted(self) -> "EncodedImages":
        """The same images, known to be `whole`."""
        return EncodedImages(self.store, self.side, self.damage, self.places, True)

    def __getitem__(self, which) -> np.ndarray:
        places = self.places[which]
        if np.ndim(places) == 0:
            return self._decoded([places])[0]
        return self._decoded(places)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return self[:].astype(dtype or np.uint8, copy=False)

    def _decoded(self, places) -> np.ndarray:
        made = np.empty((len(places), *self.shape[1:]), np.uint8)
        for place, reason in zip(places, self._tried(places, made), strict=True):
            if reason:
                name = os.fsdecode(self.store.names[place])
                raise InputError(f"The image '{name}' cannot be decoded: {reason}. Mend or remove it.")
        return made

    def _tried(self, places, out: np.ndarray | None = None) -> Iterator[str | None]:
        """Decodes each image, into `out` where given; gives for each why it cannot be done."""
        decode, boxes = _decoder(self.side), middle(self.store.headers[places], self.side)

        def one(position: int) -> str | None:
            try:
                image = decode(self.store.read(places[position]), boxes[position])
            except Exception as error:  # the decoder's, the file system's: many kinds
                return _reason(error)
            if out is not None:
                out[position] = image
            return None

        if len(places) < 4:
            yield from map(one, range(len(places)))
            return
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            yield from pool.map(one, range(len(places)))

    def whole(self, say: Callable[[str], None]) -> np.ndarray:
        """A mask, bool `[n]`, of the images that can be decoded; the others are noted as damage.

        Every image is decoded once, which costs as much as one epoch's decoding; of a large data set the result is
        kept in the cache folder, under the fingerprint.
        """
        if self.tried:
            return np.ones(len(self), bool)
        kept = None if len(self) < KEPT_FROM else cache_root() / f"decoded-{self.fingerprint().hex()[:16]}.json"
        bad = _read(kept)
        if bad is None:
            bad, said = {}, time.monotonic()
            if kept:
                say(f"Decoding {len(self):,} images once, to find those that are damaged")
            for position, reason in enumerate(self._tried(self.places)):
                if reason:
                    bad[str(position)] = reason
                if time.monotonic() - said > 30:
                    said = time.monotonic()
                    say(f"Decoded {position:,} of {len(self):,} images")
            if kept:
                with contextlib.suppress(OSError):  # it is decoded again, then
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    write_text(kept, json.dumps(bad))
        good = np.ones(len(self), bool)
        for position, reason in bad.items():
            good[int(position)] = False
            self.damage.note(self.store.names[self.places[int(position)]], reason)
        return good

    def fingerprint(self) -> bytes:
        """Of the names, the lengths and the sizes of the images, not of their pixels: reading all takes hours."""
        digest = hashlib.sha256(repr((len(self), self.side)).encode())
        digest.update(np.ascontiguousarray(self.store.names[self.places]))
        digest.update(np.ascontiguousarray(self.store.headers[self.places]))
        return digest.digest()


def subset(images, which):
    """`images[which]` of an array; of encoded images a part that is still encoded."""
    return images.select(which) if isinstance(images, EncodedImages) else images[which]


def middle(headers: np.ndarray, side: int) -> np.ndarray:
    """The middle square of each image: int32 `[n, 5]`, top, left, height, width and how it is decoded."""
    height, width = headers[:, 0], headers[:, 1]
    edge = np.maximum(1, np.round(np.minimum(height, width) * CENTER)).astype(np.int64)
    return _boxes((height - edge) // 2, (width - edge) // 2, edge, edge, headers[:, 2], side)


def cut(headers: np.ndarray, side: int, draws: np.ndarray, least_area: float) -> np.ndarray:
    """Random parts, `least_area` to 1 of the area and 3:4 to 4:3 in shape (Szegedy et al. 2014, arXiv 1409.4842).

    `draws`: float64 `[n, 4]` from 0 to below 1. As `middle`.
    """
    height, width = headers[:, 0], headers[:, 1]
    area = height * width * (least_area + (1 - least_area) * draws[:, 0])
    ratio = np.exp(np.log(3 / 4) + draws[:, 1] * (np.log(4 / 3) - np.log(3 / 4)))
    tall = np.clip(np.round(np.sqrt(area / ratio)), 1, height).astype(np.int64)
    wide = np.clip(np.round(np.sqrt(area * ratio)), 1, width).astype(np.int64)
    top = (draws[:, 2] * (height - tall + 1)).astype(np.int64)
    left = (draws[:, 3] * (width - wide + 1)).astype(np.int64)
    return _boxes(top, left, tall, wide, headers[:, 2], side)


def _boxes(top, left, height, width, png, side: int) -> np.ndarray:
    # A large JPEG is shrunk by 2, 4 or 8 while it is decoded, which is faster and averages, as long as enough is left.
    halvings = np.floor(np.log2(np.maximum(1, np.minimum(height, width) / side)))
    how = np.where(png != 0, PNG, np.minimum(3, halvings))
    return np.stack([top, left, height, width, how], 1).astype(np.int32)


def decoded(content, box, side: int, kind: int | None = None):
    """uint8 `[side, side, 3]` of an encoded image: grayscale becomes gray, CMYK is converted, transparency dropped.

    `kind`: the way of decoding, where it is the same for all; None: it is the last number of `box`.
    """
    import tensorflow as tf

    window = box[:4]

    def whole():
        return tf.io.decode_and_crop_jpeg(content, window, channels=3)

    def shrunk(ratio: int):
        image = tf.io.decode_jpeg(content, channels=3, ratio=ratio)
        top, left, height, width = tf.unstack(window // ratio)
        return image[top : top + height, left : left + width]

    def png():
        top, left, height, width = tf.unstack(window)
        return tf.io.decode_png(content, channels=3)[top : top + height, left : left + width]

    ways = [whole, *(functools.partial(shrunk, ratio) for ratio in (2, 4, 8)), png]
    image = tf.switch_case(box[4], ways) if kind is None else ways[kind]()
    # As tf.image.resize does it, without its questions about the shape: they take time for every image.
    image = tf.raw_ops.ResizeBilinear(images=image[None], size=(side, side), half_pixel_centers=True)[0]
    return tf.cast(tf.round(image), tf.uint8)


@functools.lru_cache(maxsize=32)
def decoder(side: int, kind: int | None = None):
    """`decoded` as a graph that is traced once, not once an epoch: (content, box) -> uint8 `[side, side, 3]`."""
    import tensorflow as tf

    with tf.device("CPU"):
        traced = tf.function(lambda content, box: decoded(content, box, side, kind), autograph=False)
        return traced.get_concrete_function(tf.TensorSpec([], tf.string), tf.TensorSpec([5], tf.int32))


def _decoder(side: int):
    import tensorflow as tf

    call = decoder(side)
    return lambda content, box: call(tf.constant(content), tf.constant(box)).numpy()


def _read(kept: Path | None) -> dict[str, str] | None:
    try:
        return json.loads(kept.read_text()) if kept else None
    except (OSError, ValueError):  # not there, or damaged: it is made again
        return None


def _reason(error: Exception) -> str:
    text = getattr(error, "message", None) or str(error) or type(error).__name__
    return text.replace("{{function_node", "\n").splitlines()[0].strip()[:100] or "damaged"


def header(file: BinaryIO, length: int) -> tuple[int, int, int, int]:
    """(height, width, 1 for a PNG, bytes) of an image from its first bytes. Raises `ValueError` with the reason."""
    height, width, png = _size(file)
    if height < 1 or width < 1:
        raise ValueError(f"{width}x{height} pixels")
    if height * width > MEGAPIXELS * 1_000_000:
        raise ValueError(f"{height * width / 1e6:.0f} megapixels, the limit is {MEGAPIXELS}")
    return height, width, png, length


def header_of(content: bytes) -> tuple[int, int, int, int]:
    """As `header`, of an image in memory."""
    return header(io.BytesIO(content), len(content))


def _size(file: BinaryIO) -> tuple[int, int, int]:
    start = file.read(8)
    if not start:
        raise ValueError("an empty file")
    if start == b"\x89PNG\r\n\x1a\n":
        chunk = file.read(16)
        if len(chunk) < 16 or chunk[4:8] != b"IHDR":
            raise ValueError("a PNG without a header")
        return int.from_bytes(chunk[12:16], "big"), int.from_bytes(chunk[8:12], "big"), 1
    if start[:2] != b"\xff\xd8":
        raise ValueError("neither a JPEG nor a PNG")
    file.seek(2)
    while True:
        byte = file.read(1)
        while byte and byte != b"\xff":
            byte = file.read(1)
        while byte == b"\xff":
            byte = file.read(1)
        if not byte:
            raise ValueError("a JPEG that ends in its header")
        marker = byte[0]
        if marker in _WITHOUT_LENGTH:
            continue
        rest = file.read(2)
        if marker in (0xD9, 0xDA) or len(rest) < 2:
            raise ValueError("a JPEG without a size in its header")
        if marker in _START_OF_FRAME:
            frame = file.read(5)
            if len(frame) < 5:
                raise ValueError("a JPEG that ends in its header")
            return int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big"), 0
        file.seek(max(0, int.from_bytes(rest, "big") - 2), 1)
