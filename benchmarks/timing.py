"""A call to time, and the timers that read the clock of the host. The timers for a GPU are in
cuda_timing.py.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

EAGER, GRAPH, HOST = "eager", "graph", "host"
# A sample of host time is as many calls as take HOST_SAMPLE seconds, at most HOST_MOST_CALLS.
# Before them come HOST_WARMUP calls that are not timed, since they find the caches as another
# contender left them. Another process seldom interrupts such a short sample. It also launches far
# fewer kernels than the queue of a CUDA stream holds (about 1000), so that no launch has to wait.
HOST_SAMPLE, HOST_MOST_CALLS, HOST_WARMUP = 2e-4, 20, 3


class Call:
    """A call to time. `prepare` runs before the clock starts, and `run` takes what it returns. Both
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
        """Makes the call once without timing it, and returns the raw result."""
        with self.around():
            return self.run(self.prepare())


@dataclass(frozen=True)
class Sample:
    """The time of one call.

    seconds  how long the device took, which on a CPU is the whole call; a HostTimer gives the time
             of the host here
    host     how long the host took to issue the call to a GPU; None if that was not measured
    """

    seconds: float
    host: float | None = None


class Timer(Protocol):
    """Takes samples of calls that do the same work, each over memory of its own.

    calls_a_sample  how many calls run in a sample; its times are those of one of them
    note            what a reader of the samples must know; "" if nothing
    """

    calls_a_sample: int
    note: str

    def sample(self, turn: int) -> Sample: ...


class ClockTimer:
    """Times single calls by the clock of the host, each on the next layer of the rotation."""

    calls_a_sample = 1
    note = ""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls

    def sample(self, turn: int) -> Sample:
        """Times one call. What it returns is freed after the clock has stopped."""
        call = self._calls[turn % len(self._calls)]
        with call.around():
            prepared = call.prepare()
            begin = time.perf_counter()
            result = call.run(prepared)
            end = time.perf_counter()
        del result
        return Sample(end - begin)


class HostTimer:
    """Times what a call costs the host, by making it several times in a row.

    On a CPU the time is that of the whole call. On a GPU a call ends when its work is in the
    stream. The loop around the calls adds 0.1 to 0.2 us to each. What a call returns is freed
    within the time, its autograd graph included, as in a user's loop.
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
