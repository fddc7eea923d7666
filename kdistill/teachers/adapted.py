"""A teacher that sees the images in its own way."""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from kdistill.errors import InputError


@dataclass(frozen=True)
class Adapted:
    """A teacher that sees the images in its own way: size, number of channels, range of values.

    `teacher` is a model or a function. In this order, each only where given: `size` (height, width), bilinear, with
    anti-aliasing where the image shrinks; `channels`, 1 to 3 (gray three times) or 3 to 1 (luminance); `bgr` swaps red
    and blue; then `(image * scale - mean) / std`, mean and std one number or one for each channel. Give the values for
    pixels as the student gets them, 0..255 in a recipe.
    """

    teacher: object
    size: tuple[int, int] | None = None
    channels: int | None = None
    bgr: bool = False
    scale: float = 1.0
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0

    def __post_init__(self):
        if self.channels not in (None, 1, 3) or (self.bgr and self.channels == 1):
            raise InputError(f"Adapted expects channels=1 or 3 (bgr with 3 only), received {self.channels}.")
        if min(np.ravel(self.std)) <= 0 or not self.scale > 0:
            raise InputError(f"Adapted expects scale and std above 0, received {self.scale} and {self.std}.")

    def prepare(self, images) -> tf.Tensor:
        """The images as the teacher takes them, float32."""
        images = tf.cast(images, tf.float32)
        if images.shape.rank != 4:
            raise InputError(f"Adapted expects images [batch, height, width, channels], received {images.shape}.")
        if self.size is not None and tuple(images.shape[1:3]) != tuple(self.size):
            images = tf.image.resize(images, self.size, antialias=True)
        received = images.shape[-1]
        if self.channels is not None and self.channels != received:
            if {received, self.channels} != {1, 3}:
                raise InputError(f"Adapted makes 3 channels of 1 or 1 of 3; received {received} channels.")
            images = tf.image.grayscale_to_rgb(images) if self.channels == 3 else tf.image.rgb_to_grayscale(images)
        if self.bgr:
            images = images[..., ::-1]
        return (images * self.scale - tf.constant(self.mean, tf.float32)) / tf.constant(self.std, tf.float32)

    def __call__(self, images):
        return outputs_of(self.teacher, self.prepare(images))


def outputs_of(teacher, images):
    return teacher(images, training=False) if isinstance(teacher, keras.layers.Layer) else teacher(images)
