"""Whether a recipe makes sense: every value in its range, and none without an effect."""

import math

from kdistill.errors import InputError, unknown
from kdistill.recipe.objective import LARGEST, check_distill, is_number, require
from kdistill.recipe.values import FILE_SETTINGS, LITERT, MEANINGS, SCHEMES, Data, Network, Recipe, Stage, Training

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")
MOST_SEEDS = 200  # of a run that adds seeds
# Upper bounds of whole numbers, by the name of the field.
MOST = {"epochs": 100_000, "batch_size": 1 << 20, "seeds": 1000, "seed": 2**31 - 1, "shift": 1000, "views": 100_000}
MOST |= {"image_size": 4096, "train_limit": 10**9, "labeled": 10**9, "top_k": 100_000}
# Upper bounds of other numbers: learning rates, decay, alphas, seconds, and what a teacher's file computes with pixels.
MOST_OF_REALS = {"learning_rate": 1000, "weight_decay": 1, "mixup": 1000, "cutmix": 1000}
MOST_OF_FILES = {"timeout": 7 * 86400, "scale": LARGEST, "std": LARGEST, "mean": LARGEST}
LAYOUTS = ("channels_last", "channels_first")
SCHEDULES = ("cosine", "constant", "step")


def check_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe if every value is in its range and has an effect. Raises `InputError` otherwise.

    Only values are checked here. Whether networks, files and folders fit is checked in `kdistill.runs.preflight`.
    """
    _check_data(recipe.data)
    require(recipe.seed >= 0, "seed", "0 or more", recipe.seed)
    require(recipe.seeds >= 1, "seeds", "1 or more", recipe.seeds)
    _check_upper_bounds(recipe)
    if recipe.max_seeds is not None:
        require(recipe.seeds >= 2, "seeds", "2 or more with max_seeds, which adds seeds to them", recipe.seeds)
        expected = f"a number above seeds ({recipe.seeds}), or none"
        require(recipe.seeds < recipe.max_seeds <= MOST_SEEDS, "max_seeds", expected, recipe.max_seeds)
    require(0 < recipe.margin < 1, "margin", "a share between 0 and 1", recipe.margin)
    require(recipe.exports or not recipe.repair, "repair", "false without exports, the files to repair", recipe.repair)
    precision = recipe.teacher_precision
    ways = (*PRECISIONS, *LITERT)
    require(precision in (None, *ways), "teacher_precision", f"none or one of {', '.join(ways)}", precision)
    require(recipe.precision in PRECISIONS, "precision", f"one of {', '.join(PRECISIONS)}", recipe.precision)
    check_distill(recipe.distill, 1 + len(recipe.more_teachers))
    _check_networks(recipe)
    for name, least in (("views", 1), ("seed", 0), ("top_k", 1)):
        value = getattr(recipe.cache, name)
        require(value is None or value >= least, f"cache.{name}", f"{least} or more, or none", value)
    for part in ("teacher_training", "training"):
        _check_training(getattr(recipe, part), part)
    for place, stage in enumerate(recipe.compress):
        check_stage(stage, f"compress.{place}")
    return recipe


def _check_upper_bounds(recipe: Recipe) -> None:
    """Raises `InputError` for a number that is a slip of the keyboard, and would train for years or take all memory."""
    parts = {"": recipe, "data.": recipe.data, "cache.": recipe.cache}
    parts |= {f"{name}.": getattr(recipe, name) for name in ("teacher_training", "training")}
    parts |= {f"compress.{place}.": stage for place, stage in enumerate(recipe.compress)}
    for prefix, part in parts.items():
        for name, most in MOST.items():
            value = getattr(part, name, None)
            if type(value) is int:
                require(value <= most, f"{prefix}{name}", f"at most {most:,}", value)
        for name, most in MOST_OF_REALS.items():
            value = getattr(part, name, None)
            if is_number(value) and math.isfinite(value):  # others are refused where the lower bound is
                require(value <= most, f"{prefix}{name}", f"at most {most:,}", value)


def _check_data(data: Data) -> None:
    heads = data.head.values() if isinstance(data.head, dict) else [data.head]
    fits = all(head in (None, *MEANINGS) for head in heads) and data.head != {}
    require(fits, "data.head", f"{', '.join(MEANINGS)}, or a dict of these by output", data.head)
    require(0 < data.validation < 1, "data.validation", "a share between 0 and 1", data.validation)
    require(data.shift >= 0, "data.shift", "a number of pixels, 0 or more", data.shift)
    require(data.image_size is None or data.image_size >= 1, "data.image_size", "1 or more", data.image_size)
    require(0 < data.crop_area <= 1, "data.crop_area", "a share above 0, up to 1 (off)", data.crop_area)
    require(0 <= data.max_undecodable < 1, "data.max_undecodable", "a share below 1", data.max_undecodable)
    for name in ("mixup", "cutmix"):
        alpha = getattr(data, name)
        require(0 <= alpha < math.inf, f"data.{name}", "0 (off) or more", alpha)
        expected = "0 with data.labeled, because a missing label cannot be mixed"
        require(not alpha or data.labeled is None, f"data.{name}", expected, alpha)
    require(data.train_limit is None or data.train_limit >= 1, "data.train_limit", "1 or more", data.train_limit)
    require(data.labeled is None or data.labeled >= 1, "data.labeled", "1 or more, or none", data.labeled)
    require(0 < data.labeled_share <= 1, "data.labeled_share", "a share above 0, up to 1", data.labeled_share)
    require(data.teacher_labels in ("all", "same"), "data.teacher_labels", "all or same", data.teacher_labels)
    if data.labeled is None:
        require(data.labeled_share == 1, "data.labeled_share", "1 without data.labeled", data.labeled_share)
        require(data.teacher_labels == "all", "data.teacher_labels", "all without data.labeled", data.teacher_labels)


def _check_networks(recipe: Recipe) -> None:
    tapping = [name for name, term in recipe.distill.terms.items() if term.teacher_tap]
    for part in ("more_teachers", "assistants"):
        expected = f"none, because the terms {', '.join(tapping)} use layers of the one teacher" if tapping else ""
        require(not (tapping and getattr(recipe, part)), part, expected, getattr(recipe, part))
    for part in ("teacher", "student", "more_teachers", "assistants"):
        networks = getattr(recipe, part)
        for network in (networks,) if isinstance(networks, Network) else networks:
            _check_weights(network, part)
    for part, network in (("student", recipe.student), *(("assistants", item) for item in recipe.assistants)):
        expected = "none, because this network is trained; `weights` gives it a start"
        require(network.file is None, f"{part}.file", expected, network.file)


def _check_weights(network: Network, part: str) -> None:
    files, mapping = network.weights, network.mapping
    require(not isinstance(files, str), f"{part}.weights", "several files, (file,) for one", files)
    require(not (files and network.file), f"{part}.weights", f"none with {part}.file, which has its own", files)
    _check_file_settings(network, part)
    require(files or not mapping, f"{part}.mapping", f"none without {part}.weights, the files to map", mapping)
    kind, form = (str, "{layer of the file: layer of the network}")
    if len(files) > 1:
        kind, form = dict, "{file: {its layer: layer of the network}} with several files"
    fits = all(isinstance(value, kind) and (kind is str or name in files) for name, value in mapping.items())
    require(fits, f"{part}.mapping", form, mapping)


def _check_file_settings(network: Network, part: str) -> None:
    """How a teacher's file sees the images; without a file nothing uses it."""
    given = {name: getattr(network, name) for name in FILE_SETTINGS if getattr(network, name) is not None}
    for name, value in given.items():
        require(network.file is not None, f"{part}.{name}", f"none without {part}.file, the trained model", value)
    ranges = {"channels": (1, 3), "layout": LAYOUTS, "outputs": ("logits", "probabilities")}
    for name, allowed in ranges.items():
        fits = given.get(name) in (None, *allowed)
        require(fits, f"{part}.{name}", " or ".join(map(str, allowed)), given.get(name))
    for name in ("timeout", "scale", "std"):
        value = given.get(name)
        numbers = value if isinstance(value, tuple) else (value,)
        fits = value is None or (all(is_number(n) and 0 < n < math.inf for n in numbers))
        require(fits, f"{part}.{name}", "a number above 0" + " (one, or one for each channel)" * (name == "std"), value)
    for name in ("mean", "std"):
        value = given.get(name)
        fits = value is None or (
            isinstance(value, tuple) and len(value) in (1, 3) and all(is_number(n) and math.isfinite(n) for n in value)
        )
        require(fits, f"{part}.{name}", "one number, or three, one for each channel", value)
    for name, most in MOST_OF_FILES.items():
        value = given.get(name, ())
        small = all(abs(number) <= most for number in (value if isinstance(value, tuple) else (value,)))
        require(small, f"{part}.{name}", f"numbers of at most {most:,}", value)
    size = given.get("size")
    fits = size is None or (len(size) == 2 and all(type(n) is int and 1 <= n <= MOST["image_size"] for n in size))
    require(fits, f"{part}.size", f"height and width, two numbers from 1 to {MOST['image_size']}", size)
    require(not (network.bgr and network.channels == 1), f"{part}.bgr", "false with one channel", network.bgr)
    classes = given.get("classes")
    fits = classes is None or (
        len(classes) > 1
        and len(set(classes)) == len(classes)
        and all(type(n) is int and 0 <= n < 1_000_000 for n in classes)
    )
    require(fits, f"{part}.classes", "two or more different numbers from 0 on", classes)


