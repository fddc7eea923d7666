"""Examples -> `tf.data` batches, whose order and augmentation are a pure function of (seed, epoch, position).

So teacher, control and student see the same pixels in the same order, a run that is resumed in mid-epoch sees what
it would have seen, and every replica or worker computes its share of the same global batch.
"""

import os
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

from kdistill.data.augmentation import NONE, NOTHING, augment, key, mixed, mixes, mixture, random_generator, windows
from kdistill.data.lazy_images import EncodedImages, cut, decoder, middle
from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.recipe import Data

WHOLE_BATCH = (0, 1)  # part 0 of 1
CORES = os.cpu_count() or 1
AT_ONCE, PREFETCH = min(4, CORES), 2  # batches: those of ImageNet take 150 MB in float32


def without_autotuning(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The data set without autotuning, so that an epoch ends when its last batch is there.

    The thread that tunes sleeps for 10, 20, 40, ... ms, and the end of an iterator often waits for it to wake: an
    epoch of 0.7 s then takes 1.27 s (TensorFlow 2.21; `benchmarks/input_pipeline.py` measures it). A run opens a data
    set for each epoch. The option holds for what is done with the data set afterwards too.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.with_options(options)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` examples in this epoch, int64 `[count]`: every example once."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def steps_per_epoch(examples: Examples, batch_size: int) -> int:
    """Whole batches only: an incomplete last one is left to the next epoch's order, so that no step weighs more."""
    return max(1, len(examples) // batch_size)


def training_batches(
    examples: Examples,
    data: Data,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    share: tuple[int, int] = WHOLE_BATCH,
    teacher_logits: tf.data.Dataset | None = None,
) -> tf.data.Dataset:
    """One epoch from its step `first_step` on: `(float32 pixels 0..255 [batch, h, w, c], int32 labels [batch])`.

    With `data.mixup` or `data.cutmix` the labels are float32 distributions `[batch, classes]`. An epoch is a data set
    of its own: Keras lets `steps_per_execution` run over the end of an epoch into the next one where a single data set
    holds them all. `share`, (i, n): of each batch only part i of n, the same bits as in the whole one; the other images
    are neither read nor decoded (but for one, where images are mixed in pairs). With `teacher_logits`, a data set of
    one element for each step, targets are `{"labels": ..., "teacher_logits": ...}`.
    """
    batch_size = min(batch_size, len(examples))
    kept = positions(batch_size, share)
    # Of a part that is mixed the first image needs its neighbor, the last one of the part before.
    blend = mixes(data)
    apart = blend and len(kept) < batch_size
    used = np.concatenate([kept[:1] - 1, kept]) % batch_size if apart else kept
    steps = range(first_step, steps_per_epoch(examples, batch_size))
    images, shape = examples.images, examples.images.shape[1:]
    encoded = isinstance(images, EncodedImages)
    if blend and examples.classes is None:
        raise InputError("Mixed labels need to know how many classes there are: give Examples(..., classes=N).")

    def chosen(step: int) -> np.ndarray:
        return indexes[step * batch_size + used]

    indexes = epoch_order(seed, epoch, len(examples))

    def plan():
        """For each step: indexes, the key of shift and flip, parts to cut out, and what is mixed in."""
        for step in steps:
            crops = data.crop_area < 1 and not encoded
            cuts = windows(shape, batch_size, data, seed, epoch, step)[used] if crops else NONE
            amount, box = mixture(data, shape, seed, epoch, step) if blend else (0.0, NOTHING)
            yield chosen(step), key(seed, epoch, step), cuts, amount, box

    def looks():
        """For each step: which images are read, and the part of each that is looked at."""
        for step in steps:
            places = images.places[chosen(step)]
            headers = images.store.headers[places]
            if data.crop_area < 1:
                draws = random_generator(seed, epoch, step, "crop").random((batch_size, 4))[used]
                yield images.store.elements(places), cut(headers, images.side, draws, data.crop_area)
            else:
                yield images.store.elements(places), middle(headers, images.side)

    signature = (
        tf.TensorSpec([len(used)], tf.int64),
        tf.TensorSpec([2], tf.int32),
        tf.TensorSpec([None, 4], tf.float32),
        tf.TensorSpec([], tf.float32),
        tf.TensorSpec([4], tf.int32),
    )
    batches = tf.data.Dataset.from_tensor_slices(_columns(plan(), signature))
    labels = tf.constant(examples.labels)
    beside = {} if teacher_logits is None else {"teacher_logits": teacher_logits}
    if encoded:
        beside["pictures"] = _pictures(images, looks()).batch(len(used), drop_remainder=True)
    else:
        pixels = tf.constant(images)

    def finished(plan, beside):
        places, draw, cuts, amount, box = plan
        pictures = beside.get("pictures")
        # Gathered and augmented by the batch: 3 to 4 times the throughput of mapping single small images. uint8 until
        # the end: a quarter of the memory.
        found = tf.gather(pixels, places) if pictures is None else pictures
        if data.crop_area < 1 and not encoded:
            found = tf.image.crop_and_resize(found, cuts, tf.range(len(used)), shape[:2])
        found, answers = augment(found, data, draw, batch_size, used), tf.gather(labels, places)
        if blend:
            found, answers = mixed(found, answers, amount, box, examples.classes)
        if apart:
            found, answers = found[1:], answers[1:]
        return found, _targets(answers, beside)

    # In one map: a second one for what is beside costs a small student's step a twentieth of its time.
    batches = tf.data.Dataset.zip((batches, beside))
    return without_autotuning(batches.map(finished, num_parallel_calls=AT_ONCE, deterministic=True).prefetch(PREFETCH))


def _targets(labels: tf.Tensor, beside: dict):
    """Labels, and the teacher's logits where there are some, as `Supervised` takes them."""
    logits = beside.get("teacher_logits")
    return labels if logits is None else {"labels": labels, "teacher_logits": logits}


def positions(batch_size: int, share: tuple[int, int]) -> np.ndarray:
    """The positions in a batch that part i of n holds, int64, in their order; sizes differ by one at most."""
    number, count = share
    return np.arange(batch_size * number // count, batch_size * (number + 1) // count)


def evaluation_batches(
    examples: Examples, batch_size: int, teacher_logits: tf.data.Dataset | None = None
) -> tf.data.Dataset:
    """Every example once, in its own order: `(float32 pixels, int32 labels, float32 weights)`.

    The last batch is padded with images that have no label (-1) and no weight (0), which metrics leave out: a batch
    of another shape would be traced again, and an empty one on a replica crashes. `teacher_logits` as above.
    """
    padding, images = -len(examples) % batch_size, examples.images
    labels = np.concatenate([examples.labels, np.full(padding, -1, np.int32)])
    weights = np.concatenate([np.ones(len(examples), np.float32), np.zeros(padding, np.float32)])
    if isinstance(images, EncodedImages):
        places = np.concatenate([images.places, np.repeat(images.places[-1:], padding)])

        def looks():
            for start in range(0, len(places), batch_size):
                some = places[start : start + batch_size]
                yield images.store.elements(some), middle(images.store.headers[some], images.side)

        pixels = _pictures(images, looks())
    else:
        padded = np.concatenate([images, np.zeros((padding, *images.shape[1:]), np.uint8)])
        pixels = tf.data.Dataset.from_tensor_slices(padded)
    batches = tf.data.Dataset.zip(pixels, *map(tf.data.Dataset.from_tensor_slices, (labels, weights)))
    batches = batches.batch(batch_size, drop_remainder=True)
    beside = {} if teacher_logits is None else {"teacher_logits": teacher_logits}
    batches = tf.data.Dataset.zip((batches, beside))
    return without_autotuning(
        batches.map(lambda b, more: (tf.cast(b[0], tf.float32), _targets(b[1], more), b[2])).prefetch(PREFETCH)
    )


def _columns(rows: Iterable[tuple], signature: tuple[tf.TensorSpec, ...]) -> tuple[np.ndarray, ...]:
    """What each step is planned to do, of a whole epoch: arrays `[steps, ...]`, some hundred bytes for a step.

    Ready before the epoch begins, as a Python generator inside `tf.data` takes the interpreter from the training loop
    and a tenth of a second to start.
    """
    rows = list(rows)
    if not rows:
        return tuple(
            np.zeros([0, *(size or 0 for size in each.shape)], each.dtype.as_numpy_dtype) for each in signature
        )
    return tuple(
        np.array(column, each.dtype.as_numpy_dtype)
        for column, each in zip(zip(*rows, strict=True), signature, strict=True)
    )


def _pictures(images: EncodedImages, looks: Iterable[tuple]) -> tf.data.Dataset:
    """uint8 `[side, side, 3]`, one after the other as `looks` asks for them, several decoded at a time."""
    parts = [(images.store.elements(images.places[:0]), np.zeros((0, 5), np.int32)), *looks]
    elements, boxes = map(np.concatenate, zip(*parts, strict=True))
    kinds = set(boxes[:, 4].tolist())
    decode = decoder(images.side, kinds.pop() if len(kinds) == 1 else None)
    return tf.data.Dataset.from_tensor_slices((elements, boxes)).map(
        lambda element, box: decode(images.store.content(element), box),
        num_parallel_calls=CORES,
        deterministic=True,
    )
