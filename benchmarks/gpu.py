"""Distilling ResNet-50 into MobileNetV3-Small on a GPU in mixed_float16: images per second, and the share of the peak.

    python benchmarks/gpu.py --peak-tflops 312 [--batch-size 256] [--repeats 7]     312: an A100's float16 tensor cores
    python benchmarks/gpu.py --here --batch-size 8 --repeats 2                      a try on a machine without a GPU

Images are random and wait in memory, so the input pipeline is not in it (`input_pipeline.py` measures that). Sides are
online (the teacher in every step), from stored logits, the student alone, and the teacher alone. The operations of a
step are counted as 2 for each multiplication with an addition: of the teacher's forward, and three times the student's.
"""

import keras
import tensorflow as tf
from common import PAIRS, arguments, forward, images_for, measured, plain, ratio, save
from online import ours

from kdistill.networks.keras_internals import layers_of


def operations(model: keras.Model) -> int:
    """Floating-point operations of one image's forward, from the graph of convolutions and matrix products."""
    total = 0
    for layer in layers_of(model):
        kernel = getattr(layer, "kernel", None)
        if kernel is None:
            continue
        shape = layer.output.shape[1:]
        places = shape[0] * shape[1] if len(shape) == 3 else 1
        # Of a depthwise convolution every weight is used once at each place, as of any other.
        total += 2 * places * int(tf.size(kernel.value))
    return total


def main() -> None:
    """Measures, prints, writes `gpu.json` and `gpu.svg`."""
    parser = arguments(__doc__)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32, help="of a timed epoch")
    parser.add_argument("--peak-tflops", type=float, help="of this GPU, in float16 with tensor cores: its data sheet")
    parser.add_argument("--here", action="store_true", help="without a GPU too, in mixed_bfloat16 and 2 steps")
    options = parser.parse_args()
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus and not options.here:
        raise SystemExit(
            "TensorFlow detects no GPU. A CPU gives no meaningful result; use --here to try the benchmark anyway."
        )
    steps = options.steps if gpus else 2
    keras.config.set_dtype_policy("mixed_float16" if gpus else "mixed_bfloat16")
    make, _, _ = PAIRS["resnet50"]
    teacher, student = make()
    batch_size = options.batch_size
    images, labels = images_for(teacher, batch_size)
    at_hand = tf.cast(images, tf.float32), tf.constant(labels)
    logits = tf.zeros((batch_size, 1000), tf.float16)
    with_labels = tf.data.Dataset.from_tensors(at_hand).repeat(steps)
    with_logits = with_labels.map(lambda x, y: (x, {"labels": y, "teacher_logits": logits}))
    once, each = {"epochs": 1, "verbose": 0}, min(16, steps)
    online, cached, alone = ours(student(), teacher, each), ours(student(), None, each), plain(student(), each)
    call = forward(teacher)
    sides = {
        "online": lambda: online.fit(with_labels, **once),
        "cached": lambda: cached.fit(with_logits, **once),
        "student alone": lambda: alone.fit(with_labels, **once),
        "teacher alone": lambda: call(with_labels),
    }
    timings = measured(sides, batch_size * steps, options.repeats)
    of_teacher, of_student = operations(teacher), operations(student())
    needed = {
        "online": of_teacher + 3 * of_student,
        "cached": 3 * of_student,
        "student alone": 3 * of_student,
        "teacher alone": of_teacher,
    }
    tflops = {name: float(timings[name]["images_per_second"]) * needed[name] / 1e12 for name in sides}
    result = {
        "sides": timings,
        "devices": [tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name) for gpu in gpus],
        "operations_per_image": needed,
        "tflops": tflops,
        "share_of_peak": {n: v / options.peak_tflops for n, v in tflops.items()} if options.peak_tflops else None,
        "online / limit": ratio(timings, "online", ["teacher alone", "student alone"]),
        "cached / student alone": ratio(timings, "cached", "student alone"),
    }
    bars = {name: timings[name]["images_per_second"] for name in sides}
    save("gpu", result, options.out, bars, "ResNet-50 to MobileNetV3-Small", "images per second")
    print("TFLOP/s:", {name: round(value, 3) for name, value in tflops.items()}, "share:", result["share_of_peak"])


if __name__ == "__main__":
    main()