def check_stage(stage: Stage, part: str, schedules: tuple[type, ...] = ()) -> None:
    """Raises `InputError` for a value of a compression that is out of range, or that its scheme does not use.

    The learning rate may also be one of `schedules`: `kdistill.compress` accepts those of Keras.
    """
    if stage.scheme not in SCHEMES:
        raise unknown("scheme", stage.scheme, SCHEMES, f"Fix {part}.scheme.")
    for name in ("epochs", "batch_size"):
        value = getattr(stage, name)
        require(type(value) is int and value >= 1, f"{part}.{name}", "1 or more", value)
        require(value <= MOST[name], f"{part}.{name}", f"at most {MOST[name]:,}", value)
    rate = stage.learning_rate
    fits = isinstance(rate, schedules) or (is_number(rate) and 0 < rate < math.inf)
    require(fits, f"{part}.learning_rate", "a number above 0" + (" or a schedule" if schedules else ""), rate)
    most = MOST_OF_REALS["learning_rate"]
    require(not is_number(rate) or rate <= most, f"{part}.learning_rate", f"at most {most:,}", rate)
    for step, key in (("prune", "sparsity"), ("cluster", "clusters")):
        whole, single = ("final_sparsity" if step == "prune" else key), f"layer_{key}"
        goals = {whole: getattr(stage, whole)} | {f"{single}.{k}": v for k, v in getattr(stage, single).items()}
        users = ", ".join(name for name, steps in SCHEMES.items() if step in steps)
        for name, value in goals.items():
            if step not in SCHEMES[stage.scheme]:
                expected = f"none in the scheme '{stage.scheme}', where it does nothing ({users} use it)"
                require(value is None, f"{part}.{name}", expected, value)
            elif step == "prune":
                fits = value is None or (is_number(value) and 0 < value < 1)
                require(fits, f"{part}.{name}", "a share between 0 and 1", value)
            else:
                fits = value is None or (type(value) is int and 3 <= value <= 256)
                require(fits, f"{part}.{name}", "a number from 3 to 256", value)


