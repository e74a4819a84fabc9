"""Finishes an output of which the base product is there, as partials or as a dense product."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.configs import EXPAND
from pylora.kernels.epilogue import Epilogue, add_low_rank, add_to_columns
from pylora.kernels.launch import MAX_REGISTERS, on_device_of
from pylora.kernels.precision import rounded


@triton.jit(do_not_specialize=["M", "splits", "threshold", "base_splits"])
def _linear_expand_kernel(
    base_ptr,  # [base_splits, M, Q], fp32 or of the output's dtype
    base_splits,
    out_ptr,  # [M, Q]; may be base itself
    bias_ptrs,  # a tuple of one: [Q] or None
    partials_ptrs,  # this and the following have one entry per term: see `epilogue.add_low_rank`
    splits,
    partials_scale,
    hidden_bias_ptrs,
    h_ptrs,
    factor_ptrs,
    factor_bias_ptrs,
    scalings,
    seed_ptrs,
    threshold,
    keep_scale,
    M,
    Q,
    Rs,
    ACTIVATION: tl.constexpr,
    OPERAND: tl.constexpr,
    LORA_PRECISION: tl.constexpr,
    RANK_FIRST: tl.constexpr,
    ALIGNED_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = sum(base) + bias + sum of mask * (scaling * act(h) @ factor^T) + scaling * factor_bias

    Shapes    base [base_splits, M, Q]; out [M, Q]; the rest as in `epilogue.add_low_rank`
              (M = tokens, Q = features of the output, R = rank)
    Numerics  fp32 sums in the order of the partials and terms, rounded once.
    Grid      (tiles of M, fastest, times tiles of Q)
    Algorithm 1. Add up the base's partials, in order. 2. Add bias and terms. 3. Store.
    Source    pylora/reference/lora_linear.py
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m, pid_q = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    q = pid_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offset = m.to(tl.int64)[:, None] * Q + q[None, :]
    inside = (m < M)[:, None] & (q < Q)[None, :]
    # 1. Add up the base's partials.
    acc = tl.load(base_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    for split in range(1, base_splits):
        values = tl.load(base_ptr + split * (M.to(tl.int64) * Q) + offset, mask=inside, other=0.0)
        acc += values.to(tl.float32)
    # 2. Add bias and terms.
    if bias_ptrs[0] is not None:
        acc = add_to_columns(acc, bias_ptrs[0], 1.0, q, Q, False)
    for i in tl.static_range(len(partials_ptrs)):
        acc = add_low_rank(
            acc,
            m,
            pid_q * BLOCK_Q,
            partials_ptrs[i],
            splits,
            partials_scale,
            hidden_bias_ptrs[i],
            h_ptrs[i],
            pid_q == 0,
            factor_ptrs[i],
            scalings[i],
            seed_ptrs[i],
            threshold,
            keep_scale,
            M,
            Q,
            Rs[i],
            ACTIVATION,
            OPERAND,
            LORA_PRECISION,
            RANK_FIRST,
            ALIGNED_MASK,
            False,
            BLOCK_Q,
            BLOCK_R,
        )
        if factor_bias_ptrs[i] is not None:
            acc = add_to_columns(acc, factor_bias_ptrs[i], scalings[i], q, Q, False)
    # 3. Store.
    tl.store(out_ptr + offset, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


def linear_expand(base: Tensor, out: Tensor, epilogue: Epilogue) -> None:
    """Writes the sum of base [splits, M, Q] and what the epilogue adds to out [M, Q].

    Both are contiguous; out may be the same memory as one of the base's partials.
    """
    M, Q = out.shape
    with on_device_of(out):
        _linear_expand_kernel[(triton.cdiv(M, EXPAND.block_m) * triton.cdiv(Q, EXPAND.block_q),)](
            base_ptr=base,
            base_splits=base.shape[0],
            out_ptr=out,
            M=M,
            Q=Q,
            RANK_FIRST=epilogue.rank_first,
            ALIGNED_MASK=Q % 4 == 0,
            BLOCK_M=EXPAND.block_m,
            BLOCK_Q=EXPAND.block_q,
            num_warps=EXPAND.num_warps,
            maxnreg=MAX_REGISTERS,
            **epilogue.arguments(),
            **epilogue.forward_arguments(),
            **epilogue.mask_arguments(),
        )
