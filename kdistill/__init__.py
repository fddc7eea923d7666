"""kdistill: distills trained Keras models into small ones for phones, and proves with numbers what each is worth.

The names below are imported on first use: `import kdistill` alone does not import TensorFlow.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that defines it, or, for `losses` and the like, that it is
    "Adapted": "teachers.adapted",
    "CheckFailed": "errors",
    "Distiller": "distillation.distiller",
    "Examples": "data.splits",
    "InputError": "errors",
    "Profile": "recipe",
    "Recipe": "recipe",
    "Schedule": "recipe",
    "Stage": "recipe",
    "Supervised": "distillation.supervised",
    "Term": "recipe",
    "check": "conversion.verify",
    "compress": "compression.compress",
    "evaluate": "evaluation.evaluate",
    "export": "conversion.export",
    "feature_losses": "distillation.feature_losses",
    "load_profile": "recipe.loading",
    "load_recipe": "recipe.loading",
    "losses": "distillation.losses",
    "repair": "repairs.repair",
    "run": "runs.run",
    "shrink": "shrinking.shrink",
    "store_teacher": "teachers.foreign",
    "teacher": "teachers.foreign",
    "weights": "networks.weights",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module 'kdistill' has no attribute '{name}'")
    module = import_module(f"kdistill.{_HOMES[name]}")
    value = module if module.__name__.endswith(f".{name}") and not hasattr(module, name) else getattr(module, name)
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
