"""The ahead-of-time report of the Triton kernels: its table is complete, and it can fail."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from pylora.backends.triton import interpreted

pytest.importorskip("triton")
if interpreted():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl

from benchmarks.resources import sass
from benchmarks.resources import triton as resources
from benchmarks.resources.overwrites import overwrites
from benchmarks.resources.triton_launches import launches


@pytest.mark.parametrize("capability", resources.SHARED)
def test_table_has_every_variant_that_is_launched(capability: int) -> None:
    table = json.loads(resources.TABLE.read_text())["kernels"][f"sm_{capability}"]
    variants = resources.named(launches(capability))
    assert variants.keys() == table.keys()
    for name, numbers in table.items():
        assert not resources.absolute_problems(variants[name], capability, numbers)


def test_hopper_multiplies_on_its_matrix_unit_without_spills() -> None:
    """The test compiles one variant with tiles of 64 tokens."""
    tiles = [v for v in launches(90) if v.kernel == "linear_tiles" and v.blocks["BLOCK_M"] == 64]
    numbers = resources.measure(tiles[0], 90)
    assert numbers["matrix"] > 0 and numbers["spills"] == 0
    assert numbers["cycles"]["tensor"] > 0
    assert not resources.absolute_problems(tiles[0], 90, numbers)
    worse = numbers | {"matrix": 0, "spills": 3, "shared": 300_000, "overwrites": ["a copy"]}
    assert len(resources.absolute_problems(tiles[0], 90, worse)) == 4
    without = {key: value for key, value in numbers.items() if key != "cycles"}
    assert resources.absolute_problems(tiles[0], 90, without) == ["no main loop found"]


def test_hopper_overwrites_no_operand_of_a_running_product() -> None:
    """The test compiles the projections of 16-bit inputs that are also copied, masked or gated."""
    risky = [
        v
        for v in launches(90)
        if v.kernel == "lora_shrink"
        and v.blocks["BLOCK_M"] == 64
        and v.constant("OPERAND") != tl.float32
        and any(flag in str(v) for flag in (" copy", " dropout", " gated"))
    ]
    assert {flag for v in risky for flag in str(v).split()} >= {"x3", "copy", "dropout", "gated"}
    for variant in risky:
        ttgir = resources.compile_variant(variant, 90).asm["ttgir"]
        assert "ttng.warp_group_dot " in ttgir and overwrites(ttgir) == [], str(variant)


LOOP = """
    %x = ttg.local_alloc : () -> !ttg.memdesc<{slots}x64x64xf16, #shared, #smem, mutable>
    %x_0 = ttg.memdesc_index %x[%c0_i32] : !ttg.memdesc<{slots}x64x64xf16>
    %x_1 = ttg.async_copy_global_to_local %pointers, %x_0 mask %m : tensor<64x64x!tt.ptr<f16>>
    %x_2 = ttg.memdesc_index %x[%c1_i32] : !ttg.memdesc<{slots}x64x64xf16>
    %x_3 = ttg.async_copy_global_to_local %pointers, %x_2 mask %m : tensor<64x64x!tt.ptr<f16>>
    %sums = scf.for %i = %c0 to %n step %c64 iter_args(%sum = %zero) -> (tensor<64x64xf32>) : i32 {{
      %x_4 = ttg.memdesc_index %x[%read] : !ttg.memdesc<{slots}x64x64xf16>
      %x_5 = ttg.local_load %x_4 : !ttg.memdesc<64x64xf16> -> tensor<64x64xf16>
      %x_6 = ttg.memdesc_trans %x_4 {{order = array<i32: 1, 0>}} : !ttg.memdesc<64x64xf16>
      %a = ttng.warp_group_dot {operand}, %factor, %sum {{isAsync = true}} : tensor<64x64xf32>
      %b:2 = ttng.warp_group_dot_wait %a, %x_4 {{pendings = {running} : i32}} : tensor<64x64xf32>
      %x_7 = ttg.memdesc_index %x[%write] : !ttg.memdesc<{slots}x64x64xf16>
      %x_8 = ttg.async_copy_global_to_local %later, %x_7 mask %m : tensor<64x64x!tt.ptr<f16>>
      scf.yield %b#0 : tensor<64x64xf32>
    }}
