"""The timed loops of the microbenchmarks hold the instructions that they must measure, and no
others.

The programs are compiled for sm_90a. nvdisasm, which comes with the Triton wheel, reads the code.
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.primitives import build
from benchmarks.resources.sass import find_cuobjdump

LOOP = 5  # instructions for the loop itself: counter, comparison, branch
ADDRESSES = 20  # instructions for addresses that change
PRODUCTS = 36  # descriptors, fences, additions of look-ups, a NOP after each wide product

# Kernel without namespaces -> (instructions in its timed loop, the most others that it may have).
TIMED: dict[str, dict[str, tuple[dict[str, int], int]]] = {
    "arithmetic": {
        "Chains<Prmt>": ({"PRMT": 64}, LOOP),
        "Chains<Lop3>": ({"LOP3": 64}, LOOP),
        "Chains<Shift>": ({"SHF": 64}, LOOP),
        "Chains<Imad>": ({"IMAD": 64}, LOOP),
        "Chains<I2F>": ({"I2FP": 64}, LOOP),
        "Chains<Ffma>": ({"FFMA": 64}, LOOP),
        "Chains<PackedFma<10, 1>>": ({"HFMA2": 64}, LOOP),
        "Chains<PackedFma<7, 2>>": ({"HFMA2": 64}, LOOP),
        "Mix<Chains<Prmt>, Chains<PackedFma<10, 1>>>": ({"PRMT": 64, "HFMA2": 64}, LOOP),
        "Mix<Chains<Prmt>, Chains<PackedFma<7, 2>>>": ({"PRMT": 64, "HFMA2": 64}, LOOP),
        "Mix<Chains<Prmt>, Chains<Lop3>>": ({"PRMT": 64, "LOP3": 64}, LOOP),
    },
    "shared_memory": {
        "PrivateTable": ({"LDS": 64, "IADD3": 32}, LOOP),
        "SharedTable": ({"LDS": 64, "IADD3": 32}, LOOP),
        "DecodeTable": ({"LDS": 64, "PRMT": 64, "IADD3": 32}, ADDRESSES + LOOP),
        "Vectors<4, true>": ({"LDS.128": 64, "IADD3": 64}, LOOP),
        "Vectors<4, false>": ({"LDS.128": 64, "IADD3": 64}, LOOP),
        "Vectors<8, true>": ({"LDS.128": 64, "IADD3": 64}, LOOP),
        "Vectors<8, false>": ({"LDS.128": 64, "IADD3": 64}, LOOP),
        "Vectors<32, true>": ({"LDS.128": 64, "IADD3": 64}, LOOP),
        "Matrices": ({"LDSM.16.M88.4": 64}, 64 + ADDRESSES),
        "Shuffles": ({"SHFL": 64}, LOOP),
        "Copies<8>": ({"LDGSTS": 64, "LDGDEPBAR": 8, "DEPBAR": 8}, ADDRESSES),
        "Mix<PrivateTable, Matrices>": ({"LDS": 64, "LDSM.16.M88.4": 64}, 96 + ADDRESSES),
        "Mix<PrivateTable, Shuffles>": ({"LDS": 64, "SHFL": 64, "IADD3": 32}, LOOP),
        "Mix<PrivateTable, Copies<1>>": ({"LDS": 64, "LDGSTS": 8, "IADD3": 32}, ADDRESSES),
        "Mix<PrivateTable, Mma<8>>": ({"LDS": 64, "HMMA.16816.F32.BF16": 64, "IADD3": 32}, LOOP),
        "Mix<DecodeTable, Mma<4>>": ({"LDS": 64, "PRMT": 64, "HMMA": 32}, 32 + ADDRESSES),
    },
    "tensor_cores": {
        "Mma<8>": ({"HMMA.16816.F32.BF16": 64}, LOOP),
        # The last number: no look-ups (0), look-ups by the same warps (1) or by others (2).
        **{
            f"wgmma {n}, {chains}, 0": ({f"HGMMA.64x{n}x16.F32.BF16": 16 * chains}, PRODUCTS)
            for n in (16, 32, 64, 128, 256)
            for chains in ((1, 2) if n <= 64 else (1,))
        },
        **{
            f"wgmma {n}, 1, 1": ({f"HGMMA.64x{n}x16.F32.BF16": 4, "LDS": 16, "PRMT": 16}, PRODUCTS)
            for n in (16, 32, 64, 128, 256)
        },
        **{
            f"wgmma {n}, 1, 2": ({f"HGMMA.64x{n}x16.F32.BF16": 4}, PRODUCTS)
            for n in (16, 32, 64, 128, 256)
        },
    },
    "l2_copies": {
        "copy 1, false": ({"UBLKCP.S.G": 1, "MEMBAR": 0}, 120),
        "copy 2, false": ({"UBLKCP.S.G": 1, "MEMBAR": 0}, 120),
        "copy 4, false": ({"UBLKCP.S.G": 1, "MEMBAR": 0}, 120),
        "copy 2, true": ({"UBLKCP.S.G.MULTICAST": 1, "MEMBAR": 0}, 120),
        "copy 4, true": ({"UBLKCP.S.G.MULTICAST": 1, "MEMBAR": 0}, 120),
        "read_from_l2": ({"LDG.E.128": 4}, 60),
    },
}

Instructions = list[tuple[str, str]]  # (opcode, operands) or ("label", its name)


@pytest.fixture(scope="module")
def compile_cubin(tmp_path_factory):
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    folder = tmp_path_factory.mktemp("cubins")

    def compile_one(name: str) -> Path:
        output = folder / f"{name}.cubin"
        target = build.PROGRAMS[name]
        command = build.command(nvcc, target, "90a", output, "-cubin", "-Xptxas", "-v")
        done = subprocess.run(command, capture_output=True, text=True)
        output_text = done.stdout + done.stderr
        assert done.returncode == 0, output_text
        # ptxas warns if it makes products wait for each other.
        assert "Performance Loss" not in output_text and "warning" not in output_text, output_text
        spilled = re.findall(r"[1-9]\d* bytes spill", output_text)
        assert not spilled, output_text
        return output

    return compile_one


def disassembled(cubin: Path) -> dict[str, Instructions]:
    """Returns the instructions of each kernel by its readable name."""
    tool = find_cuobjdump().with_name("nvdisasm")
    text = subprocess.run([tool, "-c", cubin], capture_output=True, text=True, check=True).stdout
    mangled = re.findall(r"\.section\s+\.text\.([^,\s]+)", text)
    filtered = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True)
    names = dict(zip(mangled, map(readable, filtered.stdout.splitlines()), strict=True))
    kernels: dict[str, Instructions] = {}
    current: Instructions = []
    for line in text.splitlines():
        if match := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            current = kernels.setdefault(names[match[1]], [])
        elif match := re.match(r"(\.L_x_\d+):", line):
            current.append(("label", match[1]))
        elif match := re.match(
            r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?\s*([A-Z0-9_.x]+)(.*?);", line
        ):
            current.append((match[1], match[2]))
    return kernels


def readable(name: str) -> str:
    """Shortens a kernel's name. For a timed template it returns the template's arguments."""
    name = re.sub(r"primitives::|\(anonymous namespace\)::", "", name)
    name = re.sub(r"\(\w+\)(?=\d)", "", name)  # the type in front of an enumerator's number
    name = name.split("(")[0].removeprefix("void ").strip().replace(" >", ">")
    for kernel, short in (("timed", ""), ("wgmma_loop", "wgmma "), ("copy_from_l2", "copy ")):
        if match := re.fullmatch(rf"{kernel}<(.*)>", name):
            return short + match[1]
    return name


def timed_loops(instructions: Instructions) -> list[Counter[str]]:
    """Counts the opcodes of each loop between the first and the last reading of the clock."""
    clocks = [
        i for i, (op, operands) in enumerate(instructions) if op == "CS2R" and "CLOCK" in operands
    ]
    between = instructions[clocks[0] : clocks[-1]]
    places = {operands: i for i, (op, operands) in enumerate(between) if op == "label"}
    loops = []
    for i, (op, operands) in enumerate(between):
        target = re.search(r"\.L_x_\d+", operands)
        if op == "BRA" and target and places.get(target[0], i) < i:
            body = between[places[target[0]] : i + 1]
            loops.append(Counter(op for op, _ in body if op != "label"))
    return loops


def count(loop: Counter[str], opcode: str) -> int:
    """Counts an opcode with any suffix: LDS.128 is an LDS."""
    return sum(n for op, n in loop.items() if op == opcode or op.startswith(opcode + "."))


@pytest.mark.parametrize("program", TIMED)
def test_timed_loops_hold_only_what_they_measure(compile_cubin, program: str):
    kernels = disassembled(compile_cubin(program))
    timed = {name for name, code in kernels.items() if any(op == "CS2R" for op, _ in code)}
    assert timed - {"measure_clock"} == TIMED[program].keys()
    for name, (expected, others) in TIMED[program].items():
        loops = timed_loops(kernels[name])
        matching = [
            loop
            for loop in loops
            if all(count(loop, opcode) == times for opcode, times in expected.items())
        ]
        assert matching, f"{name} has no loop with {expected} among {loops}"
        least = min(loop.total() for loop in matching)
        assert least <= sum(expected.values()) + others, f"{name}: {matching}"


def test_loads_of_a_turn_over_dram_are_under_way_together(compile_cubin):
    """The loop may hold other instructions too."""
    kernels = disassembled(compile_cubin("dram"))
    opcodes = {name: Counter(op for op, _ in code) for name, code in kernels.items()}
    for depth in (1, 2, 4, 8):
        for order in (0, 1):
            plain = opcodes[f"read_plain<{depth}, {order}>"]
            assert count(plain, "LDG.E.NA.128") == depth
            ring = opcodes[f"read_async<{depth}, {order}>"]
            # Half of the copies stand before the loop, and half in it.
            assert count(ring, "LDGSTS.E.BYPASS") == 2 * depth and count(ring, "LDS.128") == depth
    assert count(opcodes["read_bulk<true>"], "UTMALDG.2D") >= 2
    assert count(opcodes["read_bulk<false>"], "UBLKCP") >= 2
