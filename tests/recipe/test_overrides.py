"""Recipes as values: overriding, checking, writing and reading them."""

import dataclasses

import pytest

from kdistill.errors import InputError
from kdistill.recipe import Distill, Network, Profile, Recipe, Schedule, Term
from kdistill.recipe.checks import check_recipe
from kdistill.recipe.loading import load_profile, load_recipe, names
from kdistill.recipe.overrides import override
from kdistill.recipe.values import as_dict, from_dict

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
        ("student.file=s.keras", "student.file.*none, because this network is trained"),
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
    teacher, student = (
        dataclasses.replace(network, options={"widths": widths})
        for network, widths in ((MNIST.teacher, [32, 64, 128]), (MNIST.student, [8, 16, 24]))
    )
    assert from_dict(Recipe, as_dict(MNIST)) == dataclasses.replace(MNIST, teacher=teacher, student=student)
    with pytest.raises(InputError, match="Unknown key of Recipe 'sead'. Did you mean 'seed'"):
        from_dict(Recipe, {"sead": 1})


WITH_TERMS = dataclasses.replace(
    MNIST,
    distill=Distill(
        Schedule(0.9, 0.1, 0.5),
        temperature=Schedule(8, 2, shape="cosine"),
        terms={
            "hint": Term("hint", 0.5, student_tap="conv3", teacher_tap="conv2", projector="conv1x1"),
            "dkd": Term("dkd", Schedule(1.0, 0.0), options={"temperature": 2, "beta": Schedule(8.0, 1.0)}),
        },
    ),
)


def test_terms_and_schedules_survive_json_and_take_settings():
    assert from_dict(Recipe, as_dict(WITH_TERMS)).distill == WITH_TERMS.distill
    settings = ["distillation_weight=0.5", "distill.temperature=linear:4:1:0.2:0.8", "hint.weight=2"]
    with pytest.raises(InputError, match="Unknown key of --set 'hint.weight'.*distill.terms.hint.weight"):
        override(WITH_TERMS, settings)
    settings[2:] = ["distill.terms.hint.weight=step:2:0:0.5", "distill.terms.dkd.options.temperature=2.5", "beta=3"]
    changed = override(WITH_TERMS, [*settings, "distill.terms.hint.projector=none"]).distill
    assert changed.distillation_weight == 0.5 and changed.temperature == Schedule(4, 1, 0.2, 0.8)
    assert changed.terms["hint"].weight == Schedule(2, 0, 0.5, shape="step") and changed.terms["hint"].projector is None
    assert changed.terms["dkd"].options == {"temperature": 2.5, "beta": 3.0}
    assert override(WITH_TERMS, ["distill.temperature.end=1"]).distill.temperature == Schedule(8, 1, shape="cosine")
    assert override(MNIST, ["temperature=cosine:8:2"]).distill.temperature == Schedule(8, 2, shape="cosine")
    assert override(MNIST, ["temperature=linear:8:2"]).distill.distillation_weight == MNIST.distill.distillation_weight


@pytest.mark.parametrize(
    "setting,message",
    [
        ("temperature=linear:8", "float or a schedule .shape:start:end"),
        ("temperature=cubic:8:2", "received 'cubic:8:2'"),
        ("temperature=linear:8:0", "a schedule between numbers above 0"),
        ("temperature=linear:8:8", "a start that is not the end"),
        ("temperature=linear:8:2:0.5:0.2", "begin < finish"),
        ("temperature=step:8:2", "a step with 0 < begin"),
        ("temperature=none", "expects a number above 0"),
        ("distillation_weight=linear:0.5:1.5", "from 0 to 1"),
        ("teacher_weights=1,2", "None with one teacher"),
    ],
)
def test_a_wrong_schedule_is_one_clear_error(setting, message):
    with pytest.raises(InputError, match=message):
        override(MNIST, [setting])


@pytest.mark.parametrize(
    "distill,message",
    [
        (Distill(terms={"kd": Term("mse_logits")}), "'distill.temperature' expects None, as the term 'kd'"),
        (Distill(terms={"hint": Term("hint")}), "give student_tap and teacher_tap too"),
        (Distill(terms={"own": Term(print)}), "expects the name of a method in a recipe"),
        (Distill(terms={"x": Term("cosine", True)}), "distill.terms.x.weight' expects a number"),
    ],
)
def test_a_wrong_term_is_refused_before_anything_runs(distill, message):
    with pytest.raises(InputError, match=message):
        check_recipe(dataclasses.replace(MNIST, distill=distill))
    check_recipe(dataclasses.replace(MNIST, distill=Distill(temperature=None, terms={"kd": Term("mse_logits")})))


@pytest.mark.parametrize("name", names("recipes"))
def test_every_recipe_that_ships_loads_in_its_variants(name):
    assert load_recipe(name).variant == "default"
    assert load_recipe(name, "smoke").variant == "smoke"


def test_weights_and_their_mapping_survive_json_and_take_settings():
    assert override(MNIST, ["teacher.weights=a.npz, b.keras"]).teacher.weights == ("a.npz", "b.keras")
    by_file = {"a.npz": {"conv": "conv1"}, "b.keras": {"block/dense": "fc1"}}
    for given in (
        Network("lenet", weights=("a.npz",), mapping={"block/conv": "conv1"}),
        Network("lenet", weights=("a.npz", "b.keras"), mapping=by_file),
    ):
        recipe = check_recipe(dataclasses.replace(MNIST, teacher=given, student=Network("small_cnn")))
        assert from_dict(Recipe, as_dict(recipe)) == recipe


@pytest.mark.parametrize(
    "given,message",
    [
        ({"mapping": {"a": "b"}}, "'teacher.mapping' expects none without teacher.weights"),
        ({"weights": ("a.npz",), "file": "t.keras"}, "'teacher.weights' expects none with teacher.file"),
        ({"weights": "a.npz"}, "'teacher.weights' expects several files"),
        (
            {"weights": ("a.npz",), "mapping": {"a.npz": {"a": "b"}}},
            "expects {layer of the file: layer of the network}",
        ),
        ({"weights": ("a.npz", "b.npz"), "mapping": {"a": "b"}}, "expects {file: .*} with several files"),
        ({"weights": ("a.npz", "b.npz"), "mapping": {"c.npz": {"a": "b"}}}, "expects {file: .*} with several files"),
    ],
)
def test_a_wrong_mapping_is_refused_before_anything_runs(given, message):
    with pytest.raises(InputError, match=message):
        check_recipe(dataclasses.replace(MNIST, teacher=Network("lenet", **given)))
    with pytest.raises(InputError, match=message.replace("teacher", "assistants")):
        check_recipe(dataclasses.replace(MNIST, assistants=(Network("lenet", **given),)))


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
