"""Runs on inputs and labels of any kind: from arrays and recipes to files and report, and interrupted in between."""

import dataclasses
import json

import keras
import numpy as np
import pytest

from kdistill.data import load
from kdistill.errors import InputError
from kdistill.recipe import Data, Distill, Network, Recipe, Stage, Training
from kdistill.recipe.loading import load_recipe
from kdistill.report import page
from kdistill.report.content import check_report
from kdistill.runs.plan import plan
from kdistill.runs.run import run
from kdistill.runs.sweep import sweep
from kdistill.teachers.replay import Replay
from kdistill.tflite.interpreter import File
from kdistill.training import callbacks, checkpoint

QUIET = {"say": lambda text: None}
NETWORKS = '''
import keras
from keras import layers


def two_heads(shape, classes, units=8):
    """Tokens and a photo -> a class and a number."""
    inputs = {"tokens": keras.Input(shape["tokens"], dtype="int32", name="tokens"),
              "photo": keras.Input(shape["photo"], name="photo")}
    words = layers.GlobalAveragePooling1D()(layers.Embedding(20, units)(inputs["tokens"]))
    photo = layers.Flatten()(layers.Rescaling(1 / 255)(inputs["photo"]))
    x = layers.Dense(units, activation="relu")(layers.Concatenate()([words, photo]))
    return keras.Model(inputs, {name: layers.Dense(classes[name], name=name)(x) for name in ("kind", "size")})


def single(shape, classes):
    model = two_heads(shape, classes)
    return keras.Model(model.input, {"kind": model.output["kind"]})


def one_head(shape, classes):
    image = keras.Input(shape["photo"], name="photo")
    return keras.Model(image, layers.Dense(3)(layers.Flatten()(image)))
'''


def arrays(count: int, seed: int) -> dict:
    random = np.random.default_rng(seed)
    tokens, photo = random.integers(0, 20, (count, 6)), random.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)
    size = photo.mean(axis=(1, 2, 3)) / 128
    return {"tokens": tokens, "photo": photo, "kind": tokens[:, 0] % 3, "size": size}


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    """A recipe with two inputs and two outputs, its data, and the finished run: recipe, options, folder, report."""
    place = tmp_path_factory.mktemp("two_heads")
    (place / "networks.py").write_text(NETWORKS)
    parts = {"train": arrays(160, 0), "test": arrays(40, 1)}
    keys = {"tokens": "x", "photo": "x", "kind": "y", "size": "y"}
    named = {f"{keys[name]}_{part}_{name}": array for part, of in parts.items() for name, array in of.items()}
    np.savez(place / "data.npz", **named)
    network, training = f"{place / 'networks.py'}:two_heads", Training(epochs=2, batch_size=32, learning_rate=0.01)
    recipe = Recipe(
        "two",
        teacher=Network(network, {"units": 24}),
        student=Network(network),
        data=Data("npz", head={"kind": "classes", "size": "numbers"}),
        teacher_training=training,
        training=training,
        distill=Distill(0.5, 2.0),
        exports=("reference",),
    )
    options = {"data_dir": place / "data.npz", **QUIET}
    return recipe, options, place / "run", run(recipe, place / "run", **options)


