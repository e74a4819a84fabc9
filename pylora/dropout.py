"""The dropout of a call, and the seed that fixes its mask."""

from __future__ import annotations

import torch
from torch import Tensor

from pylora import checks
from pylora.calls import Dropout


def dropout_of(p: float, seed: int | Tensor | None, x: Tensor) -> Dropout | None:
    """The dropout of a call; None, without drawing a seed, if nothing is dropped."""
    checks.probability("dropout_p", p)
    return Dropout(float(p), dropout_seed(seed, x.device)) if p > 0.0 else None


def dropout_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """`seed` as an int64 scalar tensor on `device`; drawn from torch's generator if it is None.

    Raises TypeError or ValueError if `seed` is something else.
    """
    if seed is None:
        return torch.randint(2**62, (), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(
                f"seed is a {seed.dtype} tensor of {seed.numel()} elements; "
                "it must be an int or an int64 tensor of one element"
            )
        return seed.reshape(()).to(device)
    if not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}; it must be an int or an int64 tensor of one element")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must fit in 64 bits with a sign")
    return torch.tensor(seed, dtype=torch.int64, device=device)
