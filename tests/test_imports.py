"""Imports point one way, and what a user pays for `import kdistill` is next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import kdistill

PACKAGE = Path(kdistill.__file__).parent
# A module imports from the groups above its own, and from its own group only what is listed before it.
GROUPS = [
    [
        "errors",
        "files",
        "objective",
        "recipe",
        "grid",
        "loading",
        "losses",
        "methods",
        "features",
        "measure",
        "diagnostics",
        "verdict",
        "provenance",
        "profiles",
        "pictures",
        "charts",
        "markup",
        "report",
        "page",
        "compare",
    ],
    [
        "cache",
        "idx",
        "tfds_copies",
        "mnist",
        "cifar",
        "encoded",
        "records",
        "image_folder",
        "labelled",
        "data",
        "litert",
        "flatbuffer",
        "taps",
        "teacher",
        "terms",
        "inference",
        "pipeline",
        "bridge_layers",
        "bridge",
    ],
    ["metadata", "layerwise", "deploy", "microcontroller", "inspection", "benchmark"],  # of files
    ["supervised", "distiller", "convert", "weights", "applications", "models", "evaluate", "export", "verify"],
    [
        "strategy",
        "callbacks",
        "checkpoint",
        "optimizers",
        "disagreement",
        "replay",
        "train",
        "folder",
        "teachers",
        "arms",
    ],
    ["qat_file", "finetune", "schemes", "stages", "compress_input", "compress", "compressed"],
    ["results", "run", "side_by_side", "sweep_charts", "sweep_report", "sweep_page", "sweep"],
    ["cli_base", "cli_cache", "cli_files", "cli_report", "cli"],
]
ORDER = {name: i for i, name in enumerate(name for group in GROUPS for name in group)}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "kdistill":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdistill."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("kdistill.")}
    return found


def test_imports_point_one_way():
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert modules.keys() <= ORDER.keys(), "give the new module its place in GROUPS"
    for name, path in modules.items():
        for imported in imports_of(path) & modules.keys():
            assert ORDER[imported] < ORDER[name], f"{name} imports {imported}, which stands behind it"


def test_recipes_and_profiles_import_values_only():
    root = PACKAGE.parent
    folders = [root / "recipes", root / "exports", PACKAGE / "recipes", PACKAGE / "exports"]
    files = [path for folder in folders for path in folder.glob("*.py")]
    assert len(files) >= 5
    for path in files:
        assert imports_of(path) <= {"recipe"}, path


def test_no_file_is_long():
    for path in PACKAGE.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_kdistill_imports_no_tensorflow():
    assert run("import sys, kdistill; print('tensorflow' in sys.modules, 'keras' in sys.modules)") == "False False\n"
    assert run("import sys, kdistill.cli; print({'tensorflow', 'keras', 'numpy'} & set(sys.modules))") == "set()\n"


def test_public_names_are_what_they_say():
    code = "import kdistill, kdistill.export, kdistill.run, kdistill.evaluate\n"
    code += "print(callable(kdistill.export), callable(kdistill.run), callable(kdistill.evaluate))"
    assert run(code) == "True True True\n"
