"""Medians, quantiles and noise of times, and how many samples each contender gets."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# If two copies of one contender differ by more than this, the ratios of the cell are in doubt.
CONTROL_TOLERANCE = 0.05
# A median of fewer samples than these says little: tables leave it out, and plots draw it hollow.
FEW_SAMPLES = 3
# From this load average on, before the run, other processes disturb the times.
BUSY = 0.7
# A smaller change counts as none: clocks and the placement of pages differ between two processes.
SMALLEST_CHANGE = 0.02


def quantile(samples: Sequence[float], q: float) -> float:
    """Returns a quantile, interpolated linearly between two samples as numpy does by default."""
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
    """Returns the standard error of the median, divided by the median.

    For a normal distribution p80 - p20 is 1.68 standard deviations, and the median of n samples
    has the standard error 1.25 / sqrt(n) standard deviations.
    """
    deviation = (summary.p80 - summary.p20) / 1.683
    return 1.253 * deviation / math.sqrt(summary.samples) / summary.median


def change_threshold(a: Summary, b: Summary, controls: Sequence[float]) -> float:
    """Returns the relative change between two runs above which they differ.

    It is two standard errors of the difference, or the largest difference between two copies of
    the same contender in these runs (`controls`), or SMALLEST_CHANGE, whichever is largest.
    """
    errors = 2 * math.hypot(relative_noise(a), relative_noise(b))
    return max(SMALLEST_CHANGE, errors, *(abs(control - 1) for control in controls))


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def sample_counts(
    seconds: Mapping[str, float], budget: float, least: int, most: int
) -> dict[str, int]:
    """Returns how many samples each contender gets, so that all take about `budget` seconds.

    Every contender gets the same share of the time, and between `least` and `most` samples. If
    `least` samples would take more than its share, a contender gets only three if it is over three
    times slower than the fastest, and one if it is over ten times slower: nobody needs such a ratio
    to a percent.
    """
    share = budget / len(seconds)
    fastest = min(seconds.values())
    counts = {}
    for name, seconds_a_sample in seconds.items():
        smallest = least
        if least * seconds_a_sample > share and seconds_a_sample > 3 * fastest:
            smallest = 3 if seconds_a_sample < 10 * fastest else 1
        counts[name] = max(smallest, min(most, int(share / seconds_a_sample)))
    return counts


def equal_counts(
    seconds: Mapping[str, float], budget: float, least: int, most: int
) -> dict[str, int]:
    """Returns the same number of samples for every contender, so that all take about `budget`
    seconds."""
    count = max(least, min(most, int(budget / sum(seconds.values()))))
    return dict.fromkeys(seconds, count)


def rounds(counts: Mapping[str, int], seed: int) -> list[list[str]]:
    """Returns which contenders run in each round, and in which order.

    The samples of a contender are spread evenly over the rounds, and each round has a new random
    order. In a fixed order a contender would always follow the same other one, and find the caches
    and thread pools as that one leaves them: two copies of a call then differ by tens of percent.
    """
    total, generator = max(counts.values()), random.Random(seed)
    turns = []
    for r in range(total):
        turn = [name for name, n in counts.items() if (r + 1) * n // total > r * n // total]
        generator.shuffle(turn)
        turns.append(turn)
    return turns
