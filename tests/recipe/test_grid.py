"""Grids: ranges, keys that can be swept and those that cannot, settings that are one student."""

import pytest

from kdistill.errors import InputError
from kdistill.recipe import grid
from kdistill.recipe.loading import load_recipe

MNIST = load_recipe("mnist")


def test_ellipsis_is_a_range_without_rounding():
    found = grid.axes(MNIST, ["distillation_weight=0,0.1,...,1", "temperature=1,2,4,8,20"])
    assert found["distill.distillation_weight"] == [
        "0",
        "0.1",
        "0.2",
        "0.3",
        "0.4",
        "0.5",
        "0.6",
        "0.7",
        "0.8",
        "0.9",
        "1",
    ]
    assert found["distill.temperature"] == ["1", "2", "4", "8", "20"]
    assert grid.axes(MNIST, ["temperature=8,6,...,2"])["distill.temperature"] == ["8", "6", "4", "2"]
    assert grid.axes(MNIST, ["temperature=1,2,...,3"])["distill.temperature"] == ["1", "2", "3"]


def test_55_settings_are_51_students():
    made = grid.settings(MNIST, grid.axes(MNIST, ["distillation_weight=0,0.1,...,1", "temperature=1,2,4,8,20"]))
    students = grid.students(made)
    assert len(made) == 55 and len(students) == 51
    assert len(students["distillation_weight=0,temperature=1"]) == 5
    assert made[1].recipe.distill.temperature == 2 and made[54].name == "distillation_weight=1,temperature=20"


def test_rates_and_widths():
    made = grid.settings(MNIST, grid.axes(MNIST, ["training.learning_rate=0.01", "student.widths=4x8x12,8x16x24"]))
    assert [each.recipe.student.options["widths"] for each in made] == [(4, 8, 12), (8, 16, 24)]
    assert made[0].recipe.training.learning_rate == 0.01


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("temperature", "expects key=v1,v2"),
        ("temperature=", "expects key=v1,v2"),
        ("temperatur=1", "Did you mean|Unknown key"),
        ("temperature=1,1", "appears twice"),
        ("temperature=1,,2", "empty"),
        ("temperature=1,...,4", "expects two numbers before it"),
        ("temperature=1,2,...,4.5", "whole number of steps"),
        ("temperature=1,2,...", "expects two numbers before it"),
        ("temperature=2,2,...,4", "expects two numbers before it"),
        ("training.epochs=1,2", "side by side.*--set"),
        ("seed=1,2", "--seeds"),
        ("data.shift=0,1", "side by side"),
    ],
)
def test_what_is_refused(text, match):
    with pytest.raises(InputError, match=match):
        grid.axes(MNIST, [text])


def test_further_refusals():
    with pytest.raises(InputError, match="twice. Write all"):
        grid.axes(MNIST, ["temperature=1", "distill.temperature=2"])
    with pytest.raises(InputError, match="because this recipe has no grid"):
        grid.axes(MNIST, [])
    with pytest.raises(InputError, match="distillation_weight"):
        grid.settings(MNIST, grid.axes(MNIST, ["distillation_weight=0.5,2"]))
    with pytest.raises(InputError, match="ambiguous"):
        grid.axes(MNIST, ["training.learning_rate=1", "epochs=2"])
