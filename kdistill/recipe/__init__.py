"""What a run is: values, their overrides and checks, grids of them, and how recipes and profiles are loaded.

Standard library only, so that a recipe loads without TensorFlow. What a value does is in the room that uses it. Recipes
and profiles import their names from here: `from kdistill.recipe import Data, Recipe`.
"""

from kdistill.recipe.objective import Distill, Schedule, Term
from kdistill.recipe.values import SCHEMES, Cache, Data, Network, Profile, Recipe, Stage, Training, as_dict, from_dict

__all__ = [
    "SCHEMES",
    "Cache",
    "Data",
    "Distill",
    "Network",
    "Profile",
    "Recipe",
    "Schedule",
    "Stage",
    "Term",
    "Training",
    "as_dict",
    "from_dict",
]
