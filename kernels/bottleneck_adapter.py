"""The forward of a bottleneck adapter in one kernel; one program has some of the tokens."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Bottleneck
from pylora.kernels.activation import activate
from pylora.kernels.bottleneck_tiles import (
    launch_options,
    norm_arguments,
    projected,
    store_expanded,
)
from pylora.kernels.launch import on_device_of
from pylora.kernels.normalization import row_statistics
from pylora.kernels.philox import mask_of


@triton.jit(do_not_specialize=["threshold", "M"])
def _bottleneck_adapter_kernel(
    x_ptr,  # [M, H], rows stride_x apart
    residual_ptr,  # [M, H], rows stride_residual apart, or None
    y_ptr,  # [M, H]
    down_weight_ptr,  # [R, H]
    down_bias_ptr,  # [R] or None
    up_weight_ptr,  # [H, R]
    up_bias_ptr,  # [H] or None
    before_weight_ptr,  # [H] or None
    before_bias_ptr,  # [H] or None
    before_eps,
    after_weight_ptr,  # [H] or None
    after_bias_ptr,  # [H] or None
    after_eps,
    seed_ptr,  # int64 []; None without dropout
    threshold,
    scaling,  # with dropout, times 1 / (1 - p)
    M,
    H,
    R,
    stride_x,
    stride_residual,
    ACTIVATION: tl.constexpr,
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_OPERAND: tl.constexpr,
    OUT_PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = residual + after(mask * scaling * (act(before(x) @ down^T + down_bias) @ up^T + up_bias))

    Shapes    x, residual, y [M, H] fp32|fp16|bf16; down [R, H]; up [H, R]
              (M = tokens, H = hidden, R = bottleneck <= BLOCK_R)
    Numerics  Norms, h and y are computed in fp32; before(x) is rounded to OPERAND, act(h) to
              OUT_OPERAND, and y once to its dtype.
    Grid      (tiles of M)
    Algorithm 1. Compute the statistics of norm_before, if there is one. 2. Project the tokens to h,
              over all of H. 3. Activate. 4. Project back, a tile of H at a time, and add the
              residual. The second read of the tokens, for a norm or as the residual, finds them in
              the L2 cache. Under norm_after the tiles of z are computed twice: first for its
              statistics.
    Source    Houlsby et al., arXiv:1902.00751; pylora/reference/bottleneck_adapter.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    row = tl.minimum(m, M - 1).to(tl.int64)
    # 1. Compute the statistics.
    mean, inverse_std = None, None
    if BEFORE is not None:
        mean, inverse_std = row_statistics(x_ptr, stride_x, row, H, before_eps, BEFORE, BLOCK_H)
    # 2. Project the tokens.
    h = projected(
        x_ptr,
        stride_x,
        row,
        before_weight_ptr,
        before_bias_ptr,
        mean,
        inverse_std,
        None,
        down_weight_ptr,
        down_bias_ptr,
        H,
        R,
        True,
        BEFORE,
        OPERAND,
        PRECISION,
        EVEN_H,
        BLOCK_H,
        BLOCK_R,
    )
    # 3. Activate.
    a = tl.where((r < R)[None, :], activate(h, ACTIVATION), 0.0)
    # 4. Project back.
    store_expanded(
        a,
        y_ptr,
        up_weight_ptr,
        up_bias_ptr,
        seed_ptr,
        threshold,
        after_weight_ptr,
        after_bias_ptr,
        after_eps,
        residual_ptr,
        stride_residual,
        m,
        scaling,
        M,
        H,
        R,
        False,
        AFTER,
        OUT_OPERAND,
        OUT_PRECISION,
        ALIGNED_MASK,
        BLOCK_H,
    )


def bottleneck_adapter(x: Tensor, residual: Tensor | None, adapter: Bottleneck) -> Tensor:
    """y [M, H] in x's dtype.

    x           [M, H], any row stride
    residual    like x, or None; it may be x
    """
    M, H = x.shape
    grid, options = launch_options(x, adapter, backward=False)
    mask = mask_of(adapter.dropout)
    y = x.new_empty(M, H)
    with on_device_of(x):
        _bottleneck_adapter_kernel[grid](
            x,
            residual,
            y,
            adapter.down.contiguous(),
            adapter.down_bias,
            adapter.up.contiguous(),
            adapter.up_bias,
            *norm_arguments(adapter.norm_before),
            *norm_arguments(adapter.norm_after),
            mask.seed,
            mask.threshold,
            adapter.scaling * mask.scale,
            M,
            H,
            adapter.size,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            **options,
        )
    return y
