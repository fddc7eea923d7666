"""A teacher from a file as the Keras model, images of the data -> logits, that a run measures, blends and stores."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill.errors import InputError
from kdistill.formats.kinds import file_fingerprint, format_of
from kdistill.networks import heads, saving, signatures
from kdistill.networks.outputs import as_logits
from kdistill.recipe import Network
from kdistill.recipe.values import FILE_SETTINGS
from kdistill.teachers.adapted import Adapted
from kdistill.teachers.foreign import Foreign
from kdistill.teachers.foreign import teacher as open_file

NOISE_IMAGES = 8  # that show what the outputs are


@keras.saving.register_keras_serializable(package="kdistill")
class Seen(keras.layers.Layer):
    """Images as `Adapted` prepares them for a teacher."""

    def __init__(self, adapted: dict, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.settings = {key: tuple(value) if isinstance(value, list) else value for key, value in adapted.items()}
        self._prepare = Adapted(None, **self.settings).prepare
        self.built = True

    def call(self, images):
        return self._prepare(images)

    def get_config(self):
        return {**super().get_config(), "adapted": self.settings}


class Answers(keras.layers.Layer):
    """The logits that a function which is no Keras model gives. What identifies it is in the config."""

    def __init__(self, function, classes: int, identity: dict, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self._function, self._classes, self._identity = function, classes, identity
        self.built = True

    def call(self, images):
        """Logits `[n, classes]`, or a dict of `logits` and the taps."""
        return self._function(images, self._classes)

    def get_config(self):
        return {**super().get_config(), "identity": self._identity}


@keras.saving.register_keras_serializable(package="kdistill")
class Tensor(keras.layers.Layer):
    """One of the answers, unchanged, so that a term can tap it by its own name, which may be none for a layer."""

    def __init__(self, tap: str, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.tap_name, self.built = tap, True

    def call(self, tensor):
        return tf.identity(tensor)

    def get_config(self):
        return {**super().get_config(), "tap": self.tap_name}


@keras.saving.register_keras_serializable(package="kdistill")
class First(keras.layers.Layer):
    """The first of several tensors: the others are in the graph of the model, but none of its outputs."""

    def __init__(self, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.built = True

    def call(self, tensors):
        return tf.nn.leaky_relu(tensors[0], alpha=1.0)  # the graph shows that these are scores


@dataclasses.dataclass(frozen=True)
class TeacherFile:
    """A teacher of a run that comes from a file.

    `fingerprint` is the file's; `versions` are those of the process that runs it; `parameters` are the model's, where
    they are known. `adapted` is the teacher as it sees the images.
    """

    name: str
    file: str
    format: str
    fingerprint: str
    versions: dict
    parameters: int | None
    model: keras.Model
    adapted: Adapted

    @property
    def foreign(self) -> bool:
        """Whether it is no Keras model."""
        return not isinstance(self.adapted.teacher, keras.Model)

    def log_to(self, path: Path) -> None:
        """Writes what a process of its own prints to a file."""
        if getattr(self.adapted.teacher, "process", None) is not None:
            self.adapted.teacher.process.log_to(path)

    def as_dict(self) -> dict:
        """For a report."""
        names = ("name", "file", "format", "fingerprint", "versions")
        return {name: getattr(self, name) for name in names}


def settings_of(network: Network) -> dict:
    """The settings of a teacher's file that a recipe gives."""
    values = {name: getattr(network, name) for name in FILE_SETTINGS}
    return {name: value for name, value in values.items() if value is not None}


def load_teacher(
    network: Network,
    shape: tuple[int, int, int],
    classes: int,
    say: Callable[[str], None] | None = None,
    taps: Collection[str] = (),
) -> TeacherFile:
    """The teacher of a recipe that comes from a file, checked to fit the data.

    Args:
        network: with `file`, and its settings.
        shape: (height, width, channels) of the data's images.
        classes: the number of classes of the data.
        say: receives how images are changed for it.
        taps: of terms: layers of a Keras model, or tensors of another format, see `kdistill.teacher`.

    Raises `InputError` for a file that cannot be used, another shape, or another number of classes.
    """
    file, settings = network.file, settings_of(network)
    kind = format_of(file)
    if kind == "Keras" and not settings:
        model = saving.load_checked(file, shape, classes)
        adapted = Adapted(model)
    else:
        own = sorted(set(taps)) if kind not in ("Keras", "HDF5") else ()
        adapted = open_file(file, taps=own, **settings)
        model = as_model(adapted, shape, classes, Path(file).stem)
    foreign = adapted.teacher if isinstance(adapted.teacher, Foreign) else None
    if foreign is not None and foreign.process is not None and say is not None:
        foreign.process.say = lambda text: say(f"Warning: {text}")
    if say is not None and adapted.size is not None and tuple(adapted.size) != tuple(shape[:2]):
        say(f"The teacher '{Path(file).stem}' sees the images of {shape[:2]} resized to {tuple(adapted.size)}.")
    is_model = isinstance(adapted.teacher, keras.Model)
    parameters = adapted.teacher.count_params() if is_model else foreign and foreign.about.get("parameters")
    versions = {} if foreign is None else foreign.identity["versions"]
    return TeacherFile(
        Path(file).stem, str(file), kind, file_fingerprint(file), versions, parameters or None, model, adapted
    )


