"""The rows of x by adapter, found on the device, and which of them a program takes.

Rows without an adapter are a group of their own, the last one. How many rows a group has is known
to the device alone; the number of tiles has a bound that depends on shapes, and tiles beyond the
end of a group are empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pylora.kernels.configs import ADAPTER_ROWS, cdiv
from pylora.kernels.launch import MAX_REGISTERS, on_device_of


@triton.jit
def _group_of(adapter_id, adapters):
    return tl.where((adapter_id >= 0) & (adapter_id < adapters), adapter_id, adapters).to(tl.int32)


@triton.jit(do_not_specialize=["M", "adapters"])
def _adapter_rows_kernel(
    ids_ptr,  # int64 [M]
    order_ptr,  # int64 [M]
    begin_ptr,  # int32 [adapters + 2]
    M,
    adapters,
    BLOCK_M: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """A stable counting sort: the place of a row is the number of rows that come before it.

    Shapes    ids [M]; order [M]: the rows by group, ascending within each; begin [adapters + 2]:
              the place of each group's first row, and M behind the last  (M = rows)
    Grid      one program per BLOCK_M of M rows and adapters + 2 group boundaries
    Algorithm 1. Take rows, and behind them boundaries, which come before all rows of their group.
              2. Count the rows before each, BLOCK_J at a time. 3. Store them at their places.
    Limits    M^2 comparisons: for up to some thousand rows.
    """
    # 1.
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = query < M
    own_id = tl.load(ids_ptr + query, mask=is_row, other=0)
    group = tl.where(is_row, _group_of(own_id, adapters), query - M)[:, None]
    row = tl.where(is_row, query, -1)[:, None]
    # 2.
    before = tl.zeros((BLOCK_M, BLOCK_J), tl.int32)
    for start in range(0, M, BLOCK_J):
        other = start + tl.arange(0, BLOCK_J)
        other_id = tl.load(ids_ptr + other, mask=other < M, other=0)
        other_group = tl.where(other < M, _group_of(other_id, adapters), adapters + 2)[None, :]
        comes_before = (other_group < group) | ((other_group == group) & (other[None, :] < row))
        before += comes_before.to(tl.int32)
    place = tl.sum(before, axis=1)
    # 3.
    tl.store(order_ptr + place, query.to(tl.int64), mask=is_row)
    boundary = query - M
    tl.store(begin_ptr + boundary, place, mask=(boundary >= 0) & (boundary < adapters + 2))


@triton.jit
def _first_tile(begin, group, tile_rows, by_place):
    """The number of a group's first tile: any that no other group's tiles can have.

    A group of c rows from b on has at most floor((b mod T + c) / T) + 1 tiles of T rows, so that
    floor(b / T) + group leaves room for them; where groups outnumber rows, b does as well.
    """
    return tl.where(by_place != 0, begin, begin // tile_rows + group)


@triton.jit
def tile_of(begin_ptr, groups, index, tile_rows, by_place):
    """(group, first place, place behind the last) of a tile; an empty tile has first >= last."""
    low = 0
    high = groups - 1
    while low < high:
        middle = (low + high + 1) // 2
        is_behind = _first_tile(tl.load(begin_ptr + middle), middle, tile_rows, by_place) > index
        low = tl.where(is_behind, low, middle)
        high = tl.where(is_behind, middle - 1, high)
    begin = tl.load(begin_ptr + low)
    first = begin + (index - _first_tile(begin, low, tile_rows, by_place)) * tile_rows
    return low, first, tl.minimum(first + tile_rows, tl.load(begin_ptr + low + 1))


class AdapterRows(NamedTuple):
    """order int64 [rows]: the rows by group; begin int32 [groups + 1]: where each group begins."""

    order: Tensor
    begin: Tensor

    @property
    def groups(self) -> int:
        """The adapters, and the rows without one."""
        return self.begin.numel() - 1

    def tiles(self, tile_rows: int) -> int:
        """A bound on the tiles, `tile_rows` rows of one group each."""
        rows = self.order.numel()
        return min(rows, rows // tile_rows + self.groups)

    def arguments(self, tile_rows: int) -> dict[str, Any]:
        """As keyword arguments of a kernel that asks `tile_of`."""
        rows = self.order.numel()
        return {
            "order_ptr": self.order,
            "begin_ptr": self.begin,
            "groups": self.groups,
            "by_place": int(self.tiles(tile_rows) == rows),
        }


def adapter_rows(ids: Tensor, adapters: int) -> AdapterRows:
    """The rows of each adapter: ids int64 [rows]; outside [0, adapters) is without an adapter."""
    rows = ids.numel()
    if rows > ADAPTER_ROWS.most_counted:
        group, order = torch.where((ids >= 0) & (ids < adapters), ids, adapters).sort(stable=True)
        boundaries = torch.arange(adapters + 2, device=ids.device)
        return AdapterRows(order, torch.searchsorted(group, boundaries, out_int32=True))
    order = torch.empty_like(ids)
    begin = ids.new_empty(adapters + 2, dtype=torch.int32)
    config = ADAPTER_ROWS
    with on_device_of(ids):
        _adapter_rows_kernel[(cdiv(rows + adapters + 2, config.block_m),)](
            ids,
            order,
            begin,
            rows,
            adapters,
            BLOCK_M=config.block_m,
            BLOCK_J=config.block_j,
            maxnreg=MAX_REGISTERS,
        )
    return AdapterRows(order, begin)
