"""A linear layer with many LoRA adapters, of which each token has its own, in pure PyTorch.

    y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T,  i = adapter_ids[m]

This is what Punica (Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al., arXiv:2311.03285)
serve, with a backward. A token whose id is -1 gets the base alone. Nothing of one adapter, not even
a NaN, reaches the tokens or the gradients of another.

The base runs first, on all tokens, and the adapters are added to what it gave.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pylora.calls import LayerGradients, MultiLoraBackward, MultiLoraCall, Wanted, token_matrix
from pylora.reference.adapter_groups import check_adapter_ids, groups
from pylora.reference.lora_linear import REFERENCE_LAYERS, LayerFunctions

_CONTIGUOUS = torch.contiguous_format
FactorGradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class AddAdapters:
    """How the adapters are added to the results of the base, which are changed in place.

    forward     adds to y [tokens, out_features]; returns h [..., r]
    backward    adds to dx [tokens, in_features], unless it is None; returns the gradients of the
                stacks A and B, each None if it is not wanted
    """

    forward: Callable[[MultiLoraCall, Tensor], Tensor]
    backward: Callable[[MultiLoraBackward, Tensor | None], FactorGradients]


def add_adapters(call: MultiLoraCall, y: Tensor) -> Tensor:
    """The forward of `AddAdapters`, one group of tokens after the other."""
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
    """The backward of `AddAdapters`. For the tokens of adapter i:

    dlora_B[i] = scalings[i] * grad^T @ h
    dh         = scalings[i] * grad @ lora_B[i]
    dlora_A[i] = dh^T @ x
    dx        += dh @ lora_A[i]
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


REFERENCE_ADAPTERS = AddAdapters(add_adapters, add_adapters_backward)


def multi_lora_linear(
    call: MultiLoraCall,
    run: LayerFunctions = REFERENCE_LAYERS,
    add: AddAdapters = REFERENCE_ADAPTERS,
) -> tuple[Tensor, Tensor]:
    """(y [..., out_features] in x.dtype, h [..., r] in fp32, or in float64 for float64 weights).

    h is zero for tokens without an adapter.

    run    how the base layer runs
    add    how the adapters run
    """
    adapters, leading = call.adapters, call.x.shape[:-1]
    check_adapter_ids(adapters.ids, adapters.count)
    y, _ = run.forward(token_matrix(call.x), call.layer)
    h = add.forward(call, y)
    return y.view(*leading, y.shape[-1]), h.view(*leading, adapters.rank)


def multi_lora_linear_backward(
    call: MultiLoraBackward,
    run: LayerFunctions = REFERENCE_LAYERS,
    add: AddAdapters = REFERENCE_ADAPTERS,
) -> LayerGradients:
    """The gradients that `call.wanted` asks for; those of A and B are stacks over the adapters.

    The arguments are those of `multi_lora_linear`.
    """
    wanted = call.wanted
    flat_grad, flat_x = map(token_matrix, (call.grad, call.x))
    base = Wanted(x=wanted.x, weight=wanted.weight, bias=wanted.bias)
    of_base = run.backward(flat_grad, flat_x, flat_x.new_empty(0), call.layer, base)
    dlora_A, dlora_B, dx = None, None, of_base.x
    if wanted.x or wanted.A or wanted.B:
        dlora_A, dlora_B = add.backward(call, dx)
    dx = None if dx is None else dx.view(call.x.shape)
    return LayerGradients(dx, of_base.weight, dlora_A, dlora_B, of_base.bias)
