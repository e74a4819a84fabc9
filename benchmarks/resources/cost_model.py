"""Estimates how long the Triton kernels of a layer take, beside the least time that is possible.

    python -m benchmarks.resources.cost_model [--rank 16] [--bandwidth TB/s] [--matmul TFLOP/s] ...

This is arithmetic, not a measurement. The rules of `pylora.kernels.configs` say which launches a
layer takes. For each launch the model counts the bytes that it must read and write, the FLOP of its
matrix products and, over NF4, the instructions that decode the weight. A launch takes as long as
the slowest of the three, and the launches of a layer follow each other. The rates are those of an
H200's data sheet unless they are given; the numbers of instructions come from the committed table
of `benchmarks.resources.triton`.
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

TOKENS = (1, 4, 16, 64, 128, 192, 512, 2048, 8192)
BLOCKSIZE = 64
BITS = 4 + 32 / BLOCKSIZE  # for each weight, with its share of an fp32 absmax


@dataclass(frozen=True)
class Device:
    """The rates of a GPU, each for the whole GPU and for a second."""

    bandwidth: float  # bytes
    matmul: float  # dense 16-bit FLOP
    issue: float  # instructions, counted for each thread
    multiprocessors: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the bytes that it moves, the FLOP of its matrix products, and the
    instructions of all its threads."""

    name: str
    bytes: float
    flop: float = 0.0
    instructions: float = 0.0

    def seconds(self, device: Device) -> float:
        return max(
            self.bytes / device.bandwidth,
            self.flop / device.matmul,
            self.instructions / device.issue,
        )


def per_weight(tile: configs.TileConfig) -> float:
    """Returns the instructions of the forward's main loop for a decoded weight on sm_90."""
    name = f"linear_tiles bf16 blocksize{BLOCKSIZE} m{tile.block_m} n{tile.block_n} k{tile.block_k}"
    table = json.loads(TABLE.read_text())["kernels"]["sm_90"]
    issue = next(n["cycles"]["issue"] for key, n in table.items() if key.startswith(name))
    return issue * cycle_model.SCHEDULERS * 32 / cycle_model.UNIT


def forward(M: int, N: int, K: int, rank: int, device: Device) -> list[Launch]:
    """Returns the launches of lora_linear over NF4 in bf16, or if rank is 0 of nf4_linear."""
    weight, x, y = N * K * BITS / 8, 2 * M * K, 2 * M * N
    flop, low_rank = 2 * M * N * K, 2 * M * rank
    facts = Facts(90, device.multiprocessors)
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
        # The instructions of nf4_dequantize are not counted: its writes take much longer.
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
    # The last tile multiplies block_m rows even if it has fewer tokens.
    padded = configs.cdiv(M, tile.block_m) * tile.block_m / M
    launches.append(Launch("tiles", weight + x + (partial or end), flop * padded, decoded))
    if partial:
        launches.append(Launch("expand", partial + factor + y, low_rank * N))
    return launches


def multi_forward(M: int, N: int, K: int, rank: int, adapters: int, device: Device) -> list[Launch]:
    """Returns the launches of multi_lora_linear if the tokens are spread evenly over adapters."""
    facts = Facts(90, device.multiprocessors)
    base = forward(M, N, K, 0, device)
    used, y = min(adapters, M), 2 * M * N
    _, splits, _ = configs.shrink_config(M, K, rank, False, facts, adapters)
    parts = 4 * splits * M * rank
    shrink = Launch("shrink", 2 * M * K + 2 * used * rank * K + parts, 2 * M * rank * K)
    # The expand kernel adds up partial sums, as it does for one adapter. If the output is finished
    # already, it reads and writes the output again.
    finished = base[-1].name != "expand"
    moved = (2 * y if finished else base.pop().bytes) + 2 * used * rank * N + parts
    expand = Launch("expand", moved, 2 * M * rank * N)
    return [Launch("rows", 16 * M + 4 * adapters), shrink, *base, expand]


def floor_seconds(M: int, N: int, K: int, rank: int, device: Device) -> float:
    """Returns the least time: every operand is read or written once, and decoding costs nothing."""
    moved = N * K * BITS / 8 + 2 * M * (N + K) + 2 * rank * (N + K)
    return max(moved / device.bandwidth, 2 * M * (N * K + rank * (N + K)) / device.matmul)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources.cost_model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--adapters", type=int, help="number of adapters, one for each token; default: plain LoRA"
    )
    parser.add_argument("--bandwidth", type=float, default=4.8, help="of the memory, in TB/s")
    parser.add_argument(
        "--matmul", type=float, default=989.0, help="rate of dense bf16 products, in TFLOP/s"
    )
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--clock", type=float, default=1.83, help="in GHz")
    arguments = parser.parse_args()
    device = Device(
        arguments.bandwidth * 1e12,
        arguments.matmul * 1e12,
        # Four schedulers a multiprocessor, one instruction of 32 threads a cycle each.
        arguments.multiprocessors * 4 * 32 * arguments.clock * 1e9,
        arguments.multiprocessors,
    )
    print(f"estimates, not measurements; rank {arguments.rank}, NF4 in blocks of 64")
    print("us of each launch and what takes that long: m memory, x matrix units, i instructions")
    for N, K in MODELS["Llama-3 8B"]:
        for M in TOKENS:
            if arguments.adapters:
                launches = multi_forward(M, N, K, arguments.rank, arguments.adapters, device)
            else:
                launches = forward(M, N, K, arguments.rank, device)
            total = sum(launch.seconds(device) for launch in launches)
            floor = floor_seconds(M, N, K, arguments.rank, device)
            parts = [
                f"{launch.name} {launch.seconds(device) * 1e6:.2f}{bound(launch, device)}"
                for launch in launches
            ]
            where = f"{N:6} x {K:<6} M={M:<5} floor {floor * 1e6:8.2f}"
            print(f"{where}  model {total * 1e6:8.2f}  {floor / total:4.0%}  {'  '.join(parts)}")


def bound(launch: Launch, device: Device) -> str:
    """Returns what a launch waits for: m (memory), x (matrix units) or i (issue)."""
    sides = {
        "m": launch.bytes / device.bandwidth,
        "x": launch.flop / device.matmul,
        "i": launch.instructions / device.issue,
    }
    return max(sides, key=lambda side: sides[side])


if __name__ == "__main__":
    main()
