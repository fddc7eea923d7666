"""The smoke variants of cifar10 and imagenet, from files in the real formats, made here; and what the recipes need."""

import dataclasses
import json

import keras
import numpy as np
import pytest
from support.image_files import folders
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.data import load
from kdistill.data.splits import Examples, Splits
from kdistill.distillation.supervised import Supervised
from kdistill.errors import InputError
from kdistill.networks import applications, architectures, folding
from kdistill.networks.precision import dtype_policy
from kdistill.recipe import Data, Network, Training
from kdistill.recipe.loading import load_recipe
from kdistill.recipe.overrides import override
from kdistill.runs import arms
from kdistill.tflite import inspection
from kdistill.training.fit import fit
from kdistill.training.optimizers import learning_rate


def run(*arguments: str) -> None:
    result = CliRunner().invoke(app, ["run", *map(str, arguments)])
    assert result.exit_code == 0, result.output


@pytest.mark.exhaustive
def test_cifar10_smoke_from_the_binary_version(tmp_path):
    """Records whose class is their brightness."""
    random = np.random.default_rng(0)
    for name, count in (("data_batch_1.bin", 120), ("data_batch_2.bin", 80), ("test_batch.bin", 40)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        planes = (labels[:, None] * 24 + random.integers(0, 24, (count, 3072))).astype(np.uint8)
        (tmp_path / name).write_bytes(np.concatenate([labels[:, None], planes], 1).tobytes())
    run("cifar10", "--variant", "smoke", "--data-dir", tmp_path, "--out", tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert str(tmp_path) in report["data"]["source"]
    assert (report["data"]["train"], report["data"]["validation"], report["data"]["test"]) == (150, 50, 40)
    assert {"teacher", "control", "student", "reference"} <= {row["name"] for row in report["models"]}
    assert (tmp_path / "run" / "reference" / "student.tflite").stat().st_size > 0


@pytest.mark.exhaustive
def test_the_teacher_of_cifar10_tiny_trains_in_bfloat16(tmp_path):
    """Narrow, three steps: its whitening stays, all else learns; folded, it gives the same in float32."""
    recipe = load_recipe("cifar10", "tiny", ["teacher_training.epochs=1", "teacher_training.batch_size=16"])
    random = np.random.default_rng(0)
    parts = [Examples(random.integers(0, 256, (n, 32, 32, 3), np.uint8), np.arange(n) % 10) for n in (48, 20, 20)]
    splits = Splits(*parts, tuple("abcdefghij"), "made here", "0" * 16)
    with dtype_policy(recipe.precision):
        keras.utils.set_random_seed(0)
        teacher = architectures.build(Network("cifar_vgg", {"widths": (4, 4, 4)}), (32, 32, 3), 10)
        start = {layer.name: layer.get_weights() for layer in teacher.layers if layer.get_weights()}
        record = fit(Supervised(teacher), splits, recipe.data, recipe.teacher_training, 0, tmp_path / "logs", say=str)
    assert record["steps"] == 3 and np.isfinite(record["loss"])
    assert teacher.get_layer("block1_1_conv").compute_dtype == "bfloat16"
    same = [name for name, old in start.items() if np.array_equal(old[0], teacher.get_layer(name).get_weights()[0])]
    assert same == ["whiten"]
    plain = architectures.build(Network("cifar_vgg", {"widths": (4, 4, 4)}), (32, 32, 3), 10)
    plain.set_weights(teacher.get_weights())
    folded, images = folding.inference_copy(plain), parts[1].images.astype("float32")
    assert folded is not plain
    np.testing.assert_allclose(folded(images), plain(images), atol=1e-4)


def test_imagenette_by_the_loader_of_imagenet(tmp_path):
    """The photographs, cropped to 96 pixels, and labels for some; the teacher has all of them, and is trained."""
    root = folders(tmp_path / "images", count=20, height=60, width=75)
    recipe = load_recipe("imagenet", "imagenette_few", ["data.labeled=20"])
    splits = load(recipe.data, root, say=str)
    assert splits.test.images[:1].shape == (1, 96, 96, 3)
    assert 0 < splits.labeled_mask.sum() < 20 < len(splits.train)
    assert load(load_recipe("imagenet", "imagenette").data, root, say=str).labeled_mask is None
    assert not (recipe.teacher.file or recipe.teacher.weights) and recipe.data.teacher_labels == "all"


@pytest.mark.exhaustive
def test_imagenet_smoke_from_folders_of_jpegs(tmp_path):
    """At 64 pixels in the place of 224, which takes minutes: MobileNetV3-Small, and its file, all in int8, which has
    passed the profile's limits: else the run fails."""
    root = folders(tmp_path / "images", count=20, height=60, width=75)
    small = ["data.image_size=64", "student.options.size=64"]
    settings = [word for setting in small for word in ("--set", setting)]
    run("imagenet", "--variant", "smoke", "--data-dir", root, *settings, "--out", tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    rows = {row["name"]: row for row in report["models"]}
    assert rows["student"]["parameters"] > 1_500_000 and rows["npu"]["accuracy"] > 0.5
    found = inspection.inspect(tmp_path / "run" / "npu" / "student.tflite")
    assert found["quantization"] == "int8" and found["float_layers"] == []


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name,variant", [("imagenet", "vgg16"), ("imagenet", "default")])
def test_the_teacher_of_imagenet_is_not_trained_but_has_its_weights(tmp_path, monkeypatch, name, variant):
    """With weights given the teacher is what the file says; without a file and --download it is refused."""
    recipe = load_recipe(name, variant)
    assert applications.is_pretrained(recipe.teacher.options, 1000)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    splits = load(Data("image_folder", image_size=32, validation=0.34), folders(tmp_path / "images"), say=str)
    splits = dataclasses.replace(splits, class_names=tuple(map(str, range(1000))))
    with pytest.raises(InputError, match="Allow the download with --download"):
        arms.Arms(recipe, splits, None, print).fit_teacher()
    keras.utils.set_random_seed(1)
    theirs = keras.applications.MobileNetV2(
        weights=None, classes=1000, alpha=0.35, input_shape=(32, 32, 3), classifier_activation=None
    )
    theirs.save_weights(tmp_path / "m.weights.h5")
    options = {"weights": str(tmp_path / "m.weights.h5"), "alpha": 0.35, "size": 32}
    given = dataclasses.replace(recipe, teacher=Network("mobilenet_v2", options), precision="float32")
    teacher = arms.Arms(given, splits, None, print).fit_teacher()
    pixels = splits.test.images[:3].astype("float32")
    np.testing.assert_allclose(teacher(pixels), theirs(pixels / 127.5 - 1), atol=1e-4)


def test_the_step_schedule_drops_once_where_it_says():
    """Caffe's: 4,000 of 5,000 steps at 0.001, the rest at 0.0001."""
    schedule = learning_rate(
        Training(optimizer="sgd", learning_rate=1e-3, schedule="step", drop_at=0.8, drop_factor=0.1), 5000
    )
    rates = [float(schedule(step)) for step in (0, 3999, 4000, 4999)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 1e-4, 1e-4], rtol=1e-6)
    quick = load_recipe("cifar10", "quick")
    assert (quick.training.schedule, quick.distill.distillation_weight, quick.distill.temperature) == ("step", 0.1, 1.0)
    with pytest.raises(InputError, match="training.drop_at' expects 0.8, but with the schedule 'step'"):
        override(load_recipe("mnist"), ["training.drop_at=0.5"])
    with pytest.raises(InputError, match="training.warmup' expects 0 with the schedule 'step'"):
        override(quick, ["training.warmup=0.1"])
