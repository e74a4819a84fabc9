"""Between the two low-rank products: sums of parts, bias, activation and its derivative."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.activation import activate, activate_backward
from pylora.kernels.configs import HIDDEN
from pylora.kernels.launch import MAX_REGISTERS, on_device_of
from pylora.kernels.precision import rounded


@triton.jit
def sum_of_parts(parts_ptr, parts, offset, inside, M, R):
    """Sum of the fp32 parts [parts, M, R] at `offset` in [M, R], in order."""
    total = tl.load(parts_ptr + offset, mask=inside, other=0.0)
    for part in range(1, parts):
        total += tl.load(parts_ptr + part * (M.to(tl.int64) * R) + offset, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["M", "parts"])
def _lora_hidden_kernel(
    parts_ptr,
    parts,
    parts_scale,
    bias_ptr,  # [R] or None
    h_ptr,  # fp32 [M, R]
    out_ptr,  # [M, WIDTH], rows stride_out apart
    scaling,
    M,
    R,
    stride_out,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h = parts_scale * sum(parts) + bias;  out = scaling * act(h), zero in the columns beyond R

    Shapes    parts fp32 [parts, M, R]; bias [R]; h fp32 [M, R]; out [M, WIDTH], WIDTH >= R
    Grid      (tiles of M, tiles of WIDTH)
    Source    pylora/reference/lora_linear.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = m.to(tl.int64)[:, None]
    inside = (m < M)[:, None] & (r < R)[None, :]
    h = parts_scale * sum_of_parts(parts_ptr, parts, row * R + r[None, :], inside, M, R)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    tl.store(h_ptr + row * R + r[None, :], h, mask=inside)
    out = tl.where(inside, scaling * activate(h, ACTIVATION), 0.0)
    tl.store(
        out_ptr + row * stride_out + r[None, :],
        rounded(out, out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (r < WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["M", "parts"])
def _lora_hidden_backward_kernel(
    parts_ptr,
    parts,
    h_ptr,  # fp32 [M, R]
    dh_ptr,  # fp32 [M, R]
    activated_ptr,  # fp32 [M, R]
    copy_ptr,  # [M, WIDTH], rows stride_copy apart, or None
    scaling,
    M,
    R,
    stride_copy,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dh = scaling * sum(parts) * act'(h);  activated = scaling * act(h)

    Shapes    parts fp32 [parts, M, R], of grad @ lora_B; h, dh, activated fp32 [M, R]; copy of dh
              [M, WIDTH], WIDTH >= R, zero in the columns beyond R
    Grid      (tiles of M, tiles of WIDTH)
    Source    pylora/reference/lora_linear.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = m.to(tl.int64)[:, None]
    offset = row * R + r[None, :]
    inside = (m < M)[:, None] & (r < R)[None, :]
    da = scaling * sum_of_parts(parts_ptr, parts, offset, inside, M, R)
    h = tl.load(h_ptr + offset, mask=inside, other=0.0)
    dh = activate_backward(da, h, ACTIVATION)
    tl.store(dh_ptr + offset, dh, mask=inside)
    tl.store(activated_ptr + offset, scaling * activate(h, ACTIVATION), mask=inside)
    if copy_ptr is not None:
        tl.store(
            copy_ptr + row * stride_copy + r[None, :],
            rounded(tl.where(inside, dh, 0.0), copy_ptr.dtype.element_ty),
            mask=(m < M)[:, None] & (r < WIDTH)[None, :],
        )


def lora_hidden(
    parts: Tensor,
    parts_scale: float,
    bias: Tensor | None,
    scaling: float,
    activation: str,
    out: Tensor,
) -> Tensor:
    """Returns h fp32 [M, R] and writes scaling * act(h) to `out` [M, width], zero beyond R."""
    count, M, R = parts.shape
    h = parts.new_empty(M, R)
    grid = (triton.cdiv(M, HIDDEN.block_m), triton.cdiv(out.shape[1], HIDDEN.block_r))
    with on_device_of(parts):
        _lora_hidden_kernel[grid](
            parts,
            count,
            parts_scale,
            bias,
            h,
            out,
            scaling,
            M,
            R,
            out.stride(0),
            WIDTH=out.shape[1],
            ACTIVATION=activation,
            BLOCK_M=HIDDEN.block_m,
            BLOCK_R=HIDDEN.block_r,
            maxnreg=MAX_REGISTERS,
        )
    return h


def lora_hidden_backward(
    parts: Tensor, h: Tensor, scaling: float, activation: str, copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(dh, scaling * act(h)), both fp32 [M, R]; dh also to `copy` [M, width], zero beyond R."""
    count, M, R = parts.shape
    dh, activated = torch.empty_like(h), torch.empty_like(h)
    width = copy.shape[1] if copy is not None else R
    grid = (triton.cdiv(M, HIDDEN.block_m), triton.cdiv(width, HIDDEN.block_r))
    with on_device_of(parts):
        _lora_hidden_backward_kernel[grid](
            parts,
            count,
            h,
            dh,
            activated,
            copy,
            scaling,
            M,
            R,
            copy.stride(0) if copy is not None else 0,
            WIDTH=width,
            ACTIVATION=activation,
            BLOCK_M=HIDDEN.block_m,
            BLOCK_R=HIDDEN.block_r,
            maxnreg=MAX_REGISTERS,
        )
    return dh, activated
