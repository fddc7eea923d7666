"""On what a run computes: one device, several GPUs of one machine, or several machines; and whether that can work.

The batch of a recipe is the global one, whatever the strategy. Several workers train the same models in step; worker 0,
the chief, alone keeps checkpoints, logs, files and the report, and tells the others where to go on.
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
    """A strategy, and the place of this process in it. Without a strategy everything here is trivial."""

    name: str = "none"
    strategy: tf.distribute.Strategy | None = None
    worker: int = 0
    workers: int = 1

    @property
    def chief(self) -> bool:
        """Whether this process writes: alone, or worker 0."""
        return self.worker == 0

    @property
    def replicas(self) -> int:
        """Copies of a model that compute at the same time, each its share of the global batch."""
        return self.strategy.num_replicas_in_sync if self.strategy else 1

    def scope(self):
        """The scope in which models, optimizers and their variables are made."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def as_dict(self) -> dict:
        """For the report: name, replicas, workers."""
        return {"name": self.name, "replicas": self.replicas, "workers": self.workers}

    def __str__(self) -> str:
        return self.name if self.name == "none" else f"{self.name}, {self.replicas} replicas, {self.workers} worker(s)"

    def check_batch(self, size: int, key: str) -> None:
        """Raises `InputError` for a batch of which some replica would get nothing."""
        if size < self.replicas:
            raise InputError(
                f"{key} is {size} (or the training images are so few), but --strategy {self.name} has {self.replicas} "
                f"replicas: some would have no image. Set {key} to {self.replicas} or more: it counts the images of "
                "all replicas together."
            )

    def part(self, batch_size: int) -> tuple[int, int]:
        """Which part of each batch this worker makes: (its place, workers); (0, 1), the whole, where it is alone.

        Also where its replicas would have parts of unequal size: TensorFlow then splits whole batches.
        """
        alone = self.workers == 1 or (self.replicas > self.workers and batch_size % self.replicas)
        return (0, 1) if alone else (self.worker, self.workers)

    def parts(self, batches: tf.data.Dataset):
        """For `fit`: batches that hold this worker's own part, split among its replicas."""
        each = self.replicas // self.workers
        if each > 1:  # an element for each replica
            batches = batches.flat_map(
                lambda *batch: tf.data.Dataset.from_tensor_slices(
                    tuple(tf.reshape(x, [each, x.shape[0] // each, *x.shape[1:]]) for x in batch)
                )
            )
        return self.strategy.distribute_datasets_from_function(lambda context: batches)

    def share(self, content: bytes) -> bytes:
        """What the chief calls this with, on every worker. All workers have to call it, at the same point."""
        if self.workers == 1:
            return content
        length = int(self._sum(np.array([len(content) if self.chief else 0]))[0])
        padded = np.zeros(-(-length // 8) * 8, np.uint8)
        if self.chief:
            padded[:length] = np.frombuffer(content, np.uint8)
        return self._sum(padded.view(np.int64)).tobytes()[:length] if length else b""

    def wait(self) -> None:
        """Returns when all workers have come here: one that leaves before the chief looks as if it had died."""
        self.share(b"")

    def agree(self, settings: dict) -> None:
        """Raises `InputError`, on every worker, unless all were started with the chief's settings."""
        if self.workers == 1:
            return
        text = json.dumps(settings)
        settings, of_chief = json.loads(text), json.loads(self.share(text.encode()))
        names = sorted(name for name in of_chief.keys() | settings.keys() if of_chief.get(name) != settings.get(name))
        if int(self._sum(np.array([len(names)]))[0]):
            raise InputError(
                f"The workers differ from the chief{' in ' + ', '.join(names) if names else ''}. Start all of them "
                "with the same recipe, settings, data and version of kdistill."
            )

    def _sum(self, values: np.ndarray) -> np.ndarray:
        """The sum of int64 values over the workers, of each the first replica: exact, whatever they stand for."""

        @tf.function(autograph=False)
        def summed(own):
            def replica():
                context = tf.distribute.get_replica_context()
                first = tf.cast(context.replica_id_in_sync_group % (self.replicas // self.workers) == 0, tf.int64)
                return context.all_reduce(tf.distribute.ReduceOp.SUM, own * first)

            return self.strategy.run(replica)

        return self.strategy.experimental_local_results(summed(tf.constant(values, tf.int64)))[0].numpy()


ONE = Devices()


def choose(name: str = "auto", seconds: float = 120.0, say=print) -> Devices:
    """The devices of `--strategy`: auto, none, mirrored or multiworker.

    `auto` is mirrored where there are several GPUs, else none. `mirrored` takes all GPUs, or without any the logical
    CPUs. `multiworker` reads TF_CONFIG and waits up to `seconds` for the other workers; it has to come before the
    process's first computation. Raises `InputError` for what cannot work.
    """
    if name in ("parameterserver", "parameter_server", "ps", "tpu", "central_storage"):
        raise InputError(
            f"--strategy {name} does not work: Keras 3 supports neither ParameterServerStrategy, nor TPUs with "
            "TensorFlow, nor CentralStorageStrategy. Take mirrored (one machine) or multiworker (several)."
        )
    if name not in NAMES:
        raise unknown("strategy", name, NAMES)
    if name == "multiworker":
        return _several_workers(seconds, say)
    gpus = tuple(gpu.name for gpu in tf.config.list_logical_devices("GPU"))
    if name == "auto":
        if os.environ.get("TF_CONFIG"):
            say("TF_CONFIG is set, but has no effect without --strategy multiworker.")
        name = "mirrored" if len(gpus) > 1 else "none"
    if name == "none":
        return ONE
    found = gpus or tuple(cpu.name for cpu in tf.config.list_logical_devices("CPU"))
    if len(found) < 2:
        raise InputError(
            f"--strategy mirrored expects two devices or more, found {len(found)} ({', '.join(found)}). Leave it out: "
            "one device computes the same."
        )
    return Devices("mirrored", _mirrored(found))


def explained(error: tf.errors.OpError, devices: Devices) -> Exception:
    """The message for an operation that failed: a full disk, or between workers, nearly always, one that has gone."""
    if isinstance(error, tf.errors.ResourceExhaustedError) and "No space left" in str(error):
        return InputError(
            "No space is left on the disk for TensorBoard's logs. Nothing is lost: make room, then go on with --resume."
        )
    if devices.workers == 1:
        return error
    reason = str(error.message).strip().splitlines()
    return CheckFailed(
        "The connection to another worker was lost: it has stopped, or the network has. Its own message says why. "
        "Start all workers again, with --resume: they go on from the chief's last checkpoint. "
        f"({type(error).__name__}: {reason[0][:200] if reason else ''})"
    )


# One per process: TensorFlow numbers the collective operations of each strategy from the same start, and those of a
# second one collide with the first one's.
@cache
def _mirrored(devices: tuple[str, ...]) -> tf.distribute.Strategy:
    return tf.distribute.MirroredStrategy(list(devices))


@cache
def _multi_worker() -> tf.distribute.Strategy:
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except RuntimeError as error:
        raise InputError(
            f"--strategy multiworker has to come before TensorFlow computes anything in this process ({error}). "
            "Call kdistill.run first, or use `kdistill run`."
        ) from error


def _several_workers(seconds: float, say) -> Devices:
    addresses, own = cluster(os.environ.get("TF_CONFIG"))
    if len(addresses) > 1:
        say(f"Worker {own} of {len(addresses)} at {addresses[own]}: waiting for the others")
        meet(addresses, own, seconds)
    return Devices("multiworker", _multi_worker(), own, len(addresses))


def cluster(text: str | None) -> tuple[list[str], int]:
    """The workers' addresses, the chief's first, and which of them this process is, from the text of TF_CONFIG."""

    def check(holds: bool, expected: str, received: object) -> None:
        if not holds:
            raise InputError(f"TF_CONFIG expects {expected}, received {received!r}. Example: TF_CONFIG='{EXAMPLE}'")

    check(bool(text), "the cluster and this worker's place in it, for --strategy multiworker", text or "nothing")
    try:
        config = json.loads(text)
    except ValueError as error:
        check(False, f"JSON ({error})", text)
    check(isinstance(config, dict), "a JSON object", config)
    jobs, task = config.get("cluster"), config.get("task")
    check(isinstance(jobs, dict) and jobs != {}, "'cluster', an object", jobs)
    check("ps" not in jobs, "jobs chief and worker (ParameterServerStrategy does not work with Keras 3)", sorted(jobs))
    check(jobs.keys() <= {"chief", "worker"}, "jobs chief and worker", sorted(jobs))
    for job, places in jobs.items():
        fine = isinstance(places, list) and all(isinstance(each, str) and _is_address(each) for each in places)
        check(fine, f"a list of 'host:port' for {job}", places)
    check(len(jobs.get("chief", [])) <= 1, "one chief at most", jobs.get("chief"))
    addresses = [*jobs.get("chief", []), *jobs.get("worker", [])]
    check(bool(addresses) and len(set(addresses)) == len(addresses), "addresses that differ", addresses)
    check(isinstance(task, dict), "'task', an object with type and index", task)
    kind, index = task.get("type"), task.get("index")
    check(kind in jobs, f"a task type of the cluster ({', '.join(sorted(jobs))})", kind)
    check(type(index) is int, "a whole number as the task's index", index)
    check(0 <= index < len(jobs[kind]), f"a task index from 0 to {len(jobs[kind]) - 1}", index)
    return addresses, index + (len(jobs.get("chief", [])) if kind == "worker" else 0)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def meet(addresses: list[str], own: int, seconds: float) -> None:
    """Returns when every other worker has answered at its address; raises `InputError` after `seconds`.

    TensorFlow would wait for an hour, and say nothing. Each worker listens at its own address until it has reached all
    the others; then TensorFlow does.
    """
    end, missing = time.monotonic() + seconds, {a for i, a in enumerate(addresses) if i != own}
    port = int(addresses[own].rpartition(":")[2])
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            raise InputError(
                f"Worker {own} cannot listen at {addresses[own]}: {error.strerror}. Does another worker with this "
                "index run already, or another program use the port?"
            ) from None
        listener.listen(len(addresses))
        while missing:
            missing -= {address for address in sorted(missing) if _answers(address)}
            if missing and time.monotonic() > end:
                raise InputError(
                    f"Worker {own} ({addresses[own]}) cannot reach {', '.join(sorted(missing))} within {seconds:g} s. "
                    "Start the workers at about the same time, look whether their addresses in TF_CONFIG are right and "
                    "their ports open, or wait longer: --worker-timeout SECONDS."
                )
            time.sleep(0.2 if missing else 0.0)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except OSError:
        return False
    return True
