"""`--strategy`: which devices a run gets, what is refused, and the whole run under each against the plain one."""

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from kdistill.errors import CheckFailed, InputError
from kdistill.recipe.loading import load_recipe
from kdistill.runs.run import run
from kdistill.runs.sweep import sweep
from kdistill.runs.teaching import of_recipe
from kdistill.training import strategy

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import two_workers  # noqa: E402

# SGD, because Adam hides a gradient of another size; no dropout, which each replica draws for its own images.
SETTINGS = [
    "training.optimizer=sgd",
    "training.batch_size=31",
    "teacher_training.optimizer=sgd",
    "teacher.name=small_cnn",
    "train_limit=128",
]


def config(cluster=None, kind="worker", index=0):
    return json.dumps({"cluster": cluster or {"worker": ["a:1", "b:2"]}, "task": {"type": kind, "index": index}})


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "plain"
    return folder, run(load_recipe("mnist", "smoke", [*SETTINGS, "exports="]), folder, say=lambda text: None)


def assert_equal_models(first, second, tolerance=5e-6):
    for name in ("teacher", "control", "student"):
        a, b = (keras.models.load_model(folder / f"{name}.keras") for folder in (first, second))
        for x, y in zip(a.weights, b.weights, strict=True):
            np.testing.assert_allclose(x.numpy(), y.numpy(), atol=tolerance, err_msg=f"{name}: {x.path}")


def assert_equal_metrics(first, second):
    for name, fit in first["training"].items():
        assert fit["history"].keys() >= {"loss", "val_loss"}
        for key, values in fit["history"].items():
            assert second["training"][name]["history"][key] == pytest.approx(values, abs=2e-5), (name, key)


@pytest.mark.exhaustive
def test_a_run_on_two_replicas_is_the_plain_run(plain, tmp_path):
    """Also with an uneven share: 31 images are 16 and 15."""
    folder, expected = plain
    recipe = load_recipe("mnist", "smoke", [*SETTINGS, "exports="])
    found = run(recipe, tmp_path / "run", strategy="mirrored", say=lambda text: None)
    assert found["strategy"] == {"name": "mirrored", "replicas": 2, "workers": 1}
    assert expected["strategy"] == {"name": "none", "replicas": 1, "workers": 1}
    assert_equal_models(folder, tmp_path / "run")
    assert_equal_metrics(expected, found)
    with pytest.raises(InputError, match="strategy: mirrored, 2 replicas, 1 worker.* -> none.*--force"):
        run(recipe, tmp_path / "run", resume=True, strategy="none", say=lambda text: None)


WORDS = ["mnist", "--variant", "smoke", "--json", *(word for each in SETTINGS for word in ("--set", each)), "--out"]


