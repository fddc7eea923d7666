"""Examples -> `tf.data` batches, whose order and augmentation are a pure function of (seed, epoch, step).

So teacher, control and student train on the same pixels in the same order, a run that is resumed inside an epoch
continues with the same batches, and every replica or worker computes its share of the same global batch.
"""

import os
import weakref
from collections.abc import Iterable, Iterator

import numpy as np
import tensorflow as tf

from kdistill.data.arrays import are_images, map_arrays
from kdistill.data.augmentation import (
    NO_BOX,
    NO_WINDOWS,
    augment,
    draw_mixture,
    mix_neighbors,
    mixes_images,
    random_generator,
    random_key,
    random_windows,
)
from kdistill.data.image_files import center_crop_boxes, decoded_at_once, decoder_for, random_crop_boxes
from kdistill.data.lazy_images import EncodedImages
from kdistill.data.splits import Examples
from kdistill.errors import InputError
from kdistill.recipe import Data

WHOLE_BATCH = (0, 1)  # part 0 of 1
CORES = os.cpu_count() or 1
_TENSORS: dict[int, tuple[weakref.ref, weakref.ref]] = {}  # by id of an array: the array, and its tensor
PARALLEL_BATCHES, PREFETCH = min(4, CORES), 2  # batches: those of ImageNet take 150 MB in float32