def load_keras_teacher(network: Network) -> TeacherFile:
    """The teacher of a recipe for other data than images with a class: a Keras model, taken as it is.

    Raises `InputError` for a file of another format, and for settings of how it sees images.
    """
    file, settings = network.file, settings_of(network)
    kind = format_of(file)
    if kind != "Keras" or settings:
        received = f"'{file}' ({kind})" + (f" with {', '.join(settings)}" if settings else "")
        raise InputError(
            f"A teacher for data other than images with a class is a .keras file without settings of its own; received "
            f"{received}. Other formats work in Python: kdistill.Distiller(student, kdistill.teacher(...))."
        )
    model = saving.load_model(file)
    name = Path(file).stem
    return TeacherFile(name, str(file), kind, file_fingerprint(file), {}, model.count_params(), model, Adapted(model))


def as_model(adapted: Adapted, shape: tuple[int, int, int], classes: int, name: str) -> keras.Model:
    """A Keras model, the data's images -> logits, of a teacher from a file. Raises `InputError` if it does not fit."""
    teacher, subject = adapted.teacher, f"The teacher '{name}'"
    image = keras.Input(shape, name="image")
    inputs = _seen(adapted, image, subject)
    if isinstance(teacher, keras.Model):
        expected, received = signatures.image_shape(teacher), tuple(inputs.shape[1:])
        if expected != received:
            raise InputError(
                f"{subject} expects images of {expected}, but receives {received}. Give size (--teacher-size "
                f"{expected[0]}x{expected[1]}) and channels (--teacher-channels {expected[2]}) of its images."
            )
        outputs = teacher(inputs)
    else:
        noise = np.random.default_rng(0).integers(0, 256, (NOISE_IMAGES, *shape)).astype(np.float32)
        width = teacher.width
        if width is None:
            width = teacher.predict(np.asarray(adapted.prepare(tf.constant(noise)))).shape[1]
        _check_classes(subject, width, classes)
        outputs = Answers(teacher, width, teacher.identity, name="answers")(inputs)
        if teacher.taps:
            tensors = [Tensor(tap, name=f"tap_{place}")(outputs[tap]) for place, tap in enumerate(teacher.taps)]
            outputs = First(name="logits")([outputs["logits"], *tensors])
    if isinstance(outputs, dict):
        names = ", ".join(sorted(outputs))
        outputs = next((outputs[key] for key in heads.MAIN_OUTPUTS if key in outputs), None)
        if outputs is None:
            raise InputError(f"{subject} has the outputs {names}. Say which one classifies: --teacher-output NAME.")
    model = keras.Model(image, outputs, name=name.replace("/", "_"))
    if isinstance(teacher, keras.Model):
        head = signatures.head_of(model)
        if adapted.outputs is None:
            heads.exclusive_kind(head.kind, signatures.subject_of(model, "teacher"), "State it: --teacher-outputs.")
        _check_classes(subject, head.classes, classes)
        if adapted.outputs == "probabilities" and head.kind != "probabilities":
            model = keras.Model(image, Logits("probabilities", name="as_logits")(outputs), name=model.name)
    return model


@keras.saving.register_keras_serializable(package="kdistill")
class Logits(keras.layers.Layer):
    """The logits of outputs whose kind the user states."""

    def __init__(self, kind: str, **kwargs):
        super().__init__(**{"autocast": False, **kwargs})
        self.kind, self.built = kind, True

    def call(self, outputs):
        return tf.nn.log_softmax(as_logits(outputs, self.kind))

    def get_config(self):
        return {**super().get_config(), "kind": self.kind}


def _seen(adapted: Adapted, image, subject: str):
    settings = {
        field.name: getattr(adapted, field.name)
        for field in dataclasses.fields(Adapted)
        if field.name in ("size", "channels", "bgr", "scale", "mean", "std")
    }
    for name in ("mean", "std"):
        settings[name] = np.ravel(settings[name]).tolist()
        depth = adapted.channels or image.shape[-1]
        if len(settings[name]) not in (1, depth):
            raise InputError(
                f"{subject}: {name} has {len(settings[name])} numbers; expected one, or {depth}, one for each channel."
            )
    if adapted.changes_nothing:
        return image
    return Seen(settings, name="seen")(image)


def _check_classes(subject: str, received: int, classes: int) -> None:
    if received != classes:
        raise InputError(
            f"{subject} gives {received} classes, the data has {classes}. Give the places of the data's classes among "
            "those of the teacher, in the order of the data: --teacher-classes 3,0,7 (classes=... in a recipe)."
        )
