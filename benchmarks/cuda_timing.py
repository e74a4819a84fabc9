"""Timers for a GPU: the device's time of single calls and of calls in a graph, and the host's time.

The latency of launches and the gaps between them never count as the device's time. All work is
queued behind a kernel that only waits, and each sample checks that everything was in the queue
before the device began. What the timers need from torch is passed in as `cuda`, so that tests can
run them without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from benchmarks.machine import cuda_l2_bytes
from benchmarks.timing import Call, ClockTimer, HostTimer, Sample, Timer

# The device is kept busy for so many cycles of its clock: at 1.9 GHz these are 70 us and 35 ms.
SHORTEST_WAIT, LONGEST_WAIT = 1 << 17, 1 << 26

NOT_COVERED = (
    "the host had not issued the whole call when the device began (the call waits for the device, "
    "or makes too many launches): the device's time includes the host's"
)


class CacheReader:
    """Flushes the L2 cache by reading a buffer of twice its size.

    It reads because lines that were written would have to go back to memory while the next call is
    timed, which would double the traffic of a small weight.
    """

    _ROW_BYTES = 32 << 10

    def __init__(self, cache_bytes: int, device: torch.device | str) -> None:
        rows = -(-2 * cache_bytes // self._ROW_BYTES)
        self.buffer = torch.ones(rows, self._ROW_BYTES // 4, device=device)
        self.sums = torch.empty(rows, device=device)

    def __call__(self) -> None:
        """Launches one kernel, which stores the sum of each row, so that no read can be left out.
        There are so many rows that torch does not split a row over several CTAs, which would take
        more launches."""
        torch.sum(self.buffer, dim=1, out=self.sums)


@lru_cache(maxsize=1)
def _cache_reader() -> CacheReader:
    return CacheReader(cuda_l2_bytes(), "cuda")


class BusyQueue:
    """Measures how long the device takes for the kernels that a function launches.

    1. Launch a kernel that only waits.
    2. Queue the first event, the kernels of the function and the second event behind it.
    3. If the first event has not completed when the last launch has returned, the device found all
       kernels in its queue and never waited for the host: the time between the events is right.
    4. Otherwise double the wait, for this sample and all that follow, and start again.
    5. If even the longest wait is too short, record the events on an idle device, and say so in
       `note`.
    """

    def __init__(self, cuda: Any = torch.cuda, clock: Callable[[], float] | None = None) -> None:
        self._cuda, self._clock = cuda, clock or time.perf_counter
        self.cycles = SHORTEST_WAIT
        self.note = ""

    def sample(self, prepare: Callable[[], Callable[[], Any]]) -> Sample:
        """`prepare` makes everything ready and returns the function to measure."""
        while self.cycles <= LONGEST_WAIT:
            sample, covered = self._between_events(prepare(), self.cycles)
            if covered:
                return sample
            self.cycles *= 2
        self.note = NOT_COVERED
        return self._between_events(prepare(), None)[0]

    def _between_events(self, run: Callable[[], Any], cycles: int | None) -> tuple[Sample, bool]:
        """Returns (the sample, True if the host had issued everything before the device began)."""
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self._cuda.synchronize()  # the queue has room for all launches
        if cycles is not None:
            self._cuda._sleep(cycles)
        begin.record()
        start = self._clock()
        result = run()
        host = self._clock() - start
        end.record()
        covered = not begin.query()
        end.synchronize()
        del result
        return Sample(begin.elapsed_time(end) / 1e3, host), covered


class EagerTimer:
    """Times single calls with a cold L2 cache, each on the next layer of the rotation. It gives
    the device's time and the host's."""

    calls_a_sample = 1

    def __init__(
        self,
        calls: Sequence[Call],
        flush: Callable[[], None] | None = None,
        queue: BusyQueue | None = None,
    ) -> None:
        self._calls, self._queue = calls, queue or BusyQueue()
        self._flush = flush or _cache_reader()

    @property
    def note(self) -> str:
        return self._queue.note

    def sample(self, turn: int) -> Sample:
        call = self._calls[turn % len(self._calls)]

        def prepare() -> Callable[[], Any]:
            prepared = call.prepare()
            self._flush()
            return lambda: call.run(prepared)

        with call.around():
            return self._queue.sample(prepare)


class GraphTimer:
    """Captures all calls of a rotation in one CUDA graph, `passes` times, and divides its time by
    the number of calls. So neither launches nor the resolution of events count.

    The cache is not flushed between the calls. Their weights come from memory if all calls together
    move several times the bytes of the L2 cache. The results of the last pass are kept. Each has
    memory of its own in the graph's pool, so that it can be checked after a replay.
    """

    def __init__(
        self,
        calls: Sequence[Call],
        passes: int = 1,
        cuda: Any = torch.cuda,
        queue: BusyQueue | None = None,
    ) -> None:
        """Raises RuntimeError if a call cannot be captured. The calls must have nothing to prepare,
        as a backward has, which needs a new forward each time."""
        self._cuda, self._queue = cuda, queue or BusyQueue(cuda)
        self.calls_a_sample = passes * len(calls)
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for call in (calls[0], calls[0], *calls):  # their first runs may set something up
                call.once()
        cuda.current_stream().wait_stream(side)
        self._graph = cuda.CUDAGraph()
        self._results: list[Any] = []
        with cuda.graph(self._graph):
            for _ in range(passes):
                self._results = []  # before the next pass: its results take the same memory
                for call in calls:
                    with call.around():
                        self._results.append(call.run(None))

    @property
    def note(self) -> str:
        return self._queue.note

    def replayed(self) -> list[Any]:
        """Replays the graph and returns the raw result of each call. The results are filled with
        NaN before, so that what a call does not write is not taken from an earlier replay."""
        for result in self._results:
            poison(result)
        self._graph.replay()
        self._cuda.synchronize()
        return self._results

    def sample(self, turn: int) -> Sample:
        whole = self._queue.sample(lambda: self._graph.replay)
        return Sample(whole.seconds / self.calls_a_sample)


def poison(result: Any) -> None:
    """Fills the floating-point tensors in a raw result with NaN."""
    if isinstance(result, torch.Tensor):
        if result.is_floating_point():
            with torch.no_grad():
                result.fill_(torch.nan)
    elif isinstance(result, tuple | list):
        for part in result:
            poison(part)


def eager_timer(calls: Sequence[Call], device: torch.device) -> Timer:
    return EagerTimer(calls) if device.type == "cuda" else ClockTimer(calls)


def host_timer(calls: Sequence[Call], device: torch.device) -> Timer:
    return HostTimer(calls, torch.cuda.synchronize) if device.type == "cuda" else HostTimer(calls)