def test_two_inputs_and_two_outputs_from_arrays_to_report(two_heads):
    _, _, folder, report = two_heads
    check_report(json.loads((folder / "report.json").read_text()))
    rows = {row["name"]: row for row in report["models"]}
    assert set(rows) == {"teacher", "control", "student", "reference"}
    for row in rows.values():
        assert row["outputs"]["kind"].keys() >= {"accuracy", "agreement", "kl"}
        assert row["outputs"]["size"].keys() >= {"mse", "mae", "agreement"}
        assert row["accuracy"] == row["outputs"]["kind"]["accuracy"]  # the verdict compares the first output
    assert rows["teacher"]["outputs"]["size"]["agreement"] == pytest.approx(1)
    file, student = File(folder / report["files"][0]["path"]), keras.models.load_model(folder / "student.keras")
    test = arrays(40, 1)
    inputs = {"tokens": test["tokens"].astype(np.int32), "photo": test["photo"].astype(np.float32)}
    expected, given = student(inputs, training=False), file.run(inputs)
    correct = expected["kind"].numpy().argmax(axis=1) == test["kind"]
    assert correct.mean() == rows["student"]["accuracy"]
    for name in ("kind", "size"):
        np.testing.assert_allclose(given[name], expected[name].numpy(), atol=1e-5)
    errors = (expected["size"].numpy()[:, 0] - test["size"]) ** 2
    assert rows["student"]["outputs"]["size"]["mse"] == pytest.approx(errors.mean(), rel=1e-5)
    text = (folder / "report.md").read_text()
    assert "Metrics of each" in text and "| student, size |" in text
    (section,) = report["examples"]  # of the numbers; a row of classes has its diagnostics elsewhere
    points = np.array(section["points"])
    np.testing.assert_allclose(points[:, 0], test["size"], rtol=1e-5)
    np.testing.assert_allclose(points[:, 2], expected["size"].numpy()[:, 0], rtol=1e-4, atol=1e-6)
    assert "Student against label" in page.render(report)


@pytest.mark.exhaustive
def test_interrupted_inside_of_an_epoch_it_ends_with_the_same_bits(two_heads, tmp_path, monkeypatch):
    recipe, options, folder, _ = two_heads
    steps, original = [], callbacks.StopWhenNotFinite.on_train_batch_end

    def interrupt(self, batch, logs=None):
        original(self, batch, logs)
        steps.append(batch)
        if len(steps) == 12:  # teacher and control have 10 executions of steps each at most
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("kdistill.training.fit.STEPS_PER_EXECUTION", 1)
    monkeypatch.setattr(callbacks.StopWhenNotFinite, "on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "run", **options)
    monkeypatch.setattr(callbacks.StopWhenNotFinite, "on_train_batch_end", original)
    run(recipe, tmp_path / "run", resume=True, **options)
    for name in ("teacher", "control", "student"):
        first, second = (keras.models.load_model(place / f"{name}.keras") for place in (folder, tmp_path / "run"))
        for a, b in zip(first.weights, second.weights, strict=True):
            np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=name)


@pytest.mark.exhaustive
def test_stored_outputs_of_the_teacher_give_the_student_of_the_running_teacher(two_heads, tmp_path):
    recipe, options, folder, _ = two_heads
    said = []
    cached = {**options, "say": said.append, "cache": tmp_path / "cache"}
    # The teacher of the finished run: only the student is trained again.
    again = dataclasses.replace(recipe, teacher=Network("", file=str(folder / "teacher.keras")), exports=())
    run(again, tmp_path / "run", **cached)
    assert any(text.startswith("Teacher cache: used") for text in said)
    teacher = keras.models.load_model(folder / "teacher.keras")
    replay = Replay(teacher, load(recipe.data, options["data_dir"], **QUIET), recipe.data, 32, 0, tmp_path / "cache")
    assert replay.missing(1) == 0  # the run has stored them
    for view in (0, 1):
        for inputs, targets in replay.training_batches(view):
            expected = teacher(inputs, training=False)
            for name, stored in targets["teacher_logits"].items():
                np.testing.assert_allclose(stored, expected[name], rtol=1e-3, atol=1e-3)  # they are float16
            assert set(targets["labels"]) == {"kind", "size"}
    first, second = (keras.models.load_model(place / "student.keras") for place in (folder, tmp_path / "run"))
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_allclose(a.numpy(), b.numpy(), atol=2e-3)


