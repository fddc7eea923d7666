"""Every variant of every recipe that ships: documented, checked, and those of teachers run from data to report."""

import ast
import inspect
import re
from importlib import import_module

import pytest

from kdistill.networks.applications import APPLICATIONS
from kdistill.networks.architectures import NETWORKS
from kdistill.recipe import SCHEMES, Recipe, grid
from kdistill.recipe.loading import COMPACT, load_profile, load_recipe, names
from kdistill.recipe.values import as_dict, from_dict
from kdistill.runs.run import run


def documented(name: str) -> list[str]:
    """The variants that the docstring of `recipe` names."""
    text = import_module(f"kdistill.recipes.{name}").recipe.__doc__
    schemes = SCHEMES if "each scheme of compression by its name" in " ".join(text.split()) else ()
    return [*re.findall(r"`(\w+)`", text), *schemes]


VARIANTS = [(name, variant) for name in names("recipes") for variant in documented(name)]


@pytest.mark.parametrize("name,variant", VARIANTS)
def test_every_variant_loads_survives_json_and_names_what_there_is(name, variant):
    recipe = load_recipe(name, variant)  # checked
    assert (recipe.name, recipe.variant) == (name, variant)
    assert as_dict(from_dict(Recipe, as_dict(recipe))) == as_dict(recipe)
    for network in (recipe.teacher, recipe.student, *recipe.more_teachers, *recipe.assistants):
        assert network.name in {**NETWORKS, **APPLICATIONS}
    names_of_files = [export.removesuffix(COMPACT) for export in recipe.exports]
    assert [load_profile(export).name for export in recipe.exports] == names_of_files
    if recipe.grid:
        assert len(grid.settings(recipe, grid.axes(recipe, list(recipe.grid)))) > 1


@pytest.mark.parametrize("name", names("recipes"))
def test_no_variant_is_left_out_of_the_docstring(name):
    """Whatever the function compares its argument with."""
    tree = ast.parse(inspect.getsource(import_module(f"kdistill.recipes.{name}").recipe))
    compared = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare) and getattr(node.left, "id", "") == "variant":
            constants = [each for each in ast.walk(node) if isinstance(each, ast.Constant)]
            compared |= {each.value for each in constants}
    assert compared and compared <= set(documented(name))


TRAINED = {  # what each trains, beside control and student
    "late": [],  # the teacher ships with kdistill
    "blend": ["teacher_1"],
    "assistant": ["assistant_0"],
    "born_again": ["teacher", "assistant_0"],
    "lenet_lambda": ["teacher"],
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", TRAINED)
def test_variants_of_teachers_run_from_data_to_report(tmp_path, variant):
    """Their own networks, for four steps each."""
    small = ["train_limit=128", "exports=", "seeds=1"]
    small += [f"{part}.{key}" for part in ("teacher_training", "training") for key in ("epochs=1", "batch_size=32")]
    said = []
    report = run(load_recipe("mnist", variant, small), tmp_path / "run", say=said.append)
    assert list(report["training"]) == [*TRAINED[variant], "control", "student"]
    assert all(fit["steps"] == 4 for fit in report["training"].values())
    rows = {row["name"]: row for row in report["models"]}
    shipped = {"teacher_0"} if variant == "blend" else set()
    assert {"teacher", *report["training"]} | shipped == set(rows)
    assert all(0 <= row["accuracy"] <= 1 for row in rows.values())
    taught = {name for name, fit in report["training"].items() if "kd" in fit["history"]}
    assert taught == {"student", *(name for name in TRAINED[variant] if name.startswith("assistant"))}
    if variant in ("born_again", "lenet_lambda"):
        assert rows["student"]["parameters"] == rows["teacher"]["parameters"]
    assert (tmp_path / "run" / "report.html").is_file()