def without_autotuning(batches: tf.data.Dataset) -> tf.data.Dataset:
    """The data set without autotuning, so that an epoch ends with its last batch.

    The tuning thread sleeps for 10, 20, 40, ... ms, and the end of an iterator often waits for it: an epoch of 0.7 s
    then takes 1.27 s (TensorFlow 2.21; `benchmarks/input_pipeline.py` measures it). A run opens a data set for every
    epoch. The option also applies to what is added to the data set later.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return batches.with_options(options)


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` examples in this epoch, int64 `[count]`: every example once."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


def steps_per_epoch(examples: Examples, batch_size: int) -> int:
    """Whole batches only: an incomplete last batch is dropped, so that no step weighs its images more."""
    return max(1, len(examples) // batch_size)


def share_positions(batch_size: int, share: tuple[int, int]) -> np.ndarray:
    """The positions in a batch that part i of n holds, int64, in their order; sizes differ by one at most."""
    number, count = share
    return np.arange(batch_size * number // count, batch_size * (number + 1) // count)


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
    """The batches of one epoch: `(float32 pixels 0..255 [batch, h, w, c], int32 labels [batch])`.

    Other inputs and labels come as they are (uint8 as float32), several in dicts by name.

    An epoch is a data set of its own: from a single data set of all epochs, `steps_per_execution` of Keras would run
    over the end of an epoch into the next one.

    Args:
        data: The augmentation. With `data.mixup` or `data.cutmix`, labels are float32 distributions `[batch, classes]`.
        first_step: The first step of the epoch that is read.
        share: (i, n): part i of n of every batch, the same bits as in the whole batch. The other images are not read
            (except one neighbor, if images are mixed).
        teacher_logits: One element for every step; targets are then `{"labels": ..., "teacher_logits": ...}`.

    Raises:
        InputError: Labels are mixed, but `examples.classes` is None.
    """
    batch_size = min(batch_size, len(examples))
    positions = share_positions(batch_size, share)
    mix = mixes_images(data)
    if mix and examples.classes is None:
        raise InputError("Mixed labels need the number of classes: give Examples(..., classes=N).")
    # The first image of a part is mixed with its neighbor, which is the last image of the part before.
    with_neighbor = mix and len(positions) < batch_size
    used = np.concatenate([positions[:1] - 1, positions]) % batch_size if with_neighbor else positions
    steps = range(first_step, steps_per_epoch(examples, batch_size))
    order = epoch_order(seed, epoch, len(examples))
    indexes = {step: order[step * batch_size + used] for step in steps}
    images, is_image = examples.inputs, are_images(examples.inputs)
    shape = images.shape[1:] if is_image else ()
    if data.crop_area == 1:
        images = _decoded(images)
    encoded = isinstance(images, EncodedImages)
    crop_windows = data.crop_area < 1 and not encoded  # encoded images are cropped while they are decoded

    def plan() -> Iterator[tuple]:
        """For every step: indexes, the key of shift and flip, windows to crop, share and box of the mixture."""
        for step in steps:
            windows = random_windows(shape, batch_size, data, seed, epoch, step)[used] if crop_windows else NO_WINDOWS
            amount, box = draw_mixture(data, shape, seed, epoch, step) if mix else (0.0, NO_BOX)
            yield indexes[step], random_key(seed, epoch, step), windows, amount, box

    def crops() -> Iterator[tuple]:
        """For every step: the encoded images to read, and the box of every image to decode."""
        for step in steps:
            stored = images.indexes[indexes[step]]
            headers = images.store.headers[stored]
            if data.crop_area < 1:
                draws = random_generator(seed, epoch, step, "crop").random((batch_size, 4))[used]
                yield images.store.elements(stored), random_crop_boxes(headers, images.side, draws, data.crop_area)
            else:
                yield images.store.elements(stored), center_crop_boxes(headers, images.side)

    signature = (
        tf.TensorSpec([len(used)], tf.int64),
        tf.TensorSpec([2], tf.int32),
        tf.TensorSpec([len(used) if crop_windows else 0, 4], tf.float32),
        tf.TensorSpec([], tf.float32),
        tf.TensorSpec([4], tf.int32),
    )
    batches = tf.data.Dataset.from_tensor_slices(_columns(plan(), signature))
    all_labels = map_arrays(tf.constant, examples.labels)
    extras = {} if teacher_logits is None else {"teacher_logits": teacher_logits}
    if encoded:
        extras["decoded"] = _decoded_images(images, crops()).batch(len(used), drop_remainder=True)
    else:
        all_inputs = map_arrays(_in_memory, images)

    def finish(plan, extras):
        places, key, windows, amount, box = plan
        # Gathered and augmented by the batch: 3 to 4 times the throughput of mapping single small images. uint8 until
        # the end: a quarter of the memory.
        labels = map_arrays(lambda array: tf.gather(array, places), all_labels)
        if not is_image:
            return _as_floats(map_arrays(lambda array: tf.gather(array, places), all_inputs)), _targets(labels, extras)
        pixels = extras["decoded"] if encoded else tf.gather(all_inputs, places)
        if crop_windows:
            pixels = tf.image.crop_and_resize(pixels, windows, tf.range(len(used)), shape[:2])
        pixels = augment(pixels, data, key, batch_size, used)
        if mix:
            pixels, labels = mix_neighbors(pixels, labels, amount, box, examples.classes)
        pixels = tf.cast(pixels, tf.float32)
        if with_neighbor:
            pixels, labels = pixels[1:], labels[1:]
        return pixels, _targets(labels, extras)

    # One map: a second one for the teacher's logits costs a small student 5 % of its step.
    batches = tf.data.Dataset.zip((batches, extras))
    batches = batches.map(finish, num_parallel_calls=PARALLEL_BATCHES, deterministic=True)
    return without_autotuning(batches.prefetch(PREFETCH))


def evaluation_batches(
    examples: Examples, batch_size: int, teacher_logits: tf.data.Dataset | None = None
) -> tf.data.Dataset:
    """Every example once, in its own order: `(float32 pixels, int32 labels, float32 weights)`.

    The last batch is padded with images of label -1 and weight 0, which metrics ignore: TensorFlow would trace a batch
    of another shape again, and an empty batch on a replica crashes. `teacher_logits`: as in `training_batches`.
    """
    padding, images = -len(examples) % batch_size, _decoded(examples.inputs)
    labels = map_arrays(lambda array: _padded(array, padding, -1), examples.labels)
    weights = np.concatenate([np.ones(len(examples), np.float32), np.zeros(padding, np.float32)])
    if isinstance(images, EncodedImages):
        stored = np.concatenate([images.indexes, np.repeat(images.indexes[-1:], padding)])

        def crops() -> Iterator[tuple]:
            for start in range(0, len(stored), batch_size):
                batch = stored[start : start + batch_size]
                yield images.store.elements(batch), center_crop_boxes(images.store.headers[batch], images.side)

        pixels = _decoded_images(images, crops())
    else:
        pixels = tf.data.Dataset.from_tensor_slices(map_arrays(lambda array: _padded(array, padding, 0), images))
    batches = tf.data.Dataset.zip(pixels, *map(tf.data.Dataset.from_tensor_slices, (labels, weights)))
    batches = batches.batch(batch_size, drop_remainder=True)
    extras = {} if teacher_logits is None else {"teacher_logits": teacher_logits}

    def finish(batch, extras):
        inputs, labels, weights = batch
        return _as_floats(inputs), _targets(labels, extras), weights

    batches = tf.data.Dataset.zip((batches, extras))
    return without_autotuning(batches.map(finish).prefetch(PREFETCH))


def _decoded(images):
    """The pixels of encoded images that are in memory; other inputs as they are."""
    return images.pixels if isinstance(images, EncodedImages) and images.pixels is not None else images


def _padded(array: np.ndarray, count: int, value: int) -> np.ndarray:
    """The array with so many more examples that are `value` everywhere; of floats NaN in the place of -1."""
    missing = float("nan") if value < 0 and array.dtype.kind == "f" else value
    return np.concatenate([array, np.full((count, *array.shape[1:]), missing, array.dtype)])


def _as_floats(inputs):
    """Inputs of bytes as float32, which networks scale themselves; others as they are."""
    return map_arrays(lambda part: tf.cast(part, tf.float32) if part.dtype == tf.uint8 else part, inputs)


def _in_memory(images: np.ndarray) -> tf.Tensor:
    """The images as a tensor, which data sets that are open at the same time share: `tf.constant` copies."""
    array, tensor = _TENSORS.get(id(images), (lambda: None, lambda: None))
    shared = tensor() if array() is images else None
    if shared is None:
        for key in [key for key, (array, _) in _TENSORS.items() if array() is None]:
            del _TENSORS[key]
        shared = tf.constant(images)
        _TENSORS[id(images)] = weakref.ref(images), weakref.ref(shared)
    return shared


def _targets(labels: tf.Tensor, extras: dict):
    """Labels, with the teacher's logits if there are any, as `Supervised` takes them."""
    logits = extras.get("teacher_logits")
    return labels if logits is None else {"labels": labels, "teacher_logits": logits}


