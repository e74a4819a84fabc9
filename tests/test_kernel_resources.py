"""The report of the compiled CUDA kernels: its committed table holds no spill, and it can fail."""

from __future__ import annotations

import json

import pytest

from benchmarks import kernel_resources as resources

BEFORE = {
    "registers": 122,
    "shared": 1024,
    "stack": 0,
    "local": 0,
    "loads_16": 8,
    "stores_16": 4,
    "matrix": 16,
    "per_32_weights": 100,
}


def problems(after: dict[str, int]) -> list[str]:
    return resources.problems({"sm_90a": {"kernel": after}}, {"sm_90a": {"kernel": BEFORE}})


def test_committed_table_holds_no_spill() -> None:
    table = json.loads(resources.TABLE.read_text())["kernels"]
    assert table.keys() == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
    assert resources.problems(table, table) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("registers", 129),
        ("shared", 1025),
        ("loads_16", 7),
        ("stores_16", 3),
        ("matrix", 15),
        ("per_32_weights", 101),
    ],
)
def test_worse_than_the_table_is_told(key: str, value: int) -> None:
    assert problems(BEFORE | {key: value}) == [f"sm_90a kernel: {key} {BEFORE[key]} -> {value}"]


@pytest.mark.parametrize("key", ["local", "stack"])
def test_spill_is_told(key: str) -> None:
    assert any("spills" in problem for problem in problems(BEFORE | {key: 8}))


def test_kernel_that_is_gone_is_told() -> None:
    found = resources.problems({"sm_90a": {}}, {"sm_90a": {"kernel": BEFORE}})
    assert found == ["sm_90a kernel is gone"]


def test_registers_within_one_unit_of_allocation_are_the_same() -> None:
    assert problems(BEFORE | {"registers": 123}) == problems(BEFORE | {"registers": 128}) == []


def test_better_is_no_problem() -> None:
    better = {"registers": 96, "shared": 0, "loads_16": 16, "per_32_weights": 90}
    assert problems(BEFORE | better) == []
