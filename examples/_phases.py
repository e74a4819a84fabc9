"""Says what the program is doing, and remembers how long each part of it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Phases:
    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, title: str = "") -> Iterator[None]:
        """Times the block as `name`. A title is printed first."""
        began = time.perf_counter()
        if title:
            print(f"{title} ...", flush=True)
        yield
        self.seconds[name] = time.perf_counter() - began

    def total(self) -> float:
        return time.perf_counter() - self.started
