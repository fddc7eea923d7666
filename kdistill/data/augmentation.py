"""Augmentation of a batch of training images, a pure function of (seed, epoch, step)."""

import hashlib

import numpy as np
import tensorflow as tf

from kdistill.data.lazy_images import cut
from kdistill.recipe import Data


def key(*parts) -> list[int]:
    """Two int32 numbers, the key of a stateless random draw, from a hash of the parts: no two keys are related."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in (0, 4)]


NONE, NOTHING = np.zeros((0, 4), np.float32), np.zeros(4, np.int32)


def random_generator(seed: int, epoch: int, step: int, what: str) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[each & 0xFFFFFFFF for each in key(seed, epoch, step, what)]))


def windows(shape, count: int, data: Data, seed: int, epoch: int, step: int) -> np.ndarray:
    """Random parts of images of one shape (see `encoded.cut`), as `tf.image.crop_and_resize` takes them."""
    height, width = shape[:2]
    draws = random_generator(seed, epoch, step, "crop").random((count, 4))
    boxes = cut(np.tile([height, width, 0, 0], (count, 1)), max(height, width), draws, data.crop_area)
    top, left, tall, wide = boxes[:, :4].T.astype(np.float32)
    down, right = max(height - 1, 1), max(width - 1, 1)
    edges = [top / down, left / right, (top + tall - 1) / down, (left + wide - 1) / right]
    return np.stack(edges, 1).astype(np.float32)


def augment(images: tf.Tensor, data: Data, draw: tf.Tensor, batch_size: int | None = None, used=None) -> tf.Tensor:
    """Shifted and flipped images `[n, h, w, c]` as float32 pixels 0..255; `draw` is the key, int32 `[2]`.

    With `used`, their positions in a batch of `batch_size`, they become what they are in the whole batch.
    """
    count, height, width = images.shape[0], images.shape[1], images.shape[2]
    draws = tf.random.stateless_uniform([3, batch_size or count], draw)
    if used is not None and len(used) != batch_size:
        draws = tf.gather(draws, used, axis=1)
    if data.shift:
        reach = 2 * data.shift + 1
        down, right = (tf.cast(draws[i] * reach, tf.int32) for i in (0, 1))
        padded = tf.pad(images, [[0, 0], [data.shift] * 2, [data.shift] * 2, [0, 0]])
        rows = down[:, None] + tf.range(height)[None]
        columns = right[:, None] + tf.range(width)[None]
        images = tf.gather(tf.gather(padded, rows, batch_dims=1), columns, axis=2, batch_dims=1)
    if data.flip:
        flipped = tf.reverse(images, axis=[2])
        # Whole images are copied; tf.where asks for every single byte which one it is, which doubles the time.
        images = tf.raw_ops.Select(condition=draws[2] < 0.5, x=flipped, y=images)
    return tf.cast(images, tf.float32)


def mixes(data: Data) -> bool:
    """Whether images are mixed in pairs, and labels with them."""
    return bool(data.mixup or data.cutmix)


def mixture(data: Data, shape, seed: int, epoch: int, step: int) -> tuple[float, np.ndarray]:
    """How much of another image is mixed into each of a batch, and where: a share, int32 top, left, height, width.

    Mixup (Zhang et al. 2017, arXiv 1710.09412): a share below 1 everywhere; cutmix (Yun et al. 2019, arXiv
    1905.04899): all of a rectangle, which may reach over the edge. With both a batch has one or the other, by the toss
    of a coin.
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


def mixed(images: tf.Tensor, labels: tf.Tensor, share: tf.Tensor, box: tf.Tensor, classes: int):
    """float32 images `[batch, h, w, c]`, each with its neighbor in the batch mixed in, and labels `[batch, classes]`.

    The order of a batch is random, so a neighbor is any other image. The labels' shares are those of the pixels.
    """
    rows, columns = tf.range(images.shape[1]), tf.range(images.shape[2])
    inside_y = (rows >= box[0]) & (rows < box[0] + box[2])
    inside_x = (columns >= box[1]) & (columns < box[1] + box[3])
    part = share * tf.cast(inside_y[:, None] & inside_x[None], tf.float32)
    images = images + part[..., None] * (tf.roll(images, 1, 0) - images)
    answers, part = tf.one_hot(labels, classes), tf.reduce_mean(part)
    return images, answers + part * (tf.roll(answers, 1, 0) - answers)
