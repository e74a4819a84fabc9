"""Calls to time, and the timers that read the clock of the host.

cuda_timing.py has the timers of a GPU.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

EAGER, GRAPH, HOST = "eager", "graph", "host"
# A sample of host time is as many calls as take this many seconds, after some that are not timed
# because they still meet the caches of another contender. A short sample is seldom interrupted by
# another process, and so few calls launch far fewer kernels than a CUDA stream queues (about 1000);
# a launch into a full queue would wait.
HOST_SAMPLE, HOST_MOST_CALLS, HOST_WARMUP = 2e-4, 20, 3


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


@dataclass(frozen=True)
class Sample:
    """The time of one call.

    seconds  of the device; on a CPU that is the whole call; from a HostTimer, of the host
    host     what the host needs to issue the call to a GPU, beside the device's time; else None
    """

    seconds: float
    host: float | None = None


class Timer(Protocol):
    """Takes samples of calls that do the same work, each over memory of its own.

    calls_a_sample  calls that run in one sample; its times are those of one call
    note            what a reader of the samples must know, "" if nothing
    """

    calls_a_sample: int
    note: str

    def sample(self, turn: int) -> Sample: ...


class ClockTimer:
    """Times one call after the other by the clock of the host."""

    calls_a_sample = 1
    note = ""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls

    def sample(self, turn: int) -> Sample:
        """What the call returns is freed after the clock has stopped."""
        call = self._calls[turn % len(self._calls)]
        with call.around():
            prepared = call.prepare()
            begin = time.perf_counter()
            result = call.run(prepared)
            end = time.perf_counter()
        del result
        return Sample(end - begin)


class HostTimer:
    """Times each call several times in a row: what one costs the host.

    On a CPU that is the whole call; on a GPU it ends when the work is in the stream. The loop and
    the functions around the call add 0.1 to 0.2 us. What a call returns, an autograd graph
    included, is freed within the time, as in a user's loop.
    """

    note = ""

    def __init__(
        self, calls: Sequence[Call], synchronize: Callable[[], object] = lambda: None
    ) -> None:
        """`synchronize` waits until the device is idle."""
        self._calls, self._synchronize = calls, synchronize
        fastest = min(self._seconds(calls[0], 1) for _ in range(3))
        self._timed = max(1, min(HOST_MOST_CALLS, int(HOST_SAMPLE / fastest)))
        self.calls_a_sample = HOST_WARMUP + self._timed

    def sample(self, turn: int) -> Sample:
        return Sample(self._seconds(self._calls[turn % len(self._calls)], self._timed))

    def _seconds(self, call: Call, timed: int) -> float:
        run = call.run
        with call.around():
            prepared = call.prepare()
            for _ in range(HOST_WARMUP):
                run(prepared)
            self._synchronize()
            begin = time.perf_counter()
            for _ in range(timed):
                run(prepared)
            end = time.perf_counter()
            self._synchronize()
        return (end - begin) / timed
