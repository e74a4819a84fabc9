"""Measures what torch reaches on the GPU: dense products with K a little above 4096, a large dense
product, and a copy.

LoRA can be added to a dense product as r more columns, which makes K = 4096 + r. The times of
`F.linear` with such a K tell if that costs more than its FLOP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from benchmarks.primitives.protocol import Experiment, Measured

FIRST_K = 4096
KS = (4096, 4104, 4112, 4128, 4160)
NS = (4096, 14336)
MS = (512, 2048, 8192)
LARGE = 8192
COPY_BYTES = 2 << 30
_SAMPLES = 7
# Each call of a sample has operands of its own, which together exceed the L2 cache.
_CALLS = 8
# The device waits about a millisecond before a sample, so that the host is ahead of it.
_HEAD_START_CYCLES = 2_000_000


def device_seconds(calls: list[Callable[[], object]]) -> float:
    """Returns the time of one call, measured by two events around all of them."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START_CYCLES)
    begin.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / len(calls)


def experiments(
    device: torch.device,
    seconds: Callable[[list[Callable[[], object]]], float] = device_seconds,
    ks: tuple[int, ...] = KS,
    ns: tuple[int, ...] = NS,
    ms: tuple[int, ...] = MS,
    large: int = LARGE,
    copy_bytes: int = COPY_BYTES,
) -> list[Experiment]:
    def linear_calls(m: int, n: int, k: int) -> list[Callable[[], object]]:
        def call() -> Callable[[], object]:
            return partial(torch.nn.functional.linear, _bf16(device, m, k), _bf16(device, n, k))

        return [call() for _ in range(_CALLS)]

    def linear(m: int, n: int, k: int) -> Measured:
        """Times this K and the first K in turn, so that the GPU's clock is the same for both."""
        ours, first = linear_calls(m, n, k), linear_calls(m, n, ks[0])
        times, first_times = [], []
        for turn in range(_SAMPLES + 1):
            pair = seconds(ours), seconds(first)
            if turn:  # the first turn warms up
                times.append(pair[0])
                first_times.append(pair[1])
        return Measured(
            [2e-12 * m * n * k / time for time in times],
            {"us": 1e6 * median(times), "time_over_first_k": median(times) / median(first_times)},
        )

    def matmul() -> Measured:
        call = partial(torch.mm, _bf16(device, large, large), _bf16(device, large, large))
        times = [seconds([call]) for _ in range(_SAMPLES + 1)][1:]
        return Measured([2e-12 * large**3 / time for time in times])

    def copy() -> Measured:
        source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=device)
        call = partial(torch.empty_like(source).copy_, source)
        times = [seconds([call]) for _ in range(_SAMPLES + 1)][1:]
        return Measured([2e-9 * copy_bytes / time for time in times])

    products = [
        Experiment(
            f"linear_m{m}_n{n}_k{k}",
            {"M": m, "N": n, "K": k, "dtype": "bfloat16"},
            "TFLOP/s",
            partial(linear, m, n, k),
            f"F.linear; time_over_first_k: over the time with K = {ks[0]}, measured in turn",
        )
        for m in ms
        for n in ns
        for k in ks
    ]
    return [
        Experiment(
            "matmul_large", {"M": large, "N": large, "K": large}, "TFLOP/s", matmul, "bf16 torch.mm"
        ),
        Experiment("copy", {"bytes": copy_bytes}, "GB/s", copy, "read and written bytes"),
        *products,
    ]


def _bf16(device: torch.device, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)
