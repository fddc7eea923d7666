"""TFLite's converter: from a SavedModel to the bytes of a `.tflite`, in this process or as a worker.

The quantizer of activations can stop the process in which it runs (a segmentation fault), so it runs in a worker:
`python -m kdistill.conversion.tflite_converter` reads jobs from its standard input, one a line, and answers each with a
line. It converts any number of models, because importing TensorFlow takes seconds. `worker` is the other side.

This module imports neither Keras nor other modules of the house that do.
"""

import contextlib
import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from kdistill.tflite.activation_ranges import EXTREMES
from kdistill.tflite.interpreter import first_line

IDLE_SECONDS = 300  # a worker without a job for so long ends
CONTENT = "content.tflite"  # beside the SavedModel


@dataclass(frozen=True)
class Tuning:
    """How int8 is made where the usual way loses too much, see `kdistill.repairs`.

    `images`: calibration examples at most. `ranges`: one of `activation_ranges.KINDS`. `equalized`: whether channels
    get the same width, see `tflite.equalization`. `float_tensors`: the outputs of operators that compute in float.
    `activations`: int8, or int16.
    """

    images: int = 500  # more change nothing
    ranges: str = EXTREMES
    equalized: bool = False
    float_tensors: tuple[str, ...] = ()
    activations: str = "int8"


USUAL = Tuning()


@dataclass(frozen=True)
class Job:
    """What to convert, and how.

    `folder`: a SavedModel with the signature `serving_default`; for int8 also the calibration examples of each input,
    see `calibration_file`. `quantization`: as in a profile, or `trained`, int8 with the ranges in the graph.
    """

    folder: str
    quantization: str
    input_type: str = "float32"
    output_type: str = "float32"
    batch: int = 1  # of the calibration
    inputs: tuple[str, ...] = ("image",)  # their names
    tuning: Tuning = USUAL


def calibration_file(folder: str | Path, place: int) -> Path:
    """The file with the calibration examples of the input at this place of `Job.inputs`."""
    return Path(folder, f"calibration{place or ''}.npy")


def calibration_batches(job: Job):
    """The calibration examples as the model gets them: dicts by input."""
    arrays = [np.load(calibration_file(job.folder, place), mmap_mode="r") for place in range(len(job.inputs))]
    for parts in zip(*(batches(array, job.batch) for array in arrays), strict=True):
        yield dict(zip(job.inputs, parts, strict=True))


class Refusal(Exception):
    """The converter refuses a model. `operators`: (name, the function that calls it); `text`: its own message."""

    def __init__(self, operators: list[tuple[str, str]], text: str):
        super().__init__(text)
        self.operators, self.text = operators, text


def convert(job: Job) -> bytes:
    """The bytes of the `.tflite` file, the same for equal models. Raises `Refusal`."""
    try:
        with _repeatable_quantizer(job):
            return _converter(job).convert()
    except OSError:  # such as a full disk: not the fault of the model
        raise
    except Exception as error:  # the converter has no public error class
        operators = []
        for part in getattr(error, "errors", ()):
            if part.operator.name:
                calls = part.location.call
                operators.append((part.operator.name.removeprefix("tf."), calls[0].name if calls else ""))
        raise Refusal(operators, first_line(error)[:300]) from error


def _converter(job: Job):
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(job.folder)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if job.quantization not in ("none", "int4"):  # int4 starts from the float32 file
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if job.quantization == "float16":
        converter.target_spec.supported_types = [tf.float16]
    elif job.quantization == "dynamic":
        # Dense layers with a scale per channel need runtimes from 2.17 on, per tensor from 2.4 on. There is no public
        # setting for this; `test_the_converter_has_its_private_setting` fails first when TensorFlow renames it.
        converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    elif job.quantization == "int8":
        ops, tuning = tf.lite.OpsSet, job.tuning
        if tuning.activations == "int16":
            converter.target_spec.supported_ops = [
                ops.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
                ops.TFLITE_BUILTINS,
            ]
        else:
            converter.target_spec.supported_ops = [ops.TFLITE_BUILTINS_INT8] + [ops.TFLITE_BUILTINS] * bool(
                tuning.float_tensors
            )
        converter.representative_dataset = lambda: calibration_batches(job)
        converter.inference_input_type = tf.as_dtype(job.input_type)
        converter.inference_output_type = tf.as_dtype(job.output_type)
    return converter


