"""Registers, shared memory, spills and cycles of the Triton kernels, by architecture.

    python -m benchmarks.resources.triton            compare with the table, exit 1 if worse
    python -m benchmarks.resources.triton --write    replace the table
    python -m benchmarks.resources.triton --explain "linear_tiles bf16 blocksize64 m16 n128" sm_90
                                                     what keeps the SM busy in the main loop of the
                                                     first variant whose name begins so

No GPU is needed: every variant that the backend launches (`benchmarks.triton_launches`) is compiled
ahead of time and disassembled with the tools of the Triton wheel. Whatever the version of Triton, a
spill, too much shared memory, a missing matrix instruction or main loop is an error; with the
version of the table, more registers or more cycles of the slowest part of the SM than it says are
one as well. Cycles are those of `cycle_model`, which assumes that no access to shared memory meets
a bank conflict; here nobody has checked that by hand.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.resources import cycle_model, sass
from benchmarks.resources.cuda import write_json
from benchmarks.resources.cycle_model import ARCHS, Loop
from benchmarks.triton_launches import Variant, launches

TABLE = Path(__file__).parents[1] / "results" / "triton_resources.json"
# Shared memory of a program, and the matrix instructions of tiles of 64 rows and more.
# What runs on 8.0 runs on 8.6 and 8.9 as well, which have less of it.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# The column is checked in this direction: +1 where more is worse, -1 where less is.
WORSE = {"registers": 1, "shared": 1, "matrix": -1}
# Compilers differ by a few registers between equally good versions of a kernel.
SLACK = {"registers": 8, "shared": 0, "matrix": 0}
CYCLES_SLACK = 1.0

Numbers = dict[str, Any]
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


def disassemble(cubin: bytes) -> tuple[int, sass.Code]:
    """(registers, machine code) of the only kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = sass.cuobjdump(Path(file.name), "-res-usage", "-sass")
    registers = re.search(r"REG:(\d+)", text)
    assert registers is not None, "cuobjdump names no registers"
    (code,) = sass.parse(text).values()
    return int(registers[1]), code


def decoding(code: sass.Code) -> int:
    """Instructions that take the 4-bit codes apart or look them up."""
    return sass.count(code, "PRMT", "LOP3", "SHF")


