"""The limits of the machine, measured in the same run as the times that are compared with them."""

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
    """Returns the shortest time of a call, in seconds."""
    call.once()
    timer = eager_timer([call], device)
    return min(timer.sample(turn).seconds for turn in range(times))


def measure(device: torch.device, times: int = 7) -> dict[str, float]:
    """Measures the bandwidth of reads and copies and the rate of dense bf16 products. Each is the
    best of `times` calls."""
    # Four times its cache is enough for a CPU. A GPU needs a larger buffer to reach its rate.
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
        # A reduction on a GPU can be slower than a copy, whose reads are as fast.
        "read_bytes_per_s": max(read, copy) if device.type == "cuda" else read,
        "copy_bytes_per_s": copy,
        "matmul_flop_per_s": peak,
    }


def _matmul(m: int, n: int, k: int, device: torch.device):
    x: Tensor = torch.randn(m, k, device=device).to(torch.bfloat16)
    weight: Tensor = torch.randn(n, k, device=device).to(torch.bfloat16)
    return lambda _: torch.nn.functional.linear(x, weight)


def floor_seconds(work: Work, roofline: dict[str, float]) -> float:
    """Returns the time that any implementation of this work needs to move its bytes or to compute
    its FLOP, whichever takes longer.

    The bandwidth is that of reads if the work writes little, otherwise that of a copy.
    """
    mostly_reads = work.bytes_written < 0.1 * work.bytes_read
    bandwidth = roofline["read_bytes_per_s" if mostly_reads else "copy_bytes_per_s"]
    return max(work.bytes / bandwidth, work.flop / roofline["matmul_flop_per_s"])
