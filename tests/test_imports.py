"""Imports point one way, room by room, and what a user pays for `import kdistill` is next to nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import kdistill

PACKAGE = Path(kdistill.__file__).parent
# A room imports from the layers above its own only; inside a room the imports make no circle.
LAYERS = [
    {""},  # the modules outside of any room
    {"recipe", "tflite", "report"},
    {"data", "networks"},
    {"formats"},
    {"teachers"},
    {"distillation", "evaluation"},
    {"training", "conversion"},
    {"compression"},
    {"repairs"},
    {"runs"},
    {"shrinking"},
    {"cli"},
]
LAYER_OF = {room: place for place, layer in enumerate(LAYERS) for room in layer}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
}


def room_of(module: str) -> str:
    return module.rpartition(".")[0].partition(".")[0]


def imports_of(path: Path) -> set[str]:
    """The modules of kdistill that a file imports, as `room.module` (or `room`, of names that a room itself offers)."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "kdistill":
            base = node.module.partition(".")[2]
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                imported.add(name if name in MODULES else base)
        elif isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("kdistill.")}
    return imported - {""}


def test_every_room_has_its_place():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - {"recipes", "exports"}
    assert rooms == LAYER_OF.keys() - {""}
    for room in rooms:
        assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text())), f"say what {room} is for"
        assert 4 <= sum(room_of(module) == room for module in MODULES) <= 12, room
    assert sum(not room_of(module) for module in MODULES) <= 6


def test_imports_point_one_way():
    for module, path in MODULES.items():
        for name in imports_of(path):
            room = room_of(name) if name in MODULES else name
            if room == room_of(module):
                continue
            assert LAYER_OF[room] < LAYER_OF[room_of(module)], f"{module} imports {name}, which is not above it"


def test_inside_a_room_imports_make_no_circle():
    imported = {
        module: {name for name in imports_of(path) if name in MODULES and room_of(name) == room_of(module)}
        for module, path in MODULES.items()
    }
    while imported:
        free = {module for module, names in imported.items() if not names & imported.keys()}
        assert free, f"these import each other: {sorted(imported)}"
        for module in free:
            del imported[module]


def test_private_names_stay_in_their_module():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kdistill"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{module} imports {private} of {node.module}"


def test_recipes_and_profiles_import_values_only():
    root = PACKAGE.parent
    files = [path for folder in ("recipes", "exports") for path in (root / folder).glob("*.py")]
    assert len(files) >= 5
    for path in files:
        assert imports_of(path) <= {"recipe"}, path


def test_no_file_is_long():
    for path in [*PACKAGE.rglob("*.py"), *Path(__file__).parent.rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 400, path


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_kdistill_imports_no_tensorflow():
    assert run("import sys, kdistill; print('tensorflow' in sys.modules, 'keras' in sys.modules)") == "False False\n"
    modules = ", ".join(f"kdistill.cli.{path.stem}" for path in (PACKAGE / "cli").glob("[!_]*.py"))
    assert run(f"import sys, {modules}; print({{'tensorflow', 'keras', 'numpy'}} & set(sys.modules))") == "set()\n"


def test_public_names_are_what_they_say():
    code = "import kdistill, kdistill.conversion.export, kdistill.runs.run, kdistill.evaluation.evaluate\n"
    code += "print(callable(kdistill.export), callable(kdistill.run), callable(kdistill.evaluate))\n"
    code += "print([name for name in kdistill.__all__ if getattr(kdistill, name, None) is None])"
    assert run(code) == "True True True\n[]\n"
