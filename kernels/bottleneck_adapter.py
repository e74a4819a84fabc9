"""A bottleneck adapter in one kernel, forward and backward; one program has some of the tokens.

It takes adapters without norms and without dropout. The gradients of the weights, which sum over
all tokens, are products of their own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Bottleneck, BottleneckGradients, BottleneckWanted
from pylora.kernels.activation import activate, activate_backward
from pylora.kernels.configs import bottleneck_tile
from pylora.kernels.epilogue import factor_pointers
from pylora.kernels.launch import MAX_REGISTERS, facts, on_device_of
from pylora.kernels.lora_weight_grad import lora_weight_grad
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
def _projected(
    wide_ptr,  # [M, H], rows stride_wide apart
    stride_wide,
    row,  # int64 [BLOCK_M], the tokens of this program
    factor_ptr,  # [R, H] if RANK_FIRST, else [H, R]
    bias_ptr,  # [R] or None
    H,
    R,
    RANK_FIRST: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Returns wide @ factor + bias in fp32, [BLOCK_M, BLOCK_R]; columns beyond R mean nothing."""
    rank = tl.minimum(tl.arange(0, BLOCK_R), R - 1)
    total = tl.zeros((row.shape[0], BLOCK_R), tl.float32)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        pointers = factor_pointers(factor_ptr, h, rank, H, R, RANK_FIRST)
        if EVEN_H:
            wide = tl.load(wide_ptr + row[:, None] * stride_wide + h[None, :])
            factor = tl.load(pointers)
        else:
            inside = h < H
            wide = tl.load(
                wide_ptr + row[:, None] * stride_wide + h[None, :], mask=inside[None, :], other=0.0
            )
            factor = tl.load(pointers, mask=inside[:, None], other=0.0)
        a, b = as_operand(wide, OPERAND), as_operand(factor, OPERAND)
        if wide.dtype == OPERAND:
            total = dot_add(total, a, b, PRECISION)
        else:  # a tile that was converted in registers must outlive its product (`lora_shrink`)
            total += finished_dot(a, b, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + rank).to(tl.float32)[None, :]
    return total


