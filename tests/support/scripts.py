"""What tests run besides the package: the scripts of `benchmarks/`, and commands in this process."""

import importlib.util
from pathlib import Path
from types import ModuleType

import keras
from typer.testing import CliRunner

from kdistill.cli.commands import app
from kdistill.networks import architectures, saving
from kdistill.recipe import Network

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    """The script `benchmarks/<name>.py` as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(*words):
    """The result of `kdistill WORDS`, run in this process."""
    return CliRunner().invoke(app, [str(word) for word in words])


def untrained(path: Path) -> Path:
    """Saves the student of `mnist`, which has learned nothing, as `path`."""
    keras.utils.set_random_seed(0)
    saving.save_model(architectures.build(Network("small_cnn"), (28, 28, 1), 10), path)
    return path
