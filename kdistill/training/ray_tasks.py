"""Trainings as tasks of a Ray cluster: each in a process of its own; a process that dies costs its task only.

Ray starts processes, on this machine or on others, and starts a task again whose process has died. What a task writes
goes into the run folder, which all machines see under the same path: there it resumes from its last checkpoint.
Source: https://docs.ray.io/en/latest/ray-core/tasks.html
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tensorflow as tf

from kdistill.errors import CheckFailed, InputError

RETRIES = 3  # new starts of a task whose process has died
CONNECT_SECONDS = 10  # until an address counts as wrong; Ray itself tries for minutes
Task = tuple[Callable, tuple]  # a function of a module of kdistill, and its arguments


class Cluster:
    """A connection to a Ray cluster.

    Args:
        address: `auto`, the cluster of RAY_ADDRESS, or the one that runs on this machine, or a new one of its cores
            that ends with this process; or `HOST:PORT` of a cluster's head.
        cpus: cores of a task. None: those of the smallest machine, so that a task computes as a run alone does there.
        say: receives each line of progress.

    Attributes:
        slots: the number of tasks that run at the same time.
    """

    def __init__(self, address: str = "auto", cpus: int | None = None, say: Callable[[str], None] = print):
        self.say, self._ray = say, _import_ray()
        _check_address(address)
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what Ray 3 does: it would warn
        options = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        try:
            self._ray.init(None if address == "auto" else address, **options)
        except (ConnectionError, RuntimeError) as error:
            raise InputError(f"--ray {address}: no connection to the cluster: {_first_line(error)}") from None
        sizes = [int(node["Resources"].get("CPU", 0)) for node in self._ray.nodes() if node["Alive"]]
        sizes = [size for size in sizes if size]
        if not sizes or (cpus or 1) > max(sizes):
            self.close()
            most = f"its largest machine has {max(sizes)}" if sizes else "no machine has any"
            raise InputError(f"--ray-cpus {cpus or 1}: no machine of the cluster has so many cores; {most}.")
        self.cpus = cpus or min(sizes)
        self.slots = sum(size // self.cpus for size in sizes)
        self.gpus = int(self._ray.cluster_resources().get("GPU", 0) > 0)
        say(f"Ray: {len(sizes)} machine(s), {self.slots} task(s) at a time, with {self.cpus} core(s) each")

    def __str__(self) -> str:
        return f"ray, {self.cpus} core(s)"

    def run(self, tasks: dict[str, Task]) -> dict:
        """Runs all tasks and returns their results by name. When one fails, the others still end.

        Raises what the first task that failed has raised, or `CheckFailed` if its process died again and again.
        """
        remote = self._ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=RETRIES, max_calls=1)(_call)
        started = time.perf_counter()
        names = {
            remote.options(name=name).remote(function, arguments, os.getcwd(), self.cpus): name
            for name, (function, arguments) in tasks.items()
        }
        results, errors, waiting = {}, {}, list(names)
        try:
            while waiting:
                done, waiting = self._ray.wait(waiting)
                for task in done:
                    name, state = names[task], "finished"
                    try:
                        results[name] = self._ray.get(task)
                    except self._ray.exceptions.RayError as error:
                        errors[name], state = error, "failed"
                    self.say(f"{name}: {state} after {time.perf_counter() - started:.0f} s")
        except BaseException:  # an interrupt: what runs elsewhere must not write on
            for task in waiting:
                self._ray.cancel(task, force=True)
            raise
        for name, error in errors.items():
            raise _readable(name, error) from error
        return {name: results[name] for name in tasks}

    def close(self) -> None:
        """Ends the connection, and a cluster that was started for it."""
        self._ray.shutdown()


@contextlib.contextmanager
def connected(address: str | None, cpus: int | None, say: Callable[[str], None]) -> Iterator[Cluster | None]:
    """A connection for the time of a `with` block; None without an address."""
    if address is None:
        if cpus is not None:
            raise InputError("--ray-cpus is for --ray. Give --ray auto, or the address of a cluster.")
        yield None
        return
    cluster = Cluster(address, cpus, say)
    try:
        yield cluster
    finally:
        cluster.close()


def _call(function: Callable, arguments: tuple, folder: str, cpus: int):
    """A task: `function(*arguments)` in the folder of the process that asked for it, with so many threads."""
    if not Path(folder).is_dir():
        raise InputError(
            f"'{folder}' is missing on {socket.gethostname()}: with --ray, all machines need the run folder, the data "
            "and the teacher under the same paths (a shared file system)."
        )
    os.chdir(folder)
    tf.config.threading.set_intra_op_parallelism_threads(cpus)
    tf.config.threading.set_inter_op_parallelism_threads(cpus)
    for gpu in tf.config.list_physical_devices("GPU"):  # others may share it
        tf.config.experimental.set_memory_growth(gpu, True)
    return function(*arguments)


def _import_ray():
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise InputError('--ray needs Ray, on every machine: pip install "kdistill[ray]".') from None
    return ray


def _check_address(address: str) -> None:
    """Raises `InputError` for an address that nobody answers at."""
    if address == "auto":
        return
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal() and int(port) < 1 << 16):
        raise InputError(f"--ray expects auto, or HOST:PORT of a cluster's head, received '{address}'.")
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"--ray {address}: nobody answers there ({error.strerror or error}). Start the cluster with: ray start "
            "--head"
        ) from None


def _readable(name: str, error: Exception) -> Exception:
    cause = getattr(error, "cause", None)
    if isinstance(cause, (InputError, CheckFailed)):
        return type(cause)(f"{name}: {cause}")
    if cause is not None:
        return cause
    return CheckFailed(
        f"{name}: its process was lost, and {RETRIES} new starts did not help: {_first_line(error)} Often memory is "
        "short: give --ray-cpus a higher number, so that fewer tasks run at a time. --resume goes on where it stopped."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
