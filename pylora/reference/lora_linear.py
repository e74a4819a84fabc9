"""A linear layer with a low-rank path, forward and backward, in pure PyTorch.

    xd = dropout(x)                                  its mask is regenerated from a seed
    h  = xd @ lora_A^T + lora_A_bias                 [..., r], before the activation
    y  = x @ W^T + bias + scaling * (act(h) @ lora_B^T + lora_B_bias)

If act is the identity, this is LoRA (Hu et al., arXiv:2106.09685); if it is a nonlinearity, this is
the parallel adapter (He et al., arXiv:2110.04366). W is dense [out_features, in_features] or NF4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from pylora.calls import (
    Dropout,
    Layer,
    LayerGradients,
    LoraLinearBackward,
    LoraLinearCall,
    LowRank,
    Wanted,
    token_matrix,
)
from pylora.reference.activation import ACTIVATIONS
from pylora.reference.dropout import dropout
from pylora.reference.nf4_linear import base_linear, base_linear_backward

# (x, None without dropout) -> x with dropout
Drop = Callable[[Tensor, Dropout | None], Tensor]


def lora_linear(call: LoraLinearCall) -> tuple[Tensor, Tensor]:
    """(y [..., out_features] in x.dtype, h [..., r] in fp32, or in float64 for float64 weights)."""
    return layer_forward(call.x, call.layer)


def lora_linear_backward(call: LoraLinearBackward) -> LayerGradients:
    """The gradients that `call.wanted` asks for."""
    return layer_backward(call.grad, call.x, call.h, call.layer, call.wanted)


def layer_forward(x: Tensor, layer: Layer, drop: Drop = dropout) -> tuple[Tensor, Tensor]:
    """(y, h) of a layer with or without LoRA; without it h is an empty tensor [0].

    drop    how dropout is applied
    """
    base, low = base_linear(x, layer.weight, layer.bias), layer.low_rank
    if low is None:
        return base, x.new_empty(0)
    if base.dtype == low.B.dtype and low.B_bias is None:  # no matrix of y's size beside y and base
        a, h = low_rank_input(x, low, drop)
        y = token_matrix(base).addmm_(token_matrix(a), low.B.t(), alpha=low.scaling)
        return y.view(base.shape), h
    delta, h = low_rank_path(x, low, drop)
    return (base + delta).to(x.dtype), h


_unsafe_view: Callable[..., Tensor] = torch.ops.aten._unsafe_view.default


def native(call: LoraLinearCall) -> Callable[[LoraLinearCall], Tensor] | None:
    """y as three of torch's own ops, if nothing else is to be done in this call; otherwise None.

    Autograd then keeps what it needs and computes every gradient itself. For a small layer that
    takes less time than a node written in Python.
    """
    layer, low = call.layer, call.layer.low_rank
    if low is None or layer.weight.is_nf4 or low.dropout is not None or low.B_bias is not None:
        return None
    plain = low.activation == "identity" and low.A.dtype == call.x.dtype
    return _three_ops if plain else None


def _three_ops(call: LoraLinearCall) -> Tensor:
    x, low = call.x, call.layer.low_rank
    assert low is not None
    if x.dim() != 2:  # autograd would record a view of a matrix
        x = token_matrix(x)
    y = base_linear(x, call.layer.weight, call.layer.bias)
    y.addmm_(linear(x, low.A, low.A_bias), low.B.t(), alpha=low.scaling)
    # As in torch's linear, the output is no view, so that it can be changed in place.
    return y if x is call.x else _unsafe_view(y, (*call.x.shape[:-1], y.shape[-1]))


def low_rank_path(x: Tensor, low: LowRank, drop: Drop = dropout) -> tuple[Tensor, Tensor]:
    """(what the low-rank path adds to y, h); it runs in the dtype of lora_A, as PEFT runs it."""
    a, h = low_rank_input(x, low, drop)
    return linear(a, low.B, low.B_bias) * low.scaling, h


def low_rank_input(x: Tensor, low: LowRank, drop: Drop = dropout) -> tuple[Tensor, Tensor]:
    """(act(h), which lora_B takes, in the dtype of lora_A; h in fp32 or float64)."""
    xd = token_matrix(drop(x.to(low.A.dtype), low.dropout))
    h = linear(xd, low.A, low.A_bias).view(*x.shape[:-1], low.rank)
    a = ACTIVATIONS[low.activation].forward(h)
    return a, h.to(torch.promote_types(h.dtype, torch.float32))


def layer_backward(
    grad: Tensor, x: Tensor, h: Tensor, layer: Layer, wanted: Wanted, drop: Drop = dropout
) -> LayerGradients:
    """The gradients of a layer with or without LoRA.

        dlora_B = scaling * grad^T @ act(h)
        dh      = (scaling * grad @ lora_B) * act'(h)
        dlora_A = dh^T @ xd
        dx      = grad @ W + mask / (1 - p) * (dh @ lora_A)

    If neither dweight nor dlora_A is wanted, only the shape and dtype of x are read.

    drop    how dropout is applied
    """
    flat_grad, low = token_matrix(grad), layer.low_rank
    dweight = flat_grad.t() @ token_matrix(x) if wanted.weight else None
    dbias = flat_grad.sum(0) if wanted.bias else None
    if low is None or not wanted.any:
        dx = base_linear_backward(grad, layer.weight) if wanted.x else None
        return LayerGradients(dx, dweight, bias=dbias)

    act = ACTIVATIONS[low.activation]
    scaled = flat_grad.to(low.A.dtype) * low.scaling
    h = token_matrix(h).to(low.A.dtype)
    dh = act.backward(scaled @ low.B, h)
    dlora_B = scaled.t() @ act.forward(h) if wanted.B else None
    dB_bias = scaled.sum(0) if wanted.B_bias else None
    del scaled  # it is as large as grad, and dx, which comes next, is as large as x
    dx = base_linear_backward(grad, layer.weight) if wanted.x else None
    if dx is not None and low.dropout is None and dx.dtype == dh.dtype:
        dx = token_matrix(dx).addmm_(dh, low.A).view(x.shape)
    elif dx is not None:
        dx = (dx + drop((dh @ low.A).view(x.shape), low.dropout)).to(x.dtype)
    dlora_A = None
    if wanted.A:
        dlora_A = dh.t() @ token_matrix(drop(x.to(low.A.dtype), low.dropout))
    return LayerGradients(
        x=dx,
        weight=dweight,
        A=dlora_A,
        B=dlora_B,
        bias=dbias,
        A_bias=dh.sum(0) if wanted.A_bias else None,
        B_bias=dB_bias,
    )


class LayerFunctions(NamedTuple):
    """How the reference of an op of several layers runs each of its layers.

    forward     (x, layer) -> (y, h)
    backward    (grad, x, h, layer, wanted) -> LayerGradients

    A backend that has no fused kernel for such an op passes its own single-layer kernels, and so
    runs every NF4 weight itself.
    """

    forward: Callable[[Tensor, Layer], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Layer, Wanted], LayerGradients]


REFERENCE_LAYERS = LayerFunctions(layer_forward, layer_backward)
