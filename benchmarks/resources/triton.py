"""Registers, shared memory, spills and instructions of the Triton kernels, by architecture.

    python -m benchmarks.resources.triton            compare with the table, exit 1 if worse
    python -m benchmarks.resources.triton --write    replace the table

No GPU is needed: every variant that the backend launches (`benchmarks.triton_launches`) is compiled
ahead of time and disassembled with the tools of the Triton wheel. Whatever the version of Triton, a
spill, too much shared memory or a missing matrix instruction is an error; with the version of the
table, more registers or instructions than it says are one as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.triton_launches import Variant, launches

TABLE = Path(__file__).parents[1] / "results" / "triton_resources.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory of a program, and the matrix instructions of tiles of 64 rows and more.
# What runs on 8.0 runs on 8.6 and 8.9 as well, which have less of it.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# The column is checked in this direction: +1 where more is worse, -1 where less is.
WORSE = {"registers": 1, "shared": 1, "matrix": -1, "per_32_weights": 1}
# Compilers differ by a few registers between equally good versions of a kernel.
SLACK = {"registers": 8, "shared": 0, "matrix": 0, "per_32_weights": 2}

Numbers = dict[str, float]
Table = dict[str, dict[str, Numbers]]


def compile_variant(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel: its machine code under `asm["cubin"]`."""
    source = ASTSource(
        fn=variant.function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={path: [["tt.divisibility", 16]] for path in variant.divisible},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options)
    )


@dataclass(frozen=True)
class Instruction:
    """One machine instruction; `target` is the address that a branch jumps to."""

    address: int
    opcode: str
    target: int | None


def disassemble(cubin: bytes) -> tuple[int, list[Instruction]]:
    """(registers, machine code) of the only kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", text)
    assert registers is not None, "cuobjdump names no registers"
    code = []
    line = r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*([^;]*);"
    for match in re.finditer(line, text, re.M):
        target = re.search(r"0x([0-9a-f]+)\s*$", match[3]) if match[2].startswith("BRA") else None
        if match[2] != "NOP":
            code.append(
                Instruction(int(match[1], 16), match[2], int(target[1], 16) if target else None)
            )
    return int(registers[1]), code


def main_loop(code: list[Instruction], matrix: tuple[str, ...]) -> list[str]:
    """Opcodes of the shortest of the loops with the most matrix instructions; [] without one."""
    loops = []
    for jump in code:
        if jump.target is not None and jump.target < jump.address:
            body = [i.opcode for i in code if jump.target <= i.address <= jump.address]
            loops.append((sum(name.startswith(matrix) for name in body), -len(body), body))
    return max(loops, default=(0, 0, []))[2]


def measure(variant: Variant, capability: int) -> Numbers:
    """Registers, bytes and instruction counts of one variant."""
    compiled = compile_variant(variant, capability)
    registers, code = disassemble(compiled.asm["cubin"])
    opcodes = [instruction.opcode for instruction in code]
    counts = Counter(opcode.split(".")[0] for opcode in opcodes)
    loads = [opcode for opcode in opcodes if opcode.startswith(("LDG.", "LDGSTS."))]
    numbers: Numbers = {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": counts["STL"] + counts["LDL"],
        "instructions": len(code),
        "matrix": counts[MATRIX[capability]],
        "loads_16": sum(".128" in opcode for opcode in loads),
        "loads_8": sum(".64" in opcode for opcode in loads),
    }
    blocks = variant.blocks
    if decodes(variant) and "BLOCK_N" in blocks:
        threads = 32 * dict(variant.options)["num_warps"]
        weights = blocks["BLOCK_N"] * blocks["BLOCK_K"] / threads
        body = main_loop(code, (MATRIX[capability], "HMMA"))
        decoding = sum(name.startswith(("PRMT", "LOP3", "SHF")) for name in body)
        numbers["per_32_weights"] = round(32 * len(body) / weights, 1)
        numbers["decode_per_32_weights"] = round(32 * decoding / weights, 1)
    return numbers


_inherited: list[Variant] = []


def measure_all(variants: list[Variant], capability: int) -> list[Numbers]:
    """`measure` of each, on all cores.

    In processes, since Triton compiles under Python's lock; they are forked, since its functions
    cannot be sent to another one.
    """
    _inherited[:] = variants
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(partial(_measure_inherited, capability), range(len(variants)), chunksize=1)


def _measure_inherited(capability: int, index: int) -> Numbers:
    return measure(_inherited[index], capability)


def decodes(variant: Variant) -> bool:
    return bool(variant.constant("BLOCKSIZE"))


def absolute_problems(variant: Variant, capability: int, numbers: Numbers) -> list[str]:
    """What no version of Triton may do: spill, ask for too much, or miss the matrix unit meant."""
    found = []
    tiles = variant.kernel in ("nf4_linear", "nf4_linear_backward")
    if numbers["spills"]:
        found.append(f"{numbers['spills']} spills")
    if numbers["shared"] > SHARED[capability]:
        found.append(f"{numbers['shared']} bytes of shared memory")
    if tiles and variant.blocks["BLOCK_M"] >= 64 and not numbers["matrix"]:
        found.append(f"no {MATRIX[capability]}")
    return found


def relative_problems(measured: Numbers, committed: Numbers | None) -> list[str]:
    """What is worse than the table says."""
    if committed is None:
        return ["is not in the table"]
    return [
        f"{key} {committed[key]} -> {measured[key]}"
        for key, sign in WORSE.items()
        if key in committed and sign * (measured[key] - committed[key]) > SLACK[key]
    ]


def named(variants: list[Variant]) -> dict[str, Variant]:
    """Variants by name; of those that share one, the later ones are numbered."""
    names: dict[str, Variant] = {}
    for variant in variants:
        same = sum(str(variant) == str(other) for other in names.values())
        names[f"{variant} #{same + 1}" if same else str(variant)] = variant
    return names


def show(name: str, numbers: Numbers) -> None:
    keys = ("registers", "shared", "instructions", "matrix", "loads_16", "loads_8")
    columns = "".join(f"{numbers[key]:7}" for key in keys)
    columns += f"{numbers.get('per_32_weights', ''):8}{numbers.get('decode_per_32_weights', ''):8}"
    print(f"{name:78}{columns}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources.triton")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    arguments = parser.parse_args()
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None}
    compares = committed["triton"] == triton.__version__ and not arguments.write
    if not compares and not arguments.write:
        print(f"the table is of Triton {committed['triton']}: only hard limits are checked")
    table: Table = {}
    found = []
    for capability in SHARED:
        arch = f"sm_{capability}"
        print(f"{arch:78}   regs shared  instr matrix  ld 16   ld 8  per 32 weights, decode")
        variants = named(launches(capability))
        measured = measure_all(list(variants.values()), capability)
        table[arch] = dict(zip(variants, measured, strict=True))
        for name, numbers in table[arch].items():
            show(name, numbers)
            variant = variants[name]
            problems = absolute_problems(variant, capability, numbers)
            if compares:
                problems += relative_problems(numbers, committed["kernels"][arch].get(name))
            found += [f"{arch} {name}: {problem}" for problem in problems]
        if compares:
            gone = committed["kernels"][arch].keys() - table[arch].keys()
            found += [f"{arch} {name}: is gone" for name in sorted(gone)]
    for line in found:
        print(f"WORSE {line}")
    print(f"{sum(map(len, table.values()))} variants, {len(found)} problems")
    if arguments.write:
        document = {"triton": triton.__version__, "kernels": table}
        TABLE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        print(f"wrote {TABLE}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
