"""What would fail late is tried early: networks, files, terms, compressions and the cache, before anything trains.

Nothing is trained here, and nothing is written, so that a refused command can be given again, corrected.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np

from kdistill.conversion import graph
from kdistill.conversion.build import build
from kdistill.conversion.float32 import prepare
from kdistill.conversion.litert_teacher import teacher_file
from kdistill.conversion.refusals import recurrent_layers
from kdistill.data.batches import evaluation_batches
from kdistill.data.splits import Splits
from kdistill.distillation.distiller import Distiller, from_recipe
from kdistill.errors import InputError
from kdistill.files import cache_root
from kdistill.formats.kinds import format_of
from kdistill.recipe import Network, Profile, Recipe
from kdistill.recipe.objective import teacher_taps
from kdistill.recipe.values import LITERT
from kdistill.repairs.unrolled import unrolled
from kdistill.runs.arms import build_network, load_network
from kdistill.runs.scores import images_with_a_class
from kdistill.teachers.as_model import TeacherFile
from kdistill.teachers.cache_choice import human_size
from kdistill.teachers.frozen import blend_models, frozen
from kdistill.teachers.replay import augmentation_settings, tap_shapes
from kdistill.training.strategy import SINGLE_DEVICE, Devices

IMAGES = 2  # training images on which the terms are tried
CALIBRATION_IMAGES = 32  # with which a conversion is tried
STEPS = 100  # length of the schedules while they are tried


def check_run(
    recipe: Recipe,
    splits: Splits,
    devices: Devices = SINGLE_DEVICE,
    cache: str = "auto",
    download: bool = False,
    say: Callable[[str], None] = print,
    profiles: Sequence[Profile] = (),
) -> str:
    """Tries everything that a run of this recipe needs. Returns the cache to use: `auto`, `off` or a folder.

    `profiles`: those for which the student will be exported.

    Raises `InputError` for what cannot work.
    """
    for part in ("teacher_training", "training"):
        batch_size = min(getattr(recipe, part).batch_size, len(splits.train))
        devices.check_batch(batch_size, f"{part}.batch_size")
    cache = _check_cache(recipe, splits, cache, say)
    _check_other_labels(recipe, splits)
    _check_teacher_precision(recipe, devices)

    def network(spec: Network) -> keras.Model:
        if spec.file:
            file = load_network(spec, splits, devices, taps=teacher_taps(recipe.distill.terms))
            _check_foreign(file, recipe)
            return file.model
        return build_network(spec, splits, recipe.seed, devices, download)[0]

    teachers = [network(spec) for spec in (recipe.teacher, *recipe.more_teachers)]
    with devices.scope():
        teacher = teachers[0] if len(teachers) == 1 else blend_models(teachers, recipe.distill.teacher_weights)
        _state_tap_size(recipe, splits, teacher, cache, say)
        for spec in (*recipe.assistants, recipe.student):
            student = network(spec)
            _check_distillation(from_recipe(recipe.distill, student, teacher, STEPS, splits.head), splits)
            last_teacher, teacher = teacher, student
    _check_seeds(recipe, splits, devices, download, student)
    if recipe.teacher_precision in LITERT and not all(spec.file for spec in (recipe.teacher, *recipe.more_teachers)):
        teacher_file(last_teacher, recipe.teacher_precision, splits.train.images[:CALIBRATION_IMAGES])
    if recipe.compress:
        _check_compression(recipe, student, splits)
    if profiles and not devices.strategy:
        _check_exports(student, profiles, splits, recipe.repair)
    return cache


def check_students(recipes: list[Recipe], splits: Splits) -> None:
    """Tries the students of a sweep's settings, each network and each set of terms once. Raises `InputError`."""
    tried, precisions = set(), set()
    for recipe in recipes:
        key = repr((recipe.student, recipe.distill.terms))
        if key not in tried:
            tried.add(key)
            if recipe.teacher_precision in precisions:  # the teacher is converted once
                recipe = dataclasses.replace(recipe, teacher_precision=None)
            precisions.add(recipe.teacher_precision)
            check_run(recipe, splits, cache="off" if not recipe.cache.top_k else "auto", say=lambda text: None)