def _columns(rows: Iterable[tuple], signature: tuple[tf.TensorSpec, ...]) -> tuple[np.ndarray, ...]:
    """The plans of all steps of an epoch as arrays `[steps, ...]`, some hundred bytes for a step.

    They are complete before the epoch begins: a Python generator inside `tf.data` takes the interpreter lock from the
    training loop, and a tenth of a second to start.
    """
    rows = list(rows)
    if not rows:
        return tuple(
            np.zeros([0, *(size or 0 for size in spec.shape)], spec.dtype.as_numpy_dtype) for spec in signature
        )
    return tuple(
        np.array(column, spec.dtype.as_numpy_dtype)
        for column, spec in zip(zip(*rows, strict=True), signature, strict=True)
    )


def _decoded_images(images: EncodedImages, crops: Iterable[tuple]) -> tf.data.Dataset:
    """uint8 `[side, side, 3]`, one image after the other in the order of `crops`; several are decoded in parallel."""
    parts = [(images.store.elements(images.indexes[:0]), np.zeros((0, 5), np.int32)), *crops]
    elements, boxes = map(np.concatenate, zip(*parts, strict=True))
    decode = decoder_for(images.side, boxes)
    return tf.data.Dataset.from_tensor_slices((elements, boxes)).map(
        lambda element, box: decode(images.store.content(element), box),
        num_parallel_calls=decoded_at_once(images.store.headers[images.indexes], CORES),
        deterministic=True,
    )
