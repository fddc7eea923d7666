"""A trained Keras teacher that LiteRT with XNNPACK runs, in float32 or int8.

On a CPU this can be faster than TensorFlow, by network and machine; `folding.state_change` measures and says it.
The teacher becomes a `.tflite` file, and from then on it is a teacher like any other file: a process of its own answers
batches, with a thread for each core.
"""

import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion.convert import convert
from kdistill.conversion.float32 import prepare
from kdistill.errors import InputError
from kdistill.networks import folding
from kdistill.networks.heads import Head, exclusive_kind
from kdistill.networks.outputs import as_logits
from kdistill.networks.signatures import heads_of, image_shape, subject_of
from kdistill.recipe import Profile
from kdistill.recipe.values import CLASSES, LITERT
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.as_model import as_model
from kdistill.teachers.foreign import teacher as open_file


@keras.saving.register_keras_serializable(package="kdistill")
class BeforeSoftmax(keras.layers.Layer):
    """The numbers before the softmax of a teacher's outputs: int8 would round most probabilities to 0."""

    def __init__(self, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.built = True

    def call(self, outputs):
        return as_logits(outputs, "probabilities")


def faster_teacher(
    model: keras.Model,
    images: np.ndarray,
    precision: str | None = None,
    say: Callable[[str], None] = print,
    taps: Collection[str] = (),
    calibration: np.ndarray | None = None,
) -> keras.Model:
    """The teacher for forward passes: a copy for inference, see `folding.checked_inference_copy`, or one in LiteRT.

    Args:
        model: a trained teacher of images with exclusive classes.
        images: raw pixels `[n, height, width, channels]`, on which it is compared with the teacher.
        precision: as `Recipe.teacher_precision`.
        say: receives how logits, classes and speed change.
        taps: names of layers that keep their outputs; not with LiteRT, which gives logits only.
        calibration: raw pixels that show the ranges of int8, other images than `images`. None: `images`.

    Returns:
        A Keras model, images -> logits. One in LiteRT has no weights, and is not for saving.

    Raises:
        InputError: LiteRT cannot run the teacher.
        CheckFailed: the copy gives other logits than the teacher.
    """
    taps = [tap for tap in taps if tap != "logits"]
    if taps and precision in LITERT:
        raise InputError(
            f"teacher_precision={precision} gives the logits of a teacher, and terms use its {', '.join(taps)}. Omit "
            "teacher_precision."
        )
    copy = folding.checked_inference_copy(model, images, None if precision in LITERT else precision, say, taps)
    if precision not in LITERT:
        return copy
    content = teacher_file(copy, precision, images if calibration is None else calibration)
    folder = tempfile.TemporaryDirectory(prefix="kdistill-teacher-")
    path = Path(folder.name, f"{model.name.replace('/', '_')}.tflite")
    path.write_bytes(content)
    foreign = open_file(path, outputs="logits").teacher
    foreign.keeps = folder
    classes = copy.output_shape[-1]
    foreign.width = classes
    twin = as_model(Adapted(foreign, outputs="logits"), tuple(images.shape[1:]), classes, model.name)
    folding.state_change(model, copy, twin, images, precision, say)
    return twin


def teacher_file(model: keras.Model, precision: str, calibration: np.ndarray) -> bytes:
    """The bytes of a `.tflite` file, raw pixels -> logits, for a teacher in `litert...`; equal for equal teachers.

    Raises `InputError` for a teacher that LiteRT cannot run, or whose outputs are not exclusive classes.
    """
    try:
        heads = heads_of(model, strict=False)
        if len(heads) != 1:
            raise InputError(f"it has the outputs {', '.join(heads)}; expected one.")
        head = next(iter(heads.values()))
        if exclusive_kind(head, subject_of(model, "teacher")) == "probabilities":
            image = keras.Input(image_shape(model), name="image")
            model = keras.Model(image, BeforeSoftmax(name="logits")(model(image)), name=model.name)
        prepared = prepare(model, CLASSES)
        profile = Profile(precision, quantization=LITERT[precision])
        return convert(prepared.model, profile, calibration, {"logits": Head(CLASSES, "logits", head.shape)})
    except InputError as error:
        raise InputError(
            f"teacher_precision={precision} cannot be used with the teacher '{model.name}': {error} Omit "
            "teacher_precision, or use mixed_bfloat16."
        ) from error
