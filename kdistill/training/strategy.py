"""The devices of a run: one device, several GPUs of one machine, or several machines.

The batch of a recipe is the global batch, whatever the strategy. Several workers train the same models in step. Only
worker 0, the chief, writes checkpoints, logs, files and the report; the others resume from its checkpoints.
"""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from functools import cache

import numpy as np
import tensorflow as tf

from kdistill.errors import CheckFailed, InputError, unknown

NAMES = ("auto", "none", "mirrored", "multiworker")
EXAMPLE = '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}'


@dataclass(frozen=True)
class Devices:
    """A strategy, and the index of this process in it. The default is one device without a strategy."""

    name: str = "none"
    strategy: tf.distribute.Strategy | None = None
    worker: int = 0
    workers: int = 1

    @property
    def chief(self) -> bool:
        """Whether this process writes: it is alone, or it is worker 0."""
        return self.worker == 0

    @property
    def replicas(self) -> int:
        """The number of copies of a model; they compute at the same time, and share the global batch."""
        return self.strategy.num_replicas_in_sync if self.strategy else 1

    def scope(self):
        """The scope in which models, optimizers and their variables must be created."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def as_dict(self) -> dict:
        """Name, replicas and workers, for the report."""
        return {"name": self.name, "replicas": self.replicas, "workers": self.workers}

    def __str__(self) -> str:
        return self.name if self.name == "none" else f"{self.name}, {self.replicas} replicas, {self.workers} worker(s)"

    def check_batch(self, size: int, key: str) -> None:
        """Raises `InputError` if a batch of `size` images leaves a replica without an image."""
        if size < self.replicas:
            raise InputError(
                f"{key} is {size} (or there are only so many training images), but --strategy {self.name} has "
                f"{self.replicas} replicas, and each needs an image. Set {key} to {self.replicas} or more: it counts "
                "the images of all replicas together."
            )

    def part(self, batch_size: int) -> tuple[int, int]:
        """The part of each batch that this worker prepares: (index, number of parts).

        (0, 1), the whole batch, if it is the only worker, or if its replicas would get parts of unequal size: then
        TensorFlow splits the whole batch.
        """
        alone = self.workers == 1 or (self.replicas > self.workers and batch_size % self.replicas)
        return (0, 1) if alone else (self.worker, self.workers)

    def parts(self, batches: tf.data.Dataset):
        """Distributes batches that are this worker's own part among its replicas, for `fit`."""
        replicas = self.replicas // self.workers
        if replicas > 1:  # an element for each replica
            batches = batches.flat_map(
                lambda *batch: tf.data.Dataset.from_tensor_slices(
                    tf.nest.map_structure(
                        lambda x: tf.reshape(x, [replicas, x.shape[0] // replicas, *x.shape[1:]]), batch
                    )
                )
            )
        return self.strategy.distribute_datasets_from_function(lambda context: batches)

    def share(self, content: bytes) -> bytes:
        """Returns the content that the chief passes, on every worker. All workers must call it at the same point."""
        if self.workers == 1:
            return content
        length = int(self._sum(np.array([len(content) if self.chief else 0]))[0])
        padded = np.zeros(-(-length // 8) * 8, np.uint8)
        if self.chief:
            padded[:length] = np.frombuffer(content, np.uint8)
        return self._sum(padded.view(np.int64)).tobytes()[:length] if length else b""

    def wait(self) -> None:
        """Returns when all workers have called it. A worker that ended before the chief would look like a failure."""
        self.share(b"")

    def agree(self, settings: dict) -> None:
        """Raises `InputError` on every worker if any worker has other settings than the chief."""
        if self.workers == 1:
            return
        text = json.dumps(settings)
        settings, of_chief = json.loads(text), json.loads(self.share(text.encode()))
        names = sorted(name for name in of_chief.keys() | settings.keys() if of_chief.get(name) != settings.get(name))
        if int(self._sum(np.array([len(names)]))[0]):
            raise InputError(
                f"The workers differ from the chief{' in ' + ', '.join(names) if names else ''}. Start all workers "
                "with the same recipe, settings, data and version of kdistill."
            )

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """The exact sum of int64 values over the workers; only the first replica of a worker counts."""

        @tf.function(autograph=False)
        def summed(own):
            def replica():
                context = tf.distribute.get_replica_context()
                first = tf.cast(context.replica_id_in_sync_group % (self.replicas // self.workers) == 0, tf.int64)
                return context.all_reduce(tf.distribute.ReduceOp.SUM, own * first)

            return self.strategy.run(replica)

        return self.strategy.experimental_local_results(summed(tf.constant(values, tf.int64)))[0].numpy()


SINGLE_DEVICE = Devices()


def choose_devices(name: str = "auto", seconds: float = 120.0, say=print) -> Devices:
    """The devices of `--strategy`: auto, none, mirrored or multiworker.

    `auto` is `mirrored` on several GPUs, else `none`. `mirrored` uses all GPUs, or the logical CPUs if there is no GPU.
    `multiworker` reads TF_CONFIG and waits up to `seconds` for the other workers; call it before TensorFlow computes
    anything in this process. Raises `InputError` if the strategy cannot work.
    """
    if name in ("parameterserver", "parameter_server", "ps", "tpu", "central_storage"):
        raise InputError(
            f"--strategy {name} does not work: Keras 3 supports neither ParameterServerStrategy, nor TPUs with "
            "TensorFlow, nor CentralStorageStrategy. Use mirrored (one machine) or multiworker (several machines)."
        )
    if name not in NAMES:
        raise unknown("strategy", name, NAMES)
    if name == "multiworker":
        return _several_workers(seconds, say)
    gpus = tuple(gpu.name for gpu in tf.config.list_logical_devices("GPU"))
    if name == "auto":
        if os.environ.get("TF_CONFIG"):
            say("TF_CONFIG is set, but has an effect only with --strategy multiworker.")
        name = "mirrored" if len(gpus) > 1 else "none"
    if name == "none":
        return SINGLE_DEVICE
    devices = gpus or tuple(cpu.name for cpu in tf.config.list_logical_devices("CPU"))
    if len(devices) < 2:
        raise InputError(
            f"--strategy mirrored expects two devices or more, received {len(devices)} ({', '.join(devices)}). Remove "
            "the option: one device computes the same."
        )
    return Devices("mirrored", _mirrored(devices))


def readable_error(error: tf.errors.OpError, devices: Devices) -> Exception:
    """A readable exception for a failed operation: a full disk or, with several workers, a lost worker."""
    if isinstance(error, tf.errors.ResourceExhaustedError) and "No space left" in str(error):
        return InputError(
            "No space is left on the disk for TensorBoard's logs. Free some space, then continue with --resume. "
            "Nothing is lost."
        )
    if devices.workers == 1:
        return error
    reason = str(error.message).strip().splitlines()
    return CheckFailed(
        "The connection to another worker was lost: the worker stopped, or the network failed. See the messages of "
        "that worker. Start all workers again with --resume: they continue from the chief's last checkpoint. "
        f"({type(error).__name__}: {reason[0][:200] if reason else ''})"
    )


# One per process: TensorFlow numbers the collective operations of every strategy from the same start, so those of a
# second strategy would collide with those of the first.
@cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(list(devices))


@cache
def _multi_worker() -> tf.distribute.Strategy:
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise InputError(
            f"--strategy multiworker must be set up before TensorFlow computes anything in this process ({error}). "
            "Call kdistill.run first, or use `kdistill run`."
        ) from error


def _several_workers(seconds: float, say) -> Devices:
    addresses, own = parse_tf_config(os.environ.get("TF_CONFIG"))
    if len(addresses) > 1:
        say(f"Worker {own} of {len(addresses)} at {addresses[own]}: waiting for the others")
        wait_for_workers(addresses, own, seconds)
    return Devices("multiworker", _multi_worker(), own, len(addresses))


def parse_tf_config(text: str | None) -> tuple[list[str], int]:
    """Parses TF_CONFIG: the addresses of all workers, the chief first, and the index of this process among them."""

    def check(valid: bool, expected: str, received: object) -> None:
        if not valid:
            raise InputError(f"TF_CONFIG expects {expected}, received {received!r}. Example: TF_CONFIG='{EXAMPLE}'")

    check(bool(text), "the cluster and the index of this worker, for --strategy multiworker", text or "nothing")
    try:
        config = json.loads(text)
    except ValueError as error:
        check(False, f"JSON ({error})", text)
    check(isinstance(config, dict), "a JSON object", config)
    jobs, task = config.get("cluster"), config.get("task")
    check(isinstance(jobs, dict) and jobs != {}, "'cluster', an object", jobs)
    check("ps" not in jobs, "jobs chief and worker (ParameterServerStrategy does not work with Keras 3)", sorted(jobs))
    check(jobs.keys() <= {"chief", "worker"}, "jobs chief and worker", sorted(jobs))
    for job, hosts in jobs.items():
        valid = isinstance(hosts, list) and all(isinstance(host, str) and _is_address(host) for host in hosts)
        check(valid, f"a list of 'host:port' for {job}", hosts)
    check(len(jobs.get("chief", [])) <= 1, "at most one chief", jobs.get("chief"))
    addresses = [*jobs.get("chief", []), *jobs.get("worker", [])]
    check(bool(addresses) and len(set(addresses)) == len(addresses), "different addresses", addresses)
    check(isinstance(task, dict), "'task', an object with type and index", task)
    kind, index = task.get("type"), task.get("index")
    check(kind in jobs, f"a task type of the cluster ({', '.join(sorted(jobs))})", kind)
    check(type(index) is int, "a whole number as the task's index", index)
    check(0 <= index < len(jobs[kind]), f"a task index from 0 to {len(jobs[kind]) - 1}", index)
    return addresses, index + (len(jobs.get("chief", [])) if kind == "worker" else 0)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def wait_for_workers(addresses: list[str], own: int, seconds: float) -> None:
    """Returns when every other worker has answered at its address; raises `InputError` after `seconds`.

    TensorFlow would wait for an hour without a message. A worker listens at its own address until it has reached all
    others; then TensorFlow takes over the port.
    """
    end, missing = time.monotonic() + seconds, {a for i, a in enumerate(addresses) if i != own}
    port = int(addresses[own].rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise InputError(
                f"Worker {own} cannot listen at {addresses[own]}: {error.strerror}. Stop the other worker with this "
                "index or the program that uses the port, or choose another port."
            ) from None
        listener.listen(len(addresses))
        while missing:
            missing -= {address for address in sorted(missing) if _answers(address)}
            if missing and time.monotonic() > end:
                raise InputError(
                    f"Worker {own} ({addresses[own]}) cannot reach {', '.join(sorted(missing))} within {seconds:g} s. "
                    "Start all workers at about the same time, check that their addresses in TF_CONFIG are right and "
                    "their ports open, or wait longer with --worker-timeout SECONDS."
                )
            time.sleep(0.2 if missing else 0.0)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True
