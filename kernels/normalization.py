"""LayerNorm and RMSNorm inside the kernels, over rows that are read a tile at a time.

    y = standardized * weight + bias,    standardized = (x - mean) * inverse_std

inverse_std is 1 / sqrt(variance + eps) for "layer_norm", and 1 / sqrt(mean square + eps) for
"rms_norm", whose mean is 0. The formulas are those of `pylora.reference.normalization`, in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mean_of_tile(tile, added):
    return tl.sum(tile, 1) / added.to(tl.float32)


@triton.jit
def merged_mean(mean, tile, added, count, NORM: tl.constexpr):
    """Returns the mean [P] of rows after a tile fp32 [P, Q] has been added to them; 0 for RMSNorm.

    mean     fp32 [P], of the columns before the tile
    added    the number of the tile's columns; the tile is zero in those behind them
    count    the number of columns with those of the tile
    """
    if NORM == "layer_norm":
        share = added.to(tl.float32) / count.to(tl.float32)
        mean += (_mean_of_tile(tile, added) - mean) * share
    return mean


@triton.jit
def merged_product(
    product, mean, other_mean, tile, other, inside, added, count, NORM: tl.constexpr
):
    """Returns the product [P] of two matrices' rows after a tile of each has been added to them.

    The product sums (a - mean of a) * (b - mean of b) over the columns; for RMSNorm it sums a * b.
    No difference of large sums is taken (Chan, Golub and LeVeque, "Algorithms for Computing the
    Sample Variance", 1983), so rows far from zero lose no digits.

    mean, other_mean    fp32 [P], of the columns before the tiles
    inside              bool [Q], true for the first `added` columns of the tiles

    The other arguments are those of `merged_mean`.
    """
    if NORM == "layer_norm":
        tile_mean, of_other = _mean_of_tile(tile, added), _mean_of_tile(other, added)
        tile = tl.where(inside[None, :], tile - tile_mean[:, None], 0.0)
        other = tl.where(inside[None, :], other - of_other[:, None], 0.0)
        share = (count - added).to(tl.float32) * (added.to(tl.float32) / count.to(tl.float32))
        product += (tile_mean - mean) * (of_other - other_mean) * share
    return product + tl.sum(tile * other, 1)


@triton.jit
def inverse_std_of(square, H, eps):
    """Returns inverse_std [P]; `square` is the product of the rows with themselves."""
    return tl.rsqrt(square / H + eps)


@triton.jit
def row_statistics(
    x_ptr,  # [M, H], rows stride_x apart
    stride_x,
    row,  # int64 [P]
    H,
    eps,
    NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Returns (mean, inverse_std), fp32 [P] each, of rows in memory."""
    mean = tl.zeros((row.shape[0],), tl.float32)
    square = tl.zeros((row.shape[0],), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < H
        tile = tl.load(x_ptr + row[:, None] * stride_x + h[None, :], inside[None, :], 0.0)
        tile = tile.to(tl.float32)
        count = tl.minimum(start + BLOCK_H, H)
        added = count - start
        square = merged_product(square, mean, mean, tile, tile, inside, added, count, NORM)
        mean = merged_mean(mean, tile, added, count, NORM)
    return mean, inverse_std_of(square, H, eps)


@triton.jit
def standardized(tile, mean, inverse_std, NORM: tl.constexpr):
    """Returns the standardized tile fp32 [P, Q] of rows with these statistics [P]."""
    if NORM == "layer_norm":
        tile -= mean[:, None]
    return tile * inverse_std[:, None]


@triton.jit
def weighted(tile, weight_ptr, bias_ptr, h, inside):
    """Returns tile [P, Q] * weight + bias, whose columns are h [Q]; 0 outside."""
    tile *= tl.load(weight_ptr + h, mask=inside, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        tile += tl.load(bias_ptr + h, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tile


@triton.jit
def standardized_backward(grad, tile, grad_mean, product, inverse_std, NORM: tl.constexpr):
    """Returns the gradient [P, Q] of x, given that of the standardized x.

    tile         the standardized x
    grad_mean    [P], the mean of a row of grad; not read for RMSNorm
    product      [P], the mean of a row of grad * standardized x
    """
    grad -= tile * product[:, None]
    if NORM == "layer_norm":
        grad -= grad_mean[:, None]
    return grad * inverse_std[:, None]
