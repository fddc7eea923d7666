"""Any model or models -> one frozen function, images -> logits.

The teacher is a function and not a submodule of the Distiller, so that it cannot be trained, saved with the student,
counted among its weights or switched to training mode.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from kdistill.errors import InputError, unknown
from kdistill.networks.heads import as_logits
from kdistill.networks.taps import tapped
from kdistill.teachers.adapted import Adapted, outputs_of

Predict = Callable[[tf.Tensor], object]  # images -> logits, or a dict of logits and taps


def frozen(teacher, weights: Sequence[float] | None = None, taps: dict[str, str] | None = None) -> Predict:
    """One function, images -> float32 logits `[batch, classes]`, of a model, a function, or a list of either.

    Models run with `training=False` and without gradients. Several are blended in probability space, as in
    Geras et al. 2016 (arXiv 1511.06433): the logits are the log of the weighted mean of their probabilities.
    `weights` are positive, one per teacher, and are normalized to a sum of 1.

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
        outputs = outputs_of(inner, prepare(images))
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


def classes_of(model) -> int | None:
    """The number of classes of a Keras model, where its graph tells it; else None."""
    model = model.teacher if isinstance(model, Adapted) else model
    try:
        shape = model.output_shape
    except (AttributeError, ValueError):
        return None
    return shape[-1] if isinstance(shape, tuple) and shape and isinstance(shape[-1], int) else None
