"""x [..., features] as a matrix."""

from __future__ import annotations

import math

from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """[..., features] -> [rows, features], a view where there can be one.

    The rows are counted: reshape(-1, ...) cannot tell how many there are of no features.
    """
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
