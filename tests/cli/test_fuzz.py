"""A hundred damaged reports, caches and command lines, of `benchmarks/fuzz.py`."""

import pytest
from support.scripts import benchmark


@pytest.mark.slow
def test_a_hundred_inputs_are_answers_or_messages():
    fuzz = benchmark("fuzz")
    lines = []
    assert fuzz.run(list(fuzz.LIGHT), 34, seed=7, say=lines.append) == []
    assert len(lines) == 3 and "0 answered" not in lines[0]
