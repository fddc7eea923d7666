"""The profiles that ship say in words what they hold in numbers. `test_export.py` exports and checks each."""

import re
from importlib import import_module

import pytest

from kdistill.recipe.loading import load_profile, names
from kdistill.recipe.profile import check_profile


@pytest.mark.parametrize("name", names("exports"))
def test_a_profile_keeps_to_its_docstring(name):
    profile, text = load_profile(name), import_module(f"kdistill.exports.{name}").__doc__
    assert check_profile(profile).name == name
    assert re.search(r"at most ([\d.]+) points", text)[1] == f"{100 * profile.max_drop:g}"
    assert re.search(r"([\d.]+) % agreement", " ".join(text.split()))[1] == f"{100 * profile.min_agreement:g}"
    assert "Target: " in text and "Consumed by: " in text
    sizes = ("any batch size" in text.lower(), "One image at a time" in text)
    assert sizes == (profile.batch is None, profile.batch == 1)


def test_there_is_one_for_each_kind_of_device():
    kinds = {name: load_profile(name).quantization for name in names("exports")}
    expected = {"reference": "none", "phone_cpu": "dynamic", "phone_gpu": "float16", "npu": "int8"}
    assert kinds == {**expected, "microcontroller": "int8", "mediapipe": "dynamic", "int4": "int4"}
