"""The gradients of stacked lora_A and lora_B: each adapter's sum over its own rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.adapter_rows import AdapterRows, tile_of
from pylora.kernels.configs import SUM_OF_PIECES, cdiv, weight_grad_config
from pylora.kernels.launch import MAX_REGISTERS, facts, on_device_of
from pylora.kernels.precision import Operands, as_operand, dot, rounded


@triton.jit
def _first_slot(begin, piece_rows):
    """Where the parts of an adapter of more than `piece_rows` rows begin, its first row at `begin`.

    c > L rows are cut into ceil(c / L) <= floor(2 c / L) pieces: nobody else has their slots.
    """
    return (2 * begin.to(tl.int64) // piece_rows).to(tl.int32)


@triton.jit(do_not_specialize=["groups", "by_place", "M", "piece_rows"])
def _multi_lora_weight_grad_kernel(
    wide_ptr,  # [M, P], rows stride_wide apart
    narrow_ptr,  # fp32 [M, R]
    scalings_ptr,  # fp32 [adapters]
    out_ptr,  # element (i, r, p) at i * R * P + r * stride_r + p * stride_p
    parts_ptr,  # fp32 [slots, R, P] in out's layout, or None: no adapter needs several pieces
    order_ptr,  # this and the following: see `adapter_rows`
    begin_ptr,
    groups,
    by_place,
    M,
    P,
    R,
    stride_wide,
    stride_r,
    stride_p,
    piece_rows,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[i] = (scalings[i] * narrow)^T @ wide over the rows of adapter i, or of a piece of them

    Shapes    wide [M, P] fp32|fp16|bf16; narrow fp32 [M, R]; out [adapters, R, P]
              (wide x and narrow grad @ lora_B give dlora_A, P = in_features; wide grad and narrow h
              give dlora_B^T, P = out_features; M = rows)
    Numerics  fp32 sums of BLOCK_M products each, added in fp32, rounded once.
    Grid      (tiles of P, fastest, times pieces of rows; tiles of R)
    Algorithm 1. Find the piece's rows: at most piece_rows of one adapter, so that no program has
              more to do than another where one adapter owns all rows. 2. Gather a tile of each
              operand, zero beyond the end, and multiply. 3. Store the sum where it is whole, else
              as one of the parts that `_sum_of_pieces_kernel` adds up, in order.
    Source    pylora/reference/multi_lora_linear.py
    """
    tiles_p = tl.cdiv(P, BLOCK_P)
    pid_p, piece = tl.program_id(0) % tiles_p, tl.program_id(0) // tiles_p
    # 1.
    adapter, first, last = tile_of(begin_ptr, groups, piece, piece_rows, by_place)
    if (adapter == groups - 1) | (first >= last):
        return
    p = pid_p * BLOCK_P + tl.arange(0, BLOCK_P)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    scaling = tl.load(scalings_ptr + adapter)
    # 2.
    acc = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_M):
        place = start + tl.arange(0, BLOCK_M)
        row = tl.load(order_ptr + place, mask=place < last, other=0)
        wide = tl.load(
            wide_ptr + row[:, None] * stride_wide + p[None, :],
            mask=(place < last)[:, None] & (p < P)[None, :],
            other=0.0,
        )
        narrow = tl.load(
            narrow_ptr + row[:, None] * R + r[None, :],
            mask=(place < last)[:, None] & (r < R)[None, :],
            other=0.0,
        )
        narrow = rounded(scaling * narrow, OPERAND)
        acc += dot(as_operand(wide, OPERAND).T, narrow, PRECISION)
    # 3.
    offset = r.to(tl.int64)[None, :] * stride_r + p.to(tl.int64)[:, None] * stride_p
    inside = (p < P)[:, None] & (r < R)[None, :]
    size = R.to(tl.int64) * P
    begin = tl.load(begin_ptr + adapter)
    if parts_ptr is not None:
        if tl.load(begin_ptr + adapter + 1) - begin > piece_rows:
            slot = _first_slot(begin, piece_rows) + (first - begin) // piece_rows
            tl.store(parts_ptr + slot * size + offset, acc, mask=inside)
            return
    out = out_ptr + adapter * size + offset
    tl.store(out, rounded(acc, out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["piece_rows"])
def _sum_of_pieces_kernel(
    parts_ptr,  # fp32 [slots, size]
    out_ptr,  # [adapters, size]
    begin_ptr,  # see `adapter_rows`
    size,
    piece_rows,
    BLOCK: tl.constexpr,
):
    """out[i] = sum of adapter i's parts, in order, where it has several

    Grid      (tiles of size, fastest, times adapters)
    """
    tiles = tl.cdiv(size, BLOCK)
    element = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    adapter = tl.program_id(0) // tiles
    begin = tl.load(begin_ptr + adapter)
    pieces = tl.cdiv(tl.load(begin_ptr + adapter + 1) - begin, piece_rows)
    if pieces <= 1:
        return
    part = parts_ptr + _first_slot(begin, piece_rows).to(tl.int64) * size + element
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(pieces):
        total += tl.load(part, mask=element < size, other=0.0)
        part += size
    out = out_ptr + adapter.to(tl.int64) * size + element
    tl.store(out, rounded(total, out_ptr.dtype.element_ty), mask=element < size)


def multi_lora_weight_grad(
    wide: Tensor,
    narrow: Tensor,
    scalings: Tensor,
    rows: AdapterRows,
    operands: Operands,
    out: Tensor,
) -> None:
    """Adds up (scalings[i] * narrow)^T @ wide over each adapter's rows, into `out`.

    wide      [M, P], any row stride
    narrow    fp32 [M, R], contiguous
    scalings  fp32 [adapters]
    out       [adapters, R, P], dense in memory with P or R innermost; zero, and stays it where an
              adapter has no rows
    """
    (M, P), R = wide.shape, narrow.shape[1]
    fp32 = operands.dtype == tl.float32
    config, splits, piece_rows = weight_grad_config(M, P, R, fp32, facts(wide))
    parts = None
    if splits > 1:
        parts = wide.new_empty(2 * M // piece_rows, R * P, dtype=torch.float32)
    pieces = rows.tiles(piece_rows)
    with on_device_of(wide):
        _multi_lora_weight_grad_kernel[(cdiv(P, config.block_m) * pieces, cdiv(R, config.block_r))](
            wide_ptr=wide,
            narrow_ptr=narrow,
            scalings_ptr=scalings,
            out_ptr=out,
            parts_ptr=parts,
            **rows.arguments(piece_rows),
            M=M,
            P=P,
            R=R,
            stride_wide=wide.stride(0),
            stride_r=out.stride(1),
            stride_p=out.stride(2),
            piece_rows=piece_rows,
            OPERAND=operands.dtype,
            PRECISION=operands.precision,
            BLOCK_P=config.block_m,
            BLOCK_R=config.block_r,
            BLOCK_M=config.block_k,
            num_warps=config.num_warps,
            maxnreg=MAX_REGISTERS,
            num_stages=config.num_stages,
        )
        if parts is not None:
            size, block = R * P, SUM_OF_PIECES.elements
            _sum_of_pieces_kernel[(cdiv(size, block) * out.shape[0],)](
                parts,
                out,
                rows.begin,
                size,
                piece_rows,
                BLOCK=block,
                num_warps=SUM_OF_PIECES.num_warps,
                maxnreg=MAX_REGISTERS,
            )
