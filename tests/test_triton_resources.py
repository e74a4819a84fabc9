"""The ahead-of-time report of the Triton kernels: its table is whole, and it can fail."""

from __future__ import annotations

import json

import pytest

from pylora.backends.triton import interpreted

pytest.importorskip("triton")
if interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.resources import triton as resources
from benchmarks.resources.triton import Instruction
from benchmarks.triton_launches import launches


@pytest.mark.parametrize("capability", resources.SHARED)
def test_table_has_every_variant_that_is_launched(capability: int) -> None:
    table = json.loads(resources.TABLE.read_text())["kernels"][f"sm_{capability}"]
    variants = resources.named(launches(capability))
    assert variants.keys() == table.keys()
    for name, numbers in table.items():
        assert not resources.absolute_problems(variants[name], capability, numbers)


def test_hopper_multiplies_on_its_matrix_unit_without_spills() -> None:
    """One tile of 64 rows and more, compiled here and now."""
    tiles = [v for v in launches(90) if v.kernel == "nf4_linear" and v.blocks["BLOCK_M"] == 64]
    numbers = resources.measure(tiles[0], 90)
    assert numbers["matrix"] > 0 and numbers["spills"] == 0
    assert not resources.absolute_problems(tiles[0], 90, numbers)
    worse = numbers | {"matrix": 0, "spills": 3, "shared": 300_000}
    assert len(resources.absolute_problems(tiles[0], 90, worse)) == 3


def test_worse_than_the_table_is_told() -> None:
    before = {"registers": 100, "shared": 1024, "matrix": 4, "per_32_weights": 180.0}
    assert resources.relative_problems(before, before) == []
    assert resources.relative_problems(before, None) == ["is not in the table"]
    worse = {"registers": 120, "shared": 2048, "matrix": 2, "per_32_weights": 190.0}
    assert len(resources.relative_problems(worse, before)) == 4


def test_main_loop_is_the_one_with_the_matrix_instructions() -> None:
    code = [
        Instruction(0x00, "MOV", None),
        Instruction(0x10, "IADD3", None),
        Instruction(0x20, "BRA", 0x10),
        Instruction(0x30, "PRMT", None),
        Instruction(0x40, "HGMMA.64x16x16", None),
        Instruction(0x50, "BRA", 0x30),
        Instruction(0x60, "BRA", 0x00),
        Instruction(0x70, "BRA", 0x90),
    ]
    assert resources.main_loop(code, ("HGMMA",)) == ["PRMT", "HGMMA.64x16x16", "BRA"]
    assert resources.main_loop(code[:1], ("HGMMA",)) == []


def test_cost_model_charges_every_regime() -> None:
    from benchmarks import cost_model

    machine = cost_model.Machine(4e12, 8e14, 1e13, 132)
    for M, names in (
        (1, ["shrink", "tiles", "expand"]),
        (512, ["shrink", "tiles"]),
        (8192, ["shrink", "hidden", "dequantize", "matmul"]),
    ):
        launches_ = cost_model.forward(M, 4096, 4096, 16, machine)
        assert [launch.name for launch in launches_] == names
        total = sum(launch.seconds(machine) for launch in launches_)
        assert cost_model.floor_seconds(M, 4096, 4096, 16, machine) < total
        several = cost_model.multi_forward(M, 4096, 4096, 16, 8, machine)
        middle = [name for name in names if name in ("tiles", "dequantize", "matmul")]
        assert [launch.name for launch in several] == ["rows", "shrink", *middle, "expand"]
