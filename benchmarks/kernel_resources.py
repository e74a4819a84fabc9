"""Registers, shared memory, spills and load widths of the compiled CUDA kernels, by architecture.

    python benchmarks/kernel_resources.py            compare with the table, exit 1 if worse
    python benchmarks/kernel_resources.py --write    replace the table

No GPU is needed: the numbers are read from the machine code in `pylora._C` by cuobjdump, which
comes with the Triton wheel. Worse means a spill, a kernel gone, or more registers, shared memory or
instructions for 32 weights, or fewer 16-byte accesses or matrix instructions than the table says; a
change that means it updates the table in the same commit. Shared memory is the static one.
Registers count as the hardware hands them out, in eights: below that, two builds of the same source
differ, since ptxas orders some of its work by where the heap happens to lie.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "results" / "kernel_resources.json"
# The column is checked in this direction: +1 where more is worse, -1 where less is.
WORSE = {
    "registers": 1,
    "shared": 1,
    "stack": 1,
    "local": 1,
    "loads_16": -1,
    "stores_16": -1,
    "matrix": -1,
    "per_32_weights": 1,
}
# Of NF4 that a lane gets by one ldmatrix.x4, with which the loops over qweight begin; in a kernel
# without it, that a lane has in a mma.m16n8k16, which there is for each of its token tiles, or that
# it gets of 16 bytes that a quad of lanes shares (nf4_linear_hopper.cu).
WEIGHTS_OF_LDMATRIX = 32
WEIGHTS_OF_MATRIX = 8
WEIGHTS_OF_SHARED_LOAD = 8

MATRIX = "HMMA|HGMMA|UTCHMMA"
# What a warp's registers are allocated in, for each of its threads.
REGISTER_UNIT = 8

Resources = dict[str, dict[str, dict[str, int]]]


def find_cuobjdump() -> Path:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise SystemExit("cuobjdump comes with the triton package, which is not installed")
    return Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def find_extension() -> Path:
    import pylora

    modules = list(Path(pylora.__file__).parent.glob("_C.*.so"))
    if not modules:
        raise SystemExit("pylora._C is not built")
    return modules[0]


def short_name(mangled: str) -> str:
    """`lora_linear_small<bf16, 1, false>` of a mangled kernel name."""
    position, names = 3, []
    # Itanium mangling: _ZN, then each enclosing name behind its length.
    while match := re.match(r"\d+", mangled[position:]):
        start = position + match.end()
        position = start + int(match[0])
        names.append(mangled[start:position])
    arguments = []
    if mangled[position : position + 1] == "I":
        position += 1
        while match := re.match(r"f|6__half|13__nv_bfloat16|S\w*?_|L[ib]\d+E", mangled[position:]):
            position += match.end()
            arguments.append(_template_argument(match[0], arguments))
    name = names[-1] if names else mangled
    return f"{name}<{', '.join(arguments)}>" if arguments else name


def _template_argument(code: str, before: list[str]) -> str:
    if code.startswith("S"):  # one that was named before
        return before[-1]
    if code.startswith("Lb"):
        return "true" if code == "Lb1E" else "false"
    return {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}.get(code, code[2:-1])


def measure(module: Path) -> Resources:
    """arch -> kernel -> numbers, of every kernel in the module."""
    tool = find_cuobjdump()
    usage = subprocess.run(
        [tool, "-res-usage", module], capture_output=True, text=True, check=True
    ).stdout
    table: Resources = {}
    arch = ""
    mangled = ""
    for line in usage.splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            mangled = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            keys = ("registers", "stack", "shared", "local")
            numbers = dict(zip(keys, map(int, match.groups()), strict=True))
            table.setdefault(arch, {})[short_name(mangled)] = numbers
    with ThreadPoolExecutor() as pool:  # most of the time is cuobjdump's
        list(pool.map(lambda arch: _count_instructions(tool, module, arch, table[arch]), table))
    return table


def _count_instructions(
    tool: Path, module: Path, arch: str, kernels: dict[str, dict[str, int]]
) -> None:
    listing = subprocess.run(
        [tool, "-sass", "-arch", arch, module], capture_output=True, text=True, check=True
    ).stdout
    for function in listing.split("Function : ")[1:]:
        code = [
            (int(address, 16), name, operands)
            for address, name, operands in re.findall(
                r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)([^;]*);", function
            )
        ]
        names = [name for _, name, _ in code]

        def count(pattern: str, names: list[str] = names) -> int:
            return sum(bool(re.match(pattern, name)) for name in names)

        kernel = short_name(function.split()[0])
        kernels[kernel] |= {
            "instructions": len(names) - count("NOP"),
            "loads_16": count(r"LDG.*\.128"),
            "stores_16": count(r"STG.*\.128"),
            "matrix": count(MATRIX),
            "per_32_weights": _per_32_weights(code, _token_tiles(kernel)),
        }


def _token_tiles(kernel: str) -> int:
    """The first number among the template arguments; 0: none."""
    match = re.search(r"<\w+, (\d+)", kernel)
    return int(match[1]) if match else 0


def _per_32_weights(code: list[tuple[int, str, str]], token_tiles: int) -> int:
    """Instructions of the loop over qweight, for each 32 weights that a lane decodes.

    All that lie in the loop count, those that run once a tile as well. Of several loops with matrix
    instructions it is the densest: a jump back from cold code spans more than the loop. 0: none.
    """
    ratios = []
    for address, name, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
        if target is None or int(target[1], 16) >= address:
            continue
        body = [name for at, name, _ in code if int(target[1], 16) <= at <= address]
        decoded = WEIGHTS_OF_LDMATRIX * sum(bool(re.match(r"LDSM\S*\.4", name)) for name in body)
        matrix = sum(bool(re.match(MATRIX, name)) for name in body)
        if not decoded and any(name.startswith("HGMMA") for name in body):
            loads = sum(bool(re.match(r"LDS\.128", name)) for name in body)
            decoded = WEIGHTS_OF_SHARED_LOAD * loads
        elif not decoded and token_tiles:
            decoded = WEIGHTS_OF_MATRIX * matrix // token_tiles
        if decoded and matrix:
            ratios.append(32 * len(body) / decoded)
    return round(min(ratios, default=0))


def problems(measured: Resources, committed: Resources) -> list[str]:
    """Sentences for what is worse than the committed table, or spills at all."""
    found = []
    for arch, kernels in measured.items():
        for name, numbers in kernels.items():
            if numbers["local"] or numbers["stack"]:
                found.append(f"{arch} {name} spills: {numbers}")
    for arch, kernels in committed.items():
        for name, before in kernels.items():
            after = measured.get(arch, {}).get(name)
            if after is None:
                found.append(f"{arch} {name} is gone")
                continue
            found += [
                f"{arch} {name}: {key} {before[key]} -> {after[key]}"
                for key, sign in WORSE.items()
                if key in before and sign * (_compared(key, after) - _compared(key, before)) > 0
            ]
    return found


def _compared(key: str, numbers: dict[str, int]) -> int:
    return -(-numbers[key] // REGISTER_UNIT) if key == "registers" else numbers[key]


def show(table: Resources) -> None:
    columns = ("registers", "shared", "local", "instructions", *list(WORSE)[-4:])
    print(f"{'arch':8} {'kernel':38}" + "".join(f"{column:>15}" for column in columns))
    for arch, kernels in table.items():
        for name, numbers in sorted(kernels.items()):
            print(f"{arch:8} {name:38}" + "".join(f"{numbers[column]:15}" for column in columns))


def main() -> int:
    parser = argparse.ArgumentParser(prog="kernel_resources.py")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    arguments = parser.parse_args()
    from pylora import _C

    if not _C.build_info()["cuda"]:
        print("pylora._C was built without nvcc: there are no CUDA kernels to look at")
        return 0
    measured = measure(find_extension())
    show(measured)
    if arguments.write:
        version = _C.build_info()["cuda_version"]
        document: dict[str, Any] = {"cuda": version, "kernels": measured}
        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
        print(f"wrote {TABLE}")
        return 0
    if not TABLE.exists():
        print(f"{TABLE} is missing; --write makes it")
        return 1
    committed = json.loads(TABLE.read_text())
    if committed["cuda"] != _C.build_info()["cuda_version"]:
        print(f"the table is of CUDA {committed['cuda']}: only spills are checked")
        committed = {"kernels": {}}
    found = problems(measured, committed["kernels"])
    for line in found:
        print(f"WORSE {line}")
    print(f"{sum(map(len, measured.values()))} kernels, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
