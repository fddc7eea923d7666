"""Distilling from stored outputs is distilling online: the same pixels, the same logits, the same weights."""

import dataclasses
import json
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from support.small_models import CLASSES, corners, network
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.data import augmentation as data_augmentation
from kdistill.data import batches
from kdistill.data.splits import Examples, Splits
from kdistill.distillation.distiller import Distiller
from kdistill.errors import CheckFailed, InputError
from kdistill.networks.architectures import build
from kdistill.recipe import Data, Network, Recipe, Training
from kdistill.runs.folder import RunFolder
from kdistill.runs.teaching import Teaching
from kdistill.teachers import replay
from kdistill.teachers.replay import Replay, augmentation, fingerprint, pays
from kdistill.training import fit as training_fit
from kdistill.training.strategy import SINGLE_DEVICE

AUGMENTED = Data("corners", shift=2, flip=True)
SPLITS = Splits(corners(83), corners(30, seed=1), corners(30, seed=2), CLASSES, "corners", "0123456789abcdef")
TRAINING = Training(epochs=3, batch_size=16, learning_rate=3e-3)
TEACHER = network(filters=6)


def quiet(text):
    pass


def logits_of(images):
    return np.asarray(TEACHER(tf.cast(images, tf.float32)))


def made(root, data=AUGMENTED, **options):
    return Replay(TEACHER, SPLITS, data, 16, seed=3, root=root, **options)


def student():
    keras.utils.set_random_seed(1)
    return keras.models.clone_model(network(filters=3))


