"""The low-rank projections of one input: dropout(x) @ lora_A^T, or grad @ lora_B."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.activation import gated
from pylora.kernels.configs import shrink_config
from pylora.kernels.epilogue import factor_pointers
from pylora.kernels.launch import MAX_REGISTERS, facts, on_device_of
from pylora.kernels.philox import Mask, keep_mask
from pylora.kernels.precision import Operands, as_operand, dot, finished_dot


@triton.jit(do_not_specialize=["threshold", "M"])
def _lora_shrink_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    up_ptr,  # like x, or None; if given, x is gate, and the input is act(gate) * up
    factor_ptrs,  # tuples have one entry per projection: [R, K] if RANK_FIRST, else [K, R]
    partials_ptrs,  # fp32 [splits, M, R]
    copy_ptr,  # [M, >= K], rows stride_copy apart, or None
    seed_ptrs,  # int64 [] or None
    threshold,
    M,
    K,
    Rs,
    stride_x,
    stride_copy,
    k_per_split,
    RANK_FIRST: tl.constexpr,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partials[s] = (mask * x)[:, split s] @ factor[split s] for each projection

    Shapes    x [M, K] fp32|fp16|bf16; factor [R, K] or [K, R]; partials fp32 [splits, M, R]; copy
              like x  (M = tokens, K = in_features, R = rank; in the backward pass x is grad and K
              is out_features)
    Numerics  fp32 sums of BLOCK_K products each, added in fp32. The reader of the partials adds
              them up, in order, and multiplies by 1 / (1 - p).
    Grid      (tiles of M, tiles of the largest R, splits of K)
    Algorithm 1. Load a tile of x once for all projections. 2. Copy it if a wider matrix needs it.
              3. Regenerate each projection's mask. 4. Multiply by a tile of its factor.
    Source    one pass over x for dropout and projection: LoRAFusion, arXiv:2510.00206;
              pylora/reference/lora_linear.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(m, M - 1).to(tl.int64)
    x_offsets = row[:, None] * stride_x + k[None, :]
    sums = (tl.zeros((BLOCK_M, BLOCK_R), tl.float32),) * len(factor_ptrs)
    first = split * k_per_split
    for start in range(first, tl.minimum(first + k_per_split, K), BLOCK_K):
        # 1. Load a tile of x.
        inside = start + k < K
        if EVEN_K:
            x = tl.load(x_ptr + x_offsets + start)
        else:
            x = tl.load(x_ptr + x_offsets + start, mask=inside[None, :], other=0.0)
        if up_ptr is not None:
            up = tl.load(up_ptr + x_offsets + start, mask=inside[None, :], other=0.0)
            x = gated(x, up, ACTIVATION)
        # 2. Copy it.
        if copy_ptr is not None:
            copy = copy_ptr + m.to(tl.int64)[:, None] * stride_copy + (start + k)[None, :]
            here = (m < M)[:, None] & inside[None, :] & (tl.program_id(1) == 0)
            tl.store(copy, x, mask=here)
        added = ()
        for i in tl.static_range(len(factor_ptrs)):
            # 3. Regenerate the mask.
            kept = x
            if seed_ptrs[i] is not None:
                keep = keep_mask(seed_ptrs[i], threshold, row, start, K, BLOCK_K, ALIGNED_MASK)
                kept = tl.where(keep, x, 0.0)
            # 4. Multiply. Ranks beyond the last repeat it and are not stored.
            rank = tl.minimum(r, Rs[i] - 1)
            pointers = factor_pointers(factor_ptrs[i], start + k, rank, K, Rs[i], RANK_FIRST)
            if EVEN_K:
                factor = tl.load(pointers)
            else:
                factor = tl.load(pointers, mask=inside[:, None], other=0.0)
            a, b = as_operand(kept, OPERAND), as_operand(factor, OPERAND)
            # Only if nothing but the products reads the tile of x may they run on into the next
            # turn. Triton keeps no extra buffer for a tile that is also loaded to registers, and
            # would overwrite it with a later tile while a product still reads it.
            if copy_ptr is None and up_ptr is None and seed_ptrs[i] is None and x.dtype == OPERAND:
                product = dot(a, b, PRECISION)
            else:
                product = finished_dot(a, b, PRECISION)
            added = added + (sums[i] + product,)
        sums = added
    for i in tl.static_range(len(factor_ptrs)):
        R = Rs[i]
        out = partials_ptrs[i] + (split.to(tl.int64) * M + m.to(tl.int64)[:, None]) * R + r[None, :]
        tl.store(out, sums[i], mask=(m < M)[:, None] & (r < R)[None, :])


def lora_shrink(
    x: Tensor,
    factors: Sequence[Tensor],
    operands: Operands,
    rank_first: bool = True,
    masks: Sequence[Mask] = (),
    copy: Tensor | None = None,
    up: Tensor | None = None,
    activation: str = "identity",
) -> list[Tensor]:
    """The partials fp32 [splits, M, R] of the projection of x on each factor.

    Their sum over the splits is (mask * x) @ factor; the factor 1 / (1 - p) of the mask is left
    out.

    x         [M, K], any row stride
    factors   [R, K] each, or [K, R] if rank_first is False, all of one dtype
    masks     one for each factor, all with the same probability; empty without dropout
    copy      [M, >= K] of x's dtype; if given, the input is written to its first K columns
    up        with the strides of x; if given, the input is act(x) * up, rounded to their dtype
    """
    M, K = x.shape
    masks = masks or [Mask()] * len(factors)
    ranks = tuple(factor.shape[0 if rank_first else 1] for factor in factors)
    fp32 = operands.dtype == tl.float32
    config, splits, k_per_split = shrink_config(
        M, K, max(ranks), fp32, facts(x), factors=len(factors)
    )
    partials = [x.new_empty(splits, M, rank, dtype=torch.float32) for rank in ranks]
    grid = (triton.cdiv(M, config.block_m), triton.cdiv(max(ranks), config.block_r), splits)
    with on_device_of(x):
        _lora_shrink_kernel[grid](
            x,
            up,
            tuple(factor.contiguous() for factor in factors),
            tuple(partials),
            copy,
            tuple(mask.seed for mask in masks),
            masks[0].threshold,
            M,
            K,
            ranks,
            x.stride(0),
            copy.stride(0) if copy is not None else 0,
            k_per_split,
            RANK_FIRST=rank_first,
            ACTIVATION=activation,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            EVEN_K=K % config.block_k == 0,
            ALIGNED_MASK=K % 4 == 0,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=config.num_stages,
        )
    return partials
