"""The models of a run, each fitted once: a finished one is loaded, an interrupted one resumes from its checkpoint."""

from collections.abc import Callable, Collection
from pathlib import Path

import keras
import numpy as np

from kdistill.data import few_labels
from kdistill.data.batches import steps_per_epoch
from kdistill.data.splits import Splits
from kdistill.distillation.distiller import Distiller, from_recipe
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.evaluation import disagreement, input_checks
from kdistill.evaluation.evaluate import predict
from kdistill.networks import applications, architectures, copying, saving, weights
from kdistill.networks.precision import dtype_policy
from kdistill.networks.signatures import inputs_of
from kdistill.recipe import Network, Recipe, Training
from kdistill.recipe.objective import teacher_taps
from kdistill.recipe.values import LITERT
from kdistill.runs import scores
from kdistill.runs.folder import RunFolder
from kdistill.runs.teaching import Teaching
from kdistill.teachers.as_model import TeacherFile, load_keras_teacher, load_teacher, settings_of
from kdistill.teachers.frozen import blend_models
from kdistill.teachers.normalizations import look_at
from kdistill.training import fit
from kdistill.training.strategy import SINGLE_DEVICE, Devices

IMAGES = 256  # training images that show whether a network's inputs are scaled


class Arms:
    """Fits teacher, control, student and the other models of a run.

    All models see the same data in the same order, and networks of one seed start from the same weights. They are
    created in the scope of `devices`.

    Attributes:
        models: models by name, such as `teacher`, `control`, `student`, `student-1` (of the second seed).
        fits: the record of each fit by name: seconds, steps, metrics, history.
        warnings: about data, teacher and inputs, for the report.
        teaching: how students get the teacher's outputs; set by `fit_teacher`.
        teacher_files: the teachers that come from files, by name.
        seeds: the number of seeds with which control and student have been trained.
    """

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        folder: RunFolder,
        say: Callable[[str], None],
        devices: Devices = SINGLE_DEVICE,
        profile: bool = False,
        download: bool = False,
    ):
        self.recipe, self.splits, self.folder, self.say = recipe, splits, folder, say
        self.devices, self.profile, self.download = devices, profile, download
        self.models: dict[str, keras.Model] = {}
        self.fits: dict[str, dict] = {}
        self.warnings: list[str] = list(splits.warnings)
        self.teaching: Teaching | None = None
        self.teacher_files: dict[str, TeacherFile] = {}
        self.seeds = 0
        self._taps: dict[str, str] = {}  # set by `fit_teacher`
        self._test_outputs: dict[str, scores.Outputs] = {}

    def fit_teacher(self, taps: dict[str, str] | None = None) -> keras.Model:
        """Loads or trains what teaches the students: the recipe's teacher, several blended, or the last assistant.

        `models["teacher"]` is the recipe's teacher; each of several is also a model of its own. `taps`: the layers of
        the teacher that students use, with the settings that name them, by default those of the recipe's terms.
        """
        self._taps = teacher_taps(self.recipe.distill.terms) if taps is None else taps
        networks = (self.recipe.teacher, *self.recipe.more_teachers)
        if len(networks) == 1:
            teacher = self._teacher("teacher", networks[0])
        else:
            teachers = [self._teacher(f"teacher_{place}", network) for place, network in enumerate(networks)]
            with self.devices.scope():
                teacher = self.models["teacher"] = blend_models(teachers, self.recipe.distill.teacher_weights)
        if self.devices.chief:
            self._look_at_files()
            if len(self.teacher_files) < len(networks) and scores.images_with_a_class(self.splits):
                validation, classes = self.splits.validation, len(self.splits.class_names)
                self._warn(input_checks.teacher_warning(teacher, validation.images, validation.labels, classes))
        for place, network in enumerate(self.recipe.assistants):
            teacher = self._assistant(place, network, teacher)
        foreign = any(file.foreign for file in self.teacher_files.values()) and not self.recipe.assistants
        place = self.recipe, self.splits, self.folder, self.devices, self.say
        self.teaching = Teaching(teacher, *place, self._taps, foreign)
        return teacher

    def test_outputs(self, name: str) -> scores.Outputs:
        """What a model gives for the test examples, see `scores.outputs_on`; computed once."""
        if name not in self._test_outputs:
            self._test_outputs[name] = scores.outputs_on(self.models[name], self.splits.test, self.splits)
        return self._test_outputs[name]

    def test_scores(self, name: str) -> np.ndarray:
        """The score of each test example, `[n]`, see `scores.scores_of`."""
        return scores.scores_of(self.models[name], self.test_outputs(name), self.splits.test, self.splits)

    def fit_control(self, place: int, name: str | None = None) -> keras.Model:
        """Trains the student on labels alone: the same budget, start and order as the student of the same seed.

        `place`: 0 for the recipe's first seed, 1 for the next.
        """
        views, splits = self.teaching.views(self.recipe.seed + place), few_labels.for_control(self.splits)
        name = name or numbered("control", place)
        return self._fit(name, lambda: self.control(place), self.recipe.training, splits, **views)

    def fit_student(self, place: int, cache: str) -> keras.Model:
        """Trains the student on labels, where there are any, and the teacher's outputs.

        `place` as for the control; `cache` as for `Teaching.replay`.
        """
        name, seed, splits = numbered("student", place), self.recipe.seed + place, few_labels.for_student(self.splits)
        stored, views = self.teaching.replay(name, seed, cache), self.teaching.views(seed)
        return self._fit(
            name,
            lambda: self.distiller(place, self.teaching.model),
            self.recipe.training,
            splits,
            stored=stored,
            **views,
        )

    def control(self, place: int) -> Supervised:
        """The control of the seed at this place, with its start."""
        return Supervised(self.network(self.recipe.student, self.recipe.seed + place), head=self.splits.head)

    def distiller(self, place: int, teacher) -> Distiller:
        """The student of the seed at this place, with its start, and `teacher`, a model or a function."""
        steps = steps_per_epoch(self.splits.train, self.recipe.training.batch_size) * self.recipe.training.epochs
        student = self.network(self.recipe.student, self.recipe.seed + place)
        return from_recipe(self.recipe.distill, student, teacher, steps, self.splits.head)

    def network(self, network: Network, seed: int) -> keras.Model:
        """A network with the start that belongs to a seed, or with the weights of the files that it names."""
        return self._built(network, seed)[0]

    def plain_models(self) -> dict[str, keras.Model]:
        """`models` outside of the strategy: what comes after training measures and converts plain models."""
        if self.devices.strategy:
            paths = {name: self.folder.path / f"{name}.keras" for name in self.models}
            if self.recipe.teacher.file:
                paths["teacher"] = Path(self.recipe.teacher.file)
            self.models = {name: self._plain(name, path) for name, path in paths.items()}
        return self.models

    def _teacher(self, name: str, network: Network) -> keras.Model:
        """A teacher of the recipe: from its file, with trained weights, or trained."""
        if network.file:
            file = load_network(network, self.splits, self.devices, self.say, self._taps)
            self.teacher_files[name], self.models[name] = file, file.model
            file.log_to(self.folder.path / "logs" / f"{name}.log")
        elif needs_training(network, self.splits.sizes):
            splits = few_labels.for_teacher(self.splits, self.recipe.data)
            seed = self.recipe.seed

            def teacher() -> Supervised:
                return Supervised(self._in_precision(network, seed), head=self.splits.head)

            self._fit(name, teacher, self.recipe.teacher_training, splits, seed)
        else:
            self.models[name], loaded = self._built(network, self.recipe.seed)
            if loaded and loaded["not_loaded"]:
                self._warn(
                    f"The layers {', '.join(loaded['not_loaded'])} of {name} ('{network.name}') received no weights "
                    f"from {', '.join(network.weights)}: they stay random, because this teacher is not trained. Give a "
                    "mapping."
                )
        return self.models[name]

    def _look_at_files(self) -> None:
        """States what the teachers from files are, and their accuracy; warns of one near chance."""
        for file in self.teacher_files.values():
            if not scores.images_with_a_class(self.splits):
                self.say(f"Teacher '{file.name}': {file.format}, {file.file}, fingerprint {file.fingerprint}")
                continue
            sentence, warning = look_at(file, self.splits.validation.images, self.splits.validation.labels)
            self.say(sentence)
            self._warn(warning)

    def _assistant(self, place: int, network: Network, teacher: keras.Model) -> keras.Model:
        """A teacher assistant: taught by the one before it, trained like a teacher."""
        splits, training = few_labels.for_student(self.splits), self.recipe.teacher_training
        steps = steps_per_epoch(splits.train, training.batch_size) * training.epochs
        # With the seed of the student, a student of the same architecture would start where the assistant did.
        start = self.recipe.seed + 1000 * (place + 1)

        def distiller() -> Distiller:
            student = self._in_precision(network, start)
            return from_recipe(self.recipe.distill, student, teacher, steps, self.splits.head)

        return self._fit(f"assistant_{place}", distiller, training, splits, self.recipe.seed)

    def _in_precision(self, network: Network, seed: int) -> keras.Model:
        """A teacher to be trained, in `teacher_precision`."""
        with dtype_policy(training_precision(self.recipe)):
            return self.network(network, seed)

    def _built(self, network: Network, seed: int) -> tuple[keras.Model, dict | None]:
        model, loaded = build_network(network, self.splits, seed, self.devices, self.download)
        if loaded:
            self.say(f"Weights of '{network.name}': {weights.summary(loaded)}.")
        return model, loaded

    def _fit(
        self, name: str, make: Callable[[], Supervised], training: Training, splits: Splits, seed: int, **options
    ) -> keras.Model:
        """Fits the model that `make` returns; keeps its student as `<name>.keras` in the run folder.

        `options`: `repeat` and `stored` of `training.fit.fit`.
        """
        self.folder.fetch(name, self.devices)
        with self.devices.scope():
            finished = self.folder.finished(name)
            if finished:
                self.say(f"{name}: already finished")
                self.models[name], self.fits[name] = finished
                return self.models[name]
            model = make()
        warning = unscaled_warning(model.student, splits)
        if warning:
            self.say(f"Warning: {warning}")
        self.say(f"Training {name}: {model.student.count_params():,} parameters, {training.epochs} epochs")
        logs, checkpoints = self.folder.path / "logs" / name, self.folder.checkpoints(name)
        if not self.devices.chief:
            logs = checkpoints = None
        options |= {"devices": self.devices, "profile": self.profile}
        record = fit.fit(model, splits, self.recipe.data, training, seed, logs, checkpoints, self.say, **options)
        return self.finish(name, model, with_warning(record, warning))

    def finish(self, name: str, model: Supervised, record: dict) -> keras.Model:
        """Keeps the student of a model that has been fitted, here and in the run folder."""
        self.models[name], self.fits[name] = model.student, record
        if self.devices.chief:
            shows = isinstance(model, Distiller) and scores.images_with_a_class(self.splits)
            if shows and not name.startswith("assistant"):
                self._log_disagreement(name, model)
            self.folder.finish(name, model.student, record)
        return model.student

    def _log_disagreement(self, name: str, model: Supervised) -> None:
        """Writes images on which student and teacher disagree to TensorBoard."""
        examples = self.splits.validation.select(slice(disagreement.TENSORBOARD_IMAGES))
        student, teacher = (predict(model, examples.images) for model in (model.student, self.models["teacher"]))
        folder, step = self.folder.path / "logs" / name / "differences", int(model.global_step.numpy())
        disagreement.write_tensorboard(student, teacher, examples, self.splits.class_names, folder, step)

    def _warn(self, warning: str | None) -> None:
        """Prints a warning and keeps it for the report."""
        if warning:
            self.say(f"Warning: {warning}")
            self.warnings.append(warning)

    def _plain(self, name: str, path: Path) -> keras.Model:
        """A model without a strategy: from its file, or a copy where a teacher with trained weights has none."""
        if path.is_file():
            return saving.load_model(path)
        return copying.clone(self.models[name])


