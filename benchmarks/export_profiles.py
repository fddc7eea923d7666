"""Every export profile on MobileNetV3-Small, through the command, twice: agreement with Keras, and the same bytes.

    python benchmarks/export_profiles.py [--size 96] [--images 3000] [--epochs 2]
    python benchmarks/export_profiles.py --epochs 0

The network begins with random weights and is trained for some minutes on digits of the sample of MNIST that ships with
kdistill, enlarged, in three channels. int4 is left out, and that is said, where litert-quantizer is not installed. The
exit status is 1 if a profile fails or two files differ.

`--epochs 0` leaves the weights random, but for two things without which such a network gives every image the same
answer: the batch normalizations get the statistics of the images, and the last layer is fitted by least squares to the
four strongest directions of its input. Full int8 (npu, microcontroller) is then known to fail: a random network of this
depth does not carry its signal through int8 activations (at 64 pixels 88 % of the images get the same answer, the limit
is 98 %), and the files are refused, with the layers named. That is the gate at work.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

PROFILES = ("reference", "phone_gpu", "phone_cpu", "npu", "microcontroller", "mediapipe", "int4")


def images(size: int, train: int, test: int = 200) -> dict[str, np.ndarray]:
    """`size` x `size` x 3 digits as an `.npz` holds them."""
    from kdistill.data import load
    from kdistill.recipe import Data

    splits = load(Data("mnist"), say=lambda _: None)
    places = np.arange(size) * 28 // size
    arrays = {}
    for name, examples, count in (("train", splits.train, train), ("test", splits.test, test)):
        small = examples.images[:count][:, places][:, :, places]
        arrays[f"x_{name}"], arrays[f"y_{name}"] = np.repeat(small, 3, axis=-1), examples.labels[:count]
    return arrays


def network(size: int):
    """MobileNetV3-Small, new."""
    import keras

    from kdistill.networks import architectures
    from kdistill.recipe import Network

    keras.utils.set_random_seed(0)
    # By default its normalizations take thousands of steps to follow the images.
    return architectures.build(Network("mobilenet_v3_small", {"size": size, "momentum": 0.9}), (size, size, 3), 10)


def trained(arrays: dict[str, np.ndarray], size: int, epochs: int):
    """The network after some epochs, as anyone trains it."""
    import keras

    model, start = network(size), time.perf_counter()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    history = model.fit(arrays["x_train"], arrays["y_train"], batch_size=32, epochs=epochs, verbose=0)
    accuracy = history.history["accuracy"][-1]
    print(f"Trained for {time.perf_counter() - start:.0f} s, {accuracy:.1%} of the training images right", flush=True)
    return model


def untrained(arrays: dict[str, np.ndarray], size: int):
    """The network with random weights, its classes apart."""
    import keras

    model = network(size)
    pixels, labels = arrays["x_train"][:150].astype(np.float32), arrays["y_train"][:150]
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # takes the statistics of the last batch
    model(pixels[:100], training=True)
    last = next(layer for layer in reversed(model.layers) if isinstance(layer, keras.layers.Conv2D))
    features = keras.Model(model.input, last.input).predict(pixels, batch_size=50, verbose=0).reshape(len(pixels), -1)
    mean = features.mean(axis=0)
    scores, strength, directions = np.linalg.svd((features - mean).astype(np.float64), full_matrices=False)
    scores, strength, directions = scores[:, :4], strength[:4], directions[:4]
    targets = 10.0 * np.eye(10)[labels] - 1
    weights = directions.T @ ((scores.T @ (targets - targets.mean(axis=0))) / strength[:, None])
    last.set_weights([weights.reshape(last.kernel.shape), targets.mean(axis=0) - mean @ weights])
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--images", type=int, default=3000, help="to train on")
    parser.add_argument("--epochs", type=int, default=2, help="of training; 0 leaves the weights random")
    parser.add_argument("--profile", action="append", choices=PROFILES)
    options = parser.parse_args()
    chosen = list(options.profile or PROFILES)
    if "int4" in chosen and not find_spec("litert_quantizer"):
        chosen.remove("int4")
        print("int4 is left out: litert-quantizer is not installed (pip install 'kdistill[int4]')")
    wrong = False
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        arrays = images(options.size, options.images)
        np.savez(place / "digits.npz", **{name: array[:200] for name, array in arrays.items()})
        model = trained(arrays, options.size, options.epochs) if options.epochs else untrained(arrays, options.size)
        model.save(place / "mobilenet.keras")
        print("| profile | bytes | agreement with Keras % | seconds | the same bytes twice |\n|---|---:|---:|---:|---|")
        for profile in chosen:
            exports = []
            for part in ("one", "two"):
                start = time.perf_counter()
                command = [sys.executable, "-m", "kdistill.cli", "export", str(place / "mobilenet.keras"), "--json"]
                command += ["--profile", profile, "--out", str(place / part), "--max-drop", "100"]
                command += ["--data", "npz", "--data-dir", str(place / "digits.npz")]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    wrong = True
                    print(f"| {profile} | failed: {(done.stderr.strip().splitlines() or ['?'])[-1]} |", flush=True)
                    break
                exports.append((json.loads(done.stdout)[0], time.perf_counter() - start))
            if len(exports) == 2:
                (first, seconds), (second, _) = exports
                same = Path(first["path"]).read_bytes() == Path(second["path"]).read_bytes()
                wrong |= not same
                agreement = f"{first['check']['agreement']:.2%}".removesuffix("%")
                text = f"| {profile} | {first['bytes']:,} | {agreement} | {seconds:.0f} | {'yes' if same else 'NO'} |"
                print(text, flush=True)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