@pytest.mark.exhaustive
def test_numbers_are_compared_by_their_squared_error(tmp_path):
    (tmp_path / "mlp.py").write_text(
        "import keras\ndef mlp(shape, classes, units):\n    x = keras.Input(shape)\n"
        "    return keras.Model(x, keras.layers.Dense(classes)(keras.layers.Dense(units, activation='relu')(x)))\n"
    )
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 3))
    y = np.sin(x.sum(axis=1))
    np.savez(tmp_path / "sine.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
    training = Training(epochs=8, batch_size=30, learning_rate=0.01)
    network = f"{tmp_path / 'mlp.py'}:mlp"
    recipe = Recipe(
        "sine",
        teacher=Network(network, {"units": 32}),
        student=Network(network, {"units": 4}),
        data=Data("npz", head="numbers"),
        teacher_training=training,
        training=training,
        exports=("reference", "npu"),
        compress=(Stage("prune", epochs=2, final_sparsity=0.5),),
        seeds=2,
    )
    report = run(recipe, tmp_path / "run", data_dir=tmp_path / "sine.npz", **QUIET)
    verdict = report["verdict"]
    assert verdict["metric"] == "mse" and verdict["seeds"] == 2
    students = [row for row in report["models"] if row["name"] in ("student", "student-1")]
    assert verdict["student"] == pytest.approx([row["mse"] for row in students], rel=1e-6)
    better = np.mean(verdict["student"]) < np.mean(verdict["control"])
    assert (verdict["difference"] < 0) == better
    written = {file["path"].split("/")[0] for file in report["files"]} | {row["name"] for row in report["refused"]}
    assert written == {"reference", "npu", "prune", "prune_labels"}
    for name in ("prune", "prune_labels"):
        compressed = report["compressions"][name]
        assert compressed["file"]["check"]["agreement"] > 0.99 and compressed["layers"][0]["sparsity"] == 0.5
    with pytest.raises(InputError, match="the scheme 'qat'"):
        run(
            dataclasses.replace(recipe, compress=(Stage("qat"),)),
            tmp_path / "q",
            data_dir=tmp_path / "sine.npz",
            **QUIET,
        )
    html = page.render(report)
    assert "MSE of the student" in html and "Accuracy against" not in html
    # The temperature of the recipe does nothing for numbers; one that is set is refused.
    hot = dataclasses.replace(recipe, distill=Distill(0.9, 2.0))
    with pytest.raises(InputError, match="temperature would do nothing"):
        run(hot, tmp_path / "hot", data_dir=tmp_path / "sine.npz", **QUIET)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["digits_segment", "digits_multilabel", "digits_rows"])
def test_recipes_of_digits(name, tmp_path):
    report = run(load_recipe(name, "smoke"), tmp_path / "run", **QUIET)
    check_report(json.loads((tmp_path / "run" / "report.json").read_text()))
    assert not report["refused"] and report["files"][0]["check"]["agreement"] > 0.99
    kinds = [section["kind"] for section in report.get("examples", ())]
    assert kinds == {"digits_segment": ["positions"], "digits_multilabel": ["labels"], "digits_rows": []}[name]
    pictures = [picture for section in report.get("examples", ()) for picture in section["pictures"]]
    html = (tmp_path / "run" / "report.html").read_text()
    assert html.count("data:image/png") == len(pictures)
    assert all((tmp_path / "run" / picture["file"]).is_file() for picture in pictures)
    student = next(row for row in report["models"] if row["name"] == "student")
    assert ("mean_iou" in student, "auc" in student, "ece" in student) == tuple(
        name == f"digits_{kind}" for kind in ("segment", "multilabel", "rows")
    )


def test_what_cannot_work_is_refused_before_training(two_heads, tmp_path):
    recipe, options, *_ = two_heads

    def refused(message: str, function=run, **changes):
        with pytest.raises(InputError, match=message):
            function(dataclasses.replace(recipe, **changes), out=tmp_path / "run", **options)
        assert not (tmp_path / "run").exists()

    path = recipe.student.name.rpartition(":")[0]
    refused(r"expects the inputs input \(4, 4, 1\); the data has photo .*tokens", student=Network(f"{path}:one_head"))
    refused("defines no function three_heads", student=Network(f"{path}:three_heads"))
    refused("two_heads.*failed: TypeError", student=Network(recipe.student.name, {"width": 3}))
    refused("label array 'size'", data=Data("npz", head={"kind": "classes", "size": "labels"}))
    refused("Unknown output of the model .* in head .size.", student=Network(f"{path}:single"))
    refused("more_teachers works for images", more_teachers=(recipe.teacher,))
    refused("data.head expects", data=Data("npz", head="classes"))
    refused("kdistill plan works where each example has one class", plan)
    refused("kdistill sweep works where each example has one class", sweep, grid=("training.learning_rate=0.1,0.2",))
