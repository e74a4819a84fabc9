"""A benchmark times a layer that has been called before, as those of a running model have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks.contender import Contender
from benchmarks.harness import WARM_CALLS, Entry, Harness
from benchmarks.timing import EAGER, Call, Sample

LIMITS = {"read_bytes_per_s": 1e10, "copy_bytes_per_s": 2e10, "matmul_flop_per_s": 1e12}
LAYERS = 7
CONTENDER = Contender("pylora", lambda tensors: None)


class CountingTimer:
    """Claims that each call takes `seconds`, and notes how often its layer was called before."""

    calls_a_sample, note = 1, ""

    def __init__(self, calls: Sequence[Call], counts: list[int], seconds: float) -> None:
        self.calls, self.counts, self.seconds = calls, counts, seconds
        self.before: list[int] = []

    def sample(self, turn: int) -> Sample:
        layer = turn % len(self.calls)
        self.before.append(self.counts[layer])
        self.calls[layer].once()
        return Sample(self.seconds)


@pytest.mark.parametrize(("seconds", "is_warm"), [(1e-3, True), (1e-2, False)])
def test_a_layer_is_warm_before_it_is_timed(seconds: float, is_warm: bool) -> None:
    counts = [0] * LAYERS

    def call_of(layer: int) -> Call:
        def count(_: object) -> None:
            counts[layer] += 1

        return Call(count)

    calls = [call_of(layer) for layer in range(LAYERS)]
    timer = CountingTimer(calls, counts, seconds)
    entry = replace(Entry(CONTENDER), calls=calls, timer=timer)
    harness = Harness(torch.device("cpu"), seed=1, seconds=0.0, limits=LIMITS)
    harness._time([entry], EAGER, budget=LAYERS * seconds)
    assert len(entry.samples) >= LAYERS - 2
    timed = timer.before[-len(entry.samples) :]
    assert (min(timed) >= WARM_CALLS) == is_warm
