"""The backward of a bottleneck adapter in one kernel; one program has some of the tokens.

The gradients of the weights, which sum over all tokens, are products of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Bottleneck, BottleneckGradients, BottleneckWanted
from pylora.kernels.activation import activate, activate_backward
from pylora.kernels.bottleneck_gradients import projected_gradient, store_through_norm
from pylora.kernels.bottleneck_tiles import (
    launch_options,
    norm_arguments,
    projected,
    store_expanded,
)
from pylora.kernels.launch import on_device_of
from pylora.kernels.lora_weight_grad import lora_weight_grad
from pylora.kernels.normalization import row_statistics
from pylora.kernels.philox import Mask, mask_of
from pylora.kernels.precision import lora_operands


@triton.jit(do_not_specialize=["threshold", "M"])
def _bottleneck_adapter_backward_kernel(
    grad_ptr,  # [M, H], rows stride_grad apart
    x_ptr,  # [M, H], rows stride_x apart
    added_ptr,  # grad again if it is a part of dx, else None
    dx_ptr,  # [M, H], or None if it is not wanted
    activated_ptr,  # fp32 [M, R]
    dh_ptr,  # fp32 [M, R]
    standardized_ptr,  # [M, H] or None
    dz_ptr,  # [M, H] or None
    dz_sums_ptr,  # fp32 [programs, H] or None
    after_sums_ptr,  # fp32 [programs, H] or None
    down_weight_ptr,  # [R, H]
    down_bias_ptr,  # [R] or None
    up_weight_ptr,  # [H, R]
    up_bias_ptr,  # [H] or None
    before_weight_ptr,  # [H] or None
    before_bias_ptr,  # [H] or None
    before_eps,
    after_weight_ptr,  # [H] or None
    after_eps,
    seed_ptr,  # int64 []; None without dropout
    threshold,
    scaling,  # with dropout, times 1 / (1 - p)
    M,
    H,
    R,
    stride_grad,
    stride_x,
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
    """activated = scaling * act(h);  dh = (scaling * dz @ up) * act'(h)
    dx = before'(dh @ down) + grad;   dz = mask * after'(grad)

    Shapes    grad, x, dx [M, H] fp32|fp16|bf16; activated, dh fp32 [M, R]; down [R, H]; up [H, R];
              standardized, dz [M, H] in the dtype of down; the sums fp32 [programs, H], one row of
              each program (M = tokens, H = hidden, R = bottleneck <= BLOCK_R)
    Numerics  Norms and every sum are in fp32; before(x), act(h) and dz are rounded to OPERAND, dh
              to OUT_OPERAND for dx, and dx once to its dtype.
    Grid      (tiles of M)
    Algorithm 1. Compute h again from x. 2. Take grad through norm_after and the mask to dz, project
              it and multiply by the derivative. 3. Store what the gradients of the weights need. 4.
              Project back to dx, through norm_before. Under a norm the tiles of its step are
              computed twice: first for what the rows have in common.
    Source    pylora/reference/bottleneck_adapter.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    row = tl.minimum(m, M - 1).to(tl.int64)
    # 1. Compute h again.
    mean, inverse_std = None, None
    if BEFORE is not None:
        mean, inverse_std = row_statistics(x_ptr, stride_x, row, H, before_eps, BEFORE, BLOCK_H)
    h = projected(
        x_ptr,
        stride_x,
        row,
        before_weight_ptr,
        before_bias_ptr,
        mean,
        inverse_std,
        standardized_ptr,
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
    # 2. Project grad.
    if AFTER is None and seed_ptr is None:
        da = projected(
            grad_ptr,
            stride_grad,
            row,
            None,
            None,
            None,
            None,
            None,
            up_weight_ptr,
            None,
            H,
            R,
            False,
            None,
            OPERAND,
            PRECISION,
            EVEN_H,
            BLOCK_H,
            BLOCK_R,
        )
    else:
        da = projected_gradient(
            grad_ptr,
            stride_grad,
            tl.where((r < R)[None, :], activate(h, ACTIVATION), 0.0),
            up_weight_ptr,
            up_bias_ptr,
            scaling,
            seed_ptr,
            threshold,
            after_weight_ptr,
            after_eps,
            dz_ptr,
            dz_sums_ptr,
            after_sums_ptr,
            m,
            M,
            H,
            R,
            AFTER,
            OPERAND,
            PRECISION,
            ALIGNED_MASK,
            BLOCK_H,
        )
    dh = tl.where((r < R)[None, :], activate_backward(da * scaling, h, ACTIVATION), 0.0)
    # 3. Store what the gradients of the weights need.
    here = (m < M)[:, None] & (r < R)[None, :]
    place = m.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(activated_ptr + place, activate(h, ACTIVATION) * scaling, mask=here)
    tl.store(dh_ptr + place, dh, mask=here)
    # 4. Project back.
    if dx_ptr is not None:
        if BEFORE is None:
            store_expanded(
                dh,
                dx_ptr,
                down_weight_ptr,
                None,
                None,
                0,
                None,
                None,
                0.0,
                added_ptr,
                stride_grad,
                m,
                1.0,
                M,
                H,
                R,
                True,
                None,
                OUT_OPERAND,
                OUT_PRECISION,
                ALIGNED_MASK,
                BLOCK_H,
            )
        else:
            store_through_norm(
                dh,
                dx_ptr,
                x_ptr,
                stride_x,
                down_weight_ptr,
                before_weight_ptr,
                mean,
                inverse_std,
                added_ptr,
                stride_grad,
                m,
                M,
                H,
                R,
                BEFORE,
                OUT_OPERAND,
                OUT_PRECISION,
                BLOCK_H,
            )


def bottleneck_adapter_backward(
    grad: Tensor, x: Tensor, adds_x: bool, adapter: Bottleneck, wanted: BottleneckWanted
) -> BottleneckGradients:
    """The gradients that `wanted` asks for; that of x is [M, H].

    grad      [M, H], any row stride
    x         [M, H], any row stride
    adds_x    True if x was the residual
    """
    M, H = x.shape
    dtype, before, after = adapter.down.dtype, adapter.norm_before, adapter.norm_after
    grid, options = launch_options(x, adapter, backward=True)
    mask = mask_of(adapter.dropout)
    scaling = adapter.scaling * mask.scale

    def buffer(is_wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return x.new_empty(shape, dtype=dtype) if is_wanted else None

    dx = x.new_empty(M, H) if wanted.x else None
    activated, dh = (x.new_empty(M, adapter.size, dtype=torch.float32) for _ in range(2))
    reads_standardized = before is not None and (wanted.down or wanted.before_weight)
    standardized_x = buffer(reads_standardized, M, H, dtype=dtype)
    dz = buffer(after is not None and wanted.up, M, H, dtype=dtype)
    is_plain = after is None and mask.seed is None
    dz_sums = buffer(wanted.up_bias and not is_plain, *grid, H)
    after_sums = buffer(wanted.after_weight, *grid, H)
    after_weight, _, after_eps = norm_arguments(after)
    with on_device_of(x):
        _bottleneck_adapter_backward_kernel[grid](
            grad,
            x,
            grad if adds_x else None,
            dx,
            activated,
            dh,
            standardized_x,
            dz,
            dz_sums,
            after_sums,
            adapter.down.contiguous(),
            adapter.down_bias,
            adapter.up.contiguous(),
            adapter.up_bias,
            *norm_arguments(before),
            after_weight,
            after_eps,
            mask.seed,
            mask.threshold,
            scaling,
            M,
            H,
            adapter.size,
            grad.stride(0),
            x.stride(0),
            **options,
        )
    gradients: dict[str, Tensor] = {}
    if before is not None:
        gradients |= _behind_norm(standardized_x, dh, adapter, wanted)
    elif wanted.down:
        gradients["down"] = lora_weight_grad(x, [dh], lora_operands(x.dtype, dtype))[0]
    if wanted.down_bias:
        gradients["down_bias"] = dh.sum(0)
    if wanted.up:
        wide = grad if dz is None else dz
        # The factor of the kept elements is a part of `activated`.
        masks = [Mask(mask.seed, mask.threshold)] if dz is None else ()
        operands = lora_operands(wide.dtype, dtype)
        gradients["up"] = lora_weight_grad(wide, [activated], operands, masks)[0].t()
    if wanted.up_bias:
        sums = grad.sum(0, dtype=torch.float32) if dz_sums is None else dz_sums.sum(0)
        gradients["up_bias"] = scaling * sums
    if after_sums is not None:
        gradients["after_weight"] = after_sums.sum(0)
    if wanted.after_bias:
        gradients["after_bias"] = grad.sum(0, dtype=torch.float32)
    return BottleneckGradients(
        x=dx, **{name: value.to(dtype).contiguous() for name, value in gradients.items()}
    )


def _behind_norm(
    standardized_x: Tensor | None, dh: Tensor, adapter: Bottleneck, wanted: BottleneckWanted
) -> dict[str, Tensor]:
    """The gradients of the down projection and of norm_before, in fp32.

    The norm's weight and bias are taken out of the sums over the tokens:

        ddown      = dh^T @ (standardized * weight + bias)
        dweight    = sum over the tokens of (dh @ down) * standardized
        dbias      = sum over the tokens of dh @ down
    """
    norm, down = adapter.norm_before, adapter.down.float()
    gradients: dict[str, Tensor] = {}
    assert norm is not None
    if standardized_x is not None:
        operands = lora_operands(standardized_x.dtype, adapter.down.dtype)
        of_standardized = lora_weight_grad(standardized_x, [dh], operands)[0]
        if wanted.before_weight:
            gradients["before_weight"] = (down * of_standardized).sum(0)
        if wanted.down:
            gradients["down"] = of_standardized * norm.weight.float()
            if norm.bias is not None:
                gradients["down"] += torch.outer(dh.sum(0), norm.bias.float())
    if wanted.before_bias:
        gradients["before_bias"] = dh.sum(0) @ down
    return gradients