@pytest.mark.parametrize("steps_at_once", [1000, 2])
@pytest.mark.parametrize("data", [AUGMENTED, Data("corners")], ids=["by position", "by image"])
def test_the_outputs_belong_to_the_very_pixels(tmp_path, data, steps_at_once, monkeypatch):
    monkeypatch.setattr(replay, "CHUNK_BYTES", steps_at_once * 4 * 16 * len(CLASSES))
    found = made(tmp_path, data)
    assert found.by_image == (data.shift == 0)
    found.build(found.views(2), quiet)
    for view in (0, 1):
        for first in (0, 3, 5):
            plain = list(batches.training_batches(SPLITS.train, data, 16, 3, view, first))
            stored = found.training_batches(view, first)
            assert stored.cardinality() == 5 - first
            for (x, y), (images, targets) in zip(plain, stored, strict=True):
                np.testing.assert_array_equal(images, x)
                np.testing.assert_array_equal(targets["labels"], y)
                assert targets["teacher_logits"].dtype == tf.float16
                np.testing.assert_allclose(targets["teacher_logits"], logits_of(x), rtol=1e-3, atol=1e-3)
    whole = list(found.evaluation_batches(16))
    assert len(whole) == 2
    for images, targets, weights in whole:
        real = weights.numpy() > 0
        np.testing.assert_allclose(targets["teacher_logits"][real], logits_of(images[real]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("data", "repeat"), [(AUGMENTED, None), (Data("corners"), 2)], ids=["position", "image"])
def test_the_weights_are_those_of_the_online_run(tmp_path, data, repeat):
    """Bit for bit those of a teacher whose logits are rounded to float16, and near those of the teacher as it is."""
    found = made(tmp_path, data)
    found.build(found.views(TRAINING.epochs, repeat), quiet)

    def rounded(images):
        return tf.cast(tf.cast(TEACHER(images, training=False), tf.float16), tf.float32)

    fitted = {}
    for name, teacher, stored in (("cached", None, found), ("rounded", rounded, None), ("online", TEACHER, None)):
        distiller = Distiller(student(), teacher)
        log = training_fit.fit(distiller, SPLITS, data, TRAINING, 3, say=quiet, repeat=repeat, stored=stored)
        fitted[name] = (distiller.student.get_weights(), log)
    start = student().get_weights()
    for a, b, c, before in zip(*(fitted[name][0] for name in ("cached", "rounded", "online")), start, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
        np.testing.assert_allclose(a, c, atol=2e-3)
        assert before.size < 8 or np.abs(a - before).max() > 1e-2, "nothing was learnt"
    for name in ("loss", "agreement", "val_kd", "val_agreement"):
        assert fitted["cached"][1][name] == pytest.approx(fitted["online"][1][name], rel=1e-3, abs=1e-5)


def test_repeated_views_are_the_same_epochs_again(tmp_path, monkeypatch):
    seen = []
    plain = batches.training_batches
    monkeypatch.setattr(batches, "training_batches", lambda *a: seen.append(a[4]) or plain(*a))
    training_fit.fit(Distiller(student(), TEACHER), SPLITS, AUGMENTED, TRAINING, 3, say=quiet, repeat=2)
    assert seen == [0, 1, 0]


def test_a_cache_is_that_of_one_teacher_data_augmentation_seed_and_batch(tmp_path):
    one = made(tmp_path)
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
    assert len({one.train.key, *(each.train.key for each in others)}) == 8
    # Without augmentation neither seed nor batch size matters, and one pass serves all epochs.
    plain = [Replay(TEACHER, SPLITS, Data("corners"), batch, seed, tmp_path) for batch, seed in ((16, 3), (8, 4))]
    assert plain[0].train.key == plain[1].train.key and plain[0].views(50) == 1 and one.views(50, 4) == 4


def test_a_teacher_is_known_again_under_other_names_and_from_its_file(tmp_path):
    TEACHER.save(tmp_path / "teacher.keras")
    again = [network(filters=6, name="other"), keras.models.load_model(tmp_path / "teacher.keras")]
    assert {fingerprint([each]) for each in again} == {fingerprint([TEACHER])}
    changed = network(filters=6)
    values = changed.layers[-1].bias.numpy()
    values[0] += 1e-6
    changed.layers[-1].bias.assign(values)
    sigmoid = network(filters=6)
    sigmoid.get_layer("relu").negative_slope = 0.1
    assert len({fingerprint([each]) for each in (TEACHER, changed, sigmoid)}) == 3
    with pytest.raises(InputError, match="keras.Models"):
        fingerprint([lambda images: images])


def test_building_goes_on_where_it_stopped_and_damage_is_mended(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "PART_BYTES", 2 * 16 * 8)  # two batches of four float16
    found = made(tmp_path)
    assert found.train.parts == 3 and found.missing(2) == 2
    calls = []
    teach = found._teach
    put = found.train.put

    def killed(view, part, logits):
        if (view, part) == (1, 1):
            raise KeyboardInterrupt
        return put(view, part, logits)

    monkeypatch.setattr(found.train, "put", killed)
    with pytest.raises(KeyboardInterrupt):
        found.build(2, quiet)
    assert found.train.missing(2) == [(1, 1), (1, 2)] and not list(found.train.path.glob(".part*"))
    monkeypatch.setattr(found.train, "put", put)
    monkeypatch.setattr(found, "_teach", lambda images: calls.append(len(images)) or teach(images))
    found.build(2, quiet)
    assert sum(calls) == 2 * 16 + 16 + 16 + 30, "three batches, and the checks of a finished view and of validation"
    whole = {path.name: path.read_bytes() for path in found.train.path.glob("*.npy")}
    name = sorted(whole)[4]
    (found.train.path / name).write_bytes(whole[name][:-2])
    said = []
    assert found.missing(2, said.append) == pytest.approx(1 / 3) and name in said[0]
    made(tmp_path).build(2, quiet)
    assert {path.name: path.read_bytes() for path in found.train.path.glob("*.npy")} == whole


def test_several_processes_fill_one_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(replay, "PART_BYTES", 128)
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import test_replay as t; from kdistill import replay; replay.PART_BYTES = 128\n"
        "found = t.made(sys.argv[1]); found.build(6, print); print(found.missing(6))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        out, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0 and out.strip().endswith("0.0"), errors[-2000:]
    alone, found = made(tmp_path / "alone"), made(tmp_path)
    alone.build(6, quiet)
    assert len(list(found.train.path.glob("view-*.npy"))) == 6 * 5
    for view in range(6):
        both = [each.train.take(view, slice(0, 80)).astype("float32") for each in (found, alone)]
        np.testing.assert_allclose(*both, rtol=2e-3, atol=2e-3)


def test_pixels_that_have_changed_are_noticed(tmp_path, monkeypatch):
    found = made(tmp_path)
    found.build(1, quiet)
    augment = data_augmentation.augment
    monkeypatch.setattr(data_augmentation, "augment", lambda images, *a: tf.roll(augment(images, *a), 2, axis=2))
    with pytest.raises(CheckFailed, match="does not hold what this teacher gives.*kdistill cache prune --key"):
        made(tmp_path).build(1, quiet)


def test_the_choice_is_arithmetic_and_said(tmp_path, monkeypatch):
    def choice(found, mode="auto", epochs=12, repeat=None, uses=1):
        said = []
        return pays(found, mode, epochs, repeat, uses, said.append), " ".join(said)

    used, said = choice(made(tmp_path))
    assert not used and "1 x 12 epochs run the teacher 12 times" in said and "cache.views=4" in said
    assert choice(made(tmp_path), uses=2)[0] and choice(made(tmp_path), mode=str(tmp_path))[0]
    used, said = choice(made(tmp_path), repeat=4)
    assert used and "filling the cache 4" in said and "2.8 kB" in said  # 4 views x 80 and 30 rows of 4 float16
    used, said = choice(made(tmp_path), repeat=1)
    assert used and "learn them by heart" in said
    used, said = choice(made(tmp_path, Data("corners")), repeat=1)
    assert used and "filling the cache 1" in said and "by heart" not in said
    assert not choice(made(tmp_path, Data("corners")), epochs=1)[0]
    made(tmp_path).build(11, quiet)
    assert choice(made(tmp_path))[0], "eleven of the twelve views are there"
    monkeypatch.setattr(replay.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3000})())
    used, said = choice(made(tmp_path / "new"), repeat=4)
    assert not used and "3 kB are free" in said
    with pytest.raises(InputError, match="larger disk"):
        choice(made(tmp_path / "new"), mode="x", epochs=12, uses=9)


