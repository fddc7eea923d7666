"""Whether a recipe makes sense: every value in its range, and none without an effect."""

import math

import tensorflow as tf

from kdistill.errors import InputError, unknown
from kdistill.recipe.objective import Term as Term  # recipes import from here alone
from kdistill.recipe.objective import check as _check
from kdistill.recipe.objective import check_distill
from kdistill.recipe.values import SCHEMES, Network, Recipe, Stage, Training


def checked(recipe: Recipe) -> Recipe:
    """The recipe, if every value is in its range."""
    data = recipe.data
    _check(0 < data.validation < 1, "data.validation", "a share between 0 and 1", data.validation)
    _check(data.shift >= 0, "data.shift", "a number of pixels, 0 or more", data.shift)
    _check(data.image_size is None or data.image_size >= 1, "data.image_size", "1 or more", data.image_size)
    _check(0 < data.crop_area <= 1, "data.crop_area", "a share above 0, up to 1 (off)", data.crop_area)
    _check(0 <= data.max_undecodable < 1, "data.max_undecodable", "a share below 1", data.max_undecodable)
    for name in ("mixup", "cutmix"):
        alpha = getattr(data, name)
        _check(0 <= alpha < math.inf, f"data.{name}", "0 (off) or more", alpha)
        _check(not alpha or data.labeled is None, f"data.{name}", "0 with data.labeled: no label is no blend", alpha)
    _check(data.train_limit is None or data.train_limit >= 1, "data.train_limit", "1 or more", data.train_limit)
    _check(data.labeled is None or data.labeled >= 1, "data.labeled", "1 or more, or none", data.labeled)
    _check(0 < data.labeled_share <= 1, "data.labeled_share", "a share above 0, up to 1", data.labeled_share)
    _check(data.teacher_labels in ("all", "same"), "data.teacher_labels", "all or same", data.teacher_labels)
    if data.labeled is None:
        _check(data.labeled_share == 1, "data.labeled_share", "1 without data.labeled", data.labeled_share)
        _check(data.teacher_labels == "all", "data.teacher_labels", "all without data.labeled", data.teacher_labels)
    _check(recipe.seed >= 0, "seed", "0 or more", recipe.seed)
    _check(recipe.seeds >= 1, "seeds", "1 or more", recipe.seeds)
    precisions = ("float32", "mixed_bfloat16", "mixed_float16")
    asked = recipe.teacher_precision
    _check(asked in (None, *precisions), "teacher_precision", f"none or one of {', '.join(precisions)}", asked)
    _check(recipe.precision in precisions, "precision", f"one of {', '.join(precisions)}", recipe.precision)
    check_distill(recipe.distill, 1 + len(recipe.more_teachers))
    tapping = [name for name, term in recipe.distill.terms.items() if term.teacher_tap]
    for part in ("more_teachers", "assistants"):
        expected = f"none, as the terms {', '.join(tapping)} look into the one teacher" if tapping else ""
        _check(not (tapping and getattr(recipe, part)), part, expected, getattr(recipe, part))
    for part in ("teacher", "student", "more_teachers", "assistants"):
        for network in (found,) if isinstance(found := getattr(recipe, part), Network) else found:
            _check_weights(network, part)
    for name, least in (("views", 1), ("seed", 0), ("top_k", 1)):
        value = getattr(recipe.cache, name)
        _check(value is None or value >= least, f"cache.{name}", f"{least} or more, or none", value)
    for part in ("teacher_training", "training"):
        _check_training(getattr(recipe, part), part)
    for place, stage in enumerate(recipe.compress):
        _check_stage(stage, f"compress.{place}")
    for part, network in (("student", recipe.student), *(("assistants", each) for each in recipe.assistants)):
        _check(network.file is None, f"{part}.file", "none: it is trained. weights gives it a start", network.file)
    return recipe


