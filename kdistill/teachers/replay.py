"""The teacher runs once: its outputs for exactly the pixels that the student sees are stored and replayed.

Order, augmentation and mixing are a pure function of (seed, view, position), so a row of a cache belongs to one
position of one view (the batches of an epoch). Without augmentation a row belongs to an image: one pass over the images
serves all epochs, orders, seeds and batch sizes.
"""

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from kdistill.data import batches
from kdistill.data.arrays import Output
from kdistill.data.splits import Examples, Splits
from kdistill.errors import CheckFailed, InputError
from kdistill.files import cache_root
from kdistill.networks.copying import architecture_of
from kdistill.recipe import Data
from kdistill.recipe.values import CLASSES
from kdistill.teachers.cache import PART_BYTES, Cache, bytes_per_row, pack, unpack
from kdistill.teachers.foreign import failures_as_messages
from kdistill.teachers.frozen import frozen

EVALUATION_BATCH = 256
# Fields of `Data` that select images and labels but do not change pixels; the data's fingerprint covers the images.
NO_AUGMENTATION = (
    "name",
    "head",
    "validation",
    "image_size",
    "max_undecodable",
    "train_limit",
    "labeled",
    "labeled_share",
    "teacher_labels",
)
CHUNK_BYTES = 8 << 20  # bytes per read of a memory map: one Python call per batch would cost more
WAIT_SECONDS = 0.5