def decoding_loop(variant: Variant, code: sass.Code) -> Loop | None:
    """The main loop over a weight in NF4, one tile of it a turn; None if there is none.

    Products of tcgen05 (UTCHMMA) do not name their shape. It is the output tile by 32 bytes of the
    sum: 16 numbers, or 8 of TF32 at half the rate. They read x from shared memory, and the decoded
    weight as well if it does not come from tensor memory.
    """
    blocks = variant.blocks
    if not decodes(variant) or "BLOCK_N" not in blocks:
        return None
    body = sass.main_loop(code, decoding)
    if not body:
        return None
    tile = blocks["BLOCK_N"] * blocks["BLOCK_K"]
    summed = blocks["BLOCK_N" if variant.kernel == "linear_tiles_backward" else "BLOCK_K"]
    products = [i.operands for i in body if i.name == "UTCHMMA"]
    rows = sum(
        blocks["BLOCK_M"] + (tile // summed if operands.count("gdesc") > 1 else 0)
        for operands in products
    )
    return Loop(
        body,
        tile / dict(variant.options)["num_warps"],
        read=32 * rows / tile,
        macs=16 * len(products) * blocks["BLOCK_M"] / summed,
    )


def measure(variant: Variant, capability: int) -> Numbers:
    """Registers, bytes, instruction counts and cycles of one variant."""
    compiled = compile_variant(variant, capability)
    registers, code = disassemble(compiled.asm["cubin"])
    counts = Counter(instruction.name for instruction in code)
    loads = [i.opcode for i in code if i.opcode.startswith(("LDG.", "LDGSTS."))]
    numbers: Numbers = {
        "registers": registers,
        "shared": compiled.metadata.shared,
        "spills": counts["STL"] + counts["LDL"],
        "instructions": len(code) - counts["NOP"],
        "matrix": counts[MATRIX[capability]],
        "loads_16": sum(".128" in opcode for opcode in loads),
        "loads_8": sum(".64" in opcode for opcode in loads),
    }
    loop = decoding_loop(variant, code)
    if loop is not None:
        columns = cycle_model.cycles(loop, ARCHS[f"sm_{capability}"])
        numbers |= {"cycles": columns, "binds": cycle_model.binds(columns)}
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
    tiles = variant.kernel in ("linear_tiles", "linear_tiles_backward")
    if numbers["spills"]:
        found.append(f"{numbers['spills']} spills")
    if numbers["shared"] > SHARED[capability]:
        found.append(f"{numbers['shared']} bytes of shared memory")
    if tiles and variant.blocks["BLOCK_M"] >= 64 and not numbers["matrix"]:
        found.append(f"no {MATRIX[capability]}")
    if tiles and decodes(variant) and "cycles" not in numbers:
        found.append("no main loop found")
    return found


def relative_problems(measured: Numbers, committed: Numbers | None) -> list[str]:
    """What is worse than the table says."""
    if committed is None:
        return ["is not in the table"]
    found = [
        f"{key} {committed[key]} -> {measured[key]}"
        for key, sign in WORSE.items()
        if sign * (measured[key] - committed[key]) > SLACK[key]
    ]
    if "cycles" in measured and "cycles" in committed:
        slower = cycle_model.problem(measured["cycles"], committed["cycles"], CYCLES_SLACK)
        found += [slower] if slower else []
    return found


def named(variants: list[Variant]) -> dict[str, Variant]:
    """Variants by name; of those that share one, the later ones are numbered."""
    names: dict[str, Variant] = {}
    for variant in variants:
        same = sum(str(variant) == str(other) for other in names.values())
        names[f"{variant} #{same + 1}" if same else str(variant)] = variant
    return names


COUNTS = ("registers", "shared", "instructions", "matrix", "loads_16", "loads_8")


def show(name: str, numbers: Numbers) -> None:
    cycles = numbers.get("cycles", {})
    cells = [numbers.get("binds", ""), *(cycles.get(key, "") for key in cycle_model.COLUMNS)]
    cells += [numbers[key] for key in COUNTS]
    print(f"{name:78}" + "".join(f"{cell:>13}" for cell in cells), flush=True)


def explain(name: str, arch: str) -> str:
    """The main loop of the first variant whose name begins with `name`."""
    capabilities = {f"sm_{capability}": capability for capability in SHARED}
    if arch not in capabilities:
        raise SystemExit(f"--explain: {arch} must be one of {', '.join(capabilities)}")
    variants = named(launches(capabilities[arch]))
    match = next((full for full in variants if full.startswith(name)), None)
    if match is None:
        raise SystemExit(f"--explain: no variant begins with {name!r}; the table has all names")
    compiled = compile_variant(variants[match], capabilities[arch])
    loop = decoding_loop(variants[match], disassemble(compiled.asm["cubin"])[1])
    if loop is None:
        raise SystemExit(f"--explain: {match} has no main loop that decodes weights for {arch}")
    return f"{match}\n{cycle_model.explain(loop, ARCHS[arch])}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources.triton")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    parser.add_argument("--explain", nargs=2, metavar=("NAME", "ARCH"))
    arguments = parser.parse_args()
    if arguments.explain:
        print(explain(*arguments.explain))
        return 0
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None}
    compares = committed["triton"] == triton.__version__ and not arguments.write
    if not compares and not arguments.write:
        print(f"the table is of Triton {committed['triton']}: only hard limits are checked")
    table: Table = {}
    found = []
    for capability in SHARED:
        arch = f"sm_{capability}"
        print(f"{arch:78}{'':13}cycles of an SM for {cycle_model.UNIT} weights")
        titles = ("binds", *cycle_model.COLUMNS, *COUNTS)
        print(f"{'':78}" + "".join(f"{title:>13}" for title in titles))
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
        write_json(TABLE, document)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
