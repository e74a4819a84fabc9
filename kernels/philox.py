"""Dropout masks from a seed, drawn inside the kernels with the bits of `pylora.reference.dropout`.

The generator is Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC
2011) under the key `seed`. Element i of the flattened [M, K] input takes word i % 4 of the counter
(i // 4, 0) and is kept if that word is at least p * 2^32. One counter serves four neighbours.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Dropout
from pylora.reference.dropout import drop_threshold


@triton.jit
def _words(seed, counter):
    # The high half of the counter is nonzero from 2^34 elements on.
    zero = counter.to(tl.uint32) * 0
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), zero, zero)


@triton.jit
def keep_mask(
    seed_ptr,  # int64 []
    threshold,  # the smallest word of a kept element, its 32 bits as int32
    tokens,  # int64 [P]
    first,  # first column, a multiple of 4
    columns,  # K, the width of the whole input
    WIDTH: tl.constexpr,
    ALIGNED: tl.constexpr,  # columns % 4 == 0
):
    """Returns [P, WIDTH], true for each kept element of `tokens` in columns first + [0, WIDTH)."""
    P: tl.constexpr = tokens.shape[0]
    seed = tl.load(seed_ptr)
    start = tokens[:, None] * columns + first
    if ALIGNED:
        counter = start // 4 + tl.arange(0, WIDTH // 4)[None, :]
        w0, w1, w2, w3 = _words(seed, counter)
        word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(P, WIDTH)
    else:
        index = start + tl.arange(0, WIDTH)[None, :]
        w0, w1, w2, w3 = _words(seed, index // 4)
        lane = index % 4
        word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    return word >= threshold.to(tl.uint32, bitcast=True)


class Mask(NamedTuple):
    """What the kernels need to regenerate a dropout mask.

    seed         int64 []; None if nothing is dropped
    threshold    the smallest 32-bit word of a kept element, as int32
    scale        1 / (1 - p), by which kept elements are multiplied
    """

    seed: Tensor | None = None
    threshold: int = 0
    scale: float = 1.0


def mask_of(dropout: Dropout | None) -> Mask:
    """The mask of a layer's dropout."""
    if dropout is None:
        return Mask()
    threshold = drop_threshold(dropout.p)
    # The threshold is passed as the int32 with the same bits: Triton would choose another type for
    # a larger value, but a kernel argument's type must not depend on its value.
    signed = threshold - (threshold >> 31 << 32)
    return Mask(dropout.layer_seed, signed, 1.0 / (1.0 - dropout.p))
