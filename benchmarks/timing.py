"""One timed call, on a CPU by the clock and on CUDA by events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import cuda_l2_bytes

EAGER, GRAPH = "eager", "graph"


class Call:
    """A call to time: `prepare` runs before the clock starts and its result goes to `run`; both
    run in the context that `around` makes."""

    def __init__(
        self,
        run: Callable[[Any], Any],
        prepare: Callable[[], Any] = lambda: None,
        around: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        self.run, self.prepare = run, prepare
        self.around = around or contextlib.nullcontext

    def once(self) -> Any:
        """Runs it untimed; the raw result."""
        with self.around():
            return self.run(self.prepare())

    def seconds(self, device: torch.device) -> float:
        """Time of one call. What it returns is freed after the clock has stopped."""
        with self.around():
            prepared = self.prepare()
            if device.type == "cuda":
                return self._seconds_on_cuda(prepared)
            begin = time.perf_counter()
            result = self.run(prepared)
            end = time.perf_counter()
        del result
        return end - begin

    def _seconds_on_cuda(self, prepared: Any) -> float:
        """Between two events, with a cold L2. The device is idle when the first is recorded, so
        that the host's share of an eager call shows."""
        flush_l2()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        result = self.run(prepared)
        end.record()
        end.synchronize()
        del result
        return begin.elapsed_time(end) / 1e3


def captured(call: Call) -> Call:
    """The same call as a CUDA graph: warmed up on a side stream, captured, replayed.

    Raises RuntimeError where a call cannot be captured. One with something to prepare before every
    run (a backward needs a new forward) must not come here.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call.once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with call.around(), torch.cuda.graph(graph):
        kept = call.run(None)

    def replay(_: None) -> Any:
        graph.replay()
        return kept

    return Call(replay)


_flush_buffer: torch.Tensor | None = None


def flush_l2() -> None:
    """Overwrites twice the device's L2 cache."""
    global _flush_buffer
    if _flush_buffer is None:
        _flush_buffer = torch.empty(2 * cuda_l2_bytes(), dtype=torch.uint8, device="cuda")
    _flush_buffer.zero_()
