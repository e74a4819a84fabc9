"""NF4 dequantization in pure PyTorch, whole or a panel of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pylora.nf4 import nf4_code
from pylora.reference.absmax import dequantize_absmax

# Elements of the base weight that a reference holds dequantized at a time (2 MiB in fp32).
PANEL_ELEMENTS = 1 << 19


def nf4_dequantize(
    qweight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight of `shape`: code[nibble] * absmax in fp32, rounded once to `dtype`.

    In float64 the product is exact, which makes it the oracle for everything computed from NF4.
    """
    decoded = dequantize_absmax(absmax, nested_absmax, nested_code, offset, nested_blocksize)
    return _range(qweight, decoded, blocksize, 0, math.prod(shape), dtype).view(tuple(shape))


def row_panels(
    qweight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, dense [len(rows), in_features]), one panel in memory at a time."""
    decoded = dequantize_absmax(absmax, nested_absmax, nested_code, offset, nested_blocksize)
    step = max(1, PANEL_ELEMENTS // max(in_features, 1))
    for begin in range(0, out_features, step):
        end = min(begin + step, out_features)
        panel = _range(qweight, decoded, blocksize, begin * in_features, end * in_features, dtype)
        yield slice(begin, end), panel.view(end - begin, in_features)


def _range(
    qweight: Tensor, absmax: Tensor, blocksize: int, begin: int, end: int, dtype: torch.dtype
) -> Tensor:
    """Elements [begin, end) of the flattened weight; blocks and bytes may be cut anywhere."""
    compute = torch.promote_types(dtype, torch.float32)
    packed = qweight.reshape(-1)[begin // 2 : (end + 1) // 2]
    codes = torch.stack([packed >> 4, packed & 0xF], dim=1).view(-1)
    codes = codes[begin % 2 : begin % 2 + end - begin]
    values = nf4_code(qweight.device, compute)[codes.to(torch.int64)]
    first, last = begin // blocksize, -(-end // blocksize)
    scale = absmax[first:last].to(compute).repeat_interleave(blocksize)
    scale = scale[begin - first * blocksize :][: end - begin]
    return (values * scale).to(dtype)
