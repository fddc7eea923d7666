"""A teacher with its own input, size, channels and range of values, or with outputs whose kind is stated."""

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import numpy as np
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.networks.heads import check_stated
from kdistill.networks.outputs import as_logits


@dataclass(frozen=True)
class Adapted:
    """A teacher that takes images of another size, number of channels or range of values than the student.

    It also states what the outputs of a teacher are, of any inputs, where they do not show it.

    The steps run in the order of the arguments. Values are for the student's pixels, 0 to 255 in a recipe.

    Args:
        teacher: a model, or a function images -> logits.
        size: (height, width), bilinear, with anti-aliasing where the image shrinks. None keeps the size.
        channels: 3 from 1 (gray three times) or 1 from 3 (luminance). None keeps the channels.
        bgr: swaps red and blue.
        scale, mean, std: `(image * scale - mean) / std`; mean and std are one number, or one for each channel.
        outputs: `logits`, or `probabilities`, whose rows are normalized (they may be some of the classes of a softmax).
            None: the first look at the outputs decides, see `first_look`.
        layout: `channels_first` for a teacher that takes [batch, channels, height, width].
        output: the name of the output that classifies, of a teacher with several (a dict).
        classes: the places of the student's classes among those of the teacher, in the student's order.

    What the last three change becomes part of `teacher`.

    Example:
        `Adapted(keras.applications.ResNet50(), size=(224, 224), bgr=True, mean=(103.9, 116.8, 123.7))`
    """

    teacher: object
    size: tuple[int, int] | None = None
    channels: int | None = None
    bgr: bool = False
    scale: float = 1.0
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    outputs: str | None = None
    layout: str | None = None
    output: str | None = None
    classes: Sequence[int] | None = None

    def __post_init__(self):
        if self.channels not in (None, 1, 3) or (self.bgr and self.channels == 1):
            raise InputError(f"Adapted expects channels=1 or 3 (bgr with 3 only), received {self.channels}.")
        if min(np.ravel(self.std)) <= 0 or not self.scale > 0:
            raise InputError(f"Adapted expects scale and std above 0, received {self.scale} and {self.std}.")
        check_stated(self.outputs)
        if self.layout not in (None, "channels_last", "channels_first"):
            raise InputError(f"layout expects 'channels_last' or 'channels_first', received {self.layout!r}.")
        ends = self.output, None if self.classes is None else tuple(int(place) for place in self.classes)
        first = self.layout == "channels_first"
        if first or ends != (None, None):
            object.__setattr__(self, "teacher", _with_ends(self.teacher, first, *ends, self.outputs))

    def prepare(self, images) -> tf.Tensor:
        """The images `[batch, height, width, channels]` as the teacher takes them, float32.

        Without a change to make, inputs of any other form pass as they are.
        """
        is_ready = getattr(images, "dtype", None) == tf.float32 or len(getattr(images, "shape", ())) != 4
        if self.changes_nothing and is_ready:
            return images
        images = tf.cast(images, tf.float32)
        if images.shape.rank != 4:
            raise InputError(f"Adapted expects images [batch, height, width, channels], received {images.shape}.")
        if self.size is not None and tuple(images.shape[1:3]) != tuple(self.size):
            images = tf.image.resize(images, self.size, antialias=True)
        received = images.shape[-1]
        if self.channels is not None and self.channels != received:
            if {received, self.channels} != {1, 3}:
                raise InputError(
                    f"Adapted converts 1 channel to 3 or 3 to 1; received {received} channels for {self.channels}."
                )
            images = tf.image.grayscale_to_rgb(images) if self.channels == 3 else tf.image.rgb_to_grayscale(images)
        if self.bgr:
            images = images[..., ::-1]
        return (images * self.scale - tf.constant(self.mean, tf.float32)) / tf.constant(self.std, tf.float32)

    @property
    def changes_nothing(self) -> bool:
        """Whether images pass as they are."""
        plain = (self.size, self.channels, self.bgr, self.scale) == (None, None, False, 1.0)
        return plain and not np.any(self.mean) and bool(np.all(np.equal(self.std, 1.0)))

    def __call__(self, images):
        return inference_outputs(self.teacher, self.prepare(images))


@keras.saving.register_keras_serializable(package="kdistill")
class Chosen(keras.layers.Layer):
    """Of the outputs of a model, the logits of some classes: one output by name, its classes by place."""

    def __init__(self, output=None, classes=None, outputs=None, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.output_name, self.classes, self.kind = output, None if classes is None else list(classes), outputs
        self.built = True

    def call(self, outputs):
        return choose(outputs, self.output_name, self.classes, self.kind)

    def get_config(self):
        own = {"output": self.output_name, "classes": self.classes, "outputs": self.kind}
        return {**super().get_config(), **own}


def choose(outputs, output: str | None, classes: Sequence[int] | None, kind: str | None = None):
    """One of several outputs, by its name; with `classes` its logits at these places."""
    if output is not None:
        names = sorted(outputs) if isinstance(outputs, dict) else []
        if output not in names:
            raise InputError(
                f"The teacher has no output '{output}'. It has {', '.join(names) or 'one without a name'}."
            )
        outputs = outputs[output]
    if classes is None:
        return outputs
    logits = as_logits(outputs, kind)
    if logits.shape[-1] is not None and max(classes) >= logits.shape[-1]:
        raise InputError(f"The teacher has the classes 0 to {logits.shape[-1] - 1}, not {max(classes)}. Fix classes.")
    return tf.gather(logits, classes, axis=-1)


def _with_ends(teacher, channels_first: bool, output: str | None, classes, kind: str | None):
    """A teacher for images [batch, height, width, channels] that gives the chosen output: a model of a model."""
    from kdistill.networks.keras_internals import graph_of

    ends = (output, classes) != (None, None)
    if not isinstance(teacher, keras.Model) or graph_of(teacher) is None:
        if not callable(teacher):
            raise InputError(f"A teacher is a Keras model or a function images -> logits; received {teacher!r}.")

        def chosen(images):
            images = tf.transpose(images, [0, 3, 1, 2]) if channels_first else images
            outputs = inference_outputs(teacher, images)
            return choose(outputs, output, classes, kind) if ends else outputs

        return chosen
    shape = teacher.input_shape[1:]
    if channels_first and len(shape) != 3:
        raise InputError(f"layout='channels_first' expects a teacher of [channels, height, width], received {shape}.")
    image = keras.Input((*shape[1:], shape[0]) if channels_first else shape, name="image")
    outputs = teacher(keras.layers.Permute((3, 1, 2))(image) if channels_first else image)
    if ends:
        outputs = Chosen(output, classes, kind, name="chosen")(outputs)
    return keras.Model(image, outputs, name=teacher.name)


def inference_outputs(teacher, images):
    """The outputs of a model in inference mode, or of a function."""
    return teacher(images, training=False) if isinstance(teacher, keras.layers.Layer) else teacher(images)
