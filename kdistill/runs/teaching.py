"""How the students of a run get their teacher's outputs: from its forward pass, or from the teacher cache."""

import json
from collections.abc import Callable
from pathlib import Path

import keras

from kdistill.conversion.litert_teacher import faster_teacher
from kdistill.data.few_labels import for_student
from kdistill.data.splits import Splits, load
from kdistill.formats.kinds import file_fingerprint
from kdistill.networks.precision import dtype_policy
from kdistill.recipe import SCHEMES, Recipe, Stage
from kdistill.recipe.checks import check_precision
from kdistill.recipe.objective import teacher_taps
from kdistill.runs.folder import RunFolder
from kdistill.schema import plain
from kdistill.teachers.as_model import load_teacher
from kdistill.teachers.cache_choice import cache_pays
from kdistill.teachers.normalizations import time_sentence
from kdistill.teachers.replay import Replay
from kdistill.training.strategy import Devices

IMAGES = 256  # validation images on which the copy for inference is compared with the teacher; for the ranges of int8


class Teaching:
    """A trained teacher for the students of a run.

    Attributes:
        foreign: whether the teacher is no Keras model; then its outputs are always stored, unless the cache is off.
        taps: the layers of the teacher that the students use, with the settings that name them.
        model: the teacher for forward passes: on one device a copy for inference, see `for_students`.
    """

    def __init__(
        self,
        teacher: keras.Model,
        recipe: Recipe,
        splits: Splits,
        folder: RunFolder,
        devices: Devices,
        say: Callable[[str], None],
        taps: dict[str, str] | None = None,
        foreign: bool = False,
    ):
        self.foreign, self.taps = foreign, dict(taps or {})
        self.recipe, self.splits, self.folder, self.say = recipe, splits, folder, say
        self.devices, self.model, self._copy = devices, teacher, None
        self._replays: dict[tuple[int, str | None], Replay] = {}  # each reads the weights and traces the teacher once
        self._folders: dict[tuple[Replay, str, int], str | None] = {}
        if not devices.strategy and splits.classifies and splits.has_images:
            self.model = for_students(teacher, recipe, splits, say, self.taps)

    def views(self, seed: int) -> dict:
        """Seed and repetition of the views of the training images, for control and student of this seed."""
        cache = self.recipe.cache
        return {"seed": seed if cache.seed is None else cache.seed, "repeat": cache.views}

    def replay(self, stage: str, seed: int, cache: str, fits: int = 1) -> Replay | None:
        """The teacher's stored outputs for a stage, computed where they are missing. None: the teacher runs.

        Args:
            cache: `off`, a folder, or `auto`, which stores where that costs fewer passes of the teacher.
            fits: number of fits that share the views of one seed.
        """
        self.folder.fetch(stage, self.devices)
        self.devices.agree({"--cache": cache == "off"})
        if self.folder.is_finished(stage):
            return None
        # Where files are written, the command line decides: the run folder may come from elsewhere.
        root = None if cache in ("auto", "off") else cache
        if self.devices.workers > 1 and cache != "off":
            self._replay(seed, root)  # creates variables, which all workers do together
        folder = None
        if self.devices.chief:
            folder = self.folder.choice(stage, "cache", lambda: self._cache_folder(seed, cache, fits))
        folder = json.loads(self.devices.share(json.dumps(folder).encode()))
        if folder is None:
            return None
        replay = self._replay(seed, root)
        if self.devices.chief and folder != str(replay.root.resolve()):
            self.say(
                f"Teacher cache: in {replay.root}. The run was started with its cache in another folder, "
                f"{plain(folder)}; give --cache with that one to use what is stored there."
            )
        replay.build(replay.views(self.recipe.training.epochs, self.recipe.cache.views), self.say)
        return replay

    def replay_for_stage(self, name: str, stage: Stage, cache: str) -> Replay | None:
        """The teacher's stored outputs for a stage of compression, as `replay`; None: the teacher runs.

        Without augmentation they are those of the students; with it, those of its own batches.
        """
        if self.devices.strategy or not self.splits.has_images or not self.splits.classifies:
            return None
        root = None if cache in ("auto", "off") else cache
        recipe, files = self.recipe, self._files()
        own = recipe.data, stage.batch_size, recipe.seed, root, recipe.cache.top_k
        stored = Replay(self.model, for_student(self.splits), *own, files=files)

        def folder() -> str:
            if cache == "off":
                return ""
            fits = len(SCHEMES[stage.scheme])
            pays = cache_pays(stored, cache, stage.epochs, None, fits, self.say, always=self.foreign)
            return str(stored.root.resolve()) if pays else ""

        if not self.folder.choice(name, "cache", folder):
            return None
        stored.build(stored.views(stage.epochs), self.say)
        return stored

    def _cache_folder(self, seed: int, cache: str, fits: int) -> str | None:
        """The folder to store outputs in, or None if the cache is off or does not pay."""
        if cache == "off":
            return None
        replay, settings = self._replay(seed, None if cache == "auto" else cache), self.recipe.cache
        question = replay, cache, fits
        if question in self._folders:  # of another seed with the same views
            return self._folders[question]
        if replay.by_image or settings.seed is not None:  # the seeds share what is stored
            fits *= self.recipe.seeds
        if self.foreign:
            self.say(time_sentence(self.model, replay, self.recipe.training.epochs, settings.views))
        epochs = self.recipe.training.epochs
        stores = cache_pays(replay, cache, epochs, settings.views, fits, self.say, always=self.foreign)
        self._folders[question] = str(replay.root.resolve()) if stores else None
        return self._folders[question]

    def _replay(self, seed: int, root: str | None) -> Replay:
        recipe, seed_of_views = self.recipe, self.views(seed)["seed"]
        key = seed_of_views, root
        if key not in self._replays:
            splits, batch_size = for_student(self.splits), recipe.training.batch_size
            self._replays[key] = Replay(
                self._teacher_to_store(),
                splits,
                recipe.data,
                batch_size,
                seed_of_views,
                root,
                recipe.cache.top_k,
                files=self._files(),
                taps=self.taps,
                strategy=self.devices.strategy,
            )
        return self._replays[key]

    def _teacher_to_store(self) -> keras.Model:
        """The teacher whose outputs are stored: on every replica the same copy as on one device, so that both share a
        cache."""
        images = self.splits.classifies and self.splits.has_images
        if self._copy is None:
            self._copy = self.model
            if self.devices.strategy and images:
                with self.devices.scope():
                    self._copy = for_students(self.model, self.recipe, self.splits, self.say, self.taps)
        return self._copy

    def _files(self) -> list[dict]:
        """Where the teacher came from, dicts of file and fingerprint: the recipe's files, or those of the run."""
        networks = (self.recipe.teacher, *self.recipe.more_teachers)
        names = ["teacher"] if len(networks) == 1 else [f"teacher_{place}" for place in range(len(networks))]
        origins: list[str | Path] = []
        for name, network in zip(names, networks, strict=True):
            origins += [network.file] if network.file else network.weights or [self.folder.path / f"{name}.keras"]
        if self.recipe.assistants:
            origins = [self.folder.path / f"assistant_{len(self.recipe.assistants) - 1}.keras"]
        return [
            {"file": str(file), **({"fingerprint": file_fingerprint(file)} if Path(file).exists() else {})}
            for file in origins
            if isinstance(file, str) or file.exists()  # weights of Keras have no file
        ]


