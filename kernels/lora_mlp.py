"""Host code of the gated MLP down(act(gate(x)) * up(x)), each with its LoRA, forward and backward.

gate, up    lora_linears of one x
down        lora_linears of act(gate) * up; the kernel that reads this product first also makes
            it, so making it is no pass of its own
backward    the backward of down -> gated_shrink -> the backwards of gate and up
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.calls import Layer, LayerGradients, Wanted
from pylora.kernels.activation import activate, activate_backward
from pylora.kernels.configs import gated_shrink_config
from pylora.kernels.epilogue import factor_pointers
from pylora.kernels.launch import MAX_REGISTERS, facts, on_device_of
from pylora.kernels.layers import Gated
from pylora.kernels.lora_linear import lora_linears
from pylora.kernels.lora_linear_backward import (
    StartedBackward,
    empty_left,
    lora_linears_backward,
    start_backward,
)
from pylora.kernels.precision import as_operand, dot, lora_operands, rounded


@triton.jit(do_not_specialize=["M"])
def _gated_shrink_kernel(
    dhidden_ptr,  # [M, I]
    gate_ptr,  # [M, I]
    up_ptr,  # [M, I]
    grad_ptrs,  # tuples have an entry for gate and for up: [M, >= I], rows stride_grads apart
    factor_ptrs,  # lora_B [I, R] or None
    partials_ptrs,  # fp32 [splits, M, R] or None
    M,
    I,  # noqa: E741
    Rs,
    stride_grads,
    i_per_split,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dgate = dhidden * up * act'(gate);  dup = dhidden * act(gate);  both are projected on lora_B

    Shapes    dhidden, gate, up, dgate, dup [M, I] fp32|fp16|bf16; lora_B [I, R]; partials fp32
              [splits, M, R], whose sums are dgate @ lora_B of gate and dup @ lora_B of up
              (M = tokens, I = intermediate size, R = rank)
    Numerics  dgate and dup are computed in fp32 and rounded once; fp32 sums of BLOCK_K products
              each.
    Grid      (tiles of M, tiles of the largest R, splits of I)
    Algorithm 1. Load a tile of dhidden, gate and up. 2. Compute the two gradients; the programs of
              the first tile of R store them. 3. Multiply them by tiles of the factors.
    Source    pylora/reference/lora_mlp.py
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.program_id(2)
    row = m.to(tl.int64)[:, None]
    zeros = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    sums = (zeros, zeros)
    first = split * i_per_split
    for start in range(first, tl.minimum(first + i_per_split, I), BLOCK_K):
        # 1. Load a tile of each.
        column = start + tl.arange(0, BLOCK_K)
        here = (m < M)[:, None] & (column < I)[None, :]
        offset = row * I + column[None, :]
        dhidden = tl.load(dhidden_ptr + offset, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + offset, mask=here, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + offset, mask=here, other=0.0).to(tl.float32)
        # 2. Compute dgate and dup.
        DTYPE: tl.constexpr = gate_ptr.dtype.element_ty
        dgate = rounded(activate_backward(dhidden * up, gate, ACTIVATION), DTYPE)
        dup = rounded(dhidden * activate(gate, ACTIVATION), DTYPE)
        grads = (dgate, dup)
        stores = here & (tl.program_id(1) == 0)
        added = ()
        for i in tl.static_range(2):
            pointers = grad_ptrs[i] + row * stride_grads[i] + column[None, :]
            tl.store(pointers, grads[i], mask=stores)
            # 3. Multiply by a tile of the factor.
            if factor_ptrs[i] is not None:
                rank = tl.minimum(r, Rs[i] - 1)
                factor = tl.load(
                    factor_pointers(factor_ptrs[i], column, rank, I, Rs[i], False),
                    mask=(column < I)[:, None],
                    other=0.0,
                )
                product = dot(as_operand(grads[i], OPERAND), as_operand(factor, OPERAND), PRECISION)
                added = added + (sums[i] + product,)
            else:
                added = added + (sums[i],)
        sums = added
    for i in tl.static_range(2):
        if factor_ptrs[i] is not None:
            R = Rs[i]
            out = partials_ptrs[i] + (split.to(tl.int64) * M + row) * R + r[None, :]
            tl.store(out, sums[i], mask=(m < M)[:, None] & (r < R)[None, :])


def gated_shrink(
    dhidden: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    layers: Sequence[Layer],
    wants_x: bool,
) -> list[StartedBackward]:
    """Does the first step of the backward pass of gate and up, which are `layers`.

    dhidden    the gradient of act(gate) * up; it, gate and up are [M, I] and contiguous
    """
    M, width = gate.shape
    lefts = [empty_left(layer, gate) if wants_x else None for layer in layers]
    grads = [torch.empty_like(gate) if left is None else left[:, :width] for left in lefts]
    lows = [layer.low_rank for layer in layers]
    dtypes = [low.A.dtype for low in lows if low is not None] or [gate.dtype]
    operands = lora_operands(gate.dtype, torch.promote_types(dtypes[0], dtypes[-1]))
    ranks = tuple(0 if low is None else low.rank for low in lows)
    fp32 = operands.dtype == tl.float32
    largest = max(*ranks, 1)
    config, splits, per_split = gated_shrink_config(M, width, largest, fp32, facts(gate))
    partials = [
        gate.new_empty(splits, M, rank, dtype=torch.float32) if rank else None for rank in ranks
    ]
    grid = (triton.cdiv(M, config.block_m), triton.cdiv(largest, config.block_r), splits)
    with on_device_of(gate):
        _gated_shrink_kernel[grid](
            dhidden,
            gate,
            up,
            tuple(grads),
            tuple(None if low is None else low.B.contiguous() for low in lows),
            tuple(partials),
            M,
            width,
            ranks,
            tuple(grad.stride(0) for grad in grads),
            per_split,
            ACTIVATION=activation,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            BLOCK_M=config.block_m,
            BLOCK_K=config.block_k,
            BLOCK_R=config.block_r,
            num_warps=config.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=config.num_stages,
        )
    shares = zip(layers, grads, partials, lefts, strict=True)
    return [StartedBackward(*share) for share in shares]


def lora_mlp(
    x: Tensor, layers: Sequence[Layer], activation: str
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """x [M, K], any row stride -> y, gate(x), up(x) and the h of each layer.

    layers    gate, up and down
    """
    (gate, gate_h), (up, up_h) = lora_linears(x, layers[:2])
    ((y, down_h),) = lora_linears(gate, layers[2:], Gated(up, activation))
    return y, gate, up, [gate_h, up_h, down_h]


def lora_mlp_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    hs: Sequence[Tensor],
    layers: Sequence[Layer],
    activation: str,
    wants_x: bool,
    wants_inner: bool,
    wanted: Sequence[Wanted],
) -> tuple[Tensor | None, list[Tensor], list[LayerGradients]]:
    """(dx, [dgate, dup], the gradients of A, B and A_bias of gate, up and down).

    grad           [M, N], any row stride
    x              [M, K], any row stride, M >= 1
    gate, up       [M, I], contiguous
    hs             fp32 [M, R] of each layer with LoRA, contiguous
    wants_inner    true if gate, up or x want a gradient; if not, dgate and dup are left out
    """
    down = start_backward(layers[2], grad, wants_inner)
    gated = Gated(up, activation)
    dhidden, of_down = lora_linears_backward([down], gate, hs[2:], wants_inner, wanted[2:], gated)
    if dhidden is None:
        return None, [], [LayerGradients(), LayerGradients(), *of_down]
    inner = gated_shrink(dhidden, gate, up, activation, layers[:2], wants_x)
    del dhidden, down
    dx, of_inner = lora_linears_backward(inner, x, hs[:2], wants_x, wanted[:2])
    return dx, [share.grad for share in inner], [*of_inner, *of_down]
