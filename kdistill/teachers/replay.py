"""The teacher paid once: its outputs for the very pixels that the student will see, stored and given back with them.

Order, augmentation and mixing are a pure function of (seed, view, position), so a row of a cache belongs to one
position of one view (an epoch's worth of batches). Without augmentation it belongs to an image: one pass serves all
epochs, orders, seeds and batch sizes.
"""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill.data import batches as data_batches
from kdistill.data.splits import Examples, Splits, load_splits
from kdistill.errors import CheckFailed, InputError
from kdistill.files import cache_root
from kdistill.networks import folding, saving
from kdistill.networks.keras_internals import layers_of
from kdistill.recipe import Data, Recipe
from kdistill.recipe.checks import check_precision
from kdistill.teachers.cache import PART_BYTES, Cache, bytes_per_row, packed, unpacked
from kdistill.teachers.frozen import frozen

EVALUATION_BATCH = 256
# What of `Data` says which images there are and who sees their labels: the data's fingerprint holds the images.
SAME_PIXELS = (
    "name",
    "validation",
    "image_size",
    "max_undecodable",
    "train_limit",
    "labeled",
    "labeled_share",
    "teacher_labels",
)
CHUNK_BYTES = 8 << 20  # what is read from a memory map at once: a Python call for each batch would cost more
WAIT_SECONDS = 0.5
COSTS = 1.1  # a pass that fills the cache, in passes of the teacher: writing and checksums are the rest


