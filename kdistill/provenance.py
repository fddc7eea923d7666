"""Where a number comes from: command, versions, machine, commit."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("kdistill", "tensorflow", "keras", "ai-edge-litert", "numpy")


def of_run() -> dict:
    """The command that was typed, the machine, the versions of what computes, and the commit of the source tree."""
    return {"command": _command(), "machine": machine(), "versions": versions(), "commit": _commit()}


def versions() -> dict[str, str]:
    """Versions by package, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # kdistill itself, run from a source tree
            continue
    return found


def machine() -> str:
    """The CPU's name, the cores this process may use, and the system."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line)
        name = next(lines, name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores, {platform.system()}"


def _command() -> str:
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _commit() -> str | None:
    """The commit of the git checkout that this package is run from, with `+` if files were changed; else None."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