def for_students(
    teacher: keras.Model, recipe: Recipe, splits: Splits, say: Callable[[str], None], taps: dict[str, str]
) -> keras.Model:
    """A copy of the teacher for inference, with normalization folded into the weights, in `recipe.teacher_precision`.

    The layers in `taps` keep their outputs. Raises `CheckFailed` if it gives other logits, `InputError` if the teacher
    cannot run in this precision.
    """
    images, calibration = splits.validation.images[:IMAGES], splits.train.images[:IMAGES]
    return faster_teacher(teacher, images, recipe.teacher_precision, say, taps, calibration)


def of_recipe(
    recipe: Recipe, data_dir=None, download: bool = False, root: Path | None = None, say: Callable[[str], None] = print
) -> tuple[Replay, int]:
    """The replay for the students of a recipe whose teacher is a file, and the number of views that they need."""
    check_precision(recipe)
    with dtype_policy(recipe.precision):
        splits = load(recipe.data, data_dir, download, say=say)
        shape, classes = splits.train.images.shape[1:], len(splits.class_names)
        taps = teacher_taps(recipe.distill.terms)
        file = load_teacher(recipe.teacher, shape, classes, say, taps)
        origin = [{"file": file.file, "fingerprint": file.fingerprint}]
        teacher = for_students(file.model, recipe, splits, say, taps)
    cache, seed = recipe.cache, recipe.seed if recipe.cache.seed is None else recipe.cache.seed
    batch_size = recipe.training.batch_size
    replay = Replay(teacher, splits, recipe.data, batch_size, seed, root, cache.top_k, files=origin, taps=taps)
    return replay, replay.views(recipe.training.epochs, cache.views)


def fill_alone(recipe: Recipe, data_dir: Path | None, download: bool, root: Path) -> None:
    """Fills the cache of a recipe, in a process of several that share the work."""
    lines: list[str] = []
    stored, views = of_recipe(recipe, data_dir, download, root, lines.append)
    stored.build(views, lines.append)
