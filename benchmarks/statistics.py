"""Medians, quantiles and noise of samples of time."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Two copies of one contender may differ by this much before a cell's ratios are in doubt.
CONTROL_TOLERANCE = 0.05
# A load average before the run from which other processes disturb the times.
BUSY = 0.7
# No change below this is called one: clocks and page placement differ between two processes.
SMALLEST_CHANGE = 0.02


def quantile(samples: Sequence[float], q: float) -> float:
    """Linear interpolation between the order statistics, as numpy's default."""
    if not samples:
        raise ValueError("samples is empty; a quantile needs at least one")
    ordered = sorted(samples)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclass(frozen=True)
class Summary:
    samples: int
    median: float
    p20: float
    p80: float


def summarize(samples: Sequence[float]) -> Summary:
    p20, median, p80 = (quantile(samples, q) for q in (0.2, 0.5, 0.8))
    return Summary(len(samples), median, p20, p80)


def relative_noise(summary: Summary) -> float:
    """Standard error of the median over the median.

    For a normal distribution p80 - p20 is 1.68 standard deviations, and the median of n samples
    has the standard error 1.25 / sqrt(n) standard deviations.
    """
    deviation = (summary.p80 - summary.p20) / 1.683
    return 1.253 * deviation / math.sqrt(summary.samples) / summary.median


def change_threshold(a: Summary, b: Summary, controls: Sequence[float]) -> float:
    """How large a relative change between two runs must be to be called one: two combined standard
    errors, or what the self-pair controls show of the machine, whichever is more."""
    errors = 2 * math.hypot(relative_noise(a), relative_noise(b))
    return max(SMALLEST_CHANGE, errors, *(abs(control - 1) for control in controls))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def sample_counts(
    seconds: Mapping[str, float], budget: float, least: int, most: int
) -> dict[str, int]:
    """Samples for each contender, so that all together take about `budget` seconds.

    Each gets an equal share of the time, at least `least` and at most `most` samples. Where even
    `least` exceeds its share, one that is over three times slower than the fastest gets three, and
    over ten times slower, one: no one needs to know such a ratio to a percent.
    """
    share = budget / len(seconds)
    fastest = min(seconds.values())
    counts = {}
    for name, each in seconds.items():
        smallest = least
        if least * each > share and each > 3 * fastest:
            smallest = 3 if each < 10 * fastest else 1
        counts[name] = max(smallest, min(most, int(share / each)))
    return counts


def equal_counts(
    seconds: Mapping[str, float], budget: float, least: int, most: int
) -> dict[str, int]:
    """The same number of samples for every contender, so that all together take about `budget`
    seconds."""
    count = max(least, min(most, int(budget / sum(seconds.values()))))
    return dict.fromkeys(seconds, count)


def rounds(counts: Mapping[str, int], seed: int) -> list[list[str]]:
    """Who runs in each round: every contender spread evenly over all rounds, each round in a new
    random order. In a fixed order each would always run in the wake of the same other one, with
    the caches and thread pools as that one leaves them: two copies of a call then differ by tens of
    percent.
    """
    total, generator = max(counts.values()), random.Random(seed)
    turns = []
    for r in range(total):
        turn = [name for name, n in counts.items() if (r + 1) * n // total > r * n // total]
        generator.shuffle(turn)
        turns.append(turn)
    return turns
