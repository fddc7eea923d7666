"""Images per second from JPEGs at 224 pixels, and from arrays: kdistill's pipeline against plain `tf.data`.

    python benchmarks/input_pipeline.py [--images 2432] [--repeats 7]

Makes its own JPEGs, 320x256 to 500x375. "plain" reads, decodes and resizes the whole images, as many at a time as
there are cores, batched and prefetched, with tf.data's autotuning off; "autotuned" is the same with AUTOTUNE, as in
TensorFlow's guides, where an epoch's end often waits for the tuner's thread (see
`kdistill.data.batches.without_autotuning`). "evaluation" does what a run does (the middle square, padding, weights),
"training" too (a new order, rounding to bytes), "augmented" with flips and random parts as for ImageNet, "mixed" with
mixup and cutmix as well; "plain augmented" and "plain mixed" do the same with tf.image, as TensorFlow's guides do;
"keras mixed" is plain with Keras's layers RandomFlip, MixUp and CutMix; "kept" is training on decoded images that stay
in memory, as those of a small folder do. All read the same files.

Arrays are 20,000 images of 32x32, in batches of 128: "plain" gathers the batches of a shuffled order; the others also
flip and shift: "keras" with RandomFlip and RandomTranslation, "tf.image" image by image, "ours" as a run does. They
take turns in one process, building the data set is part of the time, and every ratio is of neighbors in time; the
median counts. The processor's time says the same on a machine that has other work. Exit status 1 if evaluation or
training has less than 0.9 of plain's images per second.
"""

import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import arguments, save

SIDE, BATCH, LEAST = 224, 32, 0.9
SIZES = ((256, 320), (375, 500), (333, 500), (360, 480))  # height, width


