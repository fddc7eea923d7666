"""What cannot work is refused before anything trains, and leaves no folder behind."""

import dataclasses
import time

import keras
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.data import load
from kdistill.errors import InputError
from kdistill.networks import architectures
from kdistill.recipe import Distill, Network, Stage, Term
from kdistill.recipe.loading import load_recipe
from kdistill.runs.preflight import seeds_are_copies
from kdistill.runs.run import run
from kdistill.runs.sweep import sweep
from kdistill.training import fit

pytestmark = pytest.mark.slow

SMOKE = load_recipe("mnist", "smoke", ["train_limit=64", "exports=reference"])
SECONDS = 20  # of the limit, imports included


def changed(**changes):
    return dataclasses.replace(SMOKE, **changes)


def hint(**options):
    return Distill(terms={"hint": Term("hint", 1.0, **options)})


def saved(path, classes: int = 10, side: int = 28) -> str:
    keras.Sequential([keras.Input((side, side, 1)), keras.layers.Flatten(), keras.layers.Dense(classes)]).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def nothing_trains(monkeypatch):
    monkeypatch.setattr(fit, "fit", lambda *args, **kwargs: pytest.fail("a model was trained"))


REFUSED = {
    "an unknown student": (changed(student=Network("small_cmm")), "Unknown network 'small_cmm'.*small_cnn"),
    "an unknown teacher": (changed(teacher=Network("lenett")), "Unknown network 'lenett'.*lenet"),
    "an unknown assistant": (changed(assistants=(Network("lenett"),)), "Unknown network 'lenett'"),
    "a negative width": (changed(student=Network("small_cnn", {"widths": (-8,)})), "small_cnn.*-8"),
    "an unknown option": (changed(student=Network("small_cnn", {"widthz": (8,)})), "small_cnn.*widthz"),
    "top_k": (changed(cache=dataclasses.replace(SMOKE.cache, top_k=10)), r"cache\.top_k.*from 1 to 9, received 10"),
    "a profile": (changed(exports=("npv",)), "Unknown profile 'npv'. Did you mean 'npu'"),
    "an absent teacher file": (changed(teacher=Network("lenet", file="no.keras")), "no file 'no.keras'"),
    "absent weights": (changed(teacher=Network("lenet", weights=("no.npz",))), "no file 'no.npz'"),
    "a tap of the student": (changed(distill=hint(student_tap="conv9", teacher_tap="conv2")), "conv9"),
    "a tap of the teacher": (changed(distill=hint(student_tap="conv2", teacher_tap="conv9")), "conv9"),
    "shapes of taps": (changed(distill=hint(student_tap="conv2", teacher_tap="conv2")), "one shape.*Project"),
    "a layer to compress": (changed(compress=(Stage("prune", layer_sparsity={"conv9": 0.5}),)), "conv9"),
    "a layer to skip": (changed(compress=(Stage("qat", skip=("conv9",)),)), "conv9"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_that_cannot_work(name, tmp_path):
    recipe, message = REFUSED[name]
    start = time.perf_counter()
    with pytest.raises(InputError, match=message):
        run(recipe, tmp_path / "out", say=lambda text: None)
    assert time.perf_counter() - start < SECONDS and not (tmp_path / "out").exists()


def test_a_teacher_file_that_does_not_fit(tmp_path):
    for options, message in (
        ({"classes": 7}, "has 7 classes, the data has 10"),
        ({"side": 8}, r"expects images of \(8, 8, 1\)"),
    ):
        recipe = changed(teacher=Network("own", file=saved(tmp_path / "teacher.keras", **options)))
        with pytest.raises(InputError, match=message):
            run(recipe, tmp_path / "out", say=lambda text: None)
    (tmp_path / "teacher.keras").write_bytes(b"no model")
    with pytest.raises(InputError, match="cannot be loaded"):
        run(recipe, tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def recurrent(shape, classes, widths=()):
    """A student that reads an image row by row."""
    image = keras.Input(shape)
    rows = keras.layers.Reshape(shape[:2])(keras.layers.Rescaling(1 / 255)(image))
    return keras.Model(image, keras.layers.Dense(classes)(keras.layers.GRU(8, name="rows")(rows)))


@pytest.mark.parametrize(
    "fields,message",
    [
        ("mean=(1.0, 2.0)", "mean expects 1 or 1 numbers"),
        ("channels=1, output='logits'", None),
        ("quantization='int8', batch=1", "the recurrent layer 'rows'.*unroll=True"),
        ("quantization='dynamic'", "the recurrent layer 'rows' needs with an open batch size"),
    ],
)
def test_exports_that_cannot_work(fields, message, tmp_path, monkeypatch):
    monkeypatch.setattr(fit, "fit", lambda *a, **k: pytest.fail("trained"))
    if message and "rows" in message:
        monkeypatch.setitem(architectures.NETWORKS, "small_cnn", recurrent)
    profile = tmp_path / "odd.py"
    profile.write_text(f"from kdistill.recipe import Profile\ndef profile(): return Profile('odd', {fields})\n")
    recipe, out = changed(exports=(str(profile),)), tmp_path / "run"
    if message is None:
        with pytest.raises(pytest.fail.Exception, match="trained"):
            run(recipe, out, say=lambda text: None)
        return
    with pytest.raises(InputError, match=message):
        run(recipe, out, say=lambda text: None)
    assert not out.exists()


def test_weights_that_fill_no_layer(tmp_path):
    np.savez(tmp_path / "other.npz", **{"elsewhere/kernel": np.zeros((3, 3), np.float32)})
    recipe = changed(student=Network("small_cnn", weights=(str(tmp_path / "other.npz"),)))
    with pytest.raises(InputError, match="mapping"):
        run(recipe, tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["/proc/kdistill", "file/cache"])
def test_a_cache_folder_that_cannot_be_written(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError, match=f"Cannot write to the folder of the teacher cache, '{place}'.*--cache"):
        run(SMOKE, tmp_path / "out", cache=place, say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_without_a_home_auto_goes_on_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("KDISTILL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(fit, "fit", lambda *args, **kwargs: (_ for _ in ()).throw(InterruptedError))
    messages = []
    with pytest.raises(InterruptedError):  # it went on, to the training of the teacher
        run(SMOKE, tmp_path / "out", say=messages.append)
    assert any("Warning: no teacher cache" in message and "cannot be written" in message for message in messages)


def test_settings_of_cache_and_precision_that_contradict_each_other(tmp_path):
    top_k = changed(cache=dataclasses.replace(SMOKE.cache, top_k=2))
    tapped = changed(distill=hint(student_tap="conv2", teacher_tap="conv2", projector="conv1x1"))
    for recipe, cache, message in (
        (top_k, "off", r"cache\.top_k=2 .*--cache off stores none"),
        (
            dataclasses.replace(tapped, cache=top_k.cache),
            str(tmp_path / "cache"),
            r"cache\.top_k=2 keeps some logits, but the layers conv2",
        ),
        (dataclasses.replace(tapped, teacher_precision="mixed_bfloat16"), "auto", "without terms that use layers"),
    ):
        with pytest.raises(InputError, match=message):
            run(recipe, tmp_path / "out", cache=cache, say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_a_sweep_tries_the_students_of_all_settings(tmp_path):
    with pytest.raises(InputError, match="small_cnn.*-8"):
        sweep(SMOKE, ["student.widths=4x4,-8x4"], tmp_path / "out", say=lambda text: None)
    assert not (tmp_path / "out").exists()


def test_on_the_command_line_it_is_one_message_and_status_2(tmp_path):
    photos = tmp_path / "photos"
    for name in ("cat", "d\nog"):
        (photos / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)).save(photos / name / f"{i}.png")
    words = ["--variant", "smoke", "--out", str(tmp_path / "out")]
    own_data = ["--set", "data.name=image_folder", "--set", "data.image_size=32", "--data-dir", str(photos)]
    for arguments, message in (
        ([*words, *own_data], "d\\nog"),
        ([*words, "--set", "cache.top_k=10"], "cache.top_k"),
        (
            ["--variant", "smoke", "--out", "/proc/kdistill", "--set", "train_limit=64"],
            "Cannot write to the run folder",
        ),
    ):
        ended = CliRunner().invoke(app, ["run", "mnist", *arguments])
        assert ended.exit_code == 2 and message in ended.output.replace("\n", " ") and "Traceback" not in ended.output
    assert not (tmp_path / "out").exists()


STUDENTS = """
import keras


def student(shape, classes, start):
    flat = [keras.Input(shape), keras.layers.Flatten(), keras.layers.Rescaling(1 / 255)]
    {dropout}
    return keras.Sequential([*flat, keras.layers.Dense(classes, kernel_initializer=start)])
"""


@pytest.mark.parametrize(
    ("start", "seeds", "cache_seed", "dropout", "copies"),
    [
        ("zeros", 2, 0, False, True),
        ("zeros", 1, 0, False, False),
        ("zeros", 2, None, False, False),
        ("glorot_uniform", 2, 0, False, False),
        ("zeros", 2, 0, True, False),
    ],
)
def test_seeds_that_would_be_copies_are_refused(tmp_path, start, seeds, cache_seed, dropout, copies):
    file = tmp_path / "students.py"
    file.write_text(STUDENTS.replace("{dropout}", "flat.append(keras.layers.Dropout(0.1))" if dropout else ""))
    student = Network(f"{file}:student", {"start": start})
    recipe = changed(student=student, seeds=seeds, cache=dataclasses.replace(SMOKE.cache, seed=cache_seed))
    splits = load(recipe.data)
    assert seeds_are_copies(recipe, splits) == copies
    if copies:
        with pytest.raises(InputError, match="seeds would be copies.*cache.seed=none"):
            run(recipe, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert seeds_are_copies(dataclasses.replace(recipe, seeds=1, max_seeds=3), splits)
