"""Budgets: units, and what contradicts itself."""

import pytest

from kdistill.errors import InputError
from kdistill.recipe.loading import load_profile
from kdistill.shrinking.budget import Budget, check_budget, read_budget


@pytest.mark.parametrize(
    "text, size",
    [("16kB", 16_000), ("16 KB", 16_000), ("64KiB", 65_536), ("1.5MB", 1_500_000), ("16,000", 16_000), (8000, 8000)],
)
def test_bytes_have_units(text, size):
    assert read_budget(text).max_bytes == size
    assert read_budget({"max_arena": text}).max_arena == size


@pytest.mark.parametrize("text, microseconds", [("20ms", 20_000), ("800us", 800), ("0.5 s", 5e5), ("7µs", 7), (12, 12)])
def test_times_have_units(text, microseconds):
    assert read_budget({"max_us": text, "max_arena": None}).max_us == microseconds


@pytest.mark.parametrize(
    "text", ["", "kB", "-3kB", "0", "1e400kB", "nan", "12 parsecs", "16kB extra", True, "--3", "."]
)
def test_what_is_no_size_is_refused(text):
    with pytest.raises(InputError, match="--max-bytes expects a number above 0: 16kB"):
        read_budget({"max_bytes": text})


def test_a_budget_needs_a_limit_that_exists():
    for budget in ({}, {"hours": 2, "min_accuracy": 0.9}):
        with pytest.raises(InputError, match="one limit or more"):
            read_budget(budget)
    with pytest.raises(InputError, match="max_byte"):
        read_budget({"max_byte": 3})
    with pytest.raises(InputError, match="a share of 1"):
        read_budget({"max_bytes": "16kB", "min_accuracy": 98})


def test_costs_are_compared_with_every_limit():
    budget = Budget(max_bytes=100, max_us=5, max_arena=10)
    assert budget.exceeded({"bytes": 100, "microseconds": 5, "arena": 10}) == []
    assert budget.exceeded({"bytes": 101, "microseconds": 6, "arena": 9}) == ["max_bytes", "max_us"]
    assert budget.exceeded({"bytes": 1, "microseconds": None, "arena": 9}) == ["max_us"]  # it does not run
    assert Budget(max_bytes=1).exceeded({"bytes": 1, "microseconds": None, "arena": None}) == []


def test_contradictions_are_refused():
    npu, phone = load_profile("npu"), load_profile("phone_cpu")
    check_budget(Budget(max_arena=800), npu, 784, labeled=True)
    with pytest.raises(InputError, match="fixed batch"):
        check_budget(Budget(max_arena=800), phone, 784, labeled=True)
    with pytest.raises(InputError, match="one input alone takes 784 bytes"):
        check_budget(Budget(max_arena=500), npu, 784, labeled=True)
    with pytest.raises(InputError, match="expects data with labels"):
        check_budget(Budget(max_bytes=500, min_accuracy=0.9), npu, 784, labeled=False)
