"""One linear layer under many LoRA adapters, each row of x with its own, in pure PyTorch.

    y[m] = x[m] @ W^T + bias + scalings[i] * (x[m] @ lora_A[i]^T) @ lora_B[i]^T,  i = adapter_ids[m]

As Punica (Chen et al., arXiv:2310.18547) and S-LoRA (Sheng et al., arXiv:2311.03285) serve it, and
with a backward. A row whose id is -1 gets the base alone. Nothing of one adapter, not even a NaN,
reaches the rows or the gradients of another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora.reference.adapter_tiles import adapter_tiles, tile_rows_of
from pylora.reference.projections import (
    REFERENCE_OPS,
    LinearOps,
    base_linear,
    base_linear_backward,
)


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
    adapters, rank, in_features = lora_A.shape
    check_adapter_ids(adapter_ids, adapters)
    q = (weight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
    base = base_linear(ops, x, q, out_features, bias).view(-1, out_features)
    tiles = adapter_tiles(adapter_ids, adapters, tile_rows_of(rank))
    x_tiles = tiles.gathered(x.reshape(-1, in_features)).to(lora_A.dtype)
    h = x_tiles @ lora_A[tiles.adapter].mT
    delta = (h @ lora_B[tiles.adapter].mT) * scalings[tiles.adapter].view(-1, 1, 1)
    y = (base + tiles.scattered(delta)).to(x.dtype)
    h = tiles.scattered(h).to(torch.promote_types(h.dtype, torch.float32))
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
    results = [x.new_empty(0) for _ in output_mask]
    flat_grad, flat_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, in_features)
    tiles = adapter_tiles(adapter_ids, adapters, tile_rows_of(rank))
    scaled = tiles.gathered(flat_grad).to(lora_A.dtype) * scalings[tiles.adapter].view(-1, 1, 1)
    dh = scaled.to(lora_A.dtype) @ lora_B[tiles.adapter]
    # Sums over rows are finished outside the matmul: they are kept in fp32 until the last one.
    summed = torch.promote_types(lora_A.dtype, torch.float32)
    if want_x:
        q = (weight, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize)
        base = base_linear_backward(ops, flat_grad, q, in_features)
        low_rank = tiles.scattered(dh @ lora_A[tiles.adapter])
        results[0] = (base + low_rank).to(x.dtype).view(x.shape)
    if want_weight:
        results[1] = flat_grad.t() @ flat_x
    if want_A:
        by_tile = dh.to(summed).mT @ tiles.gathered(flat_x).to(summed)
        results[2] = tiles.sum_by_adapter(by_tile).to(lora_A.dtype)
    if want_B:
        by_tile = scaled.to(summed).mT @ tiles.gathered(h.reshape(-1, rank)).to(summed)
        results[3] = tiles.sum_by_adapter(by_tile).to(lora_B.dtype)
    if want_bias:
        results[4] = flat_grad.sum(0)
    dx, dweight, dlora_A, dlora_B, dbias = results
    return dx, dweight, dlora_A, dlora_B, dbias
