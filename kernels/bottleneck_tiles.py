"""The two projections of a bottleneck adapter for the tokens of one program, and its launch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Bottleneck, Norm
from pylora.kernels.configs import bottleneck_tile
from pylora.kernels.epilogue import factor_pointers
from pylora.kernels.launch import MAX_REGISTERS, facts
from pylora.kernels.normalization import (
    inverse_std_of,
    merged_mean,
    merged_product,
    standardized,
    weighted,
)
from pylora.kernels.philox import keep_mask
from pylora.kernels.precision import (
    as_operand,
    dot,
    dot_add,
    finished_dot,
    lora_operands,
    output_operands,
    rounded,
)


@triton.jit
def projected(
    wide_ptr,  # [M, H], rows stride_wide apart
    stride_wide,
    row,  # int64 [BLOCK_M], the tokens of this program
    norm_weight_ptr,  # [H] or None
    norm_bias_ptr,  # [H] or None
    mean,  # fp32 [BLOCK_M]; None without a norm
    inverse_std,  # fp32 [BLOCK_M]; None without a norm
    standardized_ptr,  # [M, H], or None if nobody needs the standardized input
    factor_ptr,  # [R, H] if RANK_FIRST, else [H, R]
    bias_ptr,  # [R] or None
    H,
    R,
    RANK_FIRST: tl.constexpr,
    NORM: tl.constexpr,  # the kind of the norm, or None
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Returns norm(wide) @ factor + bias in fp32, [BLOCK_M, BLOCK_R]; columns beyond R mean
    nothing."""
    rank = tl.minimum(tl.arange(0, BLOCK_R), R - 1)
    total = tl.zeros((row.shape[0], BLOCK_R), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        pointers = factor_pointers(factor_ptr, h, rank, H, R, RANK_FIRST)
        inside = h < H
        if EVEN_H:
            wide = tl.load(wide_ptr + row[:, None] * stride_wide + h[None, :])
            factor = tl.load(pointers)
        else:
            wide = tl.load(
                wide_ptr + row[:, None] * stride_wide + h[None, :], mask=inside[None, :], other=0.0
            )
            factor = tl.load(pointers, mask=inside[:, None], other=0.0)
        b = as_operand(factor, OPERAND)
        if NORM is not None:
            tile = standardized(wide.to(tl.float32), mean, inverse_std, NORM)
            if standardized_ptr is not None:
                # The rows beyond M are the last token once more and write its values again.
                place = standardized_ptr + row[:, None] * H + h[None, :]
                value = rounded(tile, standardized_ptr.dtype.element_ty)
                tl.store(place, value, mask=inside[None, :])
            tile = weighted(tile, norm_weight_ptr, norm_bias_ptr, h, inside)
            total += finished_dot(rounded(tile, OPERAND), b, PRECISION)
        elif wide.dtype == OPERAND:
            total = dot_add(total, wide, b, PRECISION)
        else:  # a tile that was converted in registers must outlive its product (`lora_shrink`)
            total += finished_dot(as_operand(wide, OPERAND), b, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + rank).to(tl.float32)[None, :]
    return total


@triton.jit
def factor_tile(factor_ptr, h, H, R, RANK_FIRST: tl.constexpr, BLOCK_R: tl.constexpr):
    """Returns the columns h [Q] of a factor, [Q, BLOCK_R], with zeros beyond H and R."""
    r = tl.arange(0, BLOCK_R)
    pointers = factor_pointers(factor_ptr, h, r, H, R, RANK_FIRST)
    return tl.load(pointers, mask=(h < H)[:, None] & (r < R)[None, :], other=0.0)


@triton.jit
def expanded(
    a,  # [BLOCK_M, BLOCK_R]
    factor,  # [BLOCK_H, BLOCK_R]
    bias_ptr,  # [H] or None
    scale,
    seed_ptr,  # int64 []; None without dropout
    threshold,
    row,  # int64 [BLOCK_M], the tokens of this program
    start,  # the tile's columns are [start, start + BLOCK_H)
    H,
    PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
):
    """Returns mask * scale * (a @ factor^T + bias), fp32 [BLOCK_M, BLOCK_H]; it is 0 beyond H.

    The scale of dropout's kept elements is a part of `scale`.
    """
    BLOCK_H: tl.constexpr = factor.shape[0]
    out = dot(a, factor.T, PRECISION)
    if bias_ptr is not None:
        h = start + tl.arange(0, BLOCK_H)
        out += tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    out *= scale
    if seed_ptr is not None:
        keep = keep_mask(seed_ptr, threshold, row, start, H, BLOCK_H, ALIGNED_MASK)
        out = tl.where(keep, out, 0.0)
    return out


@triton.jit
def expanded_moments(
    a,  # [BLOCK_M, BLOCK_R]
    factor_ptr,  # [H, R]
    bias_ptr,  # [H] or None
    scale,
    seed_ptr,  # int64 []; None without dropout
    threshold,
    grad_ptr,  # [M, H], rows stride_grad apart; None in the forward
    stride_grad,
    norm_weight_ptr,  # [H]
    m,  # [BLOCK_M], the tokens of this program
    eps,
    M,
    H,
    R,
    NORM: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Returns what norm(z) needs of z's rows, and its backward of those of grad * norm_weight.

    z is the result of `expanded`. The results are (mean, inverse_std, grad_mean, product), fp32
    [BLOCK_M] each; the last two are the arguments of `standardized_backward`, or 0 without grad.
    """
    BLOCK_R: tl.constexpr = a.shape[1]
    row = tl.minimum(m, M - 1).to(tl.int64)
    zero = tl.zeros((m.shape[0],), tl.float32)
    mean, square, grad_mean, product = zero, zero, zero, zero
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < H
        factor = as_operand(factor_tile(factor_ptr, h, H, R, False, BLOCK_R), OPERAND)
        z = expanded(
            a,
            factor,
            bias_ptr,
            scale,
            seed_ptr,
            threshold,
            row,
            start,
            H,
            PRECISION,
            ALIGNED_MASK,
        )
        count = tl.minimum(start + BLOCK_H, H)
        added = count - start
        square = merged_product(square, mean, mean, z, z, inside, added, count, NORM)
        if grad_ptr is not None:
            here = (m < M)[:, None] & inside[None, :]
            grad = tl.load(grad_ptr + row[:, None] * stride_grad + h[None, :], here, 0.0)
            grad = weighted(grad.to(tl.float32), norm_weight_ptr, None, h, inside)
            product = merged_product(product, mean, grad_mean, z, grad, inside, added, count, NORM)
            grad_mean = merged_mean(grad_mean, grad, added, count, NORM)
        mean = merged_mean(mean, z, added, count, NORM)
    inverse_std = inverse_std_of(square, H, eps)
    return mean, inverse_std, grad_mean, product / H * inverse_std


@triton.jit
def store_expanded(
    low,  # fp32 [BLOCK_M, BLOCK_R], zero in the columns beyond R
    out_ptr,  # [M, H], contiguous
    factor_ptr,  # [R, H] if RANK_FIRST, else [H, R]
    bias_ptr,  # [H] or None
    seed_ptr,  # int64 []; None without dropout
    threshold,
    norm_weight_ptr,  # [H] or None
    norm_bias_ptr,  # [H] or None
    norm_eps,
    added_ptr,  # [M, H], rows stride_added apart, or None
    stride_added,
    m,  # [BLOCK_M], the tokens of this program
    scale,
    M,
    H,
    R,
    RANK_FIRST: tl.constexpr,
    NORM: tl.constexpr,  # the kind of the norm, or None
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Writes norm(mask * scale * (low @ factor + bias)) + added to out, rounded once.

    With a norm, everything under it is computed twice: first for its statistics.
    """
    BLOCK_R: tl.constexpr = low.shape[1]
    row = m.to(tl.int64)
    drawn = tl.minimum(m, M - 1).to(tl.int64)
    a = rounded(low, OPERAND)
    if NORM is not None:
        mean, inverse_std, _, _ = expanded_moments(
            a,
            factor_ptr,
            bias_ptr,
            scale,
            seed_ptr,
            threshold,
            None,
            0,
            None,
            m,
            norm_eps,
            M,
            H,
            R,
            NORM,
            OPERAND,
            PRECISION,
            ALIGNED_MASK,
            BLOCK_H,
        )
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < H
        factor = factor_tile(factor_ptr, h, H, R, RANK_FIRST, BLOCK_R)
        out = expanded(
            a,
            as_operand(factor, OPERAND),
            bias_ptr,
            scale,
            seed_ptr,
            threshold,
            drawn,
            start,
            H,
            PRECISION,
            ALIGNED_MASK,
        )
        if NORM is not None:
            out = standardized(out, mean, inverse_std, NORM)
            out = weighted(out, norm_weight_ptr, norm_bias_ptr, h, inside)
        here = (m < M)[:, None] & inside[None, :]
        if added_ptr is not None:
            added = tl.load(
                added_ptr + row[:, None] * stride_added + h[None, :], mask=here, other=0.0
            )
            out += added.to(tl.float32)
        place = out_ptr + row[:, None] * H + h[None, :]
        tl.store(place, rounded(out, out_ptr.dtype.element_ty), mask=here)


def norm_arguments(norm: Norm | None) -> tuple[Tensor | None, Tensor | None, float]:
    """(weight, bias, eps) of a norm, as kernels take them."""
    return (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)


def launch_options(
    x: Tensor, adapter: Bottleneck, backward: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """(the grid, the constants and options) of the forward or the backward kernel for x [M, H]."""
    M, H = x.shape
    before, after = adapter.norm_before, adapter.norm_after
    operands = lora_operands(x.dtype, adapter.down.dtype)
    out = output_operands(x.dtype, adapter.down.dtype)
    if after is not None and not backward:
        out = operands  # the norm enlarges errors if it subtracts a large mean
    fp32 = operands.dtype == tl.float32
    # A norm of the output needs registers for a tile of it, and for its gradient in the backward.
    # Products in fp32 arithmetic leave the fewest.
    narrow = after is not None and (backward or fp32)
    if fp32 and backward and adapter.dropout is not None:
        narrow = True
    config = bottleneck_tile(M, adapter.size, fp32, facts(x), narrow)
    options = {
        "ACTIVATION": adapter.activation,
        "BEFORE": None if before is None else before.kind,
        "AFTER": None if after is None else after.kind,
        "OPERAND": operands.dtype,
        "PRECISION": operands.precision,
        "OUT_OPERAND": out.dtype,
        "OUT_PRECISION": out.precision,
        "EVEN_H": H % config.block_k == 0,
        "ALIGNED_MASK": H % 4 == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_H": config.block_k,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "maxnreg": MAX_REGISTERS,
        "num_stages": config.num_stages,
    }
    return (triton.cdiv(M, config.block_m),), options