class Replay:
    """A teacher's stored outputs, in the place of the teacher: batches whose targets hold `teacher_logits`.

    Args:
        teacher: a `keras.Model`, or a list of them with `teacher_weights`, blended as in `Distiller`.
        batch_size, seed: those of the training batches; they count only where images are augmented.
        root: the folder of all caches. top_k: keep so many logits of a row, and the mass of the rest.
    """

    def __init__(
        self,
        teacher,
        splits: Splits,
        data: Data,
        batch_size: int,
        seed: int,
        root: str | Path | None = None,
        top_k: int | None = None,
        teacher_weights=None,
    ):
        self.splits, self.data, self.seed = splits, data, seed
        self.batch_size = min(batch_size, len(splits.train))
        self.steps = data_batches.steps_per_epoch(splits.train, self.batch_size)
        self.by_image = not augmentation(data)
        self.root = Path(root) if root else cache_root()
        classes = len(splits.class_names)
        if top_k is not None and not 1 <= top_k < classes:
            raise InputError(f"cache.top_k expects a number from 1 to {classes - 1}, received {top_k}.")
        self._predict, self._traced = frozen(teacher, teacher_weights), None
        models = teacher if isinstance(teacher, (list, tuple)) else [teacher]
        about = {
            "teacher": fingerprint(models, teacher_weights),
            "data": splits.fingerprint,
            "image": list(splits.train.images.shape[1:]),
        }
        words = {"teacher_name": ", ".join(model.name for model in models), "source": splits.source}

        def cache(split: str, rows: int, batch: int, more: dict) -> Cache:
            batches = max(1, PART_BYTES // (batch * bytes_per_row(classes, top_k)))
            return Cache(self.root, {**about, "split": split, **more}, rows, batches * batch, classes, top_k, words)

        if self.by_image:
            self.train = cache("train", len(splits.train), EVALUATION_BATCH, {})
        else:
            how = {"augmentation": augmentation(data), "seed": seed, "batch_size": self.batch_size}
            self.train = cache("train", self.steps * self.batch_size, self.batch_size, how)
        self.validation = cache("validation", len(splits.validation), EVALUATION_BATCH, {})

    def views(self, epochs: int, repeat: int | None = None) -> int:
        """Passes over the training images that so many epochs need, if their views repeat after `repeat`."""
        return 1 if self.by_image else min(epochs, repeat or epochs)

    def bytes(self, views: int) -> int:
        """Bytes on disk of so many views, and of the validation images."""
        return views * self.train.view_bytes + self.validation.view_bytes

    def missing(self, views: int, say: Callable[[str], None] = print) -> float:
        """The passes over the training images that have still to be computed, 0 if all is there and sound."""
        return len(self.train.missing(views, say)) / self.train.parts

    def build(self, views: int, say: Callable[[str], None] = print) -> None:
        """Computes what is missing. Several processes may do this at once, on one folder: each takes what no other is
        at. Raises `CheckFailed` if what is there is not what this teacher gives for these pixels."""
        for cache, count in ((self.validation, 1), (self.train, views)):
            cache.create()
            todo = cache.missing(count, say)
            before = sorted(set(range(count)) - {view for view, _ in todo})
            for view in sorted({*before[:1], *before[-1:]}):
                self._check(cache, view)
            self._fill(cache, count, todo, say)
            cache.touch()

    def training_batches(self, view: int, first_step: int = 0) -> tf.data.Dataset:
        """As `pipeline.training_batches`, with targets `{"labels": ..., "teacher_logits": [batch, classes]}`."""
        order = data_batches.epoch_order(self.seed, view, len(self.splits.train)) if self.by_image else None
        rows = self._rows(self.train, 0 if self.by_image else view, self.batch_size, first_step, self.steps, order)
        return data_batches.training_batches(
            self.splits.train, self.data, self.batch_size, self.seed, view, first_step, teacher_logits=rows
        )

    def evaluation_batches(self, batch_size: int) -> tf.data.Dataset:
        """As `pipeline.evaluation_batches` of the validation images, with the teacher's logits."""
        count = len(self.splits.validation)
        steps = -(-count // batch_size)
        order = np.minimum(np.arange(steps * batch_size), count - 1)  # padding has no weight: any row will do
        rows = self._rows(self.validation, 0, batch_size, 0, steps, order)
        return data_batches.evaluation_batches(self.splits.validation, batch_size, rows)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _rows(self, cache: Cache, view: int, batch: int, first: int, steps: int, order) -> tf.data.Dataset:
        """The logits of each step's rows, `[batch, classes]`; read some steps at a time."""
        at_once, count = max(1, CHUNK_BYTES // (4 * batch * cache.classes)), max(0, steps - first)
        kind = tf.float32 if cache.top_k else tf.float16

        def read(step) -> np.ndarray:
            span = slice(step * batch, min(steps, step + at_once) * batch)
            logits = cache.take(view, span if order is None else order[span])
            return logits.reshape(-1, batch, cache.classes)

        def chunk(step: tf.Tensor) -> tf.data.Dataset:
            logits = tf.numpy_function(read, [step], kind)
            return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(logits, [None, batch, cache.classes]))

        if 0 < count <= at_once:
            return tf.data.Dataset.from_tensor_slices(read(first))  # an epoch of MNIST: begins 10 ms earlier
        rows = tf.data.Dataset.range(first, steps, at_once).flat_map(chunk)
        return rows.apply(tf.data.experimental.assert_cardinality(count))

    def _teach(self, images: tf.Tensor) -> tf.Tensor:
        """float32 logits of a batch of any size."""
        if self._traced is None:
            signature = tf.TensorSpec([None, *images.shape[1:]], images.dtype)
            self._traced = tf.function(self._predict).get_concrete_function(signature)
        return self._traced(images)

    def _images(self, cache: Cache, view: int, first_row: int) -> Iterator[tf.Tensor]:
        """The images of a view from a row on, by the batch."""
        if cache is self.train and not self.by_image:
            step = first_row // self.batch_size
            source = data_batches.training_batches(self.splits.train, self.data, self.batch_size, self.seed, view, step)
        else:
            examples: Examples = self.splits.train if cache is self.train else self.splits.validation
            batch = min(EVALUATION_BATCH, len(examples))  # a few images are not filled up to many
            source = data_batches.evaluation_batches(examples, batch).skip(first_row // batch)
        return (images for images, *_ in source)

    def _fill(self, cache: Cache, views: int, todo: list, say: Callable[[str], None]) -> None:
        said, position, images = time.monotonic(), None, iter(())
        total, done = views * cache.parts, views * cache.parts - len(todo)
        while todo:
            busy = []
            for view, part in todo:
                first, end = cache.span(part)
                with cache.claimed(view, part) as mine:
                    if not mine:
                        busy.append((view, part))
                        continue
                    if position != (view, first):
                        images = self._images(cache, view, first)
                    found, rows = [], 0
                    while rows < end - first:
                        found.append(self._teach(next(images)))
                        rows += found[-1].shape[0]
                    cache.put(view, part, tf.concat(found, 0).numpy()[: end - first])
                    position, done = (view, end), done + 1
                if time.monotonic() - said > 10:
                    said = time.monotonic()
                    say(f"Teacher cache: {done} of {total} parts")
            todo = [each for each in cache.missing(views, say) if each in busy]
            if todo:
                time.sleep(WAIT_SECONDS)  # another process is at these

    def _check(self, cache: Cache, view: int) -> None:
        """Compares the first batch of a view with what the teacher gives for it now."""
        if cache is self.train:
            images, targets = next(iter(self.training_batches(view)))[:2]
        else:
            images, targets = next(iter(self.evaluation_batches(min(EVALUATION_BATCH, cache.rows))))[:2]
        now = packed(self._teach(images).numpy(), cache.top_k)
        now = (unpacked(now, cache.classes) if cache.top_k else now).astype(np.float32)
        off = np.abs(now - targets["teacher_logits"].numpy().astype(np.float32)).mean()
        if off > 0.01 * now.std() + 1e-6:
            raise CheckFailed(
                f"The teacher cache '{cache.path}' does not hold what this teacher gives for these images: the logits "
                f"are {off:.3g} off on average, where they spread by {now.std():.3g}. The way in which images are read "
                "or augmented must have changed. Remove it: kdistill cache prune --key "
                f"{cache.key}{'' if self.root == cache_root() else f' --cache {self.root}'}"
            )


def augmentation(data: Data) -> dict:
    """What is set that changes the pixels of training images; if nothing is, a row belongs to an image."""
    usual = dataclasses.asdict(Data())
    return {
        name: value
        for name, value in dataclasses.asdict(data).items()
        if value != usual[name] and name not in SAME_PIXELS
    }


def fingerprint(models, weights=None) -> str:
    """A hash of the architecture and every weight of Keras models, whatever their layers are called."""
    digest = hashlib.sha256(repr(None if weights is None else [float(w) for w in weights]).encode())
    for model in models:
        if not isinstance(model, keras.Model):
            raise InputError(
                f"A teacher cache needs teachers that are keras.Models, to know them again; received {model!r}."
            )
        names = {layer.name: f"#{i}" for i, layer in enumerate([model, *layers_of(model)])}
        try:
            config = _anonymous(model.get_config(), names)
        except NotImplementedError:  # a subclassed model; its outputs are compared with those in the cache anyway
            config = {}
        digest.update(json.dumps([type(model).__name__, config], sort_keys=True, default=repr).encode())
        for weight in model.weights:
            value = np.ascontiguousarray(weight.numpy())
            digest.update(repr((value.shape, str(value.dtype))).encode())
            digest.update(value.tobytes())
    return digest.hexdigest()[:16]


def _anonymous(config, names: dict[str, str]):
    """A layer's config with the names of layers replaced: they count up with all that a process has built."""
    if isinstance(config, dict):
        return {str(key): _anonymous(value, names) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_anonymous(value, names) for value in config]
    return names.get(config, config) if isinstance(config, str) else config


def pays(
    replay: Replay,
    mode: str,
    epochs: int,
    repeat: int | None,
    uses: int = 1,
    say: Callable[[str], None] = print,
) -> bool:
    """Whether filling the cache costs fewer passes of the teacher than `uses` fits of so many epochs would.

    With another mode than `auto` (a folder was named) it is used whatever it costs. Says why.
    """
    views = replay.views(epochs, repeat)
    missing, online, needed = replay.missing(views, say), uses * epochs, replay.bytes(views)
    size, place = human(needed), replay.root
    passes = f"{uses} x {epochs} epochs run the teacher {online} times over the images, filling the cache {missing:.3g}"
    if mode == "auto" and not replay.train.top_k and COSTS * missing >= online:
        mend = "" if replay.by_image or repeat else ", as every epoch has new images (cache.views=4 repeats those of 4)"
        say(f"Teacher cache: not used; {passes}{mend}.")
        return False
    while not place.exists():
        place = place.parent
    free, absent = shutil.disk_usage(place).free, needed * missing / views
    if absent > (free / 2 if mode == "auto" else free):
        if mode == "auto":
            say(f"Teacher cache: not used. It would take {size} in {replay.root}, where {human(free)} are free.")
            return False
        raise InputError(
            f"The teacher cache takes {size}; in {replay.root} {human(free)} are free. Give --cache a folder on a "
            "larger disk, fewer views (--set cache.views=N), or fewer logits (--set cache.top_k=K)."
        )
    say(f"Teacher cache: used; {passes} ({views} views, {size}, in {replay.root}).")
    if views == 1 < epochs and not replay.by_image:
        say(
            "Warning: cache.views=1 shows the student the same augmented images in every epoch; it may learn them by "
            "heart. Compare the validation accuracy with that of more views."
        )
    return True


def of_recipe(
    recipe: Recipe, data_dir=None, download: bool = False, root: Path | None = None, say: Callable[[str], None] = print
) -> tuple[Replay, int]:
    """What the students of a recipe whose teacher is a file replay, and how many views that is."""
    check_precision(recipe.precision)
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(recipe.precision)
    try:
        splits = load_splits(recipe.data, data_dir, download, say=say)
        teacher = saving.load_checked(recipe.teacher.file, splits.train.images.shape[1:], len(splits.class_names))
        teacher = folding.checked(teacher, splits.validation.images[:256], recipe.teacher_precision, say)
    finally:
        keras.config.set_dtype_policy(policy)
    cache, seed = recipe.cache, recipe.seed if recipe.cache.seed is None else recipe.cache.seed
    replay = Replay(teacher, splits, recipe.data, recipe.training.batch_size, seed, root, cache.top_k)
    return replay, replay.views(recipe.training.epochs, cache.views)


def human(size: float) -> str:
    """Bytes as people say them: 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
