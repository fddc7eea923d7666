"""kdistill can be imported and its data read where a module of Unix is absent, as on Windows."""

import ast
import subprocess
import sys

from test_imports import MODULES

UNIX_MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "posix"}
UNIX_FUNCTIONS = {"fork", "pread", "pwrite", "sched_getaffinity", "getuid", "geteuid"}
WITHOUT_UNIX = f"""
import os, sys, warnings
import numpy, subprocess, tempfile  # they adapt to the real system
for name in {sorted(UNIX_MODULES - {"posix"})}:
    sys.modules[name] = None
for name in {sorted(UNIX_FUNCTIONS)}:
    if hasattr(os, name):
        delattr(os, name)
"""


def run(code: str, first: str = "") -> str:
    """The output of the code in a process without these modules and functions; `first` runs while they exist."""
    command = [sys.executable, "-c", first + WITHOUT_UNIX + code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_public_names_without_the_modules_of_unix():
    code = "import kdistill\n"
    code += "for name in ('Examples', 'InputError', 'Recipe', 'load_recipe'): print(getattr(kdistill, name).__name__)"
    assert run(code) == "Examples\nInputError\nRecipe\nload_recipe\n"


def test_data_is_loaded_without_the_modules_of_unix():
    code = "from kdistill.data.splits import load\nfrom kdistill.recipe import Data\n"
    code += "from kdistill import provenance\nprint(len(load(Data()).test), bool(provenance.machine()))"
    assert run(code) == "2000 True\n"


def test_every_module_without_the_modules_of_unix():
    code = "import importlib\nfor name in %r: importlib.import_module('kdistill.' + name)\nprint('imported')"
    assert run(code % sorted(MODULES), first="import keras, tensorflow, tf_keras") == "imported\n"


def test_no_module_imports_a_module_of_unix_at_its_top():
    """Inside a function, an import can be caught or belong to a function for one system only."""
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & UNIX_MODULES, f"{module} imports {names & UNIX_MODULES}"