def seeds_are_copies(
    recipe: Recipe,
    splits: Splits,
    devices: Devices = SINGLE_DEVICE,
    download: bool = False,
    first: keras.Model | None = None,
) -> bool:
    """Whether all seeds would train the same student: one start, and the same batches in the same order.

    `first`: the student of the first seed, where it has been built.
    """
    if recipe.cache.seed is None or max(recipe.seeds, recipe.max_seeds or 1) == 1:
        return False

    def start(seed: int) -> keras.Model:
        return build_network(recipe.student, splits, seed, devices, download)[0]

    pairs = zip((first or start(recipe.seed)).variables, start(recipe.seed + 1).variables, strict=True)
    return all(np.array_equal(one, other) for one, other in pairs)


def _check_seeds(recipe: Recipe, splits: Splits, devices: Devices, download: bool, student: keras.Model) -> None:
    if seeds_are_copies(recipe, splits, devices, download, student):
        raise InputError(
            f"The seeds would be copies of one another: the student '{recipe.student.name}' starts from the same "
            f"weights for every seed, and cache.seed={recipe.cache.seed} gives all seeds the same batches. Let each "
            "seed draw its own (--set cache.seed=none), or train one (--seeds 1)."
        )


def _check_foreign(file: TeacherFile, recipe: Recipe) -> None:
    """What works with teachers that are Keras models only."""
    if file.foreign and recipe.teacher_precision:
        raise InputError(
            f"teacher_precision={recipe.teacher_precision} works with Keras models; '{file.file}' is {file.format}. "
            "Leave it out (--set teacher_precision=none)."
        )
    changes = augmentation_settings(recipe.data)
    if file.format == "stored outputs" and changes:
        raise InputError(
            f"'{file.file}' holds outputs for unchanged images, but data.{', data.'.join(changes)} changes them. Turn "
            "that off, or give the teacher itself."
        )


def _check_distillation(distiller: Distiller, splits: Splits) -> None:
    """Computes the terms once: shapes of layers that do not fit show only then."""
    untold = not distiller.terms and splits.outputs is None
    if untold or distiller.distribute_strategy.num_replicas_in_sync > 1:
        return
    distiller.compile(optimizer=keras.optimizers.SGD(), run_eagerly=True)
    distiller.evaluate(evaluation_batches(splits.train.select(slice(IMAGES)), IMAGES), verbose=0)


def _check_other_labels(recipe: Recipe, splits: Splits) -> None:
    """Raises `InputError` for what works with one class for each example only."""
    if images_with_a_class(splits):
        return
    only = {
        "more_teachers": bool(recipe.more_teachers) and not splits.classifies,
        "teacher_precision": bool(recipe.teacher_precision),
        "cache.top_k": bool(recipe.cache.top_k) and not splits.classifies,
    }
    given = [name for name, is_given in only.items() if is_given]
    if given:
        raise InputError(
            f"{', '.join(given)} works for images with one class each; the labels of this data are of another kind. "
            "Leave it out."
        )


def _check_compression(recipe: Recipe, student: keras.Model, splits: Splits) -> None:
    from kdistill.compression.inputs import check_student  # imports tf_keras, for those who compress
    from kdistill.compression.other_outputs import check_student_of_others

    for stage in recipe.compress:
        if images_with_a_class(splits):
            check_student(student, stage)
        else:
            check_student_of_others(student, stage, splits.head)


def _check_exports(student: keras.Model, profiles: Sequence[Profile], splits: Splits, repair: bool) -> None:
    """Builds what the profiles add to the student; converts a recurrent one, which many profiles do not take.

    `repair`: a recurrent one that is refused may be unrolled.
    """
    prepared = prepare(student, splits.head)
    for profile in profiles:
        model = graph.with_normalization(prepared.model, profile)
        graph.with_channels_and_softmax(model, profile, prepared.heads)
        if recurrent_layers(prepared.model):
            calibration = splits.train.select(slice(CALIBRATION_IMAGES)).inputs
            try:
                build(prepared, profile, calibration)
            except InputError:
                if not repair:
                    raise
                build(unrolled(prepared), profile, calibration)


