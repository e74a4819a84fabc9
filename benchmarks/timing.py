"""Calls to time, and how a CPU times them: by the clock. cuda_timing.py times them on a GPU."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Sample:
    """The time of one call.

    seconds  of the device; on a CPU that is the whole call
    host     what the host needs to issue the call to a GPU; None if there is no such share
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