def test_a_run_that_goes_on_does_not_choose_again(tmp_path):
    """Otherwise a run killed before somebody else filled the cache would end with other bits than it began with."""
    recipe = Recipe("corners", Network("small_cnn"), Network("small_cnn"), AUGMENTED, training=TRAINING)

    def teaching(name):
        folder = RunFolder(tmp_path / name)
        folder.close()
        return Teaching(TEACHER, recipe, SPLITS, folder, SINGLE_DEVICE, quiet)

    mine, other, caches = teaching("run"), teaching("other"), str(tmp_path / "caches")
    assert mine.replay("student", 3, "auto") is None  # three epochs, three views
    assert mine.replay("student", 3, caches) is None and not (tmp_path / "caches").exists()
    assert other.replay("student", 3, caches).train.missing(3) == []
    assert other.replay("student", 3, "off").root == tmp_path / "caches"


def test_top_k(tmp_path):
    found = made(tmp_path, top_k=2)
    found.build(1, quiet)
    images, targets = next(iter(found.training_batches(0)))
    true, logits = logits_of(images), targets["teacher_logits"].numpy()
    assert logits.dtype == np.float32 and (logits.argmax(1) == true.argmax(1)).all()
    found.build(1, quiet)  # and the check of what is there
    with pytest.raises(InputError, match=r"cache\.top_k expects a number from 1 to 3"):
        made(tmp_path, top_k=4)


def test_what_is_augmentation():
    assert (
        augmentation(Data("npz", validation=0.2, train_limit=5, labeled=9, labeled_share=0.5, teacher_labels="same"))
        == {}
    )
    assert augmentation(Data(shift=2, flip=True)) == {"shift": 2, "flip": True}


def test_arrays_of_ones_own_with_stored_logits_in_plain_fit():
    """The targets of a user's own `fit`, without any teacher; the control leaves the logits aside."""
    examples: Examples = SPLITS.train
    images = examples.images.astype("float32")
    targets = {"labels": examples.labels, "teacher_logits": logits_of(images)}
    fitted = []
    for teacher, y in ((None, targets), (TEACHER, examples.labels)):
        distiller = Distiller(student(), teacher)
        distiller.compile(keras.optimizers.SGD(0.01), metrics=["sparse_categorical_accuracy"])
        weights = np.linspace(0, 2, len(images), dtype="float32")
        fit = distiller.fit(images, y, batch_size=16, sample_weight=weights, shuffle=False, verbose=0)
        fitted.append((distiller.student.get_weights(), fit.history, distiller.evaluate(images, y, verbose=0)))
    for a, b in zip(fitted[0][0], fitted[1][0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert fitted[0][1].keys() == fitted[1][1].keys() and "sparse_categorical_accuracy" in fitted[0][1]
    np.testing.assert_allclose(fitted[0][2], fitted[1][2], rtol=1e-4)
    control = training_fit.Supervised(student())
    control.compile("sgd")
    assert control.fit(images, targets, verbose=0).history.keys() == {"loss", "hard", "accuracy"}
    with pytest.raises(InputError, match="expects the keys 'labels' and 'teacher_logits', received labels"):
        control.fit(images, {"labels": examples.labels}, verbose=0)
    with pytest.raises(InputError, match="no teacher"):
        distiller = Distiller(student())
        distiller.compile("sgd")
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
