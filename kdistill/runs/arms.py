"""The models of a run, each fitted once: what an earlier session finished is loaded, what it began is gone on with."""

from collections.abc import Callable, Collection
from pathlib import Path

import keras
import numpy as np

from kdistill.data import batches, few_labels
from kdistill.data.splits import Examples, Splits
from kdistill.distillation.distiller import from_recipe
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.evaluation import disagreement, input_checks, verdict
from kdistill.evaluation.evaluate import predict
from kdistill.networks import applications, architectures, folding, saving, weights
from kdistill.recipe import Network, Recipe, Training
from kdistill.runs.folder import RunFolder
from kdistill.teachers import blend
from kdistill.teachers.replay import Replay, pays
from kdistill.training import fit as training_fit
from kdistill.training.strategy import ONE, Devices

LOOKED_AT = 256  # training images that show whether a network's inputs are scaled


class Arms:
    """Teacher, control, student and what else a run trains, by name: `models[name]`, and the record of each fit in
    `fits[name]`. All see the same data in the same order; networks of one seed start from the same weights. All are
    made in the scope of `devices`, whatever these are."""

    def __init__(
        self,
        recipe: Recipe,
        splits: Splits,
        folder: RunFolder,
        say: Callable[[str], None],
        devices: Devices = ONE,
        profile: bool = False,
        download: bool = False,
    ):
        self.recipe, self.splits, self.folder, self.say = recipe, splits, folder, say
        self.devices, self.profile, self.download = devices, profile, download
        self.models: dict[str, keras.Model] = {}
        self.fits: dict[str, dict] = {}
        self.warnings: list[str] = []  # about the teacher

    def network(self, spec: Network, seed: int) -> keras.Model:
        """The network with the start that belongs to this seed, or the weights of the files that it names."""
        return self._started(spec, seed)[0]

    def _started(self, spec: Network, seed: int) -> tuple[keras.Model, list[str]]:
        """The network, and its layers that no file has filled, where there are files."""
        keras.utils.set_random_seed(seed)
        shape, classes = self.splits.train.images.shape[1:], len(self.splits.class_names)
        with self.devices.scope():
            network = architectures.build(spec, shape, classes, self.download)
            if not spec.weights:
                return network, []
            mappings = spec.mapping if len(spec.weights) > 1 else {spec.weights[0]: spec.mapping}
            found = weights.load(network, [(file, mappings.get(file) or None) for file in spec.weights])
        self.say(f"Weights of '{spec.name}': {weights.told(found)}.")
        if not found["loaded"]:
            raise InputError(
                f"No layer of '{spec.name}' has the name of a layer of {', '.join(spec.weights)}. Give the network a "
                "mapping, {layer of the file: layer of the network}."
            )
        return network, found["not_loaded"]

    def warn(self, warning: str) -> None:
        """Says it, and puts it into the report."""
        self.say(f"Warning: {warning}")
        self.warnings.append(warning)

    def teacher(self) -> keras.Model:
        """What teaches the student: the recipe's teacher, loaded or trained, several blended, or the last assistant.

        `models["teacher"]` is that of the recipe; of several, each is a row of its own.
        """
        specs, seed = (self.recipe.teacher, *self.recipe.more_teachers), self.recipe.seed
        if len(specs) == 1:
            taught_by = self._trained_or_loaded("teacher", specs[0])
        else:
            each = [self._trained_or_loaded(f"teacher_{place}", spec) for place, spec in enumerate(specs)]
            with self.devices.scope():
                taught_by = blend.blended(each, self.recipe.distill.teacher_weights)
            self.models["teacher"] = taught_by
        images, labels = self.splits.validation.images, self.splits.validation.labels
        if self.devices.chief:
            warning = input_checks.teacher_warning(taught_by, images, labels, len(self.splits.class_names))
            if warning:
                self.warn(warning)
        for place, spec in enumerate(self.recipe.assistants):
            name = f"assistant_{place}"
            splits, training = few_labels.for_student(self.splits), self.recipe.teacher_training
            steps = batches.steps_per_epoch(splits.train, training.batch_size) * training.epochs

            # Of its own start: with the seed of the student a student of the same network would begin where it did.
            def assistant(spec=spec, above=taught_by, start=seed + 1000 * (place + 1), steps=steps) -> Supervised:
                return from_recipe(self.recipe.distill, self.network(spec, start), above, steps)

            taught_by = self.fit(name, assistant, training, splits, seed)
        return taught_by

    def _trained_or_loaded(self, name: str, spec: Network) -> keras.Model:
        seed = self.recipe.seed
        if not spec.file and (spec.weights or applications.trained(spec.options, len(self.splits.class_names))):
            self.models[name], lacking = self._started(spec, seed)
            if lacking:
                self.warn(
                    f"The layers {', '.join(lacking)} of {name} ('{spec.name}') got no weights from "
                    f"{', '.join(spec.weights)}: they are random, and it is not trained. Give a mapping."
                )
            return self.models[name]
        if not spec.file:
            training, splits = self.recipe.teacher_training, few_labels.for_teacher(self.splits, self.recipe.data)
            return self.fit(name, lambda: Supervised(self.network(spec, seed)), training, splits, seed)
        shape, classes = self.splits.train.images.shape[1:], len(self.splits.class_names)
        with self.devices.scope():
            self.models[name] = saving.load_checked(spec.file, shape, classes)
        return self.models[name]

    def asked(self, teacher: keras.Model, taps: Collection[str]) -> keras.Model:
        """The teacher as students ask it: a copy for inference, in which the layers `taps` give what they gave."""
        precision = self.recipe.teacher_precision
        own = not isinstance(teacher, keras.Model) or bool(self.devices.strategy)
        if precision and (own or taps):
            raise InputError(
                f"teacher_precision={precision} is for one teacher, on one device, of whose layers no term takes "
                "anything. Leave it out (--set teacher_precision=none)."
            )
        if own:
            return teacher
        return folding.checked(teacher, self.splits.validation.images[:LOOKED_AT], precision, self.say, taps)

    def control(self, name: str, seed: int) -> keras.Model:
        """The student trained on labels alone: the same budget, start and order as the student of this seed."""
        splits, student, views = few_labels.for_control(self.splits), self.recipe.student, self.views(seed)
        return self.fit(name, lambda: Supervised(self.network(student, seed)), self.recipe.training, splits, **views)

    def student(
        self, name: str, seed: int, make: Callable[[keras.Model, int], Supervised], stored: Replay | None = None
    ) -> keras.Model:
        """The student of `make(network, steps)`, which learns from labels, where it has any, and from the teacher or
        what is stored of its outputs."""
        splits, student, training = few_labels.for_student(self.splits), self.recipe.student, self.recipe.training
        steps = batches.steps_per_epoch(splits.train, training.batch_size) * training.epochs
        views = {**self.views(seed), "stored": stored, "taught": True}
        return self.fit(name, lambda: make(self.network(student, seed), steps), training, splits, **views)

    def views(self, seed: int) -> dict:
        """Seed and repetition of the views that control and student of this seed see."""
        cache = self.recipe.cache
        return {"seed": seed if cache.seed is None else cache.seed, "repeat": cache.views}

    def stored(self, name: str, seed: int, teacher: keras.Model, mode: str, uses: int = 1) -> Replay | None:
        """The teacher's outputs for this student, from a cache, where `mode` has it so: the folder of all caches, off,
        or auto, which is where it pays. None: the teacher runs with the student. `uses`: fits on the views of a seed.
        """
        cache, epochs = self.recipe.cache, self.recipe.training.epochs
        if self.devices.strategy:
            if cache.top_k or mode not in ("auto", "off"):
                raise InputError(
                    "A cache of the teacher's outputs is for one device; with --strategy the teacher runs with the "
                    f"student. Leave out --cache {mode} and cache.top_k, or take --strategy none."
                )
            return None
        tapping = [term for term, each in self.recipe.distill.terms.items() if each.teacher_tap]
        if tapping and mode not in ("off", "auto"):
            raise InputError(
                f"--cache stores logits; the terms {', '.join(tapping)} need the teacher's layers. Leave it out."
            )
        mode = "off" if tapping else mode
        if (self.folder.checkpoints(name) / "finished.json").exists():
            return None

        def made(root: str | None) -> Replay:
            splits, seed_of_views = few_labels.for_student(self.splits), self.views(seed)["seed"]
            batch = self.recipe.training.batch_size
            return Replay(teacher, splits, self.recipe.data, batch, seed_of_views, root, cache.top_k)

        def choice() -> str | None:
            if mode == "off" and cache.top_k:
                raise InputError(f"cache.top_k={cache.top_k} says how to store logits; --cache off stores none.")
            if mode == "off":
                return None
            replay = made(None if mode == "auto" else mode)
            shared = replay.by_image or cache.seed is not None
            fits = uses * self.recipe.seeds if shared else uses
            return str(replay.root.resolve()) if pays(replay, mode, epochs, cache.views, fits, self.say) else None

        root = self.folder.settled(name, "cache", choice)
        if root is None:
            return None
        replay = made(root)
        replay.build(replay.views(epochs, cache.views), self.say)
        return replay

    def verdict(self, logits: dict[str, np.ndarray]) -> dict:
        """Student against control over the seeds that were trained; `logits` by name, on the test images."""
        labels, ends = self.splits.test.labels, [f"-{place}" if place else "" for place in range(self.recipe.seeds)]
        right = {name: logits[name].argmax(axis=1) == labels for name in logits}
        student, control = ([right[arm + end] for end in ends] for arm in ("student", "control"))
        accuracy = [[float(each.mean()) for each in arm] for arm in (student, control)]
        only = None
        if self.recipe.seeds == 1:
            only = int((student[0] & ~control[0]).sum()), int((control[0] & ~student[0]).sum())
        return verdict.judge(*accuracy, len(labels), only)

    def fit(
        self,
        name: str,
        make: Callable[[], Supervised],
        training: Training,
        splits: Splits,
        seed: int,
        taught: bool = False,
        **views,
    ) -> keras.Model:
        """The student of what `make` gives, fitted; kept in the run folder as `<name>.keras`.

        `views`: see `train.fit`. `taught`: TensorBoard gets the images on which it differs from the teacher.
        """
        self.folder.fetch(name, self.devices)
        with self.devices.scope():
            done = self.folder.finished(name)
            if done:
                self.say(f"{name}: finished before")
                self.models[name], self.fits[name] = done
                return self.models[name]
            model = make()
        warning = input_checks.unscaled_warning(model.student, splits.train.images[:LOOKED_AT])
        if warning:
            self.say(f"Warning: {warning}")
        self.say(f"Training {name}: {model.student.count_params():,} parameters, {training.epochs} epochs")
        logs, checkpoints = self.folder.path / "logs" / name, self.folder.checkpoints(name)
        if not self.devices.chief:
            logs = checkpoints = None
        options = {**views, "devices": self.devices, "profile": self.profile}
        data = self.recipe.data
        self.fits[name] = training_fit.fit(model, splits, data, training, seed, logs, checkpoints, self.say, **options)
        self.fits[name] |= {"warning": warning} if warning else {}
        self.models[name] = model.student
        if self.devices.chief:
            if taught:
                self._differences(name, model)
            self.folder.finish(name, model.student, self.fits[name])
        return model.student

    def _differences(self, name: str, model: Supervised) -> None:
        looked_at = self.splits.validation
        looked_at = Examples(looked_at.images[: disagreement.LOOKED_AT], looked_at.labels[: disagreement.LOOKED_AT])
        both = [predict(each, looked_at.images) for each in (model.student, self.models["teacher"])]
        place, step = self.folder.path / "logs" / name / "differences", int(model.global_step.numpy())
        disagreement.write(*both, looked_at, self.splits.class_names, place, step)

    def on_one_device(self) -> dict[str, keras.Model]:
        """`models`, out of the strategy: what comes after training measures and converts plain models."""
        if self.devices.strategy:
            files = {name: self.folder.path / f"{name}.keras" for name in self.models}
            files |= {"teacher": self.recipe.teacher.file} if self.recipe.teacher.file else {}
            self.models = {name: self._plain(name, path) for name, path in files.items()}
        return self.models

    def _plain(self, name: str, path: str | Path) -> keras.Model:
        """A model without a strategy: from its file or, as a teacher that came with its weights has none, a copy."""
        if Path(path).is_file():
            return saving.load_model(path)
        copy = keras.models.clone_model(self.models[name])
        copy.set_weights(self.models[name].get_weights())
        return copy
