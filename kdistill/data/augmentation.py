"""Augmentation of a batch of training images, a pure function of (seed, epoch, step)."""

import hashlib

import numpy as np
import tensorflow as tf

from kdistill.data.image_files import random_crop_boxes
from kdistill.recipe import Data


def random_key(*parts) -> list[int]:
    """The key of a stateless random draw, two int32 numbers, hashed from the parts so that no two keys are related."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]


NO_WINDOWS, NO_BOX = np.zeros((0, 4), np.float32), np.zeros(4, np.int32)


def random_generator(seed: int, epoch: int, step: int, purpose: str) -> np.random.Generator:
    """The random numbers of one batch for one purpose, such as "crop"."""
    key = random_key(seed, epoch, step, purpose)
    return np.random.Generator(np.random.Philox(key=[number & 0xFFFFFFFF for number in key]))


def random_windows(shape, count: int, data: Data, seed: int, epoch: int, step: int) -> np.ndarray:
    """Random parts of images of one shape (see `random_crop_boxes`), as `tf.image.crop_and_resize` takes them."""
    height, width = shape[:2]
    draws = random_generator(seed, epoch, step, "crop").random((count, 4))
    boxes = random_crop_boxes(np.tile([height, width, 0, 0, 1], (count, 1)), max(height, width), draws, data.crop_area)
    top, left, tall, wide = boxes[:, :4].T.astype(np.float32)
    down, right = max(height - 1, 1), max(width - 1, 1)
    edges = [top / down, left / right, (top + tall - 1) / down, (left + wide - 1) / right]
    return np.stack(edges, 1).astype(np.float32)


def augment(images: tf.Tensor, data: Data, key: tf.Tensor, batch_size: int | None = None, used=None) -> tf.Tensor:
    """Shifts and flips images `[n, h, w, c]`; returns pixels 0..255, float32 if they were shifted, else as given.

    Args:
        key: The random key, int32 `[2]`.
        used: The positions of these images in a batch of `batch_size`, if they are a part of it: every image is
            augmented as it is in the whole batch.
    """
    count = images.shape[0]
    draws = tf.random.stateless_uniform([3, batch_size or count], key)
    if used is not None and len(used) != batch_size:
        draws = tf.gather(draws, used, axis=1)
    if data.shift:
        return _shifted(images, data.shift, draws, data.flip)
    return _flipped(images, draws[2] < 0.5) if data.flip else images


def _flipped(images: tf.Tensor, which: tf.Tensor) -> tf.Tensor:
    """Some images mirrored: they alone are reversed, as one tall image, and then whole images are copied.

    Reversing a batch and selecting from both takes four times as long.
    """
    tall = tf.reshape(tf.gather(images, tf.where(which)[:, 0]), [-1, *images.shape[2:]])
    flipped = tf.reshape(tf.reverse(tall, axis=[1]), [-1, *images.shape[1:]])
    count = images.shape[0]
    places = tf.where(which, count - 1 + tf.cumsum(tf.cast(which, tf.int32)), tf.range(count))
    return tf.gather(tf.concat([images, flipped], 0), places)


def _shifted(images: tf.Tensor, shift: int, draws: tf.Tensor, flip: bool) -> tf.Tensor:
    """Every image moved by up to `shift` pixels, and flipped or not, float32; what comes in from outside is 0.

    One operation cuts all images out of larger ones, takes the nearest pixels, which are whole ones, and gives float32:
    less work than gathering rows, then columns, then flipping.
    """
    height, width, edge = images.shape[1], images.shape[2], shift + 1
    reach = 2 * shift + 1
    # One pixel more on each side: a position that is rounded to just outside of the image would give 0.
    padded = tf.pad(images, [[0, 0], [edge, edge], [edge, edge], [0, 0]])
    top, left = (tf.floor(draws[i] * reach) + 1 for i in (0, 1))
    first, last = left, left + (width - 1)
    if flip:
        first, last = tf.where(draws[2] < 0.5, last, first), tf.where(draws[2] < 0.5, first, last)
    down, right = float(height + 2 * edge - 1), float(width + 2 * edge - 1)
    boxes = tf.stack([top / down, first / right, (top + (height - 1)) / down, last / right], 1)
    return tf.raw_ops.CropAndResize(
        image=padded, boxes=boxes, box_ind=tf.range(images.shape[0]), crop_size=[height, width], method="nearest"
    )


def mixes_images(data: Data) -> bool:
    """Whether images, and their labels, are mixed in pairs."""
    return bool(data.mixup or data.cutmix)


def draw_mixture(data: Data, shape, seed: int, epoch: int, step: int) -> tuple[float, np.ndarray]:
    """The share of another image that every image of a batch gets, and the box that gets it.

    Mixup (Zhang et al. 2017, arXiv 1710.09412): a share below 1 of the whole image. Cutmix (Yun et al. 2019, arXiv
    1905.04899): all of a box, which is cut at the edges. With both, a batch has one or the other with equal chance.

    Returns:
        The share, and the box as int32 top, left, height, width.
    """
    random, (height, width) = random_generator(seed, epoch, step, "mix"), shape[:2]
    cuts = bool(data.cutmix) and (not data.mixup or random.random() < 0.5)
    alpha = data.cutmix if cuts else data.mixup
    share = random.beta(alpha, alpha)
    if not cuts:
        return share, np.array([0, 0, height, width], np.int32)
    tall, wide = height * np.sqrt(share), width * np.sqrt(share)
    middle_y, middle_x = random.random() * height, random.random() * width
    top, left = (round(max(0, center - size / 2)) for center, size in ((middle_y, tall), (middle_x, wide)))
    bottom, right = round(min(height, middle_y + tall / 2)), round(min(width, middle_x + wide / 2))
    return 1.0, np.array([top, left, bottom - top, right - left], np.int32)


def mix_neighbors(images: tf.Tensor, labels: tf.Tensor, share: tf.Tensor, box: tf.Tensor, classes: int):
    """Mixes into every image `[batch, h, w, c]` its neighbor in the batch, and its label likewise.

    The order of a batch is random, so a neighbor is any other image. A label's share is that of its pixels.

    Args:
        share, box: as `draw_mixture` gives them: a share below 1 is that of the whole image.

    Returns:
        The images, float32, and labels as float32 distributions `[batch, classes]`.
    """
    neighbors = tf.roll(images, 1, 0)
    mixed = tf.cond(share < 1, lambda: _blended(images, neighbors, share), lambda: _pasted(images, neighbors, box))
    part = share * (tf.cast(box[2] * box[3], tf.float32) / (images.shape[1] * images.shape[2]))
    distributions = tf.one_hot(labels, classes)
    return mixed, distributions + part * (tf.roll(distributions, 1, 0) - distributions)


def _blended(images: tf.Tensor, others: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    images, others = tf.cast(images, tf.float32), tf.cast(others, tf.float32)
    return images + share * (others - images)


def _pasted(images: tf.Tensor, others: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
    """The images with the others in the box, float32: pieces are copied as bytes, before they become numbers."""
    top, left, tall, wide = tf.unstack(box)
    bottom, right = top + tall, left + wide
    rows = [images[:, top:bottom, :left], others[:, top:bottom, left:right], images[:, top:bottom, right:]]
    pieces = [images[:, :top], tf.concat(rows, 2), images[:, bottom:]]
    return tf.cast(tf.ensure_shape(tf.concat(pieces, 1), images.shape), tf.float32)
