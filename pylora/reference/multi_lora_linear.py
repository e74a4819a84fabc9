"""A linear layer with many LoRA adapters, of which each token has its own, in pure PyTorch.

    y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T,  i = adapter_ids[m]

This is what Punica (Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al., arXiv:2311.03285)
serve, with a backward. A token whose id is -1 gets the base alone. Nothing of one adapter, not even
a NaN, reaches the tokens or the gradients of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.calls import LayerGradients, MultiLoraBackward, MultiLoraCall, Wanted, token_matrix
from pylora.reference.adapter_groups import check_adapter_ids, groups
from pylora.reference.lora_linear import REFERENCE_LAYERS, LayerFunctions

_CONTIGUOUS = torch.contiguous_format


def multi_lora_linear(
    call: MultiLoraCall, run: LayerFunctions = REFERENCE_LAYERS
) -> tuple[Tensor, Tensor]:
    """(y [..., out_features] in x.dtype, h [..., r] in fp32, or in float64 for float64 weights).

    h is zero for tokens without an adapter.

    run    how the base layer runs
    """
    x, adapters = call.x, call.adapters
    check_adapter_ids(adapters.ids, adapters.count)
    flat_x = token_matrix(x)
    y, _ = run.forward(flat_x, call.layer)
    h_dtype = torch.promote_types(adapters.A.dtype, torch.float32)
    h = x.new_zeros(flat_x.shape[0], adapters.rank, dtype=h_dtype)
    for group in groups(adapters.ids, adapters.count, adapters.rank):
        A, B = adapters.A[group.adapter], adapters.B[group.adapter]
        projected = group.gathered(flat_x).to(A.dtype) @ A.mT
        group.add_to(h, projected)
        group.add_to(y, group.scaled(projected @ B.mT, adapters.scalings))
    return y.view(*x.shape[:-1], y.shape[-1]), h.view(*x.shape[:-1], adapters.rank)


def multi_lora_linear_backward(
    call: MultiLoraBackward, run: LayerFunctions = REFERENCE_LAYERS
) -> LayerGradients:
    """The gradients that `call.wanted` asks for; those of A and B are stacks over the adapters.

    For the tokens of adapter i:

        dlora_B[i] = scalings[i] * grad^T @ h
        dh         = scalings[i] * grad @ lora_B[i]
        dlora_A[i] = dh^T @ x
        dx         = grad @ W + dh @ lora_A[i]
    """
    wanted, adapters = call.wanted, call.adapters
    flat_grad, flat_x, flat_h = map(token_matrix, (call.grad, call.x, call.h))
    base = Wanted(x=wanted.x, weight=wanted.weight, bias=wanted.bias)
    of_base = run.backward(flat_grad, flat_x, flat_x.new_empty(0), call.layer, base)
    dx = of_base.x
    # An adapter that no token has gets zeros.
    dlora_A = torch.zeros_like(adapters.A, memory_format=_CONTIGUOUS) if wanted.A else None
    dlora_B = torch.zeros_like(adapters.B, memory_format=_CONTIGUOUS) if wanted.B else None
    needs_groups = wanted.x or wanted.A or wanted.B
    for group in groups(adapters.ids, adapters.count, adapters.rank) if needs_groups else ():
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
    dx = None if dx is None else dx.view(call.x.shape)
    return LayerGradients(dx, of_base.weight, dlora_A, dlora_B, of_base.bias)
