"""Adds each token's low-rank term, by its own adapter, to an output whose base product is there."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.adapter_tokens import AdapterTokens, tile_of
from pylora.kernels.configs import cdiv, multi_expand_tile
from pylora.kernels.epilogue import add_low_rank, add_to_columns
from pylora.kernels.launch import MAX_REGISTERS, on_device_of
from pylora.kernels.precision import Operands, rounded


@triton.jit(do_not_specialize=["base_splits", "splits", "groups", "by_place", "M"])
def _multi_lora_expand_kernel(
    base_ptr,  # [base_splits, M, Q], fp32 or of the output's dtype
    base_splits,
    out_ptr,  # [M, Q]; it is base itself if IN_PLACE
    bias_ptr,  # [Q] or None
    partials_ptr,  # fp32 [splits, M, R]
    splits,
    h_ptr,  # fp32 [M, R] or None
    factor_ptr,  # [adapters, Q, R], or [adapters, R, Q] if RANK_FIRST
    scalings_ptr,  # fp32 [adapters]
    order_ptr,  # this and the next three: see `AdapterTokens.arguments`
    begin_ptr,
    groups,
    by_place,
    tiles,
    M,
    Q,
    R,
    RANK_FIRST: tl.constexpr,
    IN_PLACE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[m] = sum(base[:, m]) + bias + scalings[i] * h[m] @ factor[i]^T  (token m has adapter i)

    Shapes    base [base_splits, M, Q]; out [M, Q]; h = sum(partials), partials fp32 [splits, M, R];
              factor [adapters, Q, R]  (M = tokens, Q = features of the output, R = rank; in the
              backward pass factor is lora_A and Q is in_features)
    Numerics  fp32 sums in the order of the partials, rounded once. A base that is finished already
              was rounded before as well.
    Grid      (tiles of tokens, fastest, times tiles of Q)
    Algorithm 1. Find the tile's tokens. 2. If they have no adapter, store h = 0 and leave an output
              in place as it is. 3. Add up the base's partials. 4. Add bias and the low-rank term;
              the programs of the first tile of Q store h. 5. Store.
    Source    Punica, arXiv:2310.18547; pylora/reference/multi_lora_linear.py
    """
    pid_m, pid_q = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    # 1. Find the tokens. Beyond the tile's end a token is M, which no mask lets through.
    adapter, first, end = tile_of(begin_ptr, groups, pid_m, BLOCK_M, by_place)
    if first >= end:
        return
    place = first + tl.arange(0, BLOCK_M)
    token = tl.load(order_ptr + place, mask=place < end, other=M)
    has_adapter = adapter < groups - 1
    # 2. Tokens without an adapter have h = 0.
    if h_ptr is not None:
        if (not has_adapter) & (pid_q == 0):
            for start in range(0, R, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                zeros = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                inside = (token < M)[:, None] & (r < R)[None, :]
                tl.store(h_ptr + token[:, None] * R + r[None, :], zeros, mask=inside)
    if IN_PLACE and not has_adapter:
        return
    # 3. Add up the base's partials.
    q = pid_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offset = token[:, None] * Q + q[None, :]
    inside = (token < M)[:, None] & (q < Q)[None, :]
    acc = tl.load(base_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    for split in range(1, base_splits):
        values = tl.load(base_ptr + split * (M.to(tl.int64) * Q) + offset, mask=inside, other=0.0)
        acc += values.to(tl.float32)
    # 4. Add bias and the low-rank term.
    if bias_ptr is not None:
        acc = add_to_columns(acc, bias_ptr, 1.0, q, Q, False)
    if has_adapter:
        acc = add_low_rank(
            acc,
            token,
            pid_q * BLOCK_Q,
            partials_ptr,
            splits,
            1.0,
            None,
            h_ptr,
            pid_q == 0,
            factor_ptr + adapter.to(tl.int64) * Q * R,
            tl.load(scalings_ptr + adapter),
            None,
            0,
            1.0,
            M,
            Q,
            R,
            "identity",
            OPERAND,
            PRECISION,
            RANK_FIRST,
            False,
            False,
            BLOCK_Q,
            BLOCK_R,
        )
    # 5. Store.
    tl.store(out_ptr + offset, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


def multi_lora_expand(
    base: Tensor,
    out: Tensor,
    partials: Tensor,
    factor: Tensor,
    scalings: Tensor,
    tokens: AdapterTokens,
    operands: Operands,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    rank_first: bool = False,
    in_place: bool = False,
) -> None:
    """Writes the sum of base [splits, M, Q] and the low-rank terms to out [M, Q].

    base      fp32 partials, to which `bias` is still to be added, or [1, M, Q] of out's dtype, with
              its bias; contiguous, as is `out`
    partials  fp32 [splits, M, R] of `multi_lora_shrink`
    factor    [adapters, Q, R], or [adapters, R, Q] if rank_first; contiguous
    scalings  fp32 [adapters]
    h         fp32 [M, R]; if given, gets the sum of `partials`, and zeros for tokens without an
              adapter
    in_place  True if base is out[None], whose tokens without an adapter stay as they are
    """
    (M, Q), adapters, R = out.shape, factor.shape[0], partials.shape[2]
    tile = multi_expand_tile(M, adapters, R)
    tiles = tokens.tiles(tile.block_m)
    with on_device_of(out):
        _multi_lora_expand_kernel[(tiles * cdiv(Q, tile.block_n),)](
            base_ptr=base,
            base_splits=base.shape[0],
            out_ptr=out,
            bias_ptr=bias,
            partials_ptr=partials,
            splits=partials.shape[0],
            h_ptr=h,
            factor_ptr=factor,
            scalings_ptr=scalings,
            **tokens.arguments(tile.block_m),
            tiles=tiles,
            M=M,
            Q=Q,
            R=R,
            RANK_FIRST=rank_first,
            IN_PLACE=in_place,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            BLOCK_M=tile.block_m,
            BLOCK_Q=tile.block_n,
            BLOCK_R=tile.block_k,
            num_warps=tile.num_warps,
            maxnreg=MAX_REGISTERS,
        )