def numbered(name: str, place: int) -> str:
    """The name of a model of the seed at this place: `student`, `student-1`, ..."""
    return f"{name}-{place}" if place else name


def training_precision(recipe: Recipe) -> str:
    """The precision in which a run trains its teacher: LiteRT only runs it."""
    return recipe.precision if recipe.teacher_precision in (None, *LITERT) else recipe.teacher_precision


def unscaled_warning(model: keras.Model, splits: Splits) -> str | None:
    """As `input_checks.unscaled_warning`; nothing is known of the range of inputs other than images."""
    return input_checks.unscaled_warning(model, splits.train.images[:IMAGES]) if splits.has_images else None


def with_warning(record: dict, warning: str | None) -> dict:
    """The record of a fit with one more warning, if there is one."""
    texts = [text for text in (warning, record.get("warning")) if text]
    return record | ({"warning": " ".join(texts)} if texts else {})


def needs_training(network: Network, sizes) -> bool:
    """Whether a teacher has to be trained: it comes neither from a file nor with trained weights.

    `sizes`: as `Splits.sizes`.
    """
    pretrained = isinstance(sizes, int) and applications.is_pretrained(network.options, sizes)
    return not (network.file or network.weights or pretrained)


def load_network(
    network: Network,
    splits: Splits,
    devices: Devices,
    say: Callable[[str], None] | None = None,
    taps: Collection[str] = (),
) -> TeacherFile:
    """The teacher in a file, checked to fit the images and classes. `say` receives what is changed for it.

    `taps`: the layers or tensors of the teacher that terms use.
    """
    with devices.scope():
        if scores.images_with_a_class(splits):
            file = load_teacher(network, splits.input_shape, splits.sizes, say, taps)
        else:
            file = load_keras_teacher(network)
            check_fits(file.model, splits)
    if devices.strategy and (file.foreign or file.format != "Keras" or settings_of(network)):
        raise InputError(
            f"With --strategy a teacher is a .keras file without settings of its own, received '{network.file}' "
            f"({file.format}). Use --strategy none."
        )
    return file


