"""Registers, shared memory, spills and cycles of the Triton kernels, by architecture.

    python -m benchmarks.resources.triton            compare with the table, exit 1 if worse
    python -m benchmarks.resources.triton --write    replace the table
    python -m benchmarks.resources.triton --write-limits
                                                     note which variants this Triton compiles well
    python -m benchmarks.resources.triton --explain "linear_tiles bf16 blocksize64 m16 n128" sm_90
                                                     what keeps the SM busy in the main loop of the
                                                     first variant whose name begins so

No GPU is needed. `triton_launches` lists every variant that the backend launches; each is compiled
ahead of time and disassembled with the tools of the Triton wheel. With any version of Triton it is
an error if a variant spills, takes too much shared memory, lacks a matrix instruction or a main
loop, or may overwrite an operand of a running product (`overwrites`). With the version that made
the table it is also an error if a variant takes more registers, or more cycles in the slowest part
of the SM, than the table says. The cycles come from `cycle_model`, which assumes that no access to
shared memory meets a bank conflict. Nobody has checked that by hand for these kernels.
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
from benchmarks.resources.overwrites import overwrites
from benchmarks.resources.sources import everything, key_of
from benchmarks.resources.triton_launches import Variant, launches

TABLE = Path(__file__).parents[1] / "results" / "triton_resources.json"
# The keys of the variants that passed the hard limits with another Triton than that of the table.
LIMITS = TABLE.with_name("triton_limits.json")
# The most shared memory that a program may take. For 8.0 it is what 8.6 and 8.9 have, which run the
# same code with less memory.
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
# The matrix instruction that tiles of 64 rows and more must use.
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Column -> 1 if more is worse, -1 if less is worse.
WORSE = {"registers": 1, "shared": 1, "matrix": -1}
# Two equally good versions of a kernel may differ by so much.
SLACK = {"registers": 8, "shared": 0, "matrix": 0}
CYCLES_SLACK = 1.0

Numbers = dict[str, Any]
Table = dict[str, dict[str, Numbers]]


def compile_variant(variant: Variant, capability: int) -> Any:
    """Compiles a variant. The machine code is in `asm["cubin"]` of the result."""
    source = ASTSource(
        fn=variant.function,
        signature=dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={place: [["tt.divisibility", 16]] for place in variant.divisible},
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=dict(variant.options)
    )


def variant_key(variant: Variant, capability: int) -> str:
    """Changes if the kernel, what it calls or how it is compiled does (`sources`)."""
    # Triton's own key of a function: its source, and those of the functions that it calls.
    words = [variant.function.cache_key, repr(variant), str(capability), triton.__version__]
    return key_of(words)


def disassemble(cubin: bytes) -> tuple[int, sass.Code]:
    """Returns (registers, machine code) of the only kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = sass.cuobjdump(Path(file.name), "-res-usage", "-sass")
    registers = re.search(r"REG:(\d+)", text)
    assert registers is not None, "cuobjdump names no registers"
    (code,) = sass.parse(text).values()
    return int(registers[1]), code


def decoding(code: sass.Code) -> int:
    """Counts the instructions that take 4-bit codes apart or look them up."""
    return sass.count(code, "PRMT", "LOP3", "SHF")


