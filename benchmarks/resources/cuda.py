"""Registers, shared memory, spills, load widths and cycles of the compiled CUDA kernels.

    python -m benchmarks.resources.cuda             compare with the table, exit 1 if worse
    python -m benchmarks.resources.cuda --write     replace the table
    python -m benchmarks.resources.cuda --explain "lora_linear_small_m<bf16, 1, false>" sm_90a
                                                    what keeps the SM busy in a main loop

No GPU is needed: the CUDA files are compiled for every architecture that we ship, and cuobjdump,
which comes with the Triton wheel, reads the numbers from their machine code. A file whose key is
that of the table is not compiled again unless CI_FULL=1 is set (`sources`).

A kernel is worse than the table if it spills, is gone, has more registers or shared memory, has
fewer 16-byte accesses or matrix instructions, or takes more cycles in the slowest part of the SM
(`cycle_model`). A change that is meant to do this updates the table in the same commit.

Only static shared memory counts. Registers are compared in eights, which is how the hardware hands
them out: two builds of the same source can differ by less, since the order of some of the work of
ptxas depends on addresses.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.resources import cycle_model, sass
from benchmarks.resources.cycle_model import Loop
from benchmarks.resources.sources import CudaFiles, everything
from benchmarks.results import write_atomically

TABLE = Path(__file__).parents[1] / "results" / "kernel_resources.json"
# Column -> 1 if more is worse, -1 if less is worse.
WORSE = {
    "registers": 1,
    "shared": 1,
    "stack": 1,
    "local": 1,
    "loads_16": -1,
    "stores_16": -1,
    "matrix": -1,
}
# A warp gets its registers in this unit for each of its threads.
REGISTER_UNIT = 8
LANES = 32

# Arch -> kernel -> column -> value. Most values are numbers; "cycles" is a mapping, "binds" a word.
Table = dict[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Decoder:
    """How to find out from the machine code of a kernel how many weights its main loop decodes.

    marker          the beginning of the opcode of an instruction that is counted
    weights         how many weights a lane decodes for each of these instructions
    per_token_tile  the instruction is repeated for each token tile. The number of token tiles is
                    the first number among the template arguments of the kernel
    tile            the weights that a CTA decodes in a turn, if the copy engine brings them
    tile_bytes      the bytes of qweight that are copied for these weights
    token_bytes     the bytes that are copied for each token of x
    passes          `cycle_model.Loop.passes`
    """

    marker: str
    weights: int
    per_token_tile: bool = False
    tile: int = 0
    tile_bytes: int = 0
    token_bytes: int = 0
    passes: Mapping[str, float] = field(default_factory=dict)

    def loop(self, kernel: str, code: sass.Code) -> Loop | None:
        """Returns the main loop of the kernel, or None if it has none that decodes weights."""
        match = re.search(r"<\w+, (\d+)", kernel)
        tokens = int(match[1]) if match else 1

        def decoded(turn: sass.Code) -> float:
            tiles = tokens if self.per_token_tile else 1
            return LANES * self.weights * sass.count(turn, self.marker) / tiles

        body = sass.main_loop(code, decoded)
        if not body:
            return None
        copied = (self.tile_bytes + self.token_bytes * tokens) / self.tile if self.tile else 0.0
        return Loop(body, decoded(body), copied=copied, passes=self.passes)


DECODERS = {
    # One ldmatrix.x4 brings a lane 16 bytes of qweight.
    "lora_linear_small_m": Decoder("LDSM", 32),
    # A lane has 8 weights of the fragment of a mma.m16n8k16.
    "nf4_linear_backward_small_m": Decoder("HMMA", 8, per_token_tile=True),
    # Each lane loads 16 bytes and decodes a quarter of them; the four lanes of a quad load the same
    # bytes. If pairs of lanes have equal addresses, a load of 16 bytes takes two passes, not four.
    # (NVIDIA says so about compute capability 7.x, https://forums.developer.nvidia.com/t/77228; it
    # is assumed for 9.0.) The copy engine writes 64 columns of the tile's 128 rows and of its
    # tokens.
    "lora_linear_hopper": Decoder(
        "LDS.128",
        8,
        tile=128 * 64,
        tile_bytes=128 * 32,
        token_bytes=128,
        passes={"LDS.128": 2.0},
    ),
}
# These kernels multiply matrices but decode no NF4, so the cycle model does not apply to them.
WITHOUT_WEIGHTS = ("lora_shrink_many_rows",)


def short_name(mangled: str) -> str:
    """Returns a readable name such as `lora_linear_small_m<bf16, 1, false>` for a mangled name."""
    position, names = 3, []
    # Itanium mangling: _ZN, then each enclosing name after its length.
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
    if code.startswith("S"):  # it stands for an argument that was named before
        return before[-1]
    if code.startswith("Lb"):
        return "true" if code == "Lb1E" else "false"
    return {"f": "fp32", "6__half": "fp16", "13__nv_bfloat16": "bf16"}.get(code, code[2:-1])


def base_name(kernel: str) -> str:
    """Returns the name of a kernel without its template arguments."""
    return kernel.split("<")[0]


def machine_code(module: Path, arch: str) -> dict[str, sass.Code]:
    listing = sass.parse(sass.cuobjdump(module, "-sass", "-arch", arch))
    return {short_name(mangled): code for mangled, code in listing.items()}


def measure(module: Path) -> Table:
    """Reads the columns of every kernel in a compiled extension."""
    table: Table = {}
    arch = ""
    mangled = ""
    for line in sass.cuobjdump(module, "-res-usage").splitlines():
        if match := re.match(r"\s*arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            mangled = match[1]
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            keys = ("registers", "stack", "shared", "local")
            numbers = dict(zip(keys, map(int, match.groups()), strict=True))
            table.setdefault(arch, {})[short_name(mangled)] = numbers

    def add_code(arch: str) -> None:
        for kernel, code in machine_code(module, arch).items():
            table[arch][kernel] |= numbers_of(kernel, code, arch)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # most of the time is spent in cuobjdump
        list(pool.map(add_code, table))
    return table


def measure_files(objects: Mapping[str, Path]) -> Table:
    """The columns of every kernel in the objects, with the CUDA file that it comes from."""
    table: Table = {}
    for file, path in objects.items():
        for arch, kernels in measure(path).items():
            rows = table.setdefault(arch, {})
            if twice := rows.keys() & kernels.keys():
                raise SystemExit(f"{file}: {', '.join(twice)} is in another CUDA file as well")
            rows |= {name: numbers | {"file": file} for name, numbers in kernels.items()}
    return table


def without_files(table: Table, files: Sequence[str]) -> Table:
    """The rows whose kernels do not come from `files`."""
    return {
        arch: {name: row for name, row in kernels.items() if row.get("file") not in files}
        for arch, kernels in table.items()
    }


def numbers_of(kernel: str, code: sass.Code, arch: str) -> dict[str, Any]:
    """Returns the columns that come from a kernel's machine code."""
    names = [instruction.opcode for instruction in code]
    numbers: dict[str, Any] = {
        "instructions": len(code) - sass.count(code, "NOP"),
        "loads_16": sum(bool(re.match(r"LDG.*\.128", name)) for name in names),
        "stores_16": sum(bool(re.match(r"STG.*\.128", name)) for name in names),
        "matrix": sass.count(code, *sass.MATRIX),
    }
    decoder = DECODERS.get(base_name(kernel))
    loop = decoder.loop(kernel, code) if decoder else None
    if loop is not None:
        columns = cycle_model.cycles(loop, cycle_model.ARCHS[arch])
        numbers |= {"cycles": columns, "binds": cycle_model.binds(columns)}
    return numbers


