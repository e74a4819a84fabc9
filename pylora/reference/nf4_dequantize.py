"""NF4 dequantization in pure PyTorch, of a whole weight or of one panel of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pylora.calls import DequantizeCall, Weight
from pylora.nf4 import nf4_code
from pylora.reference.absmax import dequantize_absmax

# A reference holds at most this many elements of the base weight dequantized (2 MiB in fp32).
PANEL_ELEMENTS = 1 << 19


def nf4_dequantize(call: DequantizeCall) -> Tensor:
    """The dense weight of `call.shape`: code[nibble] * absmax in fp32, rounded once to the dtype.

    In float64 the product is exact, so it is the oracle for everything that is computed from NF4.
    """
    return dense(call.weight, call.dtype).view(call.shape)


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The weight [out_features, in_features] in `dtype`, dequantized if it is NF4."""
    if not weight.is_nf4:
        return weight.data.to(dtype)
    rows, columns = weight.shape
    return _range(weight, dequantize_absmax(weight), 0, rows * columns, dtype).view(rows, columns)


def row_panels(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows of the weight, their dense panel [rows, in_features]), one panel at a time."""
    decoded = dequantize_absmax(weight)
    rows, columns = weight.shape
    step = max(1, PANEL_ELEMENTS // max(columns, 1))
    for begin in range(0, rows, step):
        end = min(begin + step, rows)
        panel = _range(weight, decoded, begin * columns, end * columns, dtype)
        yield slice(begin, end), panel.view(end - begin, columns)


def _range(weight: Weight, absmax: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Elements [begin, end) of the flattened weight in `dtype`; blocks and bytes may be cut."""
    compute, blocksize = torch.promote_types(dtype, torch.float32), weight.blocksize
    packed = weight.data.reshape(-1)[begin // 2 : (end + 1) // 2]
    codes = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)
    codes = codes[begin % 2 : begin % 2 + end - begin]
    values = nf4_code(weight.data.device, compute)[codes.to(torch.int64)]
    first_block, end_block = begin // blocksize, -(-end // blocksize)
    scale = absmax[first_block:end_block].to(compute).repeat_interleave(blocksize)
    scale = scale[begin - first_block * blocksize :][: end - begin]
    return (values * scale).to(dtype)
