"""Double quantization (QLoRA, section 3): absmax values are stored as 8-bit codes."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from pylora.calls import Weight
from pylora.nf4 import DEFAULT_NESTED_BLOCKSIZE, block_count, dynamic_code


def quantize_absmax(
    absmax: Tensor, nested_blocksize: int = DEFAULT_NESTED_BLOCKSIZE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantizes absmax, fp32 [blocks].

    Returns (codes uint8 [blocks], nested_absmax fp32 [groups], nested_code fp32 [256], offset fp32
    []). A group is `nested_blocksize` values. The values are centred on their mean, scaled by the
    largest magnitude of their group and rounded to the nearest of 65536 grid points; then the
    nearest code is taken. The grid is a shortcut of bitsandbytes that decides about one code in a
    thousand, so it is kept.
    """
    absmax = absmax.reshape(-1)
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    groups = block_count(absmax.numel(), nested_blocksize)
    centred = absmax.new_zeros(groups * nested_blocksize)
    centred[: absmax.numel()] = absmax - offset
    centred = centred.view(groups, nested_blocksize)
    nested_absmax = centred.abs().amax(dim=1) if groups else absmax.new_zeros(0)
    scaled = (centred * (1.0 / nested_absmax)[:, None]).clamp(-1.0, 1.0)
    # A group of zeros gives 0 * inf. bitsandbytes stores code 0 for it, which decodes to the
    # offset.
    point = ((scaled + 1.0) * 0.5 * 65535 + 0.5).nan_to_num(0.0).floor()
    codes = torch.from_numpy(_codes_of_points()).to(absmax.device)[point.to(torch.int64)]
    codes = codes.view(-1)[: absmax.numel()].clone()
    return codes, nested_absmax, dynamic_code(absmax.device), offset


@cache
def _codes_of_points() -> np.ndarray:
    """The nearest code of each point of the grid, uint8 [65536]; a search would take longer."""
    code = np.array(dynamic_code(torch.device("cpu")).tolist(), np.float32)
    midpoints = (code[1:] + code[:-1]) / 2
    points = np.arange(65536, dtype=np.float32) / 65535 * 2 - 1
    return np.searchsorted(midpoints, points).astype(np.uint8)


def dequantize_absmax(weight: Weight) -> Tensor:
    """The absmax values of an NF4 weight, fp32 [blocks], with or without double quantization."""
    assert weight.absmax is not None
    absmax = weight.absmax.reshape(-1)
    if weight.nested_absmax is None or weight.nested_code is None or weight.offset is None:
        return absmax
    scale = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: absmax.numel()]
    return weight.nested_code[absmax.to(torch.int64)] * scale + weight.offset
