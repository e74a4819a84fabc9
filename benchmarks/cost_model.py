"""Bytes, FLOP and instructions of the Triton kernels by regime, beside the floor of the machine.

    python -m benchmarks.cost_model [--rank 16] [--bandwidth TB/s] [--matmul TFLOP/s] ...

Arithmetic, not a measurement: the rules of `pylora.kernels.configs` say which launches a layer
takes, each is charged what it must read, write, multiply and, over NF4, decode. A launch is as slow
as the slowest of the three; the launches of a layer follow each other. The defaults are an H200's
data sheet; instructions come from the committed table of `benchmarks.resources.triton`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass

from benchmarks.resources import cycle_model
from benchmarks.resources.triton import TABLE
from benchmarks.shapes import MODELS
from pylora.kernels import configs
from pylora.kernels.launch import Facts

ROWS = (1, 4, 16, 64, 128, 512, 2048, 8192)
BLOCKSIZE = 64
BITS = 4 + 32 / BLOCKSIZE  # of a weight, absmax in fp32


@dataclass(frozen=True)
class Machine:
    bandwidth: float  # bytes / s
    matmul: float  # dense 16-bit FLOP / s
    issue: float  # instructions of a thread / s, over all multiprocessors
    multiprocessors: int


@dataclass(frozen=True)
class Launch:
    """bytes moved, FLOP of the matrix units, instructions of a thread over all threads."""

    name: str
    bytes: float
    flop: float = 0.0
    instructions: float = 0.0

    def seconds(self, machine: Machine) -> float:
        return max(
            self.bytes / machine.bandwidth,
            self.flop / machine.matmul,
            self.instructions / machine.issue,
        )


def per_weight(tile: configs.TileConfig) -> float:
    """Instructions of the forward main loop per decoded weight on sm_90."""
    name = f"linear_tiles bf16 blocksize{BLOCKSIZE} m{tile.block_m} n{tile.block_n} k{tile.block_k}"
    table = json.loads(TABLE.read_text())["kernels"]["sm_90"]
    issue = next(n["cycles"]["issue"] for key, n in table.items() if key.startswith(name))
    return issue * cycle_model.SCHEDULERS * 32 / cycle_model.UNIT


def forward(M: int, N: int, K: int, rank: int, machine: Machine) -> list[Launch]:
    """The launches of lora_linear over NF4 in bf16 (of nf4_linear where rank is 0)."""
    weight, x, y = N * K * BITS / 8, 2 * M * K, 2 * M * N
    flop, low_rank = 2 * M * N * K, 2 * M * rank
    facts = Facts(90, machine.multiprocessors)
    launches = []
    large = configs.is_large(M, 2)
    if rank:
        _, splits, _ = configs.shrink_config(M, K, rank, False, facts)
        copy = x if large else 0
        parts = 4 * splits * M * rank
        launches.append(Launch("shrink", x + copy + 2 * rank * K + parts, low_rank * K))
    if large:
        width = configs.cdiv(rank, 16) * 16
        if rank:
            launches.append(Launch("hidden", parts + 6 * M * rank))
        buffer = 2 * N * (K + width)
        # The decoder of nf4_dequantize is held by its writes long before its instructions.
        launches.append(Launch("dequantize", weight + buffer))
        product = 2 * M * N * (K + width)
        launches.append(Launch("matmul", x + 2 * M * width + buffer + y, product))
        return launches
    plan = configs.forward_plan(M, [N], K, 2, BLOCKSIZE, facts)
    tile = plan.tile
    decoded = N * K * configs.cdiv(M, tile.block_m) * per_weight(tile)
    partial = 4 * plan.splits * M * N if plan.splits > 1 else 0
    factor = 2 * rank * N + (parts if rank else 0)
    end = y + (factor if not partial else 0)
    # Tiles of fewer than block_m rows multiply whole tiles all the same.
    padded = configs.cdiv(M, tile.block_m) * tile.block_m / M
    launches.append(Launch("tiles", weight + x + (partial or end), flop * padded, decoded))
    if partial:
        launches.append(Launch("expand", partial + factor + y, low_rank * N))
    return launches


def multi_forward(
    M: int, N: int, K: int, rank: int, adapters: int, machine: Machine
) -> list[Launch]:
    """The launches of multi_lora_linear, the rows spread evenly over the adapters."""
    facts = Facts(90, machine.multiprocessors)
    base = forward(M, N, K, 0, machine)
    used, y = min(adapters, M), 2 * M * N
    _, splits, _ = configs.shrink_config(M, K, rank, False, facts, adapters)
    parts = 4 * splits * M * rank
    shrink = Launch("shrink", 2 * M * K + 2 * used * rank * K + parts, 2 * M * rank * K)
    # It finishes partial sums as for one adapter; a finished output is read and written again.
    finished = base[-1].name != "expand"
    moved = (2 * y if finished else base.pop().bytes) + 2 * used * rank * N + parts
    expand = Launch("expand", moved, 2 * M * rank * N)
    return [Launch("rows", 16 * M + 4 * adapters), shrink, *base, expand]


def floor_seconds(M: int, N: int, K: int, rank: int, machine: Machine) -> float:
    """Everything read and written once, nothing decoded."""
    moved = N * K * BITS / 8 + 2 * M * (N + K) + 2 * rank * (N + K)
    return max(moved / machine.bandwidth, 2 * M * (N * K + rank * (N + K)) / machine.matmul)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--adapters", type=int, help="as many adapters, one for each row")
    parser.add_argument("--bandwidth", type=float, default=4.8, help="TB/s")
    parser.add_argument("--matmul", type=float, default=989.0, help="dense bf16 TFLOP/s")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--clock", type=float, default=1.83, help="GHz")
    arguments = parser.parse_args()
    machine = Machine(
        arguments.bandwidth * 1e12,
        arguments.matmul * 1e12,
        # Four schedulers a multiprocessor, one instruction of 32 threads a cycle each.
        arguments.multiprocessors * 4 * 32 * arguments.clock * 1e9,
        arguments.multiprocessors,
    )
    print(f"arithmetic, nothing measured; rank {arguments.rank}, NF4 in blocks of 64")
    print("us of each launch and what bounds it: m memory, x matrix units, i instruction issue")
    for N, K in MODELS["Llama-3 8B"]:
        for M in ROWS:
            if arguments.adapters:
                launches = multi_forward(M, N, K, arguments.rank, arguments.adapters, machine)
            else:
                launches = forward(M, N, K, arguments.rank, machine)
            total = sum(launch.seconds(machine) for launch in launches)
            floor = floor_seconds(M, N, K, arguments.rank, machine)
            parts = [
                f"{launch.name} {launch.seconds(machine) * 1e6:.2f}{bound(launch, machine)}"
                for launch in launches
            ]
            where = f"{N:6} x {K:<6} M={M:<5} floor {floor * 1e6:8.2f}"
            print(f"{where}  model {total * 1e6:8.2f}  {floor / total:4.0%}  {'  '.join(parts)}")


def bound(launch: Launch, machine: Machine) -> str:
    """What holds a launch: m(emory), x (matrix units) or i(ssue)."""
    sides = {
        "m": launch.bytes / machine.bandwidth,
        "x": launch.flop / machine.matmul,
        "i": launch.instructions / machine.issue,
    }
    return max(sides, key=lambda side: sides[side])


if __name__ == "__main__":
    main()
