"""The gradients of lora_A and lora_B: tall and narrow sums over the rows of x and grad."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.configs import weight_grad_config
from pylora.kernels.launch import facts, on_device_of
from pylora.kernels.philox import Dropout, keep_mask
from pylora.kernels.precision import Operands, as_operand, dot


@triton.jit(do_not_specialize=["threshold", "M"])
def _lora_weight_grad_kernel(
    wide_ptr,  # [M, P], rows stride_wide apart
    narrow_ptr,  # fp32 [M, R]
    parts_ptr,  # fp32 [splits, R, P]
    seed_ptr,  # int64 [] or None
    threshold,
    M,
    P,
    R,
    stride_wide,
    m_per_split,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """parts[s] = narrow[split s]^T @ (mask * wide)[split s]

    Shapes    wide [M, P] fp32|fp16|bf16; narrow fp32 [M, R]; parts fp32 [splits, R, P]
              (wide x and narrow dh give dlora_A [R, P = in_features]; wide grad and narrow
              scaling * act(h) give dlora_B^T [R, P = out_features]; M = rows)
    Numerics  fp32 sums of BLOCK_M products each, added in fp32; no atomics: the splits of M are
              added up afterwards, in order.
    Grid      (tiles of P, tiles of R, splits of M)
    Algorithm 1. Load a tile of each. 2. Regenerate the mask. 3. Multiply.
    Source    pylora/reference/lora_linear.py
    """
    first_p = tl.program_id(0) * BLOCK_P
    p = first_p + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    step = tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    first = split * m_per_split
    for start in range(first, tl.minimum(first + m_per_split, M), BLOCK_M):
        # 1.
        m = (start + step).to(tl.int64)
        wide = tl.load(
            wide_ptr + m[:, None] * stride_wide + p[None, :],
            mask=(m < M)[:, None] & (p < P)[None, :],
            other=0.0,
        )
        narrow = tl.load(
            narrow_ptr + m[:, None] * R + r[None, :],
            mask=(m < M)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        # 2.
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, threshold, m, first_p, P, BLOCK_P, ALIGNED_MASK)
            wide = tl.where(keep, wide, 0.0)
        # 3.
        acc += dot(as_operand(wide, OPERAND).T, as_operand(narrow, OPERAND), PRECISION)
    out = parts_ptr + (split.to(tl.int64) * R + r.to(tl.int64)[None, :]) * P + p[:, None]
    tl.store(out, acc, mask=(p < P)[:, None] & (r < R)[None, :])


def lora_weight_grad(
    wide: Tensor, narrow: Tensor, operands: Operands, dropout: Dropout | None = None
) -> Tensor:
    """narrow^T @ dropout(wide) in fp32 [R, P]: wide [M, P], any row stride; narrow fp32 [M, R]."""
    (M, P), R = wide.shape, narrow.shape[1]
    dropout = dropout or Dropout()
    config, splits, m_per_split = weight_grad_config(
        M, P, R, operands.dtype == tl.float32, facts(wide)
    )
    parts = wide.new_empty(splits, R, P, dtype=torch.float32)
    grid = (triton.cdiv(P, config.block_m), triton.cdiv(R, config.block_r), splits)
    with on_device_of(wide):
        _lora_weight_grad_kernel[grid](
            wide,
            narrow,
            parts,
            dropout.seed,
            dropout.threshold,
            M,
            P,
            R,
            wide.stride(0),
            m_per_split,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            ALIGNED_MASK=P % 4 == 0,
            BLOCK_P=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_M=config.block_k,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    total = parts[0] if splits == 1 else parts.sum(0)
    return total.mul_(dropout.scale) if dropout.seed is not None else total