def check_fits(model: keras.Model, splits: Splits) -> None:
    """Raises `InputError` if a network does not take the inputs of the data, or gives other outputs than they need.

    Images with a class are checked where the network is built.
    """
    if scores.images_with_a_class(splits):
        return
    shapes = splits.input_shape if isinstance(splits.input_shape, dict) else {"": splits.input_shape}
    inputs = inputs_of(model)
    one = len(inputs) == len(shapes) == 1
    names = dict(zip(inputs, shapes if one else inputs, strict=True))  # those of the data
    fits = set(names.values()) == set(shapes)
    for name, one in inputs.items() if fits else ():
        received = shapes[names[name]]
        sizes = zip(one.shape, received, strict=False)
        fits = fits and len(one.shape) == len(received) and all(size in (None, given) for size, given in sizes)
    if not fits:
        expected = ", ".join(f"{name} {one.shape}" for name, one in inputs.items())
        received = ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())
        raise InputError(f"The network '{model.name}' expects the inputs {expected}; the data has {received}.")
    outputs, received = splits.outputs, scores.heads_in(model, splits)
    of_data = dict(zip(outputs, received.values(), strict=True)) if len(outputs) == len(received) == 1 else received
    same = set(outputs) == set(of_data) and all(
        of_data[name].meaning == expected.meaning and _shapes_fit(of_data[name].shape, expected.shape)
        for name, expected in outputs.items()
    )
    if not same:
        needed = ", ".join(f"{name} {output.shape} of {output.meaning}".strip() for name, output in outputs.items())
        given = ", ".join(f"{name} {head.shape} of {head.meaning}" for name, head in received.items())
        raise InputError(f"The data needs a network with the outputs {needed}; '{model.name}' has {given}.")


def _shapes_fit(given: tuple, expected: tuple[int, ...]) -> bool:
    """Whether an output has the shape of the data's; sizes of positions may be open."""
    return len(given) == len(expected) and given[-1] == expected[-1]


def build_network(
    network: Network, splits: Splits, seed: int, devices: Devices, download: bool = False
) -> tuple[keras.Model, dict | None]:
    """A network with the random start that belongs to a seed, or with the weights of the files that it names.

    Returns the network, and of files what `weights.load` reports, else None. Raises `InputError` for a network, option
    or file that does not fit, and if no layer has received weights.
    """
    keras.utils.set_random_seed(seed)
    with devices.scope():
        model = architectures.build(network, splits.input_shape, splits.sizes, download)
        check_fits(model, splits)
        if not network.weights:
            return model, None
        mappings = network.mapping if len(network.weights) > 1 else {network.weights[0]: network.mapping}
        loaded = weights.load(model, [(file, mappings.get(file) or None) for file in network.weights])
    if not loaded["loaded"]:
        raise InputError(
            f"No layer of '{network.name}' has the name of a layer of {', '.join(network.weights)}. Give the network a "
            "mapping, {layer of the file: layer of the network}."
        )
    return model, loaded
