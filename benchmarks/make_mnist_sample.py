"""Writes the sample of MNIST that ships with kdistill from the four IDX files of the original.

    python benchmarks/make_mnist_sample.py FOLDER_OF_IDX_FILES [FILE.npz]

10,000 of the 60,000 training and 2,000 of the 10,000 test images, each class with its share of the original, chosen
by a fixed permutation. Prints the SHA-256 that `kdistill/data/mnist.py` checks; the same input gives the same bytes.
"""

import sys
from pathlib import Path

import numpy as np

from kdistill import files
from kdistill.data import mnist
from kdistill.errors import InputError
from kdistill.recipe import Data


def chosen(labels: np.ndarray, count: int) -> np.ndarray:
    """Sorted indexes of `count` examples whose classes have the shares of all: largest remainders get the rest."""
    random = np.random.Generator(np.random.Philox(key=[2017, count]))
    shares = np.bincount(labels) * count / len(labels)
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares)[: count - counts.sum()]] += 1
    members = [random.permutation(np.flatnonzero(labels == label))[:n] for label, n in enumerate(counts)]
    return np.sort(np.concatenate(members))


def main(folder: str, out: Path = mnist.SAMPLE) -> None:
    """Writes the sample of the IDX files in `folder` to `out`. Raises `InputError` for damaged files."""
    parts, _, _ = mnist.mnist(Data(), Path(folder), False, print)
    arrays = {}
    for name, count in (("train", 10_000), ("test", 2_000)):
        images, labels = parts[name]
        indexes = chosen(labels, count)
        arrays |= {f"x_{name}": images[indexes], f"y_{name}": labels[indexes]}
    with files.atomic_file(out) as part:
        np.savez_compressed(part, **arrays)
    print(f"{out}: {out.stat().st_size:,} bytes, sha256 {files.sha256(out)}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], *map(Path, sys.argv[2:]))
    except InputError as error:
        sys.exit(f"Error: {error}")