def decoding_loop(variant: Variant, code: sass.Code) -> Loop | None:
    """Returns the main loop over an NF4 weight, which decodes a tile in each turn; None if the
    variant has none.

    The opcode of a product of tcgen05 (UTCHMMA) does not name its shape. It is the output tile by
    32 bytes along the sum, which are 16 numbers, or 8 of TF32 at half the rate. The products read x
    from shared memory, and the decoded weight too if it is not in tensor memory.
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
    """Compiles a variant and returns its columns of the table."""
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
    overwritten = overwrites(compiled.asm["ttgir"])
    if overwritten:
        numbers |= {"overwrites": overwritten}
    loop = decoding_loop(variant, code)
    if loop is not None:
        columns = cycle_model.cycles(loop, ARCHS[f"sm_{capability}"])
        numbers |= {"cycles": columns, "binds": cycle_model.binds(columns)}
    return numbers


_inherited: list[Variant] = []


def measure_all(variants: list[Variant], capability: int) -> list[Numbers]:
    """Measures all variants on all cores.

    It uses processes, since Triton compiles while it holds Python's lock. The processes are forked,
    since Triton's functions cannot be sent to another process.
    """
    _inherited[:] = variants
    with multiprocessing.get_context("fork").Pool() as pool:
        return pool.map(partial(_measure_inherited, capability), range(len(variants)), chunksize=1)


def _measure_inherited(capability: int, index: int) -> Numbers:
    return measure(_inherited[index], capability)


def decodes(variant: Variant) -> bool:
    """Returns True if the kernel reads a weight in NF4."""
    return bool(variant.constant("BLOCKSIZE"))


def computes_in_fp32(variant: Variant) -> bool:
    """Returns True if the operands of the main product are fp32; the second word of a variant's
    name is the dtype of x."""
    return variant.constant("PRECISION") == "ieee" and str(variant).split()[1] == "fp32"


def absolute_problems(variant: Variant, capability: int, numbers: Numbers) -> list[str]:
    """Returns what is wrong whatever the version of Triton: operands overwritten while a product
    may read them, spills, too much shared memory, no matrix instruction, no main loop."""
    problems = list(numbers.get("overwrites", []))
    tiles = variant.kernel in ("linear_tiles", "linear_tiles_backward")
    if numbers["spills"]:
        problems.append(f"{numbers['spills']} spills")
    if numbers["shared"] > SHARED[capability]:
        problems.append(f"{numbers['shared']} bytes of shared memory")
    if tiles and computes_in_fp32(variant):  # by multiply-adds, in a loop without matrix units
        return problems
    if tiles and variant.blocks["BLOCK_M"] >= 64 and not numbers["matrix"]:
        problems.append(f"no {MATRIX[capability]}")
    if tiles and decodes(variant) and "cycles" not in numbers:
        problems.append("no main loop found")
    return problems


def relative_problems(measured: Numbers, committed: Numbers | None) -> list[str]:
    """Returns what is worse than in the table."""
    if committed is None:
        return ["is not in the table"]
    problems = [
        f"{key} {committed[key]} -> {measured[key]}"
        for key, sign in WORSE.items()
        if sign * (measured[key] - committed[key]) > SLACK[key]
    ]
    if "cycles" in measured and "cycles" in committed:
        slower = cycle_model.problem(measured["cycles"], committed["cycles"], CYCLES_SLACK)
        problems += [slower] if slower else []
    return problems


def named(variants: list[Variant]) -> dict[str, Variant]:
    """Returns the variants by name. If several have the same name, a number follows it."""
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
    """Lists the main loop of the first variant whose name begins with `name`."""
    capabilities = {f"sm_{capability}": capability for capability in SHARED}
    if arch not in capabilities:
        raise SystemExit(f"--explain: {arch} must be one of {', '.join(capabilities)}")
    variants = named(launches(capabilities[arch]))
    match = next((full for full in variants if full.startswith(name)), None)
    if match is None:
        raise SystemExit(f"--explain: no variant begins with {name!r}; {TABLE.name} has all names")
    compiled = compile_variant(variants[match], capabilities[arch])
    loop = decoding_loop(variants[match], disassemble(compiled.asm["cubin"])[1])
    if loop is None:
        raise SystemExit(f"--explain: {match} has no main loop that decodes weights for {arch}")
    return f"{match}\n{cycle_model.explain(loop, ARCHS[arch])}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources.triton")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    parser.add_argument(
        "--write-limits", action="store_true", help="note the variants that pass the hard limits"
    )
    parser.add_argument("--explain", nargs=2, metavar=("NAME", "ARCH"))
    arguments = parser.parse_args()
    if arguments.explain:
        print(explain(*arguments.explain))
        return 0
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None}
    limits = json.loads(LIMITS.read_text()) if LIMITS.exists() else {"triton": None}
    writes = arguments.write or arguments.write_limits
    is_current = committed["triton"] == triton.__version__
    compares = is_current and not writes
    known: dict[str, dict[str, str]] = {}
    if compares or (is_current and arguments.write):
        known = {
            arch: {name: row.get("key", "") for name, row in rows.items()}
            for arch, rows in committed["kernels"].items()
        }
    elif not writes:
        print(f"the table was made with Triton {committed['triton']}: only hard limits are checked")
        if limits["triton"] == triton.__version__:
            known = limits["variants"]
    table: Table = {}
    sentences: list[str] = []
    same = 0
    for capability in SHARED:
        arch = f"sm_{capability}"
        print(f"{arch:78}{'':13}cycles of an SM for {cycle_model.UNIT} weights")
        titles = ("binds", *cycle_model.COLUMNS, *COUNTS)
        print(f"{'':78}" + "".join(f"{title:>13}" for title in titles))
        variants = named(launches(capability))
        if compares:
            gone = committed["kernels"][arch].keys() - variants.keys()
            sentences += [f"{arch} {name}: is gone" for name in sorted(gone)]
        keys = {name: variant_key(variant, capability) for name, variant in variants.items()}
        before = {} if everything() else known.get(arch, {})
        changed = [name for name in variants if before.get(name) != keys[name]]
        same += len(variants) - len(changed)
        measured = measure_all([variants[name] for name in changed], capability)
        table[arch] = {
            name: numbers | {"key": keys[name]}
            for name, numbers in zip(changed, measured, strict=True)
        }
        if arguments.write:  # what has not changed stays in the table
            table[arch] = {
                name: table[arch].get(name) or committed["kernels"][arch][name] for name in variants
            }
        for name, numbers in table[arch].items():
            if name in changed:
                show(name, numbers)
            variant = variants[name]
            problems = absolute_problems(variant, capability, numbers)
            if compares:
                problems += relative_problems(numbers, committed["kernels"][arch].get(name))
            sentences += [f"{arch} {name}: {problem}" for problem in problems]
    for sentence in sentences:
        print(f"WORSE {sentence}")
    print(f"{sum(map(len, table.values()))} variants compiled, {len(sentences)} problems")
    if same:
        what = TABLE.name if compares else LIMITS.name
        print(
            f"{same} variants not compiled, since {what} was made from the same sources with "
            f"Triton {triton.__version__}; CI_FULL=1 compiles them as well"
        )
    if arguments.write:
        write_json(TABLE, {"triton": triton.__version__, "kernels": table})
    if arguments.write_limits and not sentences:
        passed = {arch: {n: row["key"] for n, row in rows.items()} for arch, rows in table.items()}
        write_json(LIMITS, {"triton": triton.__version__, "variants": passed})
    return 1 if sentences else 0


if __name__ == "__main__":
    sys.exit(main())
