"""Which architectures go through compression, and whether all of their int8 file computes in int8.

    python benchmarks/architectures.py [--only mobilenet_v2 ...] [--scheme prune cluster qat int8] [--size 224]

Builds each network with random weights and random batch-norm statistics, bridges it to tf_keras (which compares the
outputs of both), compresses it with itself as the teacher on a few random images, and looks into the `.tflite`, which
also runs. Prints a table: parameters, seconds, layers pruned, clustered or quantized, bytes raw and deflated, and the
operators that compute in float in the int8 file. Accuracy means nothing here: the images are noise. `SMALL` are small
networks with layers that are not in the others; one that cannot be compressed is refused before it is trained.
"""

import argparse
import json
import time

import keras
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from keras import layers

from kdistill.compression.compress import compress
from kdistill.conversion import convert
from kdistill.errors import InputError
from kdistill.files import byte_sizes
from kdistill.networks import architectures
from kdistill.networks.applications import APPLICATIONS
from kdistill.recipe import Network, Profile, Stage
from kdistill.tflite.flatbuffer import stayed_float

CLASSES = 10
NETWORKS = {
    "lenet": Network("lenet"),
    "cifar_quick": Network("cifar_quick"),
    "cifar_mini": Network("cifar_mini"),
    "resnet8": Network("resnet", {"depth": 8}),
    "resnet56": Network("resnet", {"depth": 56}),
    **{name: Network(name) for name in ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "resnet50")},
}


def convolutions(x, normalization):
    """Two convolutions, a normalization behind each, and a dense layer."""
    for width in (16, 32):
        x = layers.Conv2D(width, 3, strides=2, padding="same")(x)
        x = layers.ReLU()(normalization()(x))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling2D()(x))


def mean_subtracted(image):
    """Blue first and minus the mean of ImageNet, as VGG and ResNet of keras.applications expect it."""
    return convolutions(keras.applications.vgg16.preprocess_input(image), layers.BatchNormalization)


def adapted(image):
    """`Normalization`, adapted to images."""
    images = np.random.default_rng(2).integers(0, 256, (64, 32, 32, 3)).astype("float32")
    normalization = layers.Normalization()
    normalization.adapt(images)
    return convolutions(normalization(image), layers.BatchNormalization)


def group_normalized(image):
    """GroupNormalization instead of batch normalization."""
    return convolutions(layers.Rescaling(1 / 255)(image), lambda: layers.GroupNormalization(8))


def recurrent(image, unroll=False):
    """An LSTM over the rows of an image."""
    rows = layers.Reshape((32, 96))(layers.Rescaling(1 / 255)(image))
    return layers.Dense(CLASSES)(layers.LSTM(32, unroll=unroll)(rows))


def unrolled(image):
    """The same without a loop."""
    return recurrent(image, unroll=True)


def transformer(image):
    """One block of attention over patches of 8x8 pixels."""
    x = layers.Conv2D(32, 8, strides=8)(layers.Rescaling(1 / 255)(image))
    x = layers.Reshape((16, 32))(x)
    y = layers.LayerNormalization()(x)
    x = x + layers.MultiHeadAttention(2, 16)(y, y)
    y = layers.Dense(64, activation="gelu")(layers.LayerNormalization()(x))
    return layers.Dense(CLASSES)(layers.GlobalAveragePooling1D()(x + layers.Dense(32)(y)))


SMALL = {
    function.__name__: function
    for function in (mean_subtracted, adapted, group_normalized, recurrent, unrolled, transformer)
}


def built(name: str, size: int) -> keras.Model:
    """The network, its weights as they are after a real training: none is 0, statistics differ by channel."""
    if name in SMALL:
        image = keras.Input((32, 32, 3))
        return keras.Model(image, SMALL[name](image), name=name)
    if name in APPLICATIONS:
        network, shape = Network(name, {"size": size}), (size, size, 3)
    else:
        network, shape = NETWORKS[name], (28, 28, 1) if name == "lenet" else (32, 32, 3)
    model = architectures.build(network, shape, CLASSES)
    generator = np.random.default_rng(0)
    for variable in model.weights:
        kind = variable.path.split("/")[-1]
        if kind in ("gamma", "moving_variance"):
            variable.assign(np.exp(generator.normal(0, 0.3, variable.shape)))
        elif kind in ("beta", "bias", "moving_mean"):
            variable.assign(generator.normal(0, 0.1, variable.shape))
    return model


def row(name: str, scheme: str, options) -> dict:
    """One line of the table."""
    keras.backend.clear_session()
    model, start = built(name, options.size), time.perf_counter()
    images = np.random.default_rng(1).integers(0, 256, (options.images, *model.input_shape[1:])).astype("uint8")
    labels = np.arange(options.images, dtype="int32") % CLASSES
    stage, teacher = Stage(scheme, epochs=1, batch_size=4, learning_rate=1e-5), model if scheme != "int8" else None
    described = {"network": name, "parameters": model.count_params(), "scheme": scheme}
    try:  # with check=None: noise has no accuracy
        result = compress(model, stage, teacher, (images, labels), say=lambda text: None, check=None)
    except InputError as error:
        seconds = round(time.perf_counter() - start, 1)
        return {**described, "layers": "refused", "float": [], "bytes": 0, "deflated": 0, "seconds": seconds} | {
            "refusal": str(error)
        }
    # LiteRT runs a loop over time steps with a fixed batch size only.
    plain = Profile("float32", batch=1 if name == "recurrent" else None)
    content = result.tflite() if result.quantized else convert.convert(result.model, plain)
    result.check_file(content)
    floats = []
    if result.quantized:
        inside = schema.ModelT.InitFromPackedBuf(content)
        floats = sorted({each["operator"] for each in stayed_float(inside, "int8")})
    word = {"prune": "pruned", "cluster": "clustered", "qat": "quantized", "int8": "quantized"}[scheme]
    cells = [layer[word] for layer in result.layers if word in layer]
    return {
        **described,
        **{"layers": f"{cells.count('yes')} of {len(cells)}", "float": floats, **byte_sizes(content)},
        "seconds": round(time.perf_counter() - start, 1),
    }


def main() -> None:
    """Prints the table as Markdown, and one line of JSON for machines."""
    names = [*NETWORKS, *SMALL]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=names, choices=names)
    parser.add_argument("--scheme", nargs="*", default=["prune", "cluster", "qat", "int8"])
    parser.add_argument("--size", type=int, default=96, help="of the images of the networks of keras.applications")
    parser.add_argument("--images", type=int, default=16)
    options = parser.parse_args()
    rows = []
    print("| network | parameters | scheme | layers done | computes in float | bytes | deflated | seconds |")
    print("|---|---:|---|---:|---|---:|---:|---:|")
    for name in options.only:
        for scheme in options.scheme:
            rows.append(row(name, scheme, options))
            cells = {**rows[-1], "float": ", ".join(rows[-1]["float"]) or ("–" if scheme in ("qat", "int8") else "")}
            line = (
                "| {network} | {parameters:,} | {scheme} | {layers} | {float} | {bytes:,} | {deflated:,} | {seconds} |"
            )
            print(line.format(**cells), flush=True)
            if "refusal" in cells:
                print(f"  {name}, {scheme}: {cells['refusal']}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
