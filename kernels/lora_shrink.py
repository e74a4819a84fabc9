"""The low-rank projection: dropout(x) @ lora_A^T, and grad @ lora_B in the backward pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.configs import shrink_config
from pylora.kernels.launch import facts, on_device_of
from pylora.kernels.philox import Dropout, keep_mask
from pylora.kernels.precision import Operands, as_operand, dot


@triton.jit(do_not_specialize=["threshold", "M"])
def _lora_shrink_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    factor_ptr,  # element (r, k) at r * stride_r + k * stride_k
    parts_ptr,  # fp32 [splits, M, R]
    copy_ptr,  # [M, >= K], rows stride_copy apart, or None
    seed_ptr,  # int64 [] or None
    threshold,
    M,
    K,
    R,
    stride_x,
    stride_r,
    stride_k,
    stride_copy,
    k_per_split,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """parts[s] = (mask * x)[:, split s] @ factor[:, split s]^T

    Shapes    x [M, K] fp32|fp16|bf16; factor [R, K]; parts fp32 [splits, M, R]; copy like x
              (M = rows of x, K = in_features, R = rank; in the backward pass x is grad and K is
              out_features)
    Numerics  fp32 sums of BLOCK_K products each, added in fp32; 1 / (1 - p) is left to the reader
              of the parts, who also adds them up, in order.
    Grid      (tiles of M, tiles of R, splits of K)
    Algorithm 1. Load a tile of x once. 2. Copy it where a wider matrix is being put together.
              3. Regenerate the mask. 4. Multiply with a tile of the factor.
    Source    one pass over x for dropout and projection: LoRAFusion, arXiv:2510.00206;
              pylora/reference/lora_linear.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(m, M - 1).to(tl.int64)
    x_rows = x_ptr + row[:, None] * stride_x + k[None, :]
    rank = tl.minimum(r, R - 1).to(tl.int64)
    factor_rows = factor_ptr + rank[:, None] * stride_r
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = split * k_per_split
    for start in range(first, tl.minimum(first + k_per_split, K), BLOCK_K):
        # 1.
        factor_tile = factor_rows + (start + k).to(tl.int64)[None, :] * stride_k
        if EVEN_K:
            x = tl.load(x_rows + start)
            factor = tl.load(factor_tile)
        else:
            inside = (start + k < K)[None, :]
            x = tl.load(x_rows + start, mask=inside, other=0.0)
            factor = tl.load(factor_tile, mask=inside, other=0.0)
        # 2.
        if copy_ptr is not None:
            copy = copy_ptr + m.to(tl.int64)[:, None] * stride_copy + (start + k)[None, :]
            here = (m < M)[:, None] & (start + k < K)[None, :] & (tl.program_id(1) == 0)
            tl.store(copy, x, mask=here)
        # 3.
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, threshold, row, start, K, BLOCK_K, ALIGNED_MASK)
            x = tl.where(keep, x, 0.0)
        # 4.
        acc += dot(as_operand(x, OPERAND), as_operand(factor, OPERAND).T, PRECISION)
    out = parts_ptr + (split.to(tl.int64) * M + m.to(tl.int64)[:, None]) * R + r[None, :]
    tl.store(out, acc, mask=(m < M)[:, None] & (r < R)[None, :])


def lora_shrink(
    x: Tensor,
    factor: Tensor,
    operands: Operands,
    dropout: Dropout | None = None,
    copy: Tensor | None = None,
) -> Tensor:
    """fp32 [splits, M, R] whose sum over splits is (mask * x) @ factor^T, without 1 / (1 - p).

    x         [M, K], any row stride
    factor    [R, K], any strides
    copy      [M, >= K] of x's dtype: x is written to its first K columns on the way
    """
    (M, K), R = x.shape, factor.shape[0]
    dropout = dropout or Dropout()
    config, splits, k_per_split = shrink_config(M, K, R, operands.dtype == tl.float32, facts(x))
    parts = x.new_empty(splits, M, R, dtype=torch.float32)
    grid = (triton.cdiv(M, config.block_m), triton.cdiv(R, config.block_r), splits)
    with on_device_of(x):
        _lora_shrink_kernel[grid](
            x,
            factor,
            parts,
            copy,
            dropout.seed,
            dropout.threshold,
            M,
            K,
            R,
            x.stride(0),
            factor.stride(0),
            factor.stride(1),
            copy.stride(0) if copy is not None else 0,
            k_per_split,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            EVEN_K=K % config.block_k == 0,
            ALIGNED_MASK=K % 4 == 0,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return parts
