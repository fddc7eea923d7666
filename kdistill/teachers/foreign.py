"""Teachers from anywhere: a file of any format, or an address, as a function images -> logits.

Keras models run here; everything else in a process of its own (`formats.process`).
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.formats import hdf5, stored
from kdistill.formats.kinds import check_process_settings, file_fingerprint, format_of
from kdistill.formats.process import open_process
from kdistill.networks import heads, saving
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.frozen import frozen

PROCESSES = {"HDF5": "Keras 2 HDF5"}  # what runs a format that has another name there
NOISE_IMAGES = 8  # that show how many classes there are, where a graph has to know it
WITH_TAPS = ("ONNX", "Python file")  # formats that give tensors besides the logits
BATCH = 256  # images of which `store_teacher` computes the outputs at a time
FAILURES: dict[str, InputError] = {}  # of teachers, by their text: TensorFlow passes on the text only


class Foreign:
    """A teacher that is no Keras model: a function, images -> float32 logits `[n, classes]`, eager and in a graph.

    Args:
        predict: float32 images `[n, ...]`, in the layout of the teacher -> outputs `[n, columns]`.
        name: names it in messages.
        identity: what determines the outputs, JSON-ready: it names the cache.
        kind: `logits` or `probabilities`. None: the first batch shows it.
        channels_first: whether the teacher takes [n, channels, height, width].
        classes: the places of the data's classes among its own.
        taps: names of tensors inside of it whose values its process gives behind the logits. Those of
            `channels_first` with four axes become [n, height, width, channels].

    Attributes:
        process: that runs it; None for stored outputs.
        about: what the file says of itself, see `formats.process.Process`.
        width: the number of classes, where it is known without a batch.
        keeps: the temporary folder of a file that was written for it; it is deleted when nothing uses the teacher.
    """

    def __init__(
        self, predict, name: str, identity: dict, kind=None, channels_first: bool = False, classes=None, taps=()
    ):
        self.name, self.kind, self.channels_first, self.taps = name, kind, channels_first, tuple(taps)
        self.classes = None if classes is None else [int(place) for place in classes]
        self.process, self.about, self.width, self.keeps = None, {}, None, None
        self._shapes: dict[tuple, dict[str, tuple]] = {}
        self._predict, self._identity = predict, identity

    @property
    def identity(self) -> dict:
        """What determines the outputs, with the versions of the packages that compute them."""
        own = {"kind": self.kind, "channels_first": self.channels_first, "classes": self.classes}
        own |= {"taps": list(self.taps)} if self.taps else {}
        return {**self._identity, **own, "versions": self.process.versions if self.process else {}}

    def predict(self, images: np.ndarray) -> np.ndarray:
        """float32 logits `[n, classes]` of images `[n, height, width, channels]`, as `Adapted` prepares them."""
        return self.predict_with_taps(images)["logits"]

    def predict_with_taps(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """As `predict`: `logits`, and by its name each tap, float32 `[n, ...]`."""
        images = np.asarray(images, np.float32)
        outputs = self._predict(images.transpose(0, 3, 1, 2) if self.channels_first else images)
        features = {}
        for name in reversed(self.taps):
            shape = self.process.taps[name]
            values = outputs[:, outputs.shape[1] - math.prod(shape) :].reshape(len(outputs), *shape)
            features[name] = values.transpose(0, 2, 3, 1) if self.channels_first and values.ndim == 4 else values
            outputs = outputs[:, : outputs.shape[1] - math.prod(shape)]
        return {"logits": self._logits(outputs), **features}

    def _logits(self, outputs: np.ndarray) -> np.ndarray:
        """The logits of outputs `[n, columns]` of its own kind and classes."""
        if self.kind is None:
            self.kind = heads.exclusive_kind(
                heads.kind_of(outputs, lambda: "unknown"), f"The teacher '{self.name}'", "State it: --teacher-outputs."
            )
        if self.kind == "probabilities":
            if (outputs < 0).any():
                raise InputError(
                    f"The teacher '{self.name}' gives numbers down to {outputs.min():.3g}, which are no probabilities."
                )
            outputs = np.log(np.maximum(outputs, heads.TINIEST)).astype(np.float32)
        if self.classes is None:
            return outputs
        if max(self.classes) >= outputs.shape[1]:
            raise InputError(
                f"The teacher '{self.name}' has the classes 0 to {outputs.shape[1] - 1}, not {max(self.classes)}. Fix "
                "--teacher-classes."
            )
        return np.ascontiguousarray(outputs[:, self.classes])

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The shapes of an example's logits and taps, for images of this shape."""
        if not self.taps and self.width is not None:
            return {"logits": (self.width,)}
        if shape not in self._shapes:
            noise = np.random.default_rng(0).normal(size=(NOISE_IMAGES, *shape))
            values = self.predict_with_taps(noise)
            self._shapes[shape] = {name: value.shape[1:] for name, value in values.items()}
        return self._shapes[shape]

    def __call__(self, images, width: int | None = None):
        if not tf.is_symbolic_tensor(images):
            values = {name: tf.constant(value) for name, value in self.predict_with_taps(np.asarray(images)).items()}
            return values if self.taps else values["logits"]

        def predict(batch):
            try:
                values = self.predict_with_taps(batch)
            except InputError as error:
                FAILURES[str(error)] = error
                raise
            return [np.ascontiguousarray(values[name]) for name in names]

        names = ("logits", *self.taps)
        shapes = {"logits": (width,)}
        if self.taps or (width is None and None not in images.shape[1:]):
            shapes = self.shapes(tuple(images.shape[1:]))
        values = tf.numpy_function(predict, [tf.cast(images, tf.float32)], [tf.float32] * len(names))
        for place, name in enumerate(names):
            values[place] = tf.ensure_shape(values[place], [images.shape[0], *shapes[name]])
        # Changes no bit. An operation that gives scores tells who looks at the graph that these are logits.
        logits = tf.nn.leaky_relu(values[0], alpha=1.0)
        return {"logits": logits, **dict(zip(self.taps, values[1:], strict=True))} if self.taps else logits


