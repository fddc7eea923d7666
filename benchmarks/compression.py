"""Compression of one student: accuracy and size for every scheme, the teacher kept on.

    python benchmarks/compression.py [--network lenet] [--epochs 2] [--limit N] [--scheme S ...]

Trains a student on MNIST (the sample that ships with kdistill, or --data-dir) with its own labels, then compresses it
by each scheme with itself as the teacher. Prints a table: test accuracy of the Keras 3 model and of the int8 `.tflite`,
the bytes of the file, and its bytes deflated (which is where pruning and clustering show).
"""

import argparse
import json
import tempfile
import time
import zlib
from pathlib import Path

import keras
import numpy as np

from kdistill import convert, data, models
from kdistill.compress import SCHEMES, compress
from kdistill.litert import File
from kdistill.recipe import Data, Network, Profile

INT8 = Profile("int8", quantization="int8")


def accuracy(outputs: np.ndarray, labels: np.ndarray) -> float:
    """The share of right classes."""
    return float(np.mean(outputs.argmax(axis=-1) == labels))


def trained(network: str, splits, epochs: int) -> keras.Model:
    """The student, trained on labels."""
    keras.utils.set_random_seed(0)
    train = splits.train
    model = models.build(Network(network), train.images.shape[1:], len(splits.class_names))
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(train.images.astype("float32"), train.labels, batch_size=128, epochs=epochs, verbose=0)
    return model


def row(scheme: str, student: keras.Model, splits, epochs: int) -> dict:
    """One line of the table."""
    start = time.monotonic()
    result = compress(student, scheme, student, splits, epochs=epochs, learning_rate=1e-3, say=lambda text: None)
    seconds = time.monotonic() - start
    test = splits.test
    quantises = scheme == "int8" or "qat" in SCHEMES[scheme]
    content = result.tflite() if quantises else convert.convert(result.model, INT8, splits.train.images[:500])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "student.tflite")
        path.write_bytes(content)
        of_file = accuracy(File(path).predict(test.images), test.labels)
    of_model = accuracy(result.model.predict(test.images.astype("float32"), verbose=0), test.labels)
    deflated = len(zlib.compress(content, 9))
    return {
        **{"scheme": scheme, "model": of_model, "tflite": of_file, "bytes": len(content), "deflated": deflated},
        "seconds": round(seconds, 1),
    }


def main() -> None:
    """Prints the table, and one line of JSON for machines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="lenet", choices=sorted(models.NETWORKS))
    parser.add_argument("--epochs", type=int, default=2, help="of each stage")
    parser.add_argument("--train-epochs", type=int, default=6, help="of the student before")
    parser.add_argument("--limit", type=int, help="use only so many images of each split")
    parser.add_argument("--data-dir")
    parser.add_argument("--scheme", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    given = parser.parse_args()
    splits = data.load(Data("mnist", train_limit=given.limit), given.data_dir)
    student = trained(given.network, splits, given.train_epochs)
    of_student = accuracy(student.predict(splits.test.images.astype("float32"), verbose=0), splits.test.labels)
    print(
        f"{given.network}, {student.count_params()} parameters, test accuracy {of_student:.4f}; data: {splits.source}"
    )
    print(f"{'scheme':14}{'model':>8}{'tflite':>8}{'bytes':>10}{'deflated':>10}{'seconds':>9}")
    rows = []
    for scheme in given.scheme:
        rows.append(row(scheme, student, splits, given.epochs))
        print(
            "{scheme:14}{model:8.4f}{tflite:8.4f}{bytes:10,}{deflated:10,}{seconds:9.1f}".format(**rows[-1]), flush=True
        )
    print(json.dumps({"network": given.network, "student": of_student, "rows": rows}))


if __name__ == "__main__":
    main()
