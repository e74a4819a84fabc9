"""One timed call, on a CPU by the clock and on CUDA by events."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.machine import cuda_l2_bytes

EAGER, GRAPH, HOST = "eager", "graph", "host"
# A sample of host time is as many calls as take this many seconds, after some that are not timed
# because they still meet the caches of another contender. A short sample is seldom interrupted by
# another process, and so few calls launch far fewer kernels than a CUDA stream queues (about 1000);
# a launch into a full queue would wait.
HOST_SAMPLE, HOST_MOST_CALLS, HOST_WARMUP = 2e-4, 20, 3


class Call:
    """A call to time: `prepare` runs before the clock starts and its result goes to `run`; both
    run in the context that `around` makes.

    calls    made for one sample
    """

    calls = 1

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


class HostLoop(Call):
    """A call, several times in a row: `seconds` is what one costs the host.

    On a CPU that is the whole call; on CUDA it ends when the work is in the stream. The loop and
    the functions around the call add 0.1 to 0.2 us. What a call returns, an autograd graph
    included, is freed within the time, as in a user's loop.
    """

    def __init__(self, call: Call, device: torch.device) -> None:
        super().__init__(call.run, call.prepare, call.around)
        self._timed = 1
        fastest = min(self.seconds(device) for _ in range(3))
        self._timed = max(1, min(HOST_MOST_CALLS, int(HOST_SAMPLE / fastest)))
        self.calls = HOST_WARMUP + self._timed

    def seconds(self, device: torch.device) -> float:
        run = self.run
        with self.around():
            prepared = self.prepare()
            for _ in range(HOST_WARMUP):
                run(prepared)
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(self._timed):
                run(prepared)
            end = time.perf_counter()
            if device.type == "cuda":
                torch.cuda.synchronize()
        return (end - begin) / self._timed


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
