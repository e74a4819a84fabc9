"""The cycle model finds the main loop in machine code and counts the work of each SM part."""

from __future__ import annotations

import pytest

from benchmarks.resources import cycle_model, sass
from benchmarks.resources.cycle_model import ARCHS, Loop
from benchmarks.resources.sass import Code, Instruction

HOPPER = ARCHS["sm_90a"]


def code(*lines: str) -> Code:
    """Parses instructions of 16 bytes each, written in the form that cuobjdump prints."""
    listing = [f"        /*{16 * i:04x}*/   {line} ;  /* 0x00 */" for i, line in enumerate(lines)]
    return sass.parse("\n".join(["Function : kernel", *listing]))["kernel"]


def instruction(line: str) -> Instruction:
    return code(line)[0]


def test_listing_is_parsed() -> None:
    jump = code("NOP", "@!UP0 BRA.U P1, 0x20")[1]
    assert jump == Instruction(16, "BRA.U", "P1, 0x20", "@!UP0", 32)
    assert instruction("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16], R24").name == "HGMMA"
    assert instruction("@!PT LDS RZ, [RZ]").never_runs


LOOP = (
    "MOV R0, R1",  # 00
    "LDG.E R2, [R0]",  # 10: the loop over tiles begins
    "LDSM.16.M88.4 R4, [R0]",  # 20: the main loop begins
    "@P0 BRA 0x60",  # 30: the last turn skips 40 and 50
    "LDGSTS.E.128 [R0], [R2]",  # 40
    "BSSY B0, 0x90",  # 50
    "@!P1 BRA 0x90",  # 60: some turns skip 70 and 80
    "IMAD R9, R9, R9, R9",  # 70
    "BSYNC B0",  # 80
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # 90
    "@!P2 BRA 0xf0",  # a0: jumps away if the wait failed
    "@P3 BRA 0x20",  # b0
    "STG.E [R0], R4",  # c0
    "@P4 BRA 0x10",  # d0
    "EXIT",  # e0
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R5",  # f0: waits again, and returns to the loop
    "@!P2 BRA 0xf0",  # 100
    "BRA 0xb0",  # 110
    "BRA 0x120",  # 120
)


def test_main_loop_is_the_hot_path_of_the_innermost_loop() -> None:
    (loop,) = sass.matrix_loops(code(*LOOP))
    assert [i.address for i in loop] == [0x20, 0x30, 0x40, 0x50, 0x60, 0x90, 0xA0, 0xB0]
    assert sass.matrix_loops(code("MOV R0, R1", "EXIT")) == []


def test_main_loop_is_the_loop_that_decodes_most() -> None:
    """The loop over the rank has more products here, but decodes nothing."""
    lines = (
        "PRMT R0, R0, R0, R0",
        "HMMA.16816.F32 R0, R0, R0, R0",
        "@P0 BRA 0x0",
        "HMMA.16816.F32 R0, R0, R0, R0",
        "HMMA.16816.F32 R0, R0, R0, R0",
        "@P0 BRA 0x30",
        "EXIT",
    )

    def decoded(turn: Code) -> float:
        return float(sass.count(turn, "PRMT"))

    assert [i.address for i in sass.main_loop(code(*lines), decoded)] == [0, 16, 32]
    assert sass.main_loop(code(*lines[3:]), decoded) == []


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("LDS R0, [R1]", 1),
        ("LDS.64 R0, [R1]", 2),
        ("STS.128 [R1], R0", 4),
        ("LDSM.16.M88.4 R0, [R1]", 4),
        ("LDSM.16.MT88.2 R0, [R1]", 2),
        ("STSM.16.MT88.4 [R1], R0", 4),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2]", 4),
        ("SHFL.IDX PT, R0, R1, R2, 0x1f", 1),
        ("@!PT LDS RZ, [RZ]", 0),
        ("IADD3 R0, R1, R2, R3", 0),
        # B has 16 x 256 elements of 2 bytes, a quarter for each warp. A has 64 x 16 elements.
        ("HGMMA.64x256x16.F32.BF16 R24, R120, gdesc[UR16], R24", 16),
        ("HGMMA.64x256x16.F32.BF16 R24, gdesc[UR16], R24", 20),
    ],
)
def test_passes_over_shared_memory_follow_the_access_size(line: str, passes: float) -> None:
    assert cycle_model.passes(instruction(line), {}) == passes
    assert cycle_model.passes(instruction("LDS.128 R0, [R1]"), {"LDS.128": 2.0}) == 2


def test_tensor_cycles_follow_the_data_sheets() -> None:
    """Hopper multiplies 128 x 64 weights with 128 tokens in 512 cycles; mma.sync takes longer."""
    product = instruction("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR16], R24")
    assert 8 * 4 * cycle_model.tensor_cycles(product, HOPPER) == 512
    mma = instruction("HMMA.16816.F32.BF16 R4, R8, R12, R4")
    assert cycle_model.tensor_cycles(mma, ARCHS["sm_80"]) == 2
    assert cycle_model.tensor_cycles(mma, HOPPER) == pytest.approx(1 / 0.62)
    tf32 = instruction("HMMA.1688.F32.TF32 R4, R8, R12, R4")
    assert cycle_model.tensor_cycles(tf32, ARCHS["sm_80"]) == 2
    with pytest.raises(ValueError, match="no shape"):
        cycle_model.tensor_cycles(instruction("HMMA.884.F32 R4, R8, R12, R4"), HOPPER)


@pytest.mark.parametrize(
    ("line", "column", "cycles"),
    [
        ("BRA 0x0", "issue", 16 / 4 * 2),
        ("PRMT R0, R1, R2, R3", "arithmetic", 16 * 2 / 4 * 2),
        ("MUFU.RCP R0, R1", "arithmetic", 16 * 8 / 4 * 2),
        ("LDS R0, [R1]", "shared", 16 * 2),
        ("HGMMA.64x256x16.F32.BF16 R24, R120, gdesc[UR16], R24", "tensor", 16 * 32 * 2),
    ],
)
def test_each_column_can_bind(line: str, column: str, cycles: float) -> None:
    """The loop has sixteen instructions for 1,024 weights; the cycles are counted for 2,048."""
    columns = cycle_model.cycles(Loop(code(*[line] * 16), 1024), HOPPER)
    assert columns[column] == cycles
    assert cycle_model.slowest_on_chip(columns) == column
    assert cycle_model.binds(columns) == (column if cycles > columns["memory"] else "memory")


def test_work_of_other_warps_takes_shared_memory_and_tensor_cores() -> None:
    columns = cycle_model.cycles(Loop([], 1, copied=2.5, read=1.0, macs=128.0), HOPPER)
    assert columns["shared"] == 2048 * 3.5 / 128
    assert columns["tensor"] == 2048 * 128 / 2048


def test_memory_follows_clock_and_bandwidth() -> None:
    """Each of 132 SMs at 1.83 GHz reads 1,152 bytes. Together they get 90 % of 4.8 TB/s."""
    assert HOPPER.memory_cycles() == pytest.approx(1152 * 132 * 1.83 / 4320)


def test_explanation_names_pipes_and_what_binds() -> None:
    loop = Loop(code("LDS.128 R0, [R1]", "PRMT R0, R1, R2, R3", "BRA 0x0"), 64, copied=1.0)
    text = cycle_model.explain(loop, HOPPER)
    assert "shared binds" in text
    words = [line.split() for line in text.splitlines()]
    assert ["alu", "32.0", "16.0"] in words
    assert ["LDS.128", "32.0", "128.0", "in", "shared"] in words
    assert ["copied", "into", "it", "16.0", "in", "shared"] in words
