"""Any model or models -> one frozen function, images -> logits.

The teacher is a function and not a submodule of the Distiller. So nothing trains it, saves it with the student, counts
its weights or switches it to training mode.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from kdistill.errors import InputError, unknown
from kdistill.networks.signatures import subject_of
from kdistill.networks.taps import tapped
from kdistill.teachers.adapted import Adapted, inference_outputs
from kdistill.teachers.first_look import FirstLook

Predict = Callable[[tf.Tensor], object]  # images -> logits, or a dict of logits and taps


def frozen(teacher, weights: Sequence[float] | None = None, taps: dict[str, str] | None = None) -> Predict:
    """One function, images -> float32 logits `[batch, classes]`, of a model, a function, or a list of these.

    Models run with `training=False` and without gradients. Several are blended in probability space, as in
    Geras et al. 2016 (arXiv 1511.06433): the logits are the log of the weighted mean of their probabilities.

    A teacher may give probabilities instead of logits: the first look at its outputs decides, or
    `Adapted(teacher, outputs=...)`.

    Args:
        teacher: a `keras.Model`, an `Adapted`, a function images -> logits, or a list of these.
        weights: positive numbers, one per teacher, normalized to a sum of 1. None: equal weights.
        taps: names of layers, with the settings that name them. The function then returns a dict of `logits` and each
            tap, from one forward. With several teachers, a tap is the number of the teacher and the layer, `0/conv1`.
            A function as teacher returns such a dict itself.

    Raises:
        InputError: for something that is no teacher, wrong `weights`, or a tap that does not exist. The function
            raises it for outputs that are not those of exclusive classes.
    """
    teachers = list(teacher) if isinstance(teacher, (list, tuple)) else [teacher]
    if not teachers:
        raise InputError("Distiller expects at least one teacher, received an empty list.")
    shares = [1.0] * len(teachers) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(teachers) or min(shares) <= 0:
        raise InputError(
            f"teacher_weights expects {len(teachers)} positive numbers, one per teacher, received {list(weights)}."
        )
    if len(teachers) == 1:
        return _frozen_one(teachers[0], taps or {})
    taps_of = _taps_by_teacher(taps or {}, len(teachers))
    functions = [_frozen_one(one, own) for one, own in zip(teachers, taps_of, strict=True)]
    total = sum(shares)

    def blended(images):
        log_probabilities, features = [], {}
        for index, (share, function) in enumerate(zip(shares, functions, strict=True)):
            outputs = function(images)
            if isinstance(outputs, dict):
                features |= {f"{index}/{name}": value for name, value in outputs.items()}
                outputs = outputs["logits"]
            log_probabilities.append(tf.math.log(share / total) + tf.nn.log_softmax(outputs))
        logits = tf.reduce_logsumexp(tf.stack(log_probabilities), axis=0)
        return {"logits": logits, **features} if taps else logits

    return blended


def _taps_by_teacher(taps: dict[str, str], count: int) -> list[dict[str, str]]:
    """The taps of each teacher under the names of its own layers: `0/conv1` is `conv1` of the first."""
    taps_of: list[dict[str, str]] = [{} for _ in range(count)]
    for tap, setting in taps.items():
        index, _, layer = tap.partition("/")
        if not index.isdigit() or int(index) >= count or not layer:
            raise InputError(
                f"There are {count} teachers, so a tap is a number from 0 to {count - 1}, a slash and a layer, such as "
                f"'0/{layer or tap}'; received '{tap}'. Fix {setting}."
            )
        taps_of[int(index)][layer] = setting
    return taps_of


def _frozen_one(teacher, taps: dict[str, str]) -> Predict:
    prepare = teacher.prepare if isinstance(teacher, Adapted) else (lambda images: images)
    model, stated = (teacher.teacher, teacher.outputs) if isinstance(teacher, Adapted) else (teacher, None)
    subject = subject_of(model, "teacher")
    if not callable(model):
        raise InputError(
            f"A teacher is a Keras model, a list of models, or a function images -> logits; received {model!r}."
        )
    if taps and isinstance(model, keras.Model):
        model = tapped(model, taps, "teacher")

    def classifying(outputs):
        """Of outputs with taps, those that classify."""
        if isinstance(outputs, dict) and "logits" in outputs and (taps or not isinstance(model, keras.layers.Layer)):
            return outputs["logits"]
        return outputs

    first_look = FirstLook(lambda inputs: classifying(inference_outputs(model, inputs)), subject, stated)

    def predict(images):
        inputs = prepare(images)
        outputs = inference_outputs(model, inputs)
        logits = tf.stop_gradient(tf.cast(first_look.logits(classifying(outputs), inputs), tf.float32))
        if not taps:
            return logits
        features = outputs if isinstance(outputs, dict) else {"logits": outputs}
        for name, setting in taps.items():
            if name not in features:
                raise unknown("tap", name, features, f"Fix {setting}, or the function that is the teacher.")
        return {"logits": logits, **{name: tf.stop_gradient(features[name]) for name in taps if name != "logits"}}

    return predict
