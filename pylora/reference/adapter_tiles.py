"""Rows sorted by adapter and cut into tiles of one adapter each, without a wait for the device.

A segment of rows has a length that only the device knows; the number of tiles has a bound that
depends on shapes alone. As in MoE kernels (vLLM's moe_align_block_size), every segment is padded to
whole tiles, so that batched matmuls over tiles serve any mixture of adapters without a host sync.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TILE_ROWS = 64


def tile_rows_of(rank: int) -> int:
    """Rows of a tile: at least the rank, so that the adapters gathered for the tiles are no larger
    than x and all the adapters together."""
    return max(_TILE_ROWS, rank)


@dataclass(frozen=True)
class AdapterTiles:
    """Where each row lies in the tiles.

    adapter    int64 [tiles]; for the unused tiles at the end it is a valid one all the same
    lengths    int64 [adapters]: tiles of each adapter, in order
    row        int64 [tiles, tile_rows]; the number of rows where the place is empty
    place      int64 [rows]: tile * tile_rows + place in it; 0 for a row without an adapter
    covered    bool [rows]: False for a row without an adapter
    """

    adapter: Tensor
    lengths: Tensor
    row: Tensor
    place: Tensor
    covered: Tensor

    def gathered(self, rows: Tensor) -> Tensor:
        """rows [rows, features] -> [tiles, tile_rows, features], zero at the empty places."""
        count = rows.shape[0]
        taken = rows[self.row.clamp(max=max(count - 1, 0))]
        return taken.masked_fill_((self.row == count).unsqueeze(-1), 0)

    def scattered(self, tiles: Tensor) -> Tensor:
        """[tiles, tile_rows, features] -> [rows, features], zero for rows without an adapter."""
        taken = tiles.flatten(0, 1)[self.place]
        return taken.masked_fill_(~self.covered.unsqueeze(-1), 0)

    def sum_by_adapter(self, tiles: Tensor) -> Tensor:
        """[tiles, ...] -> [adapters, ...]: each adapter's own tiles, in a fixed order."""
        # Not index_add: on a GPU its order would change from run to run.
        flat = torch.segment_reduce(
            tiles.flatten(1), "sum", lengths=self.lengths, axis=0, unsafe=True
        )
        return flat.view(-1, *tiles.shape[1:])


def adapter_tiles(adapter_ids: Tensor, adapters: int, tile_rows: int) -> AdapterTiles:
    """The tiles of `adapter_ids` [rows]; an id outside [0, adapters) means no adapter."""
    device, rows = adapter_ids.device, adapter_ids.numel()
    covered = (adapter_ids >= 0) & (adapter_ids < adapters)
    group = torch.where(covered, adapter_ids, adapters)
    order = torch.argsort(group, stable=True)
    group = group[order]
    start = torch.searchsorted(group, torch.arange(adapters + 1, device=device))
    lengths = (start.diff() + tile_rows - 1) // tile_rows
    last_tile = lengths.cumsum(0)
    # Each segment has less than one tile of padding, and no tile is without a row.
    tiles = min(rows, rows // tile_rows + adapters)
    adapter = torch.searchsorted(last_tile, torch.arange(tiles, device=device), right=True)
    safe_group = group.clamp(max=adapters - 1)
    first_place = (last_tile - lengths)[safe_group] * tile_rows
    within = torch.arange(rows, device=device) - start[safe_group]
    # Rows without an adapter all go to one place behind the tiles, which is cut off.
    places = torch.where(group < adapters, first_place + within, tiles * tile_rows)
    row = torch.full((tiles * tile_rows + 1,), rows, device=device).scatter_(0, places, order)
    place = torch.empty_like(order).scatter_(0, order, places)
    return AdapterTiles(
        adapter=adapter.clamp(max=adapters - 1),
        lengths=lengths,
        row=row[:-1].view(tiles, tile_rows),
        place=torch.where(covered, place, 0),
        covered=covered,
    )