"""


@pytest.mark.parametrize(
    ("slots", "operand", "running", "expected"),
    [
        (2, "%x_6", 1, "a copy to the 2 slots of %x overwrites the operand"),
        (3, "%x_6", 1, None),
        (3, "%x_6", 2, "a copy to the 3 slots of %x overwrites the operand"),
        (2, "%x_6", 0, None),
        (2, "%x_5", 1, "%x_5, which each turn makes anew, is an operand"),
        (2, "%x_5", 0, None),
    ],
)
def test_an_operand_that_may_be_overwritten_is_reported(
    slots: int, operand: str, running: int, expected: str | None
) -> None:
    """Two tiles are copied ahead, and `running` products may run on."""
    found = overwrites(LOOP.format(slots=slots, operand=operand, running=running))
    if expected is None:
        assert found == []
    else:
        assert found == [f"{expected} of a product that may be running"]


def test_only_a_changed_variant_is_compiled(monkeypatch, tmp_path, capsys) -> None:
    """It runs with the table's Triton, and with another Triton for which only limits are kept."""
    variants = launches(90)[:2]
    names = list(resources.named(variants))
    keys = [resources.variant_key(variant, 90) for variant in variants]
    table, limits = tmp_path / "table.json", tmp_path / "limits.json"
    compiled: list[str] = []

    def measure_all(changed, capability):
        compiled[:] = map(str, changed)
        return [dict(numbers) for _ in changed]

    numbers = {"registers": 1, "shared": 0, "spills": 0, "instructions": 9, "matrix": 8}
    numbers |= {"loads_16": 1, "loads_8": 0, "cycles": CYCLES, "binds": "issue"}
    monkeypatch.setattr(resources, "SHARED", {90: 1 << 20})
    monkeypatch.setattr(resources, "launches", lambda capability: variants)
    monkeypatch.setattr(resources, "measure_all", measure_all)
    monkeypatch.setattr(resources, "TABLE", table)
    monkeypatch.setattr(resources, "LIMITS", limits)
    monkeypatch.delenv("CI_FULL", raising=False)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["triton", *arguments])
        assert resources.main() == 0
        return capsys.readouterr().out

    run("--write")
    assert len(compiled) == 2
    assert [json.loads(table.read_text())["kernels"]["sm_90"][n]["key"] for n in names] == keys
    assert "2 variants not compiled, since table.json was made" in run() and compiled == []
    monkeypatch.setenv("CI_FULL", "1")
    assert "not compiled" not in run() and len(compiled) == 2
    monkeypatch.delenv("CI_FULL")
    variants[0] = replace(variants[0], options=(*variants[0].options, ("maxnreg", 24)))
    assert "1 variants not compiled" in run() and compiled == [str(variants[0])]

    monkeypatch.setattr(resources.triton, "__version__", "0.1")
    assert "not compiled" not in run() and len(compiled) == 2
    run("--write-limits")
    assert "2 variants not compiled, since limits.json was made" in run() and compiled == []


CYCLES = {"issue": 90.0, "arithmetic": 80.0, "shared": 40.0, "tensor": 20.0, "memory": 64.4}


def test_numbers_worse_than_the_table_are_reported() -> None:
    before = {"registers": 100, "shared": 1024, "matrix": 4, "cycles": CYCLES}
    assert resources.relative_problems(before, before) == []
    assert resources.relative_problems(before, None) == ["is not in the table"]
    worse = {"registers": 120, "shared": 2048, "matrix": 2, "cycles": CYCLES | {"shared": 95.0}}
    assert resources.relative_problems(worse, before) == [
        "registers 100 -> 120",
        "shared 1024 -> 2048",
        "matrix 4 -> 2",
        "issue 90 -> shared 95 cycles for 2048 weights",
    ]
    assert resources.relative_problems(before | {"cycles": CYCLES | {"issue": 91.0}}, before) == []


def test_main_loop_decodes_one_tile_in_each_turn() -> None:
    """The main loop decodes; the loop over the rank does not. Four warps share the tile."""
    variant = next(
        v
        for v in launches(100)
        if v.kernel == "linear_tiles"
        and resources.decodes(v)
        and (v.blocks["BLOCK_M"], v.blocks["BLOCK_K"]) == (64, 64)
        and dict(v.options)["num_warps"] == 4
    )
    low_rank = ["UTCHMMA tmem[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT"] * 8
    products = ["UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], tmem[UR10], idesc[UR11], UPT"] * 4
    lines = [*low_rank, "@P0 BRA 0x0", "PRMT R0, R0, R0, R0", *products, "@P0 BRA 0x90", "EXIT"]
    listing = [f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)]
    (code,) = sass.parse("\n".join(["Function : kernel", *listing])).values()
    loop = resources.decoding_loop(variant, code)
    assert loop is not None and [i.name for i in loop.code] == ["PRMT", *["UTCHMMA"] * 4, "BRA"]
    columns = variant.blocks["BLOCK_N"]
    assert loop.weights == columns * 64 / 4
    # Each weight is multiplied for 64 tokens, and both operands are read from shared memory once.
    assert loop.macs == 64
    assert loop.read == 2 * (64 * 64 + columns * 64) / (columns * 64)
    assert resources.decoding_loop(variant, code[:9]) is None


def test_cost_model_charges_every_regime() -> None:
    from benchmarks.resources import cost_model

    device = cost_model.Device(4e12, 8e14, 1e13, 132)
    for M, N, names in (
        (1, 4096, ["shrink", "tiles", "expand"]),
        (192, 14336, ["shrink", "tiles"]),
        (8192, 4096, ["shrink", "hidden", "dequantize", "matmul"]),
    ):
        launches_ = cost_model.forward(M, N, 4096, 16, device)
        assert [launch.name for launch in launches_] == names
        total = sum(launch.seconds(device) for launch in launches_)
        assert cost_model.floor_seconds(M, N, 4096, 16, device) < total
        several = cost_model.multi_forward(M, N, 4096, 16, 8, device)
        middle = [name for name in names if name in ("tiles", "dequantize", "matmul")]
        assert [launch.name for launch in several] == ["rows", "shrink", *middle, "expand"]
