"""How well a teacher from a file does as it sees the images, and whether one of the usual normalizations is better."""

import dataclasses
import time

import numpy as np
import tensorflow as tf

from kdistill.networks.signatures import main_output
from kdistill.teachers.adapted import Adapted, inference_outputs
from kdistill.teachers.as_model import TeacherFile
from kdistill.teachers.gain import MIN_GAIN, better, little_above_chance
from kdistill.teachers.replay import Replay

IMAGES = 256  # on which accuracies are measured
BATCH = 256
# Of pixels 0..255. The mean and std of ImageNet are those of torchvision, the mean of BGR that of Caffe.
IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CAFFE_MEAN = (103.939, 116.779, 123.68)
USUAL = {
    "raw pixels, 0 to 255": {},
    "pixels / 255, 0 to 1": {"std": (255.0,)},
    "(pixels - 127.5) / 127.5, -1 to 1": {"mean": (127.5,), "std": (127.5,)},
    "the mean and std of ImageNet": {"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
    "BGR less the mean of ImageNet": {"bgr": True, "mean": CAFFE_MEAN},
    "BGR / 255": {"bgr": True, "std": (255.0,)},
}


def look_at(file: TeacherFile, images, labels: np.ndarray) -> tuple[str, str | None]:
    """What a teacher is, and its accuracy, as a sentence; and a warning, or None.

    The warning names the usual normalization with which the teacher is much better, or says that it is near chance.

    Args:
        images: `[n, height, width, channels]`, pixels 0..255; the first 256 with a label are used.
        labels: classes `[n]`.
    """
    places = np.flatnonzero(np.asarray(labels) >= 0)[:IMAGES]
    images, labels = np.asarray(images[places]), np.asarray(labels)[places]
    right = _right(file.adapted, images, labels)
    own = float(right.mean()) if len(labels) else 0.0
    versions = ", ".join(f"{name} {version}" for name, version in file.versions.items())
    sentence = (
        f"Teacher '{file.name}': {file.format}, '{file.file}', fingerprint {file.fingerprint}"
        f"{f', run with {versions}' if versions else ''}. Its accuracy on {len(labels)} validation images is "
        f"{own:.1%}."
    )
    if not len(labels):
        return sentence, None
    warning = None if file.format == "stored outputs" else _better(file, images, labels, right)
    classes = int(file.model.output_shape[-1])
    if warning is None and own < little_above_chance(classes):
        warning = (
            f"The accuracy of the teacher '{file.name}' is {own:.1%} on {len(labels)} images; chance is "
            f"{1 / classes:.1%}, and no usual normalization does better. It teaches noise. Check the order of "
            "its classes (--teacher-classes), its output (--teacher-output) and its training."
        )
    return sentence, warning


def _better(file: TeacherFile, images: np.ndarray, labels: np.ndarray, right: np.ndarray) -> str | None:
    """The usual normalization that a teacher lacks, as a warning; None if none gains much."""
    if right.mean() + MIN_GAIN > 1:
        return None
    results = {}
    depth = file.adapted.channels or images.shape[-1]
    plain = {"scale": 1.0, "mean": 0.0, "std": 1.0, "bgr": False, "layout": None, "output": None, "classes": None}
    for words, settings in USUAL.items():
        if depth == 3 or all(value is not True and len(value) == 1 for value in settings.values()):
            results[words] = _right(dataclasses.replace(file.adapted, **{**plain, **settings}), images, labels)
    best = better(right, results, labels, int(file.model.output_shape[-1]))
    if best is None:
        return None
    return (
        f"The accuracy of the teacher '{file.name}' is {right.mean():.1%} on {len(labels)} images, but "
        f"{results[best].mean():.1%} with {best}. Give it this normalization: {_options(USUAL[best])}."
    )


def time_sentence(model, replay: Replay, epochs: int, repeat: int | None) -> str:
    """How many passes a teacher has to make over the training images, and how long they take; measured on 256."""
    images = replay.splits.validation.images[:BATCH]
    seconds = []
    for _ in range(2):  # the first one also starts what starts once
        start = time.perf_counter()
        np.asarray(model(tf.constant(np.asarray(images), tf.float32), training=False))
        seconds.append(time.perf_counter() - start)
    views, count = replay.views(epochs, repeat), len(replay.splits.train)
    total = views * count + len(replay.splits.validation)
    each = seconds[1] / len(images)
    return (
        f"The outputs of the teacher are stored for {views} view{'s' * (views > 1)} of {count:,} training images: "
        f"{1e3 * each:.2g} ms an image, about {total * each:.0f} s in all where none is stored yet."
    )


def _right(adapted: Adapted, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Which images the teacher classifies correctly, `[n]` booleans."""
    right = np.zeros(len(labels), bool)
    for start in range(0, len(labels), BATCH):
        batch = slice(start, start + BATCH)
        outputs = inference_outputs(adapted.teacher, adapted.prepare(tf.constant(images[batch], tf.float32)))
        right[batch] = np.asarray(main_output(outputs)).argmax(axis=-1) == labels[batch]
    return right


def _options(settings: dict) -> str:
    """Options of the command line, and arguments of a recipe."""
    options = {name: value if value is True else ",".join(f"{n:g}" for n in value) for name, value in settings.items()}
    command = " ".join(f"--teacher-{name}" + ("" if value is True else f" {value}") for name, value in options.items())
    recipe = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return (
        f"{command} (in a recipe: {recipe})"
        if settings
        else "leave out --teacher-mean, --teacher-std and --teacher-bgr"
    )
