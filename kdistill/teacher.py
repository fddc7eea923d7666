"""Any model or models -> one frozen function, images -> logits.

The teacher is a function and not a submodule of the Distiller, so that it cannot be trained, saved with the student,
counted among its weights or switched to training mode.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from kdistill.errors import InputError, unknown
from kdistill.taps import tapped

Predict = Callable[[tf.Tensor], object]  # images -> logits, or a dict of logits and taps


def as_logits(outputs) -> tf.Tensor:
    """The logits of a model's outputs: what stood before a final softmax, or the outputs themselves.

    Keras keeps the tensor before a softmax activation on the tensor behind it, as its own cross-entropies use it.
    """
    if isinstance(outputs, (dict, list, tuple)):
        raise InputError(
            f"The model gives {len(outputs)} outputs; kdistill distils one tensor of logits [batch, classes]. "
            "Wrap it: keras.Model(model.inputs, <the output to distil>)."
        )
    logits = getattr(outputs, "_keras_logits", outputs)
    if logits.shape.rank != 2 or logits.shape[-1] == 1:
        raise InputError(
            f"The model's output has shape {tuple(outputs.shape)}; expected logits [batch, classes] with 2 classes or "
            "more. For a binary problem give the model two outputs, one for each class."
        )
    return logits


@dataclass(frozen=True)
class Adapted:
    """A teacher that sees the images in its own way: size, number of channels, range of values.

    `teacher` is a model or a function. In this order, each only where given: `size` (height, width), bilinear, with
    anti-aliasing where the image shrinks; `channels`, 1 to 3 (grey three times) or 3 to 1 (luminance); `bgr` swaps red
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
        return _outputs(self.teacher, self.prepare(images))


def frozen(teacher, weights: Sequence[float] | None = None, taps: dict[str, str] | None = None) -> Predict:
    """One function, images -> float32 logits `[batch, classes]`, of a model, a function, or a list of either.

    Models run with `training=False` and without gradients. Several are blended in probability space, as in
    Geras et al. 2016 (arXiv 1511.06433): the logits are the log of the weighted mean of their probabilities.
    `weights` are positive, one per teacher, and are normalised to a sum of 1.

    With `taps` (names of layers, and the settings that named them) the function gives a dict of `logits` and each tap,
    from one forward. Of several teachers, a tap is the number of the teacher and the layer, `0/conv1`. A function as
    teacher gives such a dict itself.
    """
    teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not teachers:
        raise InputError("Distiller expects at least one teacher, received an empty list.")
    shares = [1.0] * len(teachers) if weights is None else [float(w) for w in weights]
    if len(shares) != len(teachers) or min(shares) <= 0:
        raise InputError(
            f"teacher_weights expects {len(teachers)} positive numbers, one per teacher, received {list(weights)}."
        )
    if len(teachers) == 1:
        return _one(teachers[0], taps or {})
    theirs = [{} for _ in teachers]
    for tap, setting in (taps or {}).items():
        index, _, name = tap.partition("/")
        if not index.isdigit() or int(index) >= len(teachers) or not name:
            raise InputError(
                f"There are {len(teachers)} teachers, so a tap is a number from 0 to {len(teachers) - 1}, a slash and "
                f"a layer, such as '0/{name or tap}'; received '{tap}'. Fix {setting}."
            )
        theirs[int(index)][name] = setting
    functions = [_one(each, names) for each, names in zip(teachers, theirs, strict=True)]
    total = sum(shares)

    def blended(images):
        logs, tapped = [], {}
        for index, (share, function) in enumerate(zip(shares, functions, strict=True)):
            outputs = function(images)
            if isinstance(outputs, dict):
                tapped |= {f"{index}/{name}": value for name, value in outputs.items()}
                outputs = outputs["logits"]
            logs.append(tf.math.log(share / total) + tf.nn.log_softmax(outputs))
        logits = tf.reduce_logsumexp(tf.stack(logs), axis=0)
        return {"logits": logits, **tapped} if taps else logits

    return blended


def _one(teacher, taps: dict[str, str]) -> Predict:
    prepare = teacher.prepare if isinstance(teacher, Adapted) else (lambda images: images)
    inner = teacher.teacher if isinstance(teacher, Adapted) else teacher
    if not callable(inner):
        raise InputError(
            f"A teacher is a Keras model, a list of models, or a function images -> logits; received {inner!r}."
        )
    if taps and isinstance(inner, keras.Model):
        inner = tapped(inner, taps, "teacher")

    def predict(images):
        outputs = _outputs(inner, prepare(images))
        logits = outputs
        if isinstance(outputs, dict) and "logits" in outputs and (taps or not isinstance(inner, keras.layers.Layer)):
            logits = outputs["logits"]
        logits = tf.stop_gradient(tf.cast(as_logits(logits), tf.float32))
        if not taps:
            return logits
        given = outputs if isinstance(outputs, dict) else {"logits": outputs}
        for name, setting in taps.items():
            if name not in given:
                raise unknown("tap", name, given, f"Fix {setting}, or the function that is the teacher.")
        return {"logits": logits, **{name: tf.stop_gradient(given[name]) for name in taps if name != "logits"}}

    return predict


def _outputs(teacher, images):
    return teacher(images, training=False) if isinstance(teacher, keras.layers.Layer) else teacher(images)


def classes_of(model) -> int | None:
    """The number of classes of a Keras model, where its graph tells it; else None."""
    model = model.teacher if isinstance(model, Adapted) else model
    try:
        shape = model.output_shape
    except (AttributeError, ValueError):
        return None
    return shape[-1] if isinstance(shape, tuple) and shape and isinstance(shape[-1], int) else None