@contextlib.contextmanager
def _repeatable_quantizer(job: Job):
    """Makes TensorFlow's quantizer of activations give the same bytes each time, and obey the job's tuning.

    Where a result of an operator is not used, such as a part of a SPLIT, the quantizer computes the operator in int8 or
    in float32 depending on addresses in memory. So each such result is an output while the quantizer runs. There is no
    public place for this; `test_the_converter_has_its_private_settings` fails first when TensorFlow renames it.
    """
    from tensorflow.lite.python import lite

    from kdistill.tflite import unused_results

    quantize = lite._mlir_quantize

    def tuned(calibrated: bytes, *args, **kwargs) -> bytes:
        if job.tuning.float_tensors:
            kwargs["denylisted_nodes"] = list(job.tuning.float_tensors)
        return unused_results.with_outputs(
            _with_ranges(calibrated, job), lambda content: quantize(content, *args, **kwargs)
        )

    lite._mlir_quantize = tuned
    try:
        yield
    finally:
        lite._mlir_quantize = quantize


def _with_ranges(calibrated: bytes, job: Job) -> bytes:
    """A calibrated float model with the channels and ranges of the job's tuning."""
    from kdistill.tflite import flatbuffer
    from kdistill.tflite.activation_ranges import activations_of, set_ranges
    from kdistill.tflite.equalization import equalize

    if not job.tuning.equalized and job.tuning.ranges == EXTREMES:
        return calibrated
    if job.tuning.equalized:
        model = flatbuffer.parse(calibrated)
        equalize(model, activations_of(calibrated, lambda: calibration_batches(job), distributions=False))
        calibrated = flatbuffer.pack(model)
    model = flatbuffer.parse(calibrated)
    distributions = job.tuning.ranges != EXTREMES
    activations = activations_of(calibrated, lambda: calibration_batches(job), distributions)
    set_ranges(model, activations, job.tuning.ranges)
    return flatbuffer.pack(model)


def batches(images: np.ndarray, size: int):
    """The examples in batches of this size; pixels are float32. The last batch is filled with the first examples."""
    dtype = images.dtype if images.dtype in (np.int32, np.int64, np.bool_) else np.float32
    for start in range(0, len(images), size):
        places = np.arange(start, start + size) % len(images)
        yield images[places].astype(dtype)


def find_fault(job: Job) -> dict | None:
    """What stopped the quantizer, probably: an operator of the float32 file, as kind, operator and tensor; or None.

    The kind is `not finite`, an operator whose numbers are NaN or infinite on the calibration images, or `loop`.
    """
    from kdistill.tflite import flatbuffer
    from kdistill.tflite.interpreter import open_interpreter, operator_details, signature_names

    content = convert(Job(job.folder, "none", inputs=job.inputs))
    model = flatbuffer.parse(content)
    names = [flatbuffer.tensor_name(tensor) for tensor in model.subgraphs[0].tensors]
    interpreter = open_interpreter(content, delegates=False, keep_tensors=True)
    ends = {signature_names(interpreter)[end["index"]]: end for end in interpreter.get_input_details()}
    for end in ends.values():
        interpreter.resize_tensor_input(end["index"], [job.batch, *end["shape"][1:]])
    interpreter.allocate_tensors()
    operators = operator_details(interpreter)
    for batch in calibration_batches(job):
        for name, end in ends.items():
            interpreter.set_tensor(end["index"], batch[name].astype(end["dtype"]))
        interpreter.invoke()
        for operator in operators:
            for index in operator["outputs"]:
                values = interpreter.get_tensor(index) if 0 <= index < len(names) else np.zeros(0)
                if np.issubdtype(values.dtype, np.floating) and not np.isfinite(values).all():
                    return {"kind": "not finite", "operator": operator["op_name"], "tensor": names[index]}
    for operator in operators:
        if operator["op_name"] == "WHILE":
            return {"kind": "loop", "operator": "WHILE", "tensor": names[operator["outputs"][0]]}
    return None


def answer(line: str) -> dict:
    """The answer to one job, a line of JSON: `content` (the name of a file), `fault`, or `refusal`."""
    request = json.loads(line)
    job = Job(**{**request["job"], "tuning": Tuning(**request["job"]["tuning"])})
    try:
        if request["task"] == "find_fault":
            return {"fault": find_fault(job)}
        Path(job.folder, CONTENT).write_bytes(convert(job))
    except Refusal as refusal:
        return {"refusal": {"operators": refusal.operators, "text": refusal.text}}
    except OSError as error:
        return {"os_error": [error.errno, error.strerror or str(error)]}
    return {"content": CONTENT}


def as_line(task: str, job: Job) -> str:
    """The request for a worker: `convert` or `find_fault`."""
    return json.dumps({"task": task, "job": asdict(job)}) + "\n"


def _serve() -> None:
    """Answers the jobs on standard input until it ends, or for `IDLE_SECONDS`."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal reaches this process too; its parent ends it
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what C++ prints must not come between the answers
    import tensorflow  # noqa: F401, while the parent still prepares the first job

    while True:
        timer = threading.Timer(IDLE_SECONDS, os._exit, (0,))
        timer.daemon = True
        timer.start()
        line = sys.stdin.readline()
        timer.cancel()
        if not line:
            return
        print(json.dumps(answer(line)), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
