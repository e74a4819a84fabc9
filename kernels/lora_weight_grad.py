"""The gradients of lora_A and lora_B: products that sum over the tokens of x or grad."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.activation import gated
from pylora.kernels.configs import weight_grad_config
from pylora.kernels.launch import MAX_REGISTERS, facts, on_device_of
from pylora.kernels.philox import Mask, keep_mask
from pylora.kernels.precision import Operands, as_operand, dot


@triton.jit(do_not_specialize=["threshold", "M"])
def _lora_weight_grad_kernel(
    wide_ptr,  # [M, P], rows stride_wide apart
    up_ptr,  # like wide, or None; if given, wide is gate, and act(gate) * up takes its place
    narrow_ptrs,  # tuples have one entry per projection: fp32 [M, R]
    partials_ptrs,  # fp32 [splits, R, P]
    seed_ptrs,  # int64 [] or None
    threshold,
    M,
    P,
    Rs,
    stride_wide,
    m_per_split,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """partials[s] = narrow[split s]^T @ (mask * wide)[split s] for each projection

    Shapes    wide [M, P] fp32|fp16|bf16; narrow fp32 [M, R]; partials fp32 [splits, R, P]
              (wide x and narrow dh give dlora_A [R, P = in_features]; wide grad and narrow
              scaling * act(h) give dlora_B^T [R, P = out_features]; M = tokens, R = rank)
    Numerics  fp32 sums of BLOCK_M products each, added in fp32; no atomics: the splits of M are
              added up afterwards, in order.
    Grid      (tiles of P, tiles of the largest R, splits of M)
    Algorithm 1. Load a tile of wide once for all projections. 2. Regenerate each projection's mask.
              3. Multiply by a tile of its narrow matrix.
    Source    pylora/reference/lora_linear.py
    """
    first_p = tl.program_id(0) * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    step = tl.arange(0, BLOCK_M)
    sums = (tl.zeros((BLOCK_P, BLOCK_R), tl.float32),) * len(narrow_ptrs)
    first = split * m_per_split
    for start in range(first, tl.minimum(first + m_per_split, M), BLOCK_M):
        # 1. Load a tile of wide.
        m = (start + step).to(tl.int64)
        offsets = m[:, None] * stride_wide + p[None, :]
        here = (m < M)[:, None] & (p < P)[None, :]
        wide = tl.load(wide_ptr + offsets, mask=here, other=0.0)
        if up_ptr is not None:
            wide = gated(wide, tl.load(up_ptr + offsets, mask=here, other=0.0), ACTIVATION)
        added = ()
        for i in tl.static_range(len(narrow_ptrs)):
            narrow = tl.load(
                narrow_ptrs[i] + m[:, None] * Rs[i] + r[None, :],
                mask=(m < M)[:, None] & (r < Rs[i])[None, :],
                other=0.0,
            )
            # 2. Regenerate the mask.
            kept = wide
            if seed_ptrs[i] is not None:
                keep = keep_mask(seed_ptrs[i], threshold, m, first_p, P, BLOCK_P, ALIGNED_MASK)
                kept = tl.where(keep, wide, 0.0)
            # 3. Multiply.
            product = dot(as_operand(kept, OPERAND).T, as_operand(narrow, OPERAND), PRECISION)
            added = added + (sums[i] + product,)
        sums = added
    for i in tl.static_range(len(narrow_ptrs)):
        R = Rs[i]
        out = partials_ptrs[i] + (split.to(tl.int64) * R + r.to(tl.int64)[None, :]) * P + p[:, None]
        tl.store(out, sums[i], mask=(p < P)[:, None] & (r < R)[None, :])


def lora_weight_grad(
    wide: Tensor,
    narrow: Sequence[Tensor],
    operands: Operands,
    masks: Sequence[Mask] = (),
    up: Tensor | None = None,
    activation: str = "identity",
) -> list[Tensor]:
    """narrow^T @ dropout(wide), fp32 [R, P], for each narrow matrix.

    wide      [M, P], any row stride
    narrow    fp32 [M, R] each
    masks     one for each narrow matrix, all with the same probability; empty without dropout
    up        with the strides of wide; if given, act(wide) * up, rounded to their dtype, takes the
              place of wide
    """
    M, P = wide.shape
    ranks = tuple(matrix.shape[1] for matrix in narrow)
    masks = masks or [Mask()] * len(narrow)
    fp32 = operands.dtype == tl.float32
    config, splits, m_per_split = weight_grad_config(
        M, P, max(ranks), fp32, facts(wide), len(ranks)
    )
    partials = [wide.new_empty(splits, rank, P, dtype=torch.float32) for rank in ranks]
    grid = (triton.cdiv(P, config.block_m), triton.cdiv(max(ranks), config.block_r), splits)
    with on_device_of(wide):
        _lora_weight_grad_kernel[grid](
            wide,
            up,
            tuple(narrow),
            tuple(partials),
            tuple(mask.seed for mask in masks),
            masks[0].threshold,
            M,
            P,
            ranks,
            wide.stride(0),
            m_per_split,
            ACTIVATION=activation,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            ALIGNED_MASK=P % 4 == 0,
            BLOCK_P=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_M=config.block_k,
            num_warps=config.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=config.num_stages,
        )
    totals = [p[0] if splits == 1 else p.sum(0) for p in partials]
    scale = masks[0].scale
    return totals if scale == 1.0 else [total.mul_(scale) for total in totals]
