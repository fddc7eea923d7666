"""Any model or models -> one frozen function, images -> logits; and several blended into one model.

The teacher is a function and not a submodule of the Distiller. So nothing trains it, saves it with the student, counts
its weights or switches it to training mode.
"""

from collections.abc import Callable, Sequence

import keras
import tensorflow as tf

from kdistill.errors import InputError, unknown
from kdistill.networks.heads import CLASSES, LABELS, NUMBERS
from kdistill.networks.signatures import subject_of
from kdistill.networks.taps import tapped
from kdistill.teachers.adapted import Adapted, inference_outputs
from kdistill.teachers.first_look import FirstLook

ONE_HEAD = {"": CLASSES}
Predict = Callable[[tf.Tensor], object]  # images -> logits, or a dict of logits and taps


def frozen(
    teacher,
    weights: Sequence[float] | None = None,
    taps: dict[str, str] | None = None,
    heads: Callable[[], dict[str, str]] = lambda: ONE_HEAD,
) -> Predict:
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
        heads: gives what the student's outputs mean by their names, an empty name for the only one, when the teacher
            runs: `classes`, `labels` or `numbers`. With several outputs the function returns a dict by these names.

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
        return _frozen_one(teachers[0], taps or {}, heads)
    taps_of = _taps_by_teacher(taps or {}, len(teachers))
    functions = [_frozen_one(one, own, heads) for one, own in zip(teachers, taps_of, strict=True)]

    def blended(images):
        outputs, features = [function(images) for function in functions], {}
        for index, output in enumerate(outputs if taps else ()):
            if isinstance(output, dict):
                features |= {f"{index}/{name}": value for name, value in output.items()}
                outputs[index] = output["logits"]
        meanings = heads()
        if list(meanings) != [""]:
            return {name: _blend([o[name] for o in outputs], shares, meanings[name]) for name in meanings}
        logits = _blend(outputs, shares, meanings[""])
        return {"logits": logits, **features} if taps else logits

    return blended


def _blend(outputs: list, shares: list[float], meaning: str) -> tf.Tensor:
    """The weighted mean of numbers or of probabilities; of the latter the logits."""
    total = sum(shares)
    if meaning == NUMBERS:
        return tf.add_n([output * (share / total) for share, output in zip(shares, outputs, strict=True)])

    def mean(log_probabilities):
        weighed = [tf.math.log(share / total) + logs for share, logs in zip(shares, log_probabilities, strict=True)]
        return tf.reduce_logsumexp(tf.stack(weighed), axis=0)

    if meaning == LABELS:
        return mean([tf.math.log_sigmoid(z) for z in outputs]) - mean([tf.math.log_sigmoid(-z) for z in outputs])
    return mean([tf.nn.log_softmax(logits) for logits in outputs])


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


def _frozen_one(teacher, taps: dict[str, str], heads: Callable[[], dict[str, str]]) -> Predict:
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

    first_looks: dict[tuple, FirstLook] = {}

    def scores(name: str, meaning: str, pick: Callable, outputs, inputs) -> tf.Tensor:
        if (name, meaning) not in first_looks:
            whose = subject if not name else f"The output {name!r} of the teacher"
            first_looks[name, meaning] = FirstLook(lambda x: pick(inference_outputs(model, x)), whose, stated)
        found = first_looks[name, meaning].scores(pick(outputs), inputs, meaning)
        return tf.stop_gradient(tf.cast(found, tf.float32))

    def predict(images):
        inputs, meanings = prepare(images), heads()
        outputs = inference_outputs(model, inputs)
        if list(meanings) != [""]:
            return {
                name: scores(
                    name,
                    meanings[name],
                    lambda values, name=name: _output(values, name, meanings, model),
                    outputs,
                    inputs,
                )
                for name in meanings
            }
        logits = scores("", meanings[""], classifying, outputs, inputs)
        if not taps:
            return logits
        features = outputs if isinstance(outputs, dict) else {"logits": outputs}
        for name, setting in taps.items():
            if name not in features:
                raise unknown("tap", name, features, f"Fix {setting}, or the function that is the teacher.")
        return {"logits": logits, **{name: tf.stop_gradient(features[name]) for name in taps if name != "logits"}}

    return predict


def _output(outputs, name: str, meanings: dict[str, str], model):
    """The output of a teacher for that of a student with this name."""
    if isinstance(outputs, dict):
        if name not in outputs:
            raise InputError(
                f"The student has the outputs {', '.join(meanings)}, the teacher {', '.join(outputs)}. Give the "
                "teacher outputs of the same names: keras.Model(inputs, {name: tensor, ...})."
            )
        return outputs[name]
    if isinstance(outputs, (list, tuple)) and len(outputs) == len(meanings):
        names = list(getattr(model, "output_names", ()))
        return outputs[names.index(name) if set(names) == set(meanings) else list(meanings).index(name)]
    received = len(outputs) if isinstance(outputs, (list, tuple)) else 1
    raise InputError(f"The student has the outputs {', '.join(meanings)}, the teacher {received}. Give it the same.")


@keras.saving.register_keras_serializable(package="kdistill")
class Blend(keras.layers.Layer):
    """Images -> logits of the blend: the log of the weighted mean of several models' probabilities. No gradient."""

    def __init__(self, models: Sequence[keras.Model], shares: Sequence[float] | None = None, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.models, self.shares = list(models), None if shares is None else list(shares)
        self.built = True

    def call(self, images):
        return frozen(list(self.models), self.shares)(images)

    def get_config(self):
        models = [keras.saving.serialize_keras_object(model) for model in self.models]
        return {"name": self.name, "models": models, "shares": self.shares}

    @classmethod
    def from_config(cls, config):
        models = [keras.saving.deserialize_keras_object(model) for model in config.pop("models")]
        return cls(models, **config)


def blend_models(models: Sequence[keras.Model], shares: Sequence[float] | None = None) -> keras.Model:
    """One model of several (Geras et al. 2016, arXiv 1511.06433).

    Args:
        models: Keras models of the same images and classes.
        shares: their positive weights in the mean. None: equal weights.
    """
    image = keras.Input(models[0].input_shape[1:], name="image")
    return keras.Model(image, Blend(models, shares, name="blend")(image), name="blend")
