"""The step between the two low-rank products: sum of partials, bias, activation, its derivative."""

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
def sum_of_partials(partials_ptr, splits, offset, inside, M, R):
    """Returns the sum of the fp32 partials [splits, M, R] at `offset` in [M, R], added in order."""
    total = tl.load(partials_ptr + offset, mask=inside, other=0.0)
    for split in range(1, splits):
        total += tl.load(
            partials_ptr + split * (M.to(tl.int64) * R) + offset, mask=inside, other=0.0
        )
    return total


@triton.jit(do_not_specialize=["M", "splits"])
def _lora_hidden_kernel(
    partials_ptr,  # fp32 [splits, M, R]
    splits,
    partials_scale,
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
    """h = partials_scale * sum(partials) + bias;  out = scaling * act(h)

    Shapes    partials fp32 [splits, M, R]; bias [R]; h fp32 [M, R]; out [M, WIDTH], WIDTH >= R,
              zero in the columns beyond R  (M = tokens, R = rank)
    Grid      (tiles of M, tiles of WIDTH)
    Source    pylora/reference/lora_linear.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = m.to(tl.int64)[:, None]
    inside = (m < M)[:, None] & (r < R)[None, :]
    h = partials_scale * sum_of_partials(partials_ptr, splits, row * R + r[None, :], inside, M, R)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    tl.store(h_ptr + row * R + r[None, :], h, mask=inside)
    out = tl.where(inside, scaling * activate(h, ACTIVATION), 0.0)
    tl.store(
        out_ptr + row * stride_out + r[None, :],
        rounded(out, out_ptr.dtype.element_ty),
        mask=(m < M)[:, None] & (r < WIDTH)[None, :],
    )


@triton.jit(do_not_specialize=["M", "splits"])
def _lora_hidden_backward_kernel(
    partials_ptr,  # fp32 [splits, M, R]
    splits,
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
    """dh = scaling * sum(partials) * act'(h);  activated = scaling * act(h)

    Shapes    partials fp32 [splits, M, R], whose sum is grad @ lora_B; h, dh, activated fp32
              [M, R]; copy of dh [M, WIDTH], WIDTH >= R, zero in the columns beyond R
              (M = tokens, R = rank)
    Grid      (tiles of M, tiles of WIDTH)
    Source    pylora/reference/lora_linear.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row = m.to(tl.int64)[:, None]
    offset = row * R + r[None, :]
    inside = (m < M)[:, None] & (r < R)[None, :]
    da = scaling * sum_of_partials(partials_ptr, splits, offset, inside, M, R)
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
    partials: Tensor,
    partials_scale: float,
    bias: Tensor | None,
    scaling: float,
    activation: str,
    out: Tensor,
) -> Tensor:
    """Returns h fp32 [M, R] and writes scaling * act(h) to `out` [M, width], zero beyond R.

    h = partials_scale * sum(partials) + bias, where the partials are fp32 [splits, M, R].
    """
    splits, M, R = partials.shape
    h = partials.new_empty(M, R)
    grid = (triton.cdiv(M, HIDDEN.block_m), triton.cdiv(out.shape[1], HIDDEN.block_r))
    with on_device_of(partials):
        _lora_hidden_kernel[grid](
            partials,
            splits,
            partials_scale,
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
    partials: Tensor, h: Tensor, scaling: float, activation: str, copy: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (dh, scaling * act(h)), both fp32 [M, R]; also writes dh to `copy`, if given.

    partials    fp32 [splits, M, R], whose sum is grad @ lora_B
    copy        [M, width], which gets zeros in the columns beyond R
    """
    splits, M, R = partials.shape
    dh, activated = torch.empty_like(h), torch.empty_like(h)
    width = copy.shape[1] if copy is not None else R
    grid = (triton.cdiv(M, HIDDEN.block_m), triton.cdiv(width, HIDDEN.block_r))
    with on_device_of(partials):
        _lora_hidden_backward_kernel[grid](
            partials,
            splits,
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
