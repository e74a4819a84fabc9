"""The low-rank projection of each token by its own adapter: x[m] @ factor[i]^T, or a gradient's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.adapter_tokens import AdapterTokens, tile_of
from pylora.kernels.configs import cdiv, shrink_config
from pylora.kernels.launch import MAX_REGISTERS, facts, on_device_of
from pylora.kernels.precision import Operands, as_operand, dot


@triton.jit(do_not_specialize=["groups", "by_place", "M"])
def _multi_lora_shrink_kernel(
    x_ptr,  # [M, K], rows stride_x apart
    factor_ptr,  # element (i, r, k) at i * stride_i + r * stride_r + k * stride_k
    partials_ptr,  # fp32 [splits, M, R]
    order_ptr,  # this and the next three: see `AdapterTokens.arguments`
    begin_ptr,
    groups,
    by_place,
    M,
    K,
    R,
    stride_x,
    stride_i,
    stride_r,
    stride_k,
    k_per_split,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """partials[s, m] = x[m, split s] @ factor[i, :, split s]^T  (token m has adapter i)

    Shapes    x [M, K] fp32|fp16|bf16; factor [adapters, R, K]; partials fp32 [splits, M, R], not
              written for tokens without an adapter  (M = tokens, K = in_features, R = rank; in the
              backward pass x is grad and K is out_features)
    Numerics  fp32 sums of BLOCK_K products each, added in fp32. The reader of the partials adds
              them up, in order.
    Grid      (tiles of tokens, tiles of R, splits of K)
    Algorithm 1. Find the tile's tokens; there is nothing to do if they have no adapter. 2. Gather
              their part of K and multiply it by the adapter's factor. 3. Store each token's row in
              the order of x.
    Source    segmented gather of Punica, arXiv:2310.18547;
              pylora/reference/multi_lora_linear.py
    """
    # 1. Find the tokens.
    adapter, first, end = tile_of(begin_ptr, groups, tl.program_id(0), BLOCK_M, by_place)
    if (adapter == groups - 1) | (first >= end):
        return
    place = first + tl.arange(0, BLOCK_M)
    # Places beyond the end repeat the adapter's last token and are not stored.
    token = tl.load(order_ptr + tl.minimum(place, end - 1))
    # 2. Gather and multiply.
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + token[:, None] * stride_x + k[None, :]
    rank = tl.minimum(r, R - 1).to(tl.int64)
    factor_rows = factor_ptr + adapter.to(tl.int64) * stride_i + rank[:, None] * stride_r
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    start_k = split * k_per_split
    for start in range(start_k, tl.minimum(start_k + k_per_split, K), BLOCK_K):
        factor_tile = factor_rows + (start + k).to(tl.int64)[None, :] * stride_k
        if EVEN_K:
            x = tl.load(x_rows + start)
            factor = tl.load(factor_tile)
        else:
            inside = (start + k < K)[None, :]
            x = tl.load(x_rows + start, mask=inside, other=0.0)
            factor = tl.load(factor_tile, mask=inside, other=0.0)
        acc += dot(as_operand(x, OPERAND), as_operand(factor, OPERAND).T, PRECISION)
    # 3. Store in the order of x.
    out = partials_ptr + (split.to(tl.int64) * M + token[:, None]) * R + r[None, :]
    tl.store(out, acc, mask=(place < end)[:, None] & (r < R)[None, :])


def multi_lora_shrink(
    x: Tensor, factor: Tensor, tokens: AdapterTokens, operands: Operands
) -> Tensor:
    """The partials fp32 [splits, M, R] of x[m] @ factor[i]^T, where token m has adapter i.

    They are undefined for tokens without an adapter.

    x         [M, K], any row stride
    factor    [adapters, R, K], any strides
    """
    (M, K), (adapters, R, _) = x.shape, factor.shape
    config, splits, k_per_split = shrink_config(
        M, K, R, operands.dtype == tl.float32, facts(x), adapters
    )
    partials = x.new_empty(splits, M, R, dtype=torch.float32)
    with on_device_of(x):
        _multi_lora_shrink_kernel[(tokens.tiles(config.block_m), cdiv(R, config.block_r), splits)](
            x_ptr=x,
            factor_ptr=factor,
            partials_ptr=partials,
            **tokens.arguments(config.block_m),
            M=M,
            K=K,
            R=R,
            stride_x=x.stride(0),
            stride_i=factor.stride(0),
            stride_r=factor.stride(1),
            stride_k=factor.stride(2),
            k_per_split=k_per_split,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            EVEN_K=K % config.block_k == 0,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=config.num_stages,
        )
    return partials