@contextlib.contextmanager
def failures_as_messages() -> Iterator[None]:
    """Raises the `InputError` of a teacher where TensorFlow has made another error of it; also a decorator."""
    try:
        yield
    except tf.errors.OpError as error:
        for text, failure in FAILURES.items():
            if text in str(error):
                raise failure from None
        raise


def teacher(
    file: str | Path,
    *,
    size: Sequence[int] | None = None,
    channels: int | None = None,
    bgr: bool | None = None,
    scale: float | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    layout: str | None = None,
    outputs: str | None = None,
    output: str | None = None,
    classes: Sequence[int] | None = None,
    taps: Sequence[str] = (),
    python: str | None = None,
    timeout: float | None = None,
) -> Adapted:
    """A trained model from a file of any format, or behind an address, as a teacher for `Distiller(student, teacher)`.

    Args:
        file: `.keras`, `.h5` or `.hdf5`, the folder of a SavedModel, `.tflite`, `.onnx`, a `.py` file that defines
            `predict(images)`, `.npz` of `store_teacher`, or an `http(s)://` address that takes and gives `.npy`. All
            but the Keras models run in a process of their own.
        size, channels, bgr, scale, mean, std, outputs, layout, output, classes: as for `Adapted`. None: as the file
            states it, where it does.
        taps: names of tensors inside of an `.onnx` file, or keys of the dict that `predict` of a `.py` file returns
            beside `logits`: the `teacher_tap` of terms. A layer of a Keras model needs no entry here.
        python: the interpreter for a `.py` file, an `.onnx` or a SavedModel, in an environment of its own.
        timeout: seconds for the start of the process and for each batch, by default 120.

    Raises:
        InputError: for a file that cannot be used. A message names what is wrong with it.

    Example:
        `kdistill.teacher("model.onnx", mean=(123.7, 116.3, 103.5), std=(58.4, 57.1, 57.4))`
    """
    check_process_settings(file, python, timeout)
    kind, name = format_of(file), Path(str(file)).stem or str(file)
    plain = {"scale": scale, "mean": mean, "std": std, "bgr": bgr, "channels": channels}
    plain |= {"size": None if size is None else tuple(size)}
    plain = {key: value for key, value in plain.items() if value is not None}
    ends = {"outputs": outputs, "layout": layout, "output": output, "classes": classes}
    taps = [tap for tap in dict.fromkeys(taps) if tap != "logits"]
    model = saving.load_model(file) if kind == "Keras" else hdf5.load_hdf5(file) if kind == "HDF5" else None
    if taps and kind not in WITH_TAPS:
        layers = "" if model is None else ": it is a Keras model, and teacher_tap names a layer"
        raise InputError(
            f"taps={', '.join(taps)} works for {' and '.join(WITH_TAPS)}; '{file}' is {kind}. Leave it out{layers}."
        )
    if model is not None:
        return Adapted(model, **plain, **ends)
    identity = {"format": kind, "file": file_fingerprint(file), "output": output}
    if kind == "stored outputs":
        given = [name for name, value in {**plain, **ends}.items() if value is not None]
        if given:
            raise InputError(f"'{file}' holds outputs and no model: {', '.join(given)} would do nothing. Leave it out.")
        outputs_of = stored.StoredOutputs(file)
        foreign = Foreign(outputs_of.predict, name, identity, "logits")
        foreign.width = outputs_of.width
        return Adapted(foreign, outputs="logits")
    options = ({} if output is None else {"output": output}) | ({"taps": taps} if taps else {})
    process = open_process(PROCESSES.get(kind, kind), str(file), name, options, python, timeout, identity["file"])
    shape = process.about.get("shape")
    first = layout == "channels_first" or (layout is None and _looks_channels_first(shape))
    foreign = Foreign(process.ask, name, identity, outputs or process.about.get("outputs"), first, classes, taps)
    foreign.process, foreign.about = process, process.about
    if shape and len(shape) == 3:
        height, width, depth = (*shape[1:], shape[0]) if first else shape
        if height and width:
            plain.setdefault("size", (height, width))
        if depth in (1, 3):
            plain.setdefault("channels", depth)
    if "mean" in foreign.about and not {"mean", "std", "scale"} & plain.keys():
        plain |= {name: tuple(foreign.about[name]) for name in ("mean", "std")}
    return Adapted(foreign, **plain, outputs="logits")


