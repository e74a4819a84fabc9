"""The numbers of rows at which a plan may change, from the thresholds and the hard limits."""

from __future__ import annotations

from functools import lru_cache

from pylora.backends import extension, limits


@lru_cache(maxsize=1)
def row_steps() -> list[int]:
    """In ascending order; plans are the same for all numbers of rows between two neighbours.

    Every step is the most rows of the lower side.
    """
    steps = set(limits.ROW_STEPS)
    if extension.load()[0] is not None:
        cuda = extension.hard_limits("cuda")
        steps |= {cuda[name] for name in ("max_few_rows", "max_few_rows_of_block_32")}
        steps.add(cuda["max_many_rows"])
    return sorted(steps)
