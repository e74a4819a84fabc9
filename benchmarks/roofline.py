"""The machine's limits, measured in the run they are compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.contender import Work
from benchmarks.cuda_timing import eager_timer
from benchmarks.machine import last_level_cache
from benchmarks.timing import Call

MATMUL_SHAPES = ((2048, 2048, 2048), (512, 4096, 4096))
CUDA_MATMUL_SHAPES = ((8192, 8192, 8192),)


def _best(call: Call, device: torch.device, times: int) -> float:
    call.once()
    timer = eager_timer([call], device)
    return min(timer.sample(turn).seconds for turn in range(times))


def measure(device: torch.device, times: int = 7) -> dict[str, float]:
    """Read and copy bandwidth, and the dense bf16 matmul peak: the best of `times` calls each."""
    # On a CPU four caches' worth is read from memory; a GPU needs more to reach its rate.
    size = max(4 * last_level_cache(device), 128 << 20 if device.type == "cpu" else 1 << 30)
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(Call(lambda _: target.copy_(source)), device, times)
    read = source.nbytes / min(
        _best(Call(lambda _: source.sum()), device, times),
        _best(Call(lambda _: source.amax()), device, times),
    )
    peak = max(
        2 * m * n * k / _best(Call(_matmul(m, n, k, device)), device, times)
        for m, n, k in (MATMUL_SHAPES if device.type == "cpu" else CUDA_MATMUL_SHAPES)
    )
    return {
        # A copy moves what a reduction on a GPU may be too slow to read.
        "read_bytes_per_s": max(read, copy) if device.type == "cuda" else read,
        "copy_bytes_per_s": copy,
        "matmul_flop_per_s": peak,
    }


def _matmul(m: int, n: int, k: int, device: torch.device):
    x: Tensor = torch.randn(m, k, device=device).to(torch.bfloat16)
    weight: Tensor = torch.randn(n, k, device=device).to(torch.bfloat16)
    return lambda _: torch.nn.functional.linear(x, weight)


def floor_seconds(work: Work, roofline: dict[str, float]) -> float:
    """No implementation of this work is faster: it moves its bytes and computes its FLOP.

    Work that mostly reads is held against the read bandwidth, work that also writes against that
    of a copy.
    """
    mostly_reads = work.bytes_written < 0.1 * work.bytes_read
    bandwidth = roofline["read_bytes_per_s" if mostly_reads else "copy_bytes_per_s"]
    return max(work.bytes / bandwidth, work.flop / roofline["matmul_flop_per_s"])