def store_teacher(teacher, examples, folder: str | Path) -> Path:
    """Stores a teacher's outputs for images, to be used as a teacher elsewhere: `--teacher FOLDER/teacher_logits.npz`.

    Each row belongs to the pixels of its image, so order and split do not matter. The images are those that the student
    will see, without augmentation: training, validation and test images.

    Args:
        teacher: a path as for `kdistill.teacher`, a model, a function images -> logits, or an array of logits
            `[n, classes]` that were computed elsewhere for exactly these images, in this order; also the path of such
            an array, a `.npy` file of `numpy.save`.
        examples: `Examples`, or images `[n, height, width, channels]`, pixels 0..255; or a list of these.
        folder: where `teacher_logits.npz` is written.

    Returns the path of the file. Raises `InputError` for another number of rows than of images, and for outputs that
    are not finite.

    Example:
        `kdistill.store_teacher(logits, [splits.train, splits.validation, splits.test], "outputs")`
    """
    parts = list(examples) if isinstance(examples, (list, tuple)) else [examples]
    images = np.concatenate([np.asarray(getattr(part, "images", part)) for part in parts])
    if isinstance(teacher, (str, Path)) and Path(str(teacher)).suffix.lower() == ".npy":
        logits = stored.read_array(teacher)
    elif isinstance(teacher, np.ndarray):
        logits = teacher
    else:
        model = _open(teacher) if isinstance(teacher, (str, Path)) else teacher
        predict = frozen(model)
        batches = (tf.constant(images[start : start + BATCH], tf.float32) for start in range(0, len(images), BATCH))
        logits = np.concatenate([np.asarray(predict(batch)) for batch in batches])
    if logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] < 2:
        raise InputError(
            f"store_teacher expects logits [{len(images)}, classes], a row for each image; received {logits.shape}."
        )
    if not np.isfinite(logits).all():
        raise InputError("store_teacher expects finite logits, received NaN or infinity. Check the teacher's inputs.")
    return stored.write(Path(folder) / stored.NAME, images, logits)


def _looks_channels_first(shape) -> bool:
    """Whether an image shape is (channels, height, width), as PyTorch writes it."""
    return bool(shape) and len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3)


_open = teacher  # an argument of `store_teacher` has this name
