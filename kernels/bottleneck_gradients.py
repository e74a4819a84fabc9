"""The gradients of a bottleneck adapter on their way through its norms and its dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from pylora.kernels.bottleneck_tiles import expanded, expanded_moments, factor_tile
from pylora.kernels.normalization import standardized, standardized_backward, weighted
from pylora.kernels.philox import keep_mask
from pylora.kernels.precision import as_operand, dot, finished_dot, rounded


@triton.jit
def projected_gradient(
    grad_ptr,  # [M, H], rows stride_grad apart
    stride_grad,
    a,  # fp32 [BLOCK_M, BLOCK_R], act(h), zero in the columns beyond R
    up_weight_ptr,  # [H, R]
    up_bias_ptr,  # [H] or None
    scaling,
    seed_ptr,  # int64 []; None without dropout
    threshold,
    after_weight_ptr,  # [H] or None
    after_eps,
    dz_ptr,  # [M, H] or None
    dz_sums_ptr,  # fp32 [programs, H] or None
    after_sums_ptr,  # fp32 [programs, H] or None
    m,  # [BLOCK_M], the tokens of this program
    M,
    H,
    R,
    AFTER: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Returns dz @ up in fp32, [BLOCK_M, BLOCK_R], for dz = mask * after'(grad).

    It stores dz, this program's sums of dz over its tokens, and those of the gradient of
    norm_after's weight.
    """
    BLOCK_R: tl.constexpr = a.shape[1]
    row = tl.minimum(m, M - 1).to(tl.int64)
    sums = tl.program_id(0).to(tl.int64) * H
    a = rounded(a, OPERAND)
    if AFTER is not None:
        mean, inverse_std, grad_mean, product = expanded_moments(
            a,
            up_weight_ptr,
            up_bias_ptr,
            scaling,
            seed_ptr,
            threshold,
            grad_ptr,
            stride_grad,
            after_weight_ptr,
            m,
            after_eps,
            M,
            H,
            R,
            AFTER,
            OPERAND,
            PRECISION,
            ALIGNED_MASK,
            BLOCK_H,
        )
    total = tl.zeros((m.shape[0], BLOCK_R), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < H
        here = (m < M)[:, None] & inside[None, :]
        factor = as_operand(factor_tile(up_weight_ptr, h, H, R, False, BLOCK_R), OPERAND)
        dz = tl.load(grad_ptr + row[:, None] * stride_grad + h[None, :], mask=here, other=0.0)
        dz = dz.to(tl.float32)
        if AFTER is not None:
            z = expanded(
                a,
                factor,
                up_bias_ptr,
                scaling,
                seed_ptr,
                threshold,
                row,
                start,
                H,
                PRECISION,
                ALIGNED_MASK,
            )
            z = standardized(z, mean, inverse_std, AFTER)
            if after_sums_ptr is not None:
                tl.store(after_sums_ptr + sums + h, tl.sum(dz * z, 0), mask=inside)
            dz = weighted(dz, after_weight_ptr, None, h, inside)
            dz = standardized_backward(dz, z, grad_mean, product, inverse_std, AFTER)
        if seed_ptr is not None:
            keep = keep_mask(seed_ptr, threshold, row, start, H, BLOCK_H, ALIGNED_MASK)
            dz = tl.where(keep, dz, 0.0)
        if dz_sums_ptr is not None:
            tl.store(dz_sums_ptr + sums + h, tl.sum(dz, 0), mask=inside)
        if dz_ptr is not None:
            value = rounded(dz, dz_ptr.dtype.element_ty)
            tl.store(dz_ptr + row[:, None] * H + h[None, :], value, mask=here)
        total += finished_dot(rounded(dz, OPERAND), factor, PRECISION)
    return total


@triton.jit
def _unweighted(
    dh,  # [BLOCK_M, BLOCK_R]
    x_ptr,  # [M, H], rows stride_x apart
    stride_x,
    down_weight_ptr,  # [R, H]
    before_weight_ptr,  # [H]
    mean,  # fp32 [BLOCK_M]
    inverse_std,  # fp32 [BLOCK_M]
    row,  # int64 [BLOCK_M], the tokens of this program
    h,  # [BLOCK_H]
    H,
    R,
    BEFORE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Returns a tile of the gradient of the standardized x, dh @ down * weight, and of this x."""
    inside = h < H
    factor = factor_tile(down_weight_ptr, h, H, R, True, dh.shape[1])
    grad = dot(dh, as_operand(factor, dh.dtype).T, PRECISION)
    grad = weighted(grad, before_weight_ptr, None, h, inside)
    x = tl.load(x_ptr + row[:, None] * stride_x + h[None, :], mask=inside[None, :], other=0.0)
    return grad, standardized(x.to(tl.float32), mean, inverse_std, BEFORE)


@triton.jit
def store_through_norm(
    dh,  # fp32 [BLOCK_M, BLOCK_R], zero in the columns beyond R
    dx_ptr,  # [M, H], contiguous
    x_ptr,  # [M, H], rows stride_x apart
    stride_x,
    down_weight_ptr,  # [R, H]
    before_weight_ptr,  # [H]
    mean,  # fp32 [BLOCK_M]
    inverse_std,  # fp32 [BLOCK_M]
    added_ptr,  # [M, H], rows stride_added apart, or None
    stride_added,
    m,  # [BLOCK_M], the tokens of this program
    M,
    H,
    R,
    BEFORE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Writes before'(dh @ down) + added to dx, rounded once.

    dh @ down is computed twice: first for what its rows and those of x have in common.
    """
    row = tl.minimum(m, M - 1).to(tl.int64)
    dh = rounded(dh, OPERAND)
    zero = tl.zeros((m.shape[0],), tl.float32)
    grad_mean, product = zero, zero
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        grad, tile = _unweighted(
            dh,
            x_ptr,
            stride_x,
            down_weight_ptr,
            before_weight_ptr,
            mean,
            inverse_std,
            row,
            h,
            H,
            R,
            BEFORE,
            PRECISION,
        )
        grad_mean += tl.sum(grad, 1)
        product += tl.sum(grad * tile, 1)
    grad_mean, product = grad_mean / H, product / H
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        grad, tile = _unweighted(
            dh,
            x_ptr,
            stride_x,
            down_weight_ptr,
            before_weight_ptr,
            mean,
            inverse_std,
            row,
            h,
            H,
            R,
            BEFORE,
            PRECISION,
        )
        dx = standardized_backward(grad, tile, grad_mean, product, inverse_std, BEFORE)
        here = (m < M)[:, None] & (h < H)[None, :]
        if added_ptr is not None:
            added = tl.load(
                added_ptr + row[:, None] * stride_added + h[None, :], mask=here, other=0.0
            )
            dx += added.to(tl.float32)
        place = dx_ptr + row[:, None] * H + h[None, :]
        tl.store(place, rounded(dx, dx_ptr.dtype.element_ty), mask=here)
