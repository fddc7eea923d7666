"""The process of a teacher's own: it opens one file that is no Keras model, and answers batches of images.

`process.py` starts this file by its path, with any Python from 3.8 on that has NumPy; of kdistill it imports something
only for a `.tflite`. Images come through memory that both processes map; everything else are frames (a length, JSON,
and numbers) through two pipes, which are not the standard streams: what the user's code prints goes to the log.

    python server.py KIND TARGET OPTIONS
"""

import importlib.util
import io
import json
import mmap
import os
import platform
import queue
import signal
import struct
import sys
import threading
import traceback

HEADER = struct.Struct("<II")  # bytes of JSON, bytes of numbers
MOST_TEXT = 1 << 20  # bytes of JSON in a frame
MOST_ANSWER = 1 << 30  # bytes of an answer from an address
NAMED = ("numpy", "torch", "tensorflow", "keras", "tf_keras", "jax", "onnxruntime", "sklearn", "ai_edge_litert")


def beside(name):
    """A module of the standard library and NumPy in this folder, which another Python has no package for."""
    spec = importlib.util.spec_from_file_location(
        "kdistill_" + name, os.path.join(os.path.dirname(os.path.abspath(__file__)), name + ".py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


batch_outputs = beside("batch_outputs")
Refused, describe = batch_outputs.Refused, batch_outputs.describe


def read_frame(stream):
    """A frame as (dict, bytes), or None at the end."""
    header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        return None
    length, more = HEADER.unpack(header)
    if length > MOST_TEXT:  # something else writes here
        return None
    return json.loads(stream.read(length).decode()), stream.read(more)


def write_frame(stream, message, numbers=b""):
    """Writes a dict, and the bytes of an array behind it."""
    text = json.dumps(message).encode()
    stream.write(HEADER.pack(len(text), len(numbers)))
    stream.write(text)
    stream.write(numbers)
    stream.flush()


# -- the kinds: each returns a function, float32 images -> outputs, and what the file says of itself ------------------


def open_python(path, options):
    """A file that defines `predict(images)`. It is code, and runs with the user's rights."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("kdistill_teacher", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["kdistill_teacher"] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:  # SystemExit too
        traceback.print_exc()
        needs = " ".join((module.__doc__ or "").split())
        hint = f" Its docstring says: {needs[:500]}" if needs and isinstance(error, ImportError) else ""
        raise Refused(f"its file cannot be run: {describe(error)}.{hint}") from None
    predict = getattr(module, "predict", None)
    if not callable(predict):
        raise Refused("its file defines no function predict(images), which returns an array [n, classes].")
    return predict, {"shape": list(getattr(module, "shape", None) or []) or None}


def open_onnx(path, options):
    """An ONNX model with one input of images."""
    try:
        import onnxruntime
    except ImportError:
        raise Refused(
            "an .onnx file runs with onnxruntime, which is not installed for this Python. Install it (pip install "
            "'kdistill[onnx]'), or give the Python of an environment that has it (--teacher-python)."
        ) from None
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    usable = [name for name in ("CUDAExecutionProvider",) if name in onnxruntime.get_available_providers()]
    taps = options.get("taps", [])
    content = path
    if taps:
        graph = beside("onnx_graph")
        try:
            content = graph.with_taps(path, taps)
        except graph.Unusable as error:
            raise Refused(str(error)) from None
        folder = os.path.dirname(os.path.abspath(path))  # of weights in files of their own
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    try:
        session = onnxruntime.InferenceSession(content, settings, providers=[*usable, "CPUExecutionProvider"])
    except Exception as error:
        raise Refused(f"its file is damaged, or no ONNX that onnxruntime runs ({describe(error)}).") from None
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1:
        names = ", ".join(f"'{value.name}' {value.shape}" for value in inputs)
        raise Refused(f"it has {len(inputs)} inputs ({names}); expected one, of images.")
    kinds = {"tensor(float)": "f4", "tensor(float16)": "f2", "tensor(double)": "f8", "tensor(uint8)": "u1"}
    if inputs[0].type not in kinds:
        raise Refused(f"its input is {inputs[0].type}; expected float, float16, double or uint8.")
    own = [value.name for value in outputs if value.name not in taps] or [value.name for value in outputs]
    wanted = options.get("output")
    name = wanted if wanted in taps else own[pick(own, wanted)]
    shape = [size if isinstance(size, int) and size > 0 else None for size in inputs[0].shape]

    def predict(images):
        names = sorted({name, *taps})
        values = session.run(names, {inputs[0].name: as_kind(images, kinds[inputs[0].type])})
        named = {tap: values[names.index(tap)] for tap in taps}
        return {"logits": values[names.index(name)], **named} if taps else values[0]

    about = {"shape": shape[1:] if len(shape) == 4 else None, "output": name}
    return in_fixed_batches(predict, shape[0] if shape else None), about


def open_savedmodel(path, options):
    """A SavedModel: its signature `serving_default`, its only one, or its function `serve`."""
    tensorflow = import_tensorflow()
    try:
        loaded = tensorflow.saved_model.load(path)
    except Exception as error:
        raise Refused(f"its folder is damaged, or no SavedModel ({describe(error)}).") from None
    names = sorted(loaded.signatures)
    name = "serving_default" if "serving_default" in names else names[0] if len(names) == 1 else None
    if name is None:
        raise Refused("it has the signatures {}; expected one, or serving_default.".format(", ".join(names) or "none"))
    function = loaded.signatures[name]
    inputs = function.structured_input_signature[1]
    if len(inputs) != 1:
        raise Refused("it has {} inputs ({}); expected one, of images.".format(len(inputs), ", ".join(inputs)))
    key, spec = next(iter(inputs.items()))
    outputs = sorted(function.structured_outputs)
    place = pick(outputs, options.get("output"))
    shape = None if spec.shape.rank is None else spec.shape.as_list()

    def predict(images):
        numbers = as_kind(images, spec.dtype.as_numpy_dtype)
        return function(**{key: tensorflow.constant(numbers)})[outputs[place]].numpy()

    count = sum(int(variable.shape.num_elements() or 0) for variable in getattr(loaded, "variables", ()))
    about = {"shape": shape[1:] if shape and len(shape) == 4 else None, "parameters": count or None}
    return in_fixed_batches(predict, shape[0] if shape else None), {**about, "output": outputs[place]}


def open_keras2(path, options):
    """An `.h5` file of Keras 2. `foreign.py` has refused layers whose code would be in the file."""
    tensorflow = import_tensorflow()
    import tf_keras

    try:
        model = tf_keras.models.load_model(path, compile=False)
    except Exception as error:
        raise Refused(f"Keras 2 cannot load its file either ({describe(error)}).") from None
    shape = model.input_shape
    if not isinstance(shape, tuple):
        raise Refused("it has several inputs; expected one, of images.")
    place = pick(list(model.output_names), options.get("output"))
    call = tensorflow.function(lambda images: model(images, training=False))

    def predict(images):
        outputs = call(tensorflow.constant(images))
        return (outputs[place] if isinstance(outputs, (list, tuple)) else outputs).numpy()

    about = {"shape": list(shape[1:]) if len(shape) == 4 else None, "parameters": model.count_params()}
    return in_fixed_batches(predict, shape[0]), about


def open_tflite(path, options):
    """A `.tflite` file, float or quantized, through LiteRT."""
    from kdistill.errors import InputError
    from kdistill.formats.kinds import tflite_normalization
    from kdistill.tflite.interpreter import File

    try:
        file = File(path, threads=os.cpu_count() or 1, trusted=True)  # this process is its own trial
    except InputError as error:
        raise Refused(str(error)) from None
    if not file.exclusive:
        raise Refused("its output '{}' does not classify: expected exclusive classes.".format(file.output["name"]))

    def predict(images):
        try:
            return file.predict(images)
        except InputError as error:
            raise Refused(str(error)) from None

    kind = "probabilities" if file.probabilities else "logits" if file.output["name"] == "logits" else None
    about = {"shape": file.input["shape"][1:], "outputs": kind, "output": file.output["name"]}
    return predict, {**about, **(tflite_normalization(path) if file.input["type"] == "float32" else {})}


def open_address(address, options):
    """An address that takes and gives `.npy`."""
    import urllib.error
    import urllib.request

    import numpy as np

    class NoRedirect(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, request, file, code, text, headers, url):
            raise Refused(
                f"{address} redirects to {url} (status {code}). Redirects are not followed: give the address itself."
            )

    opener = urllib.request.build_opener(NoRedirect)

    def predict(images):
        content = io.BytesIO()
        np.save(content, images)
        request = urllib.request.Request(
            address,
            content.getvalue(),
            {"Content-Type": "application/octet-stream", "Accept": "application/octet-stream"},
        )
        try:
            with opener.open(request, timeout=options["timeout"]) as answer:
                numbers = answer.read(MOST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            text = error.read(300).decode("utf-8", "replace").strip()
            raise Refused(
                "{} answers with status {}{}.".format(address, error.code, ": " + text if text else "")
            ) from None
        except OSError as error:  # also URLError and a time-out
            raise Refused(
                "{} does not answer within {:g} s ({}).".format(
                    address, options["timeout"], getattr(error, "reason", None) or describe(error)
                )
            ) from None
        if len(numbers) > MOST_ANSWER:
            raise Refused(f"{address} answers with more than {MOST_ANSWER:,} bytes.")
        try:
            return np.load(io.BytesIO(numbers), allow_pickle=False)
        except (ValueError, EOFError, OSError):
            begin = f"its answer begins with {numbers[:40]!r}"
            raise Refused(f"{address} does not answer with .npy ({begin}), the bytes of numpy.save.") from None

    return predict, {}


KINDS = {
    "Python file": open_python,
    "ONNX": open_onnx,
    "SavedModel": open_savedmodel,
    "Keras 2 HDF5": open_keras2,
    "TFLite": open_tflite,
    "address": open_address,
}


def import_tensorflow():
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow
    except ImportError:
        raise Refused("it runs with TensorFlow, which this Python does not have (--teacher-python).") from None
    return tensorflow


def pick(names, wanted):
    """The place of the output that classifies."""
    if wanted is not None:
        if wanted in names:
            return names.index(wanted)
        raise Refused("it has no output '{}'; it has {}. Fix --teacher-output.".format(wanted, ", ".join(names)))
    named = [name for name in names if name in ("logits", "probabilities")]
    if len(names) == 1 or len(named) == 1:
        return names.index((named or names)[0])
    raise Refused("it has the outputs {}. Say which one classifies: --teacher-output NAME.".format(", ".join(names)))


def as_kind(images, kind):
    """Images in the type of an input; whole numbers are rounded and kept in their range."""
    import numpy as np

    kind = np.dtype(kind)
    if kind.kind in "ui":
        limits = np.iinfo(kind)
        return np.clip(np.rint(images), limits.min, limits.max).astype(kind)
    return images.astype(kind, copy=False)


def in_fixed_batches(predict, size):
    """The same function for a model that takes batches of one size only: the last one is padded."""
    if not size:
        return predict

    def padded(images):
        import numpy as np

        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            outputs = predict(np.concatenate([part, np.zeros((size - len(part), *part.shape[1:]), part.dtype)]))
            outputs = outputs if isinstance(outputs, dict) else {"": outputs}
            parts.append({name: np.asarray(values)[: len(part)] for name, values in outputs.items()})
        joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return joined.get("", joined)

    return padded


# -- one batch --------------------------------------------------------------------------------------------------------


def answer(predict, memory, message, taps=()):
    """The outputs `[n, columns]` for the batch that the message describes, and the shapes of taps by name."""
    import numpy as np

    shape = tuple(message["shape"])
    images = np.frombuffer(memory, np.float32, int(np.prod(shape))).reshape(shape).copy()
    try:
        return batch_outputs.checked(predict(images), shape[0], taps)
    except Refused:
        raise
    except BaseException as error:  # SystemExit too: the user's code may raise anything
        traceback.print_exc()
        raise Refused(f"it failed on a batch {list(shape)}: {describe(error)}.") from None


def versions():
    """Python and the packages that the process has loaded: another version may compute other numbers."""
    loaded = {"python": platform.python_version()}
    for name in NAMED:
        version = getattr(sys.modules.get(name), "__version__", None)
        if isinstance(version, str):
            loaded[name] = version
    return loaded


def main(kind, target, options):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this process ends with it
    incoming, outgoing = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)  # what is printed goes where errors go: to the log
    frames = queue.Queue()

    def receive():
        while True:
            try:
                frame = read_frame(incoming)
            except (OSError, ValueError):
                frame = None
            if frame is None:
                os._exit(0)  # the parent has ended, even if predict still runs
            frames.put(frame[0])

    threading.Thread(target=receive, daemon=True).start()
    try:
        import numpy  # noqa: F401
    except ImportError:
        write_frame(outgoing, {"refused": f"its Python ({sys.executable}) has no NumPy: pip install numpy."})
        return
    try:
        predict, about = KINDS[kind](target, options)
        write_frame(outgoing, {"about": about, "versions": versions()})
    except Refused as refused:
        write_frame(outgoing, {"refused": str(refused)})
        return
    memory = None
    while True:
        message = frames.get()
        try:
            if "map" in message:
                with open(message["map"], "r+b") as file:
                    memory = mmap.mmap(file.fileno(), message["bytes"])
                write_frame(outgoing, {})
                continue
            outputs, taps = answer(predict, memory, message, options.get("taps", ()))
            sys.stdout.flush()
            reply = {"shape": list(outputs.shape), "taps": taps, "versions": versions()}
            write_frame(outgoing, reply, outputs.tobytes())
        except Refused as refused:
            write_frame(outgoing, {"refused": str(refused)})


if __name__ == "__main__":
    # Python puts the folder of this file first: its names must not hide those of installed packages.
    sys.path[:] = [
        path for path in sys.path if os.path.abspath(path or ".") != os.path.dirname(os.path.abspath(__file__))
    ]
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
