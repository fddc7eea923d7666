"""Trains the teacher of MNIST that ships with kdistill, from the four IDX files of the original.

    python benchmarks/make_mnist_teacher.py FOLDER_OF_IDX_FILES [FILE.npz]

`small_cnn` with widths 32, 64 and 128 (105,386 parameters), on all 60,000 training images, shifted, rotated and zoomed
at random; the rate follows one cosine, nothing is picked, and the test images are only counted. Training goes on where
it was interrupted (`FILE.backup`). Prints the test accuracy and the SHA-256 that its note states.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill import files
from kdistill.data import mnist
from kdistill.errors import InputError
from kdistill.networks import architectures, weights
from kdistill.recipe import Data

WIDTHS, SEED, EPOCHS, BATCH, RATE, DECAY = (32, 64, 128), 0, 16, 128, 4e-3, 1e-2
SHIFT, ROTATION, ZOOM = 0.1, 0.03, 0.1  # shares of the image, of a full turn, of the size


def network() -> keras.Model:
    """The teacher, untrained."""
    return architectures.small_cnn((28, 28, 1), 10, WIDTHS)


def rate(steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """The learning rate: it rises in a twentieth of the steps, and falls along a cosine."""
    return keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=RATE, warmup_steps=steps // 20, alpha=1e-3)


def batches(images: np.ndarray, labels: np.ndarray, seed: int) -> tf.data.Dataset:
    """Shuffled images, each shifted, rotated and zoomed at random, and their labels."""
    warp = keras.Sequential(
        [
            keras.layers.RandomTranslation(SHIFT, SHIFT, fill_mode="constant", seed=seed),
            keras.layers.RandomRotation(ROTATION, fill_mode="constant", seed=seed + 1),
            keras.layers.RandomZoom(ZOOM, fill_mode="constant", seed=seed + 2),
        ]
    )
    data = tf.data.Dataset.from_tensor_slices((images, labels.astype("int32")))
    data = data.shuffle(len(images), seed=seed).batch(BATCH, drop_remainder=True)
    return data.map(lambda x, y: (warp(tf.cast(x, tf.float32), training=True), y), 2).prefetch(2)


def train(images: np.ndarray, labels: np.ndarray, backup: Path) -> keras.Model:
    """The trained network."""
    keras.utils.set_random_seed(SEED)
    model = network()
    data = batches(images, labels, SEED)
    steps = EPOCHS * (len(images) // BATCH)
    model.compile(
        keras.optimizers.AdamW(rate(steps), weight_decay=DECAY),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(data, epochs=EPOCHS, verbose=2, callbacks=[keras.callbacks.BackupAndRestore(backup)])
    return model


def main(folder: str, out: Path = weights.SHIPPED / "mnist_cnn.npz") -> None:
    """Trains on the IDX files in `folder` and writes `out`. Raises `InputError` for damaged files."""
    parts, _, _ = mnist.mnist(Data(), Path(folder), False, print)
    images, labels = parts["train"]
    trained = train(images[..., None], labels, out.with_suffix(".backup"))
    arrays = {
        f"{layer.name}/{weight.name}": weight.numpy().astype("float16")
        for layer in trained.layers
        for weight in layer.weights
    }
    with files.atomic_file(out) as part:
        np.savez_compressed(part, **arrays)
    written = network()
    weights.load(written, [(out, None)])
    images, labels = parts["test"]
    right = int((written.predict(images[..., None].astype("float32"), verbose=0).argmax(axis=1) == labels).sum())
    print(f"{out}: {out.stat().st_size:,} bytes, sha256 {files.sha256(out)}")
    print(f"{right:,} of {len(labels):,} test images right")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], *map(Path, sys.argv[2:]))
    except InputError as error:
        sys.exit(f"Error: {error}")
