"""Stored outputs of the teacher in place of the teacher, for the batches of a compression."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import keras
import tensorflow as tf

from kdistill.compression.finetune import Batches
from kdistill.data.batches import without_autotuning
from kdistill.data.splits import Splits
from kdistill.errors import InputError
from kdistill.recipe import SCHEMES, Data, Stage
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.as_model import as_model
from kdistill.teachers.cache_choice import cache_pays
from kdistill.teachers.replay import Replay

BATCH = 256  # validation images


def stored_outputs(
    cache: str | Path | Replay | None,
    teacher,
    data,
    stage: Stage,
    seed: int,
    augment: Data | None,
    say: Callable[[str], None],
) -> Replay | None:
    """The teacher's outputs for the batches of a stage, computed where they are missing. None: the teacher runs.

    Args:
        cache: `auto`, which stores where that saves passes of the teacher, a folder, or outputs that are complete.
        teacher, data, seed, augment, say: as for `compress`.

    Raises `InputError` for teachers that are no Keras models, and data other than `Splits`.
    """
    if cache is None or cache == "off" or isinstance(cache, Replay):
        return cache if isinstance(cache, Replay) else None
    if teacher is None:
        raise InputError(f"cache={str(cache)!r} does nothing without a teacher. Pass a teacher, or leave it out.")
    if not isinstance(data, Splits):
        raise InputError(
            "cache expects data=Splits of kdistill.data.splits.load, whose fingerprint names what is stored; received "
            f"{type(data).__name__}. Leave cache out, or pass Splits."
        )
    shape, classes = data.train.images.shape[1:], len(data.class_names)
    several = isinstance(teacher, (list, tuple))
    models = [_as_keras(one, shape, classes) for one in (teacher if several else [teacher])]
    root = None if cache == "auto" else Path(cache)
    own = models if several else models[0]
    replay = Replay(own, data, augment or Data(), stage.batch_size, seed, root)
    if not cache_pays(replay, str(cache), stage.epochs, None, len(SCHEMES[stage.scheme]), say):
        return None
    replay.build(replay.views(stage.epochs), say)
    return replay


def with_stored(batches: Batches, replay: Replay, splits: Splits) -> Batches:
    """The batches of a compression with the stored outputs of its teacher."""
    validation = splits.validation
    logits = replay.validation.read_rows(0, slice(0, len(validation)))
    targets = {"labels": validation.labels, "teacher_logits": logits}
    examples = tf.data.Dataset.from_tensor_slices((validation.images, targets)).batch(BATCH)
    examples = examples.map(lambda images, targets: (tf.cast(images, tf.float32), targets))
    return dataclasses.replace(batches, taught=replay.training_batches, taught_validation=without_autotuning(examples))


def _as_keras(teacher, shape, classes: int):
    """A teacher that sees the images in its own way, as one Keras model; any other as it is."""
    if isinstance(teacher, Adapted):
        name = teacher.teacher.name if isinstance(teacher.teacher, keras.Model) else "teacher"
        return as_model(teacher, tuple(shape), classes, name)
    return teacher
