"""The products variant of the cpu backend: decode a panel of the weight, then multiply in torch.

With many tokens torch's bf16 product, which is oneDNN's, runs faster on AMX tiles than the kernels
that decode as they multiply, and decoding is a small part of the time. A panel takes 2 KiB for each
row or column of the weight, and is decoded into the memory of the one before it.

What a layer adds to the product, its bias and its low-rank path, is written first. The product
is added to it in fp32 before it is rounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pylora.backends import extension
from pylora.backends.backend import in_python
from pylora.calls import (
    Layer,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    Nf4LinearBackward,
    Nf4LinearCall,
    Weight,
    token_matrix,
)
from pylora.reference.activation import ACTIVATIONS

# The rows or columns of a panel. With 512 the products of 512 tokens took twice the time.
PANEL = 1024


def takes(x: Tensor, layer: Layer) -> bool:
    """True if a layer over an NF4 weight can run so; x may be a gradient.

    Rows must be whole blocks, everything must be bf16, and dropout would need another copy of x.
    The caller has already asked what the kernels of the backend need.
    """
    weight, low = layer.weight, layer.low_rank
    tensors = (x,) if low is None else (x, low.A, low.B)
    return (
        weight.in_features % weight.blocksize == 0
        and all(tensor.dtype == torch.bfloat16 for tensor in tensors)
        and (low is None or low.dropout is None)
    )


def _row_panels(weight: Weight, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the dense weight, a few at a time. Each panel overwrites the one before."""
    size = min(PANEL, weight.out_features)
    memory = like.new_empty(size, weight.in_features)
    for begin in range(0, weight.out_features, size):
        panel = memory[: weight.out_features - begin]
        extension.nf4_dequantize_panel(weight, begin, 0, panel)
        yield slice(begin, begin + len(panel)), panel


def _column_panels(weight: Weight, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The same for columns; panels begin and end with a block."""
    size = min(max(PANEL, weight.blocksize), weight.in_features)
    memory = like.new_empty(weight.out_features * size)
    for begin in range(0, weight.in_features, size):
        columns = min(size, weight.in_features - begin)
        panel = memory[: weight.out_features * columns].view(weight.out_features, columns)
        extension.nf4_dequantize_panel(weight, 0, begin, panel)
        yield slice(begin, begin + columns), panel


def _forward(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """(y [M, out_features], h [M, r] in bf16 or None), for x [M, in_features]."""
    low, weight = layer.low_rank, layer.weight
    y = x.new_empty(x.shape[0], weight.out_features)
    bias, h, a = layer.summed_bias(), None, None
    if low is not None:
        h = torch.nn.functional.linear(x, low.A, low.A_bias)
        a = low.scaling * ACTIVATIONS[low.activation].forward(h)
    bias = None if bias is None else bias.to(x.dtype)
    for rows, panel in _row_panels(weight, x):
        part = y[:, rows]
        if a is not None and low is not None:
            torch.mm(a, low.B[rows].t(), out=part)
            if bias is not None:
                part += bias[rows]
            part.addmm_(x, panel.t())
        elif bias is not None:
            torch.addmm(bias[rows], x, panel.t(), out=part)
        else:
            torch.mm(x, panel.t(), out=part)
    return y, h


def _dx(grad: Tensor, weight: Weight, dh: Tensor | None, A: Tensor | None) -> Tensor:
    """grad @ W + dh @ lora_A, [M, in_features]."""
    dx = grad.new_empty(grad.shape[0], weight.in_features)
    for columns, panel in _column_panels(weight, grad):
        part = dx[:, columns]
        if dh is None or A is None:
            torch.mm(grad, panel, out=part)
        else:
            torch.mm(dh, A[:, columns], out=part)
            part.addmm_(grad, panel)
    return dx


@in_python
def nf4_linear(call: Nf4LinearCall) -> Tensor:
    y, _ = _forward(token_matrix(call.x), call.layer)
    return y.view(*call.x.shape[:-1], y.shape[1])


@in_python
def nf4_linear_backward(call: Nf4LinearBackward) -> Tensor:
    dx = _dx(token_matrix(call.grad), call.weight, None, None)
    return dx.view(*call.grad.shape[:-1], dx.shape[1])


@in_python
def lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    y, h = _forward(token_matrix(call.x), call.layer)
    assert h is not None
    leading = call.x.shape[:-1]
    return y.view(*leading, y.shape[1]), h.float().view(*leading, h.shape[1])


@in_python
def lora_linear_backward(call: LoraLinearBackward) -> LayerGradients:
    layer, wanted, low = call.layer, call.wanted, call.layer.low_rank
    assert low is not None
    grad, act = token_matrix(call.grad), ACTIVATIONS[low.activation]
    h = token_matrix(call.h).to(grad.dtype)
    dh = act.backward(low.scaling * (grad @ low.B), h)
    dx = _dx(grad, layer.weight, dh, low.A) if wanted.x else None
    sums = grad.sum(0) if wanted.bias or wanted.B_bias else None
    return LayerGradients(
        x=None if dx is None else dx.view(call.x.shape),
        A=dh.t() @ token_matrix(call.x) if wanted.A else None,
        B=grad.t() @ (low.scaling * act.forward(h)) if wanted.B else None,
        bias=sums if wanted.bias else None,
        A_bias=dh.sum(0) if wanted.A_bias else None,
        B_bias=low.scaling * sums if wanted.B_bias and sums is not None else None,
    )
