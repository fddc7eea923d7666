"""A hundred damaged reports, caches and command lines, of `benchmarks/fuzz.py`."""

import importlib.util
from pathlib import Path

import pytest

FUZZ = Path(__file__).parents[2] / "benchmarks" / "fuzz.py"


@pytest.mark.slow
def test_a_hundred_inputs_are_answers_or_messages():
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    lines = []
    assert fuzz.run(list(fuzz.LIGHT), 34, seed=7, say=lines.append) == []
    assert len(lines) == 3 and "0 answered" not in lines[0]
