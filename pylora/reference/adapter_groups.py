"""Rows of x grouped by adapter: as segments where the lengths are known, as tiles where asking for
them would wait for a device.

A group offers the same on both sides: its adapter, which rows it takes, and where results go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_TILE_ROWS = 64


@dataclass(frozen=True)
class Segment:
    """All rows of one adapter.

    adapter    its index
    rows       int64, in ascending order
    """

    adapter: int
    rows: Tensor

    def gathered(self, rows: Tensor) -> Tensor:
        """rows [rows, features] -> [rows of the segment, features]."""
        return rows[self.rows]

    def scaled(self, values: Tensor, scalings: Tensor) -> Tensor:
        """values times the scaling of their adapter."""
        return values * scalings[self.adapter]

    def add_to(self, total: Tensor, values: Tensor) -> None:
        """Adds values [rows of the segment, features] to their rows of total, rounding once."""
        total[self.rows] = (total[self.rows] + values).to(total.dtype)

    def summed_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What a sum over the rows is to be computed in: one matmul finishes it."""
        return dtype

    def put_sum(self, total: Tensor, values: Tensor) -> None:
        """Stores a sum over the rows as its adapter's entry of total [adapters, ...]."""
        total[self.adapter] = values


@dataclass(frozen=True)
class Tiles:
    """All rows that have an adapter, in tiles of one adapter each, as a batch.

    The length of a segment is known to the device alone, but the number of tiles has a bound that
    depends on shapes: as in MoE kernels (vLLM's moe_align_block_size), each segment is padded to
    whole tiles.

    adapter    int64 [tiles]; for the unused tiles at the end it is a valid one all the same
    lengths    int64 [adapters]: tiles of each adapter, in order
    row        int64 [tiles, rows of a tile]; the number of rows where the place is empty
    place      int64 [rows]: the row's place among all of the tiles'; 0 without an adapter
    covered    bool [rows]: False for a row without an adapter
    """

    adapter: Tensor
    lengths: Tensor
    row: Tensor
    place: Tensor
    covered: Tensor

    def gathered(self, rows: Tensor) -> Tensor:
        """rows [rows, features] -> [tiles, rows of a tile, features], zero at empty places."""
        count = rows.shape[0]
        taken = rows[self.row.clamp(max=max(count - 1, 0))]
        return taken.masked_fill_((self.row == count).unsqueeze(-1), 0)

    def scaled(self, values: Tensor, scalings: Tensor) -> Tensor:
        # As with a Python number, but for one rounding less, whatever dtype they are given in.
        scalings = scalings.to(torch.promote_types(values.dtype, torch.float32))
        return values * scalings[self.adapter].view(-1, 1, 1)

    def add_to(self, total: Tensor, values: Tensor) -> None:
        taken = values.flatten(0, 1)[self.place]
        total.copy_(total + taken.masked_fill_(~self.covered.unsqueeze(-1), 0))

    def summed_dtype(self, dtype: torch.dtype) -> torch.dtype:
        # An adapter's tiles are added up after the matmul.
        return torch.promote_types(dtype, torch.float32)

    def put_sum(self, total: Tensor, values: Tensor) -> None:
        # Not index_add: on a GPU its order would change from run to run.
        flat = torch.segment_reduce(
            values.flatten(1), "sum", lengths=self.lengths, axis=0, unsafe=True
        )
        total.copy_(flat.view(total.shape))


Groups = Sequence[Segment | Tiles]


def groups(adapter_ids: Tensor, adapters: int, rank: int) -> Groups:
    """The groups of `adapter_ids` [rows]; a row whose id is outside [0, adapters) is in none."""
    if adapter_ids.device.type == "cpu":
        return segments(adapter_ids, adapters)
    # At least the rank: the adapters gathered for the tiles are then no larger than x and all of
    # the adapters together.
    return [tiles(adapter_ids, adapters, max(_TILE_ROWS, rank))]


def segments(adapter_ids: Tensor, adapters: int) -> list[Segment]:
    """One for each adapter that has rows; reads its ids."""
    ids, order = adapter_ids.sort(stable=True)
    begin = torch.searchsorted(ids, torch.arange(adapters + 1, device=ids.device)).tolist()
    return [
        Segment(index, order[first:last])
        for index, (first, last) in enumerate(pairwise(begin))
        if first < last
    ]


def tiles(adapter_ids: Tensor, adapters: int, tile_rows: int) -> Tiles:
    """All rows in tiles of `tile_rows`, without a wait for the device."""
    device, rows = adapter_ids.device, adapter_ids.numel()
    covered = (adapter_ids >= 0) & (adapter_ids < adapters)
    group, order = torch.where(covered, adapter_ids, adapters).sort(stable=True)
    begin = torch.searchsorted(group, torch.arange(adapters + 1, device=device))
    lengths = (begin.diff() + tile_rows - 1) // tile_rows
    last_tile = lengths.cumsum(0)
    # Each segment has less than one tile of padding, and no tile is without a row.
    count = min(rows, rows // tile_rows + adapters)
    adapter = torch.searchsorted(last_tile, torch.arange(count, device=device), right=True)
    safe_group = group.clamp(max=adapters - 1)
    first_place = (last_tile - lengths)[safe_group] * tile_rows
    within = torch.arange(rows, device=device) - begin[safe_group]
    # Rows without an adapter all go to one place behind the tiles, which is cut off.
    places = torch.where(group < adapters, first_place + within, count * tile_rows)
    row = torch.full((count * tile_rows + 1,), rows, device=device).scatter_(0, places, order)
    place = torch.empty_like(order).scatter_(0, order, places)
    return Tiles(
        adapter=adapter.clamp(max=adapters - 1),
        lengths=lengths,
        row=row[:-1].view(count, tile_rows),
        place=torch.where(covered, place, 0),
        covered=covered,
    )
