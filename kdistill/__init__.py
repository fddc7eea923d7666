"""kdistill: distils trained Keras models into small ones for phones, and proves what each is worth.

The names below are imported on first use: `import kdistill` alone does not import TensorFlow.
"""

import sys
from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_MODULES = ("losses", "methods", "features", "weights")  # public as modules; the others are names in them
_HOMES = {
    "Distiller": "distiller",
    "Supervised": "supervised",
    **{name: name for name in _MODULES},
    "Examples": "data",
    "evaluate": "evaluate",
    "export": "export",
    "compress": "compress",
    "load_recipe": "loading",
    "load_profile": "loading",
    "run": "run",
    "Adapted": "teacher",
    "Term": "recipe",
    "Schedule": "recipe",
    "Recipe": "recipe",
    "Profile": "recipe",
    "InputError": "errors",
    "CheckFailed": "errors",
}
__all__ = ["__version__", *_HOMES]


class _Package(ModuleType):
    """Keeps `kdistill.export` the function: importing the submodule of that name would bind the module there."""

    def __getattr__(self, name: str):
        if name not in _HOMES:
            raise AttributeError(f"module 'kdistill' has no attribute '{name}'")
        module = import_module(f"kdistill.{_HOMES[name]}")
        value = module if name in _MODULES else getattr(module, name)
        super().__setattr__(name, value)
        return value

    def __setattr__(self, name: str, value):
        if not (isinstance(value, ModuleType) and _HOMES.get(name) == name and name not in _MODULES):
            super().__setattr__(name, value)

    def __dir__(self):
        return sorted(__all__)


sys.modules[__name__].__class__ = _Package