def make(root: Path, count: int) -> None:
    """`count` JPEGs of smooth noise in two folders of classes, for training and for testing."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    for i in range(count):
        size = SIZES[i % len(SIZES)]
        small = random.integers(0, 256, (12, 16, 3)).astype(np.float32)
        large = tf.image.resize(small, size, method="bicubic") + random.normal(0, 12, (*size, 3))
        content = tf.io.encode_jpeg(tf.cast(tf.clip_by_value(large, 0, 255), tf.uint8), quality=90).numpy()
        for part in ("train", "val"):
            folder = root / part / f"class{i // len(SIZES) % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i:05}.jpg").write_bytes(content)


def plain(paths: list[str], autotuned: bool):
    """Decode and resize; without autotuning, which is the faster on a short epoch, or with it."""
    import tensorflow as tf

    from kdistill.data.batches import CORES, PREFETCH, without_autotuning

    def decode(path):
        return tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path), channels=3), (SIDE, SIDE))

    files = tf.data.Dataset.from_tensor_slices(paths)
    if autotuned:
        return files.map(decode, num_parallel_calls=tf.data.AUTOTUNE).batch(BATCH).prefetch(tf.data.AUTOTUNE)
    return without_autotuning(files.map(decode, num_parallel_calls=CORES).batch(BATCH).prefetch(PREFETCH))


def plain_augmented(paths: list[str], mix: bool):
    """Random parts of shuffled files, flipped by chance; each batch mixed or cut into, if asked for."""
    import tensorflow as tf

    from kdistill.data.batches import CORES, PARALLEL_BATCHES, PREFETCH, without_autotuning

    def decode(path):
        content = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(content),
            tf.zeros([1, 0, 4]),
            area_range=(0.25, 1.0),
            min_object_covered=0.0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        part = tf.image.resize(tf.io.decode_and_crop_jpeg(content, window, channels=3), (SIDE, SIDE))
        return tf.image.random_flip_left_right(part)

    def mixed(images):
        others, label = tf.roll(images, 1, 0), tf.one_hot(tf.zeros(BATCH, tf.int32), 2)
        one, two = (tf.random.gamma([], 0.2) for _ in range(2))
        share = one / (one + two)
        side = tf.cast(SIDE * tf.sqrt(tf.random.uniform([])), tf.int32)
        top, left = (tf.random.uniform([], 0, SIDE - side + 1, tf.int32) for _ in range(2))
        rows, columns = ((tf.range(SIDE) >= first) & (tf.range(SIDE) < first + side) for first in (top, left))
        box = (rows[:, None] & columns)[None, :, :, None]
        cut = tf.random.uniform([]) < 0.5
        images = tf.cond(cut, lambda: tf.where(box, others, images), lambda: images + share * (others - images))
        return images, label + share * (tf.roll(label, 1, 0) - label)

    data = tf.data.Dataset.from_tensor_slices(paths).shuffle(len(paths))
    data = data.map(decode, num_parallel_calls=CORES).batch(BATCH, drop_remainder=True)
    data = data.map(mixed, num_parallel_calls=PARALLEL_BATCHES) if mix else data
    return without_autotuning(data.prefetch(PREFETCH))


def keras_mixed(paths: list[str]):
    """Plain, with layers of Keras for what "mixed" does besides random parts; each batch is mixed in one way."""
    import keras
    import tensorflow as tf

    from kdistill.data.batches import PARALLEL_BATCHES

    flip, up, cut = keras.layers.RandomFlip("horizontal"), keras.layers.MixUp(0.2), keras.layers.CutMix()

    def mixed(images):
        batch = {"images": flip(images, training=True), "labels": tf.one_hot(tf.zeros(BATCH, tf.int32), 2)}
        half = tf.random.uniform([]) < 0.5
        return tf.cond(half, lambda: up(batch, training=True)["images"], lambda: cut(batch, training=True)["images"])

    return plain(paths, autotuned=False).map(mixed, num_parallel_calls=PARALLEL_BATCHES)


def measured(build, size: int = BATCH) -> tuple[float, float]:
    """Images per second of wall time, and of the processor's time, of the batches that `build` returns."""
    images, wall, work = 0, time.perf_counter(), time.process_time()
    for batch in build():
        images += int((batch[2] > 0).numpy().sum()) if isinstance(batch, tuple) and len(batch) == 3 else size
    return images / (time.perf_counter() - wall), images / (time.process_time() - work)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--images", type=int, default=2432)
    options = parser.parse_args()
    from kdistill.cli.app import import_tensorflow

    import_tensorflow()
    from kdistill.data import batches, lazy_images, splits
    from kdistill.recipe import Data

    with tempfile.TemporaryDirectory(prefix="kdistill-") as folder:
        make(Path(folder), options.images // BATCH * BATCH)
        settings = Data("image_folder", image_size=SIDE)
        lazy_images.KEPT_BYTES = 2 * options.images * SIDE**2 * 3
        kept = splits.load(settings, Path(folder), say=lambda text: None).test
        augmented = Data("image_folder", image_size=SIDE, flip=True, crop_area=0.25)
        mixed = dataclasses.replace(augmented, mixup=0.2, cutmix=1.0)
        paths = [str(path) for path in sorted(Path(folder, "val").rglob("*.jpg"))]
        lazy_images.KEPT_BYTES = 0  # the images above stay in their files
        test = splits.load(settings, Path(folder), say=lambda text: None).test  # the same images
        names = ("plain", "autotuned", "evaluation", "training", "augmented", "plain augmented")
        names += ("mixed", "plain mixed", "keras mixed", "kept")
        rates = {name: [] for name in names}
        for turn in range(options.repeats + 1):
            kinds = {
                "plain": lambda: plain(paths, autotuned=False),
                "autotuned": lambda: plain(paths, autotuned=True),
                "evaluation": lambda: batches.evaluation_batches(test, BATCH),
                "training": lambda turn=turn: batches.training_batches(test, settings, BATCH, 0, turn),
                "augmented": lambda turn=turn: batches.training_batches(test, augmented, BATCH, 0, turn),
                "plain augmented": lambda: plain_augmented(paths, mix=False),
                "mixed": lambda turn=turn: batches.training_batches(test, mixed, BATCH, 0, turn),
                "plain mixed": lambda: plain_augmented(paths, mix=True),
                "keras mixed": lambda: keras_mixed(paths),
                "kept": lambda turn=turn: batches.training_batches(kept, settings, BATCH, 0, turn),
            }
            for name in list(kinds) if turn % 2 else reversed(kinds):
                value = measured(kinds[name])
                if turn:  # the first turn warms up
                    rates[name].append(value)
    wall_ratios = stated(rates, "plain")
    for ours, base in (("augmented", "plain augmented"), ("mixed", "plain mixed")):
        stated({ours: rates[ours], base: rates[base]}, base)
    print("arrays, 32x32, flips and shifts")
    of_arrays = measured_arrays(options.repeats)
    stated(of_arrays, "plain arrays")
    wall_ratios |= {f"{name} / keras": ratio for name, ratio in stated(of_arrays, "keras").items() if name != "keras"}
    title = "Input pipeline: images per second, JPEGs at 224 pixels over plain tf.data, arrays over Keras's layers"
    result = {"images_per_second": rates, "of_arrays": of_arrays}
    save("input_pipeline", result, options.out, wall_ratios, title, "times")
    return int(min(wall_ratios["evaluation"], wall_ratios["training"]) < LEAST)


def measured_arrays(repeats: int) -> dict[str, list]:
    """As `measured`, by side, of images in memory."""
    import keras
    import tensorflow as tf

    from kdistill.data import batches
    from kdistill.data.splits import Examples
    from kdistill.recipe import Data

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (20_000, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, 10, len(pixels)).astype(np.int32)
    examples, settings, size = Examples(pixels, labels), Data("arrays", flip=True, shift=4), 128
    all_pixels, all_labels = tf.constant(pixels), tf.constant(labels)
    layers = keras.Sequential(
        [
            keras.layers.RandomFlip("horizontal"),
            keras.layers.RandomTranslation(1 / 8, 1 / 8, fill_mode="constant", interpolation="nearest"),
        ]
    )

    def gathered(change):
        order = random.permutation(len(pixels))[: len(pixels) // size * size].reshape(-1, size)
        data = tf.data.Dataset.from_tensor_slices(order).map(
            lambda places: (change(tf.cast(tf.gather(all_pixels, places), tf.float32)), tf.gather(all_labels, places)),
            num_parallel_calls=batches.PARALLEL_BATCHES,
        )
        return batches.without_autotuning(data.prefetch(batches.PREFETCH))

    def cropped(image):
        moved = tf.image.random_crop(tf.pad(image, [[4, 4], [4, 4], [0, 0]]), (32, 32, 3))
        return tf.image.random_flip_left_right(moved)

    kinds = {
        "plain arrays": lambda turn: gathered(lambda images: images),
        "keras": lambda turn: gathered(lambda images: layers(images, training=True)),
        "tf.image": lambda turn: gathered(lambda images: tf.map_fn(cropped, images)),
        "ours": lambda turn: batches.training_batches(examples, settings, size, 0, turn),
    }
    rates = {name: [] for name in kinds}
    for turn in range(repeats + 1):
        for name in list(kinds) if turn % 2 else reversed(kinds):
            value = measured(lambda name=name, turn=turn: kinds[name](turn), size)
            if turn:  # the first turn warms up
                rates[name].append(value)
    return rates


def stated(rates: dict[str, list], base: str) -> dict[str, float]:
    """Prints rates and their ratios to one side; returns the median ratios."""
    wall_ratios = {}
    for name, values in rates.items():
        wall, work = np.array(values).T
        walls, works = (np.divide(values, rates[base])).T
        wall_ratios[name] = np.median(walls)
        print(
            f"{name:<15} {np.median(wall):5.0f} images/s ({wall.min():.0f} to {wall.max():.0f}), to {base} "
            f"{np.median(walls):.2f} ({walls.min():.2f} to {walls.max():.2f}); for each second of the processor "
            f"{np.median(work):.0f}, to {base} {np.median(works):.2f} ({works.min():.2f} to {works.max():.2f})"
        )
    return wall_ratios


if __name__ == "__main__":
    sys.exit(main())
