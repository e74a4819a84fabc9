"""Models how long each part of a streaming multiprocessor (SM) is busy with a kernel's main loop.

The main loop of a kernel decodes NF4 weights. The model reads the machine code of one turn of the
loop and counts, for 2,048 decoded weights, the cycles in which each part of the SM is busy:

    issue       the four schedulers, each of which issues one instruction of a warp a cycle
    arithmetic  the busiest of the arithmetic pipes, which `PIPES` lists
    shared      shared memory, which moves 128 bytes a cycle; that is one pass over its 32 banks
    tensor      the tensor cores, at their dense 16-bit rate
    memory      the DRAM, which delivers the weights and their absmax (4.5 bits for each weight)

The parts work at the same time, so the loop takes at least as long as the busiest one. That part
binds the loop: only less work for it can make the loop faster.

What is documented
    Rates of instructions: CUDA C++ Best Practices Guide, "Throughput of Native Arithmetic
    Instructions". Which pipe runs what: Nsight Compute, Kernel Profiling Guide, "Pipelines".
    Multiply-adds, clocks, SMs and bandwidths: NVIDIA's data sheets and architecture white papers.

What is assumed, since no document says it
    - Shared memory has no bank conflict. A load of 4 bytes a lane takes one pass, of 8 bytes two,
      of 16 bytes four, whatever the addresses are. `Loop.passes` gives another number for a kernel
      whose addresses are known to need it.
    - Global loads and stores use the same path as shared memory. A pass moves one register of a
      warp. cp.async (LDGSTS) takes only the passes of its write to shared memory. A shuffle or an
      mbarrier takes one pass.
    - A product of a warpgroup (HGMMA) reads its operands in shared memory once, not once for each
      of the four tensor cores.
    - An instruction counts whether or not its predicate lets it run. Waiting in a loop at a barrier
      does not count.
    - mma.sync (HMMA) reaches the share `Arch.mma_share` of the peak.
    - The DRAM delivers 90 % of the bandwidth in the data sheet.
    - PRMT, SEL and F2FP have the rate of the integer and logic pipe, on which they run. 12.0 adds
      and compares integers at twice that rate, which the model does not take into account.
    - Uniform instructions, branches and instructions of an unknown pipe only take their issue slot.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from benchmarks.resources.sass import Code, Instruction

UNIT = 2048  # weights
SCHEDULERS = 4
PASS_BYTES = 128
BITS = 4.5  # for each weight: 4 bits of its own, and an absmax of 32 bits for 64 weights
DRAM_SHARE = 0.9
COLUMNS = ("issue", "arithmetic", "shared", "tensor", "memory")


@dataclass(frozen=True)
class Arch:
    """The rates of an architecture, and the clock and memory of one device that has it.

    macs       dense 16-bit multiply-adds, summed in fp32, that an SM makes in a cycle
    mma_share  the share of `macs` that mma.sync reaches
    slow       pipe -> cycles for an instruction of a warp, for pipes that differ from `PIPES`
    """

    device: str
    multiprocessors: int
    clock: float  # GHz
    bandwidth: float  # TB/s
    macs: int
    mma_share: float = 1.0
    slow: Mapping[str, float] = field(default_factory=dict)

    def memory_cycles(self) -> float:
        """Returns the cycles after which the DRAM has delivered `UNIT` weights to each SM."""
        bytes_a_cycle = DRAM_SHARE * self.bandwidth * 1e3 / (self.multiprocessors * self.clock)
        return UNIT * BITS / 8 / bytes_a_cycle


# Packed 16-bit arithmetic has half the rate that it has on 9.0.
_PACKED = {"half": 2.0}
ARCHS = {
    # bf16 has half the rate of fp16 outside of the tensor cores, which the model charges to both.
    "sm_80": Arch("A100 SXM 80 GB", 108, 1.41, 2.039, 1024, slow={"fp32": 2.0, "half": 2.0}),
    "sm_86": Arch("A40", 84, 1.74, 0.696, 512, slow=_PACKED),
    "sm_89": Arch("L40S", 142, 2.52, 0.864, 512, slow=_PACKED),
    # mma.sync: about 62 % of wgmma in "Benchmarking and Dissecting the Nvidia Hopper GPU
    # Architecture via Microbenchmarking", arXiv:2402.13499.
    "sm_90": Arch("H200 SXM", 132, 1.83, 4.8, 2048, mma_share=0.62),
    # No source says how fast mma.sync is; it is assumed to have the rate of sm_80.
    "sm_100": Arch("B200", 148, 1.85, 8.0, 4096, mma_share=0.25, slow=_PACKED),
    "sm_120": Arch("RTX PRO 6000", 188, 2.617, 1.792, 512, slow=_PACKED),
}
ARCHS["sm_90a"] = ARCHS["sm_90"]

# Pipe -> (the cycles that it is busy with an instruction of a warp, the names of its instructions).
# Each scheduler has 16 lanes for integers and logic, and 16 for integer multiply-adds, so that the
# 32 lanes of a warp take two cycles. It has four for special functions and most conversions.
PIPES: dict[str, tuple[float, str]] = {
    "alu": (
        2.0,
        "IADD3 IADD VIADD LEA LOP3 LOP SHF SHL SHR PRMT ISETP SEL VIMNMX VIMNMX3 IMNMX VIADDMNMX "
        "MOV FSETP FSEL FMNMX FMNMX3 PLOP3 P2R R2P F2FP IABS BMSK SGXT VABSDIFF CSEL HSETP2 HMNMX2",
    ),
    "imad": (2.0, "IMAD IMUL IDP"),
    "fp32": (1.0, "FFMA FADD FMUL FFMA2 FADD2 FMUL2"),
    "half": (1.0, "HFMA2 HMUL2 HADD2"),
    "special": (8.0, "MUFU F2F F2I I2F I2FP FRND POPC FLO BREV"),
}
_PIPE_OF = {name: pipe for pipe, (_, names) in PIPES.items() for name in names.split()}
_MEMORY = ("LDS", "STS", "LDG", "STG", "LDGSTS", "LD", "ST", "ATOMS")
_MATRICES = ("LDSM", "STSM")  # move matrices of 8 x 8 elements of 16 bits, which are 128 bytes
_ONE_PASS = ("SHFL", "SYNCS", "REDUX")


@dataclass(frozen=True)
class Loop:
    """One turn of the main loop of a kernel, as one warp runs it.

    code     the instructions of the turn
    weights  how many weights the warp decodes in it, with all its lanes
    copied   bytes for each weight that other warps or the copy engine write to shared memory
    read     bytes for each weight that products of tcgen05 (UTCHMMA) read from shared memory
    macs     multiply-adds of UTCHMMA for each weight; its machine code does not name its shape
    passes   the beginning of an opcode -> the passes over shared memory that such an instruction
             takes, if they differ from the general rule
    """

    code: Code
    weights: float
    copied: float = 0.0
    read: float = 0.0
    macs: float = 0.0
    passes: Mapping[str, float] = field(default_factory=dict)


def pipe_of(instruction: Instruction) -> str:
    """Returns the arithmetic pipe of an instruction, or "shared" or "tensor", or "other" if it only
    takes an issue slot."""
    name = instruction.name
    if name in _PIPE_OF:
        return _PIPE_OF[name]
    if name in ("HMMA", "HGMMA", "UTCHMMA"):
        return "tensor"
    return "shared" if name in (*_MEMORY, *_MATRICES, *_ONE_PASS) else "other"


def passes(instruction: Instruction, instead: Mapping[str, float]) -> float:
    """Returns the passes over shared memory that an instruction of a warp takes.

    instead  the `passes` of the loop, which replace the general rule
    """
    opcode = instruction.opcode
    if instruction.never_runs:
        return 0.0
    for prefix, number in instead.items():
        if opcode.startswith(prefix):
            return number
    if instruction.name in _MATRICES:
        return next((n for n in (4.0, 2.0) if opcode.endswith(f".{n:.0f}")), 1.0)
    if instruction.name in _MEMORY:
        return 4.0 if ".128" in opcode else 2.0 if ".64" in opcode else 1.0
    if instruction.name == "HGMMA":
        rows, columns = _shape(opcode)
        in_registers = re.match(r"R\d+, R\d+", instruction.operands) is not None
        # Each operand has 32 bytes along k. Four warps share the passes.
        return 32 * (columns + (0 if in_registers else rows)) / PASS_BYTES / 4
    return 1.0 if instruction.name in _ONE_PASS else 0.0


def _shape(opcode: str) -> tuple[int, int]:
    match = re.match(r"HGMMA\.(?:SP\.)?(\d+)x(\d+)x\d+", opcode)
    if match is None:
        raise ValueError(f"{opcode} has no shape such as HGMMA.64x128x16")
    return int(match[1]), int(match[2])


def tensor_cycles(instruction: Instruction, arch: Arch) -> float:
    """Returns the cycles in which an instruction of a warp keeps the tensor cores of the SM busy. A
    product of TF32 takes twice as long as one of 16 bits."""
    if instruction.name == "HGMMA":
        rows, columns = _shape(instruction.opcode)
        return rows * columns * 16 / 4 / arch.macs
    if instruction.name == "HMMA":
        # HMMA.16816 has 16 rows, 8 columns and the depth 16. TF32 has the depths 8 and 4.
        match = re.match(r"HMMA\.168(\d+)\.", instruction.opcode)
        if match is None:
            raise ValueError(f"{instruction.opcode} has no shape such as HMMA.16816")
        depth = int(match[1]) * (2 if "TF32" in instruction.opcode else 1)
        return 16 * 8 * depth / (arch.macs * arch.mma_share)
    return 0.0


def pipe_cycles(loop: Loop, arch: Arch) -> dict[str, float]:
    """Returns the cycles in which each arithmetic pipe is busy with `UNIT` weights."""
    numbers = Counter(pipe_of(instruction) for instruction in loop.code)
    return {
        pipe: numbers[pipe] * arch.slow.get(pipe, cost) / SCHEDULERS * UNIT / loop.weights
        for pipe, (cost, _) in PIPES.items()
    }


def cycles(loop: Loop, arch: Arch) -> dict[str, float]:
    """Returns the cycles in which each part of COLUMNS is busy with `UNIT` weights."""
    turns = UNIT / loop.weights
    shared = turns * sum(passes(instruction, loop.passes) for instruction in loop.code)
    tensor = turns * sum(tensor_cycles(instruction, arch) for instruction in loop.code)
    columns = {
        "issue": turns * len(loop.code) / SCHEDULERS,
        "arithmetic": max(pipe_cycles(loop, arch).values()),
        "shared": shared + UNIT * (loop.copied + loop.read) / PASS_BYTES,
        "tensor": tensor + UNIT * loop.macs / arch.macs,
        "memory": arch.memory_cycles(),
    }
    return {column: round(columns[column], 1) for column in COLUMNS}


def binds(columns: Mapping[str, float]) -> str:
    """Returns the busiest part, which sets the time of the loop."""
    return max(COLUMNS, key=lambda column: columns[column])


def slowest_on_chip(columns: Mapping[str, float]) -> str:
    """Returns the busiest part except the DRAM. The code of a kernel can change only these."""
    return max(COLUMNS[:-1], key=lambda column: columns[column])


def problem(
    measured: Mapping[str, float], committed: Mapping[str, float], slack: float = 0.5
) -> str | None:
    """Says that the busiest part of the SM takes longer than before; None if it does not.

    Work may move from the busiest part to another one, whose column then grows. Two builds of the
    same source may differ by `slack` cycles.
    """
    column = slowest_on_chip(measured)
    before, after = committed[slowest_on_chip(committed)], measured[column]
    if after <= before + slack:
        return None
    was = slowest_on_chip(committed)
    return f"{was} {before:g} -> {column} {after:g} cycles for {UNIT} weights"


def explain(loop: Loop, arch: Arch) -> str:
    """Lists the instructions of a loop by the part of the SM that they keep busy."""
    columns = cycles(loop, arch)
    busy = pipe_cycles(loop, arch) | {key: columns[key] for key in ("shared", "tensor")}
    turns = UNIT / loop.weights
    numbers: dict[str, Counter[str]] = defaultdict(Counter)  # instructions by part and opcode
    passed: dict[str, float] = defaultdict(float)  # passes over shared memory by opcode
    for instruction in loop.code:
        part = pipe_of(instruction)
        name = instruction.opcode if part in ("shared", "tensor") else instruction.name
        numbers[part][name] += 1
        passed[name] += turns * passes(instruction, loop.passes)
    lines = [
        f"{len(loop.code)} warp instructions for {loop.weights:g} weights. For {UNIT} weights an "
        f"SM of {arch.device} at {arch.clock:g} GHz takes, in cycles:",
        "  ".join(f"{column} {number:g}" for column, number in columns.items()),
        f"{binds(columns)} binds",
        "",
        f"{'':39}instructions   cycles or passes",
    ]
    for part in (*PIPES, "shared", "tensor", "other"):
        cost = f"{busy[part]:19.1f}" if part in busy else ""
        lines.append(f"{part:39}{turns * sum(numbers[part].values()):12.1f}{cost}")
        for name, number in numbers[part].most_common():
            cost = f"{passed[name]:19.1f} in shared" if passed[name] else ""
            lines.append(f"    {name:35}{turns * number:12.1f}{cost}")
        if part == "shared":
            moved = {"copied into it": loop.copied, "read by UTCHMMA": loop.read}
            lines += [
                f"    {name:47}{UNIT * number / PASS_BYTES:19.1f} in shared"
                for name, number in moved.items()
                if number
            ]
    return "\n".join(lines)
