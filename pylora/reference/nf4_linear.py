"""y = x @ dequantize(qweight)^T + bias in pure PyTorch, a panel of the weight at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pylora.reference.nf4_dequantize import row_panels
from pylora.reference.rows import as_rows


def nf4_linear(
    x: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """x [..., in_features] -> [..., out_features], computed in x.dtype as torch computes it."""
    q = (qweight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
    y = x.new_empty(*x.shape[:-1], out_features)
    for rows, panel in row_panels(*q, out_features, x.shape[-1], x.dtype):
        y[..., rows] = linear(x, panel, None if bias is None else bias[rows].to(x.dtype))
    return y


def nf4_linear_backward(
    grad: Tensor,
    qweight: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    in_features: int,
) -> Tensor:
    """dx = grad @ W: grad [..., out_features] -> [..., in_features], panels summed in fp32."""
    q = (qweight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
    compute = torch.promote_types(grad.dtype, torch.float32)
    flat = as_rows(grad)
    dx = flat.new_zeros(flat.shape[0], in_features, dtype=compute)
    for rows, panel in row_panels(*q, grad.shape[-1], in_features, grad.dtype):
        dx.addmm_(flat[:, rows].to(compute), panel.to(compute))
    return dx.to(grad.dtype).view(*grad.shape[:-1], in_features)
