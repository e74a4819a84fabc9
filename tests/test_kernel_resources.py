"""The report of the compiled CUDA kernels: its committed table holds no spill, and it can fail."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks.resources import cuda as resources
from benchmarks.resources import cycle_model

CYCLES = {"issue": 41.5, "arithmetic": 30.5, "shared": 30.0, "tensor": 12.9, "memory": 64.4}
BEFORE = {
    "registers": 122,
    "shared": 1024,
    "stack": 0,
    "local": 0,
    "loads_16": 8,
    "stores_16": 4,
    "matrix": 16,
    "cycles": CYCLES,
    "binds": "memory",
}


def problems(after: dict[str, Any], before: dict[str, Any] = BEFORE) -> list[str]:
    return resources.problems({"sm_90a": {"kernel": after}}, {"sm_90a": {"kernel": before}})


def test_committed_table_holds_no_spill() -> None:
    table = json.loads(resources.TABLE.read_text())["kernels"]
    assert table.keys() == {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"}
    assert resources.problems(table, table) == []


def test_committed_table_says_what_binds() -> None:
    """Of every kernel that decodes weights for products, with the slowest column as its word."""
    table = json.loads(resources.TABLE.read_text())["kernels"]
    for arch, kernels in table.items():
        loops = {name: numbers for name, numbers in kernels.items() if "cycles" in numbers}
        assert {resources.base_name(name) for name in loops} == {
            name for name in resources.DECODERS if name != "lora_linear_hopper" or arch == "sm_90a"
        }
        for numbers in loops.values():
            assert numbers["cycles"].keys() == set(cycle_model.COLUMNS)
            assert numbers["cycles"][numbers["binds"]] == max(numbers["cycles"].values())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("registers", 129),
        ("shared", 1025),
        ("loads_16", 7),
        ("stores_16", 3),
        ("matrix", 15),
    ],
)
def test_worse_than_the_table_is_told(key: str, value: int) -> None:
    assert problems(BEFORE | {key: value}) == [f"sm_90a kernel: {key} {BEFORE[key]} -> {value}"]


@pytest.mark.parametrize("column", ["issue", "arithmetic", "shared", "tensor"])
def test_more_cycles_of_the_slowest_part_are_told(column: str) -> None:
    before = BEFORE | {"cycles": CYCLES | {column: 50.0}}
    after = BEFORE | {"cycles": CYCLES | {column: 51.0}}
    told = f"sm_90a kernel: {column} 50 -> {column} 51 cycles for 2048 weights"
    assert problems(after, before) == [told]
    assert problems(before, after) == problems(before, before) == []


def test_work_may_move_to_a_part_that_has_time() -> None:
    assert problems(BEFORE | {"cycles": CYCLES | {"shared": 41.5}}) == []
    told = ["sm_90a kernel: issue 41.5 -> shared 43 cycles for 2048 weights"]
    assert problems(BEFORE | {"cycles": CYCLES | {"issue": 20.0, "shared": 43.0}}) == told


def test_kernel_whose_main_loop_is_not_found_is_told() -> None:
    without = {key: value for key, value in BEFORE.items() if key not in ("cycles", "binds")}
    assert problems(without) == ["sm_90a kernel: no main loop found, see DECODERS"]
    table = {"sm_90a": {"lora_shrink_many_rows<bf16, 16, true>": without}}
    assert resources.problems(table, table) == []


@pytest.mark.parametrize("key", ["local", "stack"])
def test_spill_is_told(key: str) -> None:
    assert any("spills" in problem for problem in problems(BEFORE | {key: 8}))


def test_kernel_that_is_gone_is_told() -> None:
    found = resources.problems({"sm_90a": {}}, {"sm_90a": {"kernel": BEFORE}})
    assert found == ["sm_90a kernel is gone"]


def test_registers_within_one_unit_of_allocation_are_the_same() -> None:
    assert problems(BEFORE | {"registers": 123}) == problems(BEFORE | {"registers": 128}) == []


def test_better_is_no_problem() -> None:
    better = {"registers": 96, "shared": 0, "loads_16": 16, "cycles": CYCLES | {"issue": 35.0}}
    assert problems(BEFORE | better) == []


def test_decoder_counts_the_weights_of_a_warp() -> None:
    """Eight products of a fragment of 8 weights a lane, for two tiles of tokens: 1,024 weights."""
    listing = "\n".join(
        [
            "Function : kernel",
            *[f"/*{16 * i:04x}*/ HMMA.16816.F32.BF16 R4, R8, R12, R4 ;" for i in range(8)],
            "/*0080*/ @!P0 BRA 0x0 ;",
            "/*0090*/ EXIT ;",
        ]
    )
    code = resources.sass.parse(listing)["kernel"]
    decoder = resources.DECODERS["nf4_linear_backward_small_m"]
    loop = decoder.loop("nf4_linear_backward_small_m<bf16, 2>", code)
    assert loop is not None and loop.weights == 1024
    assert decoder.loop("nf4_linear_backward_small_m<bf16, 2>", code[:8]) is None
