"""Finishing an output whose base product is there, each row with the factor of its adapter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.adapter_rows import AdapterRows, tile_of
from pylora.kernels.configs import cdiv, multi_expand_tile
from pylora.kernels.epilogue import add_low_rank, add_to_columns
from pylora.kernels.launch import MAX_REGISTERS, on_device_of
from pylora.kernels.precision import Operands, rounded


@triton.jit(do_not_specialize=["base_parts", "parts", "groups", "by_place", "M"])
def _multi_lora_expand_kernel(
    base_ptr,  # [base_parts, M, Q], fp32 or of the output's dtype
    base_parts,
    out_ptr,  # [M, Q]; base itself where IN_PLACE
    bias_ptr,  # [Q] or None
    parts_ptr,  # fp32 [parts, M, R]
    parts,
    h_ptr,  # fp32 [M, R] or None
    factor_ptr,  # [adapters, Q, R], or [adapters, R, Q] where RANK_FIRST
    scalings_ptr,  # fp32 [adapters]
    order_ptr,  # this and the following: see `adapter_rows`
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
    """out[m] = sum(base[:, m]) + bias + scalings[i] * h[m] @ factor[i]^T, i the adapter of row m

    Shapes    base [base_parts, M, Q]; out [M, Q]; h = sum(parts), parts fp32 [parts, M, R]; factor
              [adapters, Q, R]  (M = rows, Q = features of the output, R = rank; in the backward
              pass factor is lora_A and Q is in_features)
    Numerics  fp32 sums in the order of the parts, rounded once; where the base is finished already,
              it was rounded before as well.
    Grid      (tiles of rows, fastest, times tiles of Q)
    Algorithm 1. Find the tile's rows. 2. Without an adapter h is zero, and an output in place is
              left alone. 3. Add the base's parts up. 4. Add bias and the low-rank term; the
              programs of the first tile of Q store h. 5. Store.
    Source    Punica, arXiv:2310.18547; pylora/reference/multi_lora_linear.py
    """
    pid_m, pid_q = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    # 1. Beyond the tile's end a row is M, which no mask lets through.
    adapter, first, last = tile_of(begin_ptr, groups, pid_m, BLOCK_M, by_place)
    if first >= last:
        return
    place = first + tl.arange(0, BLOCK_M)
    row = tl.load(order_ptr + place, mask=place < last, other=M)
    has_adapter = adapter < groups - 1
    # 2.
    if h_ptr is not None:
        if (not has_adapter) & (pid_q == 0):
            for start in range(0, R, BLOCK_R):
                r = start + tl.arange(0, BLOCK_R)
                zeros = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                inside = (row < M)[:, None] & (r < R)[None, :]
                tl.store(h_ptr + row[:, None] * R + r[None, :], zeros, mask=inside)
    if IN_PLACE and not has_adapter:
        return
    # 3.
    q = pid_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offset = row[:, None] * Q + q[None, :]
    inside = (row < M)[:, None] & (q < Q)[None, :]
    acc = tl.load(base_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, base_parts):
        values = tl.load(base_ptr + part * (M.to(tl.int64) * Q) + offset, mask=inside, other=0.0)
        acc += values.to(tl.float32)
    # 4.
    if bias_ptr is not None:
        acc = add_to_columns(acc, bias_ptr, 1.0, q, Q, False)
    if has_adapter:
        acc = add_low_rank(
            acc,
            row,
            pid_q * BLOCK_Q,
            parts_ptr,
            parts,
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
    # 5.
    tl.store(out_ptr + offset, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


def multi_lora_expand(
    base: Tensor,
    out: Tensor,
    parts: Tensor,
    factor: Tensor,
    scalings: Tensor,
    rows: AdapterRows,
    operands: Operands,
    bias: Tensor | None = None,
    h: Tensor | None = None,
    rank_first: bool = False,
) -> None:
    """base [base_parts, M, Q] -> out [M, Q], both contiguous; h gets the sum of `parts`.

    base      fp32 partial sums without the bias, or out[None], to which the bias was added already
    parts     fp32 [parts, M, R] of `multi_lora_shrink`
    factor    [adapters, Q, R], or [adapters, R, Q] where rank_first; contiguous
    scalings  fp32 [adapters]
    h         fp32 [M, R], zero where a row has no adapter
    """
    (M, Q), adapters, R = out.shape, factor.shape[0], parts.shape[2]
    tile = multi_expand_tile(M, adapters, R)
    tiles = rows.tiles(tile.block_m)
    with on_device_of(out):
        _multi_lora_expand_kernel[(tiles * cdiv(Q, tile.block_n),)](
            base_ptr=base,
            base_parts=base.shape[0],
            out_ptr=out,
            bias_ptr=bias,
            parts_ptr=parts,
            parts=parts.shape[0],
            h_ptr=h,
            factor_ptr=factor,
            scalings_ptr=scalings,
            **rows.arguments(tile.block_m),
            tiles=tiles,
            M=M,
            Q=Q,
            R=R,
            RANK_FIRST=rank_first,
            IN_PLACE=base.shape[0] == 1,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            BLOCK_M=tile.block_m,
            BLOCK_Q=tile.block_n,
            BLOCK_R=tile.block_k,
            num_warps=tile.num_warps,
            maxnreg=MAX_REGISTERS,
        )