class Replay:
    """A teacher's stored outputs instead of the teacher: batches whose targets include `teacher_logits`.

    Args:
        teacher: a `keras.Model`, or a list of them with `teacher_weights`, blended as in `Distiller`.
        splits, data: the images, and their augmentation.
        batch_size, seed: of the training batches. They matter only where images are augmented.
        root: the folder of all caches. None: `kdistill.files.cache_root()`.
        top_k: number of logits to keep of a row, with the mass of the others. None keeps all.
        files: where the teacher came from, dicts of file and fingerprint, for who reads the cache's `about.json`.
        taps: layers of the teacher whose outputs are stored behind the logits, with the settings that name them; the
            targets then hold `{"logits": ..., tap: ...}`. The tap `logits` takes no space.
        strategy: in whose scope the teacher was created: each replica of this process computes its part of a batch.
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
        files: Sequence[dict] = (),
        taps: dict[str, str] | None = None,
        strategy: tf.distribute.Strategy | None = None,
    ):
        self.strategy = strategy
        self.splits, self.data, self.seed = splits, data, seed
        self.batch_size = min(batch_size, len(splits.train))
        self.steps = batches.steps_per_epoch(splits.train, self.batch_size)
        self.by_image = not augmentation_settings(data)
        self.root = Path(root) if root else cache_root()
        classes = len(splits.class_names)
        outputs = splits.outputs or {"": Output(CLASSES, (classes,))}
        if top_k is not None and not (splits.classifies and 1 <= top_k < classes):
            raise InputError(f"cache.top_k expects a number from 1 to {classes - 1}, received {top_k}.")
        taps = {name: setting for name, setting in (taps or {}).items() if name != "logits"}
        if taps and top_k is not None:
            raise InputError(
                f"cache.top_k={top_k} keeps some logits, but {', '.join(taps)} of the teacher are stored whole. Leave "
                "it out (--set cache.top_k=none)."
            )
        meanings = {name: output.meaning for name, output in outputs.items()}
        self._predict, self._traced = frozen(teacher, teacher_weights, taps, lambda: meanings), None
        self.shapes = {name or "logits": output.shape for name, output in outputs.items()}  # of a row, in this order
        if taps:
            self.shapes |= tap_shapes(self._predict, splits.input_shape, taps)
        columns = sum(math.prod(shape) for shape in self.shapes.values())
        models = teacher if isinstance(teacher, (list, tuple)) else [teacher]
        identity = {
            "teacher": teacher_fingerprint(models, teacher_weights),
            "data": splits.fingerprint,
            "image": json.loads(json.dumps(splits.input_shape)),
        }
        if splits.outputs is not None:
            identity["outputs"] = [[name, output.meaning, list(output.shape)] for name, output in outputs.items()]
        if taps:
            identity["taps"] = [[name, list(self.shapes[name])] for name in taps]
        description = {"teacher_name": ", ".join(model.name for model in models), "source": splits.source}
        description["teacher_files"] = list(files)

        def cache(split: str, rows: int, batch: int, views: dict) -> Cache:
            part_rows = batch * max(1, PART_BYTES // (batch * bytes_per_row(columns, top_k)))
            split_identity = {**identity, "split": split, **views}
            return Cache(self.root, split_identity, rows, part_rows, columns, top_k, description)

        if self.by_image:
            self.train = cache("train", len(splits.train), EVALUATION_BATCH, {})
        else:
            views = {"augmentation": augmentation_settings(data), "seed": seed, "batch_size": self.batch_size}
            self.train = cache("train", self.steps * self.batch_size, self.batch_size, views)
        self.validation = cache("validation", len(splits.validation), EVALUATION_BATCH, {})
        # By folder, the views that this teacher has computed or checked here.
        self._known: dict[Path, set[int]] = {self.train.path: set(), self.validation.path: set()}

    @property
    def image_bytes(self) -> int:
        """Bytes on disk of the outputs for one image."""
        return bytes_per_row(self.train.classes, self.train.top_k)

    def views(self, epochs: int, repeat: int | None = None) -> int:
        """The number of views that training needs for `epochs` epochs, if the views repeat after `repeat` epochs."""
        return 1 if self.by_image else min(epochs, repeat or epochs)

    def bytes(self, views: int) -> int:
        """Bytes on disk of this many views, and of the validation images."""
        return views * self.train.view_bytes + self.validation.view_bytes

    def missing(self, views: int, say: Callable[[str], None] = print) -> float:
        """The passes over the training images that are not computed yet; 0 if all parts are there and intact."""
        return len(self.train.missing_parts(views, say)) / self.train.parts

    @failures_as_messages()
    def build(self, views: int, say: Callable[[str], None] = print) -> None:
        """Computes the missing parts. Several processes may share the work on one folder.

        Raises `CheckFailed` if the cache holds other logits than this teacher computes for these pixels.
        """
        for cache, count in ((self.validation, 1), (self.train, views)):
            cache.create()
            missing = cache.missing_parts(count, say)
            complete = sorted(set(range(count)) - {view for view, _ in missing})
            for view in sorted({*complete[:1], *complete[-1:]} - self._known[cache.path]):
                self._check(cache, view)
            self._fill(cache, count, missing, say)
            self._known[cache.path] |= set(range(count))
            cache.touch()

    def training_batches(
        self, view: int, first_step: int = 0, share: tuple[int, int] = batches.WHOLE_BATCH
    ) -> tf.data.Dataset:
        """As `batches.training_batches`, with targets `{"labels": ..., "teacher_logits": [batch, classes]}`."""
        order = batches.epoch_order(self.seed, view, len(self.splits.train)) if self.by_image else None
        rows = self._rows(
            self.train, 0 if self.by_image else view, self.batch_size, first_step, self.steps, order, share
        )
        return batches.training_batches(
            self.splits.train, self.data, self.batch_size, self.seed, view, first_step, share, teacher_logits=rows
        )

    def evaluation_batches(self, batch_size: int) -> tf.data.Dataset:
        """As `batches.evaluation_batches` of the validation images, with the teacher's logits."""
        count = len(self.splits.validation)
        steps = -(-count // batch_size)
        order = np.minimum(np.arange(steps * batch_size), count - 1)  # padding has no weight, so any row will do
        rows = self._rows(self.validation, 0, batch_size, 0, steps, order)
        return batches.evaluation_batches(self.splits.validation, batch_size, rows)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _rows(
        self, cache: Cache, view: int, batch: int, first: int, steps: int, order, share=batches.WHOLE_BATCH
    ) -> tf.data.Dataset:
        """The logits `[batch, classes]` of every step (of a share its part), read several steps at a time."""
        places = batches.share_positions(batch, share)
        at_once, count = max(1, CHUNK_BYTES // (4 * batch * cache.classes)), max(0, steps - first)
        kind = tf.float32 if cache.top_k else tf.float16

        def read(step) -> np.ndarray:
            span = slice(step * batch, min(steps, step + at_once) * batch)
            logits = cache.read_rows(view, span if order is None else order[span])
            logits = logits.reshape(-1, batch, cache.classes)
            return logits if len(places) == batch else logits[:, places]

        def chunk(step: tf.Tensor) -> tf.data.Dataset:
            logits = tf.numpy_function(read, [step], kind)
            return tf.data.Dataset.from_tensor_slices(tf.ensure_shape(logits, [None, len(places), cache.classes]))

        if 0 < count <= at_once:
            rows = tf.data.Dataset.from_tensor_slices(read(first))  # all of MNIST; the epoch starts 10 ms earlier
        else:
            rows = tf.data.Dataset.range(first, steps, at_once).flat_map(chunk)
            rows = rows.apply(tf.data.experimental.assert_cardinality(count))
        return rows if self._is_flat else rows.map(self._split)

    @property
    def _is_flat(self) -> bool:
        """Whether a row is what the teacher gives for an image, `[columns]`."""
        return [*self.shapes] == ["logits"] and len(self.shapes["logits"]) == 1

    def _split(self, rows: tf.Tensor) -> tf.Tensor | dict[str, tf.Tensor]:
        """What rows `[batch, columns]` hold: an output `[batch, ...]`, or by name several, or `logits` and each tap."""
        parts = tf.split(rows, [math.prod(shape) for shape in self.shapes.values()], axis=1)
        named = zip(parts, self.shapes.items(), strict=True)
        values = {name: tf.reshape(part, [part.shape[0] or -1, *shape]) for part, (name, shape) in named}
        return values["logits"] if [*values] == ["logits"] else values

    def _teach(self, images: tf.Tensor) -> tf.Tensor:
        """The teacher's float32 outputs `[n, columns]` of a batch of any size: logits, and behind them the taps."""
        if self._traced is None:
            signature = tf.nest.map_structure(lambda part: tf.TensorSpec([None, *part.shape[1:]], part.dtype), images)
            function = self._columns if self.strategy is None else self._columns_on_replicas
            self._traced = tf.function(function).get_concrete_function(signature)
        return self._traced(images)

    def _columns_on_replicas(self, images: tf.Tensor) -> tf.Tensor:
        """As `_columns`; each replica of this process computes as many of the images as the others do."""
        replicas = len(self.strategy.extended.worker_devices)
        count = tf.shape(tf.nest.flatten(images)[0])[0]
        size = (count + replicas - 1) // replicas

        def part() -> tf.Tensor:
            place = tf.distribute.get_replica_context().replica_id_in_sync_group % replicas
            # The last image again in the place of missing ones: no replica can compute nothing.
            rows = tf.minimum(place * size + tf.range(size), count - 1)
            return self._columns(tf.nest.map_structure(lambda array: tf.gather(array, rows), images))

        return tf.concat(self.strategy.experimental_local_results(self.strategy.run(part)), 0)[:count]

    def _columns(self, images: tf.Tensor) -> tf.Tensor:
        outputs = self._predict(images)
        if self._is_flat:
            return outputs
        outputs = outputs if isinstance(outputs, dict) else {"logits": outputs}
        parts = [
            tf.reshape(tf.cast(outputs[name], tf.float32), [-1, math.prod(shape)])
            for name, shape in self.shapes.items()
        ]
        return tf.concat(parts, axis=1)

    def _images(self, cache: Cache, view: int, first_row: int) -> Iterator[tf.Tensor]:
        """The images of a view from a row on, in batches."""
        if cache is self.train and not self.by_image:
            step = first_row // self.batch_size
            source = batches.training_batches(self.splits.train, self.data, self.batch_size, self.seed, view, step)
        else:
            examples: Examples = self.splits.train if cache is self.train else self.splits.validation
            batch = min(EVALUATION_BATCH, len(examples))  # do not pad a few images to a full batch
            # Not `skip`, which reads and decodes what it skips: each of several processes starts at many parts.
            source = batches.evaluation_batches(examples.select(slice(first_row, None)), batch)
        return (images for images, *_ in source)

    def _fill(self, cache: Cache, views: int, missing: list, say: Callable[[str], None]) -> None:
        """Computes the missing parts that no other process computes, and waits for those."""
        reported, position, images = time.monotonic(), None, iter(())
        total, done = views * cache.parts, views * cache.parts - len(missing)
        while missing:
            busy = []
            for view, part in missing:
                first, end = cache.row_range(part)
                with cache.claim(view, part) as claimed:
                    if not claimed:
                        busy.append((view, part))
                        continue
                    if position != (view, first):
                        images = self._images(cache, view, first)
                    cache.write_part(view, part, self._logits(images, end - first))
                    position, done = (view, end), done + 1
                if time.monotonic() - reported > 10:
                    reported = time.monotonic()
                    say(f"Teacher cache: {done} of {total} parts")
            missing = [pair for pair in cache.missing_parts(views, say) if pair in busy]
            if missing:
                time.sleep(WAIT_SECONDS)  # another process computes these

    def _logits(self, images: Iterator[tf.Tensor], count: int) -> np.ndarray:
        """The teacher's logits for the next `count` images, `[count, classes]`; padding at the end is dropped."""
        logits, rows = [], 0
        while rows < count:
            logits.append(self._teach(next(images)))
            rows += logits[-1].shape[0]
        return tf.concat(logits, 0).numpy()[:count]

    def _check(self, cache: Cache, view: int) -> None:
        """Compares the first batch of a view with the logits that the teacher computes for it now."""
        if cache is self.train:
            images, targets = next(iter(self.training_batches(view)))[:2]
        else:
            images, targets = next(iter(self.evaluation_batches(min(EVALUATION_BATCH, cache.rows))))[:2]
        logits = pack(self._teach(images).numpy(), cache.top_k)
        logits = (unpack(logits, cache.classes) if cache.top_k else logits).astype(np.float32)
        stored = targets["teacher_logits"]
        stored = [stored[name] for name in self.shapes] if isinstance(stored, dict) else [stored]
        stored = [tf.reshape(part, [len(logits), -1]) for part in stored]
        difference = np.abs(logits - np.concatenate(stored, axis=1).astype(np.float32)).mean()
        if difference > 0.01 * logits.std() + 1e-6:
            raise CheckFailed(
                f"The teacher cache '{cache.path}' does not hold this teacher's logits for these images: they differ "
                f"by {difference:.3g} on average, with a standard deviation of {logits.std():.3g}. The reading or the "
                "augmentation of images must have changed. Delete the cache: kdistill cache prune --key "
                f"{cache.key}{'' if self.root == cache_root() else f' --cache {self.root}'}"
            )


def tap_shapes(predict, shape: Sequence[int], taps: dict[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of an example's taps, for images of this shape. `predict` as of `frozen`, `taps` with settings.

    Raises `InputError` for a tap whose size depends on the image.
    """
    traced = tf.function(predict).get_concrete_function(tf.TensorSpec([None, *shape], tf.float32))
    shapes = {name: tuple(traced.structured_outputs[name].shape[1:]) for name in taps}
    for name, sizes in shapes.items():
        if None in sizes:
            raise InputError(
                f"The cache cannot store the teacher's '{name}' {sizes}: its size is open. Use --cache off, or fix "
                f"{taps[name]}."
            )
    return shapes


def augmentation_settings(data: Data) -> dict:
    """The settings of `Data` that change the pixels of training images, where they differ from the default."""
    defaults = dataclasses.asdict(Data())
    return {
        name: value
        for name, value in dataclasses.asdict(data).items()
        if value != defaults[name] and name not in NO_AUGMENTATION
    }


def teacher_fingerprint(models, weights=None) -> str:
    """A hash of the architecture and all weights of Keras models; the names of layers do not matter."""
    digest = hashlib.sha256(repr(None if weights is None else [float(weight) for weight in weights]).encode())
    for model in models:
        if not isinstance(model, keras.Model):
            raise InputError(
                "A teacher cache expects teachers that are keras.Models, whose weights it can compare; received "
                f"{model!r}."
            )
        try:
            config = architecture_of(model)
        except NotImplementedError:  # a subclassed model; `Replay.build` compares its outputs with those in the cache
            config = {}
        digest.update(json.dumps([type(model).__name__, config], sort_keys=True, default=repr).encode())
        for weight in model.weights:
            array = np.ascontiguousarray(weight.numpy())
            digest.update(repr((array.shape, str(array.dtype))).encode())
            digest.update(array.tobytes())
    return digest.hexdigest()[:16]
