"""y = x @ W^T + bias in pure PyTorch; an NF4 weight is decoded one panel of rows at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from pylora.calls import Nf4LinearBackward, Nf4LinearCall, Weight, token_matrix
from pylora.reference.nf4_dequantize import row_panels


def nf4_linear(call: Nf4LinearCall) -> Tensor:
    """y [..., out_features], computed in x.dtype as torch computes a linear layer."""
    return base_linear(call.x, call.layer.weight, call.layer.bias)


def nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    """dx = grad @ W [..., in_features] in grad.dtype."""
    return base_linear_backward(call.grad, call.weight)


def base_linear(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """x @ W^T + bias over a dense or an NF4 weight."""
    if not weight.is_nf4:
        bias = None if bias is None else bias.to(x.dtype)
        if x.dim() == 2:  # autograd would record a view of it
            return linear(x, weight.data, bias)
        # Given an x [batch, 1, features] that is a part of a larger one, torch's linear would copy
        # a frozen weight for each row of the batch.
        y = linear(token_matrix(x), weight.data, bias)
        return y.view(*x.shape[:-1], y.shape[-1])
    y = x.new_empty(*x.shape[:-1], weight.out_features)
    for rows, panel in row_panels(weight, x.dtype):
        y[..., rows] = linear(x, panel, None if bias is None else bias[rows].to(x.dtype))
    return y


def base_linear_backward(grad: Tensor, weight: Weight) -> Tensor:
    """grad @ W over a dense or an NF4 weight; the products with NF4 panels are summed in fp32."""
    if not weight.is_nf4:
        dx = token_matrix(grad) @ weight.data
        return dx.view(*grad.shape[:-1], dx.shape[-1])
    compute = torch.promote_types(grad.dtype, torch.float32)
    flat = token_matrix(grad)
    dx = flat.new_zeros(flat.shape[0], weight.in_features, dtype=compute)
    for rows, panel in row_panels(weight, grad.dtype):
        dx.addmm_(flat[:, rows].to(compute), panel.to(compute))
    return dx.to(grad.dtype).view(*grad.shape[:-1], weight.in_features)