def problems(measured: Table, committed: Table) -> list[str]:
    """Returns a sentence for everything that is worse than in the committed table, or that is wrong
    whatever the table says."""
    sentences = []
    for arch, kernels in measured.items():
        for name, numbers in kernels.items():
            if numbers["local"] or numbers["stack"]:
                sentences.append(f"{arch} {name} spills: {numbers}")
            multiplies = numbers["matrix"] and base_name(name) not in WITHOUT_WEIGHTS
            if multiplies and "cycles" not in numbers:
                sentences.append(f"{arch} {name}: no main loop found, see DECODERS")
    for arch, kernels in committed.items():
        for name, before in kernels.items():
            after = measured.get(arch, {}).get(name)
            if after is None:
                sentences.append(f"{arch} {name} is gone")
                continue
            sentences += [
                f"{arch} {name}: {key} {before[key]} -> {after[key]}"
                for key, sign in WORSE.items()
                if sign * (_compared(key, after) - _compared(key, before)) > 0
            ]
            if "cycles" in before and "cycles" in after:
                slower = cycle_model.problem(after["cycles"], before["cycles"])
                sentences += [f"{arch} {name}: {slower}"] if slower else []
    return sentences


def _compared(key: str, numbers: dict[str, int]) -> int:
    """Returns the number to compare: registers count in REGISTER_UNIT."""
    return -(-numbers[key] // REGISTER_UNIT) if key == "registers" else numbers[key]


def show(table: Table) -> None:
    columns = ("registers", "shared", "instructions", "loads_16", "stores_16", "matrix")
    print(f"{'':47}{'':10}cycles of an SM for {cycle_model.UNIT} weights")
    titles = "".join(f"{column:>13}" for column in (*cycle_model.COLUMNS, *columns))
    print(f"{'arch':8} {'kernel':38}{'binds':>11}{titles}")
    for arch, kernels in table.items():
        for name, numbers in sorted(kernels.items()):
            cycles = numbers.get("cycles", {})
            values = [cycles.get(column, "") for column in cycle_model.COLUMNS]
            values += [numbers[column] for column in columns]
            cells = "".join(f"{value:>13}" for value in values)
            print(f"{arch:8} {name:38}{numbers.get('binds', ''):>11}{cells}")


def explain(code: Mapping[str, sass.Code], kernel: str, arch: str) -> str:
    if arch not in cycle_model.ARCHS:
        raise SystemExit(f"--explain: {arch} must be one of {', '.join(cycle_model.ARCHS)}")
    if kernel not in code:
        raise SystemExit(f"--explain: no {kernel} for {arch}; there are {', '.join(sorted(code))}")
    decoder = DECODERS.get(base_name(kernel))
    loop = decoder.loop(kernel, code[kernel]) if decoder else None
    if loop is None:
        raise SystemExit(f"--explain: {kernel} has no main loop that decodes weights for {arch}")
    return cycle_model.explain(loop, cycle_model.ARCHS[arch])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources.cuda")
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    parser.add_argument("--explain", nargs=2, metavar=("KERNEL", "ARCH"))
    parser.add_argument("--clock", type=float, help="clock in GHz, in place of that of each device")
    parser.add_argument(
        "--bandwidth", type=float, help="bandwidth in TB/s, in place of that of each device"
    )
    arguments = parser.parse_args()
    given = {key: getattr(arguments, key) for key in ("clock", "bandwidth")}
    given = {key: value for key, value in given.items() if value is not None}
    if given and arguments.write:
        parser.error("--write makes the table with each device's own clock and bandwidth")
    for name, arch in cycle_model.ARCHS.items():
        cycle_model.ARCHS[name] = dataclasses.replace(arch, **given)
    files = CudaFiles()
    if files.missing is not None:
        print(f"no CUDA kernel was checked: {files.missing}")
        return 0
    keys = files.keys()
    if arguments.explain:
        code: dict[str, sass.Code] = {}
        for path in files.objects(keys).values():
            code |= machine_code(path, arguments.explain[1])
        print(explain(code, *arguments.explain))
        return 0
    committed = json.loads(TABLE.read_text()) if TABLE.exists() else {"kernels": {}}
    sources = committed.get("sources", {})
    changed = [f for f in keys if arguments.write or everything() or sources.get(f) != keys[f]]
    measured = measure_files(files.objects(changed)) if changed else {}
    show(measured)
    if arguments.write:
        version = files.toolkit.version
        write_json(TABLE, {"cuda": version, "sources": keys, "kernels": measured})
        return 0
    if not TABLE.exists():
        print(f"{TABLE} is missing; --write makes it")
        return 1
    same = sorted(keys.keys() - set(changed))
    print(f"compiled: {' '.join(changed) or 'nothing'}")
    if same:
        print(f"not compiled, since the table was made from the same sources: {' '.join(same)}")
        print("CI_FULL=1 compiles them as well")
    rows = without_files(committed["kernels"], same)
    if committed["cuda"] != files.toolkit.version:
        print(
            f"the table was made with CUDA {committed['cuda']}: only spills and loops are checked"
        )
        rows = {}
    sentences = problems(measured, rows)
    for sentence in sentences:
        print(f"WORSE {sentence}")
    print(f"{sum(map(len, measured.values()))} kernels, {len(sentences)} problems")
    return 1 if sentences else 0


def write_json(path: Path, document: Any) -> None:
    write_atomically(path, json.dumps(document, indent=1, sort_keys=True) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
