"""The gradients of stacked lora_A and lora_B: each adapter's sum over its own tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.adapter_tokens import AdapterTokens, tile_of
from pylora.kernels.configs import SUM_OF_PARTIALS, cdiv, weight_grad_config
from pylora.kernels.launch import MAX_REGISTERS, facts, on_device_of
from pylora.kernels.precision import Operands, as_operand, dot, rounded


@triton.jit
def _first_slot(begin, tokens_per_split):
    """The slot of the first partial of an adapter whose sum is split.

    Its tokens begin at place `begin`. c > L tokens, where L is tokens_per_split, have
    ceil(c / L) <= floor(2 c / L) splits, so no two adapters share a slot.
    """
    return (2 * begin.to(tl.int64) // tokens_per_split).to(tl.int32)


@triton.jit(do_not_specialize=["groups", "by_place", "M", "tokens_per_split"])
def _multi_lora_weight_grad_kernel(
    wide_ptr,  # [M, P], rows stride_wide apart
    narrow_ptr,  # fp32 [M, R]
    scalings_ptr,  # fp32 [adapters]
    out_ptr,  # element (i, r, p) at i * R * P + r * stride_r + p * stride_p
    partials_ptr,  # fp32 [slots, R, P] in out's layout, or None if no adapter's sum is split
    order_ptr,  # this and the next three: see `AdapterTokens.arguments`
    begin_ptr,
    groups,
    by_place,
    M,
    P,
    R,
    stride_wide,
    stride_r,
    stride_p,
    tokens_per_split,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[i] = (scalings[i] * narrow)^T @ wide over the tokens of adapter i

    Shapes    wide [M, P] fp32|fp16|bf16; narrow fp32 [M, R]; out [adapters, R, P]
              (wide x and narrow grad @ lora_B give dlora_A, P = in_features; wide grad and narrow h
              give dlora_B^T, P = out_features; M = tokens, R = rank)
    Numerics  fp32 sums of BLOCK_M products each, added in fp32, rounded once.
    Grid      (tiles of P, fastest, times splits of the tokens; tiles of R)
    Algorithm 1. Find the split's tokens: at most tokens_per_split of one adapter, so the work stays
              even if one adapter has all tokens. 2. Gather a tile of each operand, zero beyond the
              end, and multiply. 3. Store the sum if it is whole, else as a partial, which
              `_sum_of_partials_kernel` adds up, in order.
    Source    pylora/reference/multi_lora_linear.py
    """
    tiles_p = tl.cdiv(P, BLOCK_P)
    pid_p, split = tl.program_id(0) % tiles_p, tl.program_id(0) // tiles_p
    # 1. Find the tokens.
    adapter, first, end = tile_of(begin_ptr, groups, split, tokens_per_split, by_place)
    if (adapter == groups - 1) | (first >= end):
        return
    p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    scaling = tl.load(scalings_ptr + adapter)
    # 2. Gather and multiply.
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for start in range(first, end, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        token = tl.load(order_ptr + place, mask=place < end, other=0)
        wide = tl.load(
            wide_ptr + token[:, None] * stride_wide + p[None, :],
            mask=(place < end)[:, None] & (p < P)[None, :],
            other=0.0,
        )
        narrow = tl.load(
            narrow_ptr + token[:, None] * R + r[None, :],
            mask=(place < end)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        narrow = rounded(scaling * narrow, OPERAND)
        acc += dot(as_operand(wide, OPERAND).T, narrow, PRECISION)
    # 3. Store the sum or the partial.
    offset = r.to(tl.int64)[None, :] * stride_r + p.to(tl.int64)[:, None] * stride_p
    inside = (p < P)[:, None] & (r < R)[None, :]
    size = R.to(tl.int64) * P
    begin = tl.load(begin_ptr + adapter)
    if partials_ptr is not None:
        if tl.load(begin_ptr + adapter + 1) - begin > tokens_per_split:
            slot = _first_slot(begin, tokens_per_split) + (first - begin) // tokens_per_split
            tl.store(partials_ptr + slot * size + offset, acc, mask=inside)
            return
    out = out_ptr + adapter * size + offset
    tl.store(out, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens_per_split"])
def _sum_of_partials_kernel(
    partials_ptr,  # fp32 [slots, size]
    out_ptr,  # [adapters, size]
    begin_ptr,  # see `AdapterTokens`
    size,
    tokens_per_split,
    BLOCK: tl.constexpr,
):
    """out[i] = the sum of adapter i's partials, in order; adapters with one split have no partials

    Shapes    partials fp32 [slots, size]; out [adapters, size]  (size = R * P)
    Grid      (tiles of size, fastest, times adapters)
    """
    tiles = tl.cdiv(size, BLOCK)
    element = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    adapter = tl.program_id(0) // tiles
    begin = tl.load(begin_ptr + adapter)
    splits = tl.cdiv(tl.load(begin_ptr + adapter + 1) - begin, tokens_per_split)
    if splits <= 1:
        return
    partial_ptr = partials_ptr + _first_slot(begin, tokens_per_split).to(tl.int64) * size + element
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(splits):
        total += tl.load(partial_ptr, mask=element < size, other=0.0)
        partial_ptr += size
    out = out_ptr + adapter.to(tl.int64) * size + element
    tl.store(out, rounded(total, out_ptr.dtype.element_ty), mask=element < size)


def multi_lora_weight_grad(
    wide: Tensor,
    narrow: Tensor,
    scalings: Tensor,
    tokens: AdapterTokens,
    operands: Operands,
    out: Tensor,
) -> None:
    """Writes (scalings[i] * narrow)^T @ wide, summed over the tokens of each adapter i, to `out`.

    wide      [M, P], any row stride
    narrow    fp32 [M, R], contiguous
    scalings  fp32 [adapters]
    out       [adapters, R, P] of zeros, dense in memory with P or R innermost; adapters without
              tokens are not written
    """
    (M, P), R = wide.shape, narrow.shape[1]
    fp32 = operands.dtype == tl.float32
    config, splits, tokens_per_split = weight_grad_config(M, P, R, fp32, facts(wide))
    partials = None
    if splits > 1:
        partials = wide.new_empty(2 * M // tokens_per_split, R * P, dtype=torch.float32)
    token_splits = tokens.tiles(tokens_per_split)
    with on_device_of(wide):
        _multi_lora_weight_grad_kernel[
            (cdiv(P, config.block_m) * token_splits, cdiv(R, config.block_r))
        ](
            wide_ptr=wide,
            narrow_ptr=narrow,
            scalings_ptr=scalings,
            out_ptr=out,
            partials_ptr=partials,
            **tokens.arguments(tokens_per_split),
            M=M,
            P=P,
            R=R,
            stride_wide=wide.stride(0),
            stride_r=out.stride(1),
            stride_p=out.stride(2),
            tokens_per_split=tokens_per_split,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            BLOCK_P=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_M=config.block_k,
            num_warps=config.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=config.num_stages,
        )
        if partials is not None:
            size, elements = R * P, SUM_OF_PARTIALS.elements
            _sum_of_partials_kernel[(cdiv(size, elements) * out.shape[0],)](
                partials,
                out,
                tokens.begin,
                size,
                tokens_per_split,
                BLOCK=elements,
                num_warps=SUM_OF_PARTIALS.num_warps,
                maxnreg=MAX_REGISTERS,
            )