def _check_teacher_precision(recipe: Recipe, devices: Devices) -> None:
    if recipe.teacher_precision and (devices.strategy or teacher_taps(recipe.distill.terms)):
        raise InputError(
            f"teacher_precision={recipe.teacher_precision} works on one device, without terms that use layers of the "
            "teacher. Leave it out (--set teacher_precision=none)."
        )


def _check_cache(recipe: Recipe, splits: Splits, mode: str, say: Callable[[str], None]) -> str:
    top_k, classes = recipe.cache.top_k, len(splits.class_names)
    if top_k is not None and not 1 <= top_k < classes:
        raise InputError(f"cache.top_k expects a number from 1 to {classes - 1}, received {top_k}.")
    if mode == "off" and top_k:
        raise InputError(f"cache.top_k={top_k} sets how logits are stored, but --cache off stores none. Drop one.")
    taps = [tap for tap in teacher_taps(recipe.distill.terms) if tap != "logits"]
    if taps and top_k:
        raise InputError(
            f"cache.top_k={top_k} keeps some logits, but the layers {', '.join(taps)} of the teacher are stored whole. "
            "Leave it out (--set cache.top_k=none)."
        )
    files = [network.file for network in (recipe.teacher, *recipe.more_teachers) if network.file]
    foreign = any(format_of(file) not in ("Keras", "HDF5") for file in files)  # whose outputs are always stored
    if taps and mode == "auto" and not foreign:
        say(
            f"Teacher cache: not used, because terms use the layers {', '.join(taps)} of the teacher, which may take "
            "much space. --cache FOLDER stores them too, and states the size before."
        )
        return "off"
    if mode == "off":
        return mode
    try:
        root = cache_root() if mode == "auto" else Path(mode)
    except InputError as error:
        if top_k:
            raise
        say(f"Warning: no teacher cache. {error}")
        return "off"
    reason = _unwritable(root)
    if reason is None:
        return mode
    advice = "Give --cache another folder, or off"
    if mode == "auto" and not top_k:
        say(f"Warning: no teacher cache, because the folder '{root}' cannot be written ({reason}). {advice}.")
        return "off"
    raise InputError(f"Cannot write to the folder of the teacher cache, '{root}' ({reason}). {advice}.")


def _state_tap_size(recipe: Recipe, splits: Splits, teacher, cache: str, say: Callable[[str], None]) -> None:
    """States what the layers of the teacher take in the cache over the whole run."""
    taps = {tap: setting for tap, setting in teacher_taps(recipe.distill.terms).items() if tap != "logits"}
    if not taps or cache == "off":
        return
    shapes = tap_shapes(frozen(teacher, taps=taps), splits.train.images.shape[1:], taps)
    size = 2 * (sum(math.prod(shape) for shape in shapes.values()) + len(splits.class_names))
    views = min(recipe.training.epochs, recipe.cache.views or recipe.training.epochs)
    views = views if augmentation_settings(recipe.data) else 1
    images, seeds = len(splits.train), 1 if views == 1 or recipe.cache.seed is not None else recipe.seeds
    layers = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    say(
        f"Teacher cache: logits and {layers} of the teacher take {human_size(size)} an image, and "
        f"{human_size(seeds * views * images * size)} in all: {images:,} images, {views} view{'s' * (views > 1)}"
        f"{f' for each of {seeds} seeds' * (seeds > 1)}. cache.views=N stores fewer."
    )


def _unwritable(folder: Path) -> str | None:
    """Why a folder cannot be written, or None. Tries the nearest folder that exists, and creates none."""
    while not folder.exists() and not folder.is_symlink() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or type(error).__name__
