"""Trainings as tasks of Ray: the weights of a run without it, lost processes, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest
import ray  # noqa: F401  these tests must not be skipped in silence

from kdistill.errors import InputError
from kdistill.networks import architectures
from kdistill.recipe import Network
from kdistill.training import ray_tasks

ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1", "PYTHONPATH": os.pathsep.join(sys.path)}
SETTINGS = ["--set", "training.optimizer=sgd", "--set", "exports=", "--set", "train_limit=256", "--seeds", "2"]
TASKS = """
import os, sys, signal
from pathlib import Path
from kdistill.errors import CheckFailed, InputError
from kdistill.training.ray_tasks import Cluster

def count(path, lives):
    with open(path, "a") as file:
        file.write("x")
    if len(Path(path).read_text()) < lives:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getcwd()

def refuse(text):
    raise InputError(text)

lines, out = [], Path(sys.argv[1])
cluster = Cluster(cpus=1, say=lines.append)
os.chdir(out)
first = cluster.run({"twice": (count, (out / "twice", 2)), "once": (count, (out / "once", 1))})
assert first == {"twice": str(out), "once": str(out)}, first
assert [len((out / name).read_text()) for name in first] == [2, 1]
try:
    cluster.run({"bad": (refuse, ("too few images",)), "good": (count, (out / "good", 1))})
except InputError as error:
    assert str(error) == "bad: too few images", error
assert (out / "good").exists()  # the others end
try:
    cluster.run({"never": (count, (out / "never", 99))})
except CheckFailed as error:
    assert "never: its process was lost" in str(error) and "--ray-cpus" in str(error), error
assert len((out / "never").read_text()) == 4
cluster.close()
try:
    Cluster(cpus=1000)
except InputError as error:
    assert "--ray-cpus 1000: no machine of the cluster has so many cores" in str(error), error
print("as expected")
"""


def kdistill(*words, **options):
    command = [sys.executable, "-m", "kdistill.cli", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, **options
    )


def weights(folder: Path, name: str):
    return keras.models.load_model(folder / f"{name}.keras", compile=False).get_weights()


@pytest.mark.parametrize(
    "address, cpus, message",
    [
        ("localhost", None, "expects auto, or HOST:PORT"),
        ("host:port", None, "expects auto, or HOST:PORT"),
        (":80", None, "expects auto, or HOST:PORT"),
        ("127.0.0.1:1", None, "nobody answers there"),
        (None, 2, "--ray-cpus is for --ray"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(address, cpus, message):
    with pytest.raises(InputError, match=message), ray_tasks.connected(address, cpus, print):
        pass


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r'pip install "kdistill\[ray\]"'):
        ray_tasks.Cluster()


@pytest.mark.exhaustive
def test_a_task_that_dies_starts_again_and_the_others_do_not_notice(tmp_path):
    (tmp_path / "script.py").write_text(TASKS)
    command = [sys.executable, tmp_path / "script.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert done.stdout.strip().endswith("as expected"), done.stdout + done.stderr


@pytest.mark.exhaustive
def test_a_run_on_two_processes_of_which_one_is_killed_is_the_plain_run(tmp_path):
    plain, tasks = tmp_path / "plain", tmp_path / "tasks"
    alone = kdistill("run", "mnist", "--variant", "smoke", *SETTINGS, "--together", "1", "--out", plain)
    output = alone.communicate(timeout=600)[0]
    assert alone.returncode == 0, output
    run = kdistill("run", "mnist", "--variant", "smoke", *SETTINGS, "--ray", "auto", "--ray-cpus", "1", "--out", tasks)
    killed = _kill_one(run, tasks)
    output = run.communicate(timeout=600)[0]
    assert run.returncode == 0 and killed, output
    assert all(f"{name}: finished after" in output for name in ("control", "student", "control-1", "student-1"))
    for name in ("teacher", "control", "student", "control-1", "student-1"):
        for a, b in zip(weights(plain, name), weights(tasks, name), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6, err_msg=name)  # sums over 1 and 2 threads
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (plain, tasks))
    assert first["verdict"]["sentence"] == second["verdict"]["sentence"]
    other = kdistill("run", "mnist", "--variant", "smoke", *SETTINGS, "--resume", "--out", tasks)
    output = other.communicate(timeout=600)[0]
    assert other.returncode == 2 and "strategy: ray, 1 core(s) -> none" in output, output


@pytest.mark.exhaustive
def test_a_sweep_on_two_processes_is_the_plain_sweep(tmp_path):
    words = ["sweep", "mnist", "--variant", "smoke", *SETTINGS, "--grid", "temperature=1,4"]
    folders = plain, tasks = tmp_path / "plain", tmp_path / "tasks"
    for folder, more in zip(folders, ([], ["--ray", "auto", "--ray-cpus", "1"]), strict=True):
        done = kdistill(*words, *more, "--out", folder)
        output = done.communicate(timeout=600)[0]
        assert done.returncode == 0, output
    assert output.count("finished after") == 2  # six students, three for each process
    for name in [
        f"students/{seed}/{name}" for seed in (0, 1) for name in ("control", "temperature=1", "temperature=4")
    ]:
        for a, b in zip(weights(plain, name), weights(tasks, name), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6, err_msg=name)


@pytest.mark.exhaustive
def test_two_processes_fill_a_cache_with_the_same_files(tmp_path):
    keras.utils.set_random_seed(0)
    architectures.build(Network("small_cnn"), (28, 28, 1), 10).save(tmp_path / "teacher.keras")
    words = ["cache", "build", "mnist", "--set", "cache.views=2", "--teacher", tmp_path / "teacher.keras"]
    folders = tmp_path / "alone", tmp_path / "tasks"
    for folder, more in zip(folders, ([], ["--ray", "auto", "--ray-cpus", "1"]), strict=True):
        done = kdistill(*words, *more, "--cache", folder)
        output = done.communicate(timeout=600)[0]
        assert done.returncode == 0, output
    assert output.count("finished after") == 2
    first, second = ({path.relative_to(folder) for path in folder.rglob("*.npy")} for folder in folders)
    assert first == second and len(first) == 3  # their names hold their checksums


def _kill_one(run: subprocess.Popen, folder: Path) -> bool:
    """Kills the process of a task as soon as a student has written a checkpoint."""
    while run.poll() is None:
        if any(folder.glob("checkpoints/student*/step-*.npz")):
            names = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True).stdout.splitlines()
            for line in names:
                pid, _, name = line.strip().partition(" ")
                if name.strip().startswith("ray::student"):
                    os.kill(int(pid), signal.SIGKILL)
                    return True
        time.sleep(0.1)
    return False