def _check_training(training: Training, part: str) -> None:
    optimizers = ("adam", "sgd")
    require(training.epochs >= 1, f"{part}.epochs", "1 or more", training.epochs)
    require(training.batch_size >= 1, f"{part}.batch_size", "1 or more", training.batch_size)
    rate = training.learning_rate
    require(0 < rate < math.inf, f"{part}.learning_rate", "a number above 0", rate)
    require(training.optimizer in optimizers, f"{part}.optimizer", " or ".join(optimizers), training.optimizer)
    require(training.schedule in SCHEDULES, f"{part}.schedule", " or ".join(SCHEDULES), training.schedule)
    require(0 <= training.warmup < 1, f"{part}.warmup", "a share from 0 to below 1", training.warmup)
    if training.schedule == "step":
        require(training.warmup == 0, f"{part}.warmup", "0 with the schedule 'step'", training.warmup)
        require(0 < training.drop_at < 1, f"{part}.drop_at", "a share between 0 and 1", training.drop_at)
        require(0 < training.drop_factor < 1, f"{part}.drop_factor", "a share between 0 and 1", training.drop_factor)
    else:
        for name in ("drop_at", "drop_factor"):
            value, usual = getattr(training, name), getattr(Training(), name)
            require(value == usual, f"{part}.{name}", f"{usual}, but with the schedule 'step'", value)
    require(0 <= training.weight_decay < math.inf, f"{part}.weight_decay", "0 or more", training.weight_decay)
    momentum = training.momentum
    require(0 <= momentum < 1, f"{part}.momentum", "a number from 0 to below 1", momentum)
    used = training.optimizer == "sgd" or momentum == 0
    require(used, f"{part}.momentum", "0 with adam, which ignores it", momentum)


def check_precision(recipe: Recipe) -> None:
    """Raises `InputError` for float16 without a GPU."""
    import tensorflow as tf  # recipes load without it

    name = next((name for name in ("precision", "teacher_precision") if getattr(recipe, name) == "mixed_float16"), None)
    if name and not tf.config.list_physical_devices("GPU"):
        raise InputError(
            f"{name}=mixed_float16 needs a GPU: on a CPU, float16 is over a hundred times slower than float32, and "
            "TensorFlow finds no GPU. Use mixed_bfloat16 or float32."
        )
