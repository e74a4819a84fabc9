"""Choosing among the tensors of several projections that one launch computes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pick(values, index):
    """values[index] of a tuple of pointers or numbers of one type, for an index that only the
    program knows."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def segment_of(step, sizes, STEP: tl.constexpr):
    """(index, first step) of the segment in which a step lies; segment i takes
    ceil(sizes[i] / STEP) steps, one segment behind the other."""
    index, first, end = 0, 0, 0
    for i in tl.static_range(1, len(sizes)):
        end += tl.cdiv(sizes[i - 1], STEP)
        index = tl.where(step >= end, i, index)
        first = tl.where(step >= end, end, first)
    return index, first
