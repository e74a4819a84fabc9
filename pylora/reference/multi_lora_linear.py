"""One linear layer under many LoRA adapters, each row of x with its own, in pure PyTorch.

    y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T,  i = adapter_ids[m]

As Punica (Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al., arXiv:2311.03285) serve it, and
with a backward. A row whose id is -1 gets the base alone. Nothing of one adapter, not even a NaN,
reaches the rows or the gradients of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.reference.adapter_groups import groups
from pylora.reference.projections import (
    REFERENCE_OPS,
    LinearOps,
    base_linear,
    base_linear_backward,
)
from pylora.reference.rows import as_rows


def check_adapter_ids(adapter_ids: Tensor, adapters: int) -> None:
    """Raises ValueError for an id outside [-1, adapters) on the CPU; elsewhere asking would wait
    for the device, and such a row gets the base alone."""
    if adapter_ids.device.type != "cpu":
        return
    bad = (adapter_ids < -1) | (adapter_ids >= adapters)
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"adapter_ids has {int(adapter_ids[row])} at row {row}; "
            f"it must be in [-1, {adapters}), -1 for the base alone"
        )


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    out_features: int,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    bias: Tensor | None,
    ops: LinearOps = REFERENCE_OPS,
) -> tuple[Tensor, Tensor]:
    """Returns y [..., out_features] in x.dtype and h [..., r] in fp32 (float64 for float64
    weights), which is zero where a row has no adapter."""
    adapters, rank, _ = lora_A.shape
    check_adapter_ids(adapter_ids, adapters)
    q = (weight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
    flat_x = as_rows(x)
    y = base_linear(ops, flat_x, q, out_features, bias)
    hidden_dtype = torch.promote_types(lora_A.dtype, torch.float32)
    h = x.new_zeros(y.shape[0], rank, dtype=hidden_dtype)
    for group in groups(adapter_ids, adapters, rank):
        projected = group.gathered(flat_x).to(lora_A.dtype) @ lora_A[group.adapter].mT
        group.add_to(h, projected)
        group.add_to(y, group.scaled(projected @ lora_B[group.adapter].mT, scalings))
    return y.view(*x.shape[:-1], out_features), h.view(*x.shape[:-1], rank)


def multi_lora_linear_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    absmax: Tensor | None,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    lora_A: Tensor,
    lora_B: Tensor,
    adapter_ids: Tensor,
    scalings: Tensor,
    output_mask: list[bool],
    ops: LinearOps = REFERENCE_OPS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of (x, weight, lora_A, lora_B, bias); an empty tensor [0] where `output_mask` is
    False.

    Over the rows m of adapter i: dlora_B[i] = scalings[i] grad^T h;  dh = scalings[i] grad @
    lora_B[i];  dlora_A[i] = dh^T x;  dx = grad @ W + dh @ lora_A[i].
    """
    want_x, want_weight, want_A, want_B, want_bias = output_mask
    adapters, rank, in_features = lora_A.shape
    dx, dweight, dlora_A, dlora_B, dbias = (x.new_empty(0) for _ in output_mask)
    flat_grad, flat_x, flat_h = map(as_rows, (grad, x, h))
    if want_x:
        q = (weight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
        dx = base_linear_backward(ops, flat_grad, q, in_features)
    # Zeros for the adapters that no row has.
    if want_A:
        dlora_A = lora_A.new_zeros(lora_A.shape)
    if want_B:
        dlora_B = lora_B.new_zeros(lora_B.shape)
    for group in groups(adapter_ids, adapters, rank) if want_x or want_A or want_B else ():
        gathered = group.gathered(flat_grad).to(lora_A.dtype)
        scaled = group.scaled(gathered, scalings).to(lora_A.dtype)
        dh = scaled @ lora_B[group.adapter]
        summed = group.summed_dtype(lora_A.dtype)
        if want_x:
            group.add_to(dx, dh @ lora_A[group.adapter])
        if want_A:
            group.put_sum(dlora_A, dh.to(summed).mT @ group.gathered(flat_x).to(summed))
        if want_B:
            group.put_sum(dlora_B, scaled.to(summed).mT @ group.gathered(flat_h).to(summed))
    if want_weight:
        dweight = flat_grad.t() @ flat_x
    if want_bias:
        dbias = flat_grad.sum(0)
    return dx.view(x.shape) if want_x else dx, dweight, dlora_A, dlora_B, dbias
