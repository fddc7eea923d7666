"""Which students fit: sizes of untrained files are those of trained ones, and the widest that fits is found."""

import numpy as np
import pytest
from support.shrinking import write_rows

from kdistill.conversion.build import build
from kdistill.conversion.float32 import prepare
from kdistill.data.splits import load
from kdistill.recipe import Data
from kdistill.recipe.loading import load_profile
from kdistill.shrinking.budget import Budget
from kdistill.shrinking.fit import Ruler, fitting, refusal
from kdistill.shrinking.space import FAMILIES, Candidate
from kdistill.shrinking.template import template
from kdistill.tflite import compact, flatbuffer
from kdistill.tflite.interpreter import File

DENSE = FAMILIES["dense"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The recipe and the splits of small data."""
    data, teacher = write_rows(tmp_path_factory.mktemp("rows"))
    from kdistill.recipe import Network

    recipe = template(Network("teacher", file=str(teacher)), Data("npz", head="classes"), "phone_cpu", 1)
    return recipe, load(recipe.data, data, say=lambda text: None)


def ruler(rows, profile="phone_cpu:compact", most=None, **limits):
    return Ruler(*rows, load_profile(profile), Budget(**limits), most)


@pytest.mark.exhaustive
def test_the_widest_student_that_fits_is_found(rows):
    measured = ruler(rows, max_bytes=5000)
    candidate = measured.widest(DENSE, 2, 1)
    wider = Candidate(DENSE, candidate.width + 1, 2)
    assert measured.measure(candidate)["bytes"] <= 5000 < measured.measure(wider)["bytes"]
    assert len(measured.costs) <= 7, "few conversions find it"
    # The teacher's size is a limit too, and the memory is one.
    assert ruler(rows, most=60, max_bytes=10**6).widest(DENSE, 1, 1).width == (60 - 24 - 3) // (6 + 1 + 3)
    by_arena = ruler(rows, profile="microcontroller", max_arena=2100)
    narrow = by_arena.widest(DENSE, 1, 1)
    assert by_arena.measure(narrow)["arena"] <= 2100
    assert by_arena.measure(Candidate(DENSE, narrow.width + 1, 1))["arena"] > 2100


@pytest.mark.exhaustive
def test_the_size_does_not_depend_on_training(rows):
    measured, splits = ruler(rows, max_bytes=10**5), rows[1]
    candidate = Candidate(DENSE, 8, 2)
    costs = measured.measure(candidate, exact=True)
    sizes = set()
    for seed in range(3):
        model, random = measured.model(candidate), np.random.default_rng(seed)
        for variable in model.variables:
            variable.assign(np.abs(random.normal(size=variable.shape)) + 0.1)
        sizes.add(len(build(prepare(model, splits.head), measured.profile).content))
    assert sizes == {len(measured._built[candidate.name].content)}
    assert costs["exact"] and costs["parameters"] == 4 * 6 + 7 * 8 + 9 * 8 + 9 * 3
    assert costs["container"] == costs["bytes"] - costs["parameters"]


@pytest.mark.slow
def test_a_budget_that_nothing_meets_names_the_nearest(rows):
    measured = ruler(rows, max_bytes=1000)
    candidates, narrowest = fitting(measured, [DENSE], say=lambda text: None)
    # One conversion shows that deeper ones, with more weights and a container as large, cannot fit either.
    assert not candidates and [one.name for one in narrowest] == list(measured.costs) == ["dense-w1-d1"]
    text = refusal(measured, narrowest)
    needed = measured.costs["dense-w1-d1"]["bytes"]
    assert "No student meets the budget of 1,000 bytes" in text and f"--max-bytes {needed}" in text
    assert "dense-w1-d1" in text and "container" in text and "nothing was trained" in text


@pytest.mark.slow
def test_compact_files_compute_the_same(rows, tmp_path):
    splits = rows[1]
    student = prepare(ruler(rows, max_bytes=1).model(Candidate(DENSE, 8, 2)), splits.head)
    plain, small = (
        build(student, load_profile(f"phone_cpu{end}"), about={"recipe": {"name": "x" * 500}})
        for end in ("", ":compact")
    )
    assert small.content == compact.with_short_names(plain.content)
    assert len(small.content) < len(plain.content)
    names = [flatbuffer.tensor_name(tensor) for tensor in flatbuffer.parse(small.content).subgraphs[0].tensors]
    assert "fc2" in names and len(set(names)) == len(names)
    outputs = []
    for number, built in enumerate((plain, small)):
        path = tmp_path / f"{number}.tflite"
        path.write_bytes(built.content)
        outputs.append(File(path).predict(splits.test.inputs))
    np.testing.assert_array_equal(*outputs)
