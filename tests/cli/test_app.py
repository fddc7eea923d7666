"""The command line: messages and exit status; no traceback for a user's mistake."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from support.image_files import folders
from support.ranges import brightness
from support.scripts import call, untrained

from kdistill.networks import architectures, saving
from kdistill.recipe import Network


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("models") / "student.keras")


def test_help_names_the_commands_with_examples():
    ended = call("--help")
    assert ended.exit_code == 0
    for word in ("plan", "run", "evaluate", "benchmark", "inspect", "export", "list", "Examples"):
        assert word in ended.output
    for command in ("plan", "run", "evaluate", "benchmark", "inspect", "export"):
        assert "Example" in call(command, "--help").output


def test_list_names_what_ships():
    found = json.loads(call("list", "--json").output)
    assert "mnist" in found["recipes"] and {"npu", "phone_cpu", "phone_gpu", "reference"} <= set(found["exports"])
    assert "mnist" in call("list").output


@pytest.mark.parametrize(
    "words,status,message",
    [
        (("run", "mnits"), 2, "Did you mean 'mnist'"),
        (("run", "mnist", "--variant", "larg"), 2, "Unknown variant 'larg'"),
        (("run", "mnist", "--set", "temprature=2"), 2, "Did you mean"),
        (("run", "mnist", "--set", "exports=npv"), 2, "Did you mean 'npu'"),
        (("run", "mnist", "--set", "student.name=lenett"), 2, "Did you mean 'lenet'"),
        (("run", "mnist", "--data-dir", "/nowhere/at/all"), 2, "no folder or .npz file"),
        (("evaluate", "nothing.keras"), 2, "nothing.keras"),
        (("evaluate", "nothing.tflite"), 2, "nothing.tflite"),
        (("evaluate", "setup.cfg"), 2, "Expected a .keras or .tflite file"),
        (("benchmark", "nothing.tflite"), 2, "nothing.tflite"),
        (("inspect", "nothing.tflite"), 2, "nothing.tflite"),
        (("inspect", "setup.cfg"), 2, "no .tflite file"),
        (("export", "nothing.keras"), 2, "nothing.keras"),
        (("export", "nothing.keras", "--profile", "phone"), 2, "Unknown profile"),
        (("export", "run"), 2, r"'run' is a folder\. Give the path of a file \(.keras\), such as run/student.keras"),
        (("inspect", "run"), 2, r"'run' is a folder\. Give .* such as run/npu/student.tflite\."),
        (("nonsense",), 2, "No such command"),
    ],
)
def test_mistakes_are_one_message_and_status_2(words, status, message, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    (tmp_path / "setup.cfg").write_text("x")
    (tmp_path / "run" / "npu").mkdir(parents=True)
    for name in ("student.keras", "npu/student.tflite", "npu/.part-student.tflite"):
        (tmp_path / "run" / name).touch()
    ended = call(*words)
    assert ended.exit_code == status
    assert re.search(message, ended.output), ended.output
    assert "Traceback" not in ended.output
    assert not (tmp_path / "exports").exists()


def test_a_model_of_the_teachers_classes_is_asked_for(tmp_path):
    path = tmp_path / "three.keras"
    saving.save_model(architectures.build(Network("small_cnn"), (28, 28, 1), 3), path)
    ended = call("run", "mnist", "--variant", "smoke", "--set", f"teacher.file={path}", "--out", tmp_path / "run")
    assert ended.exit_code == 2 and "3 classes, the data has 10" in ended.output


@pytest.mark.slow
def test_export_evaluate_and_benchmark(student, tmp_path):
    limits = ("--max-drop", "100", "--min-agreement", "0")
    words = ("export", student, "--profile", "npu", "--profile", "phone_cpu", "--out", tmp_path, *limits, "--json")
    ended = call(*words)
    assert ended.exit_code == 0, ended.output
    files = json.loads(ended.stdout)
    assert [(tmp_path / name / "student.tflite").exists() for name in ("npu", "phone_cpu")] == [True, True]
    assert files[0]["input"]["type"] == "int8" and files[1]["input"]["type"] == "float32"
    row = json.loads(call("evaluate", tmp_path / "npu/student.tflite", "--teacher", student, "--json").stdout)
    assert 0 <= row["accuracy"] <= 1 and row["agreement"] > 0.5 and row["bytes"] < 24 * 1024
    timed = json.loads(call("benchmark", tmp_path / "npu/student.tflite", "--threads", "2", "--json").stdout)
    assert [each["threads"] for each in timed["latency"]] == [2]
    assert 0 < timed["latency"][0]["median_us"] <= timed["latency"][0]["p90_us"]
    told = json.loads(call("inspect", tmp_path / "npu/student.tflite", "--json").stdout)
    assert told["quantization"] == "int8" and told["metadata"]["labels"] == list("0123456789")


@pytest.mark.exhaustive
def test_a_file_beyond_its_limit_is_status_1_and_not_kept(student, tmp_path):
    profile = tmp_path / "strict.py"
    profile.write_text(
        "from kdistill.recipe import Profile\n"
        "def profile(): return Profile('strict', quantization='int8', input_type='int8', min_agreement=1.0)\n"
    )
    words = ("--profile", profile, "--profile", "phone_cpu", "--out", tmp_path / "out", "--min-agreement")
    ended = call("export", student, *words[:2], *words[4:6])
    assert ended.exit_code == 1 and "limit" in ended.output and "Traceback" not in ended.output
    assert "strict (refused)" in ended.output and not list((tmp_path / "out").rglob("*.tflite"))
    # The other profiles are exported, before and after it; a profile that does not suit the model is status 2.
    logits = tmp_path / "odd.py"
    logits.write_text("from kdistill.recipe import Profile\ndef profile(): return Profile('odd', mean=(1.0, 2.0))\n")
    ended = call("export", student, "--profile", logits, *words[:4], "--out", tmp_path / "out", "--max-drop", "100")
    assert ended.exit_code == 2 and "mean expects 1 or 1 numbers" in ended.output and "limit" in ended.output
    assert [path.parent.name for path in (tmp_path / "out").rglob("*.tflite")] == ["phone_cpu"]


def test_unsafe_and_damaged_models_are_refused(student, tmp_path):
    content = bytearray(student.read_bytes())
    (tmp_path / "half.keras").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.keras").write_text("hello")
    image = keras.Input((28, 28, 1))
    unsafe = keras.Model(image, keras.layers.Lambda(lambda x: x[:, :10, 0, 0])(image))
    unsafe.save(tmp_path / "unsafe.keras")
    for name in ("half", "text", "unsafe"):
        for words in (("evaluate",), ("export", "--out", tmp_path / "out")):
            ended = call(*words, tmp_path / f"{name}.keras")
            assert ended.exit_code == 2 and f"{name}.keras' cannot be loaded" in ended.output, ended.output
            assert "Traceback" not in ended.output


@pytest.mark.slow
def test_a_tflite_is_evaluated_without_tensorflow(student, tmp_path):
    call("export", student, "--profile", "reference", "--out", tmp_path, "--min-agreement", "0", "--max-drop", "100")
    code = (
        "import sys\nfrom kdistill.cli.commands import app\n"
        f"try: app(['evaluate', {str(tmp_path / 'reference/student.tflite')!r}, '--json'])\n"
        f"except SystemExit as end: assert not end.code\n"
        f"try: app(['benchmark', {str(tmp_path / 'reference/student.tflite')!r}])\n"
        f"except SystemExit as end: assert not end.code\n"
        "assert not {'tensorflow', 'keras'} & set(sys.modules), 'TensorFlow was imported'\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_nan_in_the_data_and_wrong_labels(tmp_path):
    images, labels = np.zeros((40, 28, 28)), np.arange(40) % 10
    images[3, 4, 5] = np.nan
    np.savez(tmp_path / "d.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    ended = call("run", "mnist", "--data-dir", tmp_path / "d.npz", "--out", tmp_path / "run")
    assert ended.exit_code == 2 and "1 pixels are NaN" in ended.output and not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def bright(tmp_path_factory):
    """A data set of one brightness per class, and a model for it that was trained on pixels / 255."""
    folder = tmp_path_factory.mktemp("bright")
    model, images, labels = brightness(4, "unit")
    saving.save_model(model, folder / "net.keras")
    images = np.minimum(images + np.random.default_rng(0).integers(0, 9, images.shape), 255).astype(np.uint8)
    np.savez(folder / "own.npz", x_train=images[:80], y_train=labels[:80], x_test=images[80:], y_test=labels[80:])
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("always::UserWarning")
def test_mean_and_std_of_evaluate_and_export(bright, tmp_path):
    data = ("--data", "npz", "--data-dir", bright / "own.npz")
    ended = call("evaluate", bright / "net.keras", *data, "--json")
    assert (
        "Warning: The accuracy of the model 'net' is 25.0% on 40 images, but 100.0% with pixels / 255" in ended.stderr
    )
    ended = call("evaluate", bright / "net.keras", *data, "--mean", 0, "--std", 255, "--json")
    assert json.loads(ended.stdout)["accuracy"] == 1.0 and "Warning" not in ended.stderr
    ended = call("export", bright / "net.keras", *data, "--profile", "npu", "--std", 255, "--out", tmp_path, "--json")
    file = json.loads(ended.stdout)[0]
    assert ended.exit_code == 0 and file["check"]["accuracy"] == 1.0 and "Warning" not in ended.stderr
    # The file has its normalization inside, the teacher has not.
    ended = call("evaluate", file["path"], "--teacher", bright / "net.keras", *data, "--std", 255, "--json")
    assert json.loads(ended.stdout)["agreement"] == 1.0
    ended = call("evaluate", file["path"], *data, "--std", 255)
    assert ended.exit_code == 2 and "its normalization is inside. Leave out mean and std" in ended.stderr


@pytest.mark.slow
def test_images_in_folders_are_evaluated_at_the_size_of_the_model(tmp_path):
    root = folders(tmp_path / "images", count=10, height=20, width=24)
    keras.utils.set_random_seed(0)
    classes = len(list((root / "train").iterdir())) if (root / "train").is_dir() else len(list(root.iterdir()))
    saving.save_model(architectures.build(Network("small_cnn"), (16, 16, 3), classes), tmp_path / "small.keras")
    words = ["evaluate", tmp_path / "small.keras", "--data", "image_folder", "--data-dir", root]
    ended = call(*words, "--image-size", 16, "--json")
    assert ended.exit_code == 0 and 0 <= json.loads(ended.stdout)["accuracy"] <= 1, ended.output
    for command in (words, ["export", *words[1:]], ["compress", *words[1:], "--scheme", "qat"]):
        refused = call(*command)
        assert refused.exit_code == 2 and "expects --image-size" in refused.stderr, refused.output
    assert "expects images of (16, 16, 3)" in call("export", *words[1:], "--image-size", 17).stderr
    assert "none: its images have one size" in call("evaluate", tmp_path / "small.keras", "--image-size", 16).stderr
