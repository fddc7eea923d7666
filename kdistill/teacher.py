"""Any model or models -> one frozen function, images -> logits.

The teacher is a function and not a submodule of the Distiller, so that it cannot be trained, saved with the student,
counted among its weights or switched to training mode.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from kdistill.errors import InputError

Predict = Callable[[tf.Tensor], tf.Tensor]


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


def frozen(teacher, weights: Sequence[float] | None = None) -> Predict:
    """One function, images -> float32 logits `[batch, classes]`, of a model, a function, or a list of either.

    Models run with `training=False` and without gradients. Several are blended in probability space, as in
    Geras et al. 2016 (arXiv 1511.06433): the logits are the log of the weighted mean of their probabilities.
    `weights` are positive, one per teacher, and are normalised to a sum of 1.
    """
    teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not teachers:
        raise InputError("Distiller expects at least one teacher, received an empty list.")
    shares = [1.0] * len(teachers) if weights is None else [float(w) for w in weights]
    if len(shares) != len(teachers) or min(shares) <= 0:
        raise InputError(
            f"teacher_weights expects {len(teachers)} positive numbers, one per teacher, received {list(weights)}."
        )
    functions = [_one(each) for each in teachers]
    if len(functions) == 1:
        return functions[0]
    total = sum(shares)

    def blended(images):
        logs = [
            tf.math.log(share / total) + tf.nn.log_softmax(function(images))
            for share, function in zip(shares, functions, strict=True)
        ]
        return tf.reduce_logsumexp(tf.stack(logs), axis=0)

    return blended


def _one(teacher) -> Predict:
    if not callable(teacher):
        raise InputError(
            f"A teacher is a Keras model, a list of models, or a function images -> logits; received {teacher!r}."
        )
    is_model = isinstance(teacher, keras.layers.Layer)

    def predict(images):
        outputs = teacher(images, training=False) if is_model else teacher(images)
        return tf.stop_gradient(tf.cast(as_logits(outputs), tf.float32))

    return predict


def classes_of(model) -> int | None:
    """The number of classes of a Keras model, where its graph tells it; else None."""
    try:
        shape = model.output_shape
    except (AttributeError, ValueError):
        return None
    return shape[-1] if isinstance(shape, tuple) and shape and isinstance(shape[-1], int) else None
