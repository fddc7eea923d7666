"""Warnings about a model's inputs before a long training: a wrong normalization, and pixels that are not scaled."""

from typing import TYPE_CHECKING

import numpy as np

from kdistill.evaluation.evaluate import predict
from kdistill.teachers.gain import little_above_chance
from kdistill.teachers.input_range import LABELED, RAW, compare_accuracies, look_into

if TYPE_CHECKING:
    import keras


def teacher_warning(teacher: "keras.Model", images: np.ndarray, labels: np.ndarray, classes: int) -> str | None:
    """What looks wrong with a teacher on these images, or None.

    A teacher whose accuracy is 10 points higher with pixels in another range lacks the normalization of its training. A
    teacher below twice the accuracy of chance (for two or three classes: halfway to 1) teaches noise.
    """
    images, labels = images[:LABELED], labels[:LABELED]
    subject = f"the teacher '{teacher.name}'"
    accuracy, finding = compare_accuracies(lambda numbers: predict(teacher, numbers), images, labels, subject)
    if finding:
        return (
            f"{finding.sentence} Put this normalization in front of it, with keras.layers.Rescaling or "
            "kdistill.Adapted(teacher, mean=..., std=...)."
        )
    if accuracy < little_above_chance(classes):
        return (
            f"The accuracy of {subject} is {accuracy:.1%} on {len(labels)} images; chance is {1 / classes:.1%}. It "
            "teaches noise. Check the order of its classes, its normalization and its training."
        )
    return None


def unscaled_warning(model: "keras.Model", images: np.ndarray) -> str | None:
    """A warning if a model that is going to be trained gets these images in the wrong range, or None.

    Inputs of 0 to 255 make the usual learning rates too large by the square of 255. A first layer that normalizes
    (BatchNormalization) is fine, unless it was trained on another range.
    """
    finding = look_into(model, images, f"'{model.name}'")
    if finding is None:
        return None
    if finding.scale in RAW:
        return (
            f"{finding.sentence} At usual learning rates such a network overflows or predicts one class only. Put "
            f"Rescaling({finding.scale.factor}) before it."
        )
    return f"{finding.sentence} Give the images in the range 0 to 255."
