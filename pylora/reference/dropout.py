"""Dropout whose mask is a function of a seed: the backward regenerates it, and nothing is stored.

The generator is Philox4x32-10, which is counter-based (Salmon et al., "Parallel Random Numbers: As
Easy as 1, 2, 3", SC 2011). Element i of the flattened input takes word i % 4 of the counter (i //
4, 0) under the key `seed`; it is kept if that word is at least p * 2^32. Every backend draws the
same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.calls import Dropout

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def philox(seed: Tensor, counters: Tensor) -> Tensor:
    """Four 32-bit words for each counter, int64 [n, 4].

    seed        int64 []
    counters    int64 [n]
    """
    c0, c1 = counters & _MASK32, (counters >> 32) & _MASK32
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # int64 products wrap around, but they have the 64 bits of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK32, (k1 + _KEY_STEPS[1]) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def drop_threshold(p: float) -> int:
    """The smallest 32-bit word of an element that is kept; p is the probability to drop one."""
    return min(int(p * 2**32 + 0.5), _MASK32)


def dropout_mask(shape: torch.Size, p: float, seed: Tensor) -> Tensor:
    """bool of `shape` on the seed's device, True for each element that is kept."""
    count = shape.numel()
    counters = torch.arange(-(-count // 4), device=seed.device)
    kept = philox(seed, counters).view(-1)[:count] >= drop_threshold(p)
    return kept.view(shape)


def dropout(x: Tensor, record: Dropout | None) -> Tensor:
    """x / (1 - p) for each element that is kept and 0 for the others; x itself without dropout."""
    if record is None:
        return x
    mask = dropout_mask(x.shape, record.p, record.layer_seed.to(x.device))
    return torch.where(mask, x * (1.0 / (1.0 - record.p)), 0.0)