@triton.jit
def _store_expanded(
    low,  # fp32 [BLOCK_M, BLOCK_R], zero in the columns beyond R
    out_ptr,  # [M, H], contiguous
    factor_ptr,  # [R, H] if RANK_FIRST, else [H, R]
    bias_ptr,  # [H] or None
    added_ptr,  # [M, H], rows stride_added apart, or None
    stride_added,
    m,  # [BLOCK_M], the tokens of this program
    scale,
    M,
    H,
    R,
    RANK_FIRST: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Writes scale * (low @ factor + bias) + added to out, rounded once."""
    BLOCK_R: tl.constexpr = low.shape[1]
    r = tl.arange(0, BLOCK_R)
    row = m.to(tl.int64)
    a = rounded(low, OPERAND)
    for start in range(0, H, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        inside = h < H
        pointers = factor_pointers(factor_ptr, h, r, H, R, RANK_FIRST)
        factor = tl.load(pointers, mask=inside[:, None] & (r < R)[None, :], other=0.0)
        out = dot(a, as_operand(factor, OPERAND).T, PRECISION)
        if bias_ptr is not None:
            out += tl.load(bias_ptr + h, mask=inside, other=0.0).to(tl.float32)[None, :]
        out *= scale
        here = (m < M)[:, None] & inside[None, :]
        if added_ptr is not None:
            added = tl.load(
                added_ptr + row[:, None] * stride_added + h[None, :], mask=here, other=0.0
            )
            out += added.to(tl.float32)
        place = out_ptr + row[:, None] * H + h[None, :]
        tl.store(place, rounded(out, out_ptr.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["M"])
def _bottleneck_adapter_kernel(
    x_ptr,  # [M, H], rows stride_x apart
    residual_ptr,  # [M, H], rows stride_residual apart, or None
    y_ptr,  # [M, H]
    down_weight_ptr,  # [R, H]
    down_bias_ptr,  # [R] or None
    up_weight_ptr,  # [H, R]
    up_bias_ptr,  # [H] or None
    scaling,
    M,
    H,
    R,
    stride_x,
    stride_residual,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_OPERAND: tl.constexpr,
    OUT_PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """y = residual + scaling * (act(x @ down^T + down_bias) @ up^T + up_bias)

    Shapes    x, residual, y [M, H] fp32|fp16|bf16; down [R, H]; up [H, R]
              (M = tokens, H = hidden, R = bottleneck <= BLOCK_R)
    Numerics  h and y are summed in fp32; act(h) is rounded to OUT_OPERAND, y once to its dtype.
    Grid      (tiles of M)
    Algorithm 1. Project the tokens to h, over all of H. 2. Activate. 3. Project back, a tile of H
              at a time, and add the residual. If the residual is x, its second read finds it in
              the L2 cache.
    Source    Houlsby et al., arXiv:1902.00751; pylora/reference/bottleneck_adapter.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    row = tl.minimum(m, M - 1).to(tl.int64)
    # 1. Project the tokens.
    h = _projected(
        x_ptr,
        stride_x,
        row,
        down_weight_ptr,
        down_bias_ptr,
        H,
        R,
        True,
        OPERAND,
        PRECISION,
        EVEN_H,
        BLOCK_H,
        BLOCK_R,
    )
    # 2. Activate.
    a = tl.where((r < R)[None, :], activate(h, ACTIVATION), 0.0)
    # 3. Project back.
    _store_expanded(
        a,
        y_ptr,
        up_weight_ptr,
        up_bias_ptr,
        residual_ptr,
        stride_residual,
        m,
        scaling,
        M,
        H,
        R,
        False,
        OUT_OPERAND,
        OUT_PRECISION,
        BLOCK_H,
    )


@triton.jit(do_not_specialize=["M"])
def _bottleneck_adapter_backward_kernel(
    grad_ptr,  # [M, H], rows stride_grad apart
    x_ptr,  # [M, H], rows stride_x apart
    added_ptr,  # grad again if it is a part of dx, else None
    dx_ptr,  # [M, H], or None if it is not wanted
    activated_ptr,  # fp32 [M, R]
    dh_ptr,  # fp32 [M, R]
    down_weight_ptr,  # [R, H]
    down_bias_ptr,  # [R] or None
    up_weight_ptr,  # [H, R]
    scaling,
    M,
    H,
    R,
    stride_grad,
    stride_x,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OUT_OPERAND: tl.constexpr,
    OUT_PRECISION: tl.constexpr,
    EVEN_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """activated = scaling * act(h);  dh = (scaling * grad @ up) * act'(h);  dx = dh @ down + grad

    Shapes    grad, x, dx [M, H] fp32|fp16|bf16; activated, dh fp32 [M, R]; down [R, H]; up [H, R]
              (M = tokens, H = hidden, R = bottleneck <= BLOCK_R)
    Numerics  Every sum is in fp32; dh is rounded to OUT_OPERAND for dx, and dx once to its dtype.
    Grid      (tiles of M)
    Algorithm 1. Compute h again from x. 2. Project grad and multiply by the derivative. 3. Store
              what the gradients of the weights need. 4. Project back to dx.
    Source    pylora/reference/bottleneck_adapter.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    row = tl.minimum(m, M - 1).to(tl.int64)
    # 1. Compute h again.
    h = _projected(
        x_ptr,
        stride_x,
        row,
        down_weight_ptr,
        down_bias_ptr,
        H,
        R,
        True,
        OPERAND,
        PRECISION,
        EVEN_H,
        BLOCK_H,
        BLOCK_R,
    )
    # 2. Project grad.
    da = _projected(
        grad_ptr,
        stride_grad,
        row,
        up_weight_ptr,
        None,
        H,
        R,
        False,
        OPERAND,
        PRECISION,
        EVEN_H,
        BLOCK_H,
        BLOCK_R,
    )
    dh = tl.where((r < R)[None, :], activate_backward(da * scaling, h, ACTIVATION), 0.0)
    # 3. Store what the gradients of the weights need.
    here = (m < M)[:, None] & (r < R)[None, :]
    place = m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(activated_ptr + place, activate(h, ACTIVATION) * scaling, mask=here)
    tl.store(dh_ptr + place, dh, mask=here)
    # 4. Project back.
    if dx_ptr is not None:
        _store_expanded(
            dh,
            dx_ptr,
            down_weight_ptr,
            None,
            added_ptr,
            stride_grad,
            m,
            1.0,
            M,
            H,
            R,
            True,
            OUT_OPERAND,
            OUT_PRECISION,
            BLOCK_H,
        )


def _launch(x: Tensor, adapter: Bottleneck) -> tuple[tuple[int], dict[str, Any]]:
    """(the grid, the constants and options) of both kernels for x [M, H]."""
    M, H = x.shape
    operands = lora_operands(x.dtype, adapter.down.dtype)
    out = output_operands(x.dtype, adapter.down.dtype)
    config = bottleneck_tile(M, adapter.size, operands.dtype == tl.float32, facts(x))
    options = {
        "ACTIVATION": adapter.activation,
        "OPERAND": operands.dtype,
        "PRECISION": operands.precision,
        "OUT_OPERAND": out.dtype,
        "OUT_PRECISION": out.precision,
        "EVEN_H": H % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_H": config.block_k,
        "BLOCK_R": config.block_r,
        "num_warps": config.num_warps,
        "maxnreg": MAX_REGISTERS,
        "num_stages": config.num_stages,
    }
    return (triton.cdiv(M, config.block_m),), options


def bottleneck_adapter(x: Tensor, residual: Tensor | None, adapter: Bottleneck) -> Tensor:
    """y [M, H] in x's dtype.

    x           [M, H], any row stride
    residual    like x, or None; it may be x
    """
    M, H = x.shape
    grid, options = _launch(x, adapter)
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
            adapter.scaling,
            M,
            H,
            adapter.size,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            **options,
        )
    return y


def bottleneck_adapter_backward(
    grad: Tensor, x: Tensor, adds_x: bool, adapter: Bottleneck, wanted: BottleneckWanted
) -> BottleneckGradients:
    """The gradients that `wanted` asks for; that of x is [M, H].

    grad      [M, H], any row stride
    x         [M, H], any row stride
    adds_x    True if x was the residual
    """
    M, H = x.shape
    grid, options = _launch(x, adapter)
    dx = x.new_empty(M, H) if wanted.x else None
    activated, dh = (x.new_empty(M, adapter.size, dtype=torch.float32) for _ in range(2))
    with on_device_of(x):
        _bottleneck_adapter_backward_kernel[grid](
            grad,
            x,
            grad if adds_x else None,
            dx,
            activated,
            dh,
            adapter.down.contiguous(),
            adapter.down_bias,
            adapter.up.contiguous(),
            adapter.scaling,
            M,
            H,
            adapter.size,
            grad.stride(0),
            x.stride(0),
            **options,
        )
    dtype = adapter.down.dtype
    operands = lora_operands(x.dtype, dtype)
    down = up = down_bias = up_bias = None
    if wanted.down:
        down = lora_weight_grad(x, [dh], operands)[0].to(dtype)
    if wanted.up:
        up = lora_weight_grad(grad, [activated], operands)[0].t().to(dtype).contiguous()
    if wanted.down_bias:
        down_bias = dh.sum(0).to(dtype)
    if wanted.up_bias:
        up_bias = (adapter.scaling * grad.sum(0, dtype=torch.float32)).to(dtype)
    return BottleneckGradients(x=dx, down=down, down_bias=down_bias, up=up, up_bias=up_bias)
