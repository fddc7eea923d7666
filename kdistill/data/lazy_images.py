"""Images that stay in their files and are decoded on access, so that a data set may be larger than the memory."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np

from kdistill.data.image_files import center_crop_boxes, decoded_at_once, decoder_for, reason_of
from kdistill.errors import InputError
from kdistill.files import cache_root, write_text

KEPT_BYTES = 256 << 20  # of the decoded images of a split: 1,700 of 224x224 pixels, 21,000 of 64x64
STATED_BYTES = 1 << 20  # less is not worth a message
CACHED_FROM = 5000  # images: the result of decoding them all once is cached; fewer are decoded in seconds


class Store(Protocol):
    """Encoded images: `names` (bytes), and `headers`, int64 `[n, 5]`.

    A header is height and width of the upright image, its format (0 JPEG, 1 PNG, 2 other), bytes, EXIF orientation.
    """

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

    `pixels`: all of them decoded, where they are few enough to stay in memory, else None; see `decodable`.
    """

    dtype = np.dtype(np.uint8)
    ndim = 4

    def __init__(
        self,
        store: Store,
        side: int,
        damage: Damage,
        indexes: np.ndarray | None = None,
        verified: bool = False,
        pixels: np.ndarray | None = None,
    ):
        self.store, self.side, self.damage, self.verified, self.pixels = store, side, damage, verified, pixels
        self.indexes = np.arange(len(store.names)) if indexes is None else indexes  # into the store

    def __len__(self) -> int:
        return len(self.indexes)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return len(self), self.side, self.side, 3

    def select(self, which) -> "EncodedImages":
        """The images at these positions (a slice, a mask, or numbers), still encoded."""
        indexes = self.indexes[which]
        whole = len(indexes) == len(self) and np.array_equal(indexes, self.indexes)
        pixels = self.pixels if whole or self.pixels is None else self.pixels[which]
        return EncodedImages(self.store, self.side, self.damage, indexes, self.verified, pixels)

    def mark_verified(self) -> "EncodedImages":
        """The same images; `decodable` does not decode them again."""
        return EncodedImages(self.store, self.side, self.damage, self.indexes, True, self.pixels)

    def __getitem__(self, which) -> np.ndarray:
        if self.pixels is not None:
            return self.pixels[which]
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
        boxes = center_crop_boxes(self.store.headers[indexes], self.side)
        decode = _eager_decoder(self.side, boxes)

        def try_one(position: int) -> str | None:
            try:
                image = decode(self.store.read(indexes[position]), boxes[position])
            except Exception as error:  # of the decoder or the file system: many types
                return reason_of(error)
            if out is not None:
                out[position] = image
            return None

        if len(indexes) < 4:
            yield from map(try_one, range(len(indexes)))
            return
        threads = decoded_at_once(self.store.headers[indexes], min(16, os.cpu_count() or 1))
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(try_one, range(len(indexes)))

    def decodable(self, say: Callable[[str], None]) -> np.ndarray:
        """A mask, bool `[n]`, of the images that can be decoded; the others are added to the damage.

        Every image is decoded once, which takes as long as decoding in one epoch. For a large data set the result is
        cached in the cache folder, under the fingerprint. Up to `KEPT_BYTES` of pixels stay in memory.
        """
        if self.verified:
            return np.ones(len(self), bool)
        size = int(np.prod(self.shape))
        if size <= KEPT_BYTES:
            self.pixels = np.zeros(self.shape, np.uint8)
        cached = len(self) >= CACHED_FROM and self.pixels is None
        path = cache_root() / f"decoded-{self.fingerprint().hex()[:16]}.json" if cached else None
        reasons = _cached_reasons(path, len(self))
        if reasons is None:
            reasons = self._reasons(say, announce=len(self) >= CACHED_FROM)
            if path:
                with contextlib.suppress(OSError):  # the next run decodes the images again
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text(path, json.dumps(reasons))
        mask = np.ones(len(self), bool)
        for position, reason in reasons.items():
            mask[int(position)] = False
            self.damage.add(self.store.names[self.indexes[int(position)]], reason)
        if self.pixels is not None and size >= STATED_BYTES:
            say(f"{mask.sum():,} decoded images stay in memory, {size / 1e6:.3g} MB")
        return mask

    def _reasons(self, say: Callable[[str], None], announce: bool) -> dict[str, str]:
        """Why images cannot be decoded, by position; keys are strings, as in JSON."""
        if announce:
            say(f"Decoding {len(self):,} images once to find damaged ones")
        reasons, last_message = {}, time.monotonic()
        for position, reason in enumerate(self._try_decoding(self.indexes, self.pixels)):
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
        headers = self.store.headers[self.indexes]
        digest.update(np.ascontiguousarray(headers[:, :4]))
        if (headers[:, 4] != 1).any():  # without it, as before the orientation was read
            digest.update(np.ascontiguousarray(headers[:, 4]))
        return digest.digest()


def subset(images, which):
    """`images[which]` of an array; of encoded images a subset that is still encoded."""
    return images.select(which) if isinstance(images, EncodedImages) else images[which]


def _eager_decoder(side: int, boxes: np.ndarray):
    import tensorflow as tf

    decode = decoder_for(side, boxes)
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
