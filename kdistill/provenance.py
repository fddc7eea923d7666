"""What a run was computed with: command, versions, machine, commit."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("kdistill", "tensorflow", "keras", "ai-edge-litert", "numpy")


def of_run() -> dict:
    """The command line, the machine, the versions of the packages, and the commit of the source tree."""
    return {"command": _command(), "machine": machine(), "versions": versions(), "commit": _commit()}


def versions() -> dict[str, str]:
    """The versions of Python and of the installed `PACKAGES`, by name."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # kdistill itself, run from a source tree
            continue
    return installed


def machine() -> str:
    """The CPU's name, the number of cores that this process may use, and the operating system."""
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
    """The commit of the git checkout that holds this package, with `+` if files are changed; None if there is none."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