def _check_weights(network: Network, part: str) -> None:
    files, mapping = network.weights, network.mapping
    _check(not isinstance(files, str), f"{part}.weights", "several files, (file,) for one", files)
    _check(not (files and network.file), f"{part}.weights", f"none with {part}.file, which has its own", files)
    _check(files or not mapping, f"{part}.mapping", f"none without {part}.weights, the files to map", mapping)
    kind, form = (str, "{layer of the file: layer of the network}")
    if len(files) > 1:
        kind, form = dict, "{file: {its layer: layer of the network}} with several files"
    fits = all(isinstance(each, kind) and (kind is str or name in files) for name, each in mapping.items())
    _check(fits, f"{part}.mapping", form, mapping)


def _check_stage(stage: Stage, part: str) -> None:
    if stage.scheme not in SCHEMES:
        raise unknown("scheme", stage.scheme, SCHEMES, f"Fix {part}.scheme.")
    _check(stage.epochs >= 1, f"{part}.epochs", "1 or more", stage.epochs)
    _check(stage.batch_size >= 1, f"{part}.batch_size", "1 or more", stage.batch_size)
    _check(0 < stage.learning_rate < math.inf, f"{part}.learning_rate", "a number above 0", stage.learning_rate)
    for step, key in (("prune", "sparsity"), ("cluster", "clusters")):
        whole, single = ("final_sparsity" if step == "prune" else key), f"layer_{key}"
        given = {whole: getattr(stage, whole)} | {f"{single}.{k}": v for k, v in getattr(stage, single).items()}
        for name, value in given.items():
            if step not in SCHEMES[stage.scheme]:
                nothing = f"none in the scheme '{stage.scheme}', where it does nothing"
                _check(value is None, f"{part}.{name}", nothing, value)
            elif step == "prune":
                _check(value is None or 0 < value < 1, f"{part}.{name}", "a share between 0 and 1", value)
            else:
                _check(value is None or 3 <= value <= 256, f"{part}.{name}", "a number from 3 to 256", value)


def _check_training(training: Training, part: str) -> None:
    optimizers, schedules = ("adam", "sgd"), ("cosine", "constant", "step")
    _check(training.epochs >= 1, f"{part}.epochs", "1 or more", training.epochs)
    _check(training.batch_size >= 1, f"{part}.batch_size", "1 or more", training.batch_size)
    rate = training.learning_rate
    _check(0 < rate < math.inf, f"{part}.learning_rate", "a number above 0", rate)
    _check(training.optimizer in optimizers, f"{part}.optimizer", " or ".join(optimizers), training.optimizer)
    _check(training.schedule in schedules, f"{part}.schedule", " or ".join(schedules), training.schedule)
    _check(0 <= training.warmup < 1, f"{part}.warmup", "a share from 0 to below 1", training.warmup)
    if training.schedule == "step":
        _check(training.warmup == 0, f"{part}.warmup", "0 with the schedule 'step'", training.warmup)
        _check(0 < training.drop_at < 1, f"{part}.drop_at", "a share between 0 and 1", training.drop_at)
        _check(0 < training.drop_factor < 1, f"{part}.drop_factor", "a share between 0 and 1", training.drop_factor)
    else:
        for name in ("drop_at", "drop_factor"):
            value, usual = getattr(training, name), getattr(Training(), name)
            _check(value == usual, f"{part}.{name}", f"{usual}, but with the schedule 'step'", value)
    _check(training.weight_decay >= 0, f"{part}.weight_decay", "0 or more", training.weight_decay)
    momentum = training.momentum
    _check(0 <= momentum < 1, f"{part}.momentum", "a number from 0 to below 1", momentum)
    used = training.optimizer == "sgd" or momentum == 0
    _check(used, f"{part}.momentum", "0 with adam, which ignores it", momentum)


def check_precision(precision: str) -> None:
    """Raises `InputError` for float16 without a GPU."""
    if precision == "mixed_float16" and not tf.config.list_physical_devices("GPU"):
        raise InputError(
            "precision=mixed_float16 needs a GPU: a CPU computes float16 over a hundred times slower than float32, and "
            "TensorFlow finds no GPU here. Take mixed_bfloat16 or float32."
        )
