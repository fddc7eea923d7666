"""What int8 costs networks whose pixels are not scaled: after training, and by quantization-aware training.

    python benchmarks/quantization.py --data-dir FOLDER --out runs/quantization [--seeds 3] [--network cifar_quick vgg]

Trains two networks on CIFAR-10 once: `cifar_quick`, whose pixels have their mean subtracted, and `vgg`, a small VGG
behind `keras.applications.vgg16.preprocess_input` (blue, green, red; the mean of ImageNet subtracted). Their
activations are hundreds wide. Quantizes each after training, and, for each seed of the fine-tuning, by
quantization-aware training on labels alone and with the float network as the teacher. Prints the test accuracy of every
file. Writes `quantization.json`; what is there, and the trained networks, is not measured or trained again.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers

from kdistill import files, provenance
from kdistill.compression.compress import compress
from kdistill.conversion import convert
from kdistill.data.splits import load
from kdistill.networks import architectures
from kdistill.recipe import Data, Network, Profile, Stage
from kdistill.tflite.interpreter import File

EPOCHS = {"cifar_quick": 12, "vgg": 8}
RATES = {"cifar_quick": 1e-3, "vgg": 3e-4}
SHAPE, CLASSES = (32, 32, 3), 10
ROWS = {"float": "float32", "int8": "int8 after training", "labels": "QAT on labels", "teacher": "QAT with the teacher"}


def vgg() -> keras.Model:
    """Six 3x3 convolutions with ReLU and two dense layers; no batch normalization, as in VGG."""
    image = keras.Input(SHAPE, name="image")
    x = keras.applications.vgg16.preprocess_input(image)
    for block, width in enumerate((16, 32, 64), 1):
        for place in (1, 2):
            convolution = layers.Conv2D(width, 3, padding="same", kernel_initializer="he_normal", activation="relu")
            convolution.name = f"block{block}_conv{place}"
            x = convolution(x)
        x = layers.MaxPooling2D(name=f"block{block}_pool")(x)
    x = layers.Dense(128, activation="relu", name="fc1")(layers.Flatten(name="flatten")(x))
    # Small logits at first: what comes in is hundreds wide.
    logits = layers.Dense(CLASSES, kernel_initializer=keras.initializers.RandomNormal(stddev=1e-3), name="logits")
    return keras.Model(image, logits(layers.Dropout(0.3)(x)), name="vgg")


def trained(name: str, splits, folder: Path) -> keras.Model:
    """The network after `EPOCHS` epochs of Adam; from `folder`, if it was trained before."""
    path = folder / f"{name}.keras"
    if path.exists():
        return keras.saving.load_model(path)
    keras.utils.set_random_seed(0)
    model = vgg() if name == "vgg" else architectures.build(Network(name), SHAPE, CLASSES)
    images, batch = splits.train.images, 100
    rate = keras.optimizers.schedules.CosineDecay(RATES[name], EPOCHS[name] * (len(images) // batch))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"], steps_per_execution=16)
    model.fit(images, splits.train.labels, batch_size=batch, epochs=EPOCHS[name], verbose=2)
    model.save(path)
    return model


def accuracy(content: bytes, examples) -> float:
    """The share of right classes of a `.tflite`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.tflite")
        path.write_bytes(content)
        return float(np.mean(File(path).predict(examples.images).argmax(axis=-1) == examples.labels))


def measured(kind: str, model: keras.Model, splits, seed: int, options) -> dict:
    """One file: its test accuracy, bytes and seconds."""
    start, quiet = time.perf_counter(), {"say": lambda text: None}
    if kind == "float":
        content = convert.convert(model, Profile("float32"))
    elif kind == "int8":
        content = compress(model, "int8", None, splits, **quiet).tflite()
    else:
        stage = Stage("qat", epochs=options.epochs, learning_rate=options.learning_rate)
        content = compress(model, stage, model if kind == "teacher" else None, splits, seed=seed, **quiet).tflite()
    seconds = time.perf_counter() - start
    return {"accuracy": accuracy(content, splits.test), "bytes": len(content), "seconds": round(seconds, 1)}


def table(rows: list[dict], names: list[str]) -> str:
    """Test accuracy in %, mean and standard deviation over the seeds, as Markdown."""
    lines = ["| network | " + " | ".join(ROWS.values()) + " |", "|---" + "|---:" * len(ROWS) + "|"]
    for name in names:
        cells = []
        for kind in ROWS:
            values = [100 * row["accuracy"] for row in rows if row["key"][:2] == [name, kind]]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Trains what is missing, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the networks and the JSON")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10, as for `kdistill run cifar10`")
    parser.add_argument("--network", nargs="*", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", type=int, default=3, help="of the fine-tuning")
    parser.add_argument("--epochs", type=int, default=1, help="of the fine-tuning")
    parser.add_argument("--images", type=int, default=15_000, help="training images of the fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    options = parser.parse_args()
    splits = load(Data("cifar10", validation=0.1), options.data_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "quantization.json"
    stored = json.loads(path.read_text()) if path.exists() else {"rows": [], **provenance.of_run()}
    settings = [options.epochs, options.images, options.learning_rate]
    fewer = dataclasses.replace(splits, train=splits.train.select(slice(options.images)))
    for name in options.network:
        model = trained(name, splits, options.out)
        for kind in ROWS:
            for seed in range(options.seeds if kind in ("labels", "teacher") else 1):
                key = [name, kind, seed, *(settings if kind in ("labels", "teacher") else [])]
                if not any(row["key"] == key for row in stored["rows"]):
                    stored["rows"].append({"key": key, **measured(kind, model, fewer, seed, options)})
                    files.write_text(path, json.dumps(stored) + "\n")
                    print(name, kind, seed, stored["rows"][-1], flush=True)
    rows = [row for row in stored["rows"] if row["key"][3:] in ([], settings)]
    print(f"{splits.source}, {len(splits.test):,} test images\n{table(rows, options.network)}")


if __name__ == "__main__":
    main()
