"""What is installed: wheel and source archive are whole, versions agree, and nothing needs Unix."""

import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def options():
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return {canonicalize_name(r.name): r for r in (Requirement(line) for line in lines if line)}


@pytest.fixture(scope="module")
def pins():
    return {
        name: next(iter(r.specifier)).version
        for name, r in requirements(Path(ROOT, "constraints.txt").read_text()).items()
    }


def test_the_tested_versions_are_allowed_and_are_those_of_the_extra(options, pins):
    needed = requirements(options["options"]["install_requires"])
    for extra in ("gpu", "onnx", "docs", "test"):
        for name, requirement in requirements(options["options.extras_require"][extra]).items():
            assert pins[name] in requirement.specifier, requirement
    assert all(pins[name] in requirement.specifier for name, requirement in needed.items())
    assert all(len(requirement.specifier) and "==" not in str(requirement) for requirement in needed.values())
    tested = requirements(options["options.extras_require"]["tested"])
    assert {name: next(iter(r.specifier)).version for name, r in tested.items()} == {
        name: pins[name] for name in needed
    }


@pytest.mark.slow
def test_wheel_and_source_archive_hold_what_the_code_reads(tmp_path):
    """Every file of the package that git knows, wherever it lies; the wheel is built from a copy of those files."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    source = tmp_path / "source"
    packed = ("kdistill/", "recipes/", "exports/")
    for name in listed:
        if name.startswith(packed) or "/" not in name:
            path = source / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_file():
                path.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "setup.py", "--quiet", "sdist", "bdist_wheel"]
    subprocess.run(command, cwd=source, capture_output=True, check=True, timeout=120)
    (wheel,), (archive,) = source.glob("dist/*.whl"), source.glob("dist/*.tar.gz")
    expected = [name for name in listed if name.startswith(packed) and (source / name).is_file()]
    expected = [
        name for name in expected if not name.endswith((".md", ".txt")) or "templates" in name or "samples" in name
    ]
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        lacking = [n for n in expected if (n if n.startswith("kdistill/") else f"kdistill/{n}") not in names]
        assert not lacking
        metadata = opened.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = opened.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    assert "Provides-Extra: tested" in metadata and "Requires-Python: <3.14,>=3.11" in metadata
    assert "kdistill = kdistill.cli:main" in entry_points
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert not [name for name in expected if name not in names]


WITHOUT_UNIX = """
import importlib, os, pkgutil, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # an import raises ImportError
for module, names in ((os, ("fork", "forkpty", "getuid", "geteuid", "O_NOFOLLOW", "O_DIRECTORY")),
                      (signal, ("SIGALRM", "SIGKILL", "setitimer", "SIGHUP"))):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
import kdistill
modules = [m.name for m in pkgutil.walk_packages(kdistill.__path__, "kdistill.") if not m.name.endswith("__main__")]
for name in modules:
    importlib.import_module(name)
for name in kdistill.__all__:
    getattr(kdistill, name)
print(len(modules))
"""


@pytest.mark.slow
def test_all_modules_are_imported_without_what_only_unix_has():
    ended = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) > 100
