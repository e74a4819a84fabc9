"""A linear layer with many LoRA adapters, of which each token has its own, in pure PyTorch.

    y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T,  i = adapter_ids[m]

This is what Punica (Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al., arXiv:2311.03285)
serve, with a backward. A token whose id is -1 gets the base alone. Nothing of one adapter, not even
a NaN, reaches the tokens or the gradients of another.

The base runs first, on all tokens, and the adapters are added to what it gave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pylora.calls import (
    Layer,
    LayerGradients,
    MultiLoraBackward,
    MultiLoraCall,
    Weight,
    token_matrix,
)
from pylora.reference.adapter_groups import check_adapter_ids, groups
from pylora.reference.nf4_linear import base_linear, base_linear_backward

_CONTIGUOUS = torch.contiguous_format
FactorGradients = tuple[Tensor | None, Tensor | None]


def add_adapters(call: MultiLoraCall, y: Tensor) -> Tensor:
    """Adds the adapters to y [tokens, out_features], which has the base; returns h [tokens, r]."""
    flat_x, adapters = token_matrix(call.x), call.adapters
    h_dtype = torch.promote_types(adapters.A.dtype, torch.float32)
    h = flat_x.new_zeros(flat_x.shape[0], adapters.rank, dtype=h_dtype)
    for group in groups(adapters.ids, adapters.count, adapters.rank):
        A, B = adapters.A[group.adapter], adapters.B[group.adapter]
        projected = group.gathered(flat_x).to(A.dtype) @ A.mT
        group.add_to(h, projected)
        group.add_to(y, group.scaled(projected @ B.mT, adapters.scalings))
    return h


def add_adapters_backward(call: MultiLoraBackward, dx: Tensor | None) -> FactorGradients:
    """The gradients of A and B as far as they are wanted. For the tokens of adapter i:

        dlora_B[i] = scalings[i] * grad^T @ h
        dh         = scalings[i] * grad @ lora_B[i]
        dlora_A[i] = dh^T @ x
        dx        += dh @ lora_A[i]

    dx    [tokens, in_features], which has the gradient of the base and is changed in place; None if
          it is not wanted
    """
    wanted, adapters = call.wanted, call.adapters
    flat_grad, flat_x, flat_h = map(token_matrix, (call.grad, call.x, call.h))
    # An adapter that no token has gets zeros.
    dlora_A = torch.zeros_like(adapters.A, memory_format=_CONTIGUOUS) if wanted.A else None
    dlora_B = torch.zeros_like(adapters.B, memory_format=_CONTIGUOUS) if wanted.B else None
    for group in groups(adapters.ids, adapters.count, adapters.rank):
        A, B = adapters.A[group.adapter], adapters.B[group.adapter]
        gathered = group.gathered(flat_grad).to(A.dtype)
        scaled = group.scaled(gathered, adapters.scalings).to(A.dtype)
        dh = scaled @ B
        summed = group.summed_dtype(A.dtype)
        if dx is not None:
            group.add_to(dx, dh @ A)
        if dlora_A is not None:
            group.put_sum(dlora_A, dh.to(summed).mT @ group.gathered(flat_x).to(summed))
        if dlora_B is not None:
            group.put_sum(dlora_B, scaled.to(summed).mT @ group.gathered(flat_h).to(summed))
    return dlora_A, dlora_B


def layer_base(x: Tensor, layer: Layer) -> Tensor:
    """The base of a layer in torch: x @ W^T + bias."""
    return base_linear(x, layer.weight, layer.bias)


def multi_lora_linear(
    call: MultiLoraCall,
    base: Callable[[Tensor, Layer], Tensor] = layer_base,
    add: Callable[[MultiLoraCall, Tensor], Tensor] = add_adapters,
) -> tuple[Tensor, Tensor]:
    """(y [..., out_features] in x.dtype, h [..., r] in fp32, or in float64 for float64 weights).

    h is zero for tokens without an adapter.

    base    runs the base on x [tokens, in_features]
    add     adds the adapters, as `add_adapters` does
    """
    adapters, leading = call.adapters, call.x.shape[:-1]
    check_adapter_ids(adapters.ids, adapters.count)
    y = base(token_matrix(call.x), call.layer)
    h = add(call, y)
    return y.view(*leading, y.shape[-1]), h.view(*leading, adapters.rank)


def multi_lora_linear_backward(
    call: MultiLoraBackward,
    base: Callable[[Tensor, Weight], Tensor] = base_linear_backward,
    add: Callable[[MultiLoraBackward, Tensor | None], FactorGradients] = add_adapters_backward,
) -> LayerGradients:
    """The gradients that `call.wanted` asks for; those of A and B are stacks over the adapters.

    base    runs grad @ W on grad [tokens, out_features]
    add     adds the adapters, as `add_adapters_backward` does
    """
    wanted, grad = call.wanted, token_matrix(call.grad)
    dx = base(grad, call.layer.weight) if wanted.x else None
    dlora_A, dlora_B = None, None
    if wanted.x or wanted.A or wanted.B:
        dlora_A, dlora_B = add(call, dx)
    return LayerGradients(
        x=None if dx is None else dx.view(call.x.shape),
        weight=grad.t() @ token_matrix(call.x) if wanted.weight else None,
        A=dlora_A,
        B=dlora_B,
        bias=grad.sum(0) if wanted.bias else None,
    )
