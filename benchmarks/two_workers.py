"""Starts `kdistill run` as two workers on this machine, which train one model together; see docs/strategies.md.

    python benchmarks/two_workers.py mnist --variant smoke --out runs/two

All words go on to both `kdistill run ... --strategy multiworker`. On two machines there is nothing else to do than
this: the same command on each, with a TF_CONFIG that names both and says which one this is. Exit status: the highest
of the two workers. What the second worker says is marked with "1|".
"""

import json
import os
import socket
import subprocess
import sys
import threading


def free_address() -> str:
    """An address of this machine whose port is free now."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(words: list[str], count: int = 2, **options) -> list[subprocess.Popen]:
    """The workers, as processes; `options` are those of `subprocess.Popen`."""
    cluster = {"worker": [free_address() for _ in range(count)]}
    command = [sys.executable, "-m", "kdistill.cli", "run", *words, "--strategy", "multiworker"]
    started = []
    for index in range(count):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        started.append(subprocess.Popen(command, env={**os.environ, "TF_CONFIG": json.dumps(config)}, **options))
    return started


def main() -> int:
    """Runs both to their end and passes on what they say."""
    workers = start(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def pass_on(index: int) -> None:
        for line in workers[index].stdout:
            print(line if index == 0 else f"{index}| {line}", end="", flush=True)

    threads = [threading.Thread(target=pass_on, args=(index,)) for index in range(len(workers))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        pass  # the workers have had it too
    return max(abs(worker.wait()) for worker in workers)


if __name__ == "__main__":
    sys.exit(main())
