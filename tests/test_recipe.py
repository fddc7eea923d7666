"""Recipes as values: overriding, checking, writing and reading them."""

import dataclasses

import pytest

from kdistill.errors import InputError
from kdistill.loading import load_profile, load_recipe, names
from kdistill.recipe import Profile, Recipe, as_dict, from_dict, override

MNIST = load_recipe("mnist")


def test_overrides_by_path_and_by_a_unique_last_part():
    changed = override(MNIST, ["training.epochs=3", "temperature=8", "exports=npu,reference", "train_limit=none"])
    assert changed.training.epochs == 3 and MNIST.teacher_training.epochs == changed.teacher_training.epochs
    assert changed.distill.temperature == 8.0 and isinstance(changed.distill.temperature, float)
    assert changed.exports == ("npu", "reference") and changed.data.train_limit is None
    assert override(MNIST, ["data.flip=true"]).data.flip is True


@pytest.mark.parametrize(
    "setting,message",
    [
        ("temprature=3", "Did you mean 'temperature'|Did you mean 'distill.temperature'"),
        ("epochs=3", "ambiguous.*teacher_training.epochs, training.epochs"),
        ("training.epochs=many", "expects int, received 'many'"),
        ("data.flip=maybe", "expects bool, received 'maybe'"),
        ("training.epochs=0", "expects 1 or more, received 0"),
        ("training.epochs", "key=value"),
        ("distillation_weight=1.2", "from 0 to 1"),
        ("temperature=nan", "above 0"),
        ("training.learning_rate=-1", "above 0"),
        ("training.optimizer=adm", "adam or sgd"),
        ("training.momentum=0.9", "which ignores it"),
        ("precision=float8", "one of float32"),
        ("name=other", "Unknown key"),
        ("data.validation=1", "between 0 and 1"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(setting, message):
    with pytest.raises(InputError, match=message):
        override(MNIST, [setting])


def test_a_recipe_survives_json():
    assert from_dict(Recipe, as_dict(MNIST)) == dataclasses.replace(
        MNIST, student=dataclasses.replace(MNIST.student, options={"widths": [8, 16, 24]})
    )
    with pytest.raises(InputError, match="Unknown key of Recipe 'sead'. Did you mean 'seed'"):
        from_dict(Recipe, {"sead": 1})


@pytest.mark.parametrize("name", names("recipes"))
def test_every_recipe_that_ships_loads_in_its_variants(name):
    assert load_recipe(name).variant == "default"
    assert load_recipe(name, "smoke").variant == "smoke"


@pytest.mark.parametrize("name", names("exports"))
def test_every_profile_that_ships_loads_under_its_name(name):
    assert load_profile(name).name == name


def test_unknown_names_name_the_nearest():
    with pytest.raises(InputError, match="Unknown recipe 'mnits'. Did you mean 'mnist'"):
        load_recipe("mnits")
    with pytest.raises(InputError, match="Unknown variant 'smok' of recipe 'mnist'.*smoke"):
        load_recipe("mnist", "smok")
    with pytest.raises(InputError, match="Unknown profile 'npv'. Did you mean 'npu'"):
        load_profile("npv")


def test_a_users_own_files(tmp_path):
    profile = tmp_path / "mine.py"
    profile.write_text("from kdistill.recipe import Profile\ndef profile(): return Profile('mine', batch=1)\n")
    assert load_profile(str(profile)) == Profile("mine", batch=1)
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "from kdistill.recipe import Network, Recipe\n"
        "def recipe(variant): return Recipe('own', Network('lenet'), Network('small_cnn'))\n"
    )
    assert load_recipe(str(recipe)).name == "own"
    with pytest.raises(InputError, match="No recipe file at"):
        load_recipe(str(tmp_path / "none.py"))
    recipe.write_text("import nothing_of_this_name\n")
    with pytest.raises(InputError, match="cannot be run: ModuleNotFoundError"):
        load_recipe(str(recipe))
    recipe.write_text("x = 1\n")
    with pytest.raises(InputError, match=r"defines no function recipe\(\)"):
        load_recipe(str(recipe))
    recipe.write_text("def recipe(variant): return 3\n")
    with pytest.raises(InputError, match="must return a kdistill.Recipe, returned 3"):
        load_recipe(str(recipe))
