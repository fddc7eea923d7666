"""Distilling from stored outputs is distilling online: the same pixels, the same logits, the same weights."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_models import CLASSES, corners, network
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.data import batches
from kdistill.data.splits import Examples, Splits
from kdistill.distillation.distiller import Distiller
from kdistill.distillation.supervised import Supervised
from kdistill.errors import CheckFailed, InputError
from kdistill.networks.architectures import build
from kdistill.recipe import Data, Network, Recipe, Training
from kdistill.runs.folder import RunFolder
from kdistill.runs.teaching import Teaching
from kdistill.teachers import cache_choice, replay
from kdistill.teachers.cache_choice import cache_pays
from kdistill.teachers.replay import Replay, augmentation_settings, teacher_fingerprint
from kdistill.training import fit
from kdistill.training.strategy import SINGLE_DEVICE

pytestmark = pytest.mark.slow

AUGMENTED = Data("corners", shift=2, flip=True)
SPLITS = Splits(corners(83), corners(30, seed=1), corners(30, seed=2), CLASSES, "corners", "0123456789abcdef")
TRAINING = Training(epochs=3, batch_size=16, learning_rate=3e-3)
TEACHER = network(filters=6)


def quiet(text):
    pass


def logits_of(images):
    return np.asarray(TEACHER(tf.cast(images, tf.float32)))


def replay_of(root, data=AUGMENTED, **options):
    return Replay(TEACHER, SPLITS, data, 16, seed=3, root=root, **options)


def student():
    keras.utils.set_random_seed(1)
    return keras.models.clone_model(network(filters=3))


@pytest.mark.exhaustive("by position-1000")
@pytest.mark.parametrize("steps_at_once", [1000, 2])
@pytest.mark.parametrize("data", [AUGMENTED, Data("corners")], ids=["by position", "by image"])
def test_the_outputs_belong_to_the_very_pixels(tmp_path, data, steps_at_once, monkeypatch):
    monkeypatch.setattr(replay, "CHUNK_BYTES", steps_at_once * 4 * 16 * len(CLASSES))
    store = replay_of(tmp_path, data)
    assert store.by_image == (data.shift == 0)
    store.build(store.views(2), quiet)
    for view in (0, 1):
        for first in (0, 3, 5):
            plain = list(batches.training_batches(SPLITS.train, data, 16, 3, view, first))
            stored = store.training_batches(view, first)
            assert stored.cardinality() == 5 - first
            for (x, y), (images, targets) in zip(plain, stored, strict=True):
                np.testing.assert_array_equal(images, x)
                np.testing.assert_array_equal(targets["labels"], y)
                assert targets["teacher_logits"].dtype == tf.float16
                np.testing.assert_allclose(targets["teacher_logits"], logits_of(x), rtol=1e-3, atol=1e-3)
    whole = list(store.evaluation_batches(16))
    assert len(whole) == 2
    for images, targets, weights in whole:
        real = weights.numpy() > 0
        np.testing.assert_allclose(targets["teacher_logits"][real], logits_of(images[real]), rtol=1e-3, atol=1e-3)


@pytest.mark.exhaustive("image")
@pytest.mark.parametrize(("data", "repeat"), [(AUGMENTED, None), (Data("corners"), 2)], ids=["position", "image"])
def test_the_weights_are_those_of_the_online_run(tmp_path, data, repeat):
    """Bit for bit those of a teacher whose logits are rounded to float16, and near those of the teacher as it is."""
    store = replay_of(tmp_path, data)
    store.build(store.views(TRAINING.epochs, repeat), quiet)

    def rounded(images):
        return tf.cast(tf.cast(TEACHER(images, training=False), tf.float16), tf.float32)

    fitted = {}
    for name, teacher, stored in (("cached", None, store), ("rounded", rounded, None), ("online", TEACHER, None)):
        distiller = Distiller(student(), teacher)
        log = fit.fit(distiller, SPLITS, data, TRAINING, 3, say=quiet, repeat=repeat, stored=stored)
        fitted[name] = (distiller.student.get_weights(), log)
    start = student().get_weights()
    for a, b, c, before in zip(*(fitted[name][0] for name in ("cached", "rounded", "online")), start, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        np.testing.assert_allclose(a, c, atol=2e-3)
        assert before.size < 8 or np.abs(a - before).max() > 1e-2, "the student learned nothing"
    for name in ("loss", "agreement", "val_kd", "val_agreement"):
        assert fitted["cached"][1][name] == pytest.approx(fitted["online"][1][name], rel=1e-3, abs=1e-5)


def test_repeated_views_are_the_same_epochs_again(tmp_path, monkeypatch):
    views = []
    original = batches.training_batches
    monkeypatch.setattr(fit, "training_batches", lambda *a: views.append(a[4]) or original(*a))
    fit.fit(Distiller(student(), TEACHER), SPLITS, AUGMENTED, TRAINING, 3, say=quiet, repeat=2)
    assert views == [0, 1, 0]


def test_a_cache_is_that_of_one_teacher_data_augmentation_seed_and_batch(tmp_path):
    one = replay_of(tmp_path)
    other_data = dataclasses.replace(SPLITS, fingerprint="f" * 16)
    others = [
        Replay(network(filters=5), SPLITS, AUGMENTED, 16, 3, tmp_path),
        Replay(TEACHER, other_data, AUGMENTED, 16, 3, tmp_path),
        Replay(TEACHER, SPLITS, dataclasses.replace(AUGMENTED, shift=1), 16, 3, tmp_path),
        Replay(TEACHER, SPLITS, AUGMENTED, 8, 3, tmp_path),
        Replay(TEACHER, SPLITS, AUGMENTED, 16, 4, tmp_path),
        Replay(TEACHER, SPLITS, AUGMENTED, 16, 3, tmp_path, top_k=2),
        Replay([TEACHER, TEACHER], SPLITS, AUGMENTED, 16, 3, tmp_path),
    ]
    assert len({one.train.key, *(other.train.key for other in others)}) == 8
    # Without augmentation neither seed nor batch size matters, and one pass serves all epochs.
    plain = [Replay(TEACHER, SPLITS, Data("corners"), batch, seed, tmp_path) for batch, seed in ((16, 3), (8, 4))]
    assert plain[0].train.key == plain[1].train.key and plain[0].views(50) == 1 and one.views(50, 4) == 4


def test_a_teacher_is_recognized_under_other_names_and_from_its_file(tmp_path):
    TEACHER.save(tmp_path / "teacher.keras")
    again = [network(filters=6, name="other"), keras.models.load_model(tmp_path / "teacher.keras")]
    assert {teacher_fingerprint([model]) for model in again} == {teacher_fingerprint([TEACHER])}
    changed = network(filters=6)
    values = changed.layers[-1].bias.numpy()
    values[0] += 1e-6
    changed.layers[-1].bias.assign(values)
    sigmoid = network(filters=6)
    sigmoid.get_layer("relu").negative_slope = 0.1
    assert len({teacher_fingerprint([model]) for model in (TEACHER, changed, sigmoid)}) == 3
    with pytest.raises(InputError, match="keras.Models"):
        teacher_fingerprint([lambda images: images])


def test_building_continues_where_it_stopped_and_repairs_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "PART_BYTES", 2 * 16 * 8)  # two batches of four float16
    store = replay_of(tmp_path)
    assert store.train.parts == 3 and store.missing(2) == 2
    calls = []
    teach = store._teach
    write_part = store.train.write_part

    def killed(view, part, logits):
        if (view, part) == (1, 1):
            raise KeyboardInterrupt
        return write_part(view, part, logits)

    monkeypatch.setattr(store.train, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        store.build(2, quiet)
    assert store.train.missing_parts(2) == [(1, 1), (1, 2)] and not list(store.train.path.glob(".part*"))
    monkeypatch.setattr(store.train, "write_part", write_part)
    monkeypatch.setattr(store, "_teach", lambda images: calls.append(len(images)) or teach(images))
    store.build(2, quiet)
    assert sum(calls) == 2 * 16 + 16 + 16, "three batches, and the check of a finished view"
    whole = {path.name: path.read_bytes() for path in store.train.path.glob("*.npy")}
    name = sorted(whole)[4]
    (store.train.path / name).write_bytes(whole[name][:-2])
    messages = []
    assert store.missing(2, messages.append) == pytest.approx(1 / 3) and name in messages[0]
    replay_of(tmp_path).build(2, quiet)
    assert {path.name: path.read_bytes() for path in store.train.path.glob("*.npy")} == whole


def test_several_processes_fill_one_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "PART_BYTES", 128)
    folder = Path(__file__).parent
    code = (
        f"import sys; sys.path[:0] = {[str(folder), str(folder.parent)]}\n"
        "import test_replay as t; from kdistill.teachers import replay; replay.PART_BYTES = 128\n"
        "store = t.replay_of(sys.argv[1]); print('ready', flush=True)\n"
        "store.build(6, print); print(store.missing(6))\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], **pipes)
    other.stdout.readline()  # both begin at once
    replay_of(tmp_path).build(6, quiet)
    out, errors = other.communicate(timeout=120)
    assert other.returncode == 0 and out.strip().endswith("0.0"), errors[-2000:]
    alone, store = replay_of(tmp_path / "alone"), replay_of(tmp_path)
    alone.build(6, quiet)
    assert len(list(store.train.path.glob("view-*.npy"))) == 6 * 5
    for view in range(6):
        both = [one.train.read_rows(view, slice(0, 80)).astype("float32") for one in (store, alone)]
        np.testing.assert_allclose(*both, rtol=2e-3, atol=2e-3)


def test_pixels_that_have_changed_are_noticed(tmp_path, monkeypatch):
    store = replay_of(tmp_path)
    store.build(1, quiet)
    augment = batches.augment
    monkeypatch.setattr(batches, "augment", lambda images, *a: tf.roll(augment(images, *a), 2, axis=2))
    with pytest.raises(CheckFailed, match="does not hold this teacher's logits.*kdistill cache prune --key"):
        replay_of(tmp_path).build(1, quiet)


def test_the_choice_is_arithmetic_and_reported(tmp_path, monkeypatch):
    def choice(store, mode="auto", epochs=12, repeat=None, uses=1):
        messages = []
        return cache_pays(store, mode, epochs, repeat, uses, messages.append), " ".join(messages)

    used, messages = choice(replay_of(tmp_path))
    assert not used and "1 x 12 epochs run the teacher 12 times" in messages and "cache.views=4" in messages
    assert choice(replay_of(tmp_path), uses=2)[0] and choice(replay_of(tmp_path), mode=str(tmp_path))[0]
    used, messages = choice(replay_of(tmp_path), repeat=4)
    assert used and "filling the cache 4" in messages and "2.8 kB" in messages  # 4 views x 80 and 30 rows of 4 float16
    used, messages = choice(replay_of(tmp_path), repeat=1)
    assert used and "may memorize them" in messages
    used, messages = choice(replay_of(tmp_path, Data("corners")), repeat=1)
    assert used and "filling the cache 1" in messages and "memorize" not in messages
    assert not choice(replay_of(tmp_path, Data("corners")), epochs=1)[0]
    replay_of(tmp_path).build(11, quiet)
    assert choice(replay_of(tmp_path))[0], "eleven of the twelve views are there"
    monkeypatch.setattr(cache_choice.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3000})())
    used, messages = choice(replay_of(tmp_path / "new"), repeat=4)
    assert not used and "3 kB are free" in messages
    with pytest.raises(InputError, match="larger disk"):
        choice(replay_of(tmp_path / "new"), mode="x", epochs=12, uses=9)


def test_a_resumed_run_does_not_choose_again(tmp_path, monkeypatch):
    """Otherwise a run killed before somebody else filled the cache would end with other bits than it began with.

    Where the cache is, the command line alone decides: a run folder may come from elsewhere.
    """
    monkeypatch.setenv("KDISTILL_CACHE", str(tmp_path / "default"))
    recipe = Recipe("corners", Network("small_cnn"), Network("small_cnn"), AUGMENTED, training=TRAINING)

    def teaching(name):
        folder = RunFolder(tmp_path / name)
        folder.close()
        return Teaching(TEACHER, recipe, SPLITS, folder, SINGLE_DEVICE, quiet)

    mine, other, caches = teaching("run"), teaching("other"), str(tmp_path / "caches")
    assert mine.replay("student", 3, "auto") is None  # three epochs, three views
    assert mine.replay("student", 3, caches) is None and not (tmp_path / "caches").exists()
    assert other.replay("student", 3, caches).train.missing_parts(3) == []
    assert other.replay("student", 3, "off").root == tmp_path / "default"


def test_top_k(tmp_path):
    store = replay_of(tmp_path, top_k=2)
    store.build(1, quiet)
    images, targets = next(iter(store.training_batches(0)))
    true, logits = logits_of(images), targets["teacher_logits"].numpy()
    assert logits.dtype == np.float32 and (logits.argmax(1) == true.argmax(1)).all()
    replay_of(tmp_path, top_k=2).build(1, quiet)  # and the check of what is there
    with pytest.raises(InputError, match=r"cache\.top_k expects a number from 1 to 3"):
        replay_of(tmp_path, top_k=4)


def test_what_is_augmentation():
    assert (
        augmentation_settings(
            Data("npz", validation=0.2, train_limit=5, labeled=9, labeled_share=0.5, teacher_labels="same")
        )
        == {}
    )
    assert augmentation_settings(Data(shift=2, flip=True)) == {"shift": 2, "flip": True}


def test_arrays_of_your_own_with_stored_logits_in_plain_fit():
    """The targets of a user's own `fit`, without any teacher; the control leaves the logits aside."""
    examples: Examples = SPLITS.train
    images = examples.images.astype("float32")
    targets = {"labels": examples.labels, "teacher_logits": logits_of(images)}
    fitted = []
    for teacher, y in ((None, targets), (TEACHER, examples.labels)):
        distiller = Distiller(student(), teacher)
        distiller.compile(keras.optimizers.SGD(0.01), metrics=["sparse_categorical_accuracy"])
        weights = np.linspace(0, 2, len(images), dtype="float32")
        history = distiller.fit(images, y, batch_size=16, sample_weight=weights, shuffle=False, verbose=0)
        fitted.append((distiller.student.get_weights(), history.history, distiller.evaluate(images, y, verbose=0)))
    for a, b in zip(fitted[0][0], fitted[1][0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert fitted[0][1].keys() == fitted[1][1].keys() and "sparse_categorical_accuracy" in fitted[0][1]
    np.testing.assert_allclose(fitted[0][2], fitted[1][2], rtol=1e-4)
    control = Supervised(student())
    control.compile("sgd", run_eagerly=True)
    assert control.fit(images, targets, verbose=0).history.keys() == {"loss", "hard", "accuracy"}
    with pytest.raises(InputError, match="expects the keys 'labels' and 'teacher_logits', received labels"):
        control.fit(images, {"labels": examples.labels}, verbose=0)
    with pytest.raises(InputError, match="no teacher"):
        distiller = Distiller(student())
        distiller.compile("sgd", run_eagerly=True)
        distiller.fit(images, examples.labels, verbose=0)


def test_the_commands(tmp_path, monkeypatch):
    runner, root = CliRunner(), ["--cache", str(tmp_path / "caches")]
    keras.utils.set_random_seed(0)
    build(Network("lenet", {"filters": (4, 4), "units": 8}), (28, 28, 1), 10).save(tmp_path / "teacher.keras")
    chosen = ["mnist", "--variant", "smoke", "--set", "train_limit=96", "--set", "cache.views=1"]
    command = ["cache", "build", *chosen, *root]
    failed = runner.invoke(app, command)
    assert failed.exit_code == 2 and "Give --teacher" in failed.output
    built = runner.invoke(app, [*command, "--teacher", str(tmp_path / "teacher.keras")])
    assert built.exit_code == 0, built.output
    assert "1 views, 3.84 kB" in built.output and "1 passes over 96 images" in built.output  # 2 x 96 x 10 float16
    again = runner.invoke(app, [*command, "--teacher", str(tmp_path / "teacher.keras")])
    assert "0 passes" in again.output
    listed = json.loads(runner.invoke(app, ["cache", "list", *root, "--json"]).output)
    assert {(row["split"], row["views"], row["teacher"]) for row in listed} == {
        ("train", 1, "lenet"),
        ("validation", 1, "lenet"),
    }
    assert runner.invoke(app, ["cache", "verify", *root]).exit_code == 0
    part = next((tmp_path / "caches").glob("*/view-*.npy"))
    part.write_bytes(part.read_bytes()[:-1])
    damaged = runner.invoke(app, ["cache", "verify", *root])
    assert damaged.exit_code == 1 and part.name in damaged.output
    assert runner.invoke(app, ["cache", "prune", *root]).exit_code == 2
    pruned = runner.invoke(app, ["cache", "prune", *root, "--days", "0"])
    assert "Deleted 2 caches" in pruned.output and not list((tmp_path / "caches").iterdir())