def two_runs(out, *words, exports=""):
    """What both workers wrote on standard output and standard error, and their exit status."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": out.parent}
    workers = two_workers.start([*WORDS, out.name, "--set", f"exports={exports}", *words], **pipes)
    told = [worker.communicate(timeout=400) for worker in workers]
    return told, [worker.returncode for worker in workers]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    folder = tmp_path_factory.mktemp("together") / "run"
    return folder, two_runs(folder, exports="reference")


@pytest.mark.exhaustive
def test_a_run_of_two_workers_is_the_plain_run_and_only_the_chief_writes(plain, together):
    folder, (told, status) = together
    assert status == [0, 0], told
    assert told[1][0] == "" and "The chief measures" in told[1][1]
    found = json.loads(told[0][0])
    assert found["strategy"] == {"name": "multiworker", "replicas": 2, "workers": 2}
    assert_equal_models(plain[0], folder)
    assert_equal_metrics(plain[1], found)
    assert [path.name for path in folder.parent.iterdir()] == ["run"]
    assert len(list((folder / "logs/student/train").glob("events*"))) == 1


@pytest.mark.exhaustive
def test_a_lost_worker_ends_the_other_and_both_resume_to_the_same_bits(together, tmp_path):
    out = tmp_path / "run"
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    workers = two_workers.start([*WORDS, str(out), "--set", "exports="], **pipes)
    end = time.time() + 300
    while not list((out / "checkpoints/teacher").glob("step-*")):
        assert time.time() < end and workers[0].poll() is None
        time.sleep(0.02)
    workers[1].kill()
    told = workers[0].communicate(timeout=200)[1]
    assert workers[0].returncode == 1 and "Failed: The connection to another worker was lost" in told
    assert "Traceback" not in told
    workers[1].communicate()
    told, status = two_runs(out, "--resume")
    assert status == [0, 0], told
    for text in (told[0][1], told[1][1]):  # the second worker knows it from the chief
        assert "Resuming at step" in text or "teacher: already finished" in text
    assert_equal_models(out, together[0], tolerance=0)


@pytest.mark.exhaustive
def test_workers_with_other_settings_are_refused():
    """Every worker says so, not only the one that differs."""
    code = "import sys; from kdistill.training import strategy\n"
    code += "strategy.choose_devices('multiworker').agree({'seed': int(sys.argv[-1] == '1'), 'exports': ('a',)})"
    addresses = {"worker": [two_workers.free_address() for _ in range(2)]}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(index)],
            env={**two_workers.os.environ, "TF_CONFIG": config(addresses, index=index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    told = [worker.communicate(timeout=120)[1] for worker in workers]
    assert "The workers differ from the chief. Start" in told[0]
    assert "The workers differ from the chief in seed. Start" in told[1]


def test_choices(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert strategy.choose_devices("auto") == strategy.choose_devices("none") == strategy.SINGLE_DEVICE  # no GPU here
    assert (
        strategy.SINGLE_DEVICE.replicas == 1
        and strategy.SINGLE_DEVICE.chief
        and strategy.SINGLE_DEVICE.share(b"x") == b"x"
    )
    mirrored = strategy.choose_devices("mirrored")
    assert mirrored.replicas == 2 and mirrored.chief
    assert strategy.choose_devices("mirrored").strategy is mirrored.strategy
    with pytest.raises(InputError, match=r"Did you mean 'mirrored'"):
        strategy.choose_devices("mirored")
    with pytest.raises(InputError, match="ParameterServerStrategy"):
        strategy.choose_devices("parameterserver")
    said = []
    monkeypatch.setenv("TF_CONFIG", config())
    assert (
        strategy.choose_devices("auto", say=said.append) == strategy.SINGLE_DEVICE
        and "--strategy multiworker" in said[0]
    )


def test_auto_takes_all_gpus(monkeypatch):
    cpus = tf.config.list_logical_devices("CPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: cpus if kind == "GPU" else cpus[:1])
    assert strategy.choose_devices("auto").replicas == 2
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: cpus[:1] if kind == "CPU" else [])
    assert strategy.choose_devices("auto") == strategy.SINGLE_DEVICE
    with pytest.raises(InputError, match="expects two devices or more, received 1"):
        strategy.choose_devices("mirrored")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["training.batch_size", "teacher_training.batch_size"])
def test_a_batch_smaller_than_the_replicas(key, tmp_path):
    recipe = load_recipe("mnist", "smoke", [f"{key}=1"])
    with pytest.raises(InputError, match=f"{key} is 1 .* 2 replicas"):
        run(recipe, tmp_path / "out", strategy="mirrored", say=lambda text: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["precision", "teacher_precision"])
def test_float16_without_a_gpu_names_bfloat16(name, tmp_path):
    recipe = load_recipe("mnist", "smoke", [f"{name}=mixed_float16"])
    with pytest.raises(InputError, match=f"^{name}=mixed_float16 needs a GPU.*mixed_bfloat16"):
        run(recipe, tmp_path / "out", say=lambda text: None)
    with pytest.raises(InputError, match="needs a GPU.*mixed_bfloat16"):
        sweep(recipe, ["temperature=1,2"], tmp_path / "out")
    with pytest.raises(InputError, match="needs a GPU.*mixed_bfloat16"):
        of_recipe(recipe, root=tmp_path / "caches")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text,message",
    [
        (None, "received 'nothing'"),
        ("{worker", "expects JSON"),
        ("[1]", "a JSON object"),
        ("{}", "'cluster', an object"),
        ('{"cluster": {"worker": ["a:1"]}}', "'task', an object"),
        (config({"worker": ["a:1"], "ps": ["b:1"]}), "ParameterServerStrategy does not work"),
        (config({"worker": ["a:1"], "evaluator": ["b:1"]}), "jobs chief and worker"),
        (config({"worker": "a:1"}), "a list of 'host:port' for worker"),
        (config({"worker": ["a"]}), "'host:port'"),
        (config({"worker": ["a:99999"]}), "'host:port'"),
        (config({"worker": ["a:1", "a:1"]}), "different addresses"),
        (config({"chief": ["a:1", "b:1"]}, "chief"), "at most one chief"),
        (config(index=2), "index from 0 to 1, received 2"),
        (config(index="0"), "whole number"),
        (config(kind="chief"), "task type of the cluster"),
    ],
)
def test_malformed_tf_config(text, message, monkeypatch):
    with pytest.raises(InputError, match=message) as caught:
        strategy.parse_tf_config(text)
    assert "Example: TF_CONFIG=" in str(caught.value)


def test_the_chief_comes_first():
    assert strategy.parse_tf_config(config(index=1)) == (["a:1", "b:2"], 1)
    jobs = {"worker": ["a:1", "b:2"], "chief": ["c:3"]}
    assert strategy.parse_tf_config(config(jobs, "chief")) == (["c:3", "a:1", "b:2"], 0)
    assert strategy.parse_tf_config(config(jobs, "worker", 1)) == (["c:3", "a:1", "b:2"], 2)


def test_workers_meet_or_say_who_is_missing():
    addresses = [two_workers.free_address() for _ in range(3)]
    with pytest.raises(InputError, match="cannot reach .* within 0.1 s") as caught:
        strategy.wait_for_workers(addresses, 0, 0.1)
    assert addresses[1] in str(caught.value) and addresses[2] in str(caught.value)
    met = [threading.Thread(target=strategy.wait_for_workers, args=(addresses, i, 30)) for i in range(3)]
    for thread in met:
        thread.start()
        time.sleep(0.1)
    # The first to have met all goes on, and TensorFlow listens in its place.
    deadline = time.time() + 20
    listening: dict[int, socket.socket] = {}
    while any(thread.is_alive() for thread in met):
        assert time.time() < deadline
        for i, thread in enumerate(met):
            if not thread.is_alive() and i not in listening:
                listening[i] = socket.create_server(("localhost", int(addresses[i].rpartition(":")[2])))
        time.sleep(0.01)
    for each in listening.values():
        each.close()


def test_an_address_in_use():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match="cannot listen at .*other worker with this index"):
            strategy.wait_for_workers([address, "localhost:1"], 0, 0.1)


def test_errors_of_one_process_stay_what_they_are():
    error = tf.errors.UnavailableError(None, None, "gone\nmore")
    assert strategy.readable_error(error, strategy.SINGLE_DEVICE) is error
    full = tf.errors.ResourceExhaustedError(None, None, "/disk/events; No space left on device")
    assert "Free some space" in str(strategy.readable_error(full, strategy.SINGLE_DEVICE))
    made = strategy.readable_error(error, strategy.Devices("multiworker", None, 0, 2))
    assert isinstance(made, CheckFailed) and "--resume" in str(made) and "gone" in str(made)
